//! Answers that were paid for, in a file that only grows: a JSON object a line, under a key.
//!
//! A line is on disk before its answer is used, so a killed process loses what was under way and nothing else. Of two lines
//! of one key the last counts. A last line without an end was being written when the process was killed: it is cut off.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

use crate::progress::Console;
use crate::tensor_file::describe_io;

/// Why a log cannot be used.
#[derive(Debug, Error, Diagnostic)]
pub enum LogError {
    /// Two processes would ask and pay for the same.
    #[error("another process is writing {}", .0.display())]
    #[diagnostic(help("wait for it, or name another folder with --out"))]
    Busy(PathBuf),
    /// The system.
    #[error("{}: {}", path.display(), describe_io(source))]
    System {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: io::Error,
    },
    /// A line in the middle is none.
    #[error("{} line {line}: {problem}", path.display())]
    #[diagnostic(help("a line is a JSON object with a `key`; take the line out, and its answer is asked for again"))]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
}

/// What to do where another process has the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// It is an error.
    Refuse,
    /// Wait until it is done.
    Wait,
}

/// A log that is open.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    entries: BTreeMap<String, Value>,
}

impl Log {
    /// Opens a log to go on with it, or begins one. No other process can, while this one has it.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn open(path: &Path, busy: Busy, console: &Console) -> Result<Self, LogError> {
        let system = |source| LogError::System { path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(system)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if busy == Busy::Refuse => return Err(LogError::Busy(path.to_owned())),
            Err(TryLockError::WouldBlock) => {
                console.line(format_args!("waiting for another process, which is writing {}", path.display()));
                file.lock().map_err(system)?;
            }
            // a file system without locks: then it is up to its user
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(system(error)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(system)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(system)?;
            file.seek(SeekFrom::End(0)).map_err(system)?;
        }
        Ok(Self { entries: parse(&bytes[..whole], path)?, path: path.to_owned(), file })
    }

    /// What a log holds, without going on with it.
    ///
    /// # Errors
    /// It is not there, or see [`LogError`].
    pub fn read(path: &Path) -> Result<BTreeMap<String, Value>, LogError> {
        let bytes = std::fs::read(path).map_err(|source| LogError::System { path: path.to_owned(), source })?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        parse(&bytes[..whole], path)
    }

    /// What is under a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// Takes what is under a key for not answered, until it is written again. The file keeps it.
    pub fn forget(&mut self, key: &str) {
        self.entries.remove(key);
    }

    /// Everything.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<String, Value> {
        &self.entries
    }

    /// Writes an answer under its key. It is on disk when this returns.
    ///
    /// # Errors
    /// The system's.
    pub fn push(&mut self, key: &str, entry: &impl Serialize) -> Result<(), LogError> {
        let system = |source| LogError::System { path: self.path.clone(), source };
        let entry = serde_json::to_value(entry).map_err(|e| system(e.into()))?;
        let mut line = serde_json::json!({ "key": key });
        if let (Some(line), Value::Object(entry)) = (line.as_object_mut(), &entry) {
            line.extend(entry.clone());
        }
        self.file.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.file.sync_data()).map_err(system)?;
        self.entries.insert(key.to_owned(), line);
        Ok(())
    }
}

fn parse(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, Value>, LogError> {
    let mut entries = BTreeMap::new();
    for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let problem = |problem: String| LogError::Line { path: path.to_owned(), line: number + 1, problem };
        let value: Value = serde_json::from_slice(line).map_err(|e| problem(format!("is no valid JSON: {e}")))?;
        let key = value.get("key").and_then(Value::as_str).ok_or_else(|| problem("has no `key`".into()))?;
        entries.insert(key.to_owned(), value);
    }
    Ok(entries)
}

/// A key: the hash of a JSON value, whose objects are ordered by name.
#[must_use]
pub fn key(of: &Value) -> String {
    blake3::hash(canonical(of).to_string().as_bytes()).to_hex().to_string()
}

fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let sorted: BTreeMap<_, _> =
                object.iter().map(|(name, value)| (name.clone(), canonical(value))).collect();
            Value::Object(sorted.into_iter().collect())
        }
        Value::Array(array) => array.iter().map(canonical).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_written_is_there_after_any_cut() {
        let place = tempfile::tempdir().expect("a folder");
        let path = place.path().join("log.jsonl");
        let console = Console::silent();
        let mut log = Log::open(&path, Busy::Refuse, &console).expect("begun");
        log.push("a", &json!({"n": 1})).expect("written");
        log.push("b", &json!({"n": 2})).expect("written");
        log.push("a", &json!({"n": 3})).expect("written");
        assert!(matches!(Log::open(&path, Busy::Refuse, &console), Err(LogError::Busy(_))));
        drop(log);
        let whole = std::fs::read(&path).expect("read");
        let ends: Vec<usize> = (0..whole.len()).filter(|&i| whole[i] == b'\n').map(|i| i + 1).collect();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).expect("written");
            let mut log = Log::open(&path, Busy::Refuse, &console).expect("opened");
            let lines = ends.iter().filter(|end| **end <= cut).count();
            let n = |key: &str| log.get(key).map(|value| value["n"].clone());
            let expected = [(None, None), (Some(1), None), (Some(1), Some(2)), (Some(3), Some(2))][lines];
            assert_eq!((n("a"), n("b")), (expected.0.map(Value::from), expected.1.map(Value::from)), "{cut}");
            // and it can be gone on with
            log.push("c", &json!({"n": 9})).expect("written");
            drop(log);
            assert_eq!(Log::read(&path).expect("read")["c"]["n"], 9, "{cut}");
        }
    }

    #[test]
    fn a_broken_line_in_the_middle_is_an_error_that_names_it() {
        let place = tempfile::tempdir().expect("a folder");
        let path = place.path().join("log.jsonl");
        for (line, problem) in [("{\"key\": \"a\"", "no valid JSON"), ("{\"n\": 1}", "no `key`"), ("[]", "no `key`")]
        {
            std::fs::write(&path, format!("{{\"key\":\"x\"}}\n{line}\n")).expect("written");
            let error = Log::read(&path).expect_err("broken").to_string();
            assert!(error.contains("line 2") && error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_key_does_not_depend_on_the_order_of_names() {
        let (one, two) = (json!({"a": 1, "b": {"c": [1, 2], "d": 3}}), json!({"b": {"d": 3, "c": [1, 2]}, "a": 1}));
        assert_eq!(key(&one), key(&two));
        assert_ne!(key(&one), key(&json!({"a": 1, "b": {"c": [2, 1], "d": 3}})));
    }
}
