//! `merge`, `compare` and `export` on a run of the quickstart's model, and on TRL's real adapter.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use dpo_lora::tensor_file::TensorFile;
use serde_json::Value;

use super::{Place, pairs, quickstart, stderr};

/// A place with a trained run in it.
fn trained() -> Place {
    let place = Place::new();
    place.train("run", &["--set", "train.steps=20", "--set", "train.learning_rate=3e-3"]);
    place
}

fn ok(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

/// Of the model in the last line of the accounts.
fn last(accounts: &Value, key: &str) -> f64 {
    accounts["held_out"]["models"].as_array().expect("models").last().expect("one")[key].as_f64().expect("a number")
}

/// Every file of a folder with its bytes, or of the one file.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    if folder.is_file() {
        return vec![(String::new(), fs::read(folder).expect("read"))];
    }
    let mut files: Vec<_> = fs::read_dir(folder)
        .expect("a folder")
        .flatten()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("read")))
        .collect();
    files.sort();
    files
}

#[test]
fn a_merged_model_is_base_and_adapter_and_its_accounts_say_so() {
    let place = trained();
    let facts = ok(&place.run(&["merge", "run", "--out", "f32", "--type", "f32", "--json", "--fail-if-kl", "1e-6"]));
    let accounts = &facts["accounts"];
    assert_eq!(facts["type"], "float32");
    assert!(last(accounts, "kl") < 1e-8 && last(accounts, "top1") == 1.0, "{accounts}");
    assert!(last(accounts, "largest_difference") < 1e-3, "{accounts}");
    let models = accounts["held_out"]["models"].as_array().expect("models");
    assert_eq!(models.len(), 4);
    assert!(models[0]["kl"].as_f64() > Some(1e-4) && models[0]["margin"].as_f64() == Some(0.0), "{models:?}");
    let layers = accounts["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 5);
    // written in f32 it is the sum, rounded once
    assert!(layers.iter().all(|layer| (layer["kept"].as_f64().expect("a share") - 1.0).abs() < 1e-6), "{layers:?}");

    // the merged folder is a base like any other, with the tokenizer and template of the run
    let source = format!("model.source={:?}", place.path("f32"));
    place.train("again", &["--set", &source, "--set", "train.steps=1"]);
    assert!(place.read("f32/README.md").contains("library_name: transformers"));

    // rounded to bf16 it is a little off, and a limit below that is not held
    let rounded = place.run(&["merge", "run", "--out", "bf16", "--type", "bf16", "--json", "--fail-if-kl", "1e-12"]);
    assert_eq!(rounded.status.code(), Some(3));
    assert!(stderr(&rounded).contains("--fail-if-kl: KL from base + adapter is"), "{}", stderr(&rounded));
    let rounded: Value = serde_json::from_slice(&rounded.stdout).expect("JSON");
    assert!((1e-12..1e-2).contains(&last(&rounded["accounts"], "kl")), "{rounded}");
    let config: Value = serde_json::from_str(&place.read("bf16/config.json")).expect("JSON");
    assert!(config["dtype"] == "bfloat16" || config["torch_dtype"] == "bfloat16");

    // the base itself has nothing of the update
    let base = quickstart().join("model");
    let lost = place.run(&["compare", "run", base.to_str().expect("UTF-8"), "--json", "--fail-if-kl", "1e-4"]);
    assert_eq!(lost.status.code(), Some(3));
    assert!(stderr(&lost).contains("only 0 % of the update is left"), "{}", stderr(&lost));
    assert!(stderr(&lost).contains("what was trained has not come through"), "{}", stderr(&lost));
}

#[test]
fn a_quantized_base_is_merged_as_it_was_trained_on() {
    for quant in ["nf4", "q8_0", "q4_k"] {
        let place = Place::new();
        let quant = format!("model.quant={quant:?}");
        place.train("run", &["--set", &quant, "--set", "train.steps=8", "--set", "train.learning_rate=3e-3"]);
        let facts = ok(&place.run(&["merge", "run", "--out", "merged", "--type", "f32", "--json", "-q"]));
        let accounts = &facts["accounts"];
        assert!(last(accounts, "kl") < 1e-8 && last(accounts, "largest_difference") < 1e-3, "{quant}: {accounts}");
        // a base that was read otherwise would be far off
        let other = ok(&place.run(&["compare", "run", "merged", "--quant", "none", "--json", "-q"]));
        assert!(last(&other, "kl") > 1e-6, "{quant}: {other}");
    }
}

#[test]
fn what_is_there_is_not_written_over_and_what_cannot_be_is_said_before() {
    let place = trained();
    place.write("taken/file", "mine");
    let merge = |more: &[&str]| place.run(&[&["merge", "run"], more].concat());
    for (arguments, expected) in [
        (&["--out", "taken"][..], "taken is there"),
        (&["--out", "new", "--type", "q4_k"], "is no type of a Hugging Face folder"),
        (&["--out", "new", "--weights", "1,2"], "2 weights are given for 1 adapters"),
        (&["--out", "new", "--base", "nowhere"], "there is no folder"),
        (&["--out", "new", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (&["--out", "new", "--quant", "q9"], "it is one of none, f16"),
    ] {
        let output = merge(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{arguments:?}: {}", stderr(&output));
    }
    assert_eq!(place.read("taken/file"), "mine");
    assert!(!place.path("new").exists());
    ok(&merge(&["--out", "taken", "--force", "--no-accounts"]));
    assert!(!place.path("taken/file").exists() && place.path("taken/model.safetensors").exists());

    let output = place.run(&["merge", "run/adapter/nothing", "--out", "new"]);
    assert!(stderr(&output).contains("is neither a run nor an adapter"), "{}", stderr(&output));
    // an adapter alone knows of no held-out pairs
    fs::rename(place.path("run/adapter"), place.path("alone")).expect("moved");
    let output = place.run(&["merge", "alone", "--out", "new", "--fail-if-kl", "0.1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--data held-out.jsonl"), "{}", stderr(&output));
    let output = place.run(&["merge", "run", "--out", "new"]);
    assert!(stderr(&output).contains("has no adapter yet"), "{}", stderr(&output));
    ok(&place.run(&["merge", "alone", "--out", "new", "--fail-if-kl", "0.1", "--data", "held-out.jsonl"]));
    assert!(place.path("new/model.safetensors").exists());
    ok(&place.run(&["merge", "run/checkpoints/step-000020", "--out", "newer", "--no-accounts"]));
    assert_eq!(contents(&place.path("new")).len(), contents(&place.path("newer")).len());
}

#[test]
fn adapters_are_added_cut_and_brought_to_one_scale() {
    let place = trained();
    place.train("other", &["--set", "train.steps=5", "--set", "adapter.rslora=true", "--set", "train.seed=7"]);
    let export = |out: &str, more: &[&str]| {
        let output = place.run(&[&["export", "run", "other", "--weights", "0.5,-1", "--out", out], more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    export("sum", &[]);
    export("folded", &["--scale-into-b", "--check", "vllm", "--check", "llama.cpp", "--check", "peft"]);
    let cut = export("cut", &["--rank", "3"]);
    assert!(cut.contains("% of the update is lost"), "{cut}");
    let base = quickstart().join("model");
    let merge = |names: &[&str], out: &str, more: &[&str]| {
        let arguments = ["--out", out, "--no-accounts", "--base", base.to_str().expect("UTF-8")];
        ok(&place.run(&[&["merge"], names, &arguments[..], more].concat()));
    };
    merge(&["run", "other"], "merged-at-once", &["--weights", "0.5,-1"]);
    merge(&["sum"], "merged-sum", &[]);
    merge(&["folded"], "merged-folded", &[]);
    let file = |name: &str| TensorFile::open(&place.path(name).join("model.safetensors")).expect("opened");
    let (at_once, sum, folded) = (file("merged-at-once"), file("merged-sum"), file("merged-folded"));
    for name in at_once.names() {
        let values = |file: &TensorFile| file.read_f32(&name, file.shape(&name).expect("there")).expect("read");
        let (at_once, sum, folded) = (values(&at_once), values(&sum), values(&folded));
        assert_eq!(at_once, sum, "{name}");
        // the same products, multiplied by their scale at another time
        assert!(at_once.iter().zip(&folded).all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
    }
}

#[test]
fn an_export_is_what_its_readers_take() {
    let place = trained();
    ok(&place.run(&["export", "run", "--out", "adapter", "--modelfile", "--check", "peft"]));
    // the adapter is the run's own, byte for byte, with a card beside it
    for name in ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"] {
        assert_eq!(
            fs::read(place.path("adapter").join(name)).expect("read"),
            fs::read(place.path("run/adapter").join(name)).expect("read")
        );
    }
    let card = place.read("adapter/README.md");
    for expected in ["library_name: peft", "- \"dpo\"", "| reward accuracy |", "rank = 4", "arxiv.org/abs/2305.18290"]
    {
        assert!(card.contains(expected), "{expected}: {card}");
    }
    let here = place.path("").display().to_string();
    assert!(!card.split("The recipe:").next().expect("a card").contains(here.trim_end_matches('/')), "{card}");
    let modelfile = place.read("adapter/Modelfile");
    assert!(modelfile.contains(&format!("ADAPTER {}", place.path("adapter").display())), "{modelfile}");
    assert!(modelfile.contains("PARAMETER stop \"<|end|>\""), "{modelfile}");

    place.train("dora", &["--set", "adapter.dora=true", "--set", "train.steps=2"]);
    let refused = place.run(&["export", "dora", "--out", "no", "--check", "vllm"]);
    assert_eq!(refused.status.code(), Some(3));
    assert!(stderr(&refused).contains("DoRA is not supported"), "{}", stderr(&refused));
    assert!(!place.path("no").exists());
    ok(&place.run(&["export", "dora", "--out", "yes", "--check", "peft"]));
    // merged it is a plain model
    let facts = ok(&place.run(&["merge", "dora", "--out", "merged", "--type", "f32", "--json", "-q"]));
    assert!(last(&facts["accounts"], "kl") < 1e-8, "{facts}");
}

#[test]
fn a_gguf_file_is_the_model_and_what_its_blocks_lose_is_told() {
    let place = trained();
    let merge = |out: &str, more: &[&str]| place.run(&[&["merge", "run", "--out", out, "--json"], more].concat());
    let exact = ok(&merge("f32.gguf", &["--type", "f32", "--modelfile", "--fail-if-kl", "1e-6"]));
    assert_eq!(exact["type"], "f32");
    assert!(last(&exact["accounts"], "largest_difference") < 1e-3, "{exact}");
    let modelfile = place.read("f32.Modelfile");
    assert!(modelfile.contains(&format!("FROM {}", place.path("f32.gguf").display())), "{modelfile}");

    // the fewer bits, the more of the update is lost, and the table says it
    let mut kept = vec![1.0 + 1e-6];
    let mut kl = vec![0.0];
    for name in ["f16", "q8_0", "q4_0"] {
        let facts = ok(&merge(&format!("{name}.gguf"), &["--type", name]));
        assert_eq!(facts["type"], name);
        kl.push(last(&facts["accounts"], "kl"));
        let layers = facts["accounts"]["layers"].as_array().expect("layers");
        kept.push(layers.last().expect("all")["rounding"].as_f64().expect("a number"));
    }
    assert!(kl.windows(2).all(|two| two[0] < two[1]), "{kl:?}");
    assert!(kept[1..].windows(2).all(|two| two[0] < two[1]), "{kept:?}");
    let rounded = merge("q2_k.gguf", &["--type", "q2_k", "--fail-if-kl", "1e-6"]);
    assert_eq!(rounded.status.code(), Some(3), "{}", stderr(&rounded));
    assert!(stderr(&rounded).contains("merged, q2_k"), "{}", stderr(&rounded));
    for (out, kind, expected) in [
        ("x.gguf", "nf4", "--type nf4 is no type of a GGUF file"),
        ("x.gguf", "q4_k_m", "--type q4_k_m is no type of a GGUF file"),
    ] {
        let output = merge(out, &["--type", kind]);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }

    // it is a base like any other, with tokenizer and template
    let source = format!("model.source={:?}", place.path("q8_0.gguf"));
    place.train("again", &["--set", &source, "--set", "train.steps=2"]);
    // merged once more it stays in GGUF
    let again = ok(&place.run(&["merge", "again", "--out", "again.gguf", "--type", "q8_0", "--json"]));
    assert!(last(&again["accounts"], "top1") > 0.9, "{again}");
    let folder = place.run(&["merge", "again", "--out", "again-folder"]);
    assert!(stderr(&folder).contains("name a file that ends in .gguf"), "{}", stderr(&folder));

    ok(&place.run(&["export", "run", "--out", "lora.gguf", "--modelfile", "--check", "llama.cpp"]));
    let modelfile = place.read("lora.Modelfile");
    assert!(modelfile.contains(&format!("ADAPTER {}", place.path("lora.gguf").display())), "{modelfile}");
}

/// Kills merges and exports at moments spread over what one takes.
#[test]
fn a_killed_merge_or_export_leaves_the_old_or_the_new() {
    let place = trained();
    place.train("other", &["--set", "train.steps=3"]);
    for (command, out) in [("merge", "out"), ("export", "out"), ("merge", "out.gguf"), ("export", "out-lora.gguf")] {
        let run = |adapter: &str| {
            let mut arguments = vec![command, adapter, "--out", out, "--force"];
            if command == "merge" {
                arguments.extend(["--no-accounts", "--shard-size", "500KB"]);
            }
            place.command(&arguments)
        };
        let mut versions = Vec::new();
        let mut took = Duration::ZERO;
        for adapter in ["run", "other"] {
            let started = std::time::Instant::now();
            assert!(run(adapter).stderr(Stdio::null()).status().expect("started").success());
            took = started.elapsed();
            versions.push(contents(&place.path(out)));
        }
        assert_ne!(versions[0], versions[1]);
        let mut seen = [0, 0];
        for attempt in 0..40 {
            let adapter = ["run", "other"][attempt % 2];
            let mut child = run(adapter).stderr(Stdio::null()).spawn().expect("started");
            std::thread::sleep(took.mul_f64(attempt as f64 / 26.0));
            let _ = child.kill();
            child.wait().expect("ended");
            let found = contents(&place.path(out));
            let version = versions.iter().position(|version| *version == found);
            seen[version
                .unwrap_or_else(|| panic!("{command} to {out}, attempt {attempt}: neither the old nor the new"))] +=
                1;
        }
        assert!(seen.iter().all(|&count| count > 0), "{command} to {out}: {seen:?}");
        // the next one clears what was left half-written
        assert!(run("run").stderr(Stdio::null()).status().expect("started").success());
        let left: Vec<String> =
            contents_of(&place.path("")).into_iter().filter(|name| name.contains(".partial")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn contents_of(folder: &Path) -> Vec<String> {
    fs::read_dir(folder)
        .expect("a folder")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// A file that may not grow any more fails as a full disk does, in the middle of a write.
#[cfg(unix)]
#[test]
fn a_write_that_fails_says_so_and_leaves_nothing() {
    let place = trained();
    place.write("out/old", "old");
    let program = env!("CARGO_BIN_EXE_dpo-lora");
    for (out, file) in [("out", "model.safetensors"), ("out.gguf", "out.gguf")] {
        let script =
            format!("trap '' XFSZ; ulimit -f 2000; exec {program} merge run --out {out} --force --no-accounts -q");
        let output = Command::new("sh").args(["-c", &script]).current_dir(place.path("")).output().expect("started");
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(said.contains("cannot write") && said.contains(file), "{said}");
    }
    assert!(!place.path("out.gguf").exists());
    assert_eq!(contents_of(&place.path("out")), ["old"]);
    assert!(!contents_of(&place.path("")).iter().any(|name| name.contains(".partial")));
}

#[test]
fn trls_adapter_merges_as_peft_merges_it() {
    let Some(real) = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from) else {
        eprintln!("skipped: DPO_LORA_REAL is not set");
        return;
    };
    let trl = real.join("adapters/trl-dpo-stories260K");
    let place = Place::new();
    let text = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
    let (adapter, base) = (text(trl.join("sigmoid/final")), text(real.join("stories260K")));
    ok(&place.run(&["merge", &adapter, "--base", &base, "--out", "merged", "--no-accounts"]));
    let ours = TensorFile::open(&place.path("merged/model.safetensors")).expect("opened");
    let theirs = TensorFile::open(&trl.join("sigmoid/merged/model.safetensors")).expect("opened");
    assert_eq!(ours.names(), theirs.names());
    for name in ours.names() {
        let values = |file: &TensorFile| file.read_f32(&name, file.shape(&name).expect("there")).expect("read");
        let largest = values(&ours).iter().zip(values(&theirs)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 1e-6, "{name}: {largest}");
    }
    // on foreign data, what is not known of is held out by hand
    place.write("pairs.jsonl", pairs(3));
    let facts =
        ok(&place.run(&["compare", &adapter, "merged", "--base", &base, "--data", "pairs.jsonl", "--json", "-q"]));
    assert!(last(&facts, "kl") < 1e-8, "{facts}");
}
