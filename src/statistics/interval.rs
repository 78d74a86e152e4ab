//! Means, shares and ratios, and how well a sample of prompts knows them.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::Z95;

/// The mean, 0 of nothing.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The standard deviation of a sample, `√(Σ (x − x̄)² / (n − 1))`; 0 of fewer than two.
#[must_use]
pub fn standard_deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let centre = mean(values);
    (values.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

/// The standard error of the mean of independent values, `sd / √n`.
#[must_use]
pub fn standard_error(values: &[f64]) -> f64 {
    standard_deviation(values) / (values.len().max(1) as f64).sqrt()
}

/// The quantile `q` of values that rise, between two of them in proportion (numpy's default). NaN of nothing.
#[must_use]
pub fn quantile(rising: &[f64], q: f64) -> f64 {
    let Some(last) = rising.len().checked_sub(1) else { return f64::NAN };
    let place = q.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    rising[below] + (rising[above] - rising[below]) * place.fract()
}

/// Wilson's interval of 95 % for a share, `successes` of `n` (Wilson 1927):
///
/// ```text
/// (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
/// ```
///
/// It stays within `[0, 1]` and has a width at 0 and at 1. Of nothing it is `[0, 1]`.
#[must_use]
pub fn wilson(successes: usize, n: usize) -> [f64; 2] {
    if n == 0 {
        return [0.0, 1.0];
    }
    let (p, size) = (successes as f64 / n as f64, n as f64);
    let z2 = Z95 * Z95;
    let centre = (p + z2 / (2.0 * size)) / (1.0 + z2 / size);
    let half = Z95 / (1.0 + z2 / size) * (p * (1.0 - p) / size + z2 / (4.0 * size * size)).sqrt();
    // exact at the ends, where rounding would leave 1e-17
    [
        if successes == 0 { 0.0 } else { (centre - half).max(0.0) },
        if successes >= n { 1.0 } else { (centre + half).min(1.0) },
    ]
}

/// Which prompts belong together: prompts of one topic or conversation are no independent ones, and are drawn together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clusters {
    of: Vec<usize>,
    count: usize,
}

impl Clusters {
    /// Every prompt by itself.
    #[must_use]
    pub fn each(prompts: usize) -> Self {
        Self { of: (0..prompts).collect(), count: prompts }
    }

    /// Prompts of equal keys together.
    #[must_use]
    pub fn of<K: Ord>(keys: impl IntoIterator<Item = K>) -> Self {
        let mut numbers = BTreeMap::new();
        let of: Vec<usize> = keys
            .into_iter()
            .map(|key| {
                let next = numbers.len();
                *numbers.entry(key).or_insert(next)
            })
            .collect();
        Self { of, count: numbers.len() }
    }

    /// The number of clusters.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The cluster of each prompt.
    #[must_use]
    pub fn numbers(&self) -> &[usize] {
        &self.of
    }

    /// Sums over each cluster.
    fn sums(&self, values: impl IntoIterator<Item = f64>) -> Vec<f64> {
        let mut sums = vec![0.0; self.count];
        self.of.iter().zip(values).for_each(|(&cluster, value)| sums[cluster] += value);
        sums
    }
}

/// Where an interval comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Quantiles of the estimate over resampled prompts.
    Bootstrap,
    /// Every prompt says the same, so that resampling sees no spread: bounds on how many others may say something else.
    Wilson,
    /// Nothing to resample.
    None,
}

/// An estimate, and what the sample of prompts leaves open.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The estimate.
    pub estimate: f64,
    /// Its standard error; of clusters where prompts are clustered.
    pub standard_error: f64,
    /// Of 95 %.
    pub interval: [f64; 2],
    /// How the interval was made.
    pub method: Method,
    /// Of a bootstrap.
    pub draws: usize,
    /// Of a bootstrap.
    pub seed: u64,
}

impl Estimate {
    /// Whether the interval is above `value`, below it, or has it inside.
    #[must_use]
    pub fn against(&self, value: f64) -> std::cmp::Ordering {
        let [low, high] = self.interval;
        match () {
            () if low > value => std::cmp::Ordering::Greater,
            () if high < value => std::cmp::Ordering::Less,
            () => std::cmp::Ordering::Equal,
        }
    }
}

/// The percentile bootstrap over clusters (Efron & Tibshirani 1993, ch. 13): as many clusters as there are are drawn with
/// replacement, `draws` times, by ChaCha8 from `seed`; the interval is what lies between the quantiles 0.025 and 0.975 of
/// the estimates. The draws depend on seed and number of clusters only: two estimates on the same prompts see the same
/// ones, and the interval of `1 − s` is the mirrored interval of `s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bootstrap {
    /// How often clusters are drawn.
    pub draws: usize,
    /// Where random numbers begin.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { draws: 10_000, seed: 0 }
    }
}

impl Bootstrap {
    /// With `draws` in place of its own, for statistics that are fitted anew each time.
    #[must_use]
    pub fn of_at_most(self, draws: usize) -> Self {
        Self { draws: self.draws.min(draws), ..self }
    }

    /// The values of `statistic` over all draws, rising. It gets how often each cluster was drawn; what is not finite is
    /// left out.
    pub fn distribution(&self, clusters: usize, mut statistic: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
        let mut values = Vec::with_capacity(self.draws);
        self.each(clusters, |times| values.push(statistic(times)));
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        values
    }

    /// Gives every draw to `see`: how often each cluster was drawn.
    pub(super) fn each(&self, clusters: usize, mut see: impl FnMut(&[f64])) {
        if clusters == 0 {
            return;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut times = vec![0.0; clusters];
        for _ in 0..self.draws {
            times.fill(0.0);
            for _ in 0..clusters {
                // the high half of a 64 × 64 bit product; that it favours some by 1e-19 · clusters does not matter
                let drawn = (u128::from(rng.next_u64()) * clusters as u128) >> 64;
                times[drawn as usize] += 1.0;
            }
            see(&times);
        }
    }

    /// A mean of anything, such as a paired difference: `Σ v_i / n`, whose standard error is, with `V_g` and `n_g` the sum
    /// and number of the values of cluster `g` out of `G`,
    ///
    /// ```text
    /// √(G/(G − 1) · Σ_g (V_g − n_g v̄)²) / n         = sd / √n where every cluster is one prompt
    /// ```
    #[must_use]
    pub fn mean(&self, values: &[f64], clusters: &Clusters) -> Estimate {
        self.ratio(values, &vec![1.0; values.len()], clusters)
    }

    /// A mean of shares, such as win rate or accuracy: [`mean`](Self::mean) of values in `[0, 1]`, but where all clusters
    /// say the same `s`, up to a share `u` of others may say anything, `u` being the upper end of Wilson's interval for none
    /// out of `G`: `[(1 − u) s, (1 − u) s + u]`. For `s` of 0 or 1 that is Wilson's interval.
    #[must_use]
    pub fn share(&self, values: &[f64], clusters: &Clusters) -> Estimate {
        let mut estimate = self.mean(values, clusters);
        if !values.is_empty() && estimate.interval[0] == estimate.interval[1] {
            let [_, other] = wilson(0, clusters.len());
            let low = (1.0 - other) * estimate.estimate;
            let interval = match estimate.estimate {
                // without a rounding error at the end
                1.0 => [low, 1.0],
                _ => [low, low + other],
            };
            estimate = Estimate { interval, method: Method::Wilson, draws: 0, ..estimate };
        }
        estimate
    }

    /// A ratio of sums, such as nats a token: `Σ a_i / Σ b_i`, with the standard error of its linear approximation.
    #[must_use]
    pub fn ratio(&self, numerators: &[f64], denominators: &[f64], clusters: &Clusters) -> Estimate {
        let Self { draws, seed } = *self;
        let (above, below) = (clusters.sums(numerators.iter().copied()), clusters.sums(denominators.iter().copied()));
        let total = below.iter().sum::<f64>();
        if total == 0.0 {
            let nothing = f64::NAN;
            let interval = [nothing; 2];
            return Estimate {
                estimate: nothing,
                standard_error: nothing,
                interval,
                method: Method::None,
                draws: 0,
                seed,
            };
        }
        let ratio = numerators.iter().sum::<f64>() / total;
        let residuals = above.iter().zip(&below).map(|(a, b)| (a - ratio * b).powi(2)).sum::<f64>();
        let count = clusters.len() as f64;
        let standard_error =
            if clusters.len() > 1 { (count / (count - 1.0) * residuals).sqrt() / total } else { 0.0 };
        // of values that are all the same, sums in another order differ in the last bit
        let constant = above.iter().zip(&below).all(|(a, b)| (a - ratio * b).abs() <= 1e-12 * (1.0 + a.abs()));
        if constant {
            let interval = [ratio; 2];
            return Estimate { estimate: ratio, standard_error: 0.0, interval, method: Method::None, draws: 0, seed };
        }
        let values = self.distribution(clusters.len(), |times| {
            let weighted = |sums: &[f64]| times.iter().zip(sums).map(|(t, s)| t * s).sum::<f64>();
            weighted(&above) / weighted(&below)
        });
        let interval = [quantile(&values, 0.025), quantile(&values, 0.975)];
        Estimate { estimate: ratio, standard_error, interval, method: Method::Bootstrap, draws, seed }
    }
}
