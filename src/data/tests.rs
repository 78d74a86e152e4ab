//! The whole stage, from files to ids.

use std::fs;
use std::path::{Path, PathBuf};

use parquet::record::Field;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// The folder of real data, if the environment names it.
fn real(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("{test}: skipped, DPO_LORA_REAL is not set");
    }
    folder
}

/// A file of `tests/fixtures/data`.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

/// A byte-level BPE tokenizer with a BOS and a chat template.
fn codec() -> Codec {
    Codec::open(&fixture("model"), None).expect("a tokenizer")
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

fn pairs(file: &Path) -> Result<Dataset, DataError> {
    load_file(file, &config(), &codec(), Examples::Pairs)
}

/// A file of these rows, one a line, and the folder that holds it.
fn lines(rows: &[Value]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("rows.jsonl");
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(&file, text).expect("written");
    (folder, file)
}

/// The message and the help of an error.
fn told(error: &DataError) -> String {
    let help = miette::Diagnostic::help(error).map(|help| help.to_string()).unwrap_or_default();
    format!("{error} | {help}")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn ids_of_every_shape_are_those_of_trl() {
    let expected: Value =
        serde_json::from_str(&fs::read_to_string(fixture("expected.json")).expect("the fixture")).expect("JSON");
    for name in ["strings", "messages", "implicit_strings", "implicit_messages"] {
        let dataset = pairs(&fixture(&format!("{name}.jsonl"))).expect(name);
        let expected = expected[name].as_array().expect("rows");
        assert_eq!(dataset.len(), expected.len());
        for (i, expected) in expected.iter().enumerate() {
            let example = dataset.get(i);
            let found = [Some(example.prompt), example.chosen, example.rejected];
            let expected = [0, 1, 2].map(|side| ids(&expected[side]));
            assert_eq!(found, expected.each_ref().map(|ids| Some(ids.as_slice())), "{name}, row {}", i + 1);
        }
    }
    // pairs that are taken apart come in TRL's order
    for (name, file) in [("labelled", "labelled.jsonl"), ("unpaired", "strings.jsonl")] {
        let dataset = load_file(&fixture(file), &config(), &codec(), Examples::Labelled).expect(name);
        let expected = expected[name].as_array().expect("rows");
        assert_eq!(dataset.len(), expected.len());
        for (i, expected) in expected.iter().enumerate() {
            let Example { prompt, chosen, rejected } = dataset.get(i);
            let (completion, other) = if expected[2] == true { (chosen, rejected) } else { (rejected, chosen) };
            assert_eq!((prompt, other), (ids(&expected[0]).as_slice(), None), "{name}, row {}", i + 1);
            assert_eq!(completion, Some(ids(&expected[1]).as_slice()), "{name}, row {}", i + 1);
        }
    }
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

/// The ids of other people's data are known by their digest alone.
#[test]
fn ids_of_real_files_are_those_of_trl() {
    let Some(real) = real("ids_of_real_files_are_those_of_trl") else { return };
    let codec = Codec::open(&real.join("tokenizers/qwen3"), None).expect("a tokenizer");
    let expected: Value =
        serde_json::from_str(&fs::read_to_string(fixture("real.json")).expect("the fixture")).expect("JSON");
    // TRL cuts when it makes a batch, and drops by the length of the prompt
    let config = DataConfig {
        max_length: Count::constant(1 << 20),
        max_prompt_length: Some(Count::constant(1023)),
        ..config()
    };
    for name in ["rasbt_strings.parquet", "dpo_en_demo_explicit_prompt.parquet", "kto_en_demo.parquet"] {
        let labelled = name.starts_with("kto");
        let wanted = if labelled { Examples::Labelled } else { Examples::Pairs };
        let dataset = load_file(&real.join("prefs").join(name), &config, &codec, wanted).expect(name);
        let numbers = (0..dataset.len()).flat_map(|i| {
            let Example { prompt, chosen, rejected } = dataset.get(i);
            let label = labelled.then_some(u64::from(chosen.is_some()));
            [Some(prompt), chosen, rejected].into_iter().flatten().flat_map(move |part| {
                label.into_iter().chain([part.len() as u64]).chain(part.iter().map(|id| u64::from(*id)))
            })
        });
        assert_eq!(digest(numbers), expected["ids"][name], "{name}");
    }
}

#[test]
fn parquet_gives_what_json_gives() {
    for (parquet, json, wanted) in [
        ("strings", "strings", Examples::Pairs),
        ("messages", "messages", Examples::Pairs),
        ("labelled", "labelled", Examples::Labelled),
    ] {
        let read = |name: String| load_file(&fixture(&name), &config(), &codec(), wanted).expect("rows");
        let (parquet, json) = (read(format!("{parquet}.parquet")), read(format!("{json}.jsonl")));
        assert_eq!(parquet.fingerprint(), json.fingerprint());
        assert_eq!(parquet.facts().shapes, json.facts().shapes);
    }
    // the same questions, as text beside whole conversations
    let (question, messages) = (pairs(&fixture("question.parquet")), pairs(&fixture("messages.jsonl")));
    let (question, messages) = (question.expect("rows"), messages.expect("rows"));
    assert_eq!(question.facts().shapes, ["a prompt as text beside chosen/rejected as conversations"]);
    assert_eq!([question.get(0), question.get(1)], [messages.get(0), messages.get(2)]);
}

#[test]
fn an_array_gives_what_lines_give() {
    let (folder, _) = lines(&[]);
    let rows = fs::read_to_string(fixture("strings.jsonl")).expect("the fixture");
    let array = format!("\u{feff} [\n{}]\n", rows.trim_end().replace('\n', ",\n"));
    let expected = pairs(&fixture("strings.jsonl")).expect("rows").fingerprint();
    for (name, text) in [("rows.json", array), ("lines.json", format!("\u{feff}\n{rows}")), ("rows.ndjson", rows)] {
        let file = folder.path().join(name);
        fs::write(&file, text).expect("written");
        assert_eq!(pairs(&file).expect(name).fingerprint(), expected, "{name}");
    }
}

/// A row of every shape, with the loss that reads it and what the shape is called.
fn rows_of_every_shape() -> Vec<(Shape, Value, Examples)> {
    use Examples::{Demonstrations, Labelled, Pairs};
    let user = |text: &str| json!({"role": "user", "content": text});
    let assistant = |text: &str| json!({"role": "assistant", "content": text});
    let chat = |text: &str| json!([user("2 + 2?"), assistant(text)]);
    let labelled = |form| Shape::Completion { form, labelled: true };
    let unlabelled = |form| Shape::Completion { form, labelled: false };
    vec![
        (Shape::Pair(Form::Strings), json!({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}), Pairs),
        (
            Shape::Pair(Form::Messages),
            json!({"prompt": [user("2 + 2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}),
            Pairs,
        ),
        (
            Shape::Pair(Form::Messages),
            json!({"conversations": [{"from": "human", "value": "2 + 2?"}],
                "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}),
            Pairs,
        ),
        (Shape::Question, json!({"prompt": "2 + 2?", "chosen": chat("4"), "rejected": chat("5")}), Pairs),
        (
            Shape::Question,
            json!({"prompt": "2 + 2?", "chosen": [assistant("4")], "rejected": [assistant("5")]}),
            Pairs,
        ),
        (Shape::Implicit(Form::Strings), json!({"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}), Pairs),
        (Shape::Implicit(Form::Messages), json!({"chosen": chat("4"), "rejected": chat("5")}), Pairs),
        (
            Shape::Transcript,
            json!({"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}),
            Pairs,
        ),
        (labelled(Form::Strings), json!({"prompt": "2 + 2 =", "completion": " 4", "label": true}), Labelled),
        (
            labelled(Form::Messages),
            json!({"prompt": [user("2 + 2?")], "completion": [assistant("5")], "label": 0}),
            Labelled,
        ),
        (unlabelled(Form::Strings), json!({"prompt": "2 + 2 =", "completion": " 4"}), Demonstrations),
        (
            unlabelled(Form::Messages),
            json!({"prompt": [user("2 + 2?")], "completion": [assistant("4")]}),
            Demonstrations,
        ),
        (Shape::Conversation, json!({"messages": chat("4")}), Demonstrations),
    ]
}

#[test]
fn every_shape_is_recognised_read_and_held_to() {
    let codec = codec();
    for (shape, row, wanted) in rows_of_every_shape() {
        let Value::Object(columns) = &row else { panic!("a row is an object") };
        assert_eq!(Shape::recognise(columns), Ok(shape), "{row}");
        let (_folder, file) = lines(std::slice::from_ref(&row));
        let dataset = load_file(&file, &config(), &codec, wanted).expect("one example");
        assert_eq!(dataset.len(), 1);
        assert_eq!(dataset.facts().shapes, [shape.to_string()]);
        let text =
            |ids: Option<&[u32]>| ids.map(|ids| codec.decode(ids).trim().trim_start_matches("assistant").to_owned());
        let example = dataset.get(0);
        assert!(codec.decode(example.prompt).contains("2 + 2"), "{row}");
        let answers = [text(example.chosen), text(example.rejected)];
        let expected = |answer: &str| row.to_string().contains(answer).then(|| answer.to_owned());
        // "+ 4" would be a prompt's; the answers are the only 4 and 5 in the rows
        assert_eq!(answers, [expected("4"), expected("5")], "{row}");

        // a later row that lacks a column, or holds another type there, is dropped and not taken for another shape
        for column in columns.keys().filter(|column| *column != "conversations") {
            for wrong in [None, Some(json!(null)), Some(json!(7.5)), Some(json!([[]]))] {
                let mut bad = columns.clone();
                match &wrong {
                    None => bad.shift_remove(column),
                    Some(wrong) => bad.insert(column.clone(), wrong.clone()),
                };
                let (_folder, file) = lines(&[row.clone(), Value::Object(bad)]);
                let dataset = load_file(&file, &config(), &codec, wanted).expect("one example is left");
                assert_eq!(dataset.len(), 1, "{row}: {column} {wrong:?}");
                assert_eq!(dataset.drops().listed()[0].origin, "rows.jsonl line 2");
                assert_eq!(dataset.drops().listed()[0].reason, DropReason::Malformed, "{row}: {column} {wrong:?}");
            }
        }
    }
}

#[test]
fn every_loss_gets_what_it_reads_or_an_error_that_names_another() {
    use Examples::{Demonstrations, Labelled, Pairs};
    let codec = codec();
    for (_, row, own) in rows_of_every_shape() {
        let undesirable = row.get("label") == Some(&json!(0));
        let (_folder, file) = lines(&[row]);
        for wanted in [Pairs, Labelled, Demonstrations] {
            let loaded = load_file(&file, &config(), &codec, wanted);
            let expected = match (own, wanted) {
                (Pairs, Labelled) => Ok(2),
                (Labelled, Demonstrations) if undesirable => Err("1 labelled undesirable"),
                (Labelled, Pairs) => Err("[loss.kto]"),
                (Demonstrations, Pairs | Labelled) => Err("[loss.sft]"),
                _ => Ok(1),
            };
            match (&loaded, expected) {
                (Ok(dataset), Ok(examples)) => assert_eq!(dataset.len(), examples),
                (Err(error), Err(part)) => assert!(told(error).contains(part), "{}", told(error)),
                _ => panic!("{own:?} for {wanted:?}: {loaded:?}"),
            }
        }
    }
}

#[test]
fn held_out_pairs_may_stay_pairs() {
    let wanted = Wanted { examples: Examples::Labelled, keep_pairs: true };
    let sources = Sources::one(fixture("strings.jsonl"));
    let dataset = load(&sources, &config(), &codec(), wanted, &Console::silent()).expect("pairs");
    assert!((0..dataset.len()).all(|i| dataset.get(i).chosen.is_some() && dataset.get(i).rejected.is_some()));
}

#[test]
fn transcripts_are_texts_where_there_is_no_template() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture("model").join(name), folder.path().join(name)).expect("copied");
    }
    let codec = Codec::open(folder.path(), None).expect("a tokenizer");
    let text = |answer: &str| format!("\n\nHuman: 2 + 2?\n\nAssistant: {answer}");
    let (_folder, file) = lines(&[json!({"chosen": text("4"), "rejected": text("5")})]);
    let dataset = load_file(&file, &config(), &codec, Examples::Pairs).expect("a pair");
    let example = dataset.get(0);
    assert_eq!(codec.decode(example.prompt), "\n\nHuman: 2 + 2?\n\nAssistant:");
    assert_eq!(example.chosen.map(|ids| (codec.decode(ids), ids.last() == Some(&1))), Some((" 4".into(), true)));
    // messages cannot be
    let error = load_file(&fixture("messages.jsonl"), &config(), &codec, Examples::Pairs).expect_err("no template");
    assert!(
        told(&error).contains("no chat template | name a Jinja file as [data] chat_template"),
        "{}",
        told(&error)
    );
}

#[test]
fn columns_are_mapped_by_name() {
    let row = json!({"question": "2 + 2 =", "good": " 4", "bad": " 5", "prompt": 7, "chosen": null});
    let (_folder, file) = lines(&[row]);
    let column = |name: &str| Some(name.to_owned());
    let columns =
        Columns { prompt: column("question"), chosen: column("good"), rejected: column("bad"), ..Columns::default() };
    let config = DataConfig { columns, ..config() };
    let load = |config| load_file(&file, config, &codec(), Examples::Pairs);
    assert_eq!(codec().decode(load(&config).expect("mapped").get(0).prompt), "2 + 2 =");
    let columns = Columns { prompt: column("qestion"), ..config.columns.clone() };
    let error = load(&DataConfig { columns, ..config.clone() }).expect_err("no such column");
    assert!(
        told(&error)
            .ends_with("has no column `qestion`, which [data.columns] prompt names | did you mean `question`?")
    );
}

#[test]
fn what_cannot_be_trained_on_is_counted_and_listed() {
    let pair = |chosen: &str, rejected: &str| json!({"prompt": "2 + 2 =", "chosen": chosen, "rejected": rejected});
    let long = "two and ".repeat(200);
    let rows = [
        pair(" 4", " 5"),
        pair(" 4", " 4"),
        pair(" 4", " \n"),
        json!({"prompt": long, "chosen": "4", "rejected": "5"}),
        json!({"prompt": null, "chosen": "4", "rejected": "5"}),
        // the same up to the maximum length
        pair(&format!("{long}4"), &format!("{long}5")),
        pair(" 4", &long),
    ];
    let (_folder, file) = lines(&rows);
    let config = DataConfig { max_length: Count::constant(32), ..config() };
    let dataset = load_file(&file, &config, &codec(), Examples::Pairs).expect("two pairs");
    assert_eq!((dataset.len(), dataset.rows_read(), dataset.facts().truncated), (2, 7, 1));
    let reasons: Vec<_> = dataset.drops().listed().iter().map(|drop| (drop.origin.as_str(), drop.reason)).collect();
    let expected = [
        ("rows.jsonl line 2", DropReason::Identical),
        ("rows.jsonl line 3", DropReason::EmptyCompletion),
        ("rows.jsonl line 4", DropReason::LongPrompt),
        ("rows.jsonl line 5", DropReason::Malformed),
        ("rows.jsonl line 6", DropReason::Identical),
    ];
    assert_eq!(reasons, expected);
    assert_eq!(dataset.drops().counts()[&DropReason::Identical], 2);
    let cut = dataset.get(1);
    assert_eq!(cut.prompt.len() + cut.rejected.expect("cut").len(), 32);
    assert_eq!(dataset.origin(1), "rows.jsonl line 7");

    let strict = DataConfig { bad_rows: BadRows::Error, ..config.clone() };
    let error = load_file(&file, &strict, &codec(), Examples::Pairs).expect_err("the second row");
    assert!(told(&error).contains("rows.jsonl line 2: chosen and rejected are the same | mend or remove"), "{error}");
    let (_folder, file) = lines(&rows[1..6]);
    let error = load_file(&file, &config, &codec(), Examples::Pairs).expect_err("nothing is left");
    assert!(
        told(&error).contains("2 chosen and rejected the same, 1 empty completion, 1 prompt too long, 1 malformed")
    );
}

#[test]
fn max_prompt_length_is_a_limit_of_its_own() {
    let config = DataConfig { max_prompt_length: Some(Count::constant(10)), ..config() };
    let dataset = load_file(&fixture("strings.jsonl"), &config, &codec(), Examples::Pairs).expect("shorter prompts");
    assert!(dataset.len() > 1 && dataset.drops().counts()[&DropReason::LongPrompt] > 0);
    assert!((0..dataset.len()).all(|i| dataset.get(i).prompt.len() <= 10));
}

/// However a BOS may come to a sequence, there is one.
#[test]
fn there_is_exactly_one_bos() {
    const BOS: u32 = 0;
    let folder = tempfile::tempdir().expect("a folder");
    let template = folder.path().join("plain.jinja");
    fs::write(&template, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").expect("written");
    let rows = [json!({"prompt": "<s>2 + 2 =", "chosen": " 4", "rejected": " 5"})];
    let (_rows, strings) = lines(&rows);
    // the tokenizer adds it, the text has it; the template writes it; neither writes it
    let cases =
        [(strings, None), (fixture("messages.jsonl"), None), (fixture("messages.jsonl"), Some(template.as_path()))];
    for (file, template) in cases {
        let codec = Codec::open(&fixture("model"), template).expect("a tokenizer");
        let dataset = load_file(&file, &config(), &codec, Examples::Pairs).expect("pairs");
        for i in 0..dataset.len() {
            let Example { prompt, chosen, rejected } = dataset.get(i);
            assert_eq!(prompt[0], BOS);
            let all = [prompt, chosen.expect("a pair"), rejected.expect("a pair")].concat();
            assert_eq!(all.iter().filter(|id| **id == BOS).count(), 1, "{file:?} {template:?}");
            if template.is_some() {
                // it ends the turn in nothing special
                assert_eq!(chosen.and_then(<[u32]>::last), Some(&1), "an EOS is added");
            }
        }
    }
}

#[test]
fn real_tokenizers_write_one_bos_or_none() {
    let Some(real) = real("real_tokenizers_write_one_bos_or_none") else { return };
    // Llama's tokenizer adds `<s>` and the template does not write it; Qwen has no BOS, and may not get its
    // `<|endoftext|>` for one
    for (name, token, times) in [("tinyllama-1.1b", 1, 1), ("qwen3", 151_643, 0)] {
        let codec = Codec::open(&real.join("tokenizers").join(name), None).expect("a tokenizer");
        for file in ["strings.jsonl", "messages.jsonl"] {
            let dataset = load_file(&fixture(file), &config(), &codec, Examples::Pairs).expect("pairs");
            // without a BOS, an empty prompt has no tokens to predict the first one of the completion from
            let empty = dataset.drops().counts().get(&DropReason::EmptyPrompt).copied().unwrap_or(0);
            assert_eq!(empty, usize::from(name == "qwen3" && file == "strings.jsonl"));
            for prompt in (0..dataset.len()).map(|i| dataset.get(i).prompt) {
                assert_eq!(prompt.iter().filter(|id| **id == token).count(), times, "{name} {file}");
                assert_eq!(prompt[0] == token, times == 1, "{name} {file}");
            }
        }
    }
}

#[test]
fn what_changes_the_text_is_used_or_refused() {
    let pair = |extra: Value| {
        let mut row = json!({"prompt": [{"role": "user", "content": "2 + 2?"}],
            "chosen": {"role": "assistant", "content": "4"}, "rejected": {"role": "assistant", "content": "5"}});
        row.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        lines(&[row])
    };
    let (_folder, file) = pair(json!({"system": "Count.", "tools": null, "images": [], "score": 3}));
    let prompt = codec().decode(pairs(&file).expect("read").get(0).prompt);
    assert_eq!(prompt, "\nCount.\n\n2 + 2?\n\n");
    let (_folder, file) = pair(json!({"tools": [{"name": "sum"}]}));
    let error = pairs(&file).expect_err("tools are not read");
    assert!(told(&error).contains("rows.jsonl line 1: column `tools` is part of what the model sees"), "{error}");
    let (_folder, file) = lines(&[json!({"system": "Count.", "prompt": "2 + 2 =", "chosen": "4", "rejected": "5"})]);
    assert!(told(&pairs(&file).expect_err("no way to join them")).contains("column `system` stands beside texts"));
}

#[test]
fn a_refusing_template_is_a_reason_to_drop() {
    let folder = tempfile::tempdir().expect("a folder");
    let template = folder.path().join("strict.jinja");
    let text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}\
        {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}";
    fs::write(&template, text).expect("written");
    let codec = Codec::open(&fixture("model"), Some(&template)).expect("a tokenizer");
    let dataset = load_file(&fixture("messages.jsonl"), &config(), &codec, Examples::Pairs).expect("the others");
    assert_eq!(dataset.drops().counts()[&DropReason::Template], 1);
    let detail = &dataset.drops().listed()[0].detail;
    assert_eq!(detail, "the chat template: no system messages (line 1 of the template)");
}

#[test]
fn broken_files_are_named_with_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let row = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
    let written = |name: &str, bytes: &[u8]| {
        let file = folder.path().join(name);
        fs::write(&file, bytes).expect("written");
        file
    };
    let parquet = fs::read(fixture("messages.parquet")).expect("the fixture");
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n";
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let (cut_line, cut_array, more) =
        (format!("{row}\n{{\"prompt\": \"a"), format!("[{row},\n{row}"), format!("[{row}] x"));
    let cases: [(&str, &[u8], &str); 18] = [
        ("empty.jsonl", b"", "has no rows"),
        ("blank.jsonl", b"\n \n", "has no rows"),
        ("empty.json", b"[]", "has no rows"),
        ("cut.jsonl", cut_line.as_bytes(), "line 2: is no JSON: EOF while parsing a string at column 13"),
        ("words.jsonl", b"hello\n", "line 1: is no JSON: expected value at column 1"),
        ("list.jsonl", b"[1]\n", "line 1: is a list, not a row"),
        (
            "latin.jsonl",
            b"{\"prompt\": \"caf\xe9\"}\n",
            "line 1: is not UTF-8 text (at byte 15) | save the file as UTF-8",
        ),
        ("deep.jsonl", deep.as_bytes(), "line 1: is no JSON: recursion limit exceeded"),
        ("deep.json", deep.as_bytes(), "row 1: is no JSON array of rows: recursion limit exceeded"),
        ("cut.json", cut_array.as_bytes(), "row 3: is no JSON array of rows: EOF while parsing a list"),
        ("more.json", more.as_bytes(), "is no JSON array of rows: trailing characters"),
        ("words.parquet", b"PAR1 but nothing more", "is no whole Parquet file"),
        ("cut.parquet", &parquet[..parquet.len() / 2], "is no whole Parquet file"),
        ("pointer.parquet", lfs.as_bytes(), "is a Git-LFS pointer, not the file itself | run `git lfs pull`"),
        ("rows.csv", b"a,b", "has no known extension | what is read is .parquet, .jsonl"),
        ("rows.jsonl.gz", b"", "is compressed | unpack it"),
        (
            "one.jsonl",
            br#"{"prompt": "a", "chosen": "b"}"#,
            "line 1: has no column `rejected`; its columns are `prompt`, `chosen` | what is understood",
        ),
        ("none.jsonl", br#"{"text": "a"}"#, "line 1: has no columns that are recognised; its columns are `text` |"),
    ];
    for (name, bytes, expected) in cases {
        let error = told(&pairs(&written(name, bytes)).expect_err(name));
        assert!(error.contains(name) && error.contains(expected), "{error}");
    }
    let missing = |name: &str| told(&pairs(&folder.path().join(name)).expect_err("missing"));
    assert!(missing("emtpy.jsonl").contains("does not exist | did you mean `"), "{}", missing("emtpy.jsonl"));
    assert!(missing("*.jsn").contains("matches no file"), "{}", missing("*.jsn"));
    assert!(missing("").contains("is a folder, not a file | a glob reads the files of a folder"), "{}", missing(""));
    assert!(
        missing("no/such/file.jsonl").contains("hf://datasets/ORG/NAME/SPLIT"),
        "{}",
        missing("no/such/file.jsonl")
    );
}

#[test]
fn a_glob_reads_files_by_name_and_brackets_may_be_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let inner = folder.path().join("a[1]");
    fs::create_dir(&inner).expect("made");
    for (name, answer) in [("b.jsonl", "2"), ("a.jsonl", "1"), ("c[1].jsonl", "3"), ("z.txt", "")] {
        let row = json!({"prompt": "n =", "chosen": format!(" {answer}"), "rejected": " 0"});
        fs::write(inner.join(name), row.to_string()).expect("written");
    }
    let dataset = pairs(&inner.join("*.jsonl")).expect("three files");
    let origins: Vec<_> = (0..dataset.len()).map(|i| dataset.origin(i)).collect();
    assert_eq!(origins, ["a.jsonl line 1", "b.jsonl line 1", "c[1].jsonl line 1"]);
    assert_eq!(pairs(&inner.join("c[1].jsonl")).expect("one file").len(), 1);
}

#[test]
fn sources_are_a_path_or_a_list_with_weights() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Table {
        train: Sources,
    }
    let parse = |text: &str| toml::from_str::<Table>(text).map_err(|e| e.message().to_owned());
    let list = r#"train = ["a.jsonl", { path = "b/*.parquet", weight = 2.0 }]"#;
    let parsed = parse(list).expect("a list");
    assert_eq!(parse(&toml::to_string(&parsed).expect("written")), Ok(parsed));
    let one = parse(r#"train = "a.jsonl""#).expect("a path");
    assert_eq!(toml::to_string(&one).expect("written"), "train = \"a.jsonl\"\n");
    for (text, expected) in [
        ("train = 3", "expected a file, a glob, or a list"),
        ("train = []", "names no file"),
        ("train = \"\"", "the path is empty"),
        ("train = [\"\"]", "the path is empty"),
        ("train = [{ path = \"a\", wieght = 2 }]", "unknown field `wieght`"),
        ("train = [{ path = \"a\", weight = 0.0 }]", "0 is not above 0"),
        ("train = [{ path = \"a\", weight = 1e9 }]", "1000000000 is not above 0, up to 1000"),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn weights_and_seed_give_the_order_of_an_epoch() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, rows: usize| {
        let row = |i| format!("{}\n", json!({"prompt": format!("{name} {i}:"), "chosen": " 1", "rejected": " 0"}));
        fs::write(folder.path().join(name), (0..rows).map(row).collect::<String>()).expect("written");
    };
    write("a.jsonl", 10);
    write("b.jsonl", 20);
    let load_weighted = |a: f64, b: f64| {
        let source = |name: &str, weight: f64| json!({"path": folder.path().join(name), "weight": weight});
        let sources = serde_json::from_value(json!([source("a.jsonl", a), source("b.jsonl", b)])).expect("sources");
        let wanted = Wanted { examples: Examples::Pairs, keep_pairs: false };
        load(&sources, &config(), &codec(), wanted, &Console::silent()).expect("pairs")
    };
    let plain = load_weighted(1.0, 1.0);
    assert_eq!(plain.epoch(0, 7, false), (0..30).collect::<Vec<u32>>());
    let shuffled = plain.epoch(0, 7, true);
    let sorted = |mut order: Vec<u32>| {
        order.sort_unstable();
        order
    };
    assert_eq!(sorted(shuffled.clone()), (0..30).collect::<Vec<u32>>());
    assert_eq!(shuffled, plain.epoch(0, 7, true));
    assert_ne!(shuffled, plain.epoch(1, 7, true));
    assert_ne!(shuffled, plain.epoch(0, 8, true));
    // pinned: a run that another build resumes goes on in the same order
    assert_eq!(shuffled[..8], [12, 0, 11, 10, 26, 1, 17, 9]);

    let weighted = load_weighted(2.0, 0.5);
    assert_ne!(weighted.fingerprint(), plain.fingerprint());
    let order = weighted.epoch(0, 7, false);
    let twice: Vec<u32> = (0..10).chain(0..10).collect();
    assert_eq!(order[..20], twice);
    let half = &order[20..];
    assert!(half.len() == 10 && half.is_sorted() && half.iter().all(|i| (10..30).contains(i)), "{half:?}");
    assert_ne!(half, &weighted.epoch(1, 7, false)[20..]);
    assert_eq!(sorted(weighted.epoch(0, 7, true)), sorted(order));
    // one of ten, even if it were less
    assert_eq!(load_weighted(0.01, 1.5).epoch(0, 7, true).len(), 1 + 30);
}

/// Every order of three comes as often as any other: a bias of the shuffle would train on some rows first.
#[test]
fn orders_are_equally_likely() {
    let rows: Vec<Value> =
        (0..3).map(|i| json!({"prompt": format!("{i}:"), "chosen": " 1", "rejected": " 0"})).collect();
    let (_folder, file) = lines(&rows);
    let dataset = pairs(&file).expect("three pairs");
    let mut counts = std::collections::BTreeMap::<Vec<u32>, u32>::new();
    for epoch in 0..6000 {
        *counts.entry(dataset.epoch(epoch, 1, true)).or_default() += 1;
    }
    assert_eq!(counts.len(), 6);
    // six deviations: √(6000 · 1/6 · 5/6) = 29
    assert!(counts.values().all(|count| count.abs_diff(1000) < 175), "{counts:?}");
}

#[test]
fn the_model_folder_may_be_wrong_in_many_ways() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
    let error = || told(&Codec::open(folder.path(), None).expect_err("it is wrong"));
    assert!(error().contains("tokenizer.json: does not exist"), "{}", error());
    write("tokenizer.model", "");
    assert!(error().contains("save_pretrained"), "{}", error());
    write("tokenizer.json", "{\"version\": \"1.0\"}");
    assert!(error().contains("tokenizer.json: is no valid tokenizer"), "{}", error());
    fs::copy(fixture("model/tokenizer.json"), folder.path().join("tokenizer.json")).expect("copied");
    assert!(error().contains("names no eos_token"), "{}", error());
    write("tokenizer_config.json", "{\"eos_token\": {\"content\": \"<eos>\"}}");
    assert!(error().contains("names \"<eos>\" as eos_token, which the tokenizer does not have"), "{}", error());
    write("tokenizer_config.json", "{\"eos_token\": ");
    assert!(error().contains("tokenizer_config.json: is no valid JSON"), "{}", error());
    write("tokenizer_config.json", r#"{"eos_token": "</s>", "chat_template": "{{ 1"}"#);
    assert!(error().contains("tokenizer_config.json: the chat template does not parse"), "{}", error());
    write(
        "tokenizer_config.json",
        r#"{"eos_token": "</s>", "chat_template": [{"name": "tool_use", "template": ""}]}"#,
    );
    assert!(error().contains("several chat templates and none is called `default`"), "{}", error());
}

#[test]
fn special_tokens_stop_ids_and_files_are_those_of_the_folder() {
    let codec = codec();
    assert_eq!(codec.stop_tokens(), [1, 5]);
    assert_eq!(codec.decode(&[0, 286, 94, 305, 1]), "Why is");
    assert_eq!(codec.vocab_size(), 330);
    assert!(!codec.depends_on_date());
    let folder = tempfile::tempdir().expect("a folder");
    codec.save(folder.path()).expect("saved");
    let mut names: Vec<_> =
        fs::read_dir(&folder).expect("a folder").map(|e| e.expect("an entry").file_name()).collect();
    names.sort_unstable();
    assert_eq!(names, ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]);

    let template = folder.path().join("mine.jinja");
    fs::write(&template, "{{ strftime_now('%Y') }}").expect("written");
    let codec = Codec::open(&fixture("model"), Some(&template)).expect("a tokenizer");
    assert!(codec.depends_on_date());
    codec.save(folder.path()).expect("saved");
    let saved = Codec::open(folder.path(), None).expect("a tokenizer");
    assert_eq!(saved.chat_template(), Some("{{ strftime_now('%Y') }}"));
}

/// JSON as strangers write it, over the columns that mean something.
fn any_row() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        Just("user"),
        Just("assistant"),
        Just("\n\nHuman: a\n\nAssistant: b"),
        Just("a"),
        Just(""),
        Just("<s>")
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i8>().prop_map(Value::from),
        text.prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
    ];
    let key = prop_oneof![Just("role"), Just("content"), Just("from"), Just("value"), Just("type"), Just("text")];
    let value = leaf.prop_recursive(3, 16, 3, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..3)
                .prop_map(|fields| fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    });
    let column = prop::sample::select(format::COLUMNS.to_vec());
    prop::collection::vec((column, value), 0..6)
        .prop_map(|columns| columns.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the rows are, they are examples, drops, or an error.
    #[test]
    fn any_rows_are_read_or_refused(rows in prop::collection::vec(any_row(), 1..4), loss in 0..3_usize) {
        let wanted = [Examples::Pairs, Examples::Labelled, Examples::Demonstrations][loss];
        let (_folder, file) = lines(&rows);
        thread_local!(static CODEC: Codec = codec());
        let loaded = CODEC.with(|codec| load_file(&file, &config(), codec, wanted));
        if let Ok(dataset) = loaded {
            prop_assert_eq!(dataset.rows_read(), rows.len());
            for i in 0..dataset.len() {
                let Example { prompt, chosen, rejected } = dataset.get(i);
                prop_assert!(!prompt.is_empty());
                prop_assert_eq!(chosen.is_some() && rejected.is_some(), wanted == Examples::Pairs);
            }
        }
    }

    /// Whatever the bytes are, under whatever name, they are read or refused.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..3_usize) {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join(["rows.json", "rows.jsonl", "rows.parquet"][kind]);
        fs::write(&file, &bytes).expect("written");
        thread_local!(static CODEC: Codec = codec());
        let _ = CODEC.with(|codec| load_file(&file, &config(), codec, Examples::Pairs));
    }

    /// A tokenizer with a few bytes changed works or is refused.
    #[test]
    fn a_changed_tokenizer_works_or_is_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        let mut bytes = fs::read(fixture("model/tokenizer.json")).expect("the fixture");
        for (at, byte) in changes {
            *at.get_mut(&mut bytes) = byte;
        }
        fs::write(folder.path().join("tokenizer.json"), &bytes).expect("written");
        fs::copy(fixture("model/tokenizer_config.json"), folder.path().join("tokenizer_config.json")).expect("copied");
        if let Ok(codec) = Codec::open(folder.path(), None) {
            let _ = load_file(&fixture("strings.jsonl"), &config(), &codec, Examples::Pairs);
        }
    }

    /// A Parquet file with a few bytes changed is read or refused.
    #[test]
    fn changed_parquet_is_read_or_refused(
        kind in 0..4_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("rows.parquet");
        let name = ["messages", "question", "strings", "labelled"][kind];
        let mut bytes = fs::read(fixture(&format!("{name}.parquet"))).expect("the fixture");
        for (at, byte) in changes {
            *at.get_mut(&mut bytes) = byte;
        }
        fs::write(&file, &bytes).expect("written");
        thread_local!(static CODEC: Codec = codec());
        let _ = CODEC.with(|codec| load_file(&file, &config(), codec, Examples::Pairs));
    }
}

/// FNV-1a over 64-bit words, as `scripts/make_data_fixtures.py` has it.
pub(super) fn digest(numbers: impl IntoIterator<Item = u64>) -> String {
    let step = |state: u64, number: u64| (state ^ number).wrapping_mul(0x0000_0100_0000_01b3);
    format!("{:016x}", numbers.into_iter().fold(0xcbf2_9ce4_8422_2325, step))
}

/// Every text of the real preference data, and some that are made to be hard.
fn real_texts(real: &Path) -> Vec<String> {
    let mut texts: Vec<String> = [
        "",
        " ",
        "  a",
        "a  ",
        "\n",
        "\n\n x\t\ty",
        "naïve café, ﬁne",
        "e\u{301}",
        "日本語のテキスト",
        "1234567 3.14",
        "👩‍👩‍👧 ok",
        "don't we'LL",
        "<s>",
        "a</s>b",
        "<|im_start|>user\n",
        "x <unk> y",
        "▁low",
        "\u{0}\u{7f}",
        "http://a.b/c?d=e&f",
        "    if x:\n\treturn",
    ]
    .map(str::to_owned)
    .into();
    fn collect(field: &Field, texts: &mut Vec<String>) {
        match field {
            Field::Str(text) => texts.push(text.clone()),
            Field::ListInternal(list) => list.elements().iter().for_each(|field| collect(field, texts)),
            Field::Group(row) => row.get_column_iter().for_each(|(_, field)| collect(field, texts)),
            _ => {}
        }
    }
    for name in ["rasbt_strings.parquet", "ultrafeedback_test_prefs.parquet", "kto_en_demo.parquet"] {
        let file = fs::File::open(real.join("prefs").join(name)).expect("real data");
        let reader = parquet::file::reader::SerializedFileReader::new(file).expect("Parquet");
        for row in parquet::file::reader::FileReader::get_row_iter(&reader, None).expect("rows").take(400) {
            row.expect("a row").get_column_iter().for_each(|(_, field)| collect(field, &mut texts));
        }
    }
    texts
}

/// A codec of a GGUF file gives the ids of a folder's on all texts.
fn assert_same_ids(folder: &Path, gguf: &Path, texts: &[String]) {
    let (expected, found) =
        (Codec::open(folder, None).expect("a tokenizer"), Codec::open(gguf, None).expect("a tokenizer"));
    for text in texts {
        let ids = |codec: &Codec| codec.encode(text).map_err(|bad| format!("{bad:?}"));
        assert_eq!(ids(&found), ids(&expected), "{text:?}");
    }
    // what is saved beside an adapter is the same tokenizer again
    let saved = tempfile::tempdir().expect("a folder");
    found.save(saved.path()).expect("saved");
    let saved = Codec::open(saved.path(), None).expect("a tokenizer");
    for text in texts.iter().take(100) {
        assert_eq!(saved.encode(text).expect("ids"), expected.encode(text).expect("ids"), "{text:?}");
    }
    assert_eq!(found.eos(), expected.eos());
}

#[test]
fn the_tokenizer_in_a_gguf_file_is_the_original() {
    let Some(real) = real("the_tokenizer_in_a_gguf_file_is_the_original") else { return };
    let texts = real_texts(&real);
    assert!(texts.len() > 2000, "{}", texts.len());
    let stories = real.join("stories260K");
    for name in ["stories260K-f32.gguf", "stories260K-q8_0.gguf"] {
        assert_same_ids(&stories, &stories.join("reference").join(name), &texts);
    }
}

#[test]
fn tokenizers_that_we_write_as_gguf_are_the_originals() {
    let Some(real) = real("tokenizers_that_we_write_as_gguf_are_the_originals") else { return };
    let texts = real_texts(&real);
    let place = tempfile::tempdir().expect("a folder");
    for (folder, vocabulary) in
        [("tokenizers/tinyllama-1.1b", 32000), ("tokenizers/qwen3", 151_936), ("stories260K", 512)]
    {
        let codec = Codec::open(&real.join(folder), None).expect("a tokenizer");
        let mut header = crate::gguf::Header::default();
        for (key, value) in codec.gguf_metadata(vocabulary, &real).expect("GGUF has a place for it") {
            header.value(key, value);
        }
        let file = place.path().join("vocabulary.gguf");
        header.write(fs::File::create(&file).expect("made")).and_then(|writer| writer.finish()).expect("written");
        let read = Codec::open(&file, None).expect("read");
        assert_eq!(codec.first_difference(&read), None, "{folder}");
        assert_same_ids(&real.join(folder), &file, &texts);
        assert_eq!(codec.chat_template(), read.chat_template(), "{folder}");
        assert_eq!(codec.stop_tokens(), read.stop_tokens(), "{folder}");
    }
    // one of another kind has no place
    let other = place.path().join("other");
    fs::create_dir(&other).expect("made");
    let json = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"#;
    fs::write(other.join("tokenizer.json"), json).expect("written");
    fs::write(other.join("tokenizer_config.json"), r#"{"eos_token": "a"}"#).expect("written");
    let error = Codec::open(&other, None).expect("read").gguf_metadata(1, &other).expect_err("no words");
    assert!(error.to_string().contains("WordLevel"), "{error}");
}

#[test]
fn tokenizers_written_as_gguf_are_the_originals() {
    use crate::gguf::Value as G;
    use crate::gguf::tests::Writer;
    let Some(real) = real("tokenizers_written_as_gguf_are_the_originals") else { return };
    let texts = real_texts(&real);
    for (name, model, pre) in [("tinyllama-1.1b", "llama", "default"), ("qwen3", "gpt2", "qwen2")] {
        let folder = real.join("tokenizers").join(name);
        let json: Value =
            serde_json::from_str(&fs::read_to_string(folder.join("tokenizer.json")).expect("there")).expect("JSON");
        let added = json["added_tokens"].as_array().expect("a list");
        let vocab = json["model"]["vocab"].as_object().expect("a table");
        let mut tokens: Vec<(u64, &str, u64)> =
            vocab.iter().map(|(token, id)| (id.as_u64().expect("an id"), token.as_str(), 1)).collect();
        tokens.retain(|(id, _, _)| !added.iter().any(|token| token["id"] == *id));
        tokens.extend(added.iter().map(|token| {
            let kind = if token["special"] == true { 3 } else { 4 };
            (token["id"].as_u64().expect("an id"), token["content"].as_str().expect("a text"), kind)
        }));
        tokens.sort_unstable();
        assert!(tokens.iter().enumerate().all(|(i, (id, _, _))| i as u64 == *id));
        let texts_of =
            |list: &[(u64, &str, u64)]| G::Array(list.iter().map(|(_, token, _)| G::Text((*token).into())).collect());
        let mut writer = Writer::default()
            .value("tokenizer.ggml.model", G::Text(model.into()))
            .value("tokenizer.ggml.pre", G::Text(pre.into()))
            .value("tokenizer.ggml.tokens", texts_of(&tokens))
            .value(
                "tokenizer.ggml.token_type",
                G::Array(tokens.iter().map(|(_, _, kind)| G::Signed(*kind as i64)).collect()),
            );
        writer = if model == "llama" {
            // those in Llama's tokenizer.model: none of bytes, the least of blanks, else the order in which pieces were found
            let score = |i: usize, token: &str| match i {
                ..259 => 0.0,
                _ if token.chars().all(|c| c == '▁') => -1e9,
                _ => 259.0 - i as f64,
            };
            let scores = tokens.iter().enumerate().map(|(i, (_, token, _))| G::Float(score(i, token))).collect();
            writer
                .value("tokenizer.ggml.scores", G::Array(scores))
                .value("tokenizer.ggml.unknown_token_id", G::Unsigned(0))
                .value("tokenizer.ggml.bos_token_id", G::Unsigned(1))
                .value("tokenizer.ggml.eos_token_id", G::Unsigned(2))
        } else {
            let merges = json["model"]["merges"].as_array().expect("a list").iter().map(|merge| {
                let parts = merge.as_array().expect("a pair");
                G::Text(format!("{} {}", parts[0].as_str().expect("a text"), parts[1].as_str().expect("a text")))
            });
            let eos = tokens.iter().find(|(_, token, _)| *token == "<|im_end|>").expect("its EOS").0;
            writer
                .value("tokenizer.ggml.merges", G::Array(merges.collect()))
                .value("tokenizer.ggml.eos_token_id", G::Unsigned(eos))
                .value("tokenizer.ggml.add_bos_token", G::Bool(false))
        };
        let place = tempfile::tempdir().expect("a folder");
        let gguf = place.path().join("model.gguf");
        fs::write(&gguf, writer.bytes()).expect("written");
        assert_same_ids(&folder, &gguf, &texts);
    }
}

/// Tokenizers that keep spaces in the ways there are.
fn tokenizers() -> Vec<Codec> {
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart/model");
    let mut codecs = vec![codec(), Codec::open(&quickstart, None).expect("a tokenizer")];
    if let Some(real) = real("tokenizers") {
        let folders = ["stories260K", "tokenizers/qwen3", "tokenizers/tinyllama-1.1b"];
        codecs.extend(folders.map(|folder| Codec::open(&real.join(folder), None).expect("a tokenizer")));
    }
    codecs
}

const SAYINGS: [&str; 4] = [
    "Hail falls out of a thunderstorm, in lumps; how could it not hurt?",
    "  two blanks first\n\nthen lines, a\ttab, ümläute, 日本語 and 👩‍👩‍👧‍👦",
    "x = [1, 2,  3]\n    if x:\n        return 'a'",
    " ' s 't ne pas , . !",
];

#[test]
fn an_answer_that_comes_in_tokens_is_the_text_of_all_of_them() {
    for codec in tokenizers() {
        for text in SAYINGS {
            let ids = codec.tokenize(text, false).expect("ids");
            let mut answer = Answer::new(&codec, &[][..]);
            let mut shown = String::new();
            for (i, &id) in ids.iter().enumerate() {
                answer.push(id);
                shown += &answer.news(i + 1 == ids.len());
                // of a character that is not whole, some decoders make one sign and some several
                let so_far = codec.decode(&ids[..=i]);
                if !so_far.ends_with(char::REPLACEMENT_CHARACTER) {
                    assert_eq!(answer.text(), so_far);
                }
            }
            assert_eq!(shown, codec.decode(&ids));
            // what goes on after a part of it is the rest
            for at in 1..ids.len() {
                let before = codec.decode(&ids[..at]);
                let mut rest = Answer::after(&codec, &[][..], &ids[..at]);
                ids[at..].iter().for_each(|&id| rest.push(id));
                if !before.ends_with(char::REPLACEMENT_CHARACTER) {
                    assert_eq!(format!("{before}{}", rest.text()), shown, "after {at}");
                }
            }
        }
    }
}

#[test]
fn a_text_is_made_of_the_pieces_of_its_tokens() {
    for codec in tokenizers() {
        for text in SAYINGS {
            let ids = codec.tokenize(text, false).expect("ids");
            let pieces: Vec<u8> = ids.iter().flat_map(|&id| codec.piece(id)).collect();
            let pieces = String::from_utf8(pieces).expect("whole characters");
            let whole = codec.decode(&ids);
            // SentencePiece begins a text with a space that is not its own
            assert!(pieces == whole || pieces == format!(" {whole}"), "{pieces:?} {whole:?}");
        }
        let [(_, bos), (_, eos), ..] = codec.named_tokens();
        for token in bos.into_iter().chain(eos) {
            let ids = codec.tokenize(&token, false).expect("ids");
            assert!(codec.is_special(ids[ids.len() - 1]) && codec.piece(ids[ids.len() - 1]) == token.as_bytes());
        }
    }
}

#[test]
fn a_stop_text_is_found_over_the_borders_of_tokens() {
    let codec = codec();
    let ids = codec.tokenize("one two three two", false).expect("ids");
    for stop in ["two", "e t", "wo th", "one"] {
        let stops = [stop.to_owned()];
        let mut answer = Answer::new(&codec, &stops[..]);
        let mut shown = String::new();
        for &id in &ids {
            answer.push(id);
            shown += &answer.news(false);
            if answer.stopped() {
                break;
            }
        }
        assert_eq!(Some(shown.as_str()), "one two three two".split(stop).next());
        assert!(answer.stopped());
    }
}
