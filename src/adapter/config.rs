//! The `[adapter]` table, and what becomes of it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use miette::Diagnostic;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Targets, targets};
use crate::model::Module;
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
    /// Other ranks for modules by their name or a pattern, as PEFT's `rank_pattern`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_pattern: Option<BTreeMap<String, Count>>,
    /// Other alphas for modules by their name or a pattern, as PEFT's `alpha_pattern`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_pattern: Option<BTreeMap<String, Positive>>,
    /// Scale by `alpha / √rank` (Kalajdzievski 2023, <https://arxiv.org/abs/2312.03732>). Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rslora: Option<bool>,
    /// Train the length of each row of the matrices too (Liu et al. 2024, <https://arxiv.org/abs/2402.09353>). Default
    /// false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dora: Option<bool>,
    /// Dropout on the adapters' input while training. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<Share>,
    /// Modules that get an adapter. Default `"all-linear"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Targets>,
    /// Layers that get an adapter, from 0. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// The first values of a new adapter. Default [`InitialWeights::Kaiming`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_weights: Option<InitialWeights>,
    /// A PEFT adapter to start from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// What becomes of it. Default [`InitMode::Continue`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_mode: Option<InitMode>,
}

/// What becomes of an adapter to start from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitMode {
    /// It is trained on; it brings rank, alpha, targets and all else.
    #[default]
    Continue,
    /// It stays as it is, and a new adapter is trained on top of it.
    Stack,
}

/// The first values of a new adapter. With all of them the policy begins as the reference.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitialWeights {
    /// `A ~ U(−1/√in, 1/√in)`, `B = 0`: PEFT's default.
    #[default]
    Kaiming,
    /// `A ~ N(0, 1/R²)`, `B = 0`.
    Gaussian,
    /// `s B A` is the best approximation of `W` of rank `R`: `A = √(S/s) Vᵀ`, `B = U √(S/s)` (Meng et al. 2024,
    /// <https://arxiv.org/abs/2404.02948>).
    Pissa,
    /// `B` and `A` are the first columns and rows of `W = Q R` (Büyükakyüz 2024, <https://arxiv.org/abs/2406.01775>).
    Olora,
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
            dora: self.dora.unwrap_or(false),
            dropout: self.dropout.map_or(0.0, Share::get),
            targets: self.targets.clone().unwrap_or(Targets::AllLinear),
            layers: self.layers.clone(),
            ranks: self.rank_pattern.iter().flatten().map(|(name, rank)| (name.clone(), rank.get())).collect(),
            alphas: self.alpha_pattern.iter().flatten().map(|(name, alpha)| (name.clone(), alpha.get())).collect(),
            weights: self.init_weights.unwrap_or_default(),
        }
    }

    /// Whether an adapter is trained on as it is.
    #[must_use]
    pub fn continues(&self) -> bool {
        self.init.is_some() && self.init_mode.unwrap_or_default() == InitMode::Continue
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
    /// Whether the lengths of the matrices' rows are trained too.
    pub dora: bool,
    /// Dropout on the adapters' input while training.
    pub dropout: f64,
    /// Modules that carry one.
    pub targets: Targets,
    /// Layers that do; all if none are named.
    pub layers: Option<Vec<usize>>,
    /// Other ranks by pattern; the first that matches counts.
    pub ranks: Vec<(String, usize)>,
    /// Other alphas by pattern; the first that matches counts.
    pub alphas: Vec<(String, f64)>,
    /// The first values.
    pub weights: InitialWeights,
}

impl Default for LoraConfig {
    fn default() -> Self {
        AdapterConfig::default().lora()
    }
}

impl LoraConfig {
    /// What `B A` of rank `rank` is multiplied by.
    #[must_use]
    pub fn scale(&self, rank: usize, alpha: f64) -> f64 {
        alpha / self.divisor(rank)
    }

    /// What alpha is divided by.
    pub(super) fn divisor(&self, rank: usize) -> f64 {
        let rank = rank as f64;
        if self.rslora { rank.sqrt() } else { rank }
    }

    /// The alpha that gives `scale` at a rank; without the last digits that come of dividing and multiplying.
    pub(super) fn alpha_of(&self, rank: usize, scale: f64) -> f64 {
        let exact = scale * self.divisor(rank);
        let short: f64 = format!("{exact:.9e}").parse().unwrap_or(exact);
        if (self.scale(rank, short) / scale - 1.0).abs() < 1e-15 { short } else { exact }
    }

    /// For each of `modules`, the rank and scale of its adapter, if it carries one.
    ///
    /// # Errors
    /// A target, layer or pattern that matches nothing: a typing mistake would otherwise train less than was asked for.
    pub fn select(&self, modules: &[Module]) -> Result<Vec<Option<(usize, f64)>>, AdapterError> {
        let mut selected = self.targets.select(modules)?;
        if let Some(layers) = &self.layers {
            let of = |module: &Module| targets::layer(&module.path);
            for &layer in layers {
                if !modules.iter().any(|module| of(module) == Some(layer)) {
                    let last = modules.iter().filter_map(of).max().unwrap_or(0);
                    return Err(AdapterError::NoLayer { layer, last });
                }
            }
            for (selected, module) in selected.iter_mut().zip(modules) {
                *selected &= of(module).is_some_and(|layer| layers.contains(&layer));
            }
            if !selected.contains(&true) {
                return Err(AdapterError::Mismatch {
                    problem: "[adapter] targets and layers have no module in common".into(),
                    help: format!("targets are {}, layers are {layers:?}", self.targets),
                });
            }
        }
        let ranks = targets::patterns(&self.ranks, modules, &selected)?;
        let alphas = targets::patterns(&self.alphas, modules, &selected)?;
        let one = |((selected, rank), alpha): ((bool, Option<usize>), Option<f64>)| {
            let rank = rank.unwrap_or(self.rank);
            selected.then(|| (rank, self.scale(rank, alpha.unwrap_or(self.alpha))))
        };
        Ok(selected.into_iter().zip(ranks).zip(alphas).map(one).collect())
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
    /// A layer that the model does not have.
    #[error("[adapter] layers names layer {layer}, and the model's last is {last}")]
    #[diagnostic(help("layers are counted from 0: layers = [0, 1, 2]"))]
    NoLayer {
        /// As written.
        layer: usize,
        /// The model's last.
        last: usize,
    },
    /// A recipe that asks for what cannot be put together.
    #[error("{problem}")]
    Mismatch {
        /// What.
        problem: String,
        /// What to do.
        #[help]
        help: String,
    },
    /// A pattern that is no regular expression.
    #[error("[adapter] {pattern:?} is not a regular expression")]
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
    /// A trainable tensor got no gradient.
    #[error("the adapter of `{module}` got no gradient: it would never train")]
    NoGradient {
        /// The module.
        module: String,
    },
    /// From candle.
    #[error("while computing with the adapter")]
    Candle(#[from] candle_core::Error),
}
