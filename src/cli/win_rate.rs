//! `dpo-lora win-rate`

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Decoding, Trained};
use crate::judge::Price;
use crate::judge::verdict::Form;
use crate::model::generate::Sampling;

pub(super) const HELP: &str = "\
Both sides answer the same prompts, a judge is asked which answer is better, in both orders, and the share of prompts that the
policy wins comes with its interval. Answers are kept in the user's cache as they come, and verdicts in the folder --out, where
the answers that were compared stand too: the same command goes on where it was stopped, and asks nothing twice.

A judge is any endpoint that speaks OpenAI's chat completions. Its key is read from the environment variable that
--judge-key-env names, and written nowhere. `readability` needs no network: it measures which answer is easier to read by
Flesch Reading Ease, and nothing else.

Examples:
  dpo-lora win-rate runs/my --judge readability
  dpo-lora win-rate runs/my --judge-model gpt-4.1-mini --price 0.40,1.60 --max-cost 2
  dpo-lora win-rate runs/my --judge-url http://localhost:8000/v1 --judge-model qwen3-32b --judge-prompt mt-bench --limit 200
  dpo-lora win-rate runs/my --against runs/other --judge judge.toml --fail-under 0.5:ci
  dpo-lora win-rate runs/my --judge judge.toml --stage report --json

Exit codes: 0 done, 1 it failed or too many verdicts are missing, 2 the request was wrong, 3 the win rate is below
--fail-under, 4 --max-calls or --max-cost was reached (the same command goes on), 130/143 interrupted after saving.";

/// A part of the work, whose results are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// Answers of both sides.
    Generate,
    /// Verdicts on the answers that are there.
    Judge,
    /// What the verdicts that are there come to; no model and no network.
    Report,
}

/// What the win rate has to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    /// At least.
    pub least: f64,
    /// The lower end of the interval, not the estimate.
    pub of_interval: bool,
}

impl std::str::FromStr for Gate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (number, of_interval) = match text.strip_suffix(":ci") {
            Some(number) => (number, true),
            None => (text, false),
        };
        let least = number.parse().ok().filter(|x| (0.0..=1.0).contains(x));
        let least = least.ok_or("it is a number from 0 to 1, with `:ci` where the interval has to be above it")?;
        Ok(Self { least, of_interval })
    }
}

/// The most tokens of an answer where nothing else is said.
const MAX_NEW_TOKENS: &str = "1024";

/// `dpo-lora win-rate`
#[derive(Debug, Args)]
#[command(mut_arg("max_new_tokens", |argument| argument.default_value(MAX_NEW_TOKENS)))]
pub struct WinRate {
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub trained: Trained,
    /// What the policy is compared with: `base` (adapters off), another run or adapter on the same base, a file of answers,
    /// or the address of an endpoint.
    #[arg(long, default_value = "base", value_name = "BASE|RUN|FILE|URL")]
    pub against: String,
    /// The model of an endpoint to compare with.
    #[arg(long, value_name = "NAME")]
    pub against_model: Option<String>,
    /// The environment variable with that endpoint's key.
    #[arg(long, value_name = "VARIABLE")]
    pub against_key_env: Option<String>,

    /// Prompts of a file [default: the held-out rows of the run].
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    pub prompts: Option<PathBuf>,
    /// So many of them, drawn by --seed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Prompts")]
    pub limit: Option<u32>,
    /// Texts are continued as they stand, without the chat template.
    #[arg(long, help_heading = "Prompts")]
    pub plain: bool,
    /// Take prompts that were trained on too.
    #[arg(long, help_heading = "Prompts")]
    pub allow_leak: bool,

    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub judge: JudgeArguments,

    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten, next_help_heading = "Answers")]
    pub decoding: Decoding,
    /// Answers that are generated at once [default: what memory has room for, up to 16].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256), help_heading = "Answers")]
    pub batch: Option<u32>,
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub device: super::Device,

    /// Do only this part.
    #[arg(long, value_enum, help_heading = "Results")]
    pub stage: Option<Stage>,
    /// Where verdicts, results and the answers that were compared are kept [default: RUN/win-rate/AGAINST-by-JUDGE].
    #[arg(long, value_name = "DIR", help_heading = "Results")]
    pub out: Option<PathBuf>,
    /// The share of prompts without a verdict that is too much.
    #[arg(long, default_value_t = 0.05, value_name = "SHARE", value_parser = super::share, help_heading = "Results")]
    pub max_invalid: f64,
    /// Count prompts with a verdict in one order only.
    #[arg(long, help_heading = "Results")]
    pub allow_single_order: bool,
    /// Exit with 3 if the win rate, or with `:ci` the lower end of its interval, is below this.
    #[arg(long, value_name = "RATE[:ci]", help_heading = "Results")]
    pub fail_under: Option<Gate>,
    /// Print the results to stdout as JSON; without it, they are a line.
    #[arg(long, help_heading = "Results")]
    pub json: bool,
    /// No progress, only errors.
    #[arg(short, long, help_heading = "Results")]
    pub quiet: bool,
}

impl WinRate {
    /// An argument that says what is answered, or how, where it says anything else than what holds without it.
    pub(crate) fn about_answers(&self) -> Option<&'static str> {
        let (plain, decoding) = (Sampling::default(), &self.decoding);
        let given = [
            ("--prompts", self.prompts.is_some()),
            ("--limit", self.limit.is_some()),
            ("--plain", self.plain),
            ("--allow-leak", self.allow_leak),
            ("--max-new-tokens", decoding.max_new_tokens.to_string() != MAX_NEW_TOKENS),
            ("--temperature", decoding.temperature != plain.temperature),
            ("--top-p", decoding.top_p != plain.top_p),
            ("--top-k", decoding.top_k as usize != plain.top_k),
            ("--min-p", decoding.min_p != plain.min_p),
            ("--repetition-penalty", decoding.repetition_penalty != plain.repetition_penalty),
            ("--stop", !decoding.stop.is_empty()),
            ("--seed", decoding.seed != 0),
            ("--batch", self.batch.is_some()),
        ];
        given.into_iter().find_map(|(name, given)| given.then_some(name))
    }
}

/// Who judges.
#[derive(Debug, Args)]
#[command(next_help_heading = "Judge")]
pub struct JudgeArguments {
    /// `readability`, or a TOML file that describes an endpoint; what is given beside it counts more.
    #[arg(long, value_name = "NAME|FILE")]
    pub judge: Option<String>,
    /// The endpoint, up to where `/chat/completions` begins [default: OpenAI's].
    #[arg(long, value_name = "URL")]
    pub judge_url: Option<String>,
    /// The model that judges.
    #[arg(long, value_name = "NAME")]
    pub judge_model: Option<String>,
    /// The environment variable with the key [default: OPENAI_API_KEY for api.openai.com, none for others].
    #[arg(long, value_name = "VARIABLE")]
    pub judge_key_env: Option<String>,
    /// `helpful`, `tldr`, `mt-bench`, `mt-bench-ref`, `alpaca-clf`, `arena`, or a MiniJinja file [default: helpful].
    #[arg(long, value_name = "NAME|FILE")]
    pub judge_prompt: Option<String>,
    /// How the judge says what it prefers [default: what suits the prompt].
    #[arg(long, value_enum)]
    pub verdict: Option<Form>,
    /// Price of a million tokens read and written, in dollars.
    #[arg(long, value_name = "INPUT,OUTPUT")]
    pub price: Option<Price>,
    /// Calls at the same time [default: 8].
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub concurrency: Option<u32>,
    /// The most calls a minute.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rpm: Option<u32>,
    /// The most tokens a minute.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tpm: Option<u32>,
    /// Stop after so many calls.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_calls: Option<u64>,
    /// Stop before more than this is spent, in dollars.
    #[arg(long, value_name = "DOLLARS", value_parser = super::from_zero)]
    pub max_cost: Option<f64>,
    /// Ask again what could not be understood before.
    #[arg(long)]
    pub refresh: bool,
}
