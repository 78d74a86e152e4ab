//! The head: log-probabilities of given tokens, and their gradient, without ever holding `[S, V]`.
//!
//! A panel of the vocabulary at a time: logits `Z = h Wᵀ`, their share of the log-sum-exp (the largest logit and all sums
//! are kept relative to it, as in online softmax), the target's log-probability, and in the same pass
//!
//! ```text
//! U = (onehot(target) − softmax(Z)) W        so that   dL/dh = g ⊙ U
//! ```
//!
//! for every loss that is a function of summed log-probabilities, where `g` is one number a row (the loss's derivative
//! with respect to the sum that the row belongs to). `g` is known only when all rows were scored; `U` is not in need
//! of it. So the logits are computed once, not again in the backward pass.

use candle_core::{D, Result, Tensor};

use super::cpu::{self, Real, filled, for_real, tensor, values};
#[cfg(feature = "cuda")]
use super::cuda;
#[cfg(feature = "cuda")]
use super::on_gpu;
use super::{Form, form, has_kernel, linear};
use crate::quant::Weight;

/// What turns hidden states into logits.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// `[V, D]`
    pub weight: &'a Weight,
    /// Logits `z` become `c tanh(z / c)`; the gradient of each then carries `1 − (z / c)²`.
    pub softcap: Option<f64>,
}

impl Head<'_> {
    /// All logits of a few rows. `[S, V]`
    ///
    /// # Errors
    /// What candle returns for wrong shapes or types.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = linear::apply(hidden, self.weight)?;
        match self.softcap {
            Some(cap) => (logits / cap)?.tanh()? * cap,
            None => Ok(logits),
        }
    }
}

/// What one scored row gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Log-probability of the target in nats.
    pub logp: f64,
    /// Entropy of the distribution in nats.
    pub entropy: f64,
    /// Mean of the logits over the vocabulary.
    pub mean_logit: f64,
    /// Whether the target is the most probable token.
    pub top1: bool,
    /// The most probable token, the first of equals.
    pub best: u32,
    /// Its log-probability; exactly `logp` where the target is it.
    pub best_logp: f64,
}

/// What to compute besides the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Nothing: evaluation, the reference.
    Scores,
    /// `U`, for a backward pass.
    Gradient,
}

/// Rows of logits that the composed form holds at once.
const CHUNK: usize = 256;
/// The same on a GPU; memory is planned by it.
pub(crate) const GPU_CHUNK: usize = 512;

/// Scores `targets [S]` at the rows of `hidden [S, D]`. `U` is `[S, D]`.
///
/// # Errors
/// A target outside the vocabulary, or what candle returns for wrong shapes or types.
pub fn score(
    hidden: &Tensor,
    head: Head<'_>,
    targets: &[u32],
    want: Want,
) -> Result<(Vec<TokenScore>, Option<Tensor>)> {
    let (rows, d) = hidden.dims2()?;
    let (vocabulary, width) = head.weight.dims()?;
    if d != width {
        candle_core::bail!("head: rows of {d} and a head of {width} columns")
    }
    if rows != targets.len() {
        candle_core::bail!("head: {rows} rows and {} targets", targets.len())
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= vocabulary) {
        candle_core::bail!("token {target} is outside the model's vocabulary of {vocabulary}")
    }
    match form(hidden) {
        Form::Cpu => return cpu::completion_logps::score(hidden, head, targets, want),
        #[cfg(feature = "cuda")]
        Form::Cuda => return cuda::completion_logps::score(hidden, head, targets, want),
        Form::Composed => {}
    }
    let weight = head.weight.dense(hidden.dtype())?;
    let (mut scores, mut gradients) = (Vec::with_capacity(rows), Vec::new());
    for (i, targets) in targets.chunks(CHUNK).enumerate() {
        let hidden = hidden.narrow(0, i * CHUNK, targets.len())?;
        let mut logits = hidden.matmul(&weight.t()?)?;
        let mut slope = None;
        if let Some(cap) = head.softcap {
            let tanh = (logits / cap)?.tanh()?;
            (logits, slope) = ((&tanh * cap)?, Some((1.0 - tanh.sqr()?)?));
        }
        let largest = logits.max_keepdim(D::Minus1)?;
        let exps = logits.broadcast_sub(&largest)?.exp()?;
        let sums = exps.sum_keepdim(D::Minus1)?;
        let softmax = exps.broadcast_div(&sums)?;
        let index = Tensor::new(targets, hidden.device())?.unsqueeze(1)?;
        let log_sum_exp = (&largest + sums.log()?)?;
        let at_target = logits.gather(&index, 1)?;
        let logps = column(&(&at_target - &log_sum_exp)?)?;
        let entropies = column(&(&log_sum_exp - (&softmax * &logits)?.sum_keepdim(D::Minus1)?)?)?;
        let means = column(&logits.mean_keepdim(D::Minus1)?)?;
        let top = column(&(&at_target - &largest)?)?;
        let best: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
        let best_logps = column(&(&largest - &log_sum_exp)?)?;
        for row in 0..targets.len() {
            scores.push(TokenScore {
                logp: logps[row],
                entropy: entropies[row],
                mean_logit: means[row],
                top1: top[row] >= 0.0,
                best: best[row],
                best_logp: best_logps[row],
            });
        }
        if want == Want::Gradient {
            let one = Tensor::ones((targets.len(), 1), hidden.dtype(), hidden.device())?;
            let mut by_logit = softmax.neg()?.scatter_add(&index, &one, 1)?;
            if let Some(slope) = slope {
                by_logit = (by_logit * slope)?;
            }
            gradients.push(by_logit.matmul(&weight)?);
        }
    }
    let gradient = match want {
        Want::Gradient if gradients.is_empty() => Some(hidden.zeros_like()?),
        Want::Gradient => Some(Tensor::cat(&gradients, 0)?),
        Want::Scores => None,
    };
    Ok((scores, gradient))
}

fn column(x: &Tensor) -> Result<Vec<f64>> {
    x.squeeze(1)?.to_dtype(candle_core::DType::F64)?.to_vec1()
}

/// `g ⊙ U`, the gradient of `hidden`, for `g` one number a row.
///
/// # Errors
/// Another number of rows.
pub fn backward(u: &Tensor, g: &[f64]) -> Result<Tensor> {
    let (rows, d) = u.dims2()?;
    if rows != g.len() {
        candle_core::bail!("head: {rows} rows and {} slopes", g.len())
    }
    #[cfg(feature = "cuda")]
    if on_gpu(u) {
        return cuda::completion_logps::backward(u, g);
    }
    if has_kernel(u) && d > 0 {
        return for_real!(u, T => {
            let u = values::<T>(u)?;
            let [scaled] = filled::<T, 1>(u.len(), d, |row, [scaled]| {
                let g = <T as Real>::of(g[row]);
                scaled.iter_mut().zip(&u[row * d..]).for_each(|(scaled, &u)| *scaled = g * u);
            });
            tensor(scaled, (rows, d))
        });
    }
    u.broadcast_mul(&Tensor::new(g, u.device())?.to_dtype(u.dtype())?.unsqueeze(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    fn inputs(rows: usize) -> Result<(Tensor, Weight, Vec<u32>)> {
        let targets = (0..rows).map(|row| (row * 7 % 23) as u32).collect();
        Ok((normal(1, (rows, 6))?, Weight::Dense(normal(2, (23, 6))?), targets))
    }

    const CAPS: [Option<f64>; 2] = [None, Some(1.3)];

    #[test]
    fn the_gradient_agrees_with_finite_differences() -> Result<()> {
        let (hidden, weight, targets) = inputs(5)?;
        // another factor for each row, as a loss over several sequences has
        let g = normal(3, 5)?;
        let slopes = g.to_vec1::<f64>()?;
        for softcap in CAPS {
            let head = Head { weight: &weight, softcap };
            let u = score(&hidden, head, &targets, Want::Gradient)?.1.expect("asked for");
            close(&backward(&u, &slopes)?, &composed(|| backward(&u, &slopes))?, 0.0)?;
            finite_difference(&hidden, &backward(&u, &slopes)?, |hidden| {
                let logps = score(hidden, head, &targets, Want::Scores)?.0;
                let logps: Vec<f64> = logps.iter().map(|score| score.logp).collect();
                (Tensor::new(logps, hidden.device())? * &g)?.sum_all()
            })?;
        }
        Ok(())
    }

    #[test]
    fn kernel_equals_composed_form_over_several_blocks_and_panels() -> Result<()> {
        let (hidden, weight) = (normal(1, (1027, 3))?, Weight::Dense(normal(2, (4099, 3))?));
        let targets: Vec<u32> = (0..1027).map(|i| i * 977 % 4099).collect();
        for softcap in CAPS {
            let both = || score(&hidden, Head { weight: &weight, softcap }, &targets, Want::Gradient);
            let ((kernel, kernel_u), (plain, plain_u)) = (both()?, composed(both)?);
            close(&kernel_u.expect("asked for"), &plain_u.expect("asked for"), 1e-12)?;
            for (a, b) in kernel.iter().zip(&plain) {
                assert!((a.logp - b.logp).abs() < 1e-12);
                assert!((a.entropy - b.entropy).abs() < 1e-12);
                assert!((a.mean_logit - b.mean_logit).abs() < 1e-12);
                assert_eq!((a.top1, a.best), (b.top1, b.best));
                assert!((a.best_logp - b.best_logp).abs() < 1e-12);
                assert!(!a.top1 || a.logp == a.best_logp);
            }
        }
        Ok(())
    }

    #[test]
    fn huge_logits_stay_finite() -> Result<()> {
        let hidden = Tensor::new(&[[1e4f32, 0.0]], &candle_core::Device::Cpu)?;
        let weight = Weight::Dense(Tensor::new(&[[1f32, 0.0], [-1.0, 0.0]], &candle_core::Device::Cpu)?);
        let scores = score(&hidden, Head { weight: &weight, softcap: None }, &[1], Want::Scores)?.0;
        assert_eq!(scores[0].logp, -2e4);
        assert_eq!(scores[0].entropy, 0.0);
        Ok(())
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_an_error() -> Result<()> {
        let (hidden, weight, _) = inputs(1)?;
        let error = score(&hidden, Head { weight: &weight, softcap: None }, &[23], Want::Scores)
            .expect_err("23 is one too many");
        assert!(error.to_string().contains("vocabulary of 23"));
        Ok(())
    }
}
