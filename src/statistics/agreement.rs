//! Two judges beside each other, and what a judge goes by.

use serde::Serialize;

use super::{Outcome, kappa};

/// How far two judges agree on the same prompts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// Prompts that both have scored.
    pub prompts: usize,
    /// Share of prompts on which both say win, both tie or both loss.
    pub agreement: f64,
    /// The same over prompts on which neither says tie; none where there is no such prompt.
    pub agreement_without_ties: Option<f64>,
    /// Cohen's κ of win, loss and tie.
    pub kappa: Option<f64>,
    /// Spearman's rank correlation of the scores.
    pub spearman: Option<f64>,
}

impl Agreement {
    /// Of two judges' scores of the same prompts; none of no prompts.
    #[must_use]
    pub fn of(one: &[f64], other: &[f64]) -> Option<Self> {
        let n = one.len().min(other.len());
        if n == 0 {
            return None;
        }
        let mut table = [[0; 3]; 3];
        let place = |score| Outcome::of(score).place();
        one.iter().zip(other).for_each(|(&one, &other)| table[place(one)][place(other)] += 1);
        let decisive = table[0][0] + table[0][1] + table[1][0] + table[1][1];
        Some(Self {
            prompts: n,
            agreement: (0..3).map(|i| table[i][i]).sum::<usize>() as f64 / n as f64,
            agreement_without_ties: (decisive > 0).then(|| (table[0][0] + table[1][1]) as f64 / decisive as f64),
            kappa: kappa(&table),
            spearman: spearman(one, other),
        })
    }
}

/// Spearman's rank correlation: Pearson's, of ranks, equal values sharing the mean of theirs. None where one side is
/// constant.
#[must_use]
pub fn spearman(one: &[f64], other: &[f64]) -> Option<f64> {
    let n = one.len().min(other.len());
    let (one, other) = (ranks(&one[..n]), ranks(&other[..n]));
    let centre = (n as f64 + 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - centre) * (b - centre)).sum::<f64>();
    let scale = (product(&one, &one) * product(&other, &other)).sqrt();
    (scale > 0.0).then(|| product(&one, &other) / scale)
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    for equal in order.chunk_by(|&a, &b| values[a] == values[b]) {
        // `equal` is a part of `order`, whose place in it is the rank
        let first = order.iter().position(|i| *i == equal[0]).unwrap_or(0);
        equal.iter().for_each(|&i| ranks[i] = first as f64 + (equal.len() as f64 + 1.0) / 2.0);
    }
    ranks
}

/// alpaca_eval's share of prompts won by the longer answer, over prompts with a winner whose answers differ by more than
/// 30 characters; none where there is no such prompt. Above ½, either the judge likes length or the better answers are
/// longer: it does not tell which.
#[must_use]
pub fn prefers_longer(scores: &[f64], policy: &[usize], against: &[usize]) -> Option<f64> {
    const SIGNIFICANT: usize = 30;
    let policy_has = policy.iter().zip(against).map(|(&p, &a)| p > a + SIGNIFICANT);
    let against_has = policy.iter().zip(against).map(|(&p, &a)| a > p + SIGNIFICANT);
    prefers_with(scores, policy_has, against_has)
}

/// Share of prompts won by the answer that has something, a list say, over prompts with a winner where one answer has it
/// and the other has not; none where there is no such prompt.
#[must_use]
pub fn prefers_with(
    scores: &[f64],
    policy_has: impl IntoIterator<Item = bool>,
    against_has: impl IntoIterator<Item = bool>,
) -> Option<f64> {
    let (mut with, mut all) = (0, 0usize);
    for ((&score, policy), against) in scores.iter().zip(policy_has).zip(against_has) {
        let won = Outcome::of(score);
        if policy != against && won != Outcome::Tie {
            all += 1;
            with += usize::from((won == Outcome::Win) == policy);
        }
    }
    (all > 0).then(|| with as f64 / all as f64)
}
