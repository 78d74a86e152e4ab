//! The gated linear unit of an MLP: `h = act(gate) ⊙ up` (Shazeer 2020, <https://arxiv.org/abs/2002.05202>), SwiGLU or
//! GeGLU by its activation.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{Form, cpu, form};

/// What the gate goes through. All are of the form `act(e) = e σ(z(e))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `z(e) = e`: SwiGLU.
    Silu,
    /// `z(e) = √(8/π) (e + 0.044715 e³)`, the tanh form of GELU: GeGLU as Gemma has it.
    GeluTanh,
}

/// `√(8/π)`
pub(super) const SLOPE: f64 = 1.595_769_121_605_730_7;
/// The cubic term of GELU's tanh form.
pub(super) const CUBIC: f64 = 0.044_715;

impl Activation {
    /// `z(e)` and its derivative.
    fn inner(self, e: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Silu => Ok((e.clone(), e.ones_like()?)),
            Self::GeluTanh => {
                let square = (e.sqr()? * CUBIC)?;
                Ok((((e * (&square + 1.0)?)? * SLOPE)?, (((square * 3.0)? + 1.0)? * SLOPE)?))
            }
        }
    }
}

/// `act(gate) ⊙ up`, all `[T, F]`.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    match form(gate) {
        Form::Cpu => return cpu::glu::forward(gate, up, activation),
        #[cfg(feature = "cuda")]
        Form::Cuda => return cuda::glu::forward(gate, up, activation),
        Form::Composed => {}
    }
    let (z, _) = activation.inner(gate)?;
    (gate * sigmoid(&z)?)? * up
}

/// What [`backward`] gives, all `[T, F]`.
#[derive(Debug)]
pub struct Backward {
    /// `act(gate) ⊙ up` again, which the adapter behind it needs.
    pub h: Tensor,
    /// `dh ⊙ up ⊙ σ(z)(1 + e(1 − σ(z)) z')`
    pub d_gate: Tensor,
    /// `dh ⊙ act(gate)`
    pub d_up: Tensor,
}

/// The gradients of `gate` and `up`, and the result again, in one pass.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Backward> {
    match form(gate) {
        Form::Cpu => return cpu::glu::backward(dh, gate, up, activation),
        #[cfg(feature = "cuda")]
        Form::Cuda => return cuda::glu::backward(dh, gate, up, activation),
        Form::Composed => {}
    }
    let (z, slope_of_z) = activation.inner(gate)?;
    let sigmoid = sigmoid(&z)?;
    let slope = (&sigmoid * (((gate * (1.0 - &sigmoid)?)? * slope_of_z)? + 1.0)?)?;
    let activated = (gate * sigmoid)?;
    Ok(Backward { h: (&activated * up)?, d_gate: ((dh * up)? * slope)?, d_up: (dh * activated)? })
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    const ALL: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

    #[test]
    fn backward_agrees_with_finite_differences() -> Result<()> {
        let (gate, up, dh) = (normal(1, (3, 7))?, normal(2, (3, 7))?, normal(3, (3, 7))?);
        for activation in ALL {
            let Backward { h, d_gate, d_up } = backward(&dh, &gate, &up, activation)?;
            close(&h, &forward(&gate, &up, activation)?, 1e-15)?;
            finite_difference(&gate, &d_gate, |gate| (forward(gate, &up, activation)? * &dh)?.sum_all())?;
            finite_difference(&up, &d_up, |up| (forward(&gate, up, activation)? * &dh)?.sum_all())?;
        }
        Ok(())
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        let (gate, up, dh) = (normal(1, (3, 21))?, normal(2, (3, 21))?, normal(3, (3, 21))?);
        for activation in ALL {
            let all = || {
                let Backward { h, d_gate, d_up } = backward(&dh, &gate, &up, activation)?;
                Ok([forward(&gate, &up, activation)?, h, d_gate, d_up])
            };
            all()?.iter().zip(&composed(all)?).try_for_each(|(kernel, plain)| close(kernel, plain, 1e-14))?;
        }
        Ok(())
    }

    /// candle's own GELU is the same tanh form.
    #[test]
    fn gelu_is_candles() -> Result<()> {
        let (gate, up) = (normal(1, (3, 21))?, normal(2, (3, 21))?);
        close(&forward(&gate, &up, Activation::GeluTanh)?, &(gate.gelu()? * up)?, 1e-14)
    }

    #[test]
    fn large_gates_stay_finite() -> Result<()> {
        let gate = Tensor::new(&[[-200.0f32, 200.0]], &candle_core::Device::Cpu)?;
        let one = gate.ones_like()?;
        for activation in ALL {
            let Backward { d_gate, .. } = backward(&one, &gate, &one, activation)?;
            assert_eq!(forward(&gate, &one, activation)?.to_vec2::<f32>()?, [[0.0, 200.0]]);
            assert_eq!(d_gate.to_vec2::<f32>()?, [[0.0, 1.0]]);
        }
        Ok(())
    }
}
