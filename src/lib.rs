//! Preference-tuning of language models with LoRA adapters: DPO, IPO, KTO, ORPO and SFT on a frozen base that is
//! loaded once and, with its adapters off, is its own reference.
//!
//! ```text
//! recipe ─► data ─► packed batches ─► model (forward, backward by hand) ─► losses ─► optimizer ─► run folder
//! ```
//!
//! | module | what is there |
//! |---|---|
//! | [`commands`] | what the binary does; the only place that joins stages |
//! | [`recipe`] | the TOML recipe: config structs composed, overrides, errors with positions |
//! | [`data`] | preference files to token ids: row shapes, chat templates, boundaries, truncation |
//! | [`hub`] | models and data sets of the Hugging Face hub, fetched and kept |
//! | [`model`] | the decoder, model families, weights, packed batches, generation |
//! | [`ops`] | its operators, each a forward and a backward |
//! | [`quant`] | frozen matrices: dense, GGUF blocks, NF4 |
//! | [`adapter`] | LoRA and PEFT's files |
//! | [`loss`] | one file a loss |
//! | [`judge`] | which of two answers is better: judges, verdicts, win rates |
//! | [`eval`] | what an adapter has changed, without a judge |
//! | [`export`] | merged models, and adapters for other programs |
//! | [`statistics`] | honest comparisons: scores, intervals, tests, control for length and style |
//! | [`train`] | updates, optimizer, schedule, evaluation, checkpoints |
//! | [`run_folder`] | what a run leaves behind |
//!
//! `examples/dpo_step_by_step.rs` derives the losses for a newcomer.

pub mod adapter;
pub mod allocator;
pub mod bytes;
pub mod cli;
pub mod commands;
pub mod data;
pub mod eval;
pub mod export;
pub mod files;
pub mod gguf;
mod hostile;
pub mod hub;
pub mod interrupt;
pub mod judge;
pub mod loss;
pub mod machine;
pub mod model;
pub mod ops;
pub mod progress;
pub mod quant;
pub mod range;
pub mod recipe;
pub mod run_folder;
pub mod statistics;
mod suggest;
pub mod tensor_file;
pub mod train;
