//! Which values are usual after preference tuning, and what others may mean.
//!
//! These are rules of thumb of people who tune models, not laws; a verdict is a reason to look, and its sentence says at
//! what.

use serde::Serialize;

use crate::statistics::Estimate;

/// Reward accuracy on held-out pairs below which little was learned.
pub const ACCURACY_LOW: f64 = 0.6;
/// Above which the pairs are suspiciously easy.
pub const ACCURACY_SUSPECT: f64 = 0.95;
/// KL(policy ‖ base) in nats an answer, above which the policy is far from what the base knows.
pub const KL_FAR: f64 = 10.0;
/// Above which it is likely to have forgotten, or to game its pairs.
pub const KL_TOO_FAR: f64 = 15.0;
/// Nats that a token of the chosen answers may lose: a tenth more perplexity.
pub const CHOSEN_DROP: f64 = 0.1;
/// Nats from which on they collapse: 65 % more perplexity.
pub const CHOSEN_COLLAPSE: f64 = 0.5;
/// The name of the check of [`length`], for who has another one of the same.
pub const LENGTH: &str = "length of answers, times the base's";
/// Times that answers may grow, or shrink, without a second look.
pub const LENGTH_DRIFT: f64 = 1.5;
/// Times from which on length has run away.
pub const LENGTH_EXPLODES: f64 = 2.0;
/// Share of answers that may be cut at the limit.
pub const TRUNCATED: f64 = 0.05;
/// Share of repeated 4-grams in an answer from which on it is stuck.
pub const REPEATED: f64 = 0.2;
/// A win rate over the base that is usual after one round.
pub const WIN_RATE: [f64; 2] = [0.55, 0.65];
/// A win rate that is rarely honest.
pub const WIN_RATE_SUSPECT: f64 = 0.9;

/// What to make of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it is after a run that went well.
    Good,
    /// Worth a look.
    Watch,
    /// Something is wrong: the result is probably not what was wanted.
    Bad,
}

impl Level {
    /// In a table.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Watch => "watch",
            Self::Bad => "bad",
        }
    }
}

/// A value beside what is usual.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What was measured.
    pub name: String,
    /// The value.
    pub value: f64,
    /// What is usual, in words.
    pub healthy: String,
    /// What to make of it.
    pub verdict: Level,
    /// Why, in a sentence.
    pub why: String,
}

impl Check {
    fn new(name: &str, value: f64, healthy: &str, (verdict, why): (Level, &str)) -> Self {
        Self { name: name.to_owned(), value, healthy: healthy.to_owned(), verdict, why: why.to_owned() }
    }
}

use Level::{Bad, Good, Watch};

/// Share of held-out pairs whose chosen answer has the higher reward.
#[must_use]
pub fn accuracy(value: f64) -> Check {
    let judged = match value {
        x if x > ACCURACY_SUSPECT => (
            Watch,
            "so good that the pairs may be told apart by something trivial, such as length or a phrase, or were trained on",
        ),
        x if x >= 0.7 => (Good, "the policy tells better from worse answers on pairs it was not trained on"),
        x if x >= ACCURACY_LOW => {
            (Good, "above chance; more data, more updates or a higher learning rate may bring more")
        }
        x if x >= 0.5 => (Watch, "hardly above chance: too few updates, a low learning rate, or noisy pairs"),
        _ => (Bad, "below chance: chosen and rejected may be swapped, or training has diverged"),
    };
    Check::new("reward accuracy", value, "0.70 to 0.80", judged)
}

/// Mean difference of the rewards of chosen and rejected.
#[must_use]
pub fn margin(margin: &Estimate) -> Check {
    let judged = match margin.against(0.0) {
        std::cmp::Ordering::Greater => (Good, "chosen answers have gained on rejected ones"),
        std::cmp::Ordering::Equal => {
            (Watch, "the interval has 0 in it: these pairs do not show that anything was learned")
        }
        std::cmp::Ordering::Less => (Bad, "rejected answers have gained on chosen ones"),
    };
    Check::new("reward margin", margin.estimate, "above 0", judged)
}

/// What a token of the chosen answers has gained in log-prob, in nats, where the margin is `margin`.
#[must_use]
pub fn chosen_logps(gain: f64, margin: f64) -> Check {
    let judged = match gain {
        x if x >= 0.0 => (Good, "the policy finds the chosen answers at least as probable as the base does"),
        x if x > -CHOSEN_DROP => {
            (Good, "a little less probable than before, which is usual: DPO only asks for the difference")
        }
        x if x > -CHOSEN_COLLAPSE => (
            Watch,
            "the margin grows by making both answers less probable: a higher beta, a lower learning rate or an SFT term \
             (orpo) keeps the chosen ones",
        ),
        _ if margin > 0.0 => (
            Bad,
            "the margin is up while the chosen answers have collapsed: the policy has learned what not to say, and nothing \
             to say instead",
        ),
        _ => (Bad, "the policy has forgotten the chosen answers"),
    };
    Check::new("log-prob of a chosen token, change", gain, "above -0.1", judged)
}

/// KL(policy ‖ base) in nats an answer.
#[must_use]
pub fn kl(total: f64) -> Check {
    let judged = match total {
        x if x <= 0.0 => (Watch, "the policy answers exactly as the base: was the right adapter loaded?"),
        x if x <= KL_FAR => (Good, "near enough to the base to keep what it knows"),
        x if x <= KL_TOO_FAR => {
            (Watch, "far from the base: read some answers, and check what else may have changed with --choices")
        }
        _ => (
            Bad,
            "so far from the base that it may have forgotten, or games its pairs: a higher beta or fewer updates",
        ),
    };
    Check::new("KL from the base, nats an answer", total, "up to 10", judged)
}

/// Mean tokens of answers: of the policy, of the base, and of the chosen ones of the data.
#[must_use]
pub fn length(policy: f64, base: f64, chosen: Option<f64>) -> Check {
    let ratio = policy / base.max(1.0);
    let within = |times: f64, of: f64| policy <= times * of.max(1.0) && policy * times >= of;
    let near = |times: f64| within(times, base) || chosen.is_some_and(|chosen| within(times, chosen));
    let judged = match () {
        () if within(LENGTH_DRIFT, base) => (Good, "answers are about as long as before"),
        () if near(LENGTH_DRIFT) => (Good, "answers have become about as long as the chosen ones"),
        () if near(LENGTH_EXPLODES) => (
            Watch,
            "length has drifted: check that chosen answers are not simply the longer (or shorter) ones, and judge at equal length",
        ),
        () if ratio > 1.0 => (Bad, "length has exploded: DPO rewards length where the chosen answers are longer"),
        () => (Bad, "answers have shrunk away from both the base's and the chosen ones"),
    };
    Check::new(LENGTH, ratio, "0.67 to 1.5", judged)
}

/// Share of answers that did not end within the limit: of the policy and of the base.
#[must_use]
pub fn truncated(policy: f64, base: f64) -> Check {
    let judged = match policy {
        x if x <= TRUNCATED => (Good, "answers end by themselves"),
        x if x <= base + TRUNCATED => {
            (Watch, "many answers are cut, the base's as well: raise --max-new-tokens to see their ends")
        }
        x if x <= 0.5 => (Watch, "more answers than the base's do not end within --max-new-tokens"),
        _ => {
            (Bad, "most answers do not end, far more than the base's: the policy may have lost its end-of-text token")
        }
    };
    Check::new("answers cut at the limit", policy, "up to 0.05", judged)
}

/// Mean share of 4-grams that an answer has said before: of the policy and of the base.
#[must_use]
pub fn repeated(policy: f64, base: f64) -> Check {
    let judged = match policy {
        x if x <= base + 0.05 => (Good, "answers repeat themselves no more than the base's"),
        x if x <= REPEATED => (Watch, "answers repeat themselves more than the base's"),
        _ => (Bad, "answers are stuck in loops that the base's are not in"),
    };
    Check::new("repeated 4-grams", policy, "as the base", judged)
}

/// Accuracy on other questions: how much it changed, and how probable that is by chance.
#[must_use]
pub fn choices(name: &str, difference: f64, p: f64) -> Check {
    let judged = match difference {
        x if x < 0.0 && p < 0.05 => {
            (Bad, "the policy answers fewer questions than the base, more than chance explains")
        }
        x if x < -0.02 => {
            (Watch, "fewer questions than the base, though chance may explain it: more questions would tell")
        }
        x if x > 0.0 && p < 0.05 => (Good, "more questions than the base"),
        _ => (Good, "no loss that these questions show"),
    };
    Check { name: format!("accuracy on {name}, change"), ..Check::new("", difference, "not below 0", judged) }
}

/// A win rate over the base with its interval of 95 %.
#[must_use]
pub fn win_rate(rate: f64, [low, high]: [f64; 2]) -> Check {
    let judged = match rate {
        x if x > WIN_RATE_SUSPECT => (
            Watch,
            "so high that the judge may go by something trivial: look at its reasons and at the rate at equal length",
        ),
        _ if low > 0.5 => (Good, "better than the base, more than chance explains"),
        _ if high < 0.5 => (Bad, "worse than the base, more than chance explains"),
        _ => (Watch, "the interval has 0.5 in it: these prompts do not tell which is better"),
    };
    let [from, to] = WIN_RATE.map(|share| 100.0 * share);
    Check::new("win rate over the base", rate, &format!("{from:.0} to {to:.0} %"), judged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::Method;

    fn estimate(estimate: f64, interval: [f64; 2]) -> Estimate {
        Estimate { estimate, standard_error: 0.0, interval, method: Method::Bootstrap, draws: 0, seed: 0 }
    }

    #[test]
    fn verdicts_follow_the_thresholds() {
        let accuracies = [0.3, 0.55, 0.65, 0.75, 0.95, 0.97].map(|x| accuracy(x).verdict);
        assert_eq!(accuracies, [Bad, Watch, Good, Good, Good, Watch]);
        assert_eq!([0.0, 3.0, 10.0, 12.0, 15.1].map(|x| kl(x).verdict), [Watch, Good, Good, Watch, Bad]);
        assert_eq!([0.1, -0.05, -0.3, -2.0].map(|x| chosen_logps(x, 1.0).verdict), [Good, Good, Watch, Bad]);
        assert!(chosen_logps(-2.0, 1.0).why.contains("margin is up"));
        assert!(!chosen_logps(-2.0, -1.0).why.contains("margin is up"));
        let margins =
            [[0.1, 0.3], [-0.1, 0.3], [-0.3, -0.1]].map(|interval| margin(&estimate(0.0, interval)).verdict);
        assert_eq!(margins, [Good, Watch, Bad]);
        let rates = [(0.6, [0.55, 0.65]), (0.52, [0.48, 0.56]), (0.4, [0.3, 0.45]), (0.95, [0.9, 0.98])];
        assert_eq!(rates.map(|(x, interval)| win_rate(x, interval).verdict), [Good, Watch, Bad, Watch]);
        let changes = [(-0.1, 0.001), (-0.03, 0.3), (-0.001, 1.0), (0.1, 0.001)];
        assert_eq!(changes.map(|(d, p)| choices("x", d, p).verdict), [Bad, Watch, Good, Good]);
    }

    #[test]
    fn length_is_held_to_the_base_and_to_what_was_chosen() {
        assert_eq!(length(110.0, 100.0, None).verdict, Good);
        assert_eq!(length(180.0, 100.0, None).verdict, Watch);
        assert_eq!(length(300.0, 100.0, Some(120.0)).verdict, Bad);
        // twice as long as the base, as the data asks for; and a third, likewise
        assert_eq!(length(200.0, 100.0, Some(210.0)).verdict, Good);
        assert_eq!(length(30.0, 100.0, Some(33.0)).verdict, Good);
        assert_eq!(length(30.0, 100.0, Some(100.0)).verdict, Bad);
        assert_eq!(length(0.0, 0.0, None).verdict, Good);
    }

    #[test]
    fn a_base_that_does_not_end_either_excuses_the_policy() {
        assert_eq!(truncated(0.9, 0.9).verdict, Watch);
        assert_eq!(truncated(0.9, 0.1).verdict, Bad);
        assert_eq!(repeated(0.3, 0.28).verdict, Good);
        assert_eq!(repeated(0.3, 0.02).verdict, Bad);
    }
}
