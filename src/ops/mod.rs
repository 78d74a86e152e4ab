//! Tensor functions in pairs, forward and backward, written by hand.
//!
//! candle's own graph is not used below the loss: it would compute and keep a gradient for every frozen matrix, and
//! its fast norm, softmax, rope and quantized products cut the graph without an error. Here every function that
//! training goes through is a pair: `forward` returns what it computed and what its `backward` needs, `backward`
//! takes the gradient of the result and returns the gradient of the input. Nothing is recorded; the caller decides
//! what to keep.
//!
//! | module | forward | written in |
//! |---|---|---|
//! | [`norm`] | RMSNorm | [`Decoder`](crate::model::Decoder) layers |
//! | [`rope`] | rotary position embedding, HF's rotate-half form | queries and keys |
//! | [`glu`] | `act(gate) * up` | the MLP |
//! | [`attention`] | causal attention over segments of one packed batch | every layer |
//! | [`linear`] | frozen matrices over one input, each plus a low-rank update | every projection |
//! | [`dropout`] | the adapter input's dropout, repeatable from a key | adapters |
//! | [`rows`] | rows taken out of a matrix | embedding, scored rows |
//! | [`completion_logps`] | log-probabilities of given tokens and their gradient, in one pass | the head |
//! | [`divergence`] | KL of two distributions over the vocabulary, forward only | comparisons |
//!
//! Each has a composed form out of plain candle operations, which runs on any device, and a CPU kernel in `cpu`,
//! which is what a CPU tensor takes. The tests hold the two to each other and both to finite differences in f64. With the
//! feature `cuda` there are kernels for NVIDIA's GPUs too, in bf16 and f32; `src/bin/gpu_check` holds those to the CPU's.
//!
//! Shape letters: `T` rows (tokens of a packed batch), `D` hidden size, `H` query heads, `K` key/value heads, `E`
//! head dimension, `F` MLP width, `V` vocabulary, `R` rank, `S` scored rows. Matrices are `[rows, columns]`, row-major.

pub mod attention;
pub mod completion_logps;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod divergence;
pub mod dropout;
pub mod glu;
pub mod linear;
pub mod norm;
pub mod rope;
pub mod rows;

#[cfg(test)]
pub(crate) mod check;

use candle_core::{Result, Tensor};
pub(crate) use cpu::few::FEW;
pub(crate) use cpu::vectorised;

/// A number in `[0, 1)` out of 64 random bits.
pub(crate) fn uniform(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// How an op computes.
enum Form {
    /// Out of candle's own operations.
    Composed,
    /// By the CPU kernels: on the CPU, in f32 or f64.
    Cpu,
    /// By the CUDA kernels: on a GPU, in bf16 or f32.
    #[cfg(feature = "cuda")]
    Cuda,
}

fn form(tensor: &Tensor) -> Form {
    #[cfg(test)]
    if check::composed_only() {
        return Form::Composed;
    }
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(tensor) {
        return Form::Cuda;
    }
    match tensor.device().is_cpu() && matches!(tensor.dtype(), candle_core::DType::F32 | candle_core::DType::F64) {
        true => Form::Cpu,
        false => Form::Composed,
    }
}

/// Whether the CUDA kernels can take this tensor.
#[cfg(feature = "cuda")]
fn on_gpu(tensor: &Tensor) -> bool {
    matches!(form(tensor), Form::Cuda)
}

/// Whether the CPU kernels can take this tensor.
fn has_kernel(tensor: &Tensor) -> bool {
    matches!(form(tensor), Form::Cpu)
}

/// `[rows, columns]` of a matrix.
///
/// # Errors
/// Where the tensor has another rank.
pub(crate) fn dims2(tensor: &Tensor) -> Result<(usize, usize)> {
    tensor.dims2()
}
