//! `dpo-lora report`: the page of a run written again, or several runs beside each other.

use std::path::{Path, PathBuf};

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
    let runs = arguments.runs.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
    let (html, default) = match &runs[..] {
        [run] => (report::render(run), arguments.runs[0].join("report.html")),
        runs => (report::compare(runs), PathBuf::from("compared.html")),
    };
    let out = arguments.out.as_ref().unwrap_or(&default);
    let html = html.map_err(|e| failed(ReportError::from(e)))?;
    files::write(out, html.as_bytes()).map_err(failed)?;
    console.fact("report", out.display());
    Ok(())
}

/// The run in a folder.
pub(super) fn read(path: &Path) -> Result<Run, Failure> {
    let folder = RunFolder::open(path).map_err(request)?;
    Ok(Run::read(&folder, false))
}
