//! Supervised fine-tuning on the chosen completions.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::Update;

/// Supervised fine-tuning: the negative log-likelihood of the chosen completion, as a mean over tokens.
///
/// ```text
/// L = − Σᵢ log π(y_i|x_i) / Σᵢ |y_i|
/// ```
///
/// Both sums go over the whole update, so every token counts alike, however the update is cut into micro-batches.
/// The prompt's tokens are not trained on (TRL: `completion_only_loss`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sft {}

impl Sft {
    /// The contribution `[n]` of each example, from the log-probabilities `[n]` of its tokens, in nats, summed. The
    /// mean of the contributions over the update's examples is the mean over its tokens.
    ///
    /// # Errors
    /// What candle returns.
    pub fn losses(&self, logps: &Tensor, update: &Update) -> Result<Tensor> {
        logps * -(update.examples as f64 / update.nll_tokens as f64)
    }
}
