//! `dpo-lora eval` as its users meet it.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Place, pairs, stderr, unwrapped};

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list")).iter().map(number).collect()
}

fn read(place: &Place, name: &str) -> Value {
    serde_json::from_str(&place.read(name)).expect("JSON")
}

fn questions() -> String {
    (0..6)
        .map(|i| {
            let row = json!({
                "question": format!("What is number {i}?"), "choices": [format!("It is {i}, plainly."),
                format!("The numeral in question constitutes {i}.")], "answer": "A",
            });
            format!("{row}\n")
        })
        .collect()
}

#[test]
fn a_run_is_evaluated_with_the_numbers_it_ended_with() {
    let place = Place::new();
    place.train("out", &[]);
    place.write("questions.jsonl", questions());
    let arguments = ["eval", "out", "--choices", "questions.jsonl", "--kl-prompts", "3", "--max-new-tokens", "12"];
    let output = place.run(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let shown = String::from_utf8_lossy(&output.stdout);
    for part in ["held-out pairs", "reward accuracy", "nats for chosen", "KL from the base", "McNemar p", "verdict"] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }
    assert!(!shown.contains('\u{1b}'));

    let eval = read(&place, "out/eval.json");
    let summary = read(&place, "out/summary.json");
    assert_eq!(
        (&eval["schema"], &eval["pairs"], &eval["loss"], &eval["beta"]),
        (&json!(1), &json!(5), &json!("dpo"), &json!(0.1))
    );
    // the same numbers, packed into other batches: the last digits of f32
    for (name, after) in summary["after"].as_object().expect("metrics") {
        let (now, then) = (number(&eval["policy"][name]), number(after));
        assert!((now - then).abs() <= 1e-5 * then.abs().max(1.0), "{name}: {now}, and {then} when the run ended");
    }
    for (name, before) in summary["before"].as_object().expect("metrics") {
        let (now, then) = (number(&eval["base"][name]), number(before));
        assert!((now - then).abs() <= 1e-5 * then.abs().max(1.0), "base {name}: {now}, and {then} before the run");
    }

    // what stands beside each other agrees
    let margins = numbers(&eval["margins"]);
    let mean = margins.iter().sum::<f64>() / 5.0;
    assert!((mean - number(&eval["policy"]["rewards/margins"])).abs() < 1e-9);
    for (pair, margin) in margins.iter().enumerate() {
        let logp = |side: &str, of: &str| number(&eval["logps"][side][pair][of]);
        let gained = |of| logp("policy", of) - logp("base", of);
        assert!((0.1 * (gained("chosen") - gained("rejected")) - margin).abs() < 1e-9);
    }
    let interval = numbers(&eval["intervals"]["rewards/margins"]["interval"]);
    assert!(interval[0] <= mean && mean <= interval[1], "{mean} {interval:?}");
    let counted: f64 = numbers(&eval["histogram"]["policy"]).iter().sum();
    assert_eq!(
        (counted, numbers(&eval["histogram"]["edges"]).len()),
        (5.0, numbers(&eval["histogram"]["base"]).len() + 1)
    );
    assert!(number(&eval["kl"]["total"]) > 0.0 && number(&eval["kl"]["per_token"]) > 0.0);
    assert_eq!((&eval["kl"]["prompts"], &eval["kl"]["samples"]), (&json!(3), &json!(3)));
    assert!(number(&eval["lengths"]["policy_tokens"]) <= 12.0);
    let choices = &eval["choices"][0];
    assert_eq!((&choices["questions"], &choices["chance"]), (&json!(6), &json!(0.5)));
    let change = number(&choices["policy"]) - number(&choices["base"]);
    assert!((change - number(&choices["difference"])).abs() < 1e-12);
    let checks = eval["checks"].as_array().expect("a list");
    assert!(
        checks.iter().all(|check| ["good", "watch", "bad"].contains(&check["verdict"].as_str().expect("a word")))
    );
    for name in
        ["reward accuracy", "reward margin", "KL from the base, nats an answer", "accuracy on questions, change"]
    {
        assert!(checks.iter().any(|check| check["name"] == name), "{name} is not in {checks:?}");
    }

    // the same again is the same, and --json prints what is written
    let output = place.run(&[&arguments[..], &["--json"]].concat());
    let printed: Value = serde_json::from_slice(&output.stdout).expect("stdout is JSON");
    assert_eq!(printed, eval);
    assert_eq!(read(&place, "out/eval.json"), eval);

    // the report shows what was found, by its own names
    let judged = place.run(&["win-rate", "out", "--judge", "readability", "--max-new-tokens", "6", "--allow-leak"]);
    assert!(judged.status.success(), "{}", stderr(&judged));
    let output = place.run(&["report", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let html = place.read("out/report.html");
    let win_rate = read(&place, "out/win-rate/base-by-readability/win_rate.json");
    let [low, high] = numbers(&win_rate["win_rate"]["interval"])[..] else { panic!("{win_rate}") };
    let headline = match () {
        () if low > 0.5 => "Better than the base.",
        () if high < 0.5 => "Worse than the base.",
        () => "No clear difference to the base.",
    };
    let rate = format!("{:.1} %", 100.0 * number(&win_rate["win_rate"]["estimate"]));
    let checked = |name: &str| {
        let check = checks.iter().find(|check| check["name"] == name).expect("the check");
        format!("<h3>{name}: {}</h3>", written(number(&check["value"])))
    };
    for text in [
        format!("<strong>{headline}</strong>"),
        format!("<h3>{rate} of {} prompts</h3>", win_rate["prompts"]),
        format!("<div class=\"value\">{rate}</div>"),
        "<h2>Win rate of out against base</h2>".to_owned(),
        checked("reward accuracy"),
        checked("KL from the base, nats an answer"),
    ] {
        assert!(html.contains(&text), "{text}");
    }
    assert!(!html.contains("could not be read"));
}

/// A number as the report writes one of that size.
fn written(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Nor is any other name of a file a reason to lose what was computed.
#[cfg(target_os = "linux")]
#[test]
fn questions_may_lie_in_a_file_of_any_name() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    place.train("out", &["--set", "train.steps=1", "--set", "train.warmup=0"]);
    let name = OsStr::from_bytes(b"questions-\xff.jsonl");
    std::fs::write(place.path("").join(name), questions()).expect("written");
    let output = place.command(&["eval", "out", "--kl-prompts", "0", "--choices"]).arg(name).output().expect("ran");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(read(&place, "out/eval.json")["choices"][0]["file"], json!("questions-\u{fffd}.jsonl"));
}

#[test]
fn bounds_decide_the_exit_code_and_what_cannot_be_held_to_one_is_refused() {
    let place = Place::new();
    place.train("out", &[]);
    let eval = |more: &[&str]| place.run(&[&["eval", "out", "--kl-prompts", "0"], more].concat());
    assert_eq!(eval(&["--fail-under", "accuracy=0", "--fail-over", "loss=5"]).status.code(), Some(0));
    let output = eval(&["--fail-under", "accuracy=1.1"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("--fail-under accuracy=1.1: it is "), "{}", stderr(&output));
    assert_eq!(eval(&["--fail-over", "rewards/margins=-100"]).status.code(), Some(3));
    for (bound, says) in [
        ("acuracy=0.5", "did you mean `accuracy`?"),
        ("kl=10", "--kl-prompts above 0"),
        ("choices=0.5", "--choices FILE"),
        ("accuracy", "NAME=VALUE"),
        ("nll_loss=1", "ORPO's loss alone"),
    ] {
        let output = eval(&["--fail-under", bound]);
        assert_eq!(output.status.code(), Some(2), "{bound}");
        assert!(stderr(&output).contains(says), "{bound}: {}", stderr(&output));
    }
}

#[test]
fn an_adapter_that_is_no_run_gets_no_file_that_nobody_asked_for() {
    let place = Place::new();
    place.train("out", &["--set", "run.checkpoint_every=3"]);
    std::fs::create_dir(place.path("foreign")).expect("made");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(place.path("out/adapter").join(name), place.path("foreign").join(name)).expect("copied");
    }
    place.write("three.jsonl", pairs(3));
    let eval = |of: &str, more: &[&str]| {
        place.run(&[&["eval", of, "--data", "three.jsonl", "--kl-prompts", "0", "--json"], more].concat())
    };
    let output = eval("foreign", &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let foreign: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&foreign["pairs"], &foreign["kl"], &foreign["lengths"]), (&json!(3), &Value::Null, &Value::Null));
    assert!(!place.path("foreign/eval.json").exists());
    assert!(eval("foreign", &["--out", "named.json", "--limit", "2"]).status.success());
    assert_eq!(read(&place, "named.json")["pairs"], json!(2));
    // a checkpoint's values are not the run's
    assert!(eval("out/checkpoints/step-000003", &[]).status.success());
    assert!(!place.path("out/eval.json").exists());
    assert!(eval("out/adapter", &[]).status.success());
    assert!(place.path("out/eval.json").exists());

    // nothing to go by
    let output = place.run(&["eval", "foreign"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no held-out pairs are known"), "{}", stderr(&output));
    // questions alone will do
    place.write("questions.jsonl", questions());
    let output = place.run(&["eval", "foreign", "--choices", "questions.jsonl", "--json"]);
    let alone: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&alone["pairs"], alone["checks"].as_array().map(Vec::len)), (&json!(0), Some(1)));
}

#[test]
fn questions_that_cannot_be_scored_are_named_by_file_and_line() {
    let place = Place::new();
    place.train("out", &[]);
    let good = r#"{"question": "a?", "choices": ["yes", "no"], "answer": 0}"#;
    for (bad, says) in [
        (r#"{"question": "b?", "choices": ["yes", "no"]}"#, "has no answer"),
        (
            r#"{"question": "b?", "choices": ["yes", "no"], "answer": 7}"#,
            "is 7, and 2 choices have the numbers 0 to 1",
        ),
        (r#"{"ask": "b?", "picks": ["yes", "no"], "answer": 1}"#, "has no question; its columns are"),
        (r#"{"question": "b?", "choices": ["yes"], "answer": 0}"#, "two are the least"),
        (r#"not json"#, "is no JSON"),
    ] {
        place.write("questions.jsonl", format!("{good}\n{bad}\n"));
        let output = place.run(&["eval", "out", "--choices", "questions.jsonl"]);
        assert_eq!(output.status.code(), Some(2), "{bad}");
        let message = unwrapped(&output);
        assert!(message.contains("questions.jsonl line 2") && message.contains(says), "{bad}: {message}");
    }
    for (name, contents, says) in [("empty.jsonl", "", "has no rows"), ("questions.txt", good, "no known extension")]
    {
        place.write(name, contents);
        let output = place.run(&["eval", "out", "--choices", name]);
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(stderr(&output).contains(says), "{name}: {}", stderr(&output));
    }
}

#[test]
fn questions_put_by_the_chat_template_are_preferred_as_pairs_are() {
    let place = Place::new();
    place.train("out", &["--set", "train.steps=12"]);
    let said = |role: &str, content: &Value| json!([{ "role": role, "content": content }]);
    let (mut chats, mut asked) = (String::new(), String::new());
    for line in pairs(9).lines() {
        let row: Value = serde_json::from_str(line).expect("JSON");
        let chat = json!({
            "prompt": said("user", &row["prompt"]), "chosen": said("assistant", &row["chosen"]),
            "rejected": said("assistant", &row["rejected"]),
        });
        let question = json!({ "question": row["prompt"], "choices": [row["rejected"], row["chosen"]], "answer": row["chosen"] });
        chats.push_str(&format!("{chat}\n"));
        asked.push_str(&format!("{question}\n"));
    }
    place.write("chats.jsonl", chats);
    place.write("asked.jsonl", asked);
    let arguments =
        ["--data", "chats.jsonl", "--choices", "asked.jsonl", "--choices-chat", "--kl-prompts", "0", "--json"];
    let output = place.run(&[&["eval", "out"][..], &arguments].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let eval: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    for side in ["base", "policy"] {
        assert_eq!(number(&eval["choices"][0][side]), number(&eval[side]["logps/accuracies"]), "{side}");
    }
}

#[test]
fn an_sft_run_and_a_kto_run_are_evaluated_too() {
    for loss in ["sft", "kto", "orpo", "ipo"] {
        let place = Place::new();
        let recipe = place.read("recipe.toml").replace("[loss.dpo]", &format!("[loss.{loss}]"));
        place.write("recipe.toml", recipe);
        place.train("out", &[]);
        let output = place.run(&["eval", "out", "--kl-prompts", "0"]);
        assert!(output.status.success(), "{loss}: {}", stderr(&output));
        let (eval, summary) = (read(&place, "out/eval.json"), read(&place, "out/summary.json"));
        assert_eq!((&eval["loss"], &eval["pairs"]), (&json!(loss), &json!(5)));
        for (name, after) in summary["after"].as_object().expect("metrics") {
            let (now, then) = (number(&eval["policy"][name]), number(after));
            assert!(
                (now - then).abs() <= 1e-5 * then.abs().max(1.0),
                "{loss} {name}: {now}, and {then} when the run ended"
            );
        }
        // what the loss does not measure is refused; the rest is held to its bound
        let measures =
            [("rewards/margins=-100", loss != "sft"), ("nll_loss=0", loss == "orpo"), ("margin=-100", true)];
        for (bound, measured) in measures {
            let output = place.run(&["eval", "out", "--kl-prompts", "0", "--fail-under", bound]);
            assert_eq!(output.status.code(), Some(if measured { 0 } else { 2 }), "{loss} {bound}");
            assert!(measured || stderr(&output).contains("loss"), "{}", stderr(&output));
        }
        if loss != "kto" {
            continue;
        }
        // rows with a label, all of them good: there is nothing to compare with
        let good: String = super::pairs(3).lines().fold(String::new(), |rows, line| {
            let row: Value = serde_json::from_str(line).expect("JSON");
            rows + &format!("{}\n", json!({"prompt": row["prompt"], "completion": row["chosen"], "label": true}))
        });
        place.write("good.jsonl", good);
        for (name, missing) in [
            ("rewards/chosen", None),
            ("perplexity", None),
            ("rewards/rejected", Some("no held-out row has a rejected answer")),
            ("rewards/margins", Some("no held-out row has both answers")),
            ("logps/accuracies", Some("no held-out row has both answers")),
        ] {
            let bound = format!("{name}=-1000");
            let output =
                place.run(&["eval", "out", "--data", "good.jsonl", "--kl-prompts", "0", "--fail-under", &bound]);
            assert_eq!(output.status.code(), Some(if missing.is_none() { 0 } else { 2 }), "{}", stderr(&output));
            assert!(missing.is_none_or(|missing| stderr(&output).contains(missing)), "{}", stderr(&output));
        }
    }
}

#[test]
fn a_run_that_goes_on_from_an_adapter_is_held_to_it() {
    let place = Place::new();
    place.train("first", &[]);
    // an adapter to go on with brings its rank
    let recipe = place.read("recipe.toml").replace("rank = 4", "init = \"first/adapter\"");
    place.write("recipe.toml", recipe);
    place.train("second", &["--set", "train.learning_rate=3e-3"]);
    let output = place.run(&["eval", "second", "--kl-prompts", "2", "--max-new-tokens", "8"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("KL from the reference"));
    let (eval, summary) = (read(&place, "second/eval.json"), read(&place, "second/summary.json"));
    assert_eq!(eval["reference"], json!("the adapter that training began from"));
    for name in ["loss", "rewards/margins", "rewards/chosen", "logps/chosen", "kl_to_reference"] {
        let (now, then) = (number(&eval["policy"][name]), number(&summary["after"][name]));
        assert!((now - then).abs() <= 1e-5 * then.abs().max(1.0), "{name}: {now}, and {then} when the run ended");
    }
}

#[test]
fn log_probs_are_those_of_trl() {
    let Some(real) = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from) else {
        eprintln!("skipped: DPO_LORA_REAL is not set");
        return;
    };
    let trl = real.join("adapters/trl-dpo-stories260K");
    let place = Place::new();
    let path = |path: PathBuf| path.display().to_string();
    let (adapter, base, data) =
        (path(trl.join("sigmoid/final")), path(real.join("stories260K")), path(trl.join("pairs.jsonl")));
    let output = place.run(&[
        "eval",
        &adapter,
        "--base",
        &base,
        "--data",
        &data,
        "--kl-prompts",
        "4",
        "--max-new-tokens",
        "32",
        "--json",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let eval: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = std::fs::read_to_string(trl.join("sigmoid/pair_logps.json")).expect("TRL's log-probs");
    let theirs: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    assert_eq!(eval["pairs"], json!(theirs.len()));
    for (i, theirs) in theirs.iter().enumerate() {
        for (side, of, name) in [
            ("base", "chosen", "ref_chosen"),
            ("base", "rejected", "ref_rejected"),
            ("policy", "chosen", "policy_chosen"),
            ("policy", "rejected", "policy_rejected"),
        ] {
            let (ours, theirs) = (number(&eval["logps"][side][i][of]), number(&theirs[name]));
            // both in f32, with sums in another order
            assert!((ours - theirs).abs() < 1e-3 * theirs.abs().max(1.0).sqrt(), "pair {i} {name}: {ours} {theirs}");
        }
        let margin =
            |side: &str| number(&theirs[format!("{side}_chosen")]) - number(&theirs[format!("{side}_rejected")]);
        let (ours, theirs) = (number(&eval["margins"][i]), 0.1 * (margin("policy") - margin("ref")));
        assert!((ours - theirs).abs() < 1e-3, "pair {i}: margin {ours} {theirs}");
    }
}
