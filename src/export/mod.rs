//! What is made of a base and its adapter for others to load.

pub mod accounts;
pub mod card;
pub mod check;
mod folder;
mod gguf;
mod merge;
mod modelfile;

use miette::Diagnostic;
use thiserror::Error;

pub(crate) use folder::copy_text_files;
pub use folder::{Float, MergedFolder};
pub use gguf::{LoraGguf, MergedGguf};
pub use merge::Merge;
pub use modelfile::modelfile;

use crate::data::DataError;
use crate::files::WriteError;
use crate::model::ModelError;

/// Why something could not be made.
#[derive(Debug, Error, Diagnostic)]
pub enum ExportError {
    /// The base.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Model(#[from] ModelError),
    /// Its tokenizer.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Data(#[from] DataError),
    /// The system.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Write(#[from] WriteError),
    /// Values that the file cannot hold.
    #[error("tensor `{tensor}`: {problem}")]
    Values {
        /// Its name.
        tensor: String,
        /// What is wrong with them.
        problem: String,
        /// What to do.
        #[help]
        help: &'static str,
    },
    /// What was asked for cannot be made.
    #[error("{problem}")]
    Impossible {
        /// Why not.
        problem: String,
        /// What to do.
        #[help]
        help: String,
    },
    /// From candle.
    #[error("while merging")]
    Candle(#[from] candle_core::Error),
}
