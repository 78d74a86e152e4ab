//! The statistics of comparisons: pure functions of scores, nothing read and nothing written.
//!
//! Two rules run through all of it. The unit is the **prompt**: whatever was asked about it, in however many orders, by
//! however many judges, becomes one score in `[0, 1]` first, since answers to the same prompt are not independent (pooled
//! votes of both orders make a nominal 95 % interval cover about 91 %). And what compares two systems is **paired**: both
//! answered the same prompts, so differences are taken prompt by prompt.
//!
//! | file | what is there |
//! |---|---|
//! | `votes` | what a judge said, as a [score of a prompt](Votes) |
//! | `interval` | means, shares and ratios with bootstrap and Wilson intervals, over [clusters](Clusters) of prompts |
//! | `sign` | exact sign test, exact McNemar |
//! | `power` | how many prompts a difference takes; bounds where verdicts are missing |
//! | `orders` | does the judge agree with itself when answers trade places |
//! | `control` | win rates [at equal length](length_controlled) and [equal style](style_controlled) |
//! | `style` | the features of style |
//! | `agreement` | two judges beside each other |
//! | `ranking` | Bradley–Terry and Elo of three systems or more |

mod agreement;
mod control;
mod interval;
mod orders;
mod power;
mod ranking;
mod sign;
mod style;
mod votes;

pub use agreement::{Agreement, prefers_longer, prefers_with, spearman};
pub use control::{
    Coefficient, LENGTH_RIDGE, LengthControlled, StyleControlled, length_controlled, style_controlled,
};
pub use interval::{
    Bootstrap, Clusters, Estimate, Method, mean, quantile, standard_deviation, standard_error, wilson,
};
pub use orders::{Orders, kappa};
pub use power::{bounds, detectable_difference, prompts_needed};
pub use ranking::{Comparison, Rating, bradley_terry};
pub use sign::{mcnemar, sign_test};
pub use style::Style;
pub use votes::{Order, Outcome, Outcomes, Scale, Verdict, Votes, label_share};

/// `Φ⁻¹(0.975)`, of a two-sided interval of 95 %.
pub const Z95: f64 = 1.959_963_984_540_054;

/// The logistic function, `1 / (1 + e^−x)`.
#[must_use]
pub(crate) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// `ln(1 + e^x)` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests;
