//! `dpo-lora report`: the page of a run written again, or several runs beside each other.

use std::path::PathBuf;

use super::{Failure, failed, request};
use crate::cli;
use crate::files;
use crate::progress::Console;
use crate::report::{self, ReportError, Run};
use crate::run_folder::RunFolder;

/// Writes a report.
///
/// # Errors
/// See [`Failure`].
pub fn report(arguments: &cli::Report) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let folders = arguments.runs.iter().map(|path| RunFolder::open(path)).collect::<Result<Vec<_>, _>>();
    let folders = folders.map_err(request)?;
    let runs: Vec<Run> = folders.iter().map(|folder| Run::read(folder, false)).collect();
    let (html, default) = match (&runs[..], &folders[..]) {
        ([run], [folder]) => (report::render(run), folder.report()),
        (runs, _) => (report::compare(runs), PathBuf::from("compared.html")),
    };
    let out = arguments.out.as_ref().unwrap_or(&default);
    let html = html.map_err(|e| failed(ReportError::from(e)))?;
    files::write(out, html.as_bytes()).map_err(failed)?;
    console.fact("report", out.display());
    Ok(())
}
