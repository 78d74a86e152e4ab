//! Rotary position embedding in Hugging Face's rotate-half form (Su et al. 2021, <https://arxiv.org/abs/2104.09864>).
//!
//! Column `j < E/2` of a head and column `j + E/2` are one pair, turned by `position · inverse_frequency[j]`.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
#[cfg(feature = "cuda")]
use super::on_gpu;
use super::{Form, cpu, form};

/// Cosines and sines of the rows of one batch, made once and used in every layer, forward and backward.
#[derive(Debug, Clone)]
pub struct Angles {
    /// `[T, E/2]`
    cos: Tensor,
    /// `[T, E/2]`
    sin: Tensor,
}

/// Forward turns by `+θ`; backward, being the transpose of a rotation (and of what it is scaled by), by `−θ`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// By `+θ`: the embedding.
    Forward,
    /// By `−θ`: its gradient.
    Backward,
}

impl Angles {
    /// The angles of rows at `positions`, by each row's inverse frequencies; cosines and sines times `factor`.
    ///
    /// They are products in f32, as transformers computes them: an exact angle would differ from what the model was
    /// trained with by up to `position · 6e-8`.
    ///
    /// # Errors
    /// What candle returns.
    pub fn new<'f>(
        inverse_frequencies: impl Fn(usize) -> &'f [f32] + Sync,
        positions: &[u32],
        factor: f32,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let half = if positions.is_empty() { 0 } else { inverse_frequencies(0).len() };
        let of_row =
            |(row, &position): (usize, &u32)| inverse_frequencies(row).iter().map(move |f| position as f32 * f);
        let angles: Vec<f32> = positions.par_iter().enumerate().flat_map_iter(of_row).collect();
        let table = |of: fn(f64) -> f64| {
            let values: Vec<f32> = angles.par_iter().map(|&angle| of(f64::from(angle)) as f32 * factor).collect();
            Tensor::from_vec(values, (positions.len(), half), device)?.to_dtype(dtype)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// The angles of some of the rows.
    ///
    /// # Errors
    /// A row that is not there.
    pub fn of_rows(&self, rows: &[u32]) -> Result<Self> {
        Ok(Self { cos: super::rows::gather(&self.cos, rows)?, sin: super::rows::gather(&self.sin, rows)? })
    }
}

/// Turns every head of `x [T, heads·E]` by its row's angles.
///
/// # Errors
/// What candle returns for wrong shapes.
pub fn turn(x: &Tensor, angles: &Angles, turn: Turn) -> Result<Tensor> {
    match form(x) {
        Form::Cpu => return cpu::rope::turn(x, &angles.cos, &angles.sin, turn),
        #[cfg(feature = "cuda")]
        Form::Cuda => {
            let turned = cuda::rope::turn(&[(x, &angles.cos, &angles.sin)], turn)?;
            return turned.into_iter().next().ok_or_else(|| candle_core::Error::Msg("one matrix".into()));
        }
        Form::Composed => {}
    }
    let (rows, width) = x.dims2()?;
    let half = angles.cos.dims()[1];
    let heads = width / (2 * half);
    let cos = angles.cos.unsqueeze(1)?;
    let mut sin = angles.sin.unsqueeze(1)?;
    if turn == Turn::Backward {
        sin = sin.neg()?;
    }
    let x = x.reshape((rows, heads, 2 * half))?;
    let (first, second) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::cat(&[turned_first, turned_second], 2)?.reshape((rows, width))
}

/// [`turn`] of queries and of keys, each by their own rows' angles; on a GPU in one launch.
///
/// # Errors
/// What candle returns for wrong shapes.
pub fn turn_both([q, k]: [&Tensor; 2], angles: [&Angles; 2], way: Turn) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if on_gpu(q) {
        let [of_q, of_k] = angles;
        let turned = cuda::rope::turn(&[(q, &of_q.cos, &of_q.sin), (k, &of_k.cos, &of_k.sin)], way)?;
        return turned.try_into().map_err(|_| candle_core::Error::Msg("two matrices".into()));
    }
    Ok([turn(q, angles[0], way)?, turn(k, angles[1], way)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    fn angles(positions: &[u32]) -> Result<Angles> {
        Angles::new(|_| &[1.0, 0.3, 0.01], positions, 1.25, DType::F64, &Device::Cpu)
    }

    #[test]
    fn backward_agrees_with_finite_differences() -> Result<()> {
        let (x, dy, angles) = (normal(1, (4, 12))?, normal(2, (4, 12))?, angles(&[0, 1, 7, 39])?);
        let dx = turn(&dy, &angles, Turn::Backward)?;
        finite_difference(&x, &dx, |x| (turn(x, &angles, Turn::Forward)? * &dy)?.sum_all())
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        let (x, angles) = (normal(1, (4, 12))?, angles(&[3, 0, 3, 20])?);
        for way in [Turn::Forward, Turn::Backward] {
            close(&turn(&x, &angles, way)?, &composed(|| turn(&x, &angles, way))?, 1e-14)?;
        }
        Ok(())
    }
}
