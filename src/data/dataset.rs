//! Token ids, and in which order an epoch sees them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;

use super::source::Place;
use crate::hub::is_address;
use crate::progress::thousands;

/// One example: a pair has both completions, a desirable answer or a demonstration only `chosen`, an undesirable
/// answer only `rejected`. A completion is never empty, nor is a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Example<'d> {
    /// Ids of the prompt, a BOS first where the model uses one.
    pub prompt: &'d [u32],
    /// Ids of the preferred completion.
    pub chosen: Option<&'d [u32]>,
    /// Ids of the other one.
    pub rejected: Option<&'d [u32]>,
}

/// An example as it comes from the tokenizer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Encoded {
    pub(super) prompt: Vec<u32>,
    /// Empty where there is none.
    pub(super) chosen: Vec<u32>,
    /// Empty where there is none.
    pub(super) rejected: Vec<u32>,
    /// Whether a completion was cut at the maximum length.
    pub(super) truncated: bool,
    /// Whether the end of the prompt was left out, as it is tokenised differently before a completion.
    pub(super) boundary_moved: bool,
}

/// Why a row, or a side of it, cannot be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// Nothing is preferred.
    Identical,
    /// There is nothing to learn.
    EmptyCompletion,
    /// The first token of the completion would have nothing before it.
    EmptyPrompt,
    /// The prompt fills the maximum length, or is above the prompt's own.
    LongPrompt,
    /// A value is missing or has another type than in the rest of the file.
    Malformed,
    /// Chosen and rejected do not have one prompt that a single turn of the assistant follows.
    NoCommonPrompt,
    /// The chat template refuses the conversation.
    Template,
    /// Labelled undesirable, where only demonstrations are read.
    NotDesired,
}

impl DropReason {
    /// What to do about it.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Identical | Self::EmptyCompletion | Self::EmptyPrompt | Self::Malformed => "mend or remove the row",
            Self::LongPrompt => "raise [data] max_length or max_prompt_length, or remove the row",
            Self::NoCommonPrompt => "give the prompt a column of its own, or remove the row",
            Self::Template => "mend or remove the row, or name another template as [data] chat_template",
            Self::NotDesired => "train on it with [loss.kto]",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Identical => "chosen and rejected the same",
            Self::EmptyCompletion => "empty completion",
            Self::EmptyPrompt => "empty prompt",
            Self::LongPrompt => "prompt too long",
            Self::Malformed => "malformed",
            Self::NoCommonPrompt => "no common prompt",
            Self::Template => "refused by the chat template",
            Self::NotDesired => "labelled undesirable",
        })
    }
}

/// A row that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// File and row: `pairs.parquet row 12`.
    pub origin: String,
    /// Why, by class.
    pub reason: DropReason,
    /// Why, in words.
    pub detail: String,
}

/// Everything that was left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drops {
    counts: BTreeMap<DropReason, usize>,
    listed: Vec<Dropped>,
}

/// As many drops are listed; all are counted.
const LISTED: usize = 5000;

impl Drops {
    /// How many were dropped for which reason.
    #[must_use]
    pub fn counts(&self) -> &BTreeMap<DropReason, usize> {
        &self.counts
    }

    /// How many were dropped.
    #[must_use]
    pub fn total(&self) -> usize {
        self.counts.values().sum()
    }

    /// Each of the first 5000.
    #[must_use]
    pub fn listed(&self) -> &[Dropped] {
        &self.listed
    }
}

impl fmt::Display for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> =
            self.counts.iter().map(|(reason, count)| format!("{} {reason}", thousands(*count))).collect();
        f.write_str(&counts.join(", "))
    }
}

/// A file that examples come from.
#[derive(Debug)]
struct Origin {
    path: PathBuf,
    weight: f64,
    /// Number of its first example; the next file's is where its own end.
    first: usize,
    shape: String,
}

#[derive(Debug)]
struct Entry {
    place: Place,
    start: usize,
    prompt: u32,
    chosen: u32,
    rejected: u32,
}

/// Examples as token ids. The texts are not kept.
#[derive(Debug, Default)]
pub struct Dataset {
    tokens: Vec<u32>,
    entries: Vec<Entry>,
    files: Vec<Origin>,
    drops: Drops,
    rows_read: usize,
    truncated: usize,
    boundary_moved: usize,
}

impl Dataset {
    /// One file of prompts with chosen and rejected; an empty side is absent.
    #[cfg(test)]
    pub(crate) fn of(rows: &[(&[u32], &[u32], &[u32])]) -> Self {
        let mut dataset = Self::default();
        dataset.begin_file(Path::new("pairs.jsonl"), 1.0);
        for (i, (prompt, chosen, rejected)) in rows.iter().enumerate() {
            let [prompt, chosen, rejected] = [prompt, chosen, rejected].map(|ids| ids.to_vec());
            let example = Encoded { prompt, chosen, rejected, ..Encoded::default() };
            assert!(dataset.push(Place::Row(i as u64 + 1), &example));
        }
        dataset
    }

    pub(super) fn begin_file(&mut self, path: &Path, weight: f64) {
        let first = self.entries.len();
        self.files.push(Origin { path: path.to_owned(), weight, first, shape: String::new() });
    }

    pub(super) fn name_shape(&mut self, shape: String) {
        if let Some(file) = self.files.last_mut() {
            file.shape = shape;
        }
    }

    pub(super) fn count_rows(&mut self, rows: usize) {
        self.rows_read += rows;
    }

    /// Adds an example of the file last begun; false where there are too many to be counted.
    pub(super) fn push(&mut self, place: Place, example: &Encoded) -> bool {
        let length = |ids: &[u32]| u32::try_from(ids.len());
        let (Ok(prompt), Ok(chosen), Ok(rejected), Ok(_)) = (
            length(&example.prompt),
            length(&example.chosen),
            length(&example.rejected),
            u32::try_from(self.entries.len()),
        ) else {
            return false;
        };
        self.entries.push(Entry { place, start: self.tokens.len(), prompt, chosen, rejected });
        for ids in [&example.prompt, &example.chosen, &example.rejected] {
            self.tokens.extend_from_slice(ids);
        }
        self.truncated += usize::from(example.truncated);
        self.boundary_moved += usize::from(example.boundary_moved);
        true
    }

    pub(super) fn drop_row(&mut self, place: Place, reason: DropReason, detail: String) {
        *self.drops.counts.entry(reason).or_default() += 1;
        if self.drops.listed.len() < LISTED {
            let origin = self.files.last().map_or_else(String::new, |file| file.name(place));
            self.drops.listed.push(Dropped { origin, reason, detail });
        }
    }

    /// Number of examples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Example number `i`.
    ///
    /// # Panics
    /// Where there are not that many.
    #[must_use]
    pub fn get(&self, i: usize) -> Example<'_> {
        let Entry { start, prompt, chosen, rejected, .. } = self.entries[i];
        let (prompt, rest) = self.tokens[start..].split_at(prompt as usize);
        let (chosen, rest) = rest.split_at(chosen as usize);
        let rejected = &rest[..rejected as usize];
        let present = |ids: &'_ [u32]| !ids.is_empty();
        Example {
            prompt,
            chosen: Some(chosen).filter(|c| present(c)),
            rejected: Some(rejected).filter(|r| present(r)),
        }
    }

    /// Where example number `i` comes from: `pairs.parquet row 12`.
    ///
    /// # Panics
    /// Where there are not that many.
    #[must_use]
    pub fn origin(&self, i: usize) -> String {
        let file = self.files.partition_point(|file| file.first <= i).saturating_sub(1);
        self.files[file].name(self.entries[i].place)
    }

    /// The examples of an epoch in order, each file's as often as its weight says: whole passes over all files first,
    /// then the random part that a broken weight asks for. Shuffled or not, the order depends on `seed` and `epoch`
    /// only, and every epoch has the same length.
    #[must_use]
    pub fn epoch(&self, epoch: u64, seed: u64, shuffle: bool) -> Vec<u32> {
        let mut hasher = blake3::Hasher::new_derive_key("dpo-lora order of an epoch");
        hasher.update(&seed.to_le_bytes());
        hasher.update(&epoch.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
        let passes = self.files.iter().map(|file| file.weight.floor() as u64).max().unwrap_or(0);
        let mut order = Vec::new();
        for pass in 0..passes {
            for (i, file) in self.files.iter().enumerate() {
                if pass < file.weight.floor() as u64 {
                    order.extend(self.examples_of(i));
                }
            }
        }
        for (i, file) in self.files.iter().enumerate() {
            let share = file.weight.fract();
            let mut rows: Vec<u32> = self.examples_of(i).collect();
            if share > 0.0 && !rows.is_empty() {
                let kept = ((share * rows.len() as f64).round() as usize).max(1);
                shuffle_first(&mut rows, kept, &mut rng);
                rows.truncate(kept);
                rows.sort_unstable();
                order.extend(rows);
            }
        }
        if shuffle {
            let all = order.len();
            shuffle_first(&mut order, all, &mut rng);
        }
        order
    }

    /// Numbers of the examples of a file; [`Dataset::push`] holds them within 32 bits.
    fn examples_of(&self, file: usize) -> impl Iterator<Item = u32> {
        let end = self.files.get(file + 1).map_or(self.entries.len(), |next| next.first);
        (self.files[file].first..end).map(|i| i as u32)
    }

    /// Memory that it takes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.tokens.capacity() * size_of::<u32>() + self.entries.capacity() * size_of::<Entry>()
    }

    /// What was left out.
    #[must_use]
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    /// Number of rows in the files, those left out included.
    #[must_use]
    pub fn rows_read(&self) -> usize {
        self.rows_read
    }

    /// The dataset in numbers.
    #[must_use]
    pub fn facts(&self) -> Facts {
        let mut shapes: Vec<String> = self.files.iter().map(|file| file.shape.clone()).collect();
        shapes.dedup();
        let completions =
            |entry: &Entry| [entry.chosen, entry.rejected].map(|n| n as usize).into_iter().filter(|n| *n > 0);
        let lengths = || self.entries.iter().flat_map(completions);
        let mean = |sum: usize, count: usize| sum as f64 / count.max(1) as f64;
        Facts {
            files: self.files.len(),
            rows: self.rows_read,
            examples: self.len(),
            shapes,
            truncated: self.truncated,
            boundary_moved: self.boundary_moved,
            longest: self
                .entries
                .iter()
                .map(|entry| entry.prompt as usize + completions(entry).max().unwrap_or(0))
                .max()
                .unwrap_or(0),
            mean_prompt: mean(self.entries.iter().map(|entry| entry.prompt as usize).sum(), self.len()),
            mean_completion: mean(lengths().sum(), lengths().count()),
            largest_id: self.tokens.iter().copied().max().unwrap_or(0),
        }
    }

    /// Hash of the examples, and of the weights of their files: what training depends on.
    #[must_use]
    pub fn fingerprint(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_derive_key("dpo-lora dataset");
        hasher.update(self.token_hash().as_bytes());
        for file in &self.files {
            hasher.update(&file.weight.to_le_bytes());
            hasher.update(&(file.first as u64).to_le_bytes());
        }
        hasher.finalize()
    }

    /// Hash of all ids and of which of them are prompt, chosen and rejected: what log-probs depend on.
    #[must_use]
    pub fn token_hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_derive_key("dpo-lora tokens");
        for count in [self.tokens.len(), self.entries.len()] {
            hasher.update(&(count as u64).to_le_bytes());
        }
        let mut numbers = |numbers: &mut dyn Iterator<Item = u32>| {
            let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
            hasher.update(&bytes);
        };
        for chunk in self.tokens.chunks(1 << 16) {
            numbers(&mut chunk.iter().copied());
        }
        for chunk in self.entries.chunks(1 << 16) {
            numbers(&mut chunk.iter().flat_map(|entry| [entry.prompt, entry.chosen, entry.rejected]));
        }
        hasher.finalize()
    }
}

impl Origin {
    fn name(&self, place: Place) -> String {
        // an address on the hub says more than its last part
        let own = if is_address(&self.path) { None } else { self.path.file_name() };
        format!("{} {place}", own.unwrap_or(self.path.as_os_str()).to_string_lossy())
    }
}

/// Moves a random choice of `count` items, in random order, to the front (Fisher and Yates).
pub(crate) fn shuffle_first(items: &mut [u32], count: usize, rng: &mut ChaCha8Rng) {
    for i in 0..count.min(items.len()) {
        let other = i + below((items.len() - i) as u64, rng) as usize;
        items.swap(i, other);
    }
}

/// A whole number from 0 to below `bound`, each as likely as any other (Lemire 2019, <https://arxiv.org/abs/1805.10941>).
fn below(bound: u64, rng: &mut ChaCha8Rng) -> u64 {
    let too_low = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 >= too_low {
            return (product >> 64) as u64;
        }
    }
}

/// A dataset in numbers, for the log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Facts {
    /// Files read.
    pub files: usize,
    /// Rows in them.
    pub rows: usize,
    /// Examples made of them.
    pub examples: usize,
    /// What was recognised, in words, file by file, a repetition left out.
    pub shapes: Vec<String>,
    /// Examples with a completion cut at the maximum length.
    pub truncated: usize,
    /// Examples whose prompt lost its end, which is tokenised or rendered differently before a completion.
    pub boundary_moved: usize,
    /// Tokens of the longest prompt with its longer completion.
    pub longest: usize,
    /// Tokens of a prompt, on average.
    pub mean_prompt: f64,
    /// Tokens of a completion, on average.
    pub mean_completion: f64,
    /// The largest id; a model with a smaller vocabulary cannot read it.
    pub largest_id: u32,
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} examples of {} rows", thousands(self.examples), thousands(self.rows))?;
        if self.files > 1 {
            write!(f, " in {} files", self.files)?;
        }
        write!(
            f,
            ": {}\nprompt {:.0} + completion {:.0} tokens on average, {} together at most",
            self.shapes.join(", "),
            self.mean_prompt,
            self.mean_completion,
            thousands(self.longest),
        )?;
        if self.truncated > 0 {
            write!(f, "; {} cut at the maximum length", thousands(self.truncated))?;
        }
        if self.boundary_moved > 0 {
            let moved = thousands(self.boundary_moved);
            write!(
                f,
                "\n{moved} with the end of the prompt left out, as it is tokenised differently before a completion"
            )?;
        }
        Ok(())
    }
}
