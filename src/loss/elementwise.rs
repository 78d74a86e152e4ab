//! Elementwise functions that stay exact far from zero, with their derivatives in closed form.
//!
//! `log(sigmoid(x))` and `log(1 − exp(x))` composed out of candle's operations overflow or cancel, and so do the
//! derivatives that its graph makes of them. Here both are written for the whole range and differentiated by hand.
//!
//! All take f64 tensors on the CPU, of any shape.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use std::f64::consts::LN_2;

/// `log σ(x) = −log(1 + e⁻ˣ)`, with the derivative `σ(−x)`.
///
/// # Errors
/// Where the tensor is not f64 on the CPU.
pub fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let f = |x: f64| x.min(0.0) - (-x.abs()).exp().ln_1p();
    Elementwise { name: "log_sigmoid", f, derivative: |x| logistic(-x) }.of(x)
}

/// `σ(x) = 1 / (1 + e⁻ˣ)`, with the derivative `σ(x) σ(−x)`.
///
/// # Errors
/// Where the tensor is not f64 on the CPU.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Elementwise { name: "sigmoid", f: logistic, derivative: |x| logistic(x) * logistic(-x) }.of(x)
}

/// `log(1 − eˣ)` for `x < 0`, with the derivative `−eˣ / (1 − eˣ)`: the log-probability of everything else, given a
/// log-probability. It is −∞ at zero and not a number above.
///
/// # Errors
/// Where the tensor is not f64 on the CPU.
pub fn log1mexp(x: &Tensor) -> Result<Tensor> {
    // Each form cancels where the other is exact: Mächler 2012, "Accurately computing log(1 − exp(−|a|))".
    let f = |x: f64| if x > -LN_2 { (-x.exp_m1()).ln() } else { (-x.exp()).ln_1p() };
    Elementwise { name: "log1mexp", f, derivative: |x| -1.0 / (-x).exp_m1() }.of(x)
}

/// `σ(x)` without overflow on either side.
fn logistic(x: f64) -> f64 {
    let small = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + small) } else { small / (1.0 + small) }
}

/// A function of one number and its derivative.
struct Elementwise {
    name: &'static str,
    f: fn(f64) -> f64,
    derivative: fn(f64) -> f64,
}

impl Elementwise {
    fn of(self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op1(self)
    }
}

impl CustomOp1 for Elementwise {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("{}: not contiguous", self.name) };
        let result = storage.as_slice::<f64>()?[start..end].iter().map(|&x| (self.f)(x)).collect();
        Ok((CpuStorage::F64(result), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let slopes: Vec<f64> = x.flatten_all()?.to_vec1::<f64>()?.into_iter().map(self.derivative).collect();
        Ok(Some((gradient * Tensor::from_vec(slopes, x.shape(), &Device::Cpu)?)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    /// Value and derivative at `x`.
    fn at(f: fn(&Tensor) -> Result<Tensor>, x: f64) -> (f64, f64) {
        let x = Var::from_vec(vec![x], 1, &Device::Cpu).expect("a variable");
        let y = f(&x).expect("a value");
        let slope = y.backward().expect("a graph").remove(&x).expect("a gradient");
        let first = |t: &Tensor| t.to_vec1::<f64>().expect("f64")[0];
        (first(&y), first(&slope))
    }

    /// To a few roundings of f64, relative.
    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() <= 1e-15 * 4.0 * expected.abs(), "{got:e} is not {expected:e}");
    }

    /// Expected values by mpmath at 50 digits.
    #[test]
    fn exact_from_end_to_end() {
        for (f, x, value, slope) in [
            (log_sigmoid as fn(&Tensor) -> Result<Tensor>, 0.0, -LN_2, 0.5),
            (log_sigmoid, -1e4, -1e4, 1.0),
            (log_sigmoid, 40.0, -4.248354255291589e-18, 4.248354255291589e-18),
            (sigmoid, -700.0, 9.859_676_543_759_77e-305, 9.859_676_543_759_77e-305),
            (sigmoid, 0.0, 0.5, 0.25),
            (sigmoid, 1e4, 1.0, 0.0),
            (log1mexp, -1e-12, -27.631021115929048, -999_999_999_999.5),
            (log1mexp, -0.5, -0.9327521295671885, -1.5414940825367982),
            (log1mexp, -1.0, -0.4586751453870819, -0.5819767068693265),
            (log1mexp, -50.0, -1.9287498479639178e-22, -1.9287498479639178e-22),
            (log1mexp, -1e4, 0.0, 0.0),
        ] {
            let (y, dy) = at(f, x);
            close(y, value);
            close(dy, slope);
        }
    }

    #[test]
    fn strided_tensors_and_other_types() {
        let x = Tensor::new(&[[1.0f64, -2.0], [3.0, -4.0]], &Device::Cpu).expect("a tensor");
        let transposed = sigmoid(&x.t().expect("a view")).expect("values").to_vec2::<f64>().expect("f64");
        assert_eq!(transposed, [[logistic(1.0), logistic(3.0)], [logistic(-2.0), logistic(-4.0)]]);
        assert!(sigmoid(&x.to_dtype(candle_core::DType::F32).expect("f32")).is_err());
    }
}
