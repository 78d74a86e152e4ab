//! How far two distributions over the vocabulary are apart, row by row.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::completion_logps::Head;

/// Rows whose logits are held at once.
const ROWS: usize = 64;

/// Two distributions of the next token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// `KL(p ‖ q)` in nats.
    pub kl: f64,
    /// Whether their most probable token is the same.
    pub same_top: bool,
}

/// For each row, how far `q` is from `p`, each given by hidden states `[S, D]` and what makes logits of them. Exact: the
/// sum over the vocabulary, in f64.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn of_rows(p: (&Tensor, Head<'_>), q: (&Tensor, Head<'_>)) -> Result<Vec<Divergence>> {
    let rows = p.0.dim(0)?;
    let mut all = Vec::with_capacity(rows);
    for start in (0..rows).step_by(ROWS) {
        let part = |(hidden, head): (&Tensor, Head<'_>)| {
            let hidden = hidden.narrow(0, start, ROWS.min(rows - start))?;
            head.logits(&hidden.contiguous()?)?.to_dtype(candle_core::DType::F32)?.to_vec2::<f32>()
        };
        let (p, q) = (part(p)?, part(q)?);
        all.extend(p.par_iter().zip(&q).map(|(p, q)| divergence(p, q)).collect::<Vec<_>>());
    }
    Ok(all)
}

/// Of the distributions that two rows of logits give.
fn divergence(p: &[f32], q: &[f32]) -> Divergence {
    let top = |logits: &[f32]| {
        logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |top, (i, &x)| if x > top.1 { (i, x) } else { top })
    };
    let (top_p, top_q) = (top(p), top(q));
    let log_sum = |logits: &[f32], top: f32| f64::from(top) + ln_sum(logits, top);
    let (log_p, log_q) = (log_sum(p, top_p.1), log_sum(q, top_q.1));
    let kl = p.iter().zip(q).map(|(&p, &q)| {
        let (p, q) = (f64::from(p) - log_p, f64::from(q) - log_q);
        p.exp() * (p - q)
    });
    // below zero by rounding only
    Divergence { kl: kl.sum::<f64>().max(0.0), same_top: top_p.0 == top_q.0 }
}

/// The logarithm of what all logits weigh beside the largest, summed in f64.
pub(crate) fn ln_sum(logits: &[f32], largest: f32) -> f64 {
    logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_distributions() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): ½ ln 2 + ¼ ln ½ = ¼ ln 2, whatever is added to the logits
        let (p, q) = ([2f32.ln() + 3.0, 3.0, 3.0], [-1.0, -1.0, 2f32.ln() - 1.0]);
        let found = divergence(&p, &q);
        assert!((found.kl - 2f64.ln() / 4.0).abs() < 1e-6 && !found.same_top, "{found:?}");
        assert_eq!(divergence(&p, &p), Divergence { kl: 0.0, same_top: true });
    }
}
