//! The model: a frozen decoder, loaded once, and the adapters that make a policy of it.
//!
//! The base with its adapters off is the reference, on the same weights: nothing is loaded twice.

mod config;
mod decoder;
pub mod family;
pub mod flops;
pub mod generate;
mod layer;
pub mod memory;
pub mod packed;
mod source;
#[cfg(test)]
mod tests;
mod weights;

use std::path::{Path, PathBuf};

use miette::Diagnostic;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use config::{Biases, DecoderConfig, LayerConfig, Module, Projection, Rope};
pub use decoder::{Activations, Adapter, Decoder, Forward, Keep};
pub use packed::{Packed, Packer, PromptSpan};
pub use source::{Base, Source};
#[cfg(feature = "cuda")]
pub use weights::random_decoder;
pub use weights::{BaseFiles, Part, WeightFiles, gguf_decoder};

use crate::adapter::{Adapters, Gradients};
use crate::hub::HubError;
use crate::ops::completion_logps::TokenScore;
use crate::quant::Quant;
use crate::tensor_file::TensorFileError;

/// The `[model]` table of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A local folder in Hugging Face layout, a local GGUF file, or `ORG/NAME` on the hub. See [`Source`].
    pub source: PathBuf,
    /// How the base's matrices are kept in memory.
    #[serde(default)]
    pub quant: Quant,
    /// The branch, tag or commit of a repository on the hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The GGUF file of a repository on the hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// What can be wrong with a model.
#[derive(Debug, Error, Diagnostic)]
pub enum ModelError {
    /// The folder is not there.
    #[error("[model] source: there is no folder {}", .0.display())]
    NoFolder(PathBuf, #[help] String),
    /// The GGUF file is not there.
    #[error("[model] source: there is no file {}", .0.display())]
    NoFile(PathBuf, #[help] String),
    /// From the hub.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Hub(#[from] HubError),
    /// A file of the model is missing, broken or describes what is not supported.
    #[error("{}: {problem}", file.display())]
    File {
        /// The file or folder.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        #[help]
        help: Option<String>,
    },
    /// The model is quantized, and the recipe asks for another type.
    #[error("[model] quant is {asked}, and the model's files are quantized as {is} already")]
    #[diagnostic(help("leave `quant` out, or name the original model as source"))]
    Quantized {
        /// What the files hold.
        is: &'static str,
        /// What the recipe says.
        asked: &'static str,
    },
    /// From candle.
    #[error("while loading the model")]
    Candle(#[from] candle_core::Error),
}

impl From<TensorFileError> for ModelError {
    fn from(TensorFileError { file, problem, help }: TensorFileError) -> Self {
        Self::File { file, problem, help }
    }
}

/// Checks that a model folder is there.
///
/// # Errors
/// It is not, with a guess at what was meant.
pub fn check_folder(folder: &Path) -> Result<(), ModelError> {
    if folder.is_dir() {
        return Ok(());
    }
    let help = if folder.is_file() {
        "source is the folder with config.json, tokenizer.json and the safetensors files, not one of them"
    } else {
        "source is a local folder in Hugging Face layout (config.json, tokenizer.json, *.safetensors), or ORG/NAME of a \
         model on the hub"
    };
    Err(ModelError::NoFolder(folder.to_owned(), help.to_owned()))
}

/// A decoder and its adapters.
#[derive(Debug, Clone)]
pub struct Model {
    decoder: Decoder,
    adapters: Adapters,
    /// Those of the reference, where it is not the base alone.
    reference: Option<Adapters>,
}

impl Model {
    /// A policy over `decoder`, whose reference is the base alone.
    ///
    /// # Errors
    /// What candle returns.
    pub fn new(decoder: Decoder, mut adapters: Adapters) -> candle_core::Result<Self> {
        adapters.measure(&decoder)?;
        Ok(Self { decoder, adapters, reference: None })
    }

    /// The same policy, compared with the base with `reference` on.
    ///
    /// # Errors
    /// What candle returns.
    pub fn with_reference(mut self, mut reference: Adapters) -> candle_core::Result<Self> {
        reference.measure(&self.decoder)?;
        self.reference = Some(reference);
        Ok(self)
    }

    /// The same on `device`; see [`Decoder::to_device`].
    ///
    /// # Errors
    /// What candle returns.
    pub fn to_device(
        self,
        device: &candle_core::Device,
        dtype: candle_core::DType,
        resident: usize,
    ) -> candle_core::Result<Self> {
        Ok(Self {
            decoder: self.decoder.to_device(device, dtype, resident)?,
            adapters: self.adapters.to_device(device)?,
            reference: self.reference.map(|reference| reference.to_device(device)).transpose()?,
        })
    }

    /// The frozen base.
    #[must_use]
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The adapters.
    #[must_use]
    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// Replaces the adapters' tensors, which are in the order of [`Adapters::tensors`].
    ///
    /// # Errors
    /// What candle returns.
    pub fn replace(&mut self, tensors: Vec<candle_core::Tensor>) -> candle_core::Result<()> {
        self.adapters.replace(tensors)?;
        self.adapters.measure(&self.decoder)
    }

    /// Whether the reference has an adapter of its own.
    #[must_use]
    pub fn has_reference_adapter(&self) -> bool {
        self.reference.is_some()
    }

    /// Whether the policy is known to be its reference: where both are the same adapters, or the policy's are zero.
    ///
    /// # Errors
    /// What candle returns.
    pub fn is_reference(&self) -> candle_core::Result<bool> {
        match &self.reference {
            Some(reference) => self.adapters.same(reference),
            None => self.adapters.is_zero(),
        }
    }

    pub(crate) fn switched(&self, adapter: Adapter) -> Option<&Adapters> {
        match adapter {
            Adapter::On => Some(&self.adapters),
            Adapter::Reference => self.reference.as_ref(),
            Adapter::Off => None,
        }
    }

    /// Scores the targets of a packed batch. See [`Decoder::forward`].
    ///
    /// # Errors
    /// What candle returns.
    pub fn forward(&self, batch: &Packed, adapter: Adapter, keep: Keep<'_>) -> candle_core::Result<Forward> {
        self.decoder.forward(batch, self.switched(adapter), keep)
    }

    /// [`Model::forward`], and the scores of the reference in the same pass.
    ///
    /// # Errors
    /// What candle returns.
    pub fn forward_with_reference(
        &self,
        batch: &Packed,
        adapter: Adapter,
        keep: Keep<'_>,
    ) -> candle_core::Result<(Forward, Vec<TokenScore>)> {
        let reference = Some(self.switched(Adapter::Reference));
        let (forward, scores) = self.decoder.forward_beside(batch, self.switched(adapter), keep, reference)?;
        Ok((forward, scores.unwrap_or_default()))
    }

    /// Adds the gradients of the adapters to `gradients`. See [`Decoder::backward`].
    ///
    /// # Errors
    /// What candle returns.
    pub fn backward(
        &self,
        batch: &Packed,
        activations: Activations,
        slopes: &[f64],
        gradients: &mut Gradients,
    ) -> candle_core::Result<()> {
        self.decoder.backward(batch, &self.adapters, activations, slopes, gradients)
    }
}
