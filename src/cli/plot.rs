//! `dpo-lora plot`

use std::path::PathBuf;

use clap::{Args, Subcommand};

pub(super) const HELP: &str = "\
A curve is a metric of metrics.jsonl; training is a line and held-out pairs are circles. The end of the file's name says what
is written: .svg, .png or .html.

Examples:
  dpo-lora plot runs/my --curve rewards/margins --out margins.svg
  dpo-lora plot runs/a runs/b --curve loss --out losses.png
  dpo-lora plot losses --out losses.html

Exit codes: 0 done, 1 it could not be written, 2 the request was wrong.";

/// `dpo-lora plot`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Plot {
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(subcommand)]
    pub what: Option<PlotWhat>,
    /// A run folder; several are drawn over each other.
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// A metric: loss, rewards/margins, grad_norm ...
    #[arg(long, required = true, value_name = "NAME")]
    pub curve: Option<String>,
    /// The file: .svg, .png or .html.
    #[arg(long, required = true, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// What is drawn that is of no run.
#[derive(Debug, Subcommand)]
pub enum PlotWhat {
    /// The losses and their gradients, and what they come from: the pictures of the tutorial.
    Losses {
        /// The file: .svg, .png or .html.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}
