//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Preference-tune a language model with LoRA adapters, from one recipe.
#[derive(Debug, Parser)]
#[command(name = "dpo-lora", version, arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train adapters as a recipe says.
    #[command(after_help = RUN_HELP)]
    Run(Run),
    /// Show what a recipe will do and take, without doing it: memory, batches, work, time.
    #[command(after_help = PLAN_HELP)]
    Plan(Plan),
}

const RUN_HELP: &str = "\
Examples:
  dpo-lora run recipes/quickstart.toml
  dpo-lora run my.toml --set train.learning_rate=2e-5 --set 'adapter.targets=[\"q_proj\", \"v_proj\"]'
  dpo-lora run --resume runs/my-20260102-150405

Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130/143 interrupted after saving (SIGINT/SIGTERM).";

const PLAN_HELP: &str = "\
Reads the recipe, the model's configuration and tokenizer and the data, but no weights, and measures this machine's matrix
products for half a second.

Examples:
  dpo-lora plan recipes/quickstart.toml
  dpo-lora plan my.toml --set train.memory=4GiB --json

Exit codes: 0 the run fits, 1 the plan could not be made, 2 the request was wrong, 3 the run does not fit its memory.";

/// `dpo-lora run`
#[derive(Debug, Args)]
pub struct Run {
    /// The recipe, a TOML file; not needed with `--resume RUN`.
    pub recipe: Option<PathBuf>,
    /// Change a value of the recipe; VALUE is TOML, paths belong to the working directory.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub overrides: Vec<String>,
    /// The run folder [default: runs/RECIPE-TIME].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on from the newest checkpoint of a run folder (of --out's, if none is named).
    #[arg(long, value_name = "RUN", num_args = 0..=1)]
    pub resume: Option<Option<PathBuf>>,
    /// Print the summary to stdout as JSON.
    #[arg(long)]
    pub json: bool,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// `dpo-lora plan`
#[derive(Debug, Args)]
pub struct Plan {
    /// The recipe, a TOML file.
    pub recipe: PathBuf,
    /// Change a value of the recipe; VALUE is TOML, paths belong to the working directory.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Print the plan as JSON.
    #[arg(long)]
    pub json: bool,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}
