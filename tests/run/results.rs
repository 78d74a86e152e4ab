//! What a run leaves behind.

use serde_json::Value;

use super::{Place, quickstart, stderr};

/// The quickstart's held-out pairs.
fn eval() -> String {
    format!("data.eval={}", quickstart().join("eval.parquet").display())
}

#[test]
fn a_run_folder_has_everything_and_the_summary_says_so() {
    let place = Place::new();
    let output = place.run(&["run", "recipe.toml", "--out", "out", "--json", "--set", &eval()]);
    assert!(output.status.success(), "{}", stderr(&output));
    for file in [
        "recipe.toml",
        "recipe.resolved.toml",
        "metrics.jsonl",
        "summary.json",
        "samples.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
        "checkpoints/step-000006/state.json",
    ] {
        assert!(place.path("out").join(file).is_file(), "{file}");
    }
    assert_eq!(place.read("out/recipe.toml"), place.read("recipe.toml"));
    let printed: Value = serde_json::from_slice(&output.stdout).expect("stdout is JSON and nothing else");
    let written: Value = serde_json::from_str(&place.read("out/summary.json")).expect("JSON");
    assert_eq!(printed, written);
    assert_eq!(written["before"]["rewards/margins"], 0);
    assert!(written["after"]["loss"].as_f64() < written["before"]["loss"].as_f64());
    assert!(written["hashes"]["adapter"].is_string());
    let sample: Value =
        serde_json::from_str(place.read("out/samples.jsonl").lines().next().expect("one")).expect("JSON");
    assert!(sample["base"].is_string() && sample["policy"].is_string());

    let metrics = place.metrics("out");
    assert_eq!(metrics.len(), 7, "the start and six updates");
    for name in ["loss", "grad_norm", "learning_rate", "epoch", "rewards/chosen", "rewards/margins", "logps/rejected"]
    {
        assert!(metrics[1][name].is_number(), "{name}");
    }
    assert_eq!(metrics[1]["loss"].as_f64(), Some(std::f64::consts::LN_2));
    assert!(metrics[6]["eval_rewards/accuracies"].is_number());
}

#[test]
fn every_loss_trains() {
    let place = Place::new();
    for loss in ["dpo.label_smoothing=0.1", "ipo.reduction=\"sum\"", "kto.beta=0.1", "orpo.nll=\"prompt+completion\""]
    {
        let loss = format!("loss.{loss}");
        let out = loss.split('=').next().expect("a name");
        place.train(out, &["--set", &loss, "--set", "train.steps=3", "--set", "train.warmup=0", "--set", &eval()]);
        let after: Value = serde_json::from_str(&place.read(&format!("{out}/summary.json"))).expect("JSON");
        let margin = |when: &str| after[when]["rewards/margins"].as_f64();
        assert!(margin("after") > margin("before"), "{loss}");
    }
    // [loss.sft] has no key to set
    let recipe = place.read("recipe.toml").replace("[loss.dpo]", "[loss.sft]");
    place.write("recipe.toml", recipe);
    place.train("sft", &["--set", "train.steps=3"]);
}

#[test]
fn an_adapter_of_a_run_starts_another() {
    let place = Place::new();
    place.train("first", &[]);
    place.write("recipe.toml", place.read("recipe.toml").replace("rank = 4\n", ""));
    place.train(
        "second",
        &["--set", "adapter.init=first/adapter", "--set", "train.steps=1", "--set", "train.warmup=1"],
    );
    // an update at learning rate zero: the adapter went in and came out
    assert_eq!(place.adapter("first"), place.adapter("second"));
}

/// What a run goes on with, stands on, and is compared with: the first update tells.
#[test]
fn an_adapter_is_gone_on_with_or_stood_on_and_is_the_reference_or_not() {
    let place = Place::new();
    place.train("first", &["--set", "adapter.dora=true", "--set", "train.loraplus_ratio=4"]);
    place.train("plain", &["--set", "adapter.layers=[0]", "--set", "adapter.rank_pattern={q_proj = 2}"]);
    let stack = ["--set", "adapter.init_mode=\"stack\"", "--set", "run.checkpoint_every=1"];
    let first_loss = |out: &str| place.metrics(out)[1]["loss"].as_f64().expect("a loss");
    let ln_2 = |loss: f64| (loss - std::f64::consts::LN_2).abs() < 1e-6;
    for (name, init, more) in [
        ("stacked", "plain/adapter", &stack[..]),
        (
            "pissa",
            "plain/adapter",
            &["--set", "adapter.init_mode=\"stack\"", "--set", "adapter.init_weights=\"pissa\""],
        ),
    ] {
        let set = format!("adapter.init={init:?}");
        for (reference, same) in [("init", true), ("base", false)] {
            let out = format!("{name}-{reference}");
            let compared = format!("reference.model={reference:?}");
            place.train(&out, &[&["--set", &set, "--set", &compared], more].concat());
            assert_eq!(ln_2(first_loss(&out)), same, "{out}: {}", first_loss(&out));
            let after: Value = serde_json::from_str(&place.read(&format!("{out}/summary.json"))).expect("JSON");
            let margin = |when: &str| after[when]["rewards/margins"].as_f64();
            assert!(margin("after") > margin("before"), "{out}: {after}");
        }
    }
    // killed after an update and resumed, what it stands on is there again
    let (whole, killed) = (place.path("stacked-init"), place.path("killed"));
    std::fs::rename(&whole, &killed).expect("moved");
    for folder in ["checkpoints/step-000006", "adapter"] {
        std::fs::rename(killed.join(folder), place.path(folder.rsplit('/').next().expect("a name"))).expect("moved");
    }
    let output = place.run(&["run", "--resume", "killed"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let whole = std::fs::read(place.path("adapter/adapter_model.safetensors")).expect("there");
    assert_eq!(place.adapter("killed"), whole);

    place.write("recipe.toml", place.read("recipe.toml").replace("rank = 4\n", ""));
    for (reference, same) in [("init", true), ("base", false)] {
        let (out, compared) = (format!("on-{reference}"), format!("reference.model={reference:?}"));
        place.train(&out, &["--set", "adapter.init=\"first/adapter\"", "--set", &compared]);
        assert_eq!(ln_2(first_loss(&out)), same, "{out}: {}", first_loss(&out));
    }
    let refused = place.run(&[
        "run",
        "recipe.toml",
        "--set",
        "adapter.init=\"first/adapter\"",
        "--set",
        "adapter.init_mode=\"stack\"",
    ]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("nothing can be stacked on one"), "{}", stderr(&refused));
}

#[test]
fn quiet_is_quiet() {
    let place = Place::new();
    let output = place.run(&["run", "recipe.toml", "--quiet", "--set", "train.steps=1"]);
    assert!(output.status.success());
    assert_eq!((stderr(&output).as_str(), output.stdout.len()), ("", 0));
    // without --out the folder is named after recipe and time
    let run = std::fs::read_dir(place.path("runs")).expect("runs/").next().expect("one").expect("read");
    assert!(run.file_name().to_string_lossy().starts_with("recipe-2"));
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_does_not_end_a_run() {
    let place = Place::new();
    let mut child = place
        .command(&["run", "recipe.toml", "--out", "out"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("started");
    drop(child.stderr.take());
    assert!(child.wait().expect("ended").success());
    assert!(place.path("out/adapter/adapter_model.safetensors").is_file());
}

/// The quickstart's model in eight bits and in four: the loss falls, and the plan knows what the base takes.
#[test]
fn a_quantized_base_trains() {
    for quant in ["q8_0", "q4_k", "nf4"] {
        let place = Place::new();
        let set = format!("model.quant={quant:?}");
        place.train("out", &["--set", &set, "--set", "train.steps=24", "--set", "train.batch_size=8"]);
        let losses: Vec<f64> = place.metrics("out").iter().filter_map(|line| line["loss"].as_f64()).collect();
        assert_eq!(losses.len(), 24);
        assert_eq!(losses[0], std::f64::consts::LN_2, "{quant}: policy and reference are the same base");
        let last = losses[20..].iter().sum::<f64>() / 4.0;
        assert!(last < 0.6, "{quant}: {losses:?}");
    }
}

#[test]
fn a_quantized_base_is_another_base() {
    let place = Place::new();
    place.train("out", &["--set", "model.quant=\"q8_0\"", "--set", "train.steps=2"]);
    let recipe = ["run", "recipe.toml", "--out", "out", "--resume", "--set", "train.steps=2"];
    let output = place.run(&recipe);
    assert_eq!(output.status.code(), Some(2));
    let error = crate::stderr(&output);
    assert!(error.contains("`model.quant` is not what it was"), "{error}");
}
