//! Kahneman-Tversky Optimization.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::elementwise::sigmoid;
use crate::range::{NonNegative, Positive};

/// Kahneman-Tversky Optimization: single completions, each labelled desirable or undesirable.
///
/// Ethayarajh et al. 2024, eq. 7, <https://arxiv.org/abs/2402.01306>. With the log-ratio
/// `a = log π(y|x) − log π_ref(y|x)` of a completion, and the reference point `z`:
///
/// ```text
/// L = λ_D (1 − σ(β (a − z)))      desirable
/// L = λ_U (1 − σ(β (z − a)))      undesirable
/// z = max(0, mean (log π(y'|x) − log π_ref(y'|x)))
/// ```
///
/// `z` estimates the divergence of policy and reference from prompts `x` with completions `y'` of other prompts, and
/// carries no gradient. It is taken over the whole update here, in TRL over a micro-batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kto {
    /// β: how soon more of the same log-ratio stops to matter.
    pub beta: Positive,
    /// λ_D, the weight of desirable completions. The paper (eq. 8) keeps `λ_D n_D / (λ_U n_U)`, with the numbers `n` of
    /// completions of each kind, between 1 and 4/3.
    pub desirable_weight: NonNegative,
    /// λ_U, the weight of undesirable completions.
    pub undesirable_weight: NonNegative,
}

impl Default for Kto {
    fn default() -> Self {
        let one = NonNegative::constant(1.0);
        Self { beta: Positive::constant(0.1), desirable_weight: one, undesirable_weight: one }
    }
}

impl Kto {
    /// λ of a completion with this label.
    #[must_use]
    pub fn weight(&self, desirable: bool) -> f64 {
        if desirable { self.desirable_weight.get() } else { self.undesirable_weight.get() }
    }

    /// The loss `[n]` of each completion, from its log-ratio `[n]` in nats, summed over tokens, its label, and the
    /// reference point `kl` in nats.
    ///
    /// # Errors
    /// Where the log-ratios are not an f64 vector on the CPU, with one label each.
    pub fn losses(&self, log_ratios: &Tensor, desirable: &[bool], kl: f64) -> Result<Tensor> {
        let per_label = |f: &dyn Fn(bool) -> f64| {
            let values: Vec<f64> = desirable.iter().map(|&label| f(label)).collect();
            Tensor::from_vec(values, desirable.len(), log_ratios.device())
        };
        let signs = per_label(&|label| if label { self.beta.get() } else { -self.beta.get() })?;
        let weights = per_label(&|label| self.weight(label))?;
        // 1 − σ(z) = σ(−z), which does not cancel where σ(z) is near one
        let gains = ((log_ratios - kl)? * signs)?;
        weights * sigmoid(&gains.neg()?)?
    }
}
