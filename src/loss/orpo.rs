//! Odds Ratio Preference Optimization.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::elementwise::{log_sigmoid, log1mexp};
use crate::range::Positive;

/// Odds Ratio Preference Optimization: fine-tuning and preference in one loss, without a reference.
///
/// Hong et al. 2024, eq. 4 to 7, <https://arxiv.org/abs/2403.07691>; their λ is β here. With the probability
/// `log P(y|x) = log π(y|x) / |y|` of a completion, which is the geometric mean of its tokens':
///
/// ```text
/// odds(y|x) = P(y|x) / (1 − P(y|x))
/// L = L_SFT − β log σ(log odds(y_w|x) − log odds(y_l|x))
/// ```
///
/// `L_SFT` is the [negative log-likelihood](super::Sft) of the chosen completion, or of prompt and completion
/// together. The odds are never formed: their logarithm is `log P − log(1 − e^(log P))`, exact from −∞ to the
/// largest probability below one that f32 can hold; a completion that is more certain counts as that one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Orpo {
    /// β, the paper's λ: the weight of the odds ratio against the likelihood.
    pub beta: Positive,
    /// What the likelihood is of.
    pub nll: Nll,
}

/// The tokens whose negative log-likelihood is part of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Nll {
    /// The chosen completion: the paper's `L_SFT`.
    #[serde(rename = "completion")]
    Completion,
    /// The prompt and the chosen completion: TRL's.
    #[serde(rename = "prompt+completion")]
    PromptAndCompletion,
}

impl Default for Orpo {
    fn default() -> Self {
        Self { beta: Positive::constant(0.1), nll: Nll::Completion }
    }
}

/// Log-probability of `1 − 2⁻²⁴`, the largest f32 below one. Log-probabilities that were computed in f32 say nothing
/// nearer to certainty, and at certainty itself the odds are infinite.
const CERTAIN: f64 = -5.960_464_655_174_753e-8;

impl Orpo {
    /// The log of the odds ratio `[n]` of each pair, from the mean log-probabilities `[n]` of a token of its two
    /// completions, in nats, not above zero.
    ///
    /// # Errors
    /// Where the two are not f64 vectors of one length on the CPU.
    pub fn log_odds_ratios(&self, chosen: &Tensor, rejected: &Tensor) -> Result<Tensor> {
        log_odds(chosen)? - log_odds(rejected)?
    }

    /// The preference part `−β log σ(r)` `[n]` of the loss of each pair, from the log of its odds ratio `r [n]`.
    ///
    /// # Errors
    /// Where `log_odds_ratios` is not f64 on the CPU.
    pub fn losses(&self, log_odds_ratios: &Tensor) -> Result<Tensor> {
        log_sigmoid(log_odds_ratios)? * -self.beta.get()
    }
}

/// `log(P / (1 − P))` of log-probabilities.
fn log_odds(logps: &Tensor) -> Result<Tensor> {
    let logps = logps.minimum(CERTAIN)?;
    &logps - log1mexp(&logps)?
}
