//! The reference's log-probs are computed once, whatever becomes of the run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Place, quickstart, stderr};

fn reference(place: &Place, out: &str) -> Value {
    let summary: Value = serde_json::from_str(&place.read(&format!("{out}/summary.json"))).expect("JSON");
    summary["reference"].clone()
}

fn counts(place: &Place, out: &str) -> (u64, u64) {
    let reference = reference(place, out);
    let count = |name: &str| reference[name].as_u64().unwrap_or_else(|| panic!("{name}: {reference}"));
    (count("cached"), count("computed"))
}

fn folder(place: &Place, out: &str) -> PathBuf {
    PathBuf::from(reference(place, out)["cache"].as_str().expect("a folder"))
}

fn parts(folder: &Path) -> usize {
    fs::read_dir(folder).expect("there").count()
}

#[test]
fn a_run_with_another_beta_does_not_compute_it_again() {
    let place = Place::new();
    place.train("first", &[]);
    place.train("second", &["--set", "loss.dpo.beta=0.3", "--set", "train.learning_rate=1e-4"]);
    place.train("ipo", &["--set", "loss.ipo.beta=0.3"]);
    // 6 updates of 4
    assert_eq!(counts(&place, "first"), (0, 24));
    assert_eq!(counts(&place, "second"), (24, 0));
    assert_eq!(counts(&place, "ipo"), (24, 0));
    assert_eq!(parts(&folder(&place, "first")), 1);
    // the other rows of a longer run, and no more
    place.train("longer", &["--set", "train.steps=8"]);
    assert_eq!(counts(&place, "longer"), (24, 8));
}

#[test]
fn training_does_not_depend_on_where_it_comes_from() {
    let place = Place::new();
    for cache in ["user", "run", "off"] {
        place.train(cache, &["--set", &format!("reference.cache=\"{cache}\"")]);
    }
    place.train("again", &[]);
    assert_eq!(folder(&place, "run").parent(), Some(&*place.path("run/reference")));
    assert_eq!(folder(&place, "user").parent(), Some(&*place.path("cache/reference")));
    assert!(reference(&place, "off").is_null());
    for out in ["run", "off", "again"] {
        assert_eq!(place.adapter(out), place.adapter("user"), "{out}");
    }
}

#[test]
fn a_loss_without_a_reference_has_none() {
    let place = Place::new();
    place.train("orpo", &["--set", "loss.orpo.beta=0.1"]);
    assert!(reference(&place, "orpo").is_null());
    assert!(!place.path("cache").exists());
}

/// Whatever it was doing, reading, scoring or training.
#[test]
fn stopped_at_any_moment_it_goes_on_with_what_was_done() {
    let place = Place::new();
    let train = format!("data.train=\"{}\"", quickstart().join("train.parquet").display());
    let more = ["--set", &train, "--set", "train.steps=8", "--set", "train.batch_size=16"];
    let arguments = |out: &'static str| [&["run", "recipe.toml", "--out", out][..], &more].concat();
    let whole = place.run(&arguments("whole"));
    assert!(whole.status.success(), "{}", stderr(&whole));
    fs::remove_dir_all(place.path("cache")).expect("there");
    for (signal, code) in [("INT", Some(130)), ("KILL", None)] {
        let out = if signal == "INT" { "interrupted" } else { "killed" };
        let mut child = place.command(&arguments(out)).stderr(Stdio::null()).spawn().expect("started");
        let begun = Instant::now();
        while !place.path(&format!("{out}/recipe.toml")).exists() && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(500));
        let sent = std::process::Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
        assert_eq!(child.wait().expect("it ends").code(), code);
        let resumed = place.run(&["run", "--resume", out]);
        assert!(resumed.status.success(), "{}", stderr(&resumed));
        assert_eq!(place.adapter(out), place.adapter("whole"), "{out}");
    }
}

#[test]
fn a_broken_or_wrong_cache_is_said_and_replaced() {
    let place = Place::new();
    place.train("first", &[]);
    let cache = folder(&place, "first");
    let part = fs::read_dir(&cache).expect("there").flatten().next().expect("a part").path();
    let bytes = fs::read(&part).expect("read");
    fs::write(&part, &bytes[..bytes.len() - 9]).expect("written");
    let again = |out: &'static str, model: &str| {
        let output = place.run(&["run", "recipe.toml", "--out", out, "--set", &format!("model.source=\"{model}\"")]);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    let model = quickstart().join("model");
    let said = again("broken", &model.display().to_string());
    assert!(said.contains("computed anew") && said.contains(&*part.display().to_string()), "{said}");
    assert_eq!(counts(&place, "broken").0, 0);
    assert_eq!(place.adapter("broken"), place.adapter("first"));

    // another base whose cache is given the first one's numbers
    for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"]
    {
        place.write(&format!("base/{name}"), fs::read(model.join(name)).expect("there"));
    }
    let config = place.read("base/config.json").replace("\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 0.5");
    assert!(config.contains("0.5"), "{config}");
    place.write("base/config.json", config);
    again("other", "base");
    let others = folder(&place, "other");
    assert_ne!(others, cache);
    fs::remove_dir_all(&others).expect("there");
    fs::rename(&cache, &others).expect("renamed");
    let said = again("wrong", "base");
    assert!(said.contains("computed anew") && said.contains("train.parquet row"), "{said}");
    assert_eq!(place.adapter("wrong"), place.adapter("other"));
}
