//! The metrics of a run over its updates.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::chart::Point;

/// `metrics.jsonl`: what every update and every evaluation said.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// Names in the order in which they first come, with a value an update.
    series: Vec<(String, Vec<Point>)>,
    /// Updates at which a number was not finite, with the number's name.
    not_finite: Vec<(u64, String)>,
    /// The last update.
    step: u64,
    /// The epoch that was reached with the first update.
    first_epoch: Option<f64>,
}

impl History {
    /// Reads `metrics.jsonl`. A last line that was not written to its end is left out, as is any other that is no
    /// object: a report is wanted most where something went wrong.
    #[must_use]
    pub fn read(file: &Path) -> Self {
        let bytes = fs::read(file).unwrap_or_default();
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    /// The same from text.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut history = Self::default();
        for line in text.lines() {
            let Ok(line) = serde_json::from_str::<Map<String, Value>>(line) else { continue };
            let Some(step) = line.get("step").and_then(Value::as_u64) else { continue };
            history.step = history.step.max(step);
            if step == 1 {
                history.first_epoch = line.get("epoch").and_then(Value::as_f64);
            }
            for (name, value) in line.into_iter().filter(|(name, _)| name != "step" && name != "epoch") {
                match value.as_f64() {
                    Some(value) => history.push(&name, step, value),
                    None if value.is_null() => history.not_finite.push((step, name)),
                    None => {}
                }
            }
        }
        history
    }

    /// Adds a value.
    pub fn push(&mut self, name: &str, step: u64, value: f64) {
        self.step = self.step.max(step);
        let point = (step as f64, value);
        match self.series.iter_mut().find(|(known, _)| known == name) {
            Some((_, points)) => points.push(point),
            None => self.series.push((name.to_owned(), vec![point])),
        }
    }

    /// The last update.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Every name there is, in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.series.iter().map(|(name, _)| name.as_str())
    }

    /// A metric over the updates; `eval_NAME` is the held-out one. Empty where there is none.
    #[must_use]
    pub fn get(&self, name: &str) -> &[Point] {
        self.series.iter().find(|(known, _)| known == name).map_or(&[], |(_, points)| points)
    }

    /// A held-out metric.
    #[must_use]
    pub fn held_out(&self, name: &str) -> &[Point] {
        self.get(&format!("eval_{name}"))
    }

    /// The first and the last value of a held-out metric.
    #[must_use]
    pub fn before_and_after(&self, name: &str) -> (Option<f64>, Option<f64>) {
        let points = self.held_out(name);
        let before = points.first().filter(|(step, _)| *step == 0.0);
        let after = points.last().filter(|(step, _)| *step > 0.0);
        (before.map(|(_, value)| *value), after.map(|(_, value)| *value))
    }

    /// Whether the policy is its own reference before the first update, so that it has neither margin nor accuracy.
    #[must_use]
    pub fn starts_at_reference(&self) -> bool {
        self.before_and_after("rewards/margins").0 == Some(0.0)
    }

    /// Whether the loss has rewards, which is whether it has a beta.
    #[must_use]
    pub fn has_rewards(&self) -> bool {
        self.names().any(|name| name.trim_start_matches("eval_").starts_with("rewards/"))
    }

    /// Updates at which a number was not finite, with its name.
    #[must_use]
    pub fn not_finite(&self) -> &[(u64, String)] {
        &self.not_finite
    }

    /// How many updates the run will have, from its recipe and its first epoch.
    #[must_use]
    pub fn total_steps(&self, steps: Option<usize>, epochs: f64, batch_size: usize) -> Option<u64> {
        if let Some(steps) = steps {
            return Some(steps as u64);
        }
        // the first update saw `batch_size` rows, or all of them
        let rows = batch_size as f64 / self.first_epoch?;
        let updates_an_epoch = (rows.round() / batch_size as f64).ceil();
        Some((epochs * updates_an_epoch).ceil() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "{\"step\":0,\"epoch\":0,\"eval_loss\":0.7}\n\
                        {\"step\":1,\"epoch\":0.041666666666666664,\"loss\":0.69}\n\
                        {\"step\":2,\"epoch\":0.08,\"loss\":null,\"eval_loss\":0.5}\n\
                        not json\n{\"step\":3,\"lo";

    #[test]
    fn lines_become_series_and_what_is_broken_is_left_out() {
        let history = History::parse(TEXT);
        assert_eq!(history.get("loss"), [(1.0, 0.69)]);
        assert_eq!(history.held_out("loss"), [(0.0, 0.7), (2.0, 0.5)]);
        assert_eq!(history.before_and_after("loss"), (Some(0.7), Some(0.5)));
        assert_eq!(history.not_finite(), [(2, "loss".to_owned())]);
        assert_eq!(history.step(), 2);
        assert_eq!(history.names().collect::<Vec<_>>(), ["eval_loss", "loss"]);
        assert!(history.get("nothing").is_empty());
    }

    #[test]
    fn the_length_of_a_run_is_known_after_its_first_update() {
        let history = History::parse(TEXT);
        assert_eq!(history.total_steps(None, 2.0, 16), Some(48), "384 rows");
        assert_eq!(history.total_steps(Some(7), 2.0, 16), Some(7));
        let odd = History { first_epoch: Some(0.4), ..History::default() };
        assert_eq!(odd.total_steps(None, 2.0, 4), Some(6), "10 rows, the last update of an epoch is smaller");
        let small = History { first_epoch: Some(1.0), ..History::default() };
        assert_eq!(small.total_steps(None, 3.0, 16), Some(3));
        assert_eq!(History::default().total_steps(None, 3.0, 16), None);
    }
}
