//! From what a judge said to a score of the prompt.

use serde::{Deserialize, Serialize};

/// Which answer stands first where a judge reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The policy's answer is A.
    PolicyFirst,
    /// The policy's answer is B.
    PolicySecond,
}

impl Order {
    /// Both, as they are asked.
    pub const BOTH: [Self; 2] = [Self::PolicyFirst, Self::PolicySecond];

    /// 1 or 2, as files have it.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::PolicyFirst => 1,
            Self::PolicySecond => 2,
        }
    }

    /// The policy's vote, from the vote `a` for what stood as A: `a`, or `1 − a`.
    #[must_use]
    pub fn policy(self, a: f64) -> f64 {
        match self {
            Self::PolicyFirst => a,
            Self::PolicySecond => 1.0 - a,
        }
    }
}

/// What a judge said about two answers that it saw as A and B.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// `A>>B`
    MuchA,
    /// `A>B`
    A,
    /// `A=B`
    Tie,
    /// `B>A`
    B,
    /// `B>>A`
    MuchB,
}

/// What a verdict counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// A win is 1, a tie ½, a loss 0, by whatever distance.
    #[default]
    Three,
    /// `>>` is 1, `>` is ¾: one vote a verdict, where Arena-Hard counts `>>` three times.
    Five,
}

impl Verdict {
    /// As files have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MuchA => "A>>B",
            Self::A => "A>B",
            Self::Tie => "A=B",
            Self::B => "B>A",
            Self::MuchB => "B>>A",
        }
    }

    /// The vote for A, in `[0, 1]`.
    #[must_use]
    pub fn vote(self, scale: Scale) -> f64 {
        match (self, scale) {
            (Self::MuchA, _) | (Self::A, Scale::Three) => 1.0,
            (Self::A, Scale::Five) => 0.75,
            (Self::Tie, _) => 0.5,
            (Self::B, Scale::Five) => 0.25,
            (Self::MuchB, _) | (Self::B, Scale::Three) => 0.0,
        }
    }
}

/// The vote for A of a judge that answers with one token, from the log-probs of the likeliest tokens in its place:
///
/// ```text
/// v = p_A / (p_A + p_B),   p_L = Σ exp(logp) over tokens that say L once white space is gone
/// ```
///
/// which is alpaca_eval's weighted preference. None where the two labels have less than half of the probability between
/// them: the judge wanted to say something else.
#[must_use]
pub fn label_share<'t>(tokens: impl IntoIterator<Item = (&'t str, f64)>, a: &str, b: &str) -> Option<f64> {
    let (mut p_a, mut p_b) = (0.0, 0.0);
    for (text, logp) in tokens {
        match text.trim() {
            label if label == a => p_a += logp.exp(),
            label if label == b => p_b += logp.exp(),
            _ => {}
        }
    }
    // not `<`: what is not a number is no vote either
    (p_a + p_b >= 0.5 && (p_a + p_b).is_finite()).then(|| p_a / (p_a + p_b))
}

/// How a comparison came out for the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Above ½.
    Win,
    /// Below ½.
    Loss,
    /// ½.
    Tie,
}

impl Outcome {
    /// Its row and column in tables: win, loss, tie.
    pub(super) fn place(self) -> usize {
        match self {
            Self::Win => 0,
            Self::Loss => 1,
            Self::Tie => 2,
        }
    }

    /// Of a score or vote.
    #[must_use]
    pub fn of(score: f64) -> Self {
        match score {
            win if win > 0.5 => Self::Win,
            loss if loss < 0.5 => Self::Loss,
            _ => Self::Tie,
        }
    }
}

/// The policy's votes on one prompt, one an order: `1` is a win, `0` a loss. A missing one was not asked or not understood;
/// it is never a tie.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Votes {
    /// With the policy's answer first.
    pub first: Option<f64>,
    /// With the policy's answer second, already turned to the policy's view by [`Order::policy`].
    pub second: Option<f64>,
}

impl Votes {
    /// The score of the prompt, the mean of both orders; none where one is missing.
    #[must_use]
    pub fn score(&self) -> Option<f64> {
        Some(f64::midpoint(self.first?, self.second?))
    }

    /// The score where one order is enough.
    #[must_use]
    pub fn score_of_any(&self) -> Option<f64> {
        self.score().or(self.first).or(self.second)
    }

    /// How each order came out, where both are there.
    #[must_use]
    pub fn outcomes(&self) -> Option<[Outcome; 2]> {
        Some([Outcome::of(self.first?), Outcome::of(self.second?)])
    }

    /// MT-bench's rule: 1 or 0 only where both orders name the same winner, else ½.
    #[must_use]
    pub fn conservative(&self) -> Option<f64> {
        Some(match self.outcomes()? {
            [Outcome::Win, Outcome::Win] => 1.0,
            [Outcome::Loss, Outcome::Loss] => 0.0,
            _ => 0.5,
        })
    }
}

/// How many prompts were won, tied and lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcomes {
    /// Scores above ½.
    pub wins: usize,
    /// Scores of ½.
    pub ties: usize,
    /// Scores below ½.
    pub losses: usize,
}

impl Outcomes {
    /// Counts scores.
    #[must_use]
    pub fn of(scores: &[f64]) -> Self {
        let mut counts = Self::default();
        for &score in scores {
            match Outcome::of(score) {
                Outcome::Win => counts.wins += 1,
                Outcome::Tie => counts.ties += 1,
                Outcome::Loss => counts.losses += 1,
            }
        }
        counts
    }
}
