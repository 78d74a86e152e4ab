//! What the binary does. Each command joins stages and reads like its user story; nothing else joins them.

mod accounts;
mod answering;
pub mod chat;
pub mod compare;
pub mod eval;
pub mod export;
pub mod generate;
pub mod merge;
pub mod plan;
pub mod plot;
mod prepare;
pub mod report;
pub mod run;
pub mod serve;
mod trained;
pub mod win_rate;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

use miette::{Diagnostic, Report};

/// Why a command did not end well, by exit code.
#[derive(Debug)]
pub enum Failure {
    /// The run failed: 1.
    Failed(Report),
    /// The request was wrong: 2. Nothing was begun and nothing written.
    Request(Report),
    /// What was asked to hold does not, and the result says so: 3.
    Gate,
    /// A limit on calls or cost was reached, what there was is saved, and the same command goes on: 4.
    Unfinished,
    /// Somebody asked to stop, and what there was is saved: 130 or 143.
    Interrupted(u8),
}

impl Failure {
    /// Exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Failed(_) => ExitCode::from(1),
            Self::Request(_) => ExitCode::from(2),
            Self::Gate => ExitCode::from(3),
            Self::Unfinished => ExitCode::from(4),
            Self::Interrupted(code) => ExitCode::from(*code),
        }
    }
}

/// Writes a result to stdout.
fn print_json(value: &serde_json::Value) -> Result<(), Failure> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{value:#}").map_err(of_stdout)
}

/// Of a result that could not be written to stdout.
fn of_stdout(error: std::io::Error) -> Failure {
    Failure::Failed(miette::miette!("cannot write to stdout: {error}"))
}

/// For errors that say that the request was wrong.
fn request<E: Diagnostic + Send + Sync + 'static>(error: E) -> Failure {
    Failure::Request(Report::new(error))
}

/// For errors of a run that was rightly asked for.
fn failed<E: Diagnostic + Send + Sync + 'static>(error: E) -> Failure {
    Failure::Failed(Report::new(error))
}

/// `$DPO_LORA_CACHE/KIND`, else below `$XDG_CACHE_HOME`, else below `~/.cache`: what can be computed again.
fn user_cache(kind: &str) -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = set("DPO_LORA_CACHE").or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("dpo-lora")));
    let root = root.or_else(|| env::home_dir().map(|home| home.join(".cache/dpo-lora")))?;
    env::current_dir().ok().map(|here| here.join(root).join(kind))
}
