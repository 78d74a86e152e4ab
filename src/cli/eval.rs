//! `dpo-lora eval`

use std::path::PathBuf;

use clap::Args;

use super::Trained;

/// What is shown below the options.
pub(super) const HELP: &str = "\
Needs no judge: what base and policy say about held-out pairs, how far the policy is from the base on its own answers, how
long and repetitive those are, and with --choices whether it got worse at anything else. A value beside what is usual comes
with a verdict and a reason. A run gets eval.json; anything else only what --out names.

Examples:
  dpo-lora eval runs/my
  dpo-lora eval runs/my --choices arc.jsonl --choices mmlu.parquet --fail-under accuracy=0.6 --fail-over kl=15
  dpo-lora eval adapters/dpo --base ORG/NAME --data held-out.jsonl --kl-prompts 0 --json

Names for --fail-under and --fail-over: accuracy, margin, loss, prefers-chosen, chosen-change (nats a token), kl (nats an
answer), kl-per-token, length (times the base's), truncated, repeated, choices and choices-change (the least of all files),
and every metric of the JSON object `policy`.

Exit codes: 0 done, 1 it failed, 2 the request was wrong, 3 a value is beyond what --fail-under or --fail-over allow.";

/// `dpo-lora eval`
#[derive(Debug, Args)]
pub struct Eval {
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub trained: Trained,
    /// Held-out pairs [default: those of the run].
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Multiple-choice questions, .jsonl, .json or .parquet: `question`, `choices`, `answer`, or as HellaSwag, ARC and MMLU
    /// have them.
    #[arg(long, value_name = "FILE")]
    pub choices: Vec<PathBuf>,
    /// Put questions as the user's message and choices as the assistant's answer, by the chat template.
    #[arg(long, requires = "choices")]
    pub choices_chat: bool,
    /// Prompts whose answers are sampled, for the KL from the base, lengths and repetition; 0 leaves that out.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub kl_prompts: u32,
    /// The most tokens of such an answer.
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// Only so many pairs, and questions of each file, spread over it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Where random numbers begin: of sampled answers and of intervals.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Answers that are generated at once [default: what memory has room for, up to 16].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub batch: Option<u32>,
    /// Exit with 3 if a value is below this.
    #[arg(long, value_name = "NAME=VALUE", value_parser = Bound::parse)]
    pub fail_under: Vec<Bound>,
    /// Exit with 3 if a value is above this.
    #[arg(long, value_name = "NAME=VALUE", value_parser = Bound::parse)]
    pub fail_over: Vec<Bound>,
    /// Where the results are written [default: RUN/eval.json for a run].
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Print the results to stdout as JSON.
    #[arg(long)]
    pub json: bool,
    /// No progress, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// What a value is held to.
#[derive(Debug, Clone, PartialEq)]
pub struct Bound {
    /// Of the value.
    pub name: String,
    /// The least, or the most.
    pub value: f64,
}

impl Bound {
    fn parse(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("it is NAME=VALUE, such as accuracy=0.6")?;
        let value = value.trim().parse().ok().filter(|x: &f64| x.is_finite());
        let value = value.ok_or_else(|| format!("what follows `{name}=` is no number"))?;
        Ok(Self { name: name.trim().to_owned(), value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_have_a_name_and_a_number() {
        assert_eq!(Bound::parse("accuracy=0.6"), Ok(Bound { name: "accuracy".into(), value: 0.6 }));
        assert_eq!(Bound::parse("choices-change = -0.02").map(|bound| bound.value), Ok(-0.02));
        assert!(
            Bound::parse("accuracy").is_err()
                && Bound::parse("accuracy=").is_err()
                && Bound::parse("kl=nan").is_err()
        );
    }
}
