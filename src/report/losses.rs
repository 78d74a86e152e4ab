//! Pictures of the losses: what they say about a pair, and how hard they pull. The numbers are those of [`crate::loss`],
//! value and derivative, so that what is shown is what trains.

use candle_core::{Device, Result, Tensor};

use super::chart::{Chart, Mark, Point};
use super::drawing::Ink;
use crate::loss::{Dpo, Ipo, Kto, Loss, Orpo, Reduction, Scored, Sequence, elementwise};
use crate::range::{Positive, Smoothing};

/// Every picture with what to see in it.
///
/// # Errors
/// What candle returns.
pub fn pictures() -> Result<Vec<(Chart, String)>> {
    Ok(vec![
        bradley_terry()?,
        trade_off(),
        dpo_by_beta("DPO: loss", "loss", |at| at.loss)?,
        dpo_by_beta("DPO: how hard it pulls", "−∂loss / ∂log π(chosen)", |at| at.pull)?,
        against_each_other("DPO, cDPO and IPO: loss", "loss, 1 at Δ = 0", |at, start| at.loss / start.loss)?,
        against_each_other("DPO, cDPO and IPO: how hard they pull", "pull, 1 at Δ = 0", |at, start| {
            at.pull / start.pull
        })?,
        kto()?,
        orpo()?,
    ])
}

/// A loss at one point.
#[derive(Clone, Copy)]
struct At {
    loss: f64,
    /// How strongly the chosen answer's log-probability is pulled up.
    pull: f64,
}

/// A loss where the log-ratios of a pair are `delta` nats apart, for many `delta`.
fn along(loss: &Loss, deltas: &[f64]) -> Result<Vec<At>> {
    let answer = |logp: f64| Some(Sequence { logp, reference: Some(0.0), tokens: 1 });
    let pairs: Vec<Scored> =
        deltas.iter().map(|&delta| Scored { prompt: None, chosen: answer(delta), rejected: answer(0.0) }).collect();
    let evaluated = loss.evaluate(&pairs, &loss.update(&pairs, 0.0))?;
    // slopes are those of the mean over all points
    let n = deltas.len() as f64;
    Ok(evaluated.losses.iter().zip(&evaluated.slopes).map(|(&loss, s)| At { loss, pull: -n * s.chosen }).collect())
}

fn range(from: f64, to: f64) -> Vec<f64> {
    (0..=160).map(|i| from + (to - from) * f64::from(i) / 160.0).collect()
}

fn line(points: Vec<Point>, series: usize, label: impl Into<String>) -> Mark {
    let (ink, label) = (Ink::Series(series), label.into());
    Mark::Line { points, ink, width: 2.0, opacity: 1.0, label }
}

fn dpo(beta: f64, label_smoothing: f64) -> Loss {
    let (beta, label_smoothing) = (Positive::constant(beta), Smoothing::constant(label_smoothing));
    Loss::Dpo(Dpo { beta, label_smoothing })
}

fn bradley_terry() -> Result<(Chart, String)> {
    let mut chart = Chart::new("Bradley-Terry", "reward of one answer − reward of the other", "P(one is preferred)");
    let gaps = range(-6.0, 6.0);
    let shares = elementwise::sigmoid(&Tensor::new(gaps.as_slice(), &Device::Cpu)?)?.to_vec1::<f64>()?;
    chart.y.include = vec![0.0, 1.0];
    chart.marks = vec![Mark::RuleX(0.0), Mark::RuleY(0.5), line(gaps.into_iter().zip(shares).collect(), 0, "")];
    Ok((
        chart,
        "σ(r − r'): only the difference of two rewards says which answer is preferred, and how surely.".into(),
    ))
}

/// Five answers to one question, as in `examples/dpo_step_by_step.rs`: the reference's probabilities, and rewards.
const REFERENCE: [f64; 5] = [0.30, 0.25, 0.20, 0.15, 0.10];
const REWARDS: [f64; 5] = [1.0, 3.0, 0.5, 2.5, -0.5];

/// Divergence from the reference and expected reward of the best policy at a price β of a nat:
/// `π* = π_ref exp(r / β) / Z`.
fn best_policy(beta: f64) -> Point {
    // the highest reward taken out first: exp(r / β) alone overflows for small β
    let top = REWARDS.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = REFERENCE.iter().zip(REWARDS).map(|(p, r)| p * ((r - top) / beta).exp()).collect();
    let z: f64 = weights.iter().sum();
    let policy: Vec<f64> = weights.into_iter().map(|weight| weight / z).collect();
    let reward = policy.iter().zip(REWARDS).map(|(p, r)| p * r).sum();
    let terms = policy.iter().zip(REFERENCE).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q).ln());
    (terms.sum(), reward)
}

fn trade_off() -> (Chart, String) {
    let mut chart = Chart::new("What RLHF trades", "KL(π ‖ π_ref), nats", "expected reward");
    let curve = (0..=400).map(|i| best_policy(100.0 * 0.98f64.powi(i))).collect();
    chart.marks = vec![line(curve, 0, "")];
    for (i, beta) in [0.1, 0.5, 1.0, 2.0, 5.0].into_iter().enumerate() {
        let (points, label) = (vec![best_policy(beta)], format!("β = {beta}"));
        chart.marks.push(Mark::Points {
            points,
            ink: Ink::Series(i),
            radius: 4.0,
            filled: true,
            opacity: 1.0,
            label,
        });
    }
    (
        chart,
        "Five answers, and for each price β of a nat the policy with the most reward − β KL. Nothing lies above the curve."
            .into(),
    )
}

fn dpo_by_beta(title: &str, unit: &str, of: fn(&At) -> f64) -> Result<(Chart, String)> {
    let mut chart = Chart::new(title, "Δ, nats", unit);
    chart.y.include = vec![0.0];
    chart.marks = vec![Mark::RuleX(0.0)];
    let deltas = range(-10.0, 10.0);
    for (i, beta) in [0.1, 0.5, 1.0].into_iter().enumerate() {
        let points = deltas.iter().copied().zip(along(&dpo(beta, 0.0), &deltas)?.iter().map(of)).collect();
        chart.marks.push(line(points, i, format!("β = {beta}")));
    }
    let note = "Δ is how many nats the policy moved the chosen answer above the rejected one. A small β goes on pulling for \
                many nats; a large one pulls hard and lets go soon.";
    Ok((chart, note.into()))
}

fn against_each_other(title: &str, unit: &str, of: fn(&At, &At) -> f64) -> Result<(Chart, String)> {
    const BETA: f64 = 0.1;
    let ipo = Ipo { beta: Positive::constant(BETA), reduction: Reduction::Sum };
    let target = ipo.target();
    let mut chart = Chart::new(title, "Δ, nats", unit);
    chart.marks = vec![Mark::RuleX(target), Mark::RuleY(0.0)];
    let deltas = range(-5.0, 15.0);
    for (i, (label, loss)) in
        [("DPO", dpo(BETA, 0.0)), ("cDPO, ε = 0.2", dpo(BETA, 0.2)), ("IPO", Loss::Ipo(ipo))].into_iter().enumerate()
    {
        let start = along(&loss, &[0.0])?[0];
        let points = deltas.iter().copied().zip(along(&loss, &deltas)?.iter().map(|at| of(at, &start))).collect();
        chart.marks.push(line(points, i, label));
    }
    let note = format!(
        "At β = {BETA}. DPO pushes for ever; IPO draws every pair to 1 / 2β = {target} and pulls it back beyond; cDPO turns \
         around where the labels are as sure as they are right."
    );
    Ok((chart, note))
}

fn kto() -> Result<(Chart, String)> {
    let loss = Loss::Kto(Kto::default());
    let mut chart = Chart::new("KTO: loss of a single answer", "log-ratio a of the answer, nats", "loss");
    chart.y.include = vec![0.0, 1.0];
    chart.marks = vec![Mark::RuleX(0.0)];
    let ratios = range(-60.0, 60.0);
    for (i, label) in ["desirable", "undesirable"].into_iter().enumerate() {
        let answer = |logp: f64| Some(Sequence { logp, reference: Some(0.0), tokens: 1 });
        let scored: Vec<Scored> = ratios
            .iter()
            .map(|&a| match i {
                0 => Scored { chosen: answer(a), ..Scored::default() },
                _ => Scored { rejected: answer(a), ..Scored::default() },
            })
            .collect();
        let losses = loss.evaluate(&scored, &loss.update(&scored, 0.0))?.losses;
        chart.marks.push(line(ratios.iter().copied().zip(losses).collect(), i + 1, label));
    }
    let note = "At β = 0.1, with its reference point at 0. It is flat on both sides: what is hopeless or learned is left alone.";
    Ok((chart, note.into()))
}

fn orpo() -> Result<(Chart, String)> {
    let orpo = Orpo::default();
    let mut chart = Chart::new("ORPO: preference part", "P(chosen), a token on average", "−β log σ(log odds ratio)");
    chart.y.include = vec![0.0];
    let shares: Vec<f64> = range(0.02, 0.98);
    let logps: Vec<f64> = shares.iter().map(|p| p.ln()).collect();
    let chosen = Tensor::new(logps.as_slice(), &Device::Cpu)?;
    for (i, rejected) in [0.1, 0.3, 0.6].into_iter().enumerate() {
        let other = Tensor::full(f64::ln(rejected), logps.len(), &Device::Cpu)?;
        let losses = orpo.losses(&orpo.log_odds_ratios(&chosen, &other)?)?.to_vec1::<f64>()?;
        let label = format!("P(rejected) = {rejected}");
        chart.marks.push(line(shares.iter().copied().zip(losses).collect(), i, label));
    }
    let note = "At β = 0.1, without a reference: the odds of the two answers are compared, beside the likelihood of the chosen.";
    Ok((chart, note.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::drawing::Item;

    /// The figures of the tutorial.
    #[test]
    fn the_curves_go_through_the_tutorials_points() {
        let at = |loss: &Loss, delta: f64| along(loss, &[delta, 0.0]).expect("evaluated")[0];
        let start = at(&dpo(0.1, 0.0), 0.0);
        assert!((start.loss - std::f64::consts::LN_2).abs() < 1e-12 && (start.pull - 0.05).abs() < 1e-12);
        let ipo = Loss::Ipo(Ipo { beta: Positive::constant(0.1), reduction: Reduction::Sum });
        assert!((at(&ipo, 3.0).loss - 4.0).abs() < 1e-9, "(3 - 5)²");
        assert!(at(&ipo, 5.0).pull.abs() < 1e-9 && at(&ipo, 8.0).pull < 0.0, "pulled back beyond its target");
        let (kl, reward) = best_policy(1e9);
        assert!(kl.abs() < 1e-9 && (reward - 1.475).abs() < 1e-6, "the reference: {kl} {reward}");
        let (kl, reward) = best_policy(1e-3);
        assert!((reward - 3.0).abs() < 1e-6 && (kl - 4f64.ln()).abs() < 1e-6, "always B");
    }

    #[test]
    fn every_picture_has_curves_and_can_be_drawn() {
        let pictures = pictures().expect("computed");
        assert_eq!(pictures.len(), 8);
        for (chart, note) in pictures {
            let lines = chart.marks.iter().filter(|mark| matches!(mark, Mark::Line { .. })).count();
            assert!(lines > 0 && !note.is_empty(), "{}", chart.title);
            for item in chart.clone().alone().draw().items {
                if let Item::Text { text, .. } = item {
                    assert!(text.chars().all(super::super::font::has), "{text}");
                }
            }
            let svg = chart.draw().svg(crate::report::drawing::Theme::File);
            assert!(!svg.contains("NaN"));
        }
    }
}
