//! Direct Preference Optimization: the sigmoid loss, and cDPO.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::elementwise::log_sigmoid;
use crate::range::{Positive, Smoothing};

/// Direct Preference Optimization, the sigmoid form.
///
/// Rafailov et al. 2023, eq. 7, <https://arxiv.org/abs/2305.18290>. With the log-ratio
/// `a = log π(y|x) − log π_ref(y|x)` of the chosen `y_w` and the rejected `y_l`:
///
/// ```text
/// Δ = a_w − a_l
/// L = −log σ(β Δ)
/// ```
///
/// With `label_smoothing` ε it is conservative DPO (Mitchell 2023, eq. 3, <https://ericmitchell.ai/cdpo.pdf>), which
/// takes every label to be wrong with probability ε:
///
/// ```text
/// L = −(1 − ε) log σ(β Δ) − ε log σ(−β Δ)
/// ```
///
/// TRL from 1.0 on accepts `label_smoothing` beside its `sigmoid` loss and ignores it; here it counts, as it does in
/// TRL up to 0.28.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dpo {
    /// β: how much a nat of log-ratio counts. The policy is held nearer to the reference by a larger β.
    pub beta: Positive,
    /// ε: the share of pairs whose label is taken to be the wrong way round.
    pub label_smoothing: Smoothing,
}

impl Default for Dpo {
    fn default() -> Self {
        Self { beta: Positive::constant(0.1), label_smoothing: Smoothing::constant(0.0) }
    }
}

impl Dpo {
    /// The loss `[n]` of each pair, from the log-ratios `[n]` of its two completions, in nats, summed over tokens.
    ///
    /// # Errors
    /// Where the two are not f64 vectors of one length on the CPU.
    pub fn losses(&self, chosen: &Tensor, rejected: &Tensor) -> Result<Tensor> {
        let (beta, smoothing) = (self.beta.get(), self.label_smoothing.get());
        let margins = ((chosen - rejected)? * beta)?;
        let right = (log_sigmoid(&margins)? * (smoothing - 1.0))?;
        let wrong = (log_sigmoid(&margins.neg()?)? * smoothing)?;
        right - wrong
    }
}
