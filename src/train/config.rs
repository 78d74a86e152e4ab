//! The `[train]` and `[eval]` tables.

use serde::{Deserialize, Serialize};

use super::{Schedule, Warmup};
use crate::bytes::Bytes;
use crate::range::{Count, NonNegative, Positive};

/// The `[train]` table of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// How often all rows are seen. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<Positive>,
    /// Number of updates, in place of `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<Count>,
    /// Pairs (or rows) an update.
    pub batch_size: Count,
    /// The most memory that the run may take. What does not fit is not kept but computed again, which changes speed, not
    /// the result. Default: what full speed needs, if three quarters of the free memory hold it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// Rows of tokens computed at once; an update larger than that is done in several micro-batches, with the same
    /// result. Default: as many as `memory` holds and speed needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<Count>,
    /// Whether completions of one prompt share its rows. Default: unless there is dropout, where each completion has its
    /// own mask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_prompts: Option<bool>,
    /// The highest learning rate.
    pub learning_rate: Positive,
    /// How many times higher the learning rate of `B` is than that of `A` (LoRA+).
    pub loraplus_ratio: Positive,
    /// How it goes on after the warm-up.
    pub schedule: Schedule,
    /// A share of the updates, or a number of them.
    pub warmup: Warmup,
    /// Decoupled weight decay.
    pub weight_decay: NonNegative,
    /// Gradients are scaled down to this common norm; 0 leaves them.
    pub max_grad_norm: NonNegative,
    /// Whether each epoch has its own order; if not, that of the files.
    pub shuffle: bool,
    /// Seeds the adapter's first values, the order of rows and dropout.
    pub seed: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: None,
            steps: None,
            batch_size: Count::constant(32),
            memory: None,
            micro_batch_tokens: None,
            share_prompts: None,
            learning_rate: Positive::constant(1e-5),
            loraplus_ratio: Positive::constant(1.0),
            schedule: Schedule::default(),
            warmup: Warmup::Share(0.1),
            weight_decay: NonNegative::constant(0.0),
            max_grad_norm: NonNegative::constant(1.0),
            shuffle: true,
            seed: 42,
        }
    }
}

/// The `[eval]` table of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Updates between evaluations; before and after the run there is always one. Default: a quarter of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<Count>,
    /// Held-out prompts that base and policy answer before and after the run.
    pub samples: usize,
    /// The most tokens of such an answer.
    pub max_new_tokens: Count,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { every: None, samples: 4, max_new_tokens: Count::constant(128) }
    }
}
