//! The report, plots and TensorBoard's files of a run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Place, quickstart, stderr};

/// A run on the quickstart's data with its held-out pairs.
fn trained() -> Place {
    let place = Place::new();
    let eval = format!("data.eval={}", quickstart().join("eval.parquet").display());
    place.train("out", &["--set", &eval, "--set", "eval.every=2"]);
    place
}

/// Everything that a browser would fetch, or run.
fn assert_loads_nothing(html: &str) {
    let html = html.to_lowercase();
    for bad in ["src=", "href=", "url(", "@import", "<link", "<script", "<iframe", "<object", "http://", "https://"] {
        assert!(!html.contains(bad), "{bad}");
    }
    assert!(html.contains("default-src 'none'"));
}

fn event_files(run: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(run.join("tb")).expect("tb/").map(|e| e.expect("read").path()).collect();
    files.sort_unstable();
    files
}

/// The events of a file, by their frames.
fn events(file: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(file).expect("read");
    let (mut at, mut events) = (0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight")) as usize;
        events.push(bytes[at + 12..at + 12 + length].to_vec());
        at += 12 + length + 4;
    }
    events
}

fn contains(event: &[u8], text: &str) -> bool {
    event.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn a_run_writes_its_report_and_report_writes_the_same() {
    let place = trained();
    let html = place.read("out/report.html");
    assert_loads_nothing(&html);
    let sample: Value =
        serde_json::from_str(place.read("out/samples.jsonl").lines().next().expect("one")).expect("JSON");
    let prompt = sample["prompt"].as_str().expect("a text").replace('\'', "&#x27;");
    for text in
        ["finished", "Reward margin", "Gradient norm", "Which answer is the likelier one", "384 training examples"]
    {
        assert!(html.contains(text), "{text}");
    }
    assert!(html.contains(&prompt), "{prompt}");
    assert!(html.matches("<svg").count() >= 9, "{} plots", html.matches("<svg").count());

    let margins: Value = serde_json::from_str(&place.read("out/margins.json")).expect("JSON");
    let summary: Value = serde_json::from_str(&place.read("out/summary.json")).expect("JSON");
    let column = |side: &str| -> Vec<f64> {
        let values = margins["rewards"][side].as_array().expect("a list");
        values.iter().map(|value| value.as_f64().expect("a number")).collect()
    };
    assert!(column("before").iter().all(|margin| *margin == 0.0));
    let after = column("after");
    let mean = after.iter().sum::<f64>() / after.len() as f64;
    // each is rounded to f32
    assert!((mean - summary["after"]["rewards/margins"].as_f64().expect("a number")).abs() < 1e-6);

    fs::remove_file(place.path("out/report.html")).expect("removed");
    let output = place.run(&["report", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(place.read("out/report.html"), html, "byte for byte");

    // what came later, by whoever, is text
    let evil = "<script>alert(1)</script>";
    let line = serde_json::json!({"prompt": evil, "base": evil, "policy": evil});
    place.write("out/samples.jsonl", format!("{line}\n"));
    let win_rate = serde_json::json!({"headline": evil, "against": "base", "prompts": 12, "wins": 9, "losses": 3,
        "judge": {"kind": "endpoint", "name": evil}, "win_rate": {"estimate": 0.75, "interval": [0.55, 0.9]},
        "samples": [{"prompt": evil, "policy": evil, "against": evil, "score": 1.0}]});
    place.write("out/win-rate/base-by-x/win_rate.json", win_rate.to_string());
    assert!(place.run(&["report", "out"]).status.success());
    let html = place.read("out/report.html");
    assert_loads_nothing(&html);
    assert!(html.contains("Better than the base.") && html.contains("&lt;script&gt;"));

    fs::remove_file(place.path("out/summary.json")).expect("removed");
    assert!(place.run(&["report", "out", "--out", "early.html"]).status.success());
    assert!(place.read("early.html").contains("not finished, update 6 of 6"));
    render_in_a_browser(&place.path("out/report.html"), "Better than the base.");
}

/// With a Chromium on this machine, and nothing that it could reach.
fn render_in_a_browser(page: &Path, text: &str) {
    let profile = tempfile::tempdir().expect("a folder");
    let mut command = Command::new("chromium");
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]);
    command.arg(format!("--user-data-dir={}", profile.path().display()));
    command.arg("--dump-dom").arg(format!("file://{}", page.display()));
    let Ok(output) = command.output() else {
        eprintln!("skipped: there is no chromium to render the report");
        return;
    };
    let dom = String::from_utf8_lossy(&output.stdout);
    assert!(dom.contains(text), "{dom}");
    let source = fs::read_to_string(page).expect("read");
    assert_eq!(dom.matches("<svg").count(), source.matches("<svg").count(), "every plot is parsed as one");
    assert!(!dom.contains("<script"));
}

#[test]
fn dates_can_be_set() {
    let place = Place::new();
    let mut command = place.command(&["run", "recipe.toml", "--out", "out", "--set", "train.steps=1"]);
    assert!(command.env("SOURCE_DATE_EPOCH", "86400").output().expect("started").status.success());
    let summary: Value = serde_json::from_str(&place.read("out/summary.json")).expect("JSON");
    assert_eq!(summary["ended"], "1970-01-02T00:00:00Z");
    assert!(summary["environment"]["threads"].as_u64() >= Some(1));
}

/// A reload shows how far a run is, and a kill leaves a whole page.
#[cfg(unix)]
#[test]
fn a_running_run_says_so_and_a_killed_one_leaves_a_whole_report() {
    let place = Place::new();
    let set = ["--quiet", "--set", "train.steps=100000", "--set", "eval.every=1"];
    let mut child =
        place.command(&[&["run", "recipe.toml", "--out", "out"][..], &set].concat()).spawn().expect("started");
    let begun = Instant::now();
    let report = place.path("out/report.html");
    let is_at_work = |html: &str| html.contains("running, update ") && html.contains(" of 100,000");
    while !fs::read_to_string(&report).is_ok_and(|html| is_at_work(&html) && !html.contains("update 0 of")) {
        assert!(begun.elapsed() < Duration::from_secs(120), "no report was written");
        assert!(child.try_wait().expect("asked").is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().expect("killed");
    child.wait().expect("ended");
    assert!(fs::read_to_string(&report).expect("there").trim_end().ends_with("</html>"));
    let output = place.run(&["report", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read_to_string(&report).expect("there").contains("not finished, update "));
}

#[test]
fn a_report_that_cannot_be_written_is_a_warning() {
    let place = Place::new();
    let set = ["--set", "train.steps=1", "--set", "train.warmup=0"];
    // a folder of that name cannot be replaced by a file
    place.train("out", &set);
    fs::remove_file(place.path("out/report.html")).expect("removed");
    place.write("out/report.html/in-the-way", "");
    fs::remove_file(place.path("out/summary.json")).expect("removed");
    let output = place.run(&["run", "--resume", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("warning: cannot write"), "{}", stderr(&output));
    assert!(place.path("out/summary.json").is_file());
    let output = place.run(&["report", "out"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
}

#[test]
fn tensorboard_sees_every_update_once_also_after_a_kill() {
    let place = Place::new();
    place.train("out", &["--set", "run.checkpoint_every=3", "--set", "eval.every=3"]);
    let first = event_files(&place.path("out"));
    assert_eq!(first.len(), 1);
    let told = events(&first[0]);
    assert_eq!(told.len(), 3 + 7, "version, session, recipe; the start and six updates");
    assert!(contains(&told[0], "brain.Event:2") && contains(&told[2], "[loss.dpo]"));
    assert!(contains(&told[3], "eval/rewards/margins") && !contains(&told[3], "train/loss"));
    assert!(contains(&told[6], "train/rewards/margins") && contains(&told[6], "eval/loss"));

    // killed after the fourth update, whose checkpoint is the third's
    fs::remove_dir_all(place.path("out/checkpoints/step-000006")).expect("removed");
    fs::remove_file(place.path("out/summary.json")).expect("removed");
    let output = place.run(&["run", "--resume", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let files = event_files(&place.path("out"));
    assert_eq!((files.len(), &files[0]), (2, &first[0]), "the new one comes after the old one");
    let told = events(&files[1]);
    assert_eq!(told.len(), 2 + 3, "version, session; three updates");
    // Event { step: 4, session_log { status: START } } after its time: readers forget updates from 4 on
    assert_eq!(told[1][9..], [0x10, 4, 0x3a, 2, 0x08, 1]);
    assert_eq!(told[2][9..11], [0x10, 4]);

    let output = place.run(&["run", "recipe.toml", "--out", "without", "--set", "run.tensorboard=false"]);
    assert!(output.status.success() && !place.path("without/tb").exists());
}

#[test]
fn runs_are_compared_and_curves_drawn() {
    let place = Place::new();
    place.train("a", &[]);
    place.train("b", &["--set", "train.learning_rate=2e-3", "--set", "loss.dpo.beta=0.3"]);
    let output = place.run(&["report", "a", "b", "--out", "compared.html"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let html = place.read("compared.html");
    assert_loads_nothing(&html);
    for text in ["a · b", "train.learning_rate", "0.002", "loss.dpo.beta", "in other units", "Reward accuracy"] {
        assert!(html.contains(text), "{text}");
    }
    assert!(!html.contains("run.out"));

    for (name, begins) in [("m.svg", &b"<svg"[..]), ("m.png", b"\x89PNG"), ("m.html", b"<!doctype html>")] {
        let output = place.run(&["plot", "a", "b", "--curve", "rewards/margins", "--out", name]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(fs::read(place.path(name)).expect("there").starts_with(begins), "{name}");
        assert!(place.run(&["plot", "losses", "--out", name]).status.success());
        assert!(fs::read(place.path(name)).expect("there").starts_with(begins), "{name}");
    }
    // a held-out metric is drawn as its help says, beside the training one
    for name in ["loss", "eval_loss"] {
        let output = place.run(&["plot", "a", "--curve", name, "--out", &format!("{name}.svg")]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(place.read("loss.svg"), place.read("eval_loss.svg"));
    let svg = place.read("m.svg");
    assert!(svg.contains("IPO") && svg.contains("Bradley-Terry") && !svg.contains("var("));

    for (arguments, message) in [
        (&["plot", "a", "--curve", "rewards/margin", "--out", "m.svg"][..], "did you mean `rewards/margins`?"),
        (&["plot", "a", "--curve", "loss", "--out", "m.gif"], ".svg, .png or .html"),
        (&["plot", "nowhere", "--curve", "loss", "--out", "m.svg"], "is no run folder"),
        (&["plot", "a", "--out", "m.svg"], "--curve"),
        (&["report", "nowhere"], "is no run folder"),
    ] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
    }
}
