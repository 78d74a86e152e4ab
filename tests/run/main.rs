//! `dpo-lora run` as its users meet it: the binary, its files, its messages, its exit codes.

mod bad_input;
mod device;
mod eval;
mod generate;
mod hub;
mod merged;
mod plan;
mod recipes;
mod reference;
mod report;
mod results;
mod resume;
mod serve;
mod trl;
mod win_rate;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A place with a recipe on the quickstart's model and data, made small.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().expect("a folder") };
        let quickstart = quickstart();
        let train = quickstart.join("train.parquet");
        let rows = format!("[data]\ntrain = \"{}\"\neval = \"held-out.jsonl\"\n", train.display());
        place.write("held-out.jsonl", pairs(5));
        let model = format!("[model]\nsource = \"{}\"\n", quickstart.join("model").display());
        let train = "[adapter]\nrank = 4\n[loss.dpo]\n[train]\nsteps = 6\nbatch_size = 4\nlearning_rate = 1e-3\n\
                     [eval]\nsamples = 1\nmax_new_tokens = 8\n";
        place.write("recipe.toml", format!("{model}{rows}{train}"));
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, contents).expect("written");
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// `dpo-lora` with these arguments, in this place.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dpo-lora"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env_remove("RUST_BACKTRACE").env("NO_COLOR", "1").env("DPO_LORA_CACHE", self.path("cache"));
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("started")
    }

    /// A run of the recipe into `out`, which has to succeed.
    pub(crate) fn train(&self, out: &str, more: &[&str]) {
        let output = self.run(&[&["run", "recipe.toml", "--out", out], more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
    }

    pub(crate) fn metrics(&self, out: &str) -> Vec<Value> {
        let text = self.read(&format!("{out}/metrics.jsonl"));
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    pub(crate) fn adapter(&self, out: &str) -> Vec<u8> {
        fs::read(self.path(&format!("{out}/adapter/adapter_model.safetensors"))).expect("an adapter")
    }
}

pub(crate) fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart")
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The same without the lines that a message is broken into, and what frames them.
pub(crate) fn unwrapped(output: &Output) -> String {
    stderr(output).split_whitespace().filter(|word| *word != "│").collect::<Vec<_>>().join(" ")
}

/// A value of a quickstart row, for data files made on the spot.
pub(crate) fn pairs(count: usize) -> String {
    let row = |i: usize| {
        let row = serde_json::json!({
            "prompt": format!("What is number {i}?"), "chosen": format!("It is {i}, plainly."),
            "rejected": format!("The numeral in question constitutes {i}."),
        });
        format!("{row}\n")
    };
    (0..count).map(row).collect()
}
