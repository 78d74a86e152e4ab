//! SwiGLU: `h = silu(gate) ⊙ up`, `silu(e) = e σ(e)` (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).

use candle_core::{Result, Tensor};

use super::{cpu, has_kernel};

/// `silu(gate) ⊙ up`, all `[T, F]`.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if has_kernel(gate) {
        return cpu::swiglu::forward(gate, up);
    }
    gate.silu()? * up
}

/// The gradients of `gate` and `up`: `dh ⊙ up ⊙ σ(e)(1 + e(1 − σ(e)))` and `dh ⊙ silu(gate)`.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    if has_kernel(gate) {
        return cpu::swiglu::backward(dh, gate, up);
    }
    let sigmoid = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let slope = (&sigmoid * ((gate * (1.0 - &sigmoid)?)? + 1.0)?)?;
    Ok((((dh * up)? * slope)?, (dh * (gate * sigmoid)?)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    #[test]
    fn backward_agrees_with_finite_differences() -> Result<()> {
        let (gate, up, dh) = (normal(1, (3, 7))?, normal(2, (3, 7))?, normal(3, (3, 7))?);
        let (dgate, dup) = backward(&dh, &gate, &up)?;
        finite_difference(&gate, &dgate, |gate| (forward(gate, &up)? * &dh)?.sum_all())?;
        finite_difference(&up, &dup, |up| (forward(&gate, up)? * &dh)?.sum_all())
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        let (gate, up, dh) = (normal(1, (3, 21))?, normal(2, (3, 21))?, normal(3, (3, 21))?);
        let (dgate, dup) = backward(&dh, &gate, &up)?;
        let (plain, (plain_dgate, plain_dup)) = composed(|| Ok((forward(&gate, &up)?, backward(&dh, &gate, &up)?)))?;
        close(&forward(&gate, &up)?, &plain, 1e-14)?;
        close(&dgate, &plain_dgate, 1e-14)?;
        close(&dup, &plain_dup, 1e-14)
    }

    #[test]
    fn large_gates_stay_finite() -> Result<()> {
        let gate = Tensor::new(&[[-200.0f32, 200.0]], &candle_core::Device::Cpu)?;
        let one = gate.ones_like()?;
        let (dgate, _) = backward(&one, &gate, &one)?;
        assert_eq!(forward(&gate, &one)?.to_vec2::<f32>()?, [[0.0, 200.0]]);
        assert_eq!(dgate.to_vec2::<f32>()?, [[0.0, 1.0]]);
        Ok(())
    }
}
