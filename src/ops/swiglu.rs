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

/// What [`backward`] gives, all `[T, F]`.
#[derive(Debug)]
pub struct Backward {
    /// `silu(gate) ⊙ up` again, which the adapter behind it needs.
    pub h: Tensor,
    /// `dh ⊙ up ⊙ σ(e)(1 + e(1 − σ(e)))`
    pub d_gate: Tensor,
    /// `dh ⊙ silu(gate)`
    pub d_up: Tensor,
}

/// The gradients of `gate` and `up`, and the result again, in one pass.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Backward> {
    if has_kernel(gate) {
        return cpu::swiglu::backward(dh, gate, up);
    }
    let sigmoid = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let slope = (&sigmoid * ((gate * (1.0 - &sigmoid)?)? + 1.0)?)?;
    let silu = (gate * sigmoid)?;
    Ok(Backward { h: (&silu * up)?, d_gate: ((dh * up)? * slope)?, d_up: (dh * silu)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    #[test]
    fn backward_agrees_with_finite_differences() -> Result<()> {
        let (gate, up, dh) = (normal(1, (3, 7))?, normal(2, (3, 7))?, normal(3, (3, 7))?);
        let Backward { h, d_gate, d_up } = backward(&dh, &gate, &up)?;
        close(&h, &forward(&gate, &up)?, 1e-15)?;
        finite_difference(&gate, &d_gate, |gate| (forward(gate, &up)? * &dh)?.sum_all())?;
        finite_difference(&up, &d_up, |up| (forward(&gate, up)? * &dh)?.sum_all())
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        let (gate, up, dh) = (normal(1, (3, 21))?, normal(2, (3, 21))?, normal(3, (3, 21))?);
        let all = || {
            let Backward { h, d_gate, d_up } = backward(&dh, &gate, &up)?;
            Ok([forward(&gate, &up)?, h, d_gate, d_up])
        };
        all()?.iter().zip(&composed(all)?).try_for_each(|(kernel, plain)| close(kernel, plain, 1e-14))
    }

    #[test]
    fn large_gates_stay_finite() -> Result<()> {
        let gate = Tensor::new(&[[-200.0f32, 200.0]], &candle_core::Device::Cpu)?;
        let one = gate.ones_like()?;
        let Backward { d_gate, .. } = backward(&one, &gate, &one)?;
        assert_eq!(forward(&gate, &one)?.to_vec2::<f32>()?, [[0.0, 200.0]]);
        assert_eq!(d_gate.to_vec2::<f32>()?, [[0.0, 1.0]]);
        Ok(())
    }
}
