//! Identity Preference Optimization.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::range::Positive;

/// Identity Preference Optimization: a target for the margin instead of a push without end.
///
/// Azar et al. 2023, eq. 17, <https://arxiv.org/abs/2310.12036>; their τ is β here. With the log-ratio
/// `a = log π(y|x) − log π_ref(y|x)` of the chosen `y_w` and the rejected `y_l`:
///
/// ```text
/// L = (a_w − a_l − 1 / 2β)²                      reduction = "sum"
/// L = (a_w / |y_w| − a_l / |y_l| − 1 / 2β)²      reduction = "token_mean"
/// ```
///
/// The paper has the first form. TRL, after asking its authors, divides each log-ratio by the completion's number of
/// tokens, so that the target does not depend on length; a β of one form means nothing in the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ipo {
    /// β, the paper's τ: the margin is drawn to `1 / 2β`.
    pub beta: Positive,
    /// Whether a log-ratio is a sum over the completion's tokens or their mean.
    pub reduction: Reduction,
}

/// What becomes of the log-ratios of a completion's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Their mean: TRL's IPO.
    TokenMean,
    /// Their sum: the paper's IPO.
    Sum,
}

impl Default for Ipo {
    fn default() -> Self {
        Self { beta: Positive::constant(0.1), reduction: Reduction::TokenMean }
    }
}

impl Ipo {
    /// The margin that the loss draws every pair to, `1 / 2β`, in nats (a token, with
    /// [`TokenMean`](Reduction::TokenMean)).
    #[must_use]
    pub fn target(&self) -> f64 {
        0.5 / self.beta.get()
    }

    /// The loss `[n]` of each pair, from the log-ratios `[n]` of its two completions as
    /// [`reduction`](Self::reduction) has them, in nats.
    ///
    /// # Errors
    /// Where the two are not vectors of one length.
    pub fn losses(&self, chosen: &Tensor, rejected: &Tensor) -> Result<Tensor> {
        ((chosen - rejected)? - self.target())?.sqr()
    }
}
