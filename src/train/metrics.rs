//! What a run reports, under TRL's names.

use serde_json::{Map, Value, json};

use super::batch::Part;
use crate::loss::{Loss, Scored};
use crate::ops::completion_logps::TokenScore;

/// Named numbers in the order they are written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(Vec<(String, f64)>);

impl Metrics {
    /// Adds a number.
    pub fn push(&mut self, name: impl Into<String>, value: f64) {
        self.0.push((name.into(), value));
    }

    /// The number of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// Every name with its number, in the order in which they are written.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// All numbers, with `prefix` before each name.
    pub fn extend(&mut self, prefix: &str, other: &Metrics) {
        self.0.extend(other.0.iter().map(|(name, value)| (format!("{prefix}{name}"), *value)));
    }

    /// As a JSON object; whole numbers are written as such, and what is not finite as null.
    #[must_use]
    pub fn json(&self) -> Map<String, Value> {
        let number = |value: f64| match value {
            whole if whole.fract() == 0.0 && whole.abs() < 1e15 && !(whole == 0.0 && whole.is_sign_negative()) => {
                json!(whole as i64)
            }
            value => json!(value),
        };
        self.0.iter().map(|(name, value)| (name.clone(), number(*value))).collect()
    }
}

/// One scored sequence with all its sums.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sums {
    pub(super) tokens: usize,
    pub(super) logp: f64,
    entropy: f64,
    mean_logit: f64,
    top1: usize,
}

impl Sums {
    pub(super) fn of(scores: &[TokenScore]) -> Self {
        scores.iter().fold(Self::default(), |sums, score| Self {
            tokens: sums.tokens + 1,
            logp: sums.logp + score.logp,
            entropy: sums.entropy + score.entropy,
            mean_logit: sums.mean_logit + score.mean_logit,
            top1: sums.top1 + usize::from(score.top1),
        })
    }

    fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.logp += other.logp;
        self.entropy += other.entropy;
        self.mean_logit += other.mean_logit;
        self.top1 += other.top1;
    }
}

/// Of one side of the examples: chosen or rejected.
#[derive(Debug, Clone, Copy, Default)]
struct Side {
    sequences: usize,
    reward: f64,
    sums: Sums,
}

/// Adds up what was scored, over the micro-batches of an update or an evaluation.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    examples: usize,
    loss: f64,
    chosen: Side,
    rejected: Side,
    pairs: usize,
    higher_reward: usize,
    higher_logp: usize,
    terms: Vec<(&'static str, f64)>,
}

impl Tally {
    /// Adds the examples of a micro-batch: what they were scored to, and the sums of their spans.
    pub(super) fn add(&mut self, loss: &Loss, scored: &[Scored], parts: &[(usize, Part)], sums: &[Sums]) {
        for (&(i, part), sums) in parts.iter().zip(sums) {
            let (side, sequence) = match part {
                Part::Prompt => continue,
                Part::Chosen => (&mut self.chosen, &scored[i].chosen),
                Part::Rejected => (&mut self.rejected, &scored[i].rejected),
            };
            side.sequences += 1;
            side.reward += sequence.as_ref().and_then(|sequence| loss.reward(sequence)).unwrap_or(0.0);
            side.sums.add(sums);
        }
        self.examples += scored.len();
        for scored in scored {
            if let (Some(chosen), Some(rejected)) = (&scored.chosen, &scored.rejected) {
                self.pairs += 1;
                self.higher_reward += usize::from(loss.reward(chosen) > loss.reward(rejected));
                self.higher_logp += usize::from(chosen.logp > rejected.logp);
            }
        }
    }

    /// Adds contributions to the loss.
    pub(super) fn add_losses(&mut self, losses: &[f64], terms: &[(&'static str, Vec<f64>)]) {
        self.loss += losses.iter().sum::<f64>();
        for (name, values) in terms {
            let sum = values.iter().sum::<f64>();
            match self.terms.iter_mut().find(|(known, _)| known == name) {
                Some((_, total)) => *total += sum,
                None => self.terms.push((name, sum)),
            }
        }
    }

    /// The loss, of `examples` examples.
    pub(super) fn loss(&self, examples: usize) -> f64 {
        self.loss / examples as f64
    }

    /// Everything with TRL's names, but the loss.
    pub(super) fn metrics(&self, loss: &Loss) -> Metrics {
        let mut metrics = Metrics::default();
        let sides = [("chosen", &self.chosen), ("rejected", &self.rejected)];
        let present = || sides.into_iter().filter(|(_, side)| side.sequences > 0);
        let rewarded = loss.beta().is_some();
        if rewarded {
            for (name, side) in present() {
                metrics.push(format!("rewards/{name}"), side.reward / side.sequences as f64);
            }
            if self.pairs > 0 {
                metrics.push("rewards/accuracies", self.higher_reward as f64 / self.pairs as f64);
            }
            if self.chosen.sequences > 0 && self.rejected.sequences > 0 {
                let mean = |side: &Side| side.reward / side.sequences as f64;
                metrics.push("rewards/margins", mean(&self.chosen) - mean(&self.rejected));
            }
        }
        for (name, side) in present() {
            metrics.push(format!("logps/{name}"), side.sums.logp / side.sequences as f64);
        }
        if self.pairs > 0 {
            metrics.push("logps/accuracies", self.higher_logp as f64 / self.pairs as f64);
        }
        for (name, side) in present() {
            metrics.push(format!("logits/{name}"), side.sums.mean_logit / side.sums.tokens as f64);
        }
        let mut all = self.chosen.sums;
        all.add(&self.rejected.sums);
        metrics.push("entropy", all.entropy / all.tokens.max(1) as f64);
        if self.chosen.sequences > 0 {
            let chosen = &self.chosen.sums;
            metrics.push("mean_token_accuracy", chosen.top1 as f64 / chosen.tokens as f64);
        }
        for (name, sum) in &self.terms {
            metrics.push(*name, sum / self.examples as f64);
        }
        metrics
    }

    /// `exp` of the mean negative log-probability of a chosen token.
    pub(super) fn chosen_perplexity(&self) -> Option<f64> {
        let chosen = &self.chosen.sums;
        (chosen.tokens > 0).then(|| (-chosen.logp / chosen.tokens as f64).exp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_writes_whole_numbers_whole_and_what_is_not_finite_as_null() {
        let mut metrics = Metrics::default();
        metrics.push("step", 3.0);
        metrics.push("loss", 0.5);
        metrics.push("kl", f64::NAN);
        assert_eq!(Value::Object(metrics.json()).to_string(), r#"{"step":3,"loss":0.5,"kl":null}"#);
    }
}
