//! Several runs beside each other.

use std::collections::BTreeMap;

use serde::Serialize;

use super::chart::Chart;
use super::curves::{self, PANELS};
use super::page::{self, Picture, ROWS, fill};
use super::run::Run;
use super::ticks::{interval, tenths};

#[derive(Serialize)]
struct Page {
    title: String,
    names: Vec<String>,
    warnings: Vec<String>,
    rows: Vec<Row>,
    win_rates: Vec<[String; 3]>,
    differences: Vec<Row>,
    curves: Vec<Picture>,
    samples: Vec<Sample>,
}

#[derive(Debug, Serialize)]
struct Row {
    label: String,
    cells: Vec<Cell>,
}

#[derive(Debug, Serialize)]
struct Cell {
    text: String,
    best: bool,
}

#[derive(Serialize)]
struct Sample {
    prompt: String,
    answers: Vec<Answer>,
}

#[derive(Serialize)]
struct Answer {
    name: String,
    text: String,
}

/// Renders runs beside each other.
///
/// # Errors
/// The template engine's.
pub fn compare(runs: &[Run]) -> Result<String, minijinja::Error> {
    let names = names(runs);
    let histories: Vec<_> = names.iter().map(String::as_str).zip(runs.iter().map(|run| &run.history)).collect();
    let total = runs.iter().filter_map(|run| Some(run.history.step()).filter(|&step| step > 0)).max();
    let metrics = PANELS.iter().flat_map(|panel| panel.metrics());
    let charts = metrics.filter_map(|metric| curves::curve(&histories, metric, total));
    let page = Page {
        title: names.join(" · "),
        warnings: warnings(runs),
        rows: rows(runs),
        win_rates: win_rates(runs, &names),
        differences: differences(runs),
        curves: charts.map(|chart: Chart| Picture::new(chart.title.clone(), "", &chart.draw())).collect(),
        samples: samples(runs, &names),
        names,
    };
    fill("compare.html", &page)
}

/// What the runs are called; a number tells those of one name apart.
#[must_use]
pub fn names(runs: &[Run]) -> Vec<String> {
    let same = |name: &str| runs.iter().filter(|run| run.name == name).count() > 1;
    let name = |(i, run): (usize, &Run)| {
        if same(&run.name) { format!("{} ({})", run.name, i + 1) } else { run.name.clone() }
    };
    runs.iter().enumerate().map(name).collect()
}

/// Why their numbers should not be compared.
fn warnings(runs: &[Run]) -> Vec<String> {
    let mut warnings = Vec::new();
    if differ(runs, |run| run.summary.pointer("/data/eval/facts")) {
        warnings
            .push("The runs have different held-out data, so their metrics say little about each other.".to_owned());
    }
    if differ(runs, |run| run.summary.pointer("/hashes/base")) {
        warnings.push("The runs are on different bases.".to_owned());
    }
    if differ(runs, |run| run.recipe.as_ref().map(|recipe| (recipe.loss.name(), recipe.loss.beta()))) {
        warnings.push(
            "Losses, rewards and margins of another loss or beta are in other units; accuracies, log-probs and perplexity can \
             be compared."
                .to_owned(),
        );
    }
    warnings
}

/// Whether two runs are known to differ: one that has not ended has no summary, and says nothing.
fn differ<'r, T: PartialEq>(runs: &'r [Run], of: impl Fn(&'r Run) -> Option<T>) -> bool {
    let known: Vec<T> = runs.iter().filter_map(of).collect();
    known.windows(2).any(|pair| pair[0] != pair[1])
}

fn rows(runs: &[Run]) -> Vec<Row> {
    let row = |(metric, label, show, more): page::Row| {
        let values: Vec<Option<f64>> = runs.iter().map(|run| run.history.before_and_after(metric).1).collect();
        let known = || values.iter().flatten().copied();
        known().next()?;
        let best =
            more.map(|more| if more { known().fold(f64::MIN, f64::max) } else { known().fold(f64::MAX, f64::min) });
        let all_same = known().all(|value| Some(value) == best);
        let cell = |value: &Option<f64>| Cell {
            text: value.map_or("—".into(), show),
            best: !all_same && value.is_some() && *value == best,
        };
        Some(Row { label: label.to_owned(), cells: values.iter().map(cell).collect() })
    };
    let mut rows: Vec<Row> = ROWS.into_iter().filter_map(row).collect();
    let summary = |label: &str, show: &dyn Fn(&Run) -> Option<String>| {
        let text = |run: &Run| Cell { text: show(run).unwrap_or_else(|| "—".into()), best: false };
        Row { label: label.to_owned(), cells: runs.iter().map(text).collect() }
    };
    rows.push(summary("Updates", &|run| Some(crate::progress::thousands(run.history.step() as usize))));
    rows.push(summary("Time", &|run| Some(crate::progress::duration(run.summary.get("seconds")?.as_f64()?))));
    rows
}

fn win_rates(runs: &[Run], names: &[String]) -> Vec<[String; 3]> {
    let of = |(run, name): (&Run, &String)| {
        let rows: Vec<[String; 3]> = run
            .win_rates
            .iter()
            .map(|win_rate| {
                let interval =
                    win_rate.win_rate.interval.map_or(String::new(), |both| format!(" ({})", interval(both)));
                [
                    if win_rate.is_of_run() { name.clone() } else { format!("{name}, {}", win_rate.policy) },
                    format!("{}, by {}, {} prompts", win_rate.against, win_rate.judge.name, win_rate.prompts),
                    tenths(win_rate.win_rate.estimate) + &interval,
                ]
            })
            .collect();
        rows
    };
    runs.iter().zip(names).flat_map(of).collect()
}

/// Keys whose values are not the same in all recipes.
fn differences(runs: &[Run]) -> Vec<Row> {
    let values: Vec<BTreeMap<String, String>> = runs.iter().map(|run| flat(&run.recipe_text)).collect();
    let mut keys: Vec<&String> = values.iter().flat_map(BTreeMap::keys).collect();
    keys.sort_unstable();
    keys.dedup();
    // where a run went is no difference
    let other =
        |key: &&String| !key.starts_with("run.") && values.windows(2).any(|two| two[0].get(*key) != two[1].get(*key));
    let cell = |key: &String, values: &BTreeMap<String, String>| Cell {
        text: values.get(key).cloned().unwrap_or_else(|| "—".into()),
        best: false,
    };
    keys.into_iter()
        .filter(other)
        .map(|key| Row { label: key.clone(), cells: values.iter().map(|values| cell(key, values)).collect() })
        .collect()
}

/// `section.key` to value.
fn flat(recipe: &str) -> BTreeMap<String, String> {
    fn add(prefix: &str, value: &toml::Value, values: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    add(&key, value, values);
                }
            }
            value => _ = values.insert(prefix.to_owned(), value.to_string()),
        }
    }
    let mut values = BTreeMap::new();
    if let Ok(table) = recipe.parse::<toml::Table>() {
        add("", &toml::Value::Table(table), &mut values);
    }
    values
}

/// Prompts that more than one of them answered.
fn samples(runs: &[Run], names: &[String]) -> Vec<Sample> {
    let Some((first, rest)) = runs.split_first() else { return Vec::new() };
    let mut samples = Vec::new();
    for sample in &first.samples {
        let mut answers = vec![
            Answer { name: "base".into(), text: sample.base.clone() },
            Answer { name: names[0].clone(), text: sample.policy.clone() },
        ];
        for (run, name) in rest.iter().zip(&names[1..]) {
            let same = run.samples.iter().find(|other| other.prompt == sample.prompt);
            answers.extend(same.map(|other| Answer { name: name.clone(), text: other.policy.clone() }));
        }
        if answers.len() > 2 {
            samples.push(Sample { prompt: sample.prompt.clone(), answers });
        }
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_a_summary_is_not_said_to_differ() {
        let made = |summary| Run { summary, ..super::super::checks::tests::run(|_, _, value| value) };
        let summary = |base: &str, rows: u32| serde_json::json!({"hashes": {"base": base}, "data": {"eval": {"facts": {"rows": rows}}}});
        let (a, b) = (summary("a", 1), summary("b", 2));
        let warned = |summaries: &[&serde_json::Value]| {
            let runs: Vec<Run> = summaries.iter().map(|&summary| made(summary.clone())).collect();
            warnings(&runs).len()
        };
        let none = serde_json::Value::Null;
        assert_eq!([warned(&[&a, &none]), warned(&[&a, &a]), warned(&[&a, &b])], [0, 0, 2]);
        assert_eq!(warned(&[&a, &none, &b]), 2);
    }

    #[test]
    fn recipes_are_compared_key_by_key() {
        let a = flat("[run]\nout = \"a\"\n[loss.dpo]\nbeta = 0.1 # default\n[train]\nseed = 1\n");
        assert_eq!(a["loss.dpo.beta"], "0.1");
        assert_eq!(a.len(), 3);
        assert!(flat("not = = toml").is_empty());
    }
}
