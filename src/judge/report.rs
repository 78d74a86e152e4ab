//! What verdicts come to: `win_rate.json`. A function of the answers and the verdicts and nothing else.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::outputs::Output;
use crate::model::generate::End;
use crate::statistics::{
    self, Bootstrap, Clusters, Estimate, LENGTH_RIDGE, LengthControlled, Orders, Outcomes, Style, StyleControlled,
    Votes,
};

/// Answers that are cut off, above which a comparison is about where they were cut.
const MANY_TRUNCATED: f64 = 0.05;
/// Fewer prompts than this make a poor sample.
const FEW: usize = 30;

/// Both answers to a prompt.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'o> {
    /// The policy's.
    pub policy: &'o Output,
    /// The other one.
    pub against: &'o Output,
}

impl Pair<'_> {
    /// Whether there is nothing to judge.
    #[must_use]
    pub fn is_identical(&self) -> bool {
        self.policy.output.trim() == self.against.output.trim()
    }
}

/// What became of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Judged {
    /// The judge has said all that it was asked.
    Votes(Votes, Vec<Said>),
    /// The judge has answered, and at least one of its answers cannot be understood.
    Invalid(Votes, Vec<Said>),
    /// At least one question was not asked, or not answered.
    Missing(Votes, Vec<Said>),
    /// Both answers are the same.
    Identical,
}

/// A verdict.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Said {
    /// 1: the policy's answer was A. 2: it was B.
    pub order: u8,
    /// As the judge said it, such as `A>B`; `invalid` where it cannot be understood.
    pub verdict: String,
    /// Why, or what was said in place of a verdict.
    pub reason: Option<String>,
}

/// How the report is made.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Of all intervals.
    pub bootstrap: Bootstrap,
    /// Prompts with a verdict in one order only count.
    pub allow_single_order: bool,
    /// Whether a model judges. It could say something else when answers trade places, or prefer length; a formula cannot.
    pub by_model: bool,
    /// Share of prompts without a verdict, above which the comparison has failed.
    pub max_unresolved: f64,
}

/// Who was compared, by whom.
#[derive(Debug, Clone)]
pub struct Names {
    /// The policy.
    pub policy: String,
    /// What it was compared with.
    pub against: String,
    /// The judge as the headline has it.
    pub judge: String,
}

/// What the judge was paid.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Answers that the verdicts rest on, repeated questions included.
    pub calls: usize,
    /// Verdicts that needed no call of their own: the same was asked for another prompt.
    pub cached: usize,
    /// Questions that were asked again because an answer could not be understood.
    pub reasked: usize,
    /// Tokens that were read.
    pub prompt_tokens: u64,
    /// Those of them that the endpoint had cached.
    pub cached_tokens: u64,
    /// Tokens that were written.
    pub completion_tokens: u64,
    /// At the prices given, of the tokens that the endpoint told of; none without prices.
    pub dollars: Option<f64>,
    /// Calls whose answer does not say what it took: nothing of them is in tokens and dollars.
    pub without_usage: usize,
}

/// Mean lengths, and what they have to do with verdicts.
#[derive(Debug, Clone, Serialize)]
pub struct Lengths {
    /// Characters.
    pub policy_chars: f64,
    /// Characters.
    pub against_chars: f64,
    /// Tokens, where known.
    pub policy_tokens: Option<f64>,
    /// Tokens, where known.
    pub against_tokens: Option<f64>,
    /// Share of answers that were cut off, where known.
    pub policy_truncated: Option<f64>,
    /// Share of answers that were cut off, where known.
    pub against_truncated: Option<f64>,
    /// Share of empty answers.
    pub policy_empty: f64,
    /// Share of empty answers.
    pub against_empty: f64,
    /// Share of prompts won by the longer answer.
    pub prefers_longer: Option<f64>,
    /// Share of prompts won by the answer with a list.
    pub prefers_list: Option<f64>,
}

/// The prompts of one category.
#[derive(Debug, Clone, Serialize)]
pub struct Category {
    /// Its name.
    pub category: String,
    /// Prompts with a verdict.
    pub prompts: usize,
    /// Win rate.
    pub estimate: f64,
    /// Of independent prompts.
    pub standard_error: f64,
}

/// A prompt with all that is known.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// What was asked.
    pub prompt: String,
    /// The policy's answer.
    pub policy: String,
    /// The other one.
    pub against: String,
    /// The policy's score; none without a verdict.
    pub score: Option<f64>,
    /// What it is counted under.
    pub category: Option<String>,
    /// What the judge said.
    pub verdicts: Vec<Said>,
}

/// `win_rate.json`
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Of this file.
    pub schema: u32,
    /// All in a line.
    pub headline: String,
    /// Who answered.
    pub policy: String,
    /// Who answered too.
    pub against: String,
    /// Who judged, and how.
    pub judge: Value,
    /// Prompts that both answered.
    pub prompts: usize,
    /// Those with a score: wins, ties and losses.
    pub scored: usize,
    /// Scores above ½.
    pub wins: usize,
    /// Scores of ½, identical answers included.
    pub ties: usize,
    /// Scores below ½.
    pub losses: usize,
    /// Prompts with the same answer twice: ½, and no call.
    pub identical: usize,
    /// Prompts whose verdict cannot be understood; not counted as anything.
    pub invalid: usize,
    /// Prompts that were not asked about, or not answered.
    pub missing: usize,
    /// Mean score over prompts.
    pub win_rate: Estimate,
    /// What it could be, whatever became of prompts without a score.
    pub bounds: Option<[f64; 2]>,
    /// Two-sided, of wins and losses.
    pub sign_test: f64,
    /// Win rate where a win takes both orders; none of a judge without orders, or without a verdict.
    pub conservative: Option<f64>,
    /// Win rate at equal length; none of a judge that is a formula, or where all lengths differ alike.
    pub length_controlled: Option<LengthControlled>,
    /// Win rate at equal style; none likewise.
    pub style_controlled: Option<StyleControlled>,
    /// Does the judge agree with itself.
    pub orders: Option<Orders>,
    /// Mean lengths.
    pub lengths: Lengths,
    /// By category, where prompts have one.
    pub categories: Vec<Category>,
    /// None of a judge that is free.
    pub cost: Option<Cost>,
    /// What a reader has to know before trusting this.
    pub warnings: Vec<String>,
    /// The smallest lead over one half that so many prompts show with a power of 80 %.
    pub detectable: f64,
    /// How many independent units the prompts are.
    pub clusters: usize,
    /// All prompts.
    pub samples: Vec<Sample>,
    /// How answers were chosen.
    pub sampling: Value,
    /// What the answers depend on.
    pub hashes: Value,
    /// What made this.
    pub environment: Value,
}

/// What is put into the report as it is.
#[derive(Debug, Clone)]
pub struct About {
    /// Who judged.
    pub judge: Value,
    /// How answers were chosen.
    pub sampling: Value,
    /// What they depend on.
    pub hashes: Value,
    /// None of a judge that is free.
    pub cost: Option<Cost>,
    /// Known before.
    pub warnings: Vec<String>,
}

impl Report {
    /// Of the verdicts on pairs, in their order.
    #[must_use]
    pub fn new(pairs: &[Pair<'_>], judged: &[Judged], names: &Names, settings: &Settings, about: About) -> Self {
        let scores: Vec<Option<f64>> = judged.iter().map(|judged| judged.score(settings)).collect();
        let scored: Vec<usize> = (0..pairs.len()).filter(|&i| scores[i].is_some()).collect();
        let values: Vec<f64> = scores.iter().flatten().copied().collect();
        let clusters = Clusters::of(scored.iter().map(|&i| match &pairs[i].policy.group {
            Some(group) => (Some(group.as_str()), 0),
            None => (None, i),
        }));
        let win_rate = settings.bootstrap.share(&values, &clusters);
        let Outcomes { wins, ties, losses } = Outcomes::of(&values);
        let count = |is: fn(&Judged) -> bool| judged.iter().filter(|judged| is(judged)).count();
        let unresolved = pairs.len() - scored.len();
        let missing = judged
            .iter()
            .zip(&scores)
            .filter(|(judged, score)| score.is_none() && matches!(judged, Judged::Missing(..)))
            .count();
        let votes: Vec<Votes> = judged.iter().filter_map(Judged::votes).collect();
        let orders = settings.by_model.then(|| Orders::of(votes.iter().filter_map(Votes::outcomes))).flatten();
        let conservative: Vec<f64> = judged
            .iter()
            .filter_map(|judged| match judged {
                Judged::Identical => Some(0.5),
                other => other.votes().and_then(|votes| votes.conservative()),
            })
            .collect();

        let policy: Vec<&Output> = scored.iter().map(|&i| pairs[i].policy).collect();
        let against: Vec<&Output> = scored.iter().map(|&i| pairs[i].against).collect();
        let chars =
            |outputs: &[&Output]| outputs.iter().map(|output| output.output.chars().count()).collect::<Vec<_>>();
        let (policy_chars, against_chars) = (chars(&policy), chars(&against));
        // of a stranger's file tokens may not be known; about four bytes each
        let tokens = |output: &Output| output.tokens.unwrap_or(output.output.len() / 4);
        let styles = |outputs: &[&Output]| {
            outputs.iter().map(|output| Style::of(&output.output, tokens(output))).collect::<Vec<_>>()
        };
        let (policy_styles, against_styles) = (styles(&policy), styles(&against));
        let bootstrap = settings.bootstrap;
        let controlled = settings.by_model.then(|| {
            let ridge = LENGTH_RIDGE;
            let length =
                statistics::length_controlled(&values, &policy_chars, &against_chars, &clusters, ridge, bootstrap);
            let style =
                statistics::style_controlled(&values, &policy_styles, &against_styles, &clusters, ridge, bootstrap);
            (length, style)
        });
        let (length_controlled, style_controlled) = controlled.unwrap_or_default();
        let lists = |styles: &[Style]| styles.iter().map(|style| style.lists > 0).collect::<Vec<_>>();
        let lengths = Lengths {
            prefers_longer: statistics::prefers_longer(&values, &policy_chars, &against_chars),
            prefers_list: statistics::prefers_with(&values, lists(&policy_styles), lists(&against_styles)),
            ..Lengths::of(pairs)
        };
        let mut report = Self {
            schema: 1,
            headline: String::new(),
            policy: names.policy.clone(),
            against: names.against.clone(),
            judge: about.judge,
            prompts: pairs.len(),
            scored: scored.len(),
            wins,
            ties,
            losses,
            identical: count(|judged| *judged == Judged::Identical),
            invalid: unresolved - missing,
            missing,
            win_rate,
            bounds: (unresolved > 0).then(|| statistics::bounds(&values, unresolved)),
            sign_test: statistics::sign_test(wins, losses),
            conservative: (settings.by_model && !conservative.is_empty()).then(|| statistics::mean(&conservative)),
            length_controlled,
            style_controlled,
            orders,
            lengths,
            categories: categories(pairs, &scores),
            cost: about.cost,
            warnings: about.warnings,
            // where nothing is scored there is no standard error, and nothing shows
            detectable: if values.is_empty() {
                0.0
            } else {
                statistics::detectable_difference(win_rate.standard_error)
            },
            clusters: clusters.len(),
            samples: samples(pairs, judged, &scores),
            sampling: about.sampling,
            hashes: about.hashes,
            environment: json!({
                "version": env!("CARGO_PKG_VERSION"),
                "os": std::env::consts::OS,
                "arch": std::env::consts::ARCH,
            }),
        };
        report.headline = report.headline_of(&names.judge);
        let more = report.own_warnings(settings);
        report.warnings.extend(more);
        report
    }

    /// Prompts without a score.
    #[must_use]
    pub fn unresolved(&self) -> usize {
        self.prompts - self.scored
    }

    /// Their share.
    #[must_use]
    pub fn unresolved_share(&self) -> f64 {
        self.unresolved() as f64 / self.prompts.max(1) as f64
    }

    fn headline_of(&self, judge: &str) -> String {
        let percent = |x: f64| format!("{:.1}", 100.0 * x);
        let range = |[low, high]: [f64; 2]| format!("[{}, {}]", percent(low), percent(high));
        if self.scored == 0 {
            return format!("no win rate vs {}: none of {} prompts has a verdict", self.against, self.prompts);
        }
        let mut parts = vec![format!(
            "win rate {} % {} vs {}",
            percent(self.win_rate.estimate),
            range(self.win_rate.interval),
            self.against
        )];
        if let Some(controlled) = &self.length_controlled {
            parts.push(format!("LC {} % {}", percent(controlled.estimate), range(controlled.interval)));
        }
        parts.push(format!("n {} · W/T/L {}/{}/{}", self.scored, self.wins, self.ties, self.losses));
        let orders = self.orders.as_ref().map(|orders| {
            let first = orders.first_slot_share.map(|share| format!(", first slot {:.0} %", 100.0 * share));
            format!(" agrees with itself {:.0} %{}", 100.0 * orders.agreement, first.unwrap_or_default())
        });
        parts.push(format!("judge {judge}{}", orders.unwrap_or_default()));
        parts.push(format!("{} invalid", self.invalid));
        if self.missing > 0 {
            parts.push(format!("{} missing", self.missing));
        }
        if let Some(Cost { dollars: Some(dollars), without_usage, .. }) = &self.cost {
            parts.push(match without_usage {
                0 => format!("${dollars:.2}"),
                count => format!("${dollars:.2}, and {count} calls do not say what they took"),
            });
        }
        parts.join(" · ")
    }

    fn own_warnings(&self, settings: &Settings) -> Vec<String> {
        let mut warnings = Vec::new();
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        if self.identical == self.prompts {
            warnings.push("all answers are identical: the adapter changes nothing that these prompts show".into());
        } else if 2 * self.identical > self.prompts {
            let share = percent(self.identical as f64 / self.prompts as f64);
            warnings.push(format!("{share} of the answers are identical, and count as ties"));
        }
        if let Some([low, high]) = self.bounds {
            warnings.push(format!(
                "{} of {} prompts have no verdict: whatever they were, the win rate is between {:.1} and {:.1} %",
                self.unresolved(),
                self.prompts,
                100.0 * low,
                100.0 * high
            ));
        }
        if self.unresolved_share() > settings.max_unresolved {
            warnings.push(format!(
                "more than {} of the prompts have no verdict: this is no result",
                percent(settings.max_unresolved)
            ));
        }
        warnings.extend(self.orders.iter().flat_map(Orders::warnings));
        for (who, share) in
            [("the policy", self.lengths.policy_truncated), (&*self.against, self.lengths.against_truncated)]
        {
            if let Some(share) = share.filter(|share| *share > MANY_TRUNCATED) {
                warnings
                    .push(format!("{} of the answers of {who} are cut off: raise --max-new-tokens", percent(share)));
            }
        }
        for (who, share) in [("the policy", self.lengths.policy_empty), (&*self.against, self.lengths.against_empty)]
        {
            if share > MANY_TRUNCATED {
                warnings.push(format!("{} of the answers of {who} are empty", percent(share)));
            }
        }
        if let Some(controlled) = &self.length_controlled
            && controlled.explained.abs() > 0.1
        {
            warnings.push(format!(
                "length explains {:.0} points of the win rate: at equal length it is {:.1} %",
                100.0 * controlled.explained.abs(),
                100.0 * controlled.estimate
            ));
        }
        if self.scored < FEW {
            warnings.push(format!("{} prompts are few: the interval is rough", self.scored));
        }
        warnings
    }
}

impl Judged {
    fn votes(&self) -> Option<Votes> {
        match self {
            Self::Votes(votes, _) | Self::Invalid(votes, _) | Self::Missing(votes, _) => Some(*votes),
            Self::Identical => None,
        }
    }

    fn score(&self, settings: &Settings) -> Option<f64> {
        match self {
            Self::Identical => Some(0.5),
            other => other.votes().and_then(|votes| match settings.allow_single_order {
                true => votes.score_of_any(),
                false => votes.score(),
            }),
        }
    }

    fn said(&self) -> &[Said] {
        match self {
            Self::Votes(_, said) | Self::Invalid(_, said) | Self::Missing(_, said) => said,
            Self::Identical => &[],
        }
    }
}

impl Lengths {
    fn of(pairs: &[Pair<'_>]) -> Self {
        let mean = |value: &dyn Fn(&Pair<'_>) -> Option<f64>| {
            let values: Vec<f64> = pairs.iter().filter_map(value).collect();
            (values.len() == pairs.len()).then(|| statistics::mean(&values))
        };
        let chars = |output: &Output| Some(output.output.chars().count() as f64);
        let tokens = |output: &Output| Some(output.tokens? as f64);
        let share = |holds: bool| Some(if holds { 1.0 } else { 0.0 });
        let truncated = |output: &Output| share(output.end? == End::Length);
        let empty = |output: &Output| share(output.output.trim().is_empty());
        Self {
            policy_chars: mean(&|pair| chars(pair.policy)).unwrap_or(0.0),
            against_chars: mean(&|pair| chars(pair.against)).unwrap_or(0.0),
            policy_tokens: mean(&|pair| tokens(pair.policy)),
            against_tokens: mean(&|pair| tokens(pair.against)),
            policy_truncated: mean(&|pair| truncated(pair.policy)),
            against_truncated: mean(&|pair| truncated(pair.against)),
            policy_empty: mean(&|pair| empty(pair.policy)).unwrap_or(0.0),
            against_empty: mean(&|pair| empty(pair.against)).unwrap_or(0.0),
            prefers_longer: None,
            prefers_list: None,
        }
    }
}

fn categories(pairs: &[Pair<'_>], scores: &[Option<f64>]) -> Vec<Category> {
    let mut by_name: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (pair, score) in pairs.iter().zip(scores) {
        let name = pair.policy.category.as_ref().or(pair.policy.dataset.as_ref());
        if let (Some(name), Some(score)) = (name, score) {
            by_name.entry(name).or_default().push(*score);
        }
    }
    let of = |(category, scores): (&str, Vec<f64>)| Category {
        category: category.to_owned(),
        prompts: scores.len(),
        estimate: statistics::mean(&scores),
        standard_error: statistics::standard_error(&scores),
    };
    by_name.into_iter().map(of).collect()
}

fn samples(pairs: &[Pair<'_>], judged: &[Judged], scores: &[Option<f64>]) -> Vec<Sample> {
    let of = |((pair, judged), score): ((&Pair<'_>, &Judged), &Option<f64>)| Sample {
        prompt: pair.policy.instruction.clone(),
        policy: pair.policy.output.clone(),
        against: pair.against.output.clone(),
        score: *score,
        category: pair.policy.category.clone().or_else(|| pair.policy.dataset.clone()),
        verdicts: judged.said().to_vec(),
    };
    pairs.iter().zip(judged).zip(scores).map(of).collect()
}
