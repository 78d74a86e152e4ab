//! A recipe: one TOML file that says what a run is.
//!
//! It is composed of the stages' own config structs, so a key is defined where it is used, once, with its default.
//! Whatever is wrong is shown in the user's file, under the value itself.

mod error;
mod parse;
mod resolved;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use error::RecipeError;
pub use parse::{Origin, Parsed, load, parse};
pub use resolved::{Inputs, Memory, Resolved};

use crate::adapter::{AdapterConfig, peft};
use crate::data::DataConfig;
use crate::device::DeviceChoice;
use crate::loss::Loss;
use crate::model::{ModelConfig, Source};
use crate::range::{Count, Share};
use crate::train::reference::ReferenceModel;
use crate::train::{EvalConfig, ReferenceConfig, TrainConfig};

/// A whole recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Where results go.
    #[serde(default)]
    pub run: RunConfig,
    /// The frozen base.
    pub model: ModelConfig,
    /// What is trained on it.
    #[serde(default)]
    pub adapter: AdapterConfig,
    /// What it learns from.
    pub data: DataConfig,
    /// How: `[loss.dpo]` and the like.
    pub loss: Loss,
    /// What the policy is compared with.
    #[serde(default)]
    pub reference: ReferenceConfig,
    /// Batches and the optimizer.
    #[serde(default)]
    pub train: TrainConfig,
    /// How it is measured.
    #[serde(default)]
    pub eval: EvalConfig,
}

/// The `[run]` table of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// The run folder. Default: `runs/<recipe>-<time>` in the working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out: Option<PathBuf>,
    /// Updates between checkpoints; the last update always has one. Default: a tenth of the run, at least 50.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<Count>,
    /// How many checkpoints are kept, the newest.
    pub keep: Count,
    /// Whether event files for TensorBoard are written into `tb/`.
    pub tensorboard: bool,
    /// Where the model computes.
    pub device: DeviceChoice,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            out: None,
            checkpoint_every: None,
            keep: Count::constant(2),
            tensorboard: true,
            device: DeviceChoice::Auto,
        }
    }
}

impl Recipe {
    /// Every local path in it with the key that holds it.
    fn paths(&mut self) -> Vec<(&'static str, &mut PathBuf)> {
        let mut paths: Vec<(&'static str, &mut PathBuf)> = vec![("model.source", &mut self.model.source)];
        paths.extend(self.run.out.as_mut().map(|path| ("run.out", path)));
        paths.extend(self.adapter.init.as_mut().map(|path| ("adapter.init", path)));
        paths.extend(self.data.chat_template.as_mut().map(|path| ("data.chat_template", path)));
        paths.extend(self.data.train.paths_mut().map(|path| ("data.train", path)));
        let eval = self.data.eval.iter_mut().flat_map(|eval| eval.paths_mut());
        paths.extend(eval.map(|path| ("data.eval", path)));
        paths
    }

    /// What no single value shows to be wrong: keys that contradict each other, as `(key, problem, help)`.
    fn contradictions(&self) -> Vec<(&'static str, String, String)> {
        let mut found: Vec<(&'static str, String, String)> = Vec::new();
        let mut add = |key: &'static str, problem: &str, help: &str| {
            found.push((key, problem.to_owned(), help.to_owned()));
        };
        if self.train.epochs.is_some() && self.train.steps.is_some() {
            add(
                "train.steps",
                "both `epochs` and `steps` are given",
                "keep one of them: each says how long the run is",
            );
        }
        if self.eval.every.is_some() && self.data.eval.is_none() {
            add("eval.every", "there is nothing to evaluate", "add `eval = \"FILE\"` to [data]");
        }
        if !matches!(self.model.source(), Source::Hub { .. }) {
            let given =
                [("model.revision", self.model.revision.is_some()), ("model.file", self.model.file.is_some())];
            for (key, _) in given.into_iter().filter(|(_, given)| *given) {
                let help =
                    "it belongs to a repository of the hub, whose source is ORG/NAME: remove it, or mend the source";
                add(key, &format!("`{key}` is given, and the source is a local path"), help);
            }
        }
        if let Some(longest) = self.data.max_prompt_length
            && longest >= self.data.max_length
        {
            let help = "a prompt needs room for its completion: lower max_prompt_length or raise max_length";
            add("data.max_prompt_length", "`max_prompt_length` is not below `max_length`", help);
        }
        if self.adapter.continues() {
            let AdapterConfig {
                rank,
                alpha,
                rslora,
                targets,
                rank_pattern,
                alpha_pattern,
                dora,
                layers,
                init_weights,
                dropout: _,
                init: _,
                init_mode: _,
            } = &self.adapter;
            let brought: [(&'static str, bool); 9] = [
                ("adapter.rank", rank.is_some()),
                ("adapter.alpha", alpha.is_some()),
                ("adapter.rank_pattern", rank_pattern.is_some()),
                ("adapter.alpha_pattern", alpha_pattern.is_some()),
                ("adapter.rslora", rslora.is_some()),
                ("adapter.dora", dora.is_some()),
                ("adapter.targets", targets.is_some()),
                ("adapter.layers", layers.is_some()),
                ("adapter.init_weights", init_weights.is_some()),
            ];
            for (key, _) in brought.into_iter().filter(|(_, given)| *given) {
                let problem = format!("`{key}` is given, and `adapter.init` brings its own");
                let help = "remove it: an adapter to go on with has its rank, alpha and targets; or set init_mode = \"stack\" \
                            to train a new one on top of it";
                add(key, &problem, help);
            }
        }
        if self.adapter.init.is_none() {
            let of_init = [
                ("adapter.init_mode", self.adapter.init_mode.is_some()),
                ("reference.model", self.reference.model == Some(ReferenceModel::Init)),
            ];
            for (key, _) in of_init.into_iter().filter(|(_, given)| *given) {
                add(
                    key,
                    &format!("`{key}` speaks of `adapter.init`, and none is given"),
                    "add `init = \"ADAPTER\"` to [adapter]",
                );
            }
        }
        if self.adapter.dora == Some(true) && self.adapter.dropout.is_some_and(|dropout| dropout.get() > 0.0) {
            add("adapter.dropout", "`dropout` is given, and `dora`", peft::DORA_WITH_DROPOUT);
        }
        found.extend(self.sharing_under(self.adapter.dropout.map_or(0.0, Share::get)));
        found
    }

    /// What the policy is compared with.
    #[must_use]
    pub fn reference_model(&self) -> ReferenceModel {
        let default = if self.adapter.init.is_some() { ReferenceModel::Init } else { ReferenceModel::Base };
        self.reference.model.unwrap_or(default)
    }

    /// The contradiction of shared prompts and an adapter with `dropout`, which `adapter.init` may have brought.
    fn sharing_under(&self, dropout: f64) -> Option<(&'static str, String, String)> {
        (self.train.share_prompts == Some(true) && dropout > 0.0).then(|| {
            let problem = format!("prompts cannot be shared under dropout, which is {dropout}");
            let help =
                "completions of one prompt would see one mask: remove share_prompts, or set [adapter] dropout = 0";
            ("train.share_prompts", problem, help.to_owned())
        })
    }
}

/// Makes `path` absolute by a folder that relative ones belong to.
fn anchored(path: &Path, folder: &Path) -> PathBuf {
    let home = path.strip_prefix("~").ok().and_then(|rest| Some(std::env::home_dir()?.join(rest)));
    let joined = home.unwrap_or_else(|| folder.join(path));
    // `.` and `..` taken out as written: messages and the resolved recipe stay legible
    let mut clean = PathBuf::new();
    for part in joined.components() {
        match part {
            std::path::Component::CurDir => {}
            std::path::Component::ParentDir if clean.file_name().is_some() => {
                clean.pop();
            }
            part => clean.push(part),
        }
    }
    clean
}

#[cfg(test)]
mod tests;
