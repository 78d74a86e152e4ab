//! The `[adapter]` table, and what becomes of it.

use std::path::PathBuf;

use miette::Diagnostic;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Targets;
use crate::range::{Count, Positive, Share};

/// The `[adapter]` table of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// `R`, the width of the update. Default 16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<Count>,
    /// The update is scaled by `alpha / rank` (by `alpha / √rank` with `rslora`). Default twice the rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<Positive>,
    /// Scale by `alpha / √rank` (Kalajdzievski 2023, <https://arxiv.org/abs/2312.03732>). Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rslora: Option<bool>,
    /// Dropout on the adapters' input while training. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<Share>,
    /// Modules that get an adapter. Default `"all-linear"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Targets>,
    /// A PEFT adapter to start from; it brings rank, alpha, rslora and targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
}

impl AdapterConfig {
    /// The adapter to make, with every default filled in.
    #[must_use]
    pub fn lora(&self) -> LoraConfig {
        let rank = self.rank.map_or(16, Count::get);
        LoraConfig {
            rank,
            alpha: self.alpha.map_or(2.0 * rank as f64, Positive::get),
            rslora: self.rslora.unwrap_or(false),
            dropout: self.dropout.map_or(0.0, Share::get),
            targets: self.targets.clone().unwrap_or(Targets::AllLinear),
        }
    }
}

/// A LoRA adapter, every value known.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// `R`
    pub rank: usize,
    /// What the scale is made from.
    pub alpha: f64,
    /// Whether the scale is `alpha / √rank`.
    pub rslora: bool,
    /// Dropout on the adapters' input while training.
    pub dropout: f64,
    /// Modules that carry one.
    pub targets: Targets,
}

impl LoraConfig {
    /// What `B A` is multiplied by.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// What can be wrong with an adapter.
#[derive(Debug, Error, Diagnostic)]
pub enum AdapterError {
    /// A target names no module of the model.
    #[error("`{target}` in [adapter] targets matches no module of the model")]
    NoModule {
        /// The target as written.
        target: String,
        /// What to do.
        #[help]
        help: String,
    },
    /// A pattern that is no regular expression.
    #[error("[adapter] targets = {pattern:?} is not a regular expression")]
    BadPattern {
        /// The pattern as written.
        pattern: String,
        /// What the parser says.
        #[help]
        help: String,
    },
    /// A file of an adapter is missing, broken or asks for what is not there.
    #[error("{}: {problem}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        #[help]
        help: Option<String>,
    },
    /// From candle.
    #[error("while making the adapter")]
    Candle(#[from] candle_core::Error),
}
