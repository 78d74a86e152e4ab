//! A run that is killed and resumed is the run that was not.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Place, stderr};

/// Everything that has randomness or memory: dropout, shuffling, a second epoch that reads the reference's log-probs.
const HARD: [&str; 8] = [
    "--set",
    "adapter.dropout=0.1",
    "--set",
    "run.checkpoint_every=1",
    "--set",
    "run.keep=100",
    "--set",
    "data.train=pairs.jsonl",
];

fn place() -> Place {
    let place = Place::new();
    // 12 rows and 4 an update: 6 updates are two epochs
    place.write("pairs.jsonl", super::pairs(12));
    place
}

/// Metrics without what the clock says.
fn timeless(place: &Place, out: &str) -> Vec<String> {
    let mut lines = place.metrics(out);
    for line in &mut lines {
        line.as_object_mut().expect("an object").remove("tokens_per_sec");
    }
    lines.iter().map(ToString::to_string).collect()
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_does_not() {
    let place = place();
    place.train("a", &HARD);
    place.train("b", &HARD);
    place.train("c", &[&HARD[..], &["--set", "train.seed=43"]].concat());
    assert_eq!(place.adapter("a"), place.adapter("b"));
    assert_eq!(timeless(&place, "a"), timeless(&place, "b"));
    assert_ne!(place.adapter("a"), place.adapter("c"));
}

#[test]
fn killed_after_any_update_and_resumed_it_writes_the_same_bytes() {
    for loss in ["dpo", "kto"] {
        let place = place();
        let mut killed = Command::new("true").spawn().expect("started");
        let partial = format!("checkpoints/step-000099-{}.partial", killed.id());
        killed.wait().expect("ended");
        let loss = format!("loss.{loss}.beta=0.2");
        place.train("whole", &[&HARD[..], &["--set", &loss]].concat());
        for killed_after in 1..=6 {
            // what a kill leaves behind: the checkpoint, lines of metrics that came after it, a half-written checkpoint
            let out = format!("killed-{killed_after}");
            copy(&place, "whole", &out);
            for step in killed_after + 1..=6 {
                fs::remove_dir_all(place.path(&format!("{out}/checkpoints/step-{step:06}"))).expect("there");
            }
            for later in ["adapter", "summary.json", "samples.jsonl"] {
                let path = place.path(&format!("{out}/{later}"));
                if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("there");
            }
            place.write(&format!("{out}/{partial}/state.json"), "{");
            let output = place.run(&["run", "--resume", &out]);
            assert!(output.status.success(), "{}", stderr(&output));
            assert_eq!(place.adapter("whole"), place.adapter(&out), "{loss}, killed after {killed_after}");
            assert_eq!(timeless(&place, "whole"), timeless(&place, &out));
            assert_eq!(place.read("whole/samples.jsonl"), place.read(&format!("{out}/samples.jsonl")));
            assert!(!place.path(&format!("{out}/{partial}")).exists());
        }
    }
}

fn copy(place: &Place, from: &str, to: &str) {
    let (from, to) = (place.path(from), place.path(to));
    let mut folders = vec![from.clone()];
    while let Some(folder) = folders.pop() {
        let target = to.join(folder.strip_prefix(&from).expect("within"));
        fs::create_dir_all(&target).expect("made");
        for entry in fs::read_dir(&folder).expect("read") {
            let path = entry.expect("read").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                fs::copy(&path, target.join(path.file_name().expect("a name"))).expect("copied");
            }
        }
    }
}

/// Starts a long run, waits until it has done some updates, sends it a signal and waits for its end.
fn interrupted(place: &Place, out: &str, signal: &str) -> (Option<i32>, String) {
    let arguments = [&["run", "recipe.toml", "--out", out, "--set", "train.steps=100000"][..], &HARD[..]].concat();
    let mut child = place.command(&arguments).stderr(Stdio::piped()).spawn().expect("started");
    let begun = Instant::now();
    while fs::read_to_string(place.path(&format!("{out}/metrics.jsonl"))).map_or(0, |text| text.lines().count()) < 4 {
        assert!(begun.elapsed() < Duration::from_secs(120), "no update was done");
        assert!(child.try_wait().expect("asked").is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(20));
    }
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().expect("sent");
    assert!(sent.success());
    let output = child.wait_with_output().expect("ended");
    (output.status.code(), stderr(&output))
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_says_how_to_go_on_and_goes_on() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let place = place();
        let (found, text) = interrupted(&place, "out", signal);
        assert_eq!(found, Some(code), "{text}");
        assert!(text.contains("dpo-lora run --resume"), "{text}");
        let done = place.metrics("out").last().expect("a line")["step"].as_u64().expect("a step");
        assert!(place.path(&format!("out/checkpoints/step-{done:06}")).is_dir(), "{text}");
        assert!(!place.path("out/adapter").exists());

        // the same run, made to end three updates later, against one that was never stopped
        let steps = done + 3;
        let shorter = |name: &str| {
            let recipe = place.read(&format!("{name}/recipe.resolved.toml"));
            place.write(
                &format!("{name}/recipe.resolved.toml"),
                recipe.replace("steps = 100000", &format!("steps = {steps}")),
            );
        };
        shorter("out");
        let output = place.run(&["run", "--resume", "out"]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(place.metrics("out").last().expect("a line")["step"], steps);
    }
}

#[cfg(unix)]
#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint() {
    let place = place();
    let (code, _) = interrupted(&place, "out", "-KILL");
    assert_eq!(code, None);
    let output = place.command(&["run", "--resume", "out"]).stderr(Stdio::piped()).spawn().expect("started");
    std::thread::sleep(Duration::from_secs(3));
    let sent = Command::new("kill").args(["-INT", &output.id().to_string()]).status().expect("sent");
    assert!(sent.success());
    let output = output.wait_with_output().expect("ended");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let steps: Vec<u64> = place.metrics("out").iter().map(|line| line["step"].as_u64().expect("a step")).collect();
    let expected: Vec<u64> = (0..steps.len() as u64).collect();
    assert_eq!(steps, expected, "every update is there once");
}

#[test]
fn another_recipe_or_other_data_is_not_resumed() {
    let place = place();
    place.train("out", &HARD);
    let output = place.run(&[&["run", "recipe.toml", "--out", "out", "--resume"][..], &HARD[..]].concat());
    assert!(output.status.success(), "the same recipe: {}", stderr(&output));
    let more = ["--set", "train.learning_rate=2e-3"];
    let output = place.run(&[&["run", "recipe.toml", "--resume", "out"][..], &HARD[..], &more[..]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("`train.learning_rate` is not what it was"), "{}", stderr(&output));

    place.write("pairs.jsonl", super::pairs(13));
    let output = place.run(&["run", "--resume", "out"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("the data changed"), "{}", stderr(&output));

    let output = place.run(&["run", "recipe.toml", "--out", "out"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("not empty"), "{}", stderr(&output));
    let output = place.run(&["run", "--resume", "nowhere"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("is no run folder"), "{}", stderr(&output));
}
