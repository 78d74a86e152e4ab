//! Wrong requests: a message that names file and row or line and says what to do, exit code 2, and nothing written.

use std::fs;

use super::{Place, pairs, quickstart, stderr, unwrapped};

/// Runs the recipe, which has to be refused without a trace, and gives the message on one line.
fn refused(place: &Place, more: &[&str]) -> String {
    let output = place.run(&[&["run", "recipe.toml", "--out", "out"], more].concat());
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(output.stdout.is_empty());
    assert!(!text.contains("panicked"), "{text}");
    assert!(!place.path("out").exists(), "{text}");
    unwrapped(&output)
}

fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// A copy of the quickstart's model to break.
fn model(place: &Place) {
    for entry in fs::read_dir(quickstart().join("model")).expect("read") {
        let path = entry.expect("read").path();
        place.write(
            &format!("model/{}", path.file_name().expect("a name").to_string_lossy()),
            fs::read(&path).expect("read"),
        );
    }
}

const OWN_MODEL: [&str; 2] = ["--set", "model.source=model"];

#[test]
fn no_recipe_or_none_that_is_there() {
    let place = Place::new();
    let output = place.run(&["run"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no recipe is named"));
    let output = place.run(&["run", "recip.toml"]);
    assert_eq!(output.status.code(), Some(2));
    says(&stderr(&output), &["recip.toml: does not exist", "did you mean recipe.toml?"]);
    assert_eq!(place.run(&["run", "--nonsense"]).status.code(), Some(2));
    assert_eq!(place.run(&[]).status.code(), Some(2));
}

#[test]
fn a_mistake_in_the_recipe_is_underlined() {
    let place = Place::new();
    place.write("recipe.toml", place.read("recipe.toml").replace("rank = 4", "rnak = 4"));
    says(&refused(&place, &[]), &["unknown key `rnak` in [adapter]", "recipe.toml:", "did you mean `rank`?"]);
}

#[test]
fn a_model_that_is_not_there_or_not_one() {
    let place = Place::new();
    let text = refused(&place, &["--set", "model.source=nowhere"]);
    says(&text, &["there is no folder", "nowhere", "model.source=", "Hugging Face layout"]);
    fs::create_dir(place.path("empty")).expect("made");
    says(&refused(&place, &["--set", "model.source=empty"]), &["config.json", "does not exist"]);
}

#[test]
fn a_model_type_that_is_not_supported() {
    let place = Place::new();
    model(&place);
    place.write("model/config.json", place.read("model/config.json").replace("\"llama\"", "\"mamba\""));
    says(&refused(&place, &OWN_MODEL), &["config.json", "`model_type` is `mamba`", "supported: llama"]);
}

#[test]
fn weights_that_are_a_pointer_truncated_or_of_another_model() {
    let place = Place::new();
    model(&place);
    let weights = fs::read(place.path("model/model.safetensors")).expect("read");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 5000000\n";
    place.write("model/model.safetensors", pointer);
    says(&refused(&place, &OWN_MODEL), &["model.safetensors", "is a Git-LFS pointer", "git lfs pull"]);
    place.write("model/model.safetensors", &weights[..weights.len() / 2]);
    says(&refused(&place, &OWN_MODEL), &["model.safetensors", "is cut short", "fetch the file again"]);
    place.write("model/model.safetensors", &weights);
    let config = place.read("model/config.json").replace("\"num_hidden_layers\": ", "\"num_hidden_layers\": 1");
    place.write("model/config.json", config);
    says(&refused(&place, &OWN_MODEL), &["no weight file has tensor `model.layers."]);
}

#[test]
fn a_broken_tokenizer_or_template() {
    let place = Place::new();
    model(&place);
    place.write("model/tokenizer.json", "{\"model\": 3}");
    says(&refused(&place, &OWN_MODEL), &["tokenizer.json"]);
    place.write("broken.jinja", "{% for message in messages %}");
    says(&refused(&place, &["--set", "data.chat_template=broken.jinja"]), &["broken.jinja"]);
}

#[test]
fn data_that_is_not_there_empty_broken_or_of_another_shape() {
    let place = Place::new();
    let with = |place: &Place, file: &str| refused(place, &["--set", &format!("data.train={file}")]);
    says(&with(&place, "nowhere.parquet"), &["nowhere.parquet", "does not exist"]);
    says(&with(&place, "*.arrow"), &["*.arrow"]);
    place.write("broken.parquet", "PAR1 and then nothing of use");
    says(&with(&place, "broken.parquet"), &["broken.parquet"]);
    place.write("columns.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n");
    says(&with(&place, "columns.jsonl"), &["columns.jsonl", "`question`", "`answer`"]);
    place.write("syntax.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n{\"prompt\": \n");
    says(&with(&place, "syntax.jsonl"), &["syntax.jsonl line 2"]);
    place.write("empty.jsonl", "");
    says(&with(&place, "empty.jsonl"), &["empty.jsonl", "has no rows"]);
    place.write("labelled.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\", \"label\": true}\n");
    says(&with(&place, "labelled.jsonl"), &["labelled.jsonl", "[loss.kto]"]);
    place.write("pointer.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 5000000\n");
    says(&with(&place, "pointer.parquet"), &["pointer.parquet", "Git-LFS pointer"]);
}

#[test]
fn parquet_without_the_needed_columns() {
    let place = Place::new();
    let eval = quickstart().join("eval.parquet");
    let text =
        refused(&place, &["--set", &format!("data.train={}", eval.display()), "--set", "data.columns.chosen=better"]);
    says(&text, &["eval.parquet", "has no column `better`"]);
}

#[test]
fn empty_completions_are_left_out_counted_and_listed_or_refused() {
    let place = Place::new();
    let mut rows = pairs(8);
    rows.push_str("{\"prompt\": \"a\", \"chosen\": \"\", \"rejected\": \"c\"}\n");
    rows.push_str("{\"prompt\": \"a\", \"chosen\": \"c\", \"rejected\": \"c\"}\n");
    place.write("pairs.jsonl", rows);
    let text = refused(&place, &["--set", "data.train=pairs.jsonl", "--set", "data.bad_rows=error"]);
    says(&text, &["pairs.jsonl line 9", "empty", "bad_rows = \"drop\""]);
    place.train("dropped", &["--set", "data.train=pairs.jsonl", "--set", "train.steps=1"]);
    let summary: serde_json::Value = serde_json::from_str(&place.read("dropped/summary.json")).expect("JSON");
    assert_eq!(summary["data"]["train"]["dropped"]["empty_completion"], 1);
    assert_eq!(summary["data"]["train"]["dropped"]["identical"], 1);
    assert_eq!(summary["data"]["train"]["dropped_rows"][0]["origin"], "pairs.jsonl line 9");
    place.write("pairs.jsonl", "{\"prompt\": \"a\", \"chosen\": \"\", \"rejected\": \"c\"}\n");
    says(&refused(&place, &["--set", "data.train=pairs.jsonl"]), &["none of the 1 rows", "empty completion"]);
}

#[test]
fn an_adapter_that_does_not_fit() {
    let place = Place::new();
    place.write("recipe.toml", place.read("recipe.toml").replace("rank = 4\n", ""));
    says(&refused(&place, &["--set", "adapter.init=nowhere"]), &["nowhere: is no adapter folder"]);
    says(&refused(&place, &["--set", "adapter.targets=[\"q_prj\"]"]), &["`q_prj`", "did you mean"]);
    let config = "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"target_modules\": [\"q_proj\"]}";
    place.write("adapter/adapter_config.json", config);
    says(&refused(&place, &["--set", "adapter.init=adapter"]), &["adapter_model.safetensors", "does not exist"]);
    place.write("adapter/adapter_model.safetensors", [0; 100]);
    says(&refused(&place, &["--set", "adapter.init=adapter"]), &["adapter_model.safetensors"]);
}

#[test]
fn a_run_that_fails_says_so_with_1_and_names_the_row() {
    let place = Place::new();
    let hot = ["--set", "train.learning_rate=1e30", "--set", "train.warmup=0", "--set", "train.steps=20"];
    let output = place.run(&[&["run", "recipe.toml", "--out", "out"][..], &hot[..]].concat());
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("not finite") && text.contains("learning rate"), "{text}");
    assert!(!place.path("out/adapter").exists());
}
