//! Frozen matrices on a GPU: their blocks, and scratch that they are dequantized into.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::as_dtype;
use super::driver::{LANES, Launch, Module, Onto, THREADS, WARP, empty, modules};
use crate::ops::{FEW, dims2};
use crate::quant::ggml::BlockType;
use crate::quant::nf4::{Nf4, Scales};
use crate::quant::{Stored, Weight};

/// A quantized matrix on a GPU, `[rows, columns]`. Cloning it copies nothing.
#[derive(Debug, Clone)]
pub struct Resident {
    rows: usize,
    columns: usize,
    blocks: Blocks,
    /// As [`Quantized::unpaired`](crate::quant::Quantized::unpaired) has it; 0 where rows are in order.
    paired: usize,
    /// Names it among the recent ones.
    number: usize,
    recent: Arc<Recent>,
}

#[derive(Debug, Clone)]
enum Blocks {
    Ggml(BlockType, Tensor),
    Nf4 {
        packed: Tensor,
        /// Of nested scales, the indices and their 256 values.
        quantized: Option<[Tensor; 2]>,
        scales: Tensor,
        offset: f32,
    },
}

/// The matrices dequantized last, as many as a layer has: what recomputes a layer and what goes back through it share them.
#[derive(Debug)]
pub struct Recent {
    matrices: Mutex<Matrices>,
    /// The most elements that are kept.
    most: usize,
}

#[derive(Debug, Default)]
struct Matrices {
    kept: VecDeque<(usize, Tensor)>,
    next: usize,
}

impl Recent {
    /// Keeps at most so many elements.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { matrices: Mutex::default(), most })
    }

    /// The number of another matrix.
    fn number(&self) -> usize {
        let mut matrices = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        matrices.next += 1;
        matrices.next - 1
    }
}

impl Resident {
    /// Brings a quantized matrix to `device`; `None` where its elements are numbers, not blocks.
    ///
    /// # Errors
    /// What candle returns.
    pub fn new(weight: &Weight, device: &Device, recent: &Arc<Recent>) -> Result<Option<Self>> {
        let Weight::Quantized(quantized) = weight else { return Ok(None) };
        let (rows, columns) = weight.dims()?;
        let bytes = |bytes: &[u8]| Tensor::from_slice(bytes, bytes.len(), device);
        let (stored, paired) = quantized.stored();
        let blocks = match stored {
            Stored::Ggml(BlockType::F32 | BlockType::F16 | BlockType::BF16, _) => return Ok(None),
            Stored::Ggml(kind, blocks) => Blocks::Ggml(kind, bytes(blocks)?),
            Stored::Nf4(nf4) => Self::nf4(nf4, device)?,
        };
        let number = recent.number();
        Ok(Some(Self { rows, columns, blocks, paired: paired.unwrap_or(0), number, recent: recent.clone() }))
    }

    fn nf4(nf4: &Nf4, device: &Device) -> Result<Blocks> {
        let packed = Tensor::from_slice(nf4.packed(), nf4.packed().len(), device)?;
        let floats = |values: &[f32]| Tensor::from_slice(values, values.len(), device);
        Ok(match nf4.scales() {
            Scales::Plain(scales) => Blocks::Nf4 { packed, quantized: None, scales: floats(scales)?, offset: 0.0 },
            Scales::Nested { quantized, code, scales, offset } => Blocks::Nf4 {
                packed,
                quantized: Some([Tensor::from_slice(quantized, quantized.len(), device)?, floats(code)?]),
                scales: floats(scales)?,
                offset: *offset,
            },
        })
    }

    /// Random blocks made on the device, for measuring: packed NF4 of uniform indices, all scales alike.
    ///
    /// # Errors
    /// What candle returns.
    pub fn random_nf4(
        rows: usize,
        columns: usize,
        scale: f32,
        device: &Device,
        recent: &Arc<Recent>,
    ) -> Result<Self> {
        let elements = rows * columns;
        let packed = (Tensor::rand(0f32, 256.0, elements.div_ceil(2), device)?.floor()?).to_dtype(DType::U8)?;
        let scales = Tensor::full(scale, elements.div_ceil(crate::quant::nf4::BLOCK), device)?;
        let blocks = Blocks::Nf4 { packed, quantized: None, scales, offset: 0.0 };
        let number = recent.number();
        Ok(Self { rows, columns, blocks, paired: 0, number, recent: recent.clone() })
    }

    /// Rows and columns.
    #[must_use]
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Bytes of the blocks.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        match &self.blocks {
            Blocks::Ggml(_, blocks) => bytes(blocks),
            Blocks::Nf4 { packed, quantized, scales, .. } => {
                bytes(packed) + bytes(scales) + quantized.iter().flatten().map(bytes).sum::<usize>()
            }
        }
    }

    /// All of it, dequantized to bf16 or f32.
    ///
    /// # Errors
    /// What candle returns.
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        let elements = self.rows * self.columns;
        let key = |(number, tensor): &(usize, Tensor)| *number == self.number && tensor.dtype() == dtype;
        let mut matrices = self.recent.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, tensor)) = matrices.kept.iter().find(|kept| key(kept)) {
            return Ok(tensor.clone());
        }
        // room is made before there are two of them
        let held =
            |kept: &VecDeque<(usize, Tensor)>| kept.iter().map(|(_, tensor)| tensor.elem_count()).sum::<usize>();
        while !matrices.kept.is_empty() && held(&matrices.kept) + elements > self.recent.most {
            matrices.kept.pop_front();
        }
        let tensor = self.dequantize(None, dtype)?;
        if elements <= self.recent.most {
            matrices.kept.push_back((self.number, tensor.clone()));
        }
        Ok(tensor)
    }

    /// Some of its rows.
    ///
    /// # Errors
    /// A row that is not there.
    pub fn gather(&self, ids: &[u32], dtype: DType) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.rows) {
            bail!("row {id} of a matrix of {} rows", self.rows)
        }
        self.dequantize(Some(ids), dtype)
    }

    fn device(&self) -> &Device {
        match &self.blocks {
            Blocks::Ggml(_, blocks) => blocks.device(),
            Blocks::Nf4 { packed, .. } => packed.device(),
        }
    }

    fn dequantize(&self, ids: Option<&[u32]>, dtype: DType) -> Result<Tensor> {
        let (device, rows) = (self.device(), ids.map_or(self.rows, <[u32]>::len));
        let ids = ids.map(|ids| Tensor::new(ids, device)).transpose()?;
        let out = empty((rows, self.columns), dtype, device)?;
        let launch = self.launch(modules::dequantize, "dequantize", &out)?;
        let threads = rows * self.columns.div_ceil(LANES);
        launch
            .tensor(&out)?
            .optional(ids.as_ref())?
            .count(self.paired)?
            .count(rows)?
            .count(self.columns)?
            .run([threads.div_ceil(THREADS as usize), 1], [THREADS, 1])?;
        Ok(out)
    }

    /// A kernel for these blocks and elements as those of `like`, with the blocks as its first arguments.
    fn launch<'t>(&'t self, module: Module, kernel: &str, like: &Tensor) -> Result<Launch<'t>> {
        match &self.blocks {
            Blocks::Ggml(kind, blocks) => {
                Launch::of(module, &format!("{kernel}_{}", kind.to_string().to_lowercase()), like)?.tensor(blocks)
            }
            Blocks::Nf4 { packed, quantized, scales, offset } => {
                let (quantized, code) = quantized.as_ref().map(|[quantized, code]| (quantized, code)).unzip();
                Ok(Launch::of(module, &format!("{kernel}_nf4"), like)?
                    .tensor(packed)?
                    .optional(quantized)?
                    .optional(code)?
                    .tensor(scales)?
                    .float((*offset).into()))
            }
        }
    }

    /// `y = x Wᵀ`, or added to what is in `y`, for at most [`FEW`] rows: out of the blocks, each of which is read once.
    ///
    /// # Errors
    /// What candle returns for wrong shapes or types.
    pub(super) fn few(&self, x: &Tensor, y: &Tensor, onto: Onto) -> Result<()> {
        let ((rows, columns), result) = (dims2(x)?, dims2(y)?);
        if rows > FEW || columns != self.columns || result != (rows, self.rows) || x.dtype() != y.dtype() {
            bail!("{:?} by a matrix of [{}, {}] gives {:?}", x.shape(), self.rows, self.columns, y.shape())
        }
        let threads = self.rows * WARP;
        self.launch(modules::few, "few", y)?
            .tensor(x)?
            .tensor(y)?
            .count(usize::from(onto == Onto::Existing))?
            .count(self.paired)?
            .count(rows)?
            .count(self.rows)?
            .count(columns)?
            .run([threads.div_ceil(THREADS as usize), 1], [THREADS, 1])
    }
}

/// A frozen matrix as a product takes it.
pub(super) fn matrix(weight: &Weight, dtype: DType, device: &Device) -> Result<Tensor> {
    match weight {
        Weight::Dense(tensor) => as_dtype(tensor, dtype),
        Weight::OnDevice(resident) => resident.dense(dtype),
        Weight::Quantized(_) => weight.dense(DType::F32)?.to_device(device)?.to_dtype(dtype),
    }
}
