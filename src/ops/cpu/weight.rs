//! The rows of a frozen matrix, in panels that a product can take.

use std::ops::Range;

use candle_core::Result;

use super::gemm::Matrix;
use super::{Real, Values, values};
use crate::quant::{Quantized, Weight};

/// Elements that are dequantized at once: 8 MiB of f32, wide enough for products at full speed.
const PANEL: usize = 1 << 21;

/// Calls `with` on the rows of a matrix in order, with the range that they are: all at once or `at_most` so many where the
/// matrix is dense, and where it is quantized no more than fit the scratch memory.
pub(crate) fn panels<T: Real>(
    weight: &Weight,
    at_most: Option<usize>,
    mut with: impl FnMut(Range<usize>, Matrix<'_, T>),
) -> Result<()> {
    let (rows, columns) = weight.dims()?;
    let whole = match weight {
        Weight::Dense(_) => rows,
        Weight::Quantized(_) => (PANEL / columns.max(1)).max(64),
        #[cfg(feature = "cuda")]
        Weight::OnDevice(_) => candle_core::bail!("a CPU kernel was given a matrix on a GPU"),
    };
    let step = at_most.unwrap_or(whole).max(1);
    let ranges = (0..rows).step_by(step).map(|start| start..(start + step).min(rows));
    match weight {
        Weight::Dense(tensor) => {
            let values = values::<T>(tensor)?;
            for range in ranges {
                let panel = Matrix::new(&values[range.start * columns..range.end * columns], range.len(), columns);
                with(range, panel);
            }
        }
        Weight::Quantized(quantized) => {
            let mut scratch = vec![0.0; step.min(rows) * columns];
            let mut converted = Vec::new();
            for range in ranges {
                let scratch = &mut scratch[..range.len() * columns];
                quantized.panel(range.clone(), scratch);
                let panel = T::of_f32s(scratch, &mut converted);
                with(range.clone(), Matrix::new(panel, range.len(), columns));
            }
        }
        #[cfg(feature = "cuda")]
        Weight::OnDevice(_) => {}
    }
    Ok(())
}

/// Single rows of a frozen matrix.
pub(crate) enum Rows<'w, T> {
    Dense(Values<'w, T>, usize),
    Quantized(&'w Quantized),
}

/// Room for one row.
pub(crate) struct Scratch<T> {
    single: Vec<f32>,
    converted: Vec<T>,
}

impl<T> Scratch<T> {
    pub(crate) fn new() -> Self {
        Self { single: Vec::new(), converted: Vec::new() }
    }
}

impl<'w, T: Real> Rows<'w, T> {
    pub(crate) fn of(weight: &'w Weight) -> Result<Self> {
        Ok(match weight {
            Weight::Dense(tensor) => Self::Dense(values(tensor)?, weight.dims()?.1),
            Weight::Quantized(quantized) => Self::Quantized(quantized),
            #[cfg(feature = "cuda")]
            Weight::OnDevice(_) => candle_core::bail!("a CPU kernel was given a matrix on a GPU"),
        })
    }

    pub(crate) fn row<'s>(&'s self, row: usize, scratch: &'s mut Scratch<T>) -> &'s [T] {
        match self {
            Self::Dense(values, columns) => &values[row * columns..][..*columns],
            Self::Quantized(quantized) => {
                scratch.single.resize(quantized.columns(), 0.0);
                quantized.row(row, &mut scratch.single);
                T::of_f32s(&scratch.single, &mut scratch.converted)
            }
        }
    }
}
