//! What a run came to: `summary.json`, and a table for the person who waited for it.

use std::fs;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::prepare::Prepared;
use super::reference::Report;
use crate::adapter::peft;
use crate::data::Dataset;
use crate::device;
use crate::machine;
use crate::progress::{Console, duration, one_line};
use crate::report::Sample;
use crate::run_folder::RunFolder;
use crate::train::{Metrics, Trainer};

pub(super) struct Summary<'s> {
    pub(super) prepared: &'s Prepared,
    pub(super) trainer: &'s Trainer<'s>,
    pub(super) before: Option<&'s Metrics>,
    pub(super) after: Option<&'s Metrics>,
    pub(super) reference: Option<&'s Report>,
    pub(super) seconds: f64,
}

impl Summary<'_> {
    pub(super) fn json(&self) -> Value {
        let Prepared { run, loss, train, eval, fingerprints, base_name, model, expected_memory, .. } = self.prepared;
        let adapters = self.trainer.model().adapters();
        let adapter = peft::tensor_bytes(adapters).map(|bytes| blake3::hash(&bytes).to_string()).ok();
        let metrics = |metrics: Option<&Metrics>| metrics.map(Metrics::json);
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "run": run.folder.path().display().to_string(),
            "model": base_name,
            "loss": loss.name(),
            "before": metrics(self.before),
            "after": metrics(self.after),
            "steps": self.trainer.step(),
            "num_tokens": self.trainer.num_tokens(),
            "seconds": self.seconds,
            "reference": self.reference.map(Report::json),
            "peak_memory_bytes": device::peak_memory(model.decoder().device()),
            "expected_memory_bytes": expected_memory,
            "parameters": { "base": model.decoder().config().num_parameters(), "trainable": adapters.num_parameters() },
            "data": { "train": rows(train), "eval": eval.as_ref().map(rows) },
            "environment": {
                "system": format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH),
                "cpu": machine::processor(),
                "threads": rayon::current_num_threads(),
                "memory_bytes": machine::total_memory(),
            },
            "ended": now().to_string(),
            "hashes": { "base": fingerprints.base, "train": fingerprints.data, "adapter": adapter },
        })
    }

    /// The same for people.
    pub(super) fn tell(&self, samples: &[Sample], console: &Console) {
        if let (Some(before), Some(after)) = (self.before, self.after) {
            console.line(format_args!("\n{:<30}{:>10}{:>10}", "held out", "before", "after"));
            let shown = [
                ("logps/accuracies", "prefers chosen", 3),
                ("rewards/accuracies", "reward accuracy", 3),
                ("rewards/margins", "reward margin", 3),
                ("loss", "loss", 4),
                ("logps/chosen", "log-prob of chosen", 1),
                ("logps/rejected", "log-prob of rejected", 1),
                ("perplexity", "perplexity of chosen", 2),
                ("kl_to_reference", "KL to the reference a token", 4),
            ];
            for (name, label, digits) in shown {
                if let (Some(before), Some(after)) = (before.get(name), after.get(name)) {
                    console.line(format_args!("{label:<30}{before:>10.digits$}{after:>10.digits$}"));
                }
            }
        }
        const LONGEST: usize = 300;
        // where the answer changed is what there is to see
        let (changed, same): (Vec<_>, Vec<_>) = samples.iter().partition(|sample| sample.base != sample.policy);
        for sample in changed.into_iter().chain(same).take(2) {
            console.line(format_args!("\nprompt   {}", one_line(&sample.prompt, LONGEST)));
            console.line(format_args!("base     {}", one_line(&sample.base, LONGEST)));
            console.line(format_args!("policy   {}", one_line(&sample.policy, LONGEST)));
        }
        console.line(format_args!(
            "\n{} updates in {}; adapter and report.html are in {}",
            self.trainer.step(),
            duration(self.seconds),
            self.prepared.run.folder.shown()
        ));
    }
}

/// The time to the second, or that of `SOURCE_DATE_EPOCH`, for files that have to be the same again.
fn now() -> Timestamp {
    let set = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    let second = set.unwrap_or_else(|| Timestamp::now().as_second());
    Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn rows(dataset: &Dataset) -> Value {
    let drops = dataset.drops();
    json!({ "facts": dataset.facts(), "dropped": drops.counts(), "dropped_rows": drops.listed() })
}

/// The held-out metrics before the first update, from the first line of `metrics.jsonl`.
pub(super) fn read_before(run: &RunFolder) -> Option<Metrics> {
    let text = fs::read_to_string(run.metrics()).ok()?;
    let line: Map<String, Value> = serde_json::from_str(text.lines().next()?).ok()?;
    if line.get("step")?.as_u64()? != 0 {
        return None;
    }
    let mut metrics = Metrics::default();
    for (name, value) in &line {
        if let Some(name) = name.strip_prefix("eval_") {
            metrics.push(name, value.as_f64().unwrap_or(f64::NAN));
        }
    }
    Some(metrics)
}
