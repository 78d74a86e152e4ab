//! The results of an evaluation, for people and for machines.

use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::file_name;
use crate::data::{Drops, Facts};
use crate::eval::{AnswerSide, Answers, Check, ChoiceResult, Distance, Histogram, Pairs, health};
use crate::loss::Loss;
use crate::progress::thousands;
use crate::report::ticks::trimmed;
use crate::statistics::Estimate;

/// Bins of the histogram, about.
const BINS: usize = 12;
/// Characters of its longest bar.
const BAR: usize = 24;

/// Everything that was found.
pub(super) struct Report {
    /// As it was named.
    pub(super) name: String,
    pub(super) base: String,
    /// The adapter in a line.
    pub(super) adapter: String,
    pub(super) loss: Loss,
    /// Whether the loss is that of a run.
    pub(super) run_loss: bool,
    /// Whether the reference is not the base alone.
    pub(super) reference_adapter: bool,
    pub(super) seed: u64,
    pub(super) data: Option<Data>,
    pub(super) pairs: Option<Pairs>,
    pub(super) sampling: Option<Sampling>,
    pub(super) choices: Vec<(PathBuf, ChoiceResult)>,
}

/// Held-out examples.
pub(super) struct Data {
    pub(super) files: Vec<String>,
    /// That were used.
    pub(super) examples: usize,
    /// What was read.
    pub(super) facts: Facts,
    /// What was left out.
    pub(super) drops: Drops,
}

/// Answers that were sampled.
pub(super) struct Sampling {
    pub(super) prompts: usize,
    pub(super) max_new_tokens: u32,
    pub(super) answers: Answers,
    pub(super) distance: Distance,
    pub(super) chosen: Option<Chosen>,
}

/// The chosen answers to the same prompts.
pub(super) struct Chosen {
    /// Mean, without the token that ends an answer.
    pub(super) tokens: f64,
}

/// What a value can only be had with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    /// Held-out rows, and a loss that says it of them.
    Rows(Rows, Of),
    Answers,
    Choices,
}

/// Held-out rows that a value is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    Any,
    Chosen,
    Rejected,
    /// Chosen and rejected answers, be it in different rows.
    Sides,
    /// Both answers to a prompt.
    Pairs,
}

/// Losses that have a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Any,
    /// Those with rewards.
    Rewards,
    Orpo,
}

const PAIRS: Needs = Needs::Rows(Rows::Pairs, Of::Any);

/// Names of values that may be held to a bound, besides the metrics'.
const NAMES: [(&str, Needs); 12] = [
    ("accuracy", PAIRS),
    ("margin", PAIRS),
    ("prefers-chosen", PAIRS),
    ("chosen-change", PAIRS),
    ("kl", Needs::Answers),
    ("kl-per-token", Needs::Answers),
    ("length", Needs::Answers),
    ("truncated", Needs::Answers),
    ("repeated", Needs::Answers),
    ("choices", Needs::Choices),
    ("choices-change", Needs::Choices),
    ("loss", Needs::Rows(Rows::Any, Of::Any)),
];

/// Metrics of the policy that may be held to a bound, by their own name.
const METRICS: [(&str, Needs); 18] = [
    ("rewards/chosen", Needs::Rows(Rows::Chosen, Of::Rewards)),
    ("rewards/rejected", Needs::Rows(Rows::Rejected, Of::Rewards)),
    ("rewards/accuracies", Needs::Rows(Rows::Pairs, Of::Rewards)),
    ("rewards/margins", Needs::Rows(Rows::Sides, Of::Rewards)),
    ("logps/chosen", Needs::Rows(Rows::Chosen, Of::Any)),
    ("logps/rejected", Needs::Rows(Rows::Rejected, Of::Any)),
    ("logps/accuracies", PAIRS),
    ("logits/chosen", Needs::Rows(Rows::Chosen, Of::Any)),
    ("logits/rejected", Needs::Rows(Rows::Rejected, Of::Any)),
    ("entropy", Needs::Rows(Rows::Any, Of::Any)),
    ("mean_token_accuracy", Needs::Rows(Rows::Chosen, Of::Any)),
    ("nll_loss", Needs::Rows(Rows::Pairs, Of::Orpo)),
    ("log_odds_ratio", Needs::Rows(Rows::Pairs, Of::Orpo)),
    ("log_odds_chosen", Needs::Rows(Rows::Pairs, Of::Orpo)),
    ("kl_to_reference", Needs::Rows(Rows::Any, Of::Any)),
    ("perplexity", Needs::Rows(Rows::Chosen, Of::Any)),
    ("perplexity/chosen", PAIRS),
    ("perplexity/rejected", PAIRS),
];

pub(super) fn names() -> impl Iterator<Item = &'static str> {
    NAMES.into_iter().chain(METRICS).map(|(name, _)| name)
}

/// What the value of that name needs; none where there is no such value.
pub(super) fn needs(name: &str) -> Option<Needs> {
    NAMES.into_iter().chain(METRICS).find(|(known, _)| *known == name).map(|(_, needs)| needs)
}

impl Report {
    /// A value that may be held to a bound.
    pub(super) fn value(&self, name: &str) -> Option<f64> {
        let metric = |name: &str| self.pairs.as_ref()?.policy.get(name);
        let (answers, distance) =
            (|| Some(&self.sampling.as_ref()?.answers), || Some(&self.sampling.as_ref()?.distance));
        let least = |of: fn(&ChoiceResult) -> f64| self.choices.iter().map(|(_, result)| of(result)).reduce(f64::min);
        match name {
            "accuracy" => self.pairs.as_ref()?.interval("rewards/accuracies").map(|accuracy| accuracy.estimate),
            "margin" => self.pairs.as_ref()?.interval("rewards/margins").map(|margin| margin.estimate),
            "prefers-chosen" => metric("logps/accuracies"),
            "chosen-change" => {
                self.pairs.as_ref()?.difference("logps/chosen_per_token").map(|change| change.estimate)
            }
            "kl" => Some(distance()?.total.estimate),
            "kl-per-token" => Some(distance()?.per_token.estimate),
            "length" => answers().map(|answers| answers.policy.tokens / answers.base.tokens.max(1.0)),
            "truncated" => Some(answers()?.policy.truncated),
            "repeated" => Some(answers()?.policy.repetition.repeated_4grams),
            "choices" => least(|result| result.summed.policy),
            "choices-change" => least(|result| result.summed.difference),
            name => metric(name),
        }
    }

    /// The values that say whether training went well.
    pub(super) fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        if let Some(pairs) = &self.pairs
            && let (Some(accuracy), Some(margin)) =
                (pairs.interval("rewards/accuracies"), pairs.interval("rewards/margins"))
        {
            checks.push(health::accuracy(accuracy.estimate));
            checks.push(health::margin(margin));
            if let Some(gain) = pairs.difference("logps/chosen_per_token") {
                checks.push(health::chosen_logps(gain.estimate, margin.estimate));
            }
        }
        if let Some(Sampling { answers: Answers { base, policy, .. }, distance, chosen, .. }) = &self.sampling {
            checks.push(health::kl(distance.total.estimate));
            // where both are cut, their lengths are the limit's
            if policy.truncated.min(base.truncated) <= 0.5 {
                checks.push(health::length(policy.tokens, base.tokens, chosen.as_ref().map(|chosen| chosen.tokens)));
            }
            checks.push(health::truncated(policy.truncated, base.truncated));
            checks.push(health::repeated(policy.repetition.repeated_4grams, base.repetition.repeated_4grams));
        }
        for (file, result) in &self.choices {
            checks.push(health::choices(&file_name(file), result.summed.difference, result.summed.mcnemar));
        }
        checks
    }

    pub(super) fn json(&self) -> Value {
        let mut object = json!({
            "schema": 1,
            "version": env!("CARGO_PKG_VERSION"),
            "adapter": self.name,
            "model": self.base,
            "loss": self.loss.name(),
            "beta": self.loss.beta(),
            "reference": if self.reference_adapter { "the adapter that training began from" } else { "base" },
            "seed": self.seed,
            "data": self.data.as_ref().map(|Data { files, examples, facts, drops }| json!({
                "files": files, "examples": examples, "facts": facts, "dropped": drops.counts(),
                "dropped_rows": drops.listed()
            })),
            "pairs": self.pairs.as_ref().map_or(0, |pairs| pairs.count),
        });
        let mut add =
            |name: &str, value: Value| _ = object.as_object_mut().map(|object| object.insert(name.to_owned(), value));
        if let Some(pairs) = &self.pairs {
            let (intervals, differences) = pairs.estimates();
            add("base", Value::Object(pairs.base.json()));
            add("policy", Value::Object(pairs.policy.json()));
            add("intervals", intervals);
            add("differences", differences);
            add("margins", json!(pairs.margins));
            add("logps", json!({ "base": pairs.base_logps, "policy": pairs.policy_logps }));
            add("histogram", json!(pairs.histogram(BINS)));
        } else {
            add("base", Value::Object(Map::new()));
            add("policy", Value::Object(Map::new()));
            add("margins", json!([]));
        }
        let sampling = self.sampling.as_ref();
        add("kl", json!(sampling.map(Sampling::kl)));
        add("lengths", json!(sampling.map(Sampling::lengths)));
        add(
            "repetition",
            json!(sampling.map(|sampling| json!({
                "base": sampling.answers.base.repetition, "policy": sampling.answers.policy.repetition
            }))),
        );
        let choices = self.choices.iter().map(|(file, result)| {
            let mut object = json!(result);
            if let Some(object) = object.as_object_mut() {
                object.shift_insert(0, "file".into(), json!(file.display().to_string()));
            }
            object
        });
        add("choices", choices.collect());
        add("checks", json!(self.checks()));
        object
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        let loss = match (self.loss.beta(), self.run_loss) {
            (Some(beta), true) => format!("{}, beta {beta}", self.loss.name()),
            (None, true) => self.loss.name().to_owned(),
            (_, false) => {
                format!("{}, beta {} (no run says another)", self.loss.name(), self.loss.beta().unwrap_or(0.0))
            }
        };
        line(&mut text, format_args!("{:<12}{}, {}", "adapter", self.name, self.adapter));
        line(&mut text, format_args!("{:<12}{loss}", "loss"));
        if let (Some(Data { files, examples, drops, .. }), Some(pairs)) = (&self.data, &self.pairs) {
            let files = files.join(", ");
            line(&mut text, format_args!("{:<12}{} examples of {files}", "held out", thousands(*examples)));
            if drops.total() > 0 {
                line(&mut text, format_args!("{:<12}left out: {drops}", ""));
            }
            pairs_text(&mut text, pairs);
        }
        if let Some(sampling) = &self.sampling {
            sampling.text(&mut text, self.reference_adapter);
        }
        if !self.choices.is_empty() {
            self.choices_text(&mut text);
        }
        checks_text(&mut text, &self.checks());
        text
    }

    fn choices_text(&self, text: &mut String) {
        line(
            text,
            format_args!(
                "\n{:<28}{:>6}{:>9}{:>9}{:>9}{:>10}{:>9}{:>12}",
                "multiple choice", "n", "chance", "base", "policy", "change", "SE", "McNemar p"
            ),
        );
        for (file, result) in &self.choices {
            for (how, compared) in [("", &result.summed), (", a character", &result.normalized)] {
                line(
                    text,
                    format_args!(
                        "{:<28}{:>6}{:>9.3}{:>9.3}{:>9.3}{:>+10.3}{:>9.3}{:>12.3}",
                        format!("{}{how}", file_name(file)),
                        result.questions,
                        result.chance,
                        compared.base,
                        compared.policy,
                        compared.difference,
                        compared.standard_error,
                        compared.mcnemar
                    ),
                );
            }
            if result.cut > 0 {
                line(
                    text,
                    format_args!(
                        "{:<28}{} were longer than the model's positions, and lost their beginning",
                        "", result.cut
                    ),
                );
            }
        }
    }
}

impl Sampling {
    fn kl(&self) -> Value {
        let Distance { per_token, total, totals } = &self.distance;
        json!({
            "per_token": per_token.estimate,
            "total": total.estimate,
            "interval": total.interval,
            "standard_error": total.standard_error,
            "per_token_interval": per_token.interval,
            "per_token_standard_error": per_token.standard_error,
            "prompts": self.prompts,
            "samples": totals.len(),
            "estimator": "exact divergence at every position of answers sampled from the policy",
            "of_answers": totals,
        })
    }

    fn lengths(&self) -> Value {
        let Answers { base, policy, longer, identical } = &self.answers;
        json!({
            "prompts": self.prompts,
            "temperature": 1.0,
            "max_new_tokens": self.max_new_tokens,
            "base_tokens": base.tokens,
            "policy_tokens": policy.tokens,
            "chosen_tokens": self.chosen.as_ref().map(|chosen| chosen.tokens),
            "difference": longer,
            "base_truncated": base.truncated,
            "policy_truncated": policy.truncated,
            "base_empty": base.empty,
            "policy_empty": policy.empty,
            "identical": identical,
        })
    }

    fn text(&self, text: &mut String, reference_adapter: bool) {
        let Answers { base, policy, longer, .. } = &self.answers;
        line(
            text,
            format_args!(
                "\n{:<30}{:>10}{:>10}",
                format!("answers to {} prompts", thousands(self.prompts)),
                "base",
                "policy"
            ),
        );
        let [low, high] = longer.interval;
        line(
            text,
            format_args!(
                "{:<30}{:>10.1}{:>10.1}   {:+.1} [{low:+.1}, {high:+.1}]{}",
                "tokens",
                base.tokens,
                policy.tokens,
                longer.estimate,
                self.chosen.as_ref().map_or(String::new(), |chosen| format!(", chosen {:.1}", chosen.tokens))
            ),
        );
        let mut row = |name: &str, of: fn(&AnswerSide) -> f64| {
            line(text, format_args!("{name:<30}{:>10.3}{:>10.3}", of(base), of(policy)));
        };
        row(&format!("cut at {} tokens", self.max_new_tokens), |side| side.truncated);
        row("repeated 4-grams", |side| side.repetition.repeated_4grams);
        row("distinct 2-grams", |side| side.repetition.distinct_2);
        let Distance { per_token, total, .. } = &self.distance;
        let of = if reference_adapter { "KL from the reference" } else { "KL from the base" };
        line(
            text,
            format_args!(
                "{of:<30}{:>20.3}   [{:.3}, {:.3}] nats an answer",
                total.estimate, total.interval[0], total.interval[1]
            ),
        );
        line(
            text,
            format_args!(
                "{:<30}{:>20.4}   [{:.4}, {:.4}] nats a token",
                "", per_token.estimate, per_token.interval[0], per_token.interval[1]
            ),
        );
    }
}

/// The most that a table needs to know of a metric.
struct Row {
    name: &'static str,
    label: &'static str,
    digits: usize,
}

const ROWS: [Row; 10] = [
    Row { name: "logps/accuracies", label: "prefers chosen", digits: 3 },
    Row { name: "rewards/accuracies", label: "reward accuracy", digits: 3 },
    Row { name: "rewards/chosen", label: "reward of chosen", digits: 3 },
    Row { name: "rewards/rejected", label: "reward of rejected", digits: 3 },
    Row { name: "rewards/margins", label: "reward margin", digits: 3 },
    Row { name: "loss", label: "loss", digits: 4 },
    Row { name: "logps/chosen", label: "log-prob of chosen", digits: 1 },
    Row { name: "logps/rejected", label: "log-prob of rejected", digits: 1 },
    Row { name: "perplexity/chosen", label: "perplexity of chosen", digits: 3 },
    Row { name: "perplexity/rejected", label: "perplexity of rejected", digits: 3 },
];

fn pairs_text(text: &mut String, pairs: &Pairs) {
    line(
        text,
        format_args!(
            "\n{:<30}{:>10}{:>10}   {}",
            "held-out pairs", "base", "policy", "change, or value, with its 95 %"
        ),
    );
    for Row { name, label, digits } in ROWS {
        let (Some(base), Some(policy)) = (pairs.base.get(name), pairs.policy.get(name)) else { continue };
        let estimate = |estimate: &Estimate, sign: bool| {
            let Estimate { estimate, interval: [low, high], .. } = estimate;
            match sign {
                true => format!("   {estimate:+.digits$} [{low:+.digits$}, {high:+.digits$}]"),
                false => format!("   {estimate:.digits$} [{low:.digits$}, {high:.digits$}]"),
            }
        };
        let more = match (pairs.difference(name), pairs.interval(name)) {
            (Some(difference), _) => estimate(difference, true),
            (None, Some(interval)) => estimate(interval, false),
            (None, None) => String::new(),
        };
        line(text, format_args!("{label:<30}{base:>10.digits$}{policy:>10.digits$}{more}"));
    }
    if let Some(histogram) = pairs.histogram(BINS) {
        histogram_text(text, &histogram);
    }
}

fn histogram_text(text: &mut String, Histogram { edges, base, policy }: &Histogram) {
    line(text, format_args!("\n{:<22}{:<width$}   policy", "nats for chosen", "base", width = BAR + 6));
    let most = base.iter().chain(policy).copied().max().unwrap_or(0).max(1);
    let bar = |count: usize| {
        format!(
            "{:<BAR$} {:>5}",
            "#".repeat((count * BAR).div_ceil(most)),
            if count > 0 { count.to_string() } else { String::new() }
        )
    };
    for (i, (base, policy)) in base.iter().zip(policy).enumerate() {
        line(
            text,
            format_args!(
                "{:>8} to {:<10}{}   {}",
                trimmed(edges[i], 3),
                trimmed(edges[i + 1], 3),
                bar(*base),
                bar(*policy)
            ),
        );
    }
}

fn checks_text(text: &mut String, checks: &[Check]) {
    line(text, format_args!("\n{:<38}{:>9}   {:<14}verdict", "what to make of it", "value", "healthy"));
    for Check { name, value, healthy, verdict, why } in checks {
        line(text, format_args!("{name:<38}{value:>9.3}   {healthy:<14}{}", verdict.word()));
        line(text, format_args!("    {why}"));
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // a string takes everything
    _ = writeln!(text, "{}", line.to_string().trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_says_what_it_needs() {
        assert_eq!(
            (needs("kl"), needs("choices"), needs("accuracy")),
            (Some(Needs::Answers), Some(Needs::Choices), Some(PAIRS))
        );
        assert_eq!(
            (needs("rewards/margins"), needs("accurracy")),
            (Some(Needs::Rows(Rows::Sides, Of::Rewards)), None)
        );
        assert!(names().all(|name| needs(name).is_some()));
    }

    #[test]
    fn edges_are_written_short() {
        assert_eq!([-0.5, 0.0, 10.0, 2.25].map(|edge| trimmed(edge, 3)), ["-0.5", "0", "10", "2.25"]);
    }
}
