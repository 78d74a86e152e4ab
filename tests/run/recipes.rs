//! The recipes that a person would start from, planned against their models' real configurations.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::{Place, quickstart, stderr};

/// Bytes of a GPU or a laptop that people have.
const MEMORY: u64 = 24 << 30;

/// Name, parameters of the base as its model card says, and bytes that the base may take, both in thousands of millions.
const RECIPES: [(&str, f64, f64); 6] = [
    ("llama8b", 8.03, 6.1),
    ("qwen3-4b", 4.02, 2.4),
    ("smollm2-135m-cpu", 0.1345, 0.54),
    ("mistral7b-ipo", 7.25, 4.2),
    ("gemma3-4b-orpo", 3.88, 2.4),
    ("kto", 1.54, 1.7),
];

#[test]
fn every_recipe_is_planned_and_fits() {
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut found: Vec<_> = fs::read_dir(&recipes)
        .expect("a folder")
        .filter_map(|entry| {
            let path = entry.expect("an entry").path();
            (path.extension()? == "toml").then(|| path.file_stem().expect("a name").to_string_lossy().into_owned())
        })
        .collect();
    found.sort_unstable();
    let mut known: Vec<_> =
        RECIPES.iter().map(|(name, _, _)| (*name).to_owned()).chain(["quickstart".to_owned()]).collect();
    known.sort_unstable();
    assert_eq!(found, known, "each is planned here");

    for (name, parameters, bytes) in RECIPES {
        let place = Place::new();
        // the model's own configuration, and no weights; a tokenizer and data that are at hand
        for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            let from = quickstart().join("model").join(file);
            if from.exists() {
                place.write(&format!("model/{file}"), fs::read(from).expect("read"));
            }
        }
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/configs/{name}.json"));
        place.write("model/config.json", fs::read(config).expect("read"));
        let train = format!("data.train={:?}", quickstart().join("train.parquet"));
        let eval = format!("data.eval={:?}", quickstart().join("eval.parquet"));
        let recipe = recipes.join(format!("{name}.toml"));
        let sets =
            ["--set", "model.source=\"model\"", "--set", &train, "--set", &eval, "--set", "train.memory=\"24GiB\""];
        let recipe = recipe.to_str().expect("UTF-8");
        let output = place.run(&[&["plan", recipe, "--json", "--quiet"], &sets[..]].concat());
        assert_eq!(output.status.code(), Some(0), "{name}: {}", stderr(&output));
        let plan: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let billions = |value: &Value| value.as_f64().expect("a number") / 1e9;
        let found = billions(&plan["model"]["parameters"]);
        assert!((found - parameters).abs() < 0.006 * parameters, "{name}: {found} parameters");
        let base = billions(&plan["memory"]["inventory"]["base"]);
        assert!(base < bytes && base > 0.8 * bytes, "{name}: the base takes {base} GB");
        assert!(plan["memory"]["expected_bytes"].as_u64() < Some(MEMORY), "{name}");
    }
}
