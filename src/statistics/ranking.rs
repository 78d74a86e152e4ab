//! Three systems or more on one scale.

use nalgebra::{DMatrix, DVector};
use serde::Serialize;

use super::interval::quantile;
use super::{Bootstrap, sigmoid};

/// Points of the Elo scale for a unit of β: `400 / ln 10`.
const ELO: f64 = 400.0 / std::f64::consts::LN_10;
/// A fit for each draw.
const DRAWS: usize = 1000;

/// One comparison of two systems, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// One system.
    pub one: usize,
    /// The other.
    pub other: usize,
    /// Of `one` against `other`, in `[0, 1]`.
    pub score: f64,
    /// The prompt, or group of prompts, by number: all comparisons of one are drawn together.
    pub cluster: usize,
}

/// Where a system stands.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rating {
    /// In logits above system 0.
    pub beta: f64,
    /// `400 β / ln 10`, above system 0.
    pub elo: f64,
    /// Of 95 %.
    pub elo_interval: [f64; 2],
    /// The win rate against system 0 that the scale implies, `σ(β)`.
    pub against_first: f64,
    /// Of 95 %.
    pub against_first_interval: [f64; 2],
}

/// Strengths `β` of `systems` systems by Bradley & Terry (1952), with scores as fractional wins:
///
/// ```text
/// max Σ_ij w_ij log σ(β_i − β_j),   β_0 = 0
/// ```
///
/// and intervals over resampled clusters, one draw for all systems. None where some systems never lost to the others, or
/// were never compared with them: then no finite strengths are the likeliest (Ford 1957). A draw may still be such; it
/// widens the interval by as far as a hundred steps go. Of two systems this is the logit of the win rate, and says no more.
#[must_use]
pub fn bradley_terry(systems: usize, comparisons: &[Comparison], bootstrap: Bootstrap) -> Option<Vec<Rating>> {
    let clusters = comparisons.iter().map(|comparison| comparison.cluster + 1).max()?;
    let wins = |times: &dyn Fn(usize) -> f64| {
        let mut wins = DMatrix::<f64>::zeros(systems, systems);
        for &Comparison { one, other, score, cluster } in comparisons {
            wins[(one, other)] += times(cluster) * score;
            wins[(other, one)] += times(cluster) * (1.0 - score);
        }
        wins
    };
    let all = wins(&|_| 1.0);
    if !strongly_connected(&all) {
        return None;
    }
    let best = fit(&all, DVector::zeros(systems));
    let mut draws = vec![Vec::new(); systems];
    bootstrap.of_at_most(DRAWS).each(clusters, |times| {
        let drawn = fit(&wins(&|cluster| times[cluster]), best.clone());
        draws.iter_mut().zip(drawn.iter()).for_each(|(values, &beta)| values.push(beta));
    });
    let ratings = best.iter().zip(draws).map(|(&beta, mut draws)| {
        draws.sort_by(f64::total_cmp);
        let interval = [quantile(&draws, 0.025), quantile(&draws, 0.975)];
        Rating {
            beta,
            elo: ELO * beta,
            elo_interval: interval.map(|beta| ELO * beta),
            against_first: sigmoid(beta),
            against_first_interval: interval.map(sigmoid),
        }
    });
    Some(ratings.collect())
}

/// Newton's method; the Hessian is the Laplacian of the comparisons, weighted by how open they are.
fn fit(wins: &DMatrix<f64>, mut beta: DVector<f64>) -> DVector<f64> {
    let systems = wins.nrows();
    for _ in 0..100 {
        let mut gradient = DVector::<f64>::zeros(systems);
        let mut hessian = DMatrix::<f64>::zeros(systems, systems);
        for i in 0..systems {
            for j in 0..systems {
                let p = sigmoid(beta[i] - beta[j]);
                let slope = wins[(i, j)] * (1.0 - p);
                gradient[i] += slope;
                gradient[j] -= slope;
                let curve = wins[(i, j)] * p * (1.0 - p);
                for (a, b, sign) in [(i, i, 1.0), (j, j, 1.0), (i, j, -1.0), (j, i, -1.0)] {
                    hessian[(a, b)] += sign * curve;
                }
            }
        }
        // β_0 stays 0; the rest is regular, but for systems that a draw leaves without a comparison
        let free = systems - 1;
        let reduced = hessian.view((1, 1), (free, free)) + DMatrix::identity(free, free) * 1e-12;
        let slope = gradient.rows(1, free).clone_owned();
        let Some(inverse) = reduced.cholesky() else { break };
        let mut step = inverse.solve(&slope);
        let longest = step.amax();
        if longest > 1.0 {
            // whole steps far from the optimum overshoot
            step /= longest;
        }
        let mut moved = beta.rows_mut(1, free);
        moved += &step;
        if step.amax() < 1e-12 {
            break;
        }
    }
    beta
}

/// Whether every system has, through others, some win against every other one.
fn strongly_connected(wins: &DMatrix<f64>) -> bool {
    let reaches_all = |beaten: &dyn Fn(usize, usize) -> bool| {
        let (mut seen, mut open) = (vec![false; wins.nrows()], vec![0]);
        while let Some(i) = open.pop() {
            if !std::mem::replace(&mut seen[i], true) {
                open.extend((0..wins.nrows()).filter(|&j| beaten(i, j)));
            }
        }
        seen.iter().all(|&seen| seen)
    };
    wins.nrows() > 1 && reaches_all(&|i, j| wins[(i, j)] > 0.0) && reaches_all(&|i, j| wins[(j, i)] > 0.0)
}
