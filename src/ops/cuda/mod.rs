//! CUDA kernels: bf16 or f32 elements, f32 sums. One launch an op for the whole packed batch, but for cuBLAS's products.
//!
//! Beside each file is the `.cu` file that it launches; `build.rs` compiles them. Norms' weights, rope's angles and the
//! scales that norms and attention keep are f32 whatever the elements are; so are adapters, their gradients and the
//! optimizer.

pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod completion_logps;
mod driver;
pub(crate) mod glu;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod rows;
pub mod weight;

use candle_core::{DType, Result, Tensor};

pub use driver::{Opened, Trouble, free_memory, open, peak_memory, with_poison};

/// Whether the kernels can take this tensor.
pub(super) fn has_kernel(tensor: &Tensor) -> bool {
    tensor.device().is_cuda() && matches!(tensor.dtype(), DType::BF16 | DType::F32)
}

/// As `dtype`, contiguous, and itself where it is that already.
fn as_dtype(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    tensor.to_dtype(dtype)?.contiguous()
}
