//! How much a number of prompts can show.

use super::Z95;

/// `Φ⁻¹(0.8)`, of a power of 80 %.
const Z80: f64 = 0.841_621_233_572_914_3;

/// How many prompts show a difference of `difference` from ½ with a power of 80 % at 5 %, two-sided, where scores have the
/// standard deviation `sd`:
///
/// ```text
/// n = ⌈(z₀.₉₇₅ + z₀.₈)² sd² / difference²⌉
/// ```
#[must_use]
pub fn prompts_needed(sd: f64, difference: f64) -> usize {
    ((Z95 + Z80) * sd / difference).powi(2).ceil() as usize
}

/// The difference that shows with a power of 80 % where the mean has this standard error, `sd / √n` of independent prompts:
/// [`prompts_needed`] the other way round.
#[must_use]
pub fn detectable_difference(standard_error: f64) -> f64 {
    (Z95 + Z80) * standard_error
}

/// What the mean of `scores` could be, whatever became of `unresolved` further prompts: all lost, or all won,
///
/// ```text
/// [Σ s / (n + u), (Σ s + u) / (n + u)]
/// ```
#[must_use]
pub fn bounds(scores: &[f64], unresolved: usize) -> [f64; 2] {
    let all = (scores.len() + unresolved) as f64;
    let sum = scores.iter().sum::<f64>();
    if all == 0.0 { [0.0, 1.0] } else { [sum / all, (sum + unresolved as f64) / all] }
}
