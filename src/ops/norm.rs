//! RMSNorm: `y = w ⊙ x · ρ` with `ρ = (mean(x²) + ε)^-½` a row (Zhang & Sennrich 2019, <https://arxiv.org/abs/1910.07467>).

use candle_core::{D, Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{Form, cpu, form};

/// Normalises the rows of `x [T, D]` by `weight [D]`. Returns `y [T, D]` and `ρ [T]`, which `backward` needs.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn forward(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor)> {
    match form(x) {
        Form::Cpu => return cpu::norm::forward(x, weight, epsilon),
        #[cfg(feature = "cuda")]
        Form::Cuda => return cuda::norm::forward(x, weight, epsilon),
        Form::Composed => {}
    }
    let rho = (x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.powf(-0.5)?;
    let y = x.broadcast_mul(&rho)?.broadcast_mul(weight)?;
    Ok((y, rho.squeeze(D::Minus1)?))
}

/// The same `y` again from a saved `ρ`.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn again(x: &Tensor, weight: &Tensor, rho: &Tensor) -> Result<Tensor> {
    match form(x) {
        Form::Cpu => return cpu::norm::again(x, weight, rho),
        #[cfg(feature = "cuda")]
        Form::Cuda => return cuda::norm::again(x, weight, rho),
        Form::Composed => {}
    }
    x.broadcast_mul(&rho.unsqueeze(D::Minus1)?)?.broadcast_mul(weight)
}

/// `onto [T, D]`, the gradient that comes by the residual where there is one, plus the gradient of `x`:
/// `ρ (w ⊙ dy) − x ρ³/D ⟨w ⊙ dy, x⟩`. The weight is frozen and has none.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn backward(dy: &Tensor, x: &Tensor, weight: &Tensor, rho: &Tensor, onto: Option<&Tensor>) -> Result<Tensor> {
    match form(x) {
        Form::Cpu => return cpu::norm::backward(dy, x, weight, rho, onto),
        #[cfg(feature = "cuda")]
        Form::Cuda => return cuda::norm::backward(dy, x, weight, rho, onto),
        Form::Composed => {}
    }
    let rho = rho.unsqueeze(D::Minus1)?;
    let wdy = dy.broadcast_mul(weight)?;
    let mean = (&wdy * x)?.mean_keepdim(D::Minus1)?;
    let along = x.broadcast_mul(&(mean * rho.powf(3.0)?)?)?;
    let dx = (wdy.broadcast_mul(&rho)? - along)?;
    onto.map_or(Ok(dx.clone()), |onto| onto + dx)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    #[test]
    fn backward_agrees_with_finite_differences() -> Result<()> {
        let (x, weight) = (normal(1, (5, 19))?, normal(2, 19)?);
        let dy = normal(3, (5, 19))?;
        let residual = normal(4, (5, 19))?;
        let (_, rho) = forward(&x, &weight, 1e-5)?;
        let value = |x: &Tensor| (forward(x, &weight, 1e-5)?.0 * &dy)?.sum_all();
        finite_difference(&x, &backward(&dy, &x, &weight, &rho, None)?, value)?;
        let dx = backward(&dy, &x, &weight, &rho, Some(&residual))?;
        finite_difference(&x, &dx, |x| value(x)? + (x * &residual)?.sum_all()?)
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        // 33 columns: one more than two vector blocks, so that the remainder loop runs
        let (x, weight, dy) = (normal(1, (7, 33))?, normal(2, 33)?, normal(3, (7, 33))?);
        let (y, rho) = forward(&x, &weight, 1e-6)?;
        let dx = backward(&dy, &x, &weight, &rho, Some(&y))?;
        let (plain_y, plain_rho, plain_dx) = composed(|| {
            let (y, rho) = forward(&x, &weight, 1e-6)?;
            let dx = backward(&dy, &x, &weight, &rho, Some(&y))?;
            Ok((y, rho, dx))
        })?;
        close(&y, &plain_y, 1e-12)?;
        close(&rho, &plain_rho, 1e-12)?;
        close(&dx, &plain_dx, 1e-12)?;
        close(&again(&x, &weight, &rho)?, &y, 0.0)
    }
}
