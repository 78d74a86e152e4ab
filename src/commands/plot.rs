//! `dpo-lora plot`: a curve of runs, or the losses, as a file.

use std::path::{Path, PathBuf};

use miette::{Diagnostic, miette};
use thiserror::Error;

use super::{Failure, failed, request};
use crate::cli::{self, PlotWhat};
use crate::files;
use crate::report::chart::Chart;
use crate::report::drawing::{Drawing, Theme};
use crate::report::png::png;
use crate::report::{self, History, ReportError, Run};
use crate::run_folder::RunFolder;
use crate::suggest::{did_you_mean, list};

#[derive(Debug, Error, Diagnostic)]
enum PlotError {
    #[error("{}: pictures are written as .svg, .png or .html", .0.display())]
    Format(PathBuf),
    #[error("there is no curve `{name}`")]
    #[diagnostic(help("{help}"))]
    NoCurve { name: String, help: String },
}

/// What the end of a file's name says.
enum Format {
    Svg,
    Png,
    Html,
}

impl Format {
    fn of(path: &Path) -> Result<Self, Failure> {
        match path.extension().and_then(|end| end.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("svg") => Ok(Self::Svg),
            Some("png") => Ok(Self::Png),
            Some("html") => Ok(Self::Html),
            _ => Err(request(PlotError::Format(path.to_owned()))),
        }
    }
}

/// Draws.
///
/// # Errors
/// See [`Failure`].
pub fn plot(arguments: &cli::Plot) -> Result<(), Failure> {
    match (&arguments.what, &arguments.curve, &arguments.out) {
        (Some(PlotWhat::Losses { out }), ..) => losses(out),
        (None, Some(curve), Some(out)) => curves(&arguments.runs, curve, out),
        _ => Err(Failure::Request(miette!("--curve and --out are needed"))),
    }
}

fn losses(out: &Path) -> Result<(), Failure> {
    let format = Format::of(out)?;
    let pictures = report::losses::pictures().map_err(|e| Failure::Failed(miette!("cannot evaluate a loss: {e}")))?;
    let title = "Preference losses";
    let lead = "Value and pull of each loss on a pair, computed by the code that trains.";
    let drawing = || {
        let titled =
            |(chart, _): &(Chart, String)| Chart { titled: true, size: (480.0, 290.0), ..chart.clone() }.draw();
        Drawing::grid(title, pictures.iter().map(titled).collect(), 2)
    };
    write(out, &format, drawing, || report::pictures(title, lead, &pictures))
}

fn curves(runs: &[PathBuf], metric: &str, out: &Path) -> Result<(), Failure> {
    let format = Format::of(out)?;
    // both kinds are drawn of every metric, each in its form
    let metric = metric.strip_prefix("eval_").unwrap_or(metric);
    let read = |path: &PathBuf| Ok(Run::read(&RunFolder::open(path).map_err(request)?, false));
    let runs = runs.iter().map(read).collect::<Result<Vec<_>, Failure>>()?;
    let names = report::names(&runs);
    let histories: Vec<(&str, &History)> =
        names.iter().map(String::as_str).zip(runs.iter().map(|run| &run.history)).collect();
    let chart = report::curve(&histories, metric, None).ok_or_else(|| no_curve(metric, &histories))?;
    let drawing = || chart.clone().alone().draw();
    write(out, &format, drawing, || report::pictures(metric, &names.join(" · "), &[(chart.clone(), String::new())]))
}

fn no_curve(name: &str, histories: &[(&str, &History)]) -> Failure {
    let mut known: Vec<String> = Vec::new();
    for metric in histories.iter().flat_map(|(_, history)| history.names()) {
        let metric = metric.strip_prefix("eval_").unwrap_or(metric);
        if !known.iter().any(|other| other == metric) {
            known.push(metric.to_owned());
        }
    }
    let help = match did_you_mean(name, known.iter().map(String::as_str)) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => "the run has no metrics yet".to_owned(),
        None => format!("there are {}", list(&known)),
    };
    request(PlotError::NoCurve { name: name.to_owned(), help })
}

fn write(
    out: &Path,
    format: &Format,
    drawing: impl FnOnce() -> Drawing,
    html: impl FnOnce() -> Result<String, minijinja::Error>,
) -> Result<(), Failure> {
    let bytes = match format {
        Format::Svg => drawing().svg(Theme::File).into_bytes(),
        Format::Png => png(&drawing()).map_err(failed)?,
        Format::Html => html().map_err(|e| failed(ReportError::from(e)))?.into_bytes(),
    };
    files::write(out, &bytes).map_err(failed)
}
