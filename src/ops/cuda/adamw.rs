//! AdamW over one flat buffer.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::driver::{Launch, THREADS, empty, grid, modules};

/// What an update multiplies by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors {
    /// Of `A` and of all else: `1 − lr·wd`, and `lr / (1 − β₁ᵗ)`.
    pub(crate) decay: [f64; 2],
    pub(crate) size: [f64; 2],
    pub(crate) betas: [f64; 2],
    /// `√(1 − β₂ᵗ)`
    pub(crate) correction: f64,
    pub(crate) epsilon: f64,
}

/// The parameters after an update; the moments are changed where they lie. `split` elements are those of `A`.
pub(crate) fn step(p: &Tensor, g: &Tensor, [m, v]: [&Tensor; 2], split: usize, factors: Factors) -> Result<Tensor> {
    let count = p.elem_count();
    for tensor in [p, g, m, v] {
        if tensor.elem_count() != count || tensor.dtype() != DType::F32 {
            bail!("adamw: {:?} of {:?} for {count} parameters", tensor.shape(), tensor.dtype())
        }
    }
    let out = empty(count, DType::F32, p.device())?;
    let Factors { decay, size, betas, correction, epsilon } = factors;
    Launch::named(modules::adamw, "adamw".to_owned(), p.device())?
        .tensor(p)?
        .tensor(g)?
        .tensor(m)?
        .tensor(v)?
        .tensor(&out)?
        .long(count)
        .long(split)
        .float(decay[0])
        .float(decay[1])
        .float(size[0])
        .float(size[1])
        .float(betas[0])
        .float(betas[1])
        .float(1.0 - betas[0])
        .float(1.0 - betas[1])
        .float(correction)
        .float(epsilon)
        .run(grid(count), [THREADS, 1])?;
    Ok(out)
}

/// The sum of squares of f32 numbers, in f64.
pub(crate) fn square_sum(x: &Tensor) -> Result<f64> {
    /// Enough to fill a GPU.
    const BLOCKS: usize = 1024;
    let blocks = grid(x.elem_count())[0].min(BLOCKS);
    if x.dtype() != DType::F32 {
        bail!("squares of {:?}", x.dtype())
    }
    let sums = Tensor::zeros(blocks, DType::F64, x.device())?;
    Launch::named(modules::adamw, "square_sums".to_owned(), x.device())?
        .tensor(x)?
        .tensor(&sums)?
        .long(x.elem_count())
        .run([blocks, 1], [THREADS, 1])?;
    Ok(sums.to_device(&Device::Cpu)?.to_vec1::<f64>()?.into_iter().sum())
}

/// Tensors one after the other in one buffer, in the order given.
pub(crate) fn flat(tensors: &[Tensor]) -> Result<Tensor> {
    Tensor::cat(&tensors.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?, 0)
}
