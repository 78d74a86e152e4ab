//! Frozen matrices as a base keeps them: dense, or quantized and dequantized a few rows at a time.
//!
//! Quantized means dequantize, then multiply: forward and backward see the same weights, those that a merge would write.

pub mod ggml;
pub mod nf4;

use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use memmap2::Mmap;
use rayon::prelude::*;

use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use crate::ops::cuda::weight::Resident;
use crate::ops::rows;
use ggml::BlockType;
use nf4::Nf4;

/// How the matrices of a base are kept in memory: `[model] quant`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names that GGUF and bitsandbytes give them")]
pub enum Quant {
    /// In f32, or as the file has them where that is quantized.
    #[default]
    None,
    F16,
    Bf16,
    Q8_0,
    Q6K,
    Q5K,
    Q5_1,
    Q5_0,
    Q4K,
    Q4_1,
    Q4_0,
    Q3K,
    Q2K,
    Nf4,
}

/// How one matrix is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// f32
    Dense,
    /// GGUF's blocks.
    Blocks(BlockType),
    /// NF4 with double quantization.
    Nf4,
}

impl Quant {
    /// All of them, with their name in a recipe.
    pub const ALL: [(&str, Self); 14] = [
        ("none", Self::None),
        ("f16", Self::F16),
        ("bf16", Self::Bf16),
        ("q8_0", Self::Q8_0),
        ("q6_k", Self::Q6K),
        ("q5_k", Self::Q5K),
        ("q5_1", Self::Q5_1),
        ("q5_0", Self::Q5_0),
        ("q4_k", Self::Q4K),
        ("q4_1", Self::Q4_1),
        ("q4_0", Self::Q4_0),
        ("q3_k", Self::Q3K),
        ("q2_k", Self::Q2K),
        ("nf4", Self::Nf4),
    ];

    /// By its name in a recipe.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn by_name(name: &str) -> std::result::Result<Self, String> {
        let names = || Self::ALL.iter().map(|(name, _)| *name);
        let of_name = Self::ALL.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        of_name
            .map(|(_, quant)| *quant)
            .ok_or_else(|| format!("it is one of {}", names().collect::<Vec<_>>().join(", ")))
    }

    /// Its name in a recipe.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, quant)| *quant == self).map_or("", |(name, _)| name)
    }

    /// How a linear module's matrix is kept, whose rows have so many columns. As llama.cpp does, K-quants fall back to a
    /// block of 32 where 256 do not fit, and that to f16.
    #[must_use]
    pub fn of_linear(self, columns: usize) -> Kept {
        use BlockType as B;
        let (first, second) = match self {
            Self::None => return Kept::Dense,
            Self::Nf4 => return Kept::Nf4,
            Self::F16 => (B::F16, B::F16),
            Self::Bf16 => (B::BF16, B::BF16),
            Self::Q8_0 => (B::Q8_0, B::Q8_0),
            Self::Q6K => (B::Q6K, B::Q8_0),
            Self::Q5K => (B::Q5K, B::Q5_1),
            Self::Q5_1 => (B::Q5_1, B::Q5_1),
            Self::Q5_0 => (B::Q5_0, B::Q5_0),
            Self::Q4K => (B::Q4K, B::Q5_0),
            Self::Q4_1 => (B::Q4_1, B::Q4_1),
            Self::Q4_0 => (B::Q4_0, B::Q4_0),
            Self::Q3K => (B::Q3K, B::Q4_0),
            Self::Q2K => (B::Q2K, B::Q4_0),
        };
        let fits = |kind: &B| columns.is_multiple_of(kind.block_size());
        Kept::Blocks([first, second].into_iter().find(fits).unwrap_or(B::F16))
    }

    /// How embedding and head are kept. They bear less than the layers do: of fewer than six bits they keep six, as
    /// llama.cpp's heads, and beside NF4 they are not quantized, as with bitsandbytes, but kept in bf16.
    #[must_use]
    pub fn of_embedding(self, columns: usize) -> Kept {
        match self {
            Self::Nf4 => Kept::Blocks(BlockType::BF16),
            Self::None | Self::F16 | Self::Bf16 | Self::Q8_0 => self.of_linear(columns),
            _ => Self::Q6K.of_linear(columns),
        }
    }
}

impl Kept {
    /// Bytes of `[rows, columns]`.
    #[must_use]
    pub fn num_bytes(self, rows: usize, columns: usize) -> usize {
        let elements = rows * columns;
        match self {
            Self::Dense => 4 * elements,
            Self::Blocks(kind) => elements / kind.block_size() * kind.block_bytes(),
            Self::Nf4 => nf4::num_bytes(elements),
        }
    }

    /// Keeps a matrix so.
    ///
    /// # Errors
    /// What candle returns.
    pub fn keep(self, rows: usize, columns: usize, values: Vec<f32>) -> Result<Weight> {
        let quantized = match self {
            Self::Dense => return Tensor::from_vec(values, (rows, columns), &Device::Cpu).map(Weight::Dense),
            Self::Blocks(kind) => {
                Quantized::ggml(rows, columns, kind, Bytes::Owned(Arc::new(kind.quantize(&values))))
            }
            Self::Nf4 => Quantized::nf4(rows, columns, Nf4::quantize(&values)),
        };
        quantized.map(Weight::Quantized).map_err(candle_core::Error::Msg)
    }
}

/// A frozen matrix `[rows, columns]`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// As it is.
    Dense(Tensor),
    /// In blocks.
    Quantized(Quantized),
    /// In blocks on a GPU.
    #[cfg(feature = "cuda")]
    OnDevice(Resident),
}

/// A quantized matrix, stored row by row. Cloning it copies nothing.
#[derive(Debug, Clone)]
pub struct Quantized {
    rows: usize,
    columns: usize,
    format: Format,
    /// Rows of each head stand in pairs, as llama.cpp turns them: the head's size.
    paired: Option<usize>,
}

#[derive(Debug, Clone)]
enum Format {
    Ggml(BlockType, Bytes),
    Nf4(Arc<Nf4>),
}

/// What a quantized matrix is made of.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stored<'q> {
    Ggml(BlockType, &'q [u8]),
    Nf4(&'q Nf4),
}

/// Bytes in memory, or of a mapped file.
#[derive(Debug, Clone)]
pub enum Bytes {
    /// In memory.
    Owned(Arc<Vec<u8>>),
    /// Part of a file.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Mapped(map, range) => &map[range.clone()],
        }
    }
}

impl Quantized {
    /// A matrix in GGUF's blocks.
    ///
    /// # Errors
    /// Rows are no whole number of blocks, or the bytes are not those of so many.
    pub fn ggml(rows: usize, columns: usize, kind: BlockType, bytes: Bytes) -> std::result::Result<Self, String> {
        let Some(of_row) = kind.row_bytes(columns) else {
            return Err(format!("rows of {columns} are no whole number of {kind} blocks of {}", kind.block_size()));
        };
        if of_row.checked_mul(rows) != Some(bytes.len()) {
            return Err(format!("{} bytes are not {rows} rows of {of_row}", bytes.len()));
        }
        if !kind.is_aligned(&bytes) {
            return Err("its blocks do not begin where their numbers can be read".into());
        }
        Ok(Self { rows, columns, format: Format::Ggml(kind, bytes), paired: None })
    }

    /// A matrix in NF4.
    ///
    /// # Errors
    /// It has another number of elements.
    pub fn nf4(rows: usize, columns: usize, nf4: Nf4) -> std::result::Result<Self, String> {
        if rows.checked_mul(columns) != Some(nf4.len()) {
            return Err(format!("{} elements are not [{rows}, {columns}]", nf4.len()));
        }
        Ok(Self { rows, columns, format: Format::Nf4(Arc::new(nf4)), paired: None })
    }

    /// Bytes of the blocks.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match &self.format {
            Format::Ggml(_, bytes) => bytes.len(),
            Format::Nf4(nf4) => nf4.num_bytes(),
        }
    }

    /// Number of columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The same matrix in Hugging Face's order of rows, where llama.cpp's converter has put the two halves of each head
    /// of `head_dim` rows between each other.
    #[must_use]
    pub fn unpaired(self, head_dim: usize) -> Self {
        Self { paired: Some(head_dim), ..self }
    }

    /// Its bytes, if they are blocks of that type, with rows in the order of llama.cpp where heads of `paired` rows have it
    /// and in Hugging Face's otherwise.
    #[must_use]
    pub fn blocks(&self, kind: BlockType, paired: Option<usize>) -> Option<&[u8]> {
        match &self.format {
            Format::Ggml(own, bytes) if *own == kind && self.paired == paired => Some(bytes),
            _ => None,
        }
    }

    /// What it is made of, and the head's size where rows of each head stand in pairs.
    #[cfg(feature = "cuda")]
    pub(crate) fn stored(&self) -> (Stored<'_>, Option<usize>) {
        let stored = match &self.format {
            Format::Ggml(kind, bytes) => Stored::Ggml(*kind, bytes),
            Format::Nf4(nf4) => Stored::Nf4(nf4),
        };
        (stored, self.paired)
    }

    /// Dequantizes one row.
    ///
    /// # Panics
    /// There is no such row, or `values` is of another length than the columns.
    pub fn row(&self, row: usize, values: &mut [f32]) {
        assert!(row < self.rows && values.len() == self.columns, "row {row} of a matrix of {} rows", self.rows);
        let row = match self.paired {
            None => row,
            Some(head_dim) => paired_row(row, head_dim),
        };
        match &self.format {
            Format::Ggml(kind, bytes) => {
                let of_row = bytes.len() / self.rows;
                kind.dequantize(&bytes[row * of_row..][..of_row], values);
            }
            Format::Nf4(nf4) => nf4.dequantize(row * self.columns, values),
        }
    }

    /// Dequantizes rows in parallel; `values` is `[rows, columns]`.
    fn gather(&self, row: impl Fn(usize) -> usize + Sync, values: &mut [f32]) {
        if self.columns > 0 {
            values.par_chunks_mut(self.columns).enumerate().for_each(|(i, values)| self.row(row(i), values));
        }
    }

    /// Dequantizes a range of rows in parallel.
    ///
    /// # Panics
    /// As [`Quantized::row`].
    pub fn panel(&self, rows: Range<usize>, values: &mut [f32]) {
        assert!(rows.len() * self.columns == values.len(), "a panel of {} rows", rows.len());
        self.gather(|i| rows.start + i, values);
    }
}

/// Where llama.cpp's converter has put row `row` of Hugging Face's order, for heads of `head_dim` rows: row `j` of a head's
/// first half and row `j` of its second are next to each other.
#[must_use]
pub fn paired_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, j) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * j + half
}

impl Weight {
    /// Rows and columns.
    ///
    /// # Errors
    /// A dense tensor that is no matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(tensor) => tensor.dims2(),
            Self::Quantized(quantized) => Ok((quantized.rows, quantized.columns)),
            #[cfg(feature = "cuda")]
            Self::OnDevice(resident) => Ok(resident.dims()),
        }
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Quantized(quantized) => quantized.num_bytes(),
            #[cfg(feature = "cuda")]
            Self::OnDevice(resident) => resident.num_bytes(),
        }
    }

    /// All of it, dequantized to `dtype` (F32 or F64; on a GPU bf16 or F32).
    ///
    /// # Errors
    /// What candle returns.
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.to_dtype(dtype),
            Self::Quantized(quantized) => {
                let mut values = vec![0.0; quantized.rows * quantized.columns];
                quantized.panel(0..quantized.rows, &mut values);
                Tensor::from_vec(values, (quantized.rows, quantized.columns), &Device::Cpu)?.to_dtype(dtype)
            }
            #[cfg(feature = "cuda")]
            Self::OnDevice(resident) => resident.dense(dtype),
        }
    }

    /// The square of each row's length, as `dtype`. `[rows]`
    ///
    /// # Errors
    /// What candle returns.
    pub fn row_norms_squared(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.to_dtype(dtype)?.sqr()?.sum(1),
            #[cfg(feature = "cuda")]
            Self::OnDevice(resident) => resident.dense(DType::F32)?.sqr()?.sum(1)?.to_dtype(dtype),
            Self::Quantized(quantized) => {
                let norm = |row| {
                    let mut values = vec![0.0; quantized.columns];
                    quantized.row(row, &mut values);
                    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
                };
                let norms: Vec<f64> = (0..quantized.rows).into_par_iter().map(norm).collect();
                Tensor::from_vec(norms, quantized.rows, &Device::Cpu)?.to_dtype(dtype)
            }
        }
    }

    /// Some of its rows, one below the other, as `dtype`.
    ///
    /// # Errors
    /// A row that is not there.
    pub fn gather(&self, ids: &[u32], dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => rows::gather(tensor, ids),
            Self::Quantized(quantized) => {
                if let Some(id) = ids.iter().find(|&&id| id as usize >= quantized.rows) {
                    candle_core::bail!("row {id} of a matrix of {} rows", quantized.rows)
                }
                let mut values = vec![0.0; ids.len() * quantized.columns];
                quantized.gather(|i| ids[i] as usize, &mut values);
                Tensor::from_vec(values, (ids.len(), quantized.columns), &Device::Cpu)?.to_dtype(dtype)
            }
            #[cfg(feature = "cuda")]
            Self::OnDevice(resident) => resident.gather(ids, dtype),
        }
    }
}
