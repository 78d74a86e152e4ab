//! Training: one update after the other on a frozen base.
//!
//! [`Trainer`] knows examples, the loss and the optimizer; what is written where, and when, is for `commands/run`.

mod batch;
pub mod checkpoint;
mod config;
mod evaluate;
pub mod memory;
mod metrics;
pub mod optimizer;
mod packing;
pub mod reference;
mod schedule;
mod trainer;

pub use config::{EvalConfig, TrainConfig};
pub use evaluate::{Evaluation, PairMargin};
pub use metrics::Metrics;
pub use optimizer::AdamW;
pub use packing::{PackingFacts, Spread};
pub use reference::{Reference, ReferenceCache, ReferenceConfig};
pub use schedule::{Schedule, Warmup};
pub use trainer::{Plan, Progress, TrainError, Trainer};

#[cfg(test)]
mod tests;
