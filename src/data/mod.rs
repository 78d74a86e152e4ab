//! From preference files to token ids.
//!
//! `source` yields rows, one at a time, of Parquet and JSON files; `format` recognises what their columns mean;
//! `template` renders conversations as the model expects them; `encode` finds the ids and the boundary between
//! prompt and completion; a [`Dataset`] keeps ids only. What cannot be trained on is dropped, counted by reason and
//! listed with its file and row, or refused: nothing is repaired silently.

mod choices;
mod codec;
mod dataset;
mod encode;
mod format;
mod gguf_tokenizer;
mod gguf_vocabulary;
mod pieces;
mod prompts;
mod source;
mod template;

use std::path::{Path, PathBuf};

use miette::Diagnostic;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use choices::{ChoiceForm, Question, load_choices};
pub use codec::Codec;
pub(crate) use dataset::shuffle_first;
pub use dataset::{Dataset, DropReason, Dropped, Drops, Example, Facts};
pub use prompts::{Answer, Prompt, load_prompts};
pub use source::{Place, Source, Sources};

use crate::hub::HubError;
use crate::loss::Examples;
use crate::progress::Console;
use crate::range::Count;
use crate::suggest::{did_you_mean, list};
use crate::tensor_file::TensorFileError;
use encode::Limits;
use format::{Form, Shape};
use source::{DataFile, Row, Rows};

/// The `[data]` table of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// What to train on: a file, a glob, or a list of them with weights.
    pub train: Sources,
    /// Held-out rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<Sources>,
    /// What the columns are called in the files.
    #[serde(default, skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Tokens of prompt and completion together; a longer completion is cut at its end.
    #[serde(default = "default_max_length")]
    pub max_length: Count,
    /// Rows with a longer prompt are dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_prompt_length: Option<Count>,
    /// A Jinja file that takes the place of the model's own chat template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,
    /// What a row that cannot be trained on means.
    #[serde(default)]
    pub bad_rows: BadRows,
}

impl DataConfig {
    /// Rows to read, all else as it is by default.
    #[must_use]
    pub fn of(train: Sources) -> Self {
        Self {
            train,
            eval: None,
            columns: Columns::default(),
            max_length: default_max_length(),
            max_prompt_length: None,
            chat_template: None,
            bad_rows: BadRows::default(),
        }
    }
}

/// TRL's default.
fn default_max_length() -> Count {
    Count::constant(1024)
}

/// What a row that cannot be trained on means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BadRows {
    /// It is left out, counted by reason and listed.
    #[default]
    Drop,
    /// The first one is an error.
    Error,
}

/// `[data.columns]`: what the columns that are read are called in the files, where that is not their own name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// The prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// The preferred completion.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<String>,
    /// The other one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
    /// The only completion of a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion: Option<String>,
    /// Whether it is desirable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

impl Columns {
    /// Own name and name in the files of every column that is mapped.
    fn mapped(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("prompt", &self.prompt),
            ("chosen", &self.chosen),
            ("rejected", &self.rejected),
            ("completion", &self.completion),
            ("label", &self.label),
        ]
        .into_iter()
        .filter_map(|(own, name)| Some((own, name.as_deref()?)))
    }

    fn is_empty(&self) -> bool {
        self.mapped().next().is_none()
    }

    /// The name under which a column of a file is read; `None` if it is not read.
    fn own_name(&self, column: &str) -> Option<&'static str> {
        if let Some((own, _)) = self.mapped().find(|(_, name)| *name == column) {
            return Some(own);
        }
        let own = *format::COLUMNS.iter().find(|own| **own == column)?;
        // a column of that name steps aside for the one mapped to it
        self.mapped().all(|(mapped, _)| mapped != own).then_some(own)
    }
}

/// What is to be made of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// What the loss learns from.
    pub examples: Examples,
    /// Whether pairs stay pairs even for a loss that learns from single completions: held-out pairs tell how often the
    /// better one is preferred.
    pub keep_pairs: bool,
}

/// What can be wrong with data, a tokenizer or a chat template.
#[derive(Debug, Error, Diagnostic)]
pub enum DataError {
    /// From the hub.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Hub(#[from] HubError),
    /// A file, or a row of it.
    #[error("{}{}: {problem}", file.display(), place.map(|place| format!(" {place}")).unwrap_or_default())]
    File {
        /// The file.
        file: PathBuf,
        /// The row, where one is to blame.
        place: Option<Place>,
        /// What is wrong.
        problem: String,
        /// What to do.
        #[help]
        help: Option<String>,
    },
    /// A prompt that is no row of a file.
    #[error("the prompt cannot be used: {0}")]
    Prompt(String),
    /// Not one row can be trained on.
    #[error("none of the {rows} rows of {} can be trained on: {counts}", file.display())]
    NothingLeft {
        /// The file, or the first of several.
        file: PathBuf,
        /// Rows read.
        rows: usize,
        /// How many were dropped for which reason.
        counts: String,
        /// The first of them, and what to do.
        #[help]
        help: String,
    },
}

impl DataError {
    fn file(file: &Path, problem: impl Into<String>) -> Self {
        Self::File { file: file.to_owned(), place: None, problem: problem.into(), help: None }
    }

    fn row(file: &Path, place: Place, problem: impl Into<String>) -> Self {
        Self::File { file: file.to_owned(), place: Some(place), problem: problem.into(), help: None }
    }

    fn help(mut self, text: impl Into<String>) -> Self {
        if let Self::File { help, .. } = &mut self {
            *help = Some(text.into());
        }
        self
    }
}

impl From<TensorFileError> for DataError {
    fn from(TensorFileError { file, problem, help }: TensorFileError) -> Self {
        Self::File { file, place: None, problem, help }
    }
}

/// Reads files into token ids: `wanted` examples, in the order of the files and their rows.
///
/// # Errors
/// A file is missing, broken or of no known shape, a row of it is bad and `bad_rows` says that this is an error, or no
/// row is left.
pub fn load(
    sources: &Sources,
    config: &DataConfig,
    codec: &Codec,
    wanted: Wanted,
    console: &Console,
) -> Result<Dataset, DataError> {
    let files = source::resolve(sources, console)?;
    let bar = console.bytes_bar("reading data", files.iter().map(|file| file.bytes).sum());
    let mut dataset = Dataset::default();
    for file in &files {
        dataset.begin_file(&file.name, file.weight);
        let mut reading = Reading {
            file,
            config,
            codec,
            wanted,
            dataset: &mut dataset,
            columns: vec![],
            shape: None,
            rows: vec![],
        };
        file.read(&|name| config.columns.own_name(name), &bar, &mut reading)?;
        reading.finish()?;
    }
    if dataset.is_empty() {
        return Err(nothing_left(&files, &dataset));
    }
    Ok(dataset)
}

fn nothing_left(files: &[DataFile], dataset: &Dataset) -> DataError {
    let drops = dataset.drops();
    let first = drops.listed().first();
    DataError::NothingLeft {
        file: files.first().map(|file| file.name.clone()).unwrap_or_default(),
        rows: dataset.rows_read(),
        counts: drops.to_string(),
        help: first
            .map(|drop| format!("{}: {}; {}", drop.origin, drop.detail, drop.reason.remedy()))
            .unwrap_or_default(),
    }
}

/// Rows that are tokenised together. `datasets.map` takes as many, so pairs taken apart come in TRL's order: all the
/// chosen ones of a chunk, then the rejected ones.
const CHUNK: usize = 1000;

/// One file on its way into the dataset.
struct Reading<'a> {
    file: &'a DataFile,
    config: &'a DataConfig,
    codec: &'a Codec,
    wanted: Wanted,
    dataset: &'a mut Dataset,
    columns: Vec<String>,
    shape: Option<Shape>,
    rows: Vec<Row>,
}

impl Rows for Reading<'_> {
    fn columns(&mut self, columns: Vec<String>) -> Result<(), DataError> {
        for (own, name) in self.config.columns.mapped() {
            if !columns.iter().any(|column| column == name) {
                let meant = did_you_mean(name, columns.iter().map(String::as_str));
                let help = match meant {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => format!("its columns are {}", list(&columns)),
                };
                let problem = format!("has no column `{name}`, which [data.columns] {own} names");
                return Err(DataError::file(&self.file.name, problem).help(help));
            }
        }
        self.columns = columns;
        Ok(())
    }

    fn row(&mut self, row: Row) -> Result<(), DataError> {
        self.rows.push(row);
        if self.rows.len() == CHUNK { self.encode() } else { Ok(()) }
    }
}

impl Reading<'_> {
    fn finish(mut self) -> Result<(), DataError> {
        if !self.rows.is_empty() {
            self.encode()?;
        }
        if self.shape.is_none() {
            return Err(DataError::file(&self.file.name, "has no rows"));
        }
        Ok(())
    }

    /// Tokenises the rows that wait, in parallel, and adds them in order.
    fn encode(&mut self) -> Result<(), DataError> {
        let shape = match self.shape {
            Some(shape) => shape,
            None => self.recognise()?,
        };
        let rows = std::mem::take(&mut self.rows);
        for row in &rows {
            if let Some(problem) = format::refused(&row.values, shape) {
                return Err(DataError::row(&self.file.name, row.place, problem.0).help(problem.1));
            }
        }
        let limits = Limits {
            total: self.config.max_length.get(),
            prompt: self.config.max_prompt_length.map_or(usize::MAX, Count::get),
        };
        let (codec, wanted) = (self.codec, self.wanted);
        let encoded: Vec<_> = rows
            .into_par_iter()
            .map(|row| (row.place, encode::examples(shape, row.values, codec, wanted, limits)))
            .collect();
        self.dataset.count_rows(encoded.len());
        let (mut firsts, mut seconds) = (Vec::new(), Vec::new());
        for (place, examples) in encoded {
            let mut examples = examples.into_iter().map(|example| (place, example));
            firsts.extend(examples.next());
            seconds.extend(examples);
        }
        for (place, example) in firsts.into_iter().chain(seconds) {
            match example {
                Ok(example) => {
                    if !self.dataset.push(place, &example) {
                        let problem = "holds more rows than can be counted in 32 bits";
                        return Err(DataError::file(&self.file.name, problem).help("split the data"));
                    }
                }
                Err(bad) => {
                    if self.config.bad_rows == BadRows::Error && bad.reason != DropReason::NotDesired {
                        return Err(DataError::row(&self.file.name, place, bad.detail)
                            .help(format!("{}, or set [data] bad_rows = \"drop\"", bad.reason.remedy())));
                    }
                    self.dataset.drop_row(place, bad.reason, bad.detail);
                }
            }
        }
        Ok(())
    }

    /// What the columns mean, by their names and the types in the first row that shows them.
    fn recognise(&mut self) -> Result<Shape, DataError> {
        let file = &self.file.name;
        let mut shapes = self.rows.iter().map(|row| Shape::recognise(&row.values));
        let shape = shapes.find_map(Result::ok);
        let Some(shape) = shape else {
            let (Some(first), Some(place)) =
                (self.rows.first().and_then(|row| Shape::recognise(&row.values).err()), self.rows.first())
            else {
                return Err(DataError::file(file, "has no rows"));
            };
            let problem = format!("{first}; its columns are {}", list(&self.columns));
            return Err(DataError::row(file, place.place, problem).help(format::UNDERSTOOD));
        };
        shape
            .check_wanted(self.wanted.examples)
            .map_err(|(problem, help)| DataError::file(file, problem).help(help))?;
        if shape.form() == Form::Messages && self.codec.chat_template().is_none() {
            let problem = "holds message lists, and the model has no chat template";
            return Err(DataError::file(file, problem).help("name a Jinja file as [data] chat_template"));
        }
        self.dataset.name_shape(shape.to_string());
        self.shape = Some(shape);
        Ok(shape)
    }
}

#[cfg(test)]
mod tests;
