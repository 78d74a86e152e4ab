//! What a run came to, to look at: `report.html`, plots as SVG and PNG, TensorBoard's event files.
//!
//! ```text
//! metrics.jsonl ─► History ─► Chart ─► Drawing ─► SVG, PNG
//! the run's other files ─► Run ─► checks, page ─► report.html
//! ```
//!
//! A report is a function of the files in the run folder: for equal files it is equal, byte for byte.

pub mod chart;
mod checks;
mod compare;
mod curves;
pub mod drawing;
mod font;
mod history;
pub mod losses;
mod page;
pub mod png;
mod run;
pub mod tensorboard;
pub(crate) mod ticks;

use miette::Diagnostic;
use thiserror::Error;

pub use checks::{Check, checks};
pub use compare::{compare, names};
pub use curves::curve;
pub use history::History;
pub use page::{pictures, render};
pub use run::{BeforeAfter, Margins, Run, Sample, State};

use crate::files::{self, WriteError};
use crate::run_folder::RunFolder;

/// Why there is no report.
#[derive(Debug, Error, Diagnostic)]
pub enum ReportError {
    /// The template engine.
    #[error("cannot make the report")]
    Template(#[from] minijinja::Error),
    /// The system.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Write(#[from] WriteError),
}

/// Writes `report.html` of a run, the whole or the old one stays.
///
/// # Errors
/// The system's.
pub fn write(folder: &RunFolder, running: bool) -> Result<(), ReportError> {
    let html = render(&Run::read(folder, running))?;
    Ok(files::write(&folder.report(), html.as_bytes())?)
}
