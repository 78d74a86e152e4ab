//! `dpo-lora plan`: what it says, and that runs keep to it.

use serde_json::Value;

use super::{Place, quickstart, stderr};

fn stdout(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn planned(place: &Place, more: &[&str]) -> (Option<i32>, Value) {
    let output = place.run(&[&["plan", "recipe.toml", "--json", "--quiet"], more].concat());
    let json = serde_json::from_slice(&output.stdout);
    (output.status.code(), json.unwrap_or_else(|error| panic!("{error}: {}", stderr(&output))))
}

#[test]
fn the_plan_of_the_quickstart() {
    let place = Place::new();
    let recipe = quickstart().with_extension("toml");
    let recipe = recipe.to_str().expect("a path in UTF-8");
    let output = place.run(&["plan", recipe, "--set", "train.memory=1GiB"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output).replace(env!("CARGO_MANIFEST_DIR"), "[repository]");
    // what follows depends on the machine
    let (plan, time) = text.split_once("\ntime\n").expect("a part about time");
    insta::assert_snapshot!(plan);
    for line in ["  rate ", "  an update ", "  the run "] {
        assert!(time.contains(line), "{time}");
    }
    assert!(!place.path("runs").exists(), "nothing is written");
}

#[test]
fn the_same_as_json() {
    let (code, plan) = planned(&Place::new(), &["--set", "train.memory=1GiB"]);
    assert_eq!(code, Some(0));
    assert_eq!(plan["run"]["updates"], 6);
    assert_eq!(plan["memory"]["budget_bytes"], 1 << 30);
    let inventory = plan["memory"]["inventory"].as_object().expect("a table");
    let sum: u64 = inventory.values().map(|bytes| bytes.as_u64().expect("bytes")).sum();
    assert_eq!(Some(sum), plan["memory"]["expected_bytes"].as_u64());
    assert_eq!(plan["memory"]["saved_by_layer"], serde_json::json!(["all", "all", "all", "all"]));
    let parts = ["linears", "attention", "lora", "head"].map(|part| plan["update_flops"][part].as_f64().expect(part));
    let total = plan["update_flops"]["total"].as_f64().expect("a total");
    assert!((parts.iter().sum::<f64>() - total).abs() < 1e-6 * total);
    assert!(plan["time"]["product_flops_per_second"].as_f64() > Some(1e8));
    assert!(plan["time"]["run_seconds"].as_f64() > plan["time"]["update_seconds"].as_f64());
    assert!(plan["epoch"]["padding_factor"]["8"].as_f64() > Some(1.0));
}

#[test]
fn less_memory_takes_more_work_and_gives_the_same_adapter() {
    let place = Place::new();
    let rows = "train.micro_batch_tokens=512";
    let tight = ["--set", rows, "--set", "train.memory=54MiB"];
    let (code, plan) = planned(&place, &tight);
    assert_eq!(code, Some(0), "{plan:#}");
    assert!(plan["update_flops"]["recomputed"].as_f64() > Some(0.0), "{plan:#}");
    assert!(plan["memory"]["at_most_bytes"].as_u64() <= Some(54 << 20));
    place.train("tight", &tight);
    place.train("ample", &["--set", rows]);
    assert_eq!(place.adapter("tight"), place.adapter("ample"));
    assert_eq!(place.metrics("tight")[6]["loss"], place.metrics("ample")[6]["loss"]);
    let summary: Value = serde_json::from_str(&place.read("tight/summary.json")).expect("JSON");
    assert_eq!(summary["expected_memory_bytes"], plan["memory"]["expected_bytes"]);
    assert!(place.read("tight/recipe.resolved.toml").contains("memory = \"54MiB\""));
}

#[test]
fn what_does_not_fit_is_planned_with_a_warning_and_not_run() {
    let place = Place::new();
    let little = ["--set", "train.memory=30MiB"];
    let (code, plan) = planned(&place, &little);
    assert_eq!(code, Some(3));
    assert_eq!(plan["memory"]["fits"], false);
    let output = place.run(&[&["run", "recipe.toml", "--out", "out"], &little[..]].concat());
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(text.contains("30 MiB of memory are too little: the run needs"), "{text}");
    assert!(text.contains("train.parquet row"), "{text}");
    assert!(!place.path("out").exists());
}

#[test]
fn a_run_goes_on_with_the_memory_it_was_begun_with() {
    let place = Place::new();
    place.train("out", &["--set", "train.memory=200MiB"]);
    // the recipe says nothing of memory, and the machine may have another amount free by now
    let output = place.run(&["run", "recipe.toml", "--out", "out", "--resume"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = place.run(&["run", "recipe.toml", "--out", "out", "--resume", "--set", "train.memory=201MiB"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("`train.memory` is not what it was"), "{}", stderr(&output));
}
