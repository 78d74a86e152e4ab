//! Held-out pairs under base and policy.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::loss::{Dpo, Loss, Scored, Sequence};
use crate::statistics::{Bootstrap, Clusters, Estimate, quantile};
use crate::train::Metrics;

/// Summed log-probs of a pair's completions, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PairLogps {
    /// Of the chosen one.
    pub chosen: f64,
    /// Of the rejected one.
    pub rejected: f64,
}

impl PairLogps {
    /// How much more probable the chosen one is.
    #[must_use]
    pub fn margin(&self) -> f64 {
        self.chosen - self.rejected
    }
}

/// What base and policy say about held-out examples.
#[derive(Debug, Clone)]
pub struct Pairs {
    /// Examples that have both sides.
    pub count: usize,
    /// Under TRL's names, of the base.
    pub base: Metrics,
    /// The same of the policy.
    pub policy: Metrics,
    /// Of each pair by the base.
    pub base_logps: Vec<PairLogps>,
    /// Of each pair by the policy.
    pub policy_logps: Vec<PairLogps>,
    /// `rewards/margins` of each pair by the policy.
    pub margins: Vec<f64>,
    /// Of the policy, by metric.
    pub intervals: Vec<(&'static str, Estimate)>,
    /// Policy minus base on the same pairs, by metric.
    pub differences: Vec<(&'static str, Estimate)>,
}

impl Pairs {
    /// From the metrics and scores of both, in the same order. Pairs of one `cluster` have one prompt and are resampled
    /// together. A loss without rewards (SFT) gets those of DPO with its default β.
    #[must_use]
    pub fn new(
        loss: &Loss,
        (mut base, base_scored): (Metrics, Vec<Scored>),
        (mut policy, policy_scored): (Metrics, Vec<Scored>),
        prompts: &[usize],
        bootstrap: Bootstrap,
    ) -> Self {
        let rewarding = if loss.beta().is_some() { loss.clone() } else { Loss::Dpo(Dpo::default()) };
        let reward = |completion: &Sequence| rewarding.reward(completion).unwrap_or(0.0);
        let (mut base_logps, mut policy_logps, mut margins, mut clusters) = (vec![], vec![], vec![], vec![]);
        // chosen and rejected: log-probs by the base and by the policy, and tokens
        let mut sides = [(vec![], vec![], vec![]), (vec![], vec![], vec![])];
        for ((before, after), prompt) in base_scored.iter().zip(&policy_scored).zip(prompts) {
            let (Some(chosen), Some(rejected)) = (&after.chosen, &after.rejected) else { continue };
            let (Some(base_chosen), Some(base_rejected)) = (&before.chosen, &before.rejected) else { continue };
            base_logps.push(PairLogps { chosen: base_chosen.logp, rejected: base_rejected.logp });
            policy_logps.push(PairLogps { chosen: chosen.logp, rejected: rejected.logp });
            margins.push(reward(chosen) - reward(rejected));
            clusters.push(*prompt);
            let [chosen_side, rejected_side] = &mut sides;
            for (side, before, after) in
                [(chosen_side, base_chosen, chosen), (rejected_side, base_rejected, rejected)]
            {
                side.0.push(before.logp);
                side.1.push(after.logp);
                side.2.push(after.tokens as f64);
            }
        }
        let mut found = Self {
            count: margins.len(),
            base_logps,
            policy_logps,
            margins,
            intervals: Vec::new(),
            differences: Vec::new(),
            base: Metrics::default(),
            policy: Metrics::default(),
        };
        if found.count > 0 {
            for (name, (before, after, tokens)) in
                [("perplexity/chosen", &sides[0]), ("perplexity/rejected", &sides[1])]
            {
                let perplexity = |logps: &[f64]| (-logps.iter().sum::<f64>() / tokens.iter().sum::<f64>()).exp();
                base.push(name, perplexity(before));
                policy.push(name, perplexity(after));
            }
            found.estimate(&sides, &Clusters::of(clusters), bootstrap);
        }
        found.base = base;
        found.policy = policy;
        found
    }

    fn estimate(&mut self, sides: &[(Vec<f64>, Vec<f64>, Vec<f64>); 2], clusters: &Clusters, bootstrap: Bootstrap) {
        let share = |holds: bool| f64::from(u8::from(holds));
        let positive: Vec<f64> = self.margins.iter().map(|&margin| share(margin > 0.0)).collect();
        let prefers = |logps: &[PairLogps]| logps.iter().map(|pair| share(pair.margin() > 0.0)).collect::<Vec<_>>();
        let (before, after) = (prefers(&self.base_logps), prefers(&self.policy_logps));
        self.intervals.push(("rewards/accuracies", bootstrap.share(&positive, clusters)));
        self.intervals.push(("rewards/margins", bootstrap.mean(&self.margins, clusters)));
        self.intervals.push(("logps/accuracies", bootstrap.share(&after, clusters)));
        let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
        self.differences.push(("logps/accuracies", bootstrap.mean(&minus(&after, &before), clusters)));
        for (name, of_token, (before, after, tokens)) in [
            ("logps/chosen", "logps/chosen_per_token", &sides[0]),
            ("logps/rejected", "logps/rejected_per_token", &sides[1]),
        ] {
            let gained = minus(after, before);
            self.differences.push((name, bootstrap.mean(&gained, clusters)));
            self.differences.push((of_token, bootstrap.ratio(&gained, tokens, clusters)));
        }
    }

    /// Of the policy, by metric.
    #[must_use]
    pub fn interval(&self, name: &str) -> Option<&Estimate> {
        self.intervals.iter().find(|(known, _)| *known == name).map(|(_, estimate)| estimate)
    }

    /// Policy minus base, by metric.
    #[must_use]
    pub fn difference(&self, name: &str) -> Option<&Estimate> {
        self.differences.iter().find(|(known, _)| *known == name).map(|(_, estimate)| estimate)
    }

    /// How much more probable the chosen answers are, by base and by policy.
    #[must_use]
    pub fn histogram(&self, bins: usize) -> Option<Histogram> {
        let margins = |logps: &[PairLogps]| logps.iter().map(PairLogps::margin).collect::<Vec<_>>();
        Histogram::new(&margins(&self.base_logps), &margins(&self.policy_logps), bins)
    }

    /// Intervals and differences by metric, as JSON objects.
    #[must_use]
    pub fn estimates(&self) -> (Value, Value) {
        let object = |estimates: &[(&'static str, Estimate)]| {
            Value::Object(
                estimates.iter().map(|(name, estimate)| ((*name).to_owned(), json!(estimate))).collect::<Map<_, _>>(),
            )
        };
        (object(&self.intervals), object(&self.differences))
    }
}

/// Counts in bins of one width, of base and policy over the same range.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// Ends of the bins, one more than there are bins. What lies beyond is counted in the outer ones.
    pub edges: Vec<f64>,
    /// Pairs in each bin, by the base.
    pub base: Vec<usize>,
    /// Pairs in each bin, by the policy.
    pub policy: Vec<usize>,
}

impl Histogram {
    /// Over the middle 98 % of all values, widened to whole bins with an edge at 0, which is what divides right from wrong.
    /// None of no values.
    #[must_use]
    pub fn new(base: &[f64], policy: &[f64], bins: usize) -> Option<Self> {
        let mut all: Vec<f64> = base.iter().chain(policy).copied().filter(|x| x.is_finite()).collect();
        if all.is_empty() || bins == 0 {
            return None;
        }
        all.sort_by(f64::total_cmp);
        let (low, high) = (quantile(&all, 0.01).min(0.0), quantile(&all, 0.99).max(0.0));
        let width = nice((high - low) / bins as f64);
        let (first, last) = ((low / width).floor() as i64, (high / width).ceil() as i64);
        let last = last.max(first + 1);
        let edges: Vec<f64> = (first..=last).map(|edge| edge as f64 * width).collect();
        let count = |values: &[f64]| {
            let mut counts = vec![0; edges.len() - 1];
            for value in values.iter().filter(|x| x.is_finite()) {
                let bin = ((value / width).floor() as i64 - first).clamp(0, counts.len() as i64 - 1);
                counts[bin as usize] += 1;
            }
            counts
        };
        Some(Self { base: count(base), policy: count(policy), edges })
    }
}

/// The next number of 1, 2, 2.5 or 5 times a power of ten.
fn nice(width: f64) -> f64 {
    if !(width > 0.0 && width.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf(width.log10().floor());
    let round = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|round| round * power >= width * (1.0 - 1e-9));
    round.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(chosen: [f64; 2], rejected: [f64; 2]) -> Scored {
        let sequence = |[logp, reference]: [f64; 2]| Some(Sequence { logp, reference: Some(reference), tokens: 4 });
        Scored { prompt: None, chosen: sequence(chosen), rejected: sequence(rejected) }
    }

    #[test]
    fn margins_and_differences_are_those_of_the_pairs() {
        let base = vec![scored([-4.0, -4.0], [-8.0, -8.0]), scored([-6.0, -6.0], [-2.0, -2.0])];
        let policy = vec![scored([-3.0, -4.0], [-9.0, -8.0]), scored([-5.0, -6.0], [-6.0, -2.0])];
        let bootstrap = Bootstrap { draws: 100, seed: 0 };
        let loss = Loss::Dpo(Dpo::default());
        let of = |scored: &Vec<Scored>| (Metrics::default(), scored.clone());
        let pairs = Pairs::new(&loss, of(&base), of(&policy), &[0, 1], bootstrap);
        // β ((−3 + 4) − (−9 + 8)) and β ((−5 + 6) − (−6 + 2))
        assert!((pairs.margins[0] - 0.2).abs() < 1e-12 && (pairs.margins[1] - 0.5).abs() < 1e-12);
        assert_eq!(pairs.interval("rewards/accuracies").map(|e| e.estimate), Some(1.0));
        assert_eq!(pairs.difference("logps/chosen").map(|e| e.estimate), Some(1.0));
        assert_eq!(pairs.difference("logps/chosen_per_token").map(|e| e.estimate), Some(0.25));
        assert_eq!(pairs.difference("logps/rejected").map(|e| e.estimate), Some(-2.5));
        assert_eq!(pairs.difference("logps/accuracies").map(|e| e.estimate), Some(0.5));
        assert_eq!(pairs.policy.get("perplexity/chosen"), Some(1f64.exp()));
        assert_eq!(pairs.base.get("perplexity/chosen"), Some((10f64 / 8.0).exp()));
        // two pairs on one prompt say no more than one
        let together = Pairs::new(&loss, of(&base), of(&policy), &[5, 5], bootstrap);
        assert_eq!(together.interval("rewards/margins").map(|e| e.standard_error), Some(0.0));
    }

    #[test]
    fn labelled_examples_have_no_margins() {
        let half =
            |logp| Scored { chosen: Some(Sequence { logp, reference: Some(-1.0), tokens: 1 }), ..Scored::default() };
        let loss = Loss::Dpo(Dpo::default());
        let of = |logp| (Metrics::default(), vec![half(logp)]);
        let pairs = Pairs::new(&loss, of(-1.0), of(-0.5), &[0], Bootstrap::default());
        assert_eq!((pairs.count, pairs.interval("rewards/margins"), pairs.histogram(10)), (0, None, None));
    }

    #[test]
    fn bins_have_an_edge_at_zero_and_count_everything() {
        let (base, policy) = ([-3.0, -0.1, 0.2, 40.0], [0.0, 5.0, 9.0, f64::NAN]);
        let histogram = Histogram::new(&base, &policy, 10).expect("there are values");
        assert!(histogram.edges.contains(&0.0) && histogram.edges.is_sorted());
        assert_eq!((histogram.base.iter().sum::<usize>(), histogram.policy.iter().sum::<usize>()), (4, 3));
        let zero = histogram.edges.iter().position(|edge| *edge == 0.0).expect("there is one");
        assert_eq!(histogram.base[..zero].iter().sum::<usize>(), 2);
        assert_eq!(histogram.policy[zero..].iter().sum::<usize>(), 3);
        // all the same
        let flat = Histogram::new(&[0.0; 3], &[0.0; 3], 10).expect("there are values");
        assert_eq!((flat.base, flat.edges), (vec![3], vec![0.0, 1.0]));
        assert_eq!([0.3, 2.0, 21.0, 0.06].map(nice), [0.5, 2.0, 25.0, 0.1]);
    }
}
