//! Exact tests of paired outcomes.

/// Two-sided sign test: how probable a split at least as uneven as `wins` to `losses` is where either is as likely,
///
/// ```text
/// p = min(1, 2 · P[Bin(wins + losses, ½) ≥ max(wins, losses)])
/// ```
///
/// Exact; ties are left out before. Of nothing it is 1.
#[must_use]
pub fn sign_test(wins: usize, losses: usize) -> f64 {
    let (n, k) = (wins + losses, wins.max(losses));
    if 2 * k <= n + 1 {
        // at least half of the distribution is on this side
        return 1.0;
    }
    // P[X = k], and each further term from the one before; they fall by at least (n − k) / (k + 1) < 1
    let mut term = probability(n as f64, k as f64);
    let (mut tail, mut at) = (0.0, k);
    while term > tail * f64::EPSILON * 1e-3 && at <= n {
        tail += term;
        term *= (n - at) as f64 / (at + 1) as f64;
        at += 1;
    }
    (2.0 * tail).min(1.0)
}

/// Exact McNemar test of two systems that answered the same questions: the [`sign_test`] of those that only one of them
/// got right (McNemar 1947, in its exact form).
#[must_use]
pub fn mcnemar(only_one: usize, only_other: usize) -> f64 {
    sign_test(only_one, only_other)
}

/// `P[Bin(n, ½) = k]` by the saddle-point form of Loader 2000 (*Fast and Accurate Computation of Binomial Probabilities*),
/// which keeps all digits where `n` is large: logarithms of factorials would lose as many as `n ln n` has.
fn probability(n: f64, k: f64) -> f64 {
    if k == n {
        return (-n * std::f64::consts::LN_2).exp();
    }
    let deviance = |x: f64| x * (x / (n / 2.0)).ln() + n / 2.0 - x;
    let exact = stirling_error(n)
        - stirling_error(k)
        - stirling_error(n - k)
        - deviance_near(k, n / 2.0, deviance)
        - deviance_near(n - k, n / 2.0, deviance);
    exact.exp() * (n / (std::f64::consts::TAU * k * (n - k))).sqrt()
}

/// `x ln(x / m) + m − x`, by its series where `x` is near `m` and the terms cancel.
fn deviance_near(x: f64, m: f64, plain: impl Fn(f64) -> f64) -> f64 {
    if (x - m).abs() >= 0.1 * (x + m) {
        return plain(x);
    }
    let v = (x - m) / (x + m);
    let mut sum = (x - m) * v;
    let mut term = 2.0 * x * v;
    for j in 1..1000 {
        term *= v * v;
        let next = sum + term / f64::from(2 * j + 1);
        if next == sum {
            break;
        }
        sum = next;
    }
    sum
}

/// `ln n! − ½ ln(2πn) − n ln n + n`
fn stirling_error(n: f64) -> f64 {
    if n < 16.0 {
        let factorial: f64 = (1..=n as u32).map(f64::from).product();
        return factorial.ln() - 0.5 * (std::f64::consts::TAU * n).ln() - n * n.ln() + n;
    }
    let n2 = n * n;
    (1.0 / 12.0 - (1.0 / 360.0 - (1.0 / 1260.0 - (1.0 / 1680.0 - 1.0 / 1188.0 / n2) / n2) / n2) / n2) / n
}
