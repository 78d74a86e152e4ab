//! What a run folder says, read for its report.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::history::History;
use crate::files::{self, WriteError};
use crate::recipe::{self, Recipe};
use crate::run_folder::RunFolder;
use crate::train::PairMargin;

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has ended well.
    Finished,
    /// It is at work, as the one who asks knows.
    Running,
    /// It has not ended, and whether it is at work is not known.
    Unfinished,
}

/// A run, as its folder tells.
#[derive(Debug)]
pub struct Run {
    /// The folder's own name.
    pub name: String,
    /// How far it is.
    pub state: State,
    /// Metrics over updates.
    pub history: History,
    /// The recipe, if this version understands it.
    pub recipe: Option<Recipe>,
    /// The recipe with every value and where it came from.
    pub recipe_text: String,
    /// `summary.json`
    pub summary: Value,
    /// `samples.jsonl`
    pub samples: Vec<Sample>,
    /// `margins.json`
    pub margins: Margins,
    /// `win-rate/*/win_rate.json`
    pub win_rates: Vec<WinRate>,
    /// `eval.json`
    pub eval: Option<EvalFile>,
    /// Files that are there and could not be read.
    pub unreadable: Vec<String>,
}

/// Answers to one held-out prompt: a line of `samples.jsonl`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sample {
    /// The prompt.
    pub prompt: String,
    /// The base's answer.
    pub base: String,
    /// The policy's.
    pub policy: String,
    /// The data's, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<String>,
    /// The data's, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
}

/// `margins.json`: of every held-out pair, how far the chosen answer is above the rejected one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Margins {
    /// Version of this form.
    pub schema: u32,
    /// The update after which `after` was measured.
    pub step: u64,
    /// `rewards/margins`: of implicit rewards; empty for losses without rewards.
    pub rewards: BeforeAfter,
    /// `logps/chosen − logps/rejected`, in nats: above zero where the chosen answer is the likelier one.
    pub logps: BeforeAfter,
}

/// Numbers of the pairs, in the order of the rows; null where a row is no pair.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BeforeAfter {
    /// Before the first update.
    pub before: Vec<Option<f32>>,
    /// At the last evaluation.
    pub after: Vec<Option<f32>>,
}

impl Margins {
    /// Those of a run that goes on; empty where there are none.
    #[must_use]
    pub fn read(run: &RunFolder) -> Self {
        read_json(run, &run.margins(), &mut Vec::new()).unwrap_or_default()
    }

    /// Takes what was measured after update `step`. Single precision is more than a plot shows.
    pub fn put(&mut self, step: u64, margins: &[Option<PairMargin>]) {
        let column = |of: &dyn Fn(&PairMargin) -> Option<f64>| -> Vec<Option<f32>> {
            let column: Vec<_> =
                margins.iter().map(|margin| margin.as_ref().and_then(of).map(|value| value as f32)).collect();
            if column.iter().all(Option::is_none) { Vec::new() } else { column }
        };
        let (rewards, logps) = (column(&|margin| margin.reward), column(&|margin| Some(margin.logp)));
        (self.schema, self.step) = (1, step);
        match step {
            0 => (self.rewards.before, self.logps.before) = (rewards, logps),
            _ => (self.rewards.after, self.logps.after) = (rewards, logps),
        }
    }

    /// Writes `margins.json`.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, run: &RunFolder) -> Result<(), WriteError> {
        let text = serde_json::to_string(self).unwrap_or_default() + "\n";
        files::write(&run.margins(), text.as_bytes())
    }
}

/// A win rate, as `dpo-lora win-rate` writes it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WinRate {
    /// The name of its folder.
    pub folder: String,
    /// It in a line.
    pub headline: String,
    /// Whose answers.
    pub policy: String,
    /// Against whose.
    pub against: String,
    /// Who compared.
    pub judge: Judge,
    /// How many prompts.
    pub prompts: u64,
    /// Of them won.
    pub wins: u64,
    /// Of them equal.
    pub ties: u64,
    /// Of them lost.
    pub losses: u64,
    /// Whose two answers are the same text.
    pub identical: u64,
    /// Without a verdict.
    pub invalid: u64,
    /// The share that was won, ties counted half.
    pub win_rate: Estimate,
    /// The same at equal lengths.
    pub length_controlled: Option<Estimate>,
    /// How the judge answers when the two change places.
    pub orders: Option<Orders>,
    /// Of the answers.
    pub lengths: Lengths,
    /// By category.
    pub categories: Vec<Category>,
    /// What the judge said about its own reliability, and the like.
    pub warnings: Vec<String>,
    /// Every prompt.
    pub samples: Vec<Judged>,
}

/// Who compared.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Judge {
    /// `endpoint` or `readability`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// What it measures.
    pub measures: String,
}

/// A share with its uncertainty.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Estimate {
    /// From 0 to 1; NaN where nothing has a verdict, which the file has as null.
    #[serde(deserialize_with = "null_is_nan")]
    pub estimate: f64,
    /// Where it is with 95 % confidence.
    #[serde(deserialize_with = "nulls_are_none")]
    pub interval: Option<[f64; 2]>,
}

fn null_is_nan<'d, D: Deserializer<'d>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

fn nulls_are_none<'d, D: Deserializer<'d>>(from: D) -> Result<Option<[f64; 2]>, D::Error> {
    let ends: Option<[Option<f64>; 2]> = Option::deserialize(from)?;
    Ok(ends.and_then(|[low, high]| Some([low?, high?])))
}

impl WinRate {
    /// Whether the policy is the run as it ended, alone: what a checkpoint wins, or the run's adapter with another one,
    /// says nothing about it.
    #[must_use]
    pub fn is_of_run(&self) -> bool {
        let of_checkpoint = self.folder.starts_with("step-") && self.folder.contains("-vs-");
        !of_checkpoint && !self.policy.starts_with("step-") && !self.policy.contains(" + ")
    }

    /// Whether it says how the policy is against the base.
    #[must_use]
    pub fn is_against_base(&self) -> bool {
        self.against.is_empty() || self.against == "base"
    }

    /// Whether at least one prompt has a verdict.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.win_rate.estimate.is_finite()
    }
}

/// Verdicts of one order against those of the other.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Orders {
    /// Win, loss and tie of the policy: a row for order 1, a column for order 2.
    pub table: Vec<Vec<f64>>,
    /// Share of prompts with one verdict in both.
    pub agreement: Option<f64>,
    /// Cohen's.
    pub kappa: Option<f64>,
    /// Share of prompts whose winner changes with the order.
    pub flip_rate: Option<f64>,
    /// Share of verdicts for whichever stood first.
    pub first_slot_share: Option<f64>,
}

/// Of the answers, on average.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Lengths {
    /// Characters.
    pub policy_chars: Option<f64>,
    /// Characters.
    pub against_chars: Option<f64>,
    /// Tokens.
    pub policy_tokens: Option<f64>,
    /// Tokens.
    pub against_tokens: Option<f64>,
    /// Share that was cut off.
    pub policy_truncated: Option<f64>,
    /// Share that was cut off.
    pub against_truncated: Option<f64>,
}

/// A category of prompts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Category {
    /// Its name.
    pub category: String,
    /// How many prompts.
    pub prompts: u64,
    /// Their win rate.
    #[serde(deserialize_with = "null_is_nan")]
    pub estimate: f64,
    /// Its standard error.
    pub standard_error: Option<f64>,
}

/// A prompt with both answers and what was said of them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Judged {
    /// The prompt.
    pub prompt: String,
    /// The policy's answer.
    pub policy: String,
    /// The other one.
    pub against: String,
    /// 1 for the policy, 0 for the other; none without a verdict.
    pub score: Option<f64>,
    /// Its category.
    pub category: Option<String>,
    /// One an order.
    pub verdicts: Vec<Verdict>,
}

/// What was said of one order.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Verdict {
    /// 1, or 2 where the two changed places.
    pub order: u64,
    /// In the judge's form.
    pub verdict: String,
    /// Its reason.
    pub reason: Option<String>,
}

/// `eval.json`, as `dpo-lora eval` writes it: what the report shows of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvalFile {
    /// How many pairs.
    pub pairs: u64,
    /// Metrics of the base.
    pub base: serde_json::Map<String, Value>,
    /// Metrics of the policy.
    pub policy: serde_json::Map<String, Value>,
    /// Divergence on the policy's own answers.
    pub kl: Option<Divergence>,
    /// Multiple-choice files.
    pub choices: Vec<Choices>,
    /// What it found.
    pub checks: Vec<EvalCheck>,
}

/// KL(policy ‖ base) on the policy's own answers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Divergence {
    /// In nats.
    pub per_token: Option<f64>,
    /// In nats, of whole answers.
    pub total: Option<f64>,
}

/// A file of multiple-choice questions.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Choices {
    /// Its name.
    pub file: String,
    /// How many questions.
    pub questions: u64,
    /// Share that the base answers rightly.
    pub base: f64,
    /// Share that the policy does.
    pub policy: f64,
    /// Of the two, paired.
    pub difference: f64,
    /// Of the difference.
    pub standard_error: Option<f64>,
    /// Chance of a difference so large if there were none.
    pub mcnemar: Option<f64>,
}

/// Something that `dpo-lora eval` checked.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvalCheck {
    /// What.
    pub name: String,
    /// Its value.
    pub value: Option<f64>,
    /// What it is in a healthy run.
    pub healthy: String,
    /// `good`, `watch` or `bad`.
    pub verdict: String,
    /// Why.
    pub why: String,
}

impl Run {
    /// Reads what there is. Only the folder has to be a run's; what is missing is not shown.
    #[must_use]
    pub fn read(folder: &RunFolder, running: bool) -> Self {
        let path = std::path::absolute(folder.path()).unwrap_or_else(|_| folder.path().to_owned());
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut unreadable = Vec::new();
        let recipe_text = fs::read_to_string(folder.resolved_recipe()).unwrap_or_default();
        let summary: Value = read_json(folder, &folder.summary(), &mut unreadable).unwrap_or_default();
        let state = match (running, summary.is_object()) {
            (true, _) => State::Running,
            (false, true) => State::Finished,
            (false, false) => State::Unfinished,
        };
        let samples = fs::read_to_string(folder.samples()).unwrap_or_default();
        Self {
            name,
            state,
            history: History::read(&folder.metrics()),
            recipe: recipe::load(&folder.resolved_recipe(), &[], folder.path()).ok().map(|parsed| parsed.recipe),
            recipe_text,
            summary,
            samples: samples.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
            margins: read_json(folder, &folder.margins(), &mut unreadable).unwrap_or_default(),
            win_rates: win_rates(folder, &mut unreadable),
            eval: read_json(folder, &folder.eval(), &mut unreadable),
            unreadable,
        }
    }

    /// What the run itself wins, those against the base first.
    pub fn own_win_rates(&self) -> impl Iterator<Item = &WinRate> {
        let of = |base: bool| {
            self.win_rates.iter().filter(move |found| found.is_of_run() && found.is_against_base() == base)
        };
        of(true).chain(of(false))
    }

    /// How many updates it will have.
    #[must_use]
    pub fn total_steps(&self) -> Option<u64> {
        let train = &self.recipe.as_ref()?.train;
        let epochs = train.epochs.map_or(1.0, |epochs| epochs.get());
        self.history.total_steps(train.steps.map(|steps| steps.get()), epochs, train.batch_size.get())
    }
}

/// Of every judge, in the order of the folders' names.
fn win_rates(run: &RunFolder, unreadable: &mut Vec<String>) -> Vec<WinRate> {
    let entries = fs::read_dir(run.win_rates()).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    let mut found = Vec::new();
    for folder in names {
        let file = run.win_rates().join(&folder).join("win_rate.json");
        if let Some(win_rate) = read_json(run, &file, unreadable) {
            found.push(WinRate { folder, ..win_rate });
        }
    }
    found
}

/// A file of the run, if it is there and can be read.
fn read_json<T: for<'d> Deserialize<'d>>(run: &RunFolder, file: &Path, unreadable: &mut Vec<String>) -> Option<T> {
    let text = fs::read_to_string(file).ok()?;
    match serde_json::from_str(&text) {
        Ok(value) => Some(value),
        Err(error) => {
            // the page may go anywhere, and does not tell where the run was
            let name = file.strip_prefix(run.path()).unwrap_or(file);
            unreadable.push(format!("{}: {error}", name.display()));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_are_written_and_read_again() {
        let place = tempfile::tempdir().expect("a folder");
        let run = RunFolder::create(&place.path().join("run")).expect("made");
        let pair = |reward: f64, logp: f64| Some(PairMargin { reward: Some(reward), logp });
        let mut margins = Margins::read(&run);
        assert_eq!(margins, Margins::default());
        margins.put(0, &[pair(0.0, -1.5), None]);
        margins.put(12, &[pair(0.1, 2.0), None]);
        margins.write(&run).expect("written");
        assert_eq!(Margins::read(&run), margins);
        assert_eq!(margins.logps.before, [Some(-1.5), None]);
        assert_eq!(margins.rewards.after, [Some(0.1), None]);
        margins.put(24, &[Some(PairMargin { reward: None, logp: 1.0 })]);
        assert!(margins.rewards.after.is_empty(), "a loss without rewards has none");
    }

    #[test]
    fn a_win_rate_without_a_verdict_is_read() {
        let text = "{\"win_rate\": {\"estimate\": null, \"interval\": [null, null]}, \"prompts\": 5, \"invalid\": 5}";
        let found: WinRate = serde_json::from_str(text).expect("read");
        assert!(!found.is_known() && found.win_rate.interval.is_none() && found.invalid == 5);
        let text = "{\"win_rate\": {\"estimate\": 0.75, \"interval\": [0.5, 1.0]}}";
        let found: WinRate = serde_json::from_str(text).expect("read");
        assert_eq!((found.win_rate.estimate, found.win_rate.interval), (0.75, Some([0.5, 1.0])));
    }

    #[test]
    fn a_file_that_is_broken_is_named_and_the_rest_is_read() {
        let place = tempfile::tempdir().expect("a folder");
        let folder = RunFolder::create(&place.path().join("run")).expect("made");
        let put = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        };
        put("win-rate/base-by-b/win_rate.json", "{\"prompts\": 3, \"wins\": 2, \"new_field\": {}}");
        put("win-rate/base-by-a/win_rate.json", "{\"prompts\": \"three\"}");
        put("eval.json", "[");
        let run = Run::read(&folder, false);
        assert_eq!(run.state, State::Unfinished);
        let found: Vec<_> = run.win_rates.iter().map(|found| (found.folder.as_str(), found.wins)).collect();
        assert_eq!(found, [("base-by-b", 2)]);
        assert_eq!(run.unreadable.len(), 2, "{:?}", run.unreadable);
        assert!(run.unreadable.iter().any(|text| text.starts_with("win-rate/base-by-a/win_rate.json: invalid type")));
    }
}
