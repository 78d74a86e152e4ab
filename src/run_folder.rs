//! A run folder: what a run leaves behind, and where.
//!
//! ```text
//! RUN/
//!   recipe.toml  recipe.resolved.toml    as written; with every default and derived value, and why
//!   metrics.jsonl                        an object an update
//!   summary.json                         held-out metrics before and after, seconds, memory, hashes
//!   adapter/                             PEFT files, tokenizer, chat template
//!   checkpoints/step-000100/             everything a resume needs
//!   samples.jsonl                        answers of base and policy
//!   margins.json                         of every held-out pair, before and after
//!   eval.json                            what `dpo-lora eval` found
//!   win-rate/AGAINST-by-JUDGE/           what `dpo-lora win-rate` did
//!   report.html                          all of it to look at
//!   tb/                                  the metrics for TensorBoard
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::files::{self, WriteError, cannot_write};

/// A run folder that exists.
#[derive(Debug, Clone)]
pub struct RunFolder {
    path: PathBuf,
}

/// Why a folder cannot be this run's.
#[derive(Debug, Error, Diagnostic)]
pub enum RunFolderError {
    /// There is something in it.
    #[error("{} is there and not empty", .0.display())]
    #[diagnostic(help("go on with the run in it by `dpo-lora run --resume {}`, or name another folder with --out", .0.display()))]
    NotEmpty(PathBuf),
    /// It holds no run.
    #[error("{} is no run folder: there is no recipe.resolved.toml in it", .0.display())]
    NoRun(PathBuf),
    /// The system.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Write(#[from] WriteError),
}

impl RunFolder {
    /// Checks that a run could be begun in `path`: that it is not there, or empty.
    ///
    /// # Errors
    /// It is not empty.
    pub fn check_free(path: &Path) -> Result<(), RunFolderError> {
        match fs::read_dir(path) {
            Ok(mut entries) => match entries.next() {
                Some(_) => Err(RunFolderError::NotEmpty(path.to_owned())),
                None => Ok(()),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(cannot_write(path)(error).into()),
        }
    }

    /// Makes the folder.
    ///
    /// # Errors
    /// It is not empty, or the system's.
    pub fn create(path: &Path) -> Result<Self, RunFolderError> {
        Self::check_free(path)?;
        fs::create_dir_all(path).map_err(cannot_write(path))?;
        Ok(Self { path: path.to_owned() })
    }

    /// A folder that a run was begun in, and may be at work in: nothing in it is touched.
    ///
    /// # Errors
    /// There was none.
    pub fn open(path: &Path) -> Result<Self, RunFolderError> {
        let folder = Self { path: path.to_owned() };
        if !folder.resolved_recipe().is_file() {
            return Err(RunFolderError::NoRun(path.to_owned()));
        }
        Ok(folder)
    }

    /// Removes what a killed run has left half-written, for one that goes on with it.
    pub fn remove_partials(&self) {
        for folder in [self.path.clone(), self.path.join("checkpoints")] {
            files::remove_partials(&folder);
        }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder for a person: short where it is below the working directory.
    #[must_use]
    pub fn shown(&self) -> String {
        let here = std::env::current_dir().unwrap_or_default();
        self.path.strip_prefix(here).unwrap_or(&self.path).display().to_string()
    }

    /// `recipe.toml`
    #[must_use]
    pub fn recipe(&self) -> PathBuf {
        self.path.join("recipe.toml")
    }

    /// `recipe.resolved.toml`
    #[must_use]
    pub fn resolved_recipe(&self) -> PathBuf {
        self.path.join("recipe.resolved.toml")
    }

    /// `metrics.jsonl`
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// `summary.json`
    #[must_use]
    pub fn summary(&self) -> PathBuf {
        self.path.join("summary.json")
    }

    /// `adapter/`
    #[must_use]
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// `samples.jsonl`
    #[must_use]
    pub fn samples(&self) -> PathBuf {
        self.path.join("samples.jsonl")
    }

    /// `margins.json`
    #[must_use]
    pub fn margins(&self) -> PathBuf {
        self.path.join("margins.json")
    }

    /// `eval.json`
    #[must_use]
    pub fn eval(&self) -> PathBuf {
        self.path.join("eval.json")
    }

    /// `win-rate/`
    #[must_use]
    pub fn win_rates(&self) -> PathBuf {
        self.path.join("win-rate")
    }

    /// `report.html`
    #[must_use]
    pub fn report(&self) -> PathBuf {
        self.path.join("report.html")
    }

    /// `tb/`
    #[must_use]
    pub fn tensorboard(&self) -> PathBuf {
        self.path.join("tb")
    }
}

/// `metrics.jsonl`, open at its end.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl MetricsLog {
    /// Opens the file after its first `bytes`; what comes behind was written after the checkpoint that says so, and
    /// will be written again.
    ///
    /// # Errors
    /// The system's.
    pub fn open(run: &RunFolder, bytes: u64) -> Result<Self, WriteError> {
        let path = run.metrics();
        let open = || {
            let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
            if file.metadata()?.len() < bytes {
                return Err(io::Error::other("it is shorter than the checkpoint says"));
            }
            file.set_len(bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        let file = open().map_err(cannot_write(&path))?;
        Ok(Self { path, file, bytes })
    }

    /// Writes a line.
    ///
    /// # Errors
    /// The system's.
    pub fn push(&mut self, object: Map<String, Value>) -> Result<(), WriteError> {
        let line = format!("{}\n", Value::Object(object));
        self.file.write_all(line.as_bytes()).map_err(cannot_write(&self.path))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Makes what was written durable, and says how long the file is.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&mut self) -> Result<u64, WriteError> {
        self.file.sync_all().map_err(cannot_write(&self.path))?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn opening_leaves_what_is_being_written_and_a_resume_removes_what_the_dead_left() {
        let place = tempfile::tempdir().expect("a folder");
        let run = RunFolder::create(&place.path().join("run")).expect("made");
        fs::write(run.resolved_recipe(), "").expect("written");
        let mut child = std::process::Command::new("true").spawn().expect("started");
        child.wait().expect("ended");
        let checkpoint = |id: u32| run.path().join("checkpoints").join(format!("step-000001-{id}.partial"));
        let mut other = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        let (dead, alive) = (checkpoint(child.id()), checkpoint(other.id()));
        for folder in [&dead, &alive] {
            fs::create_dir_all(folder).expect("made");
        }
        let opened = RunFolder::open(run.path()).expect("opened");
        assert!(dead.exists() && alive.exists());
        opened.remove_partials();
        other.kill().expect("killed");
        other.wait().expect("ended");
        assert!(!dead.exists() && alive.exists());
    }

    #[test]
    fn a_log_goes_on_where_a_checkpoint_was() {
        let place = tempfile::tempdir().expect("a folder");
        let run = RunFolder::create(&place.path().join("run")).expect("made");
        let object = |step: i64| Map::from_iter([("step".to_owned(), Value::from(step))]);
        let mut log = MetricsLog::open(&run, 0).expect("opened");
        log.push(object(1)).expect("written");
        let bytes = log.sync().expect("synced");
        log.push(object(2)).expect("written");
        drop(log);
        let mut log = MetricsLog::open(&run, bytes).expect("opened");
        log.push(object(3)).expect("written");
        let text = fs::read_to_string(run.metrics()).expect("there");
        assert_eq!(text, "{\"step\":1}\n{\"step\":3}\n");
        assert!(MetricsLog::open(&run, 1000).is_err());
        assert!(matches!(RunFolder::create(run.path()), Err(RunFolderError::NotEmpty(_))));
    }
}
