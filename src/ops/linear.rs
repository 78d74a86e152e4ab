//! A frozen matrix with an optional low-rank update: `y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ` (Hu et al. 2021,
//! <https://arxiv.org/abs/2106.09685>).
//!
//! Nothing of the size of `W` is ever formed besides `W`: the update acts through `[T, R]`, and the frozen matrix gets
//! no gradient.

use candle_core::{Result, Tensor};

use super::cpu::gemm::{Matrix, Onto, Threads, gemm};
use super::cpu::{Real, for_real, tensor, values};
use super::dropout::{self, Dropout};
use super::{dims2, has_kernel};

/// The update `s B A` of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// `[R, in]`
    pub a: &'a Tensor,
    /// `[out, R]`
    pub b: &'a Tensor,
    /// `s`: `alpha / rank`, or `alpha / √rank` for rsLoRA.
    pub scale: f64,
    /// Dropout on the update's input.
    pub dropout: Option<Dropout<'a>>,
}

impl LowRank<'_> {
    /// What `A` is applied to.
    fn input(&self, x: &Tensor) -> Result<Tensor> {
        match &self.dropout {
            Some(dropout) => dropout::apply(x, dropout),
            None => Ok(x.clone()),
        }
    }
}

/// Gradients of one update.
#[derive(Debug, Clone)]
pub struct LowRankGradient {
    /// `[R, in]`
    pub a: Tensor,
    /// `[out, R]`
    pub b: Tensor,
}

/// `y [T, out]` of `x [T, in]` and `weight [out, in]`; with an update also `drop(x) Aᵀ [T, R]`, which backward needs.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn forward(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    update: Option<&LowRank<'_>>,
) -> Result<(Tensor, Option<Tensor>)> {
    let Some(update) = update else { return Ok((project(x, weight, bias)?, None)) };
    let xa = update.input(x)?.matmul(&update.a.t()?)?;
    if has_kernel(x) && bias.is_none() {
        let y = for_real!(x, T => {
            let (x, w, xa, b) = (mat::<T>(x)?, mat(weight)?, mat(&xa)?, mat(update.b)?);
            let mut y = vec![T::of(0.0); x.rows * w.rows];
            gemm(&mut y, w.rows, Onto::Nothing, 1.0, x.get(), w.get().t(), Threads::All);
            gemm(&mut y, w.rows, Onto::Existing, update.scale, xa.get(), b.get().t(), Threads::All);
            tensor(y, (x.rows, w.rows))?
        });
        return Ok((y, Some(xa)));
    }
    let added = (xa.matmul(&update.b.t()?)? * update.scale)?;
    Ok(((project(x, weight, bias)? + added)?, Some(xa)))
}

fn project(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}

/// The gradient of `x`, and of the update where there is one.
///
/// With `G = s dy B`: `dB = s dyᵀ (drop(x) Aᵀ)`, `dA = Gᵀ drop(x)`, `dx = dy W + drop(G A)`. `update` brings `x` (the
/// forward input, before dropout) and the saved `drop(x) Aᵀ`.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn backward(
    dy: &Tensor,
    weight: &Tensor,
    update: Option<(&LowRank<'_>, &Tensor, &Tensor)>,
) -> Result<(Tensor, Option<LowRankGradient>)> {
    let Some((update, x, xa)) = update else { return Ok((dy.matmul(weight)?, None)) };
    let g = (dy.matmul(update.b)? * update.scale)?;
    let gradient = LowRankGradient { a: g.t()?.matmul(&update.input(x)?)?, b: (dy.t()?.matmul(xa)? * update.scale)? };
    if has_kernel(dy) && update.dropout.is_none() {
        let dx = for_real!(dy, T => {
            let (dy, w, g, a) = (mat::<T>(dy)?, mat(weight)?, mat(&g)?, mat(update.a)?);
            let mut dx = vec![T::of(0.0); dy.rows * w.columns];
            gemm(&mut dx, w.columns, Onto::Nothing, 1.0, dy.get(), w.get(), Threads::All);
            gemm(&mut dx, w.columns, Onto::Existing, 1.0, g.get(), a.get(), Threads::All);
            tensor(dx, (dy.rows, w.columns))?
        });
        return Ok((dx, Some(gradient)));
    }
    let mut through = g.matmul(update.a)?;
    if let Some(dropout) = &update.dropout {
        through = dropout::apply(&through, dropout)?;
    }
    Ok(((dy.matmul(weight)? + through)?, Some(gradient)))
}

/// A borrowed matrix and its size.
struct Borrowed<'t, T> {
    values: super::cpu::Values<'t, T>,
    rows: usize,
    columns: usize,
}

fn mat<T: Real>(tensor: &Tensor) -> Result<Borrowed<'_, T>> {
    let (rows, columns) = dims2(tensor)?;
    Ok(Borrowed { values: values(tensor)?, rows, columns })
}

impl<T: Real> Borrowed<'_, T> {
    fn get(&self) -> Matrix<'_, T> {
        Matrix::new(&self.values, self.rows, self.columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    struct Case {
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        a: Tensor,
        b: Tensor,
        dy: Tensor,
    }

    fn case() -> Result<Case> {
        Ok(Case {
            x: normal(1, (6, 5))?,
            weight: normal(2, (7, 5))?,
            bias: normal(3, 7)?,
            a: normal(4, (2, 5))?,
            b: normal(5, (7, 2))?,
            dy: normal(6, (6, 7))?,
        })
    }

    const ROWS: [u64; 6] = [3, 1, 4, 1, 5, 9];

    fn check_gradients(dropout: Option<Dropout<'_>>, bias: bool) -> Result<()> {
        let Case { x, weight, bias: bias_values, a, b, dy } = case()?;
        let bias = bias.then_some(&bias_values);
        let value = |x: &Tensor, a: &Tensor, b: &Tensor| {
            let update = LowRank { a, b, scale: 1.7, dropout };
            (forward(x, &weight, bias, Some(&update))?.0 * &dy)?.sum_all()
        };
        let update = LowRank { a: &a, b: &b, scale: 1.7, dropout };
        let xa = forward(&x, &weight, bias, Some(&update))?.1.expect("there is an update");
        let (dx, gradient) = backward(&dy, &weight, Some((&update, &x, &xa)))?;
        let gradient = gradient.expect("there is an update");
        finite_difference(&x, &dx, |x| value(x, &a, &b))?;
        finite_difference(&a, &gradient.a, |a| value(&x, a, &b))?;
        finite_difference(&b, &gradient.b, |b| value(&x, &a, b))
    }

    #[test]
    fn backward_agrees_with_finite_differences() -> Result<()> {
        check_gradients(None, false)?;
        check_gradients(None, true)?;
        composed(|| check_gradients(None, false))
    }

    #[test]
    fn backward_agrees_with_finite_differences_under_dropout() -> Result<()> {
        check_gradients(Some(Dropout { probability: 0.4, key: 11, rows: &ROWS }), false)
    }

    #[test]
    fn without_an_update_only_the_input_has_a_gradient() -> Result<()> {
        let Case { x, weight, bias, dy, .. } = case()?;
        let (dx, gradient) = backward(&dy, &weight, None)?;
        assert!(gradient.is_none());
        finite_difference(&x, &dx, |x| (forward(x, &weight, Some(&bias), None)?.0 * &dy)?.sum_all())
    }

    /// Merging must equal not merging: `W + s B A` applied to `x`, with a scale that is not one, so that a scale on
    /// the base weight would show.
    #[test]
    fn merged_equals_unmerged() -> Result<()> {
        let Case { x, weight, a, b, .. } = case()?;
        let update = LowRank { a: &a, b: &b, scale: 2.5, dropout: None };
        let merged = (&weight + (b.matmul(&a)? * 2.5)?)?;
        close(&forward(&x, &weight, None, Some(&update))?.0, &x.matmul(&merged.t()?)?, 1e-14)
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        let Case { x, weight, a, b, dy, .. } = case()?;
        let update = LowRank { a: &a, b: &b, scale: 1.7, dropout: None };
        let both = || {
            let (y, xa) = forward(&x, &weight, None, Some(&update))?;
            let xa = xa.expect("there is an update");
            Ok([y, backward(&dy, &weight, Some((&update, &x, &xa)))?.0])
        };
        for (kernel, plain) in both()?.iter().zip(&composed(both)?) {
            close(kernel, plain, 1e-14)?;
        }
        Ok(())
    }

    #[test]
    fn an_update_with_b_zero_changes_no_bit() -> Result<()> {
        let Case { x, weight, a, b, .. } = case()?;
        let (x, weight) = (x.to_dtype(candle_core::DType::F32)?, weight.to_dtype(candle_core::DType::F32)?);
        let (a, b) = (a.to_dtype(x.dtype())?, b.zeros_like()?.to_dtype(x.dtype())?);
        let update = LowRank { a: &a, b: &b, scale: 2.0, dropout: None };
        let (on, off) = (forward(&x, &weight, None, Some(&update))?.0, forward(&x, &weight, None, None)?.0);
        assert_eq!(on.to_vec2::<f32>()?, off.to_vec2::<f32>()?);
        Ok(())
    }
}
