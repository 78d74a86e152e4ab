//! Win rates as they would be if both answers had the same length, or the same style.

use nalgebra::{DMatrix, DVector};
use serde::Serialize;

use super::interval::{mean, quantile, standard_deviation};
use super::{Bootstrap, Clusters, Style, sigmoid, softplus};

/// The ridge λ on the coefficient of length. So small that it only matters where a judge goes by length alone and the
/// coefficient would grow without end: at 1 a judge that follows length was corrected by half of what it should be.
pub const LENGTH_RIDGE: f64 = 0.01;

/// A fit costs a hundred times a mean; a thousand draws put the ends of an interval to a tenth of its width.
const DRAWS: usize = 1000;

/// The win rate at equal length. As in AlpacaEval 2 (Dubois et al. 2024, <https://arxiv.org/abs/2404.04475>), for any set of
/// prompts: scores `s_i` are explained by how much longer the policy's answer is, Δ_i, and what is left at Δ = 0 is the
/// controlled win rate,
///
/// ```text
/// logit P_i = θ + φ x_i,   x_i = tanh(Δ_i / sd(Δ)),   Δ_i = length(policy) − length(against)
/// min Σ_i −[s_i log P_i + (1 − s_i) log(1 − P_i)] + ½ λ φ²
/// estimate = σ(θ)
/// ```
///
/// `x` is not centred: the question is what happens at equal length, not at the mean difference. AlpacaEval has the sign of
/// Δ, and so of φ, the other way round. Without its published difficulties of 805 instructions there is no γ.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LengthControlled {
    /// `σ(θ)`
    pub estimate: f64,
    /// Of the bootstrap's draws.
    pub standard_error: f64,
    /// Of 95 %, fitted anew for each draw of prompts.
    pub interval: [f64; 2],
    /// The policy's lead at equal length, in logits.
    pub theta: f64,
    /// What length adds, in logits: above 0 the judge prefers the longer answer.
    pub phi: f64,
    /// Of 95 %.
    pub phi_interval: [f64; 2],
    /// Plain win rate minus the controlled one: the part that length explains.
    pub explained: f64,
    /// sd(Δ), in the unit of the lengths.
    pub sd: f64,
    /// λ
    pub ridge: f64,
    /// Of the bootstrap.
    pub draws: usize,
    /// Of the bootstrap.
    pub seed: u64,
}

/// The win rate at equal length of `scores`, with answers of these lengths (characters, as AlpacaEval has them). None where
/// all answers differ by the same length: then nothing can be told apart.
#[must_use]
pub fn length_controlled(
    scores: &[f64],
    policy: &[usize],
    against: &[usize],
    clusters: &Clusters,
    ridge: f64,
    bootstrap: Bootstrap,
) -> Option<LengthControlled> {
    let longer: Vec<f64> = policy.iter().zip(against).map(|(&p, &a)| p as f64 - a as f64).collect();
    let sd = standard_deviation(&longer);
    if sd == 0.0 {
        return None;
    }
    let feature = longer.iter().map(|d| (d / sd).tanh()).collect();
    let fitted = Fitted::of(scores, &[feature], clusters, ridge, bootstrap);
    Some(LengthControlled {
        estimate: fitted.estimate,
        standard_error: fitted.standard_error,
        interval: fitted.interval,
        theta: fitted.theta,
        phi: fitted.phi[0],
        phi_interval: fitted.phi_intervals[0],
        explained: mean(scores) - fitted.estimate,
        sd,
        ridge,
        draws: fitted.draws,
        seed: bootstrap.seed,
    })
}

/// The win rate at equal style: as [`LengthControlled`], with the features of Arena-Hard's style control, divided by their
/// standard deviations and not centred. (Centred, as Arena-Hard does among many models, two models' win rate keeps what the
/// mean difference in style has brought.)
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StyleControlled {
    /// `σ(θ)`
    pub estimate: f64,
    /// Of the bootstrap's draws.
    pub standard_error: f64,
    /// Of 95 %.
    pub interval: [f64; 2],
    /// The policy's lead at equal style, in logits.
    pub theta: f64,
    /// What each feature adds, those that differ between prompts.
    pub coefficients: Vec<Coefficient>,
    /// Plain win rate minus the controlled one.
    pub explained: f64,
    /// λ
    pub ridge: f64,
    /// Of the bootstrap.
    pub draws: usize,
    /// Of the bootstrap.
    pub seed: u64,
}

/// What a feature adds, in logits for a standard deviation of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Coefficient {
    /// `length`, `headers`, `lists` or `bold`.
    pub feature: &'static str,
    /// Above 0 the judge prefers more of it.
    pub phi: f64,
    /// Of 95 %.
    pub interval: [f64; 2],
}

/// The win rate at equal style of `scores`. None where no feature differs between prompts.
#[must_use]
pub fn style_controlled(
    scores: &[f64],
    policy: &[Style],
    against: &[Style],
    clusters: &Clusters,
    ridge: f64,
    bootstrap: Bootstrap,
) -> Option<StyleControlled> {
    let contrasts: Vec<[f64; 4]> = policy.iter().zip(against).map(|(p, a)| p.contrast(a)).collect();
    let (mut names, mut columns) = (Vec::new(), Vec::new());
    for (k, name) in Style::FEATURES.into_iter().enumerate() {
        let column: Vec<f64> = contrasts.iter().map(|contrast| contrast[k]).collect();
        let sd = standard_deviation(&column);
        let largest = column.iter().fold(0.0, |largest: f64, z| largest.max(z.abs()));
        // of values that are all the same, such as 0.1, rounding leaves a deviation, which would be blown up to one of 1
        if sd > 1e-9 * largest {
            names.push(name);
            columns.push(column.iter().map(|z| z / sd).collect());
        }
    }
    if columns.is_empty() {
        return None;
    }
    let fitted = Fitted::of(scores, &columns, clusters, ridge, bootstrap);
    let coefficients = names.into_iter().zip(fitted.phi.iter().zip(&fitted.phi_intervals));
    Some(StyleControlled {
        estimate: fitted.estimate,
        standard_error: fitted.standard_error,
        interval: fitted.interval,
        theta: fitted.theta,
        coefficients: coefficients
            .map(|(feature, (&phi, &interval))| Coefficient { feature, phi, interval })
            .collect(),
        explained: mean(scores) - fitted.estimate,
        ridge,
        draws: fitted.draws,
        seed: bootstrap.seed,
    })
}

/// A fit with its bootstrap. Features stay as they are scaled on all prompts, so that a coefficient means the same in every
/// draw.
struct Fitted {
    estimate: f64,
    standard_error: f64,
    interval: [f64; 2],
    theta: f64,
    phi: Vec<f64>,
    phi_intervals: Vec<[f64; 2]>,
    draws: usize,
}

impl Fitted {
    fn of(scores: &[f64], columns: &[Vec<f64>], clusters: &Clusters, ridge: f64, bootstrap: Bootstrap) -> Self {
        let logistic = Logistic { columns, scores, ridge };
        let start = DVector::zeros(columns.len() + 1);
        let best = logistic.fit(&vec![1.0; scores.len()], start);
        let bootstrap = bootstrap.of_at_most(DRAWS);
        let mut draws = vec![Vec::with_capacity(bootstrap.draws); columns.len() + 1];
        let mut weights = vec![0.0; scores.len()];
        bootstrap.each(clusters.len(), |times| {
            weights.iter_mut().zip(clusters.numbers()).for_each(|(weight, &cluster)| *weight = times[cluster]);
            let fit = logistic.fit(&weights, best.clone());
            draws.iter_mut().zip(fit.iter()).for_each(|(values, &x)| values.push(x));
        });
        draws[0].iter_mut().for_each(|theta| *theta = sigmoid(*theta));
        let standard_error = standard_deviation(&draws[0]);
        let mut intervals = draws.into_iter().map(|mut values| {
            values.sort_by(f64::total_cmp);
            [quantile(&values, 0.025), quantile(&values, 0.975)]
        });
        Self {
            estimate: sigmoid(best[0]),
            standard_error,
            interval: intervals.next().unwrap_or([f64::NAN; 2]),
            theta: best[0],
            phi: best.iter().skip(1).copied().collect(),
            phi_intervals: intervals.collect(),
            draws: bootstrap.draws,
        }
    }
}

/// Fractional logistic regression with an intercept, and a ridge on all coefficients but the intercept.
struct Logistic<'a> {
    columns: &'a [Vec<f64>],
    scores: &'a [f64],
    ridge: f64,
}

impl Logistic<'_> {
    fn logit(&self, at: &DVector<f64>, i: usize) -> f64 {
        at[0] + self.columns.iter().enumerate().map(|(k, column)| at[k + 1] * column[i]).sum::<f64>()
    }

    fn loss(&self, at: &DVector<f64>, weights: &[f64]) -> f64 {
        let fit = self.scores.iter().zip(weights).enumerate().map(|(i, (score, weight))| {
            let logit = self.logit(at, i);
            weight * (softplus(logit) - score * logit)
        });
        fit.sum::<f64>() + 0.5 * self.ridge * at.iter().skip(1).map(|phi| phi * phi).sum::<f64>()
    }

    /// Damped Newton steps from `at`: halved until the loss falls. Where the scores are all 0 or all 1, θ has no end, and
    /// the steps stop where the gradient does.
    fn fit(&self, weights: &[f64], mut at: DVector<f64>) -> DVector<f64> {
        let width = self.columns.len() + 1;
        let mut loss = self.loss(&at, weights);
        for _ in 0..100 {
            let mut gradient = DVector::<f64>::zeros(width);
            let mut hessian = DMatrix::<f64>::zeros(width, width);
            for (i, (score, weight)) in self.scores.iter().zip(weights).enumerate() {
                let p = sigmoid(self.logit(&at, i));
                let x = |k: usize| if k == 0 { 1.0 } else { self.columns[k - 1][i] };
                for k in 0..width {
                    gradient[k] += weight * (p - score) * x(k);
                    for l in 0..=k {
                        hessian[(k, l)] += weight * p * (1.0 - p) * x(k) * x(l);
                    }
                }
            }
            for k in 1..width {
                gradient[k] += self.ridge * at[k];
                hessian[(k, k)] += self.ridge;
            }
            // enough to divide by, where all weight is on one side, and far below what moves an estimate
            (0..width).for_each(|k| hessian[(k, k)] += 1e-12);
            hessian.fill_upper_triangle_with_lower_triangle();
            if gradient.amax() < 1e-10 {
                break;
            }
            let Some(inverse) = hessian.cholesky() else { break };
            let mut step = inverse.solve(&gradient);
            // far out, where the logistic is flat, a whole step would leave for good
            let longest = step.amax();
            if longest > 4.0 {
                step *= 4.0 / longest;
            }
            let mut next = &at - &step;
            let mut reached = self.loss(&next, weights);
            let worse = |reached: f64| reached > loss || reached.is_nan();
            let mut halvings = 0;
            while worse(reached) && halvings < 40 {
                step *= 0.5;
                next = &at - &step;
                reached = self.loss(&next, weights);
                halvings += 1;
            }
            if worse(reached) {
                // as good as floating point can tell
                break;
            }
            let moved = step.amax();
            (at, loss) = (next, reached);
            if moved < 1e-12 {
                break;
            }
        }
        at
    }
}
