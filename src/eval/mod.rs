//! What an adapter has changed: preferences on held-out pairs, distance from the base, answers, other abilities.
//!
//! | file | what is there |
//! |---|---|
//! | `pairs` | held-out pairs under base and policy, with paired intervals |
//! | `answers` | answers that were sampled: KL to the base, length, repetition |
//! | `choices` | multiple-choice questions, adapter off and on |
//! | `health` | which values are usual, and what to make of others; the only place with such thresholds |
//!
//! Everything compares the policy with the base it stands on, prompt by prompt.

mod answers;
mod choices;
pub mod health;
mod pairs;

pub use answers::{AnswerSide, Answers, Distance, Repetition, Sampled, repetition};
pub use choices::{ChoiceResult, Compared, score_choices};
pub use health::{Check, Level};
pub use pairs::{Histogram, PairLogps, Pairs};

/// Rows that are computed at once, but for a single longer sequence: as many as products need for full speed.
pub(crate) const BATCH_ROWS: usize = 1024;
