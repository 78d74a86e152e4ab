//! The whole stage, from files to ids.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::*;

/// The folder of real data, if the environment names it.
fn real(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("{test}: skipped, DPO_LORA_REAL is not set");
    }
    folder
}

fn config() -> DataConfig {
    DataConfig {
        train: Sources::one("unused"),
        eval: None,
        columns: Columns::default(),
        max_length: Count::constant(1024),
        max_prompt_length: None,
        chat_template: None,
        bad_rows: BadRows::Drop,
    }
}

fn load_file(file: &Path, config: &DataConfig, codec: &Codec, examples: Examples) -> Result<Dataset, DataError> {
    load(&Sources::one(file), config, codec, Wanted { examples, keep_pairs: false }, &Console::silent())
}

#[test]
fn ids_are_those_of_trl() {
    let Some(real) = real("ids_are_those_of_trl") else { return };
    let run = real.join("adapters/trl-dpo-stories260K");
    let codec = Codec::open(&real.join("stories260K"), None).expect("a tokenizer");
    let dataset = load_file(&run.join("pairs.jsonl"), &config(), &codec, Examples::Pairs).expect("pairs");
    let expected = std::fs::read_to_string(run.join("tokenised.jsonl")).expect("TRL's ids");
    let ids =
        |value: &Value| value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("id") as u32).collect();
    let mut rows = 0;
    for (i, line) in expected.lines().enumerate() {
        let row: Value = serde_json::from_str(line).expect("JSON");
        let side = |name: &str| -> Vec<u32> { ids(&row[name]) };
        let example = dataset.get(i);
        assert_eq!(example.prompt, side("prompt_ids"), "{}", dataset.origin(i));
        assert_eq!(example.chosen.expect("chosen"), side("chosen_ids"), "{}", dataset.origin(i));
        assert_eq!(example.rejected.expect("rejected"), side("rejected_ids"), "{}", dataset.origin(i));
        rows += 1;
    }
    assert_eq!(rows, dataset.len());
}

#[test]
fn real_files_load() {
    let Some(real) = real("real_files_load") else { return };
    let (llama, qwen) = (real.join("tokenizers/tinyllama-1.1b"), real.join("tokenizers/qwen3"));
    let files = [
        ("ultrafeedback_train_prefs.parquet", "a prompt as text beside chosen/rejected as conversations", 1000),
        ("ultrafeedback_test_prefs.parquet", "a prompt as text beside chosen/rejected as conversations", 200),
        ("rasbt_strings.parquet", "prompt/chosen/rejected as texts", 1100),
        ("dpo_en_demo.json", "prompt/chosen/rejected as message lists", 300),
        ("dpo_en_demo_explicit_prompt.parquet", "prompt/chosen/rejected as message lists", 300),
        ("kto_en_demo.parquet", "prompt/completion/label as message lists", 300),
    ];
    for folder in [llama, qwen] {
        let codec = Codec::open(&folder, None).expect("a tokenizer");
        for (name, shape, rows) in files {
            let wanted = if name.starts_with("kto") { Examples::Labelled } else { Examples::Pairs };
            let dataset = load_file(&real.join("prefs").join(name), &config(), &codec, wanted).expect(name);
            let facts = dataset.facts();
            eprintln!("{name}: {facts}; dropped {}", dataset.drops());
            assert_eq!(facts.shapes, [shape]);
            assert_eq!((facts.rows, facts.examples + dataset.drops().total()), (rows, rows));
        }
    }
}

/// FNV-1a over 64-bit words, as `scripts/make_data_fixtures.py` has it.
pub(super) fn digest(numbers: impl IntoIterator<Item = u64>) -> String {
    let step = |state: u64, number: u64| (state ^ number).wrapping_mul(0x0000_0100_0000_01b3);
    format!("{:016x}", numbers.into_iter().fold(0xcbf2_9ce4_8422_2325, step))
}
