//! The command line.

mod eval;
mod plot;
mod report;
mod serve;
mod win_rate;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use eval::{Bound, Eval};
pub use plot::{Plot, PlotWhat};
pub use report::Report;
pub use serve::Serve;
pub use win_rate::{Gate, JudgeArguments, Stage, WinRate};

use crate::bytes::Bytes;
use crate::device::DeviceChoice;
use crate::export::check::Consumer;
use crate::quant::Quant;

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
    /// Write an adapter for other programs: PEFT and vLLM, llama.cpp and Ollama.
    #[command(after_help = EXPORT_HELP)]
    Export(Export),
    /// Add an adapter's update to its base: a Hugging Face folder or a GGUF file.
    #[command(after_help = MERGE_HELP)]
    Merge(Merge),
    /// Hold a merged or quantized model against base and adapter.
    #[command(after_help = COMPARE_HELP)]
    Compare(Compare),
    /// Measure what an adapter has changed: preferences, distance from the base, answers, other abilities.
    #[command(after_help = eval::HELP)]
    Eval(Eval),
    /// Answer prompts, with the adapter on, off, or both.
    #[command(after_help = GENERATE_HELP)]
    Generate(Generate),
    /// Talk to the policy and to the base.
    Chat(Chat),
    /// Answer other programs, in the manner of OpenAI's API.
    #[command(after_help = serve::HELP)]
    Serve(Serve),
    /// Is the policy better than the base, and how sure is that? A judge compares their answers.
    #[command(after_help = win_rate::HELP)]
    WinRate(Box<WinRate>),
    /// Write the report of a run again, or compare runs.
    #[command(after_help = report::HELP)]
    Report(Report),
    /// Draw a curve of runs, or the losses.
    #[command(after_help = plot::HELP)]
    Plot(Plot),
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

const EXPORT_HELP: &str = "\
A folder gets PEFT's files, the tokenizer with its chat template, and a model card; a file that ends in .gguf is an adapter
for llama.cpp. --check applies the rules of a program to what would be written; what it would refuse is not written.

Examples:
  dpo-lora export runs/my --out my-adapter --check peft --check vllm
  dpo-lora export runs/my --out my-adapter.gguf --check llama.cpp
  dpo-lora export runs/a runs/b --weights 0.5,0.5 --rank 16 --out both

Exit codes: 0 done, 1 it failed, 2 the request was wrong, 3 a program named by --check would not take it.";

const MERGE_HELP: &str = "\
The base is read as it was while training (a quantized one dequantized), a matrix at a time, and nothing appears under the
final name before it is whole. Then what was written is read back: how much of the update is left in each layer, and what
base, base + adapter and the merged model say about held-out pairs.

Examples:
  dpo-lora merge runs/my --out merged
  dpo-lora merge runs/my --out my-q4_k.gguf --type q4_k --fail-if-kl 0.01
  dpo-lora merge adapters/sft adapters/dpo --weights 1,0.5 --base ORG/NAME --out merged --data held-out.jsonl

Exit codes: 0 done, 1 it failed, 2 the request was wrong, 3 the model was written and is further from base + adapter than
--fail-if-kl.";

const COMPARE_HELP: &str = "\
Examples:
  dpo-lora compare runs/my my-q4_k_m.gguf
  dpo-lora compare runs/my merged --pairs 200 --fail-if-kl 0.01 --json

Exit codes: 0 done, 1 it failed, 2 the request was wrong, 3 it is further from base + adapter than --fail-if-kl.";

const GENERATE_HELP: &str = "\
Prompts are texts, or rows of .jsonl, .json or .parquet files: a text or messages in `prompt`, `instruction`, `question`,
`text` or `messages`, or preference rows, whose answers are left out. Each prompt has random numbers of its own, so that an
answer depends on nothing else that is answered.

Examples:
  dpo-lora generate runs/my --prompt 'Why is the sky blue?' --side both
  dpo-lora generate runs/my --prompts held-out.parquet --side both --json > answers.jsonl
  echo 'Once upon a time' | dpo-lora generate runs/my --plain --temperature 0.8 --top-p 0.95

Exit codes: 0 done, 1 it failed, 2 the request was wrong.";

/// How answers are chosen.
#[derive(Debug, Clone, Args)]
pub struct Decoding {
    /// The most tokens of an answer.
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// What logits are divided by; 0 takes the most probable token.
    #[arg(long, default_value_t = 0.0, value_name = "T", value_parser = from_zero)]
    pub temperature: f64,
    /// Only the fewest tokens that have this much of the probability.
    #[arg(long, default_value_t = 1.0, value_name = "P", value_parser = share)]
    pub top_p: f64,
    /// Only so many tokens; 0 is all.
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: u32,
    /// Only tokens at least so probable as this share of the most probable one.
    #[arg(long, default_value_t = 0.0, value_name = "P", value_parser = share)]
    pub min_p: f64,
    /// What logits of tokens that are there already are divided by.
    #[arg(long, default_value_t = 1.0, value_name = "X", value_parser = above_zero)]
    pub repetition_penalty: f64,
    /// A text that ends an answer.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Where random numbers begin.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Decoding {
    pub(crate) fn max_new_tokens(&self) -> usize {
        self.max_new_tokens as usize
    }
}

fn number(text: &str, what: &str, holds: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse().ok().filter(|&x: &f64| x.is_finite() && holds(x)).ok_or_else(|| format!("it is a number {what}"))
}

fn from_zero(text: &str) -> Result<f64, String> {
    number(text, "from 0 on", |x| x >= 0.0)
}

fn above_zero(text: &str) -> Result<f64, String> {
    number(text, "above 0", |x| x > 0.0)
}

fn share(text: &str) -> Result<f64, String> {
    number(text, "from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

/// Where the model computes.
#[derive(Debug, Clone, Copy, Args)]
pub struct Device {
    /// Where the model computes: auto (a GPU if this binary can use one), cpu, cuda:0 ...
    #[arg(long, default_value_t, value_name = "DEVICE")]
    pub device: DeviceChoice,
}

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// The base with the adapter.
    Policy,
    /// The base alone.
    Base,
    /// Both, the base first.
    Both,
}

/// `dpo-lora generate`
#[derive(Debug, Args)]
pub struct Generate {
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub trained: Trained,
    /// A prompt.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// Prompts of a file, or with `-` a line each of standard input.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Only so many of them.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Who answers.
    #[arg(long, value_enum, default_value_t = Side::Policy)]
    pub side: Side,
    /// Continue texts as they stand, without the chat template.
    #[arg(long)]
    pub plain: bool,
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub decoding: Decoding,
    /// Answers that are generated at once [default: what memory has room for, up to 16].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub batch: Option<u32>,
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub device: Device,
    /// A JSON object a prompt.
    #[arg(long)]
    pub json: bool,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// `dpo-lora chat`
#[derive(Debug, Args)]
pub struct Chat {
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub trained: Trained,
    /// What the conversation begins with.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub decoding: Decoding,
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub device: Device,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// Adapters and the base that they are on.
#[derive(Debug, Args)]
pub struct Trained {
    /// A run folder, one of its checkpoints, or an adapter folder in PEFT's layout; several are added up.
    #[arg(required = true, value_name = "RUN")]
    pub adapters: Vec<PathBuf>,
    /// What each of several adapters is multiplied by [default: 1].
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', allow_negative_numbers = true)]
    pub weights: Vec<f64>,
    /// The base, where no run says it or it is elsewhere now: a folder, a GGUF file, or ORG/NAME.
    #[arg(long, value_name = "MODEL")]
    pub base: Option<PathBuf>,
    /// How the base was kept while training, where no run says it: q8_0, q4_k, nf4 ...
    #[arg(long, value_parser = Quant::by_name)]
    pub quant: Option<Quant>,
}

impl Trained {
    /// The adapters as they were named.
    pub(crate) fn names(&self) -> String {
        self.adapters.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" + ")
    }
}

/// Held-out pairs to compare models on.
#[derive(Debug, Args)]
pub struct HeldOut {
    /// Held-out pairs [default: those of the run].
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// How many of the pairs are compared, spread over the file.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub pairs: u32,
    /// Exit with 3 if KL(base + adapter || written model) is above this, in nats a token.
    #[arg(long, value_name = "KL")]
    pub fail_if_kl: Option<f64>,
}

/// `dpo-lora export`
#[derive(Debug, Args)]
pub struct Export {
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub trained: Trained,
    /// A folder, or a file that ends in .gguf; without it, --check alone is done.
    #[arg(long, required_unless_present = "check")]
    pub out: Option<PathBuf>,
    /// Cut the update to this rank, by truncated SVD; what that loses is said.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    pub rank: Option<u32>,
    /// Write one rank and a scale of 1 for all modules, the same update, for readers of neither rsLoRA nor patterns.
    #[arg(long)]
    pub scale_into_b: bool,
    /// A program that has to take it.
    #[arg(long, value_enum)]
    pub check: Vec<Consumer>,
    /// Write an Ollama Modelfile too: into the folder, or beside the GGUF file.
    #[arg(long, requires = "out")]
    pub modelfile: bool,
    /// Replace what is there under that name.
    #[arg(long)]
    pub force: bool,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// `dpo-lora merge`
#[derive(Debug, Args)]
pub struct Merge {
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub trained: Trained,
    /// A folder, or a file that ends in .gguf.
    #[arg(long)]
    pub out: PathBuf,
    /// Element type: f32, f16 or bf16 for a folder [default: the base's]; for GGUF also q8_0, q6_k, q5_k, q4_k and the
    /// other block types [default: f16].
    #[arg(long = "type", value_name = "TYPE")]
    pub element_type: Option<String>,
    /// The most bytes of one safetensors file.
    #[arg(long, default_value = "5GB", value_name = "SIZE")]
    pub shard_size: Bytes,
    /// Write an Ollama Modelfile too: into the folder, or beside the GGUF file.
    #[arg(long)]
    pub modelfile: bool,
    /// Replace what is there under that name.
    #[arg(long)]
    pub force: bool,
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub held_out: HeldOut,
    /// Do not read back and compare what was written.
    #[arg(long, conflicts_with = "fail_if_kl")]
    pub no_accounts: bool,
    /// Print what was written and the accounts to stdout as JSON.
    #[arg(long)]
    pub json: bool,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// `dpo-lora compare`
#[derive(Debug, Args)]
pub struct Compare {
    /// A run folder, one of its checkpoints, or an adapter folder in PEFT's layout.
    #[arg(value_name = "RUN")]
    pub adapter: PathBuf,
    /// A merged model: a folder or a GGUF file, whatever wrote it.
    #[arg(value_name = "MERGED")]
    pub merged: PathBuf,
    /// The base, where no run says it or it is elsewhere now: a folder, a GGUF file, or ORG/NAME.
    #[arg(long, value_name = "MODEL")]
    pub base: Option<PathBuf>,
    /// How the base was kept while training, where no run says it: q8_0, q4_k, nf4 ...
    #[arg(long, value_parser = Quant::by_name)]
    pub quant: Option<Quant>,
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub held_out: HeldOut,
    /// Print the accounts to stdout as JSON.
    #[arg(long)]
    pub json: bool,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}

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
    /// Where the model computes, instead of `[run] device`: auto, cpu, cuda:0 ...
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
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
    /// Where the model will compute, instead of `[run] device`: auto, cpu, cuda:0 ...
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// Print the plan as JSON.
    #[arg(long)]
    pub json: bool,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// What `--set` gives, and `--device` as one more of them.
fn overrides(set: &[String], device: Option<DeviceChoice>) -> Vec<String> {
    set.iter().cloned().chain(device.map(|device| format!("run.device=\"{device}\""))).collect()
}

impl Run {
    pub(crate) fn overrides(&self) -> Vec<String> {
        overrides(&self.overrides, self.device)
    }
}

impl Plan {
    pub(crate) fn overrides(&self) -> Vec<String> {
        overrides(&self.overrides, self.device)
    }
}
