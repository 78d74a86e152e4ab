//! `dpo-lora generate` and `chat` from the outside.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use serde_json::Value;

use super::{Place, stderr};

/// A run of a few updates.
fn trained() -> Place {
    let place = Place::new();
    place.train("run", &[]);
    place
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn rows(output: &Output) -> Vec<Value> {
    stdout(output).lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect()
}

fn with_input(place: &Place, arguments: &[&str], input: &str) -> Output {
    let mut command = place.command(arguments);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("written");
    child.wait_with_output().expect("ended")
}

/// In whatever order, beside whatever, greedily and drawn; from a file, an argument and standard input.
#[test]
fn an_answer_depends_on_its_prompt_and_seed_and_nothing_else() {
    let place = trained();
    let question = |i: usize| format!("{}\n", serde_json::json!({ "prompt": format!("What is number {i}?") }));
    place.write("prompts.jsonl", (0..5).map(question).collect::<String>());
    let answers = |more: &[&str]| {
        let base = ["generate", "run", "--prompts", "prompts.jsonl", "--json", "-q", "--max-new-tokens", "12"];
        rows(&place.run(&[&base[..], more].concat()))
    };
    for sampling in [&["--temperature", "0"][..], &["--temperature", "1.2", "--top-p", "0.95", "--seed", "3"]] {
        let together = answers(&[&["--side", "both"], sampling].concat());
        assert_eq!(together.len(), 5);
        assert!(together.iter().all(|row| row["base"]["text"].is_string() && row["policy"]["tokens"].is_number()));
        let alone = answers(&[&["--side", "both", "--batch", "1"], sampling].concat());
        assert_eq!(together, alone);
        let policy = answers(sampling);
        assert!(policy.iter().zip(&together).all(|(one, two)| one["policy"] == two["policy"]));
        let one = ["generate", "run", "--prompt", "What is number 3?", "-q", "--max-new-tokens", "12"];
        let text = stdout(&place.run(&[&one[..], sampling].concat()));
        assert_eq!(text.strip_suffix('\n'), together[3]["policy"]["text"].as_str());
        let piped = ["generate", "run", "--json", "-q", "--max-new-tokens", "12"];
        let piped = with_input(&place, &[&piped[..], sampling].concat(), "What is number 4?\n\nWhat is number 1?\n");
        let piped = rows(&piped);
        assert_eq!(piped.len(), 2);
        assert_eq!((&piped[0]["policy"], &piped[1]["policy"]), (&together[4]["policy"], &together[1]["policy"]));
    }
    let other = answers(&["--temperature", "1.2", "--seed", "4"]);
    assert_ne!(other, answers(&["--temperature", "1.2", "--seed", "5"]));
}

#[test]
fn a_stop_text_ends_an_answer_before_it() {
    let place = trained();
    let ask = |more: &[&str]| {
        rows(&place.run(&[&["generate", "run", "--prompt", "What is hail?", "--json", "-q"], more].concat()))
            .remove(0)
    };
    let whole = ask(&[]);
    let text = whole["policy"]["text"].as_str().expect("a text").to_owned();
    let (at, word) = text.match_indices(' ').nth(3).map(|(at, _)| (at, &text[at..at + 3])).expect("some words");
    let stopped = ask(&["--stop", "no such text", "--stop", word]);
    assert_eq!(stopped["policy"]["text"], text[..text.find(word).unwrap_or(at)]);
    assert_eq!(stopped["policy"]["end"], "stop");
    let cut = ask(&["--max-new-tokens", "3"]);
    assert_eq!((&cut["policy"]["tokens"], &cut["policy"]["end"]), (&Value::from(3), &Value::from("length")));
    // as it is streamed, too
    let streamed = place.run(&["generate", "run", "--prompt", "What is hail?", "-q", "--stop", word]);
    assert_eq!(stdout(&streamed), format!("{}\n", &text[..text.find(word).unwrap_or(at)]));
}

#[test]
fn what_cannot_be_answered_is_said_with_its_place() {
    let place = trained();
    place.write("rows.jsonl", "{\"prompt\":\"one\"}\n{\"answer\":\"two\"}\n");
    place.write("long.jsonl", format!("{{\"prompt\":\"{}\"}}\n", "long ".repeat(2000)));
    place.write("none.jsonl", "");
    for (arguments, message) in [
        (&["--prompts", "rows.jsonl"][..], "rows.jsonl line 2: has no prompt"),
        (&["--prompts", "missing.jsonl"], "missing.jsonl: does not exist"),
        (&["--prompts", "none.jsonl"], "none.jsonl: has no rows"),
        (&["--prompts", "long.jsonl"], "and the model takes"),
        (&[], "there is no prompt"),
        (&["--prompt", "x", "--temperature=-1"], "it is a number from 0 on"),
        (&["--prompt", "x", "--top-p", "1.5"], "it is a number from 0 to 1"),
        (&["--prompt", "x", "--max-new-tokens", "0"], "0 is not in 1.."),
        (&["--prompt", "x", "--limit", "0"], "0 is not in 1.."),
    ] {
        let output = place.run(&[&["generate", "run"], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(message), "{arguments:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
    let output = place.run(&["generate", "nowhere", "--prompt", "x"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("nowhere is neither a run nor an adapter"));
}

#[test]
fn a_conversation_is_had_with_either_side() {
    let place = trained();
    let ask = |side: &str, prompt: &str| {
        stdout(&place.run(&["generate", "run", "-q", "--max-new-tokens", "9", "--side", side, "--prompt", prompt]))
    };
    let chat = |input: &str| stdout(&with_input(&place, &["chat", "run", "-q", "--max-new-tokens", "9"], input));
    let question = "What is hail?";
    let (base, policy) = (ask("base", question), ask("policy", question));
    let said =
        chat(&format!("{question}\n/base\n/again\n/policy\n/again\n/reset\n/both\n{question}\n/quit\nunheard\n"));
    assert_eq!(said, format!("{policy}{base}{policy}base:\n{base}policy:\n{policy}"));
    // what was said before counts
    let twice = chat(&format!("{question}\n{question}\n"));
    assert_eq!(twice.lines().next(), policy.lines().next());
    assert_eq!(chat("/unknown\n"), "");
    // what cannot be answered is said to whoever wants only errors, and left out of the conversation
    let input = format!("{}\n{question}\n", "long ".repeat(600));
    let refused = with_input(&place, &["chat", "run", "-q", "--max-new-tokens", "9"], &input);
    let told = stderr(&refused);
    assert!(told.contains("and the model takes") && told.contains("shorten or leave it out"), "{told}");
    assert_eq!(stdout(&refused), policy);
    // one answer at a time
    let output = place.run(&["chat", "run", "--batch", "2"]);
    assert!(output.status.code() == Some(2) && stderr(&output).contains("--batch"), "{}", stderr(&output));
}

/// 200 tokens after a prompt, base and adapter; `scripts/make_generation_fixtures.py`.
#[test]
fn a_real_model_writes_what_it_writes_in_transformers() {
    let Some(real) = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from) else {
        eprintln!("a_real_model_writes_what_it_writes_in_transformers: skipped, DPO_LORA_REAL is not set");
        return;
    };
    use dpo_lora::adapter::peft;
    use dpo_lora::model::generate::Stop;
    use dpo_lora::model::{Adapter, Base, Model, ModelConfig};
    use dpo_lora::progress::Console;

    let console = Console::silent();
    let source = real.join("stories260K");
    let config = ModelConfig { source, quant: dpo_lora::quant::Quant::None, revision: None, file: None };
    let base = Base::locate(&config, dpo_lora::hub::Hub::from_env, &console).expect("a base");
    let decoder = base.config(config.quant).expect("a decoder");
    let adapter = real.join("adapters/trl-dpo-stories260K/sigmoid/final");
    let adapters = peft::load(&adapter, &decoder.modules(), candle_core::DType::F32).expect("an adapter");
    let (decoder, _) = base.load(decoder, &console).expect("weights");
    let model = Model::new(decoder, adapters).expect("a model");

    let fixture: Value =
        serde_json::from_str(include_str!("../fixtures/data/stories_greedy.json")).expect("the fixture");
    let ids = |name: &str| -> Vec<u32> { serde_json::from_value(fixture[name].clone()).expect("ids") };
    let stop = Stop { tokens: &[], max_new_tokens: 200 };
    for (name, side) in [("base", Adapter::Off), ("policy", Adapter::On)] {
        let expected = ids(name);
        assert_eq!(expected.len(), 200);
        assert_eq!(model.generate(&ids("prompt"), side, &stop).expect("computed"), expected, "{name}");
    }
}
