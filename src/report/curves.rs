//! The curves of a run, and of several over each other.

use super::chart::{Chart, Mark, Point, Scale, smoothed};
use super::drawing::Ink;
use super::history::History;

/// What belongs into one picture.
pub(super) struct Panel {
    pub(super) title: &'static str,
    unit: &'static str,
    /// A metric, and what it is called where there are several.
    series: &'static [(&'static str, &'static str)],
    /// Values that have to be on the axis.
    include: &'static [f64],
    /// What to look for.
    pub(super) note: &'static str,
}

pub(super) const PANELS: [Panel; 10] = [
    Panel {
        title: "Loss",
        unit: "",
        series: &[("loss", "")],
        include: &[],
        note: "Should fall, the held-out loss too. Where only training falls, the pairs are learned by heart.",
    },
    Panel {
        title: "Reward margin",
        unit: "β × nats",
        series: &[("rewards/margins", "")],
        include: &[0.0],
        note: "How much further the policy moved towards the chosen answer than towards the rejected one. Should rise.",
    },
    Panel {
        title: "Reward accuracy",
        unit: "share of pairs",
        series: &[("rewards/accuracies", "")],
        include: &[0.0, 1.0],
        note: "Pairs with a margin above zero. A half is chance; a base compared with itself has none.",
    },
    Panel {
        title: "Rewards",
        unit: "β × nats",
        series: &[("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")],
        include: &[0.0],
        note: "Both may fall: only the distance between them is trained.",
    },
    Panel {
        title: "Log-probability of an answer",
        unit: "nats",
        series: &[("logps/chosen", "chosen"), ("logps/rejected", "rejected")],
        include: &[],
        note: "Sums over the answer's tokens. The chosen one should not fall far.",
    },
    Panel {
        title: "Distance from the reference",
        unit: "nats a token",
        series: &[("kl_to_reference", "")],
        include: &[0.0],
        note: "½ (log π/π_ref)² on the tokens of held-out answers. The price of what was learned.",
    },
    Panel {
        title: "KL of the batch",
        unit: "nats",
        series: &[("kl", "")],
        include: &[0.0],
        note: "KTO's reference point.",
    },
    Panel {
        title: "Negative log-likelihood of the chosen answer",
        unit: "nats a token",
        series: &[("nll_loss", "")],
        include: &[],
        note: "The fine-tuning part of ORPO's loss.",
    },
    Panel {
        title: "Gradient norm",
        unit: "",
        series: &[("grad_norm", "")],
        include: &[],
        note: "Before it is clipped. Single spikes are odd batches; a rise without end is too high a learning rate.",
    },
    Panel {
        title: "Learning rate",
        unit: "",
        series: &[("learning_rate", "")],
        include: &[0.0],
        note: "As planned.",
    },
];

impl Panel {
    /// The metrics in it.
    pub(super) fn metrics(&self) -> impl Iterator<Item = &'static str> {
        self.series.iter().map(|(name, _)| *name)
    }

    /// The picture of it, if the run has any of its metrics.
    pub(super) fn chart(&self, history: &History, total: Option<u64>) -> Option<Chart> {
        let mut chart = axes(self.title, self.unit, total);
        chart.y.include = self.include.to_vec();
        for (i, (name, label)) in self.series.iter().enumerate() {
            let ink = Ink::Series(if self.series.len() == 1 { 0 } else { i + 1 });
            let (train, held) = (history.get(name), history.held_out(name));
            let labels = if label.is_empty() { ["training", "held out"] } else { [label, ""] };
            // a single kind of values needs no name
            let alone = label.is_empty() && (train.is_empty() || held.is_empty());
            let labels = if alone { ["", ""] } else { labels };
            chart.marks.extend(training(train, ink, labels[0]));
            chart.marks.extend(held_out(held, ink, labels[1], train.is_empty()));
        }
        finished(chart)
    }
}

/// One metric of one run or several.
#[must_use]
pub fn curve(runs: &[(&str, &History)], metric: &str, total: Option<u64>) -> Option<Chart> {
    let panel = PANELS.iter().find(|panel| panel.series.iter().any(|(name, _)| *name == metric));
    let (title, unit) = match panel {
        Some(panel) if panel.series.len() == 1 => (panel.title, panel.unit),
        Some(panel) => (metric, panel.unit),
        None => (metric, ""),
    };
    let mut chart = axes(title, unit, total);
    chart.y.include = panel.map_or(Vec::new(), |panel| panel.include.to_vec());
    for (i, (name, history)) in runs.iter().enumerate() {
        let (train, held) = (history.get(metric), history.held_out(metric));
        let both = !train.is_empty() && !held.is_empty();
        let labels = match runs.len() {
            1 if both => ["training", "held out"],
            1 => ["", ""],
            _ if train.is_empty() => ["", *name],
            _ => [*name, ""],
        };
        chart.marks.extend(training(train, Ink::Series(i), labels[0]));
        chart.marks.extend(held_out(held, Ink::Series(i), labels[1], train.is_empty()));
    }
    finished(chart)
}

fn axes(title: &str, unit: &str, total: Option<u64>) -> Chart {
    let mut chart = Chart::new(title, "update", unit);
    chart.x.include = [Some(0.0), total.map(|total| total as f64)].into_iter().flatten().collect();
    chart
}

/// Values that reach over several powers of ten get a logarithmic axis.
fn finished(mut chart: Chart) -> Option<Chart> {
    let values = || {
        chart.marks.iter().flat_map(|mark| match mark {
            Mark::Line { points, .. } | Mark::Points { points, .. } => points.as_slice(),
            _ => &[],
        })
    };
    values().next()?;
    let mut sizes: Vec<f64> = values().map(|(_, y)| *y).filter(|y| y.is_finite()).collect();
    sizes.sort_by(f64::total_cmp);
    let (min, max, middle) = (sizes.first()?, sizes.last()?, sizes[sizes.len() / 2]);
    if *min > 0.0 && *max > 30.0 * middle && chart.y.include.is_empty() {
        chart.y.scale = Scale::Log;
    }
    Some(chart)
}

/// Over how many updates a curve of `n` is smoothed; none of short runs.
pub(super) fn window(n: usize) -> Option<f64> {
    (n >= 12).then(|| (n as f64 / 10.0).clamp(4.0, 100.0).round())
}

fn training(points: &[Point], ink: Ink, label: &str) -> Vec<Mark> {
    if points.is_empty() {
        return Vec::new();
    }
    let line = |points: Vec<Point>, width: f64, opacity: f64, label: &str| Mark::Line {
        points,
        ink,
        width,
        opacity,
        label: label.to_owned(),
    };
    // what follows a plan is not noisy
    let planned = points.windows(3).filter(|w| (w[1].1 - w[0].1) * (w[2].1 - w[1].1) < 0.0).count() <= 1;
    match window(points.len()) {
        Some(window) if !planned => {
            vec![line(points.to_vec(), 1.0, 0.35, ""), line(smoothed(points, window), 2.0, 1.0, label)]
        }
        _ => vec![line(points.to_vec(), 2.0, 1.0, label)],
    }
}

/// Points, with a line through them where there is no curve to stand on.
fn held_out(points: &[Point], ink: Ink, label: &str, alone: bool) -> Vec<Mark> {
    if points.is_empty() {
        return Vec::new();
    }
    let dots =
        Mark::Points { points: points.to_vec(), ink, radius: 3.5, filled: false, opacity: 1.0, label: label.into() };
    let line = Mark::Line { points: points.to_vec(), ink, width: 1.5, opacity: 0.6, label: String::new() };
    if alone { vec![line, dots] } else { vec![dots] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(names: &[&str]) -> History {
        let mut history = History::default();
        for name in names {
            for step in 0..40 {
                history.push(name, step, (2.0 + (step as f64).sin()) / (step as f64 + 1.0));
            }
        }
        history
    }

    #[test]
    fn a_panel_shows_what_there_is() {
        let history = history(&["loss", "eval_loss", "eval_rewards/margins"]);
        let shown: Vec<&str> =
            PANELS.iter().filter(|panel| panel.chart(&history, None).is_some()).map(|panel| panel.title).collect();
        assert_eq!(shown, ["Loss", "Reward margin"]);
        let loss = PANELS[0].chart(&history, Some(100)).expect("there");
        assert_eq!(loss.marks.len(), 3, "raw, smooth, held out");
        assert_eq!(loss.x.include, [0.0, 100.0]);
    }

    #[test]
    fn a_spike_makes_the_axis_logarithmic() {
        let mut history = history(&["grad_norm"]);
        history.push("grad_norm", 41, 500.0);
        assert_eq!(curve(&[("", &history)], "grad_norm", None).expect("there").y.scale, Scale::Log);
    }

    #[test]
    fn several_runs_get_a_colour_and_a_name_each() {
        let (a, b) = (history(&["loss"]), history(&["loss", "eval_loss"]));
        let chart = curve(&[("a", &a), ("b", &b)], "loss", None).expect("there");
        let labelled: Vec<_> = chart
            .marks
            .iter()
            .filter_map(|mark| match mark {
                Mark::Line { label, ink, .. } if !label.is_empty() => Some((label.as_str(), *ink)),
                _ => None,
            })
            .collect();
        assert_eq!(labelled, [("a", Ink::Series(0)), ("b", Ink::Series(1))]);
        assert!(curve(&[("a", &a)], "nothing", None).is_none());
    }
}
