//! Event files that TensorBoard reads: `RUN/tb/events.out.tfevents.*`.
//!
//! A file is a sequence of records, each with two checksums, and a record is an `Event` message of protocol buffers
//! (`tensorflow/core/util/event.proto`). What is needed of both is little enough to be written here.
//!
//! A run that goes on begins another file. Its first event says that a session starts at the update it goes on with:
//! TensorBoard then forgets what it has read from that update on, so that updates after the checkpoint, which a killed run
//! had logged and which are done again, are not shown twice.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::files::{WriteError, cannot_write};
use crate::train::Metrics;

/// An event file, open at its end.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
}

const PREFIX: &str = "events.out.tfevents.";

impl Writer {
    /// Begins a file in `folder`, for updates from `step` on, with the recipe as a text.
    ///
    /// # Errors
    /// The system's.
    pub fn create(folder: &Path, step: u64, recipe: &str) -> Result<Self, WriteError> {
        fs::create_dir_all(folder).map_err(cannot_write(folder))?;
        // files are read in the order of their names, so this one has to come after those that are there
        let now = seconds() as u64;
        let second = newest(folder).map_or(now, |newest| now.max(newest + 1));
        let path = folder.join(format!("{PREFIX}{second:010}.{}.{}.0", host(), std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(cannot_write(&path))?;
        let mut writer = Self { path, file };
        let mut events = record(&event(seconds(), 0, FILE_VERSION, b"brain.Event:2"));
        events.extend(record(&event(seconds(), step, SESSION_LOG, &SESSION_STARTS)));
        if step == 0 && !recipe.is_empty() {
            let text = text_value("recipe/text_summary", &format!("```toml\n{recipe}\n```"));
            events.extend(record(&event(seconds(), 0, SUMMARY, &field(SUMMARY_VALUE, &text))));
        }
        writer.write(&events)?;
        Ok(writer)
    }

    /// Writes what an update or an evaluation said, under the names that Hugging Face's trainers use, and lets readers see
    /// it.
    ///
    /// # Errors
    /// The system's.
    pub fn scalars(&mut self, metrics: &Metrics) -> Result<(), WriteError> {
        let step = metrics.get("step").unwrap_or(0.0) as u64;
        let mut summary = Vec::new();
        for (name, value) in metrics.iter().filter(|(name, _)| *name != "step") {
            summary.extend(field(SUMMARY_VALUE, &scalar_value(&tag(name), value as f32)));
        }
        self.write(&record(&event(seconds(), step, SUMMARY, &summary)))
    }

    /// One write a call: what a kill leaves behind is whole records and at most one piece of one, which readers wait for.
    fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.file.write_all(bytes).map_err(cannot_write(&self.path))
    }
}

/// `rewrite_logs` of transformers: `eval_loss` is `eval/loss`, everything else is of training.
fn tag(name: &str) -> String {
    match name.strip_prefix("eval_") {
        Some(name) => format!("eval/{name}"),
        None => format!("train/{name}"),
    }
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The second in the newest file's name.
fn newest(folder: &Path) -> Option<u64> {
    let second = |name: &str| name.strip_prefix(PREFIX)?.split('.').next()?.parse::<u64>().ok();
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries.filter_map(|entry| second(entry.file_name().to_str()?)).max()
}

/// The machine's name, with nothing in it that a file's name should not have.
fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

// ---- Records ------------------------------------------------------------------------------------------------------

/// Length, its checksum, data, its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), data, &masked(data).to_le_bytes()].concat()
}

/// CRC-32C, rotated and shifted, as a checksum of data that holds checksums would otherwise say little.
fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

// ---- Protocol buffers ---------------------------------------------------------------------------------------------

// fields of Event
const FILE_VERSION: u64 = 3;
const SUMMARY: u64 = 5;
const SESSION_LOG: u64 = 7;
/// `SessionLog { status: START }`
const SESSION_STARTS: [u8; 2] = [0x08, 0x01];
/// `Summary.value`
const SUMMARY_VALUE: u64 = 1;

const VARINT: u64 = 0;
const EIGHT_BYTES: u64 = 1;
const DELIMITED: u64 = 2;
const FOUR_BYTES: u64 = 5;

fn event(wall_time: f64, step: u64, what: u64, contents: &[u8]) -> Vec<u8> {
    let mut event = Vec::new();
    varint(&mut event, 1 << 3 | EIGHT_BYTES);
    event.extend(wall_time.to_le_bytes());
    if step > 0 {
        varint(&mut event, 2 << 3 | VARINT);
        varint(&mut event, step);
    }
    event.extend(field(what, contents));
    event
}

/// `Summary.Value { tag, simple_value }`
fn scalar_value(tag: &str, value: f32) -> Vec<u8> {
    let mut bytes = field(1, tag.as_bytes());
    varint(&mut bytes, 2 << 3 | FOUR_BYTES);
    bytes.extend(value.to_le_bytes());
    bytes
}

/// `Summary.Value { tag, tensor: one string, metadata of the text plugin }`
fn text_value(tag: &str, text: &str) -> Vec<u8> {
    const STRING: u8 = 7;
    // TensorShapeProto { dim { size: 1 } }
    let shape = field(2, &[0x08, 0x01]);
    let tensor = [&[0x08, STRING][..], &field(2, &shape), &field(8, text.as_bytes())].concat();
    let metadata = field(1, &field(1, b"text"));
    [field(1, tag.as_bytes()), field(8, &tensor), field(9, &metadata)].concat()
}

/// A field of bytes: a text or another message.
fn field(number: u64, contents: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(contents.len() + 4);
    varint(&mut bytes, number << 3 | DELIMITED);
    varint(&mut bytes, contents.len() as u64);
    bytes.extend(contents);
    bytes
}

/// Seven bits a byte, the lowest first; the eighth says that there are more.
fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of CRC-32C, and its masked form as TensorFlow computes it.
    #[test]
    fn checksums_are_tensorflows() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked(b"123456789"), 0xc78a_b0e5);
    }

    /// Held to a file that TensorBoard's own writer made.
    #[test]
    fn records_are_byte_for_byte_those_of_tensorboards_writer() {
        let mut bytes = record(&event(1.5, 0, FILE_VERSION, b"brain.Event:2"));
        bytes.extend(record(&event(2.0, 0, SESSION_LOG, &SESSION_STARTS)));
        let text = text_value("recipe/text_summary", "```toml\nbeta = 0.1\n```");
        bytes.extend(record(&event(3.25, 0, SUMMARY, &field(SUMMARY_VALUE, &text))));
        let scalars = [("loss", std::f32::consts::LN_2), ("eval_rewards/margins", -0.5)];
        let values: Vec<u8> = scalars
            .iter()
            .flat_map(|(name, value)| field(SUMMARY_VALUE, &scalar_value(&tag(name), *value)))
            .collect();
        bytes.extend(record(&event(4.0, 300, SUMMARY, &values)));
        assert_eq!(bytes, include_bytes!("../../tests/fixtures/tensorboard/events"));
    }

    #[test]
    fn a_file_of_a_run_that_goes_on_comes_after_the_others() {
        let place = tempfile::tempdir().expect("a folder");
        let mut metrics = Metrics::default();
        metrics.push("step", 1.0);
        metrics.push("loss", 0.5);
        for step in [0, 5, 5] {
            Writer::create(place.path(), step, "").expect("made").scalars(&metrics).expect("written");
        }
        let mut files: Vec<_> = fs::read_dir(place.path()).expect("there").flatten().map(|e| e.path()).collect();
        files.sort_unstable();
        let starts: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).expect("read")).collect();
        assert_eq!(starts.len(), 3, "no file is written twice");
        let session = |step: u64| event(0.0, step, SESSION_LOG, &SESSION_STARTS)[9..].to_vec();
        for (bytes, step) in starts.iter().zip([0, 5, 5]) {
            assert!(bytes.windows(session(step).len()).any(|window| window == session(step)), "{step}");
        }
    }
}
