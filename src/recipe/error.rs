//! What is wrong with a recipe, in the user's own file.

use std::ops::Range;
use std::sync::Arc;

use miette::{Diagnostic, NamedSource, SourceSpan};
use thiserror::Error;

use crate::suggest::did_you_mean;

/// A mistake in a recipe, shown where it was made.
#[derive(Debug, Error, Diagnostic)]
pub enum RecipeError {
    /// The file could not be read.
    #[error("{path}: {problem}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        problem: String,
        /// What to do.
        #[help]
        help: Option<String>,
    },
    /// Something in it is wrong.
    #[error("{problem}")]
    Mistake {
        /// What.
        problem: String,
        /// What to do.
        #[help]
        help: Option<String>,
        /// The file or the `--set` argument.
        #[source_code]
        source_code: Arc<NamedSource<String>>,
        /// Where.
        #[label("here")]
        span: SourceSpan,
        /// More of them.
        #[related]
        related: Vec<RecipeError>,
    },
}

/// What a message of the deserializer means for the person who wrote the recipe: the problem and the remedy.
///
/// `place` is the table or key that it was found in.
pub(super) fn reword(message: &str, place: &str) -> (String, Option<String>) {
    let message = message.lines().next().unwrap_or_default();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if message.starts_with("unknown field") && !quoted.is_empty() {
        let (written, known) = (quoted[0], &quoted[1..]);
        if known.contains(&"model") {
            return (format!("unknown table [{written}]"), Some(suggestion(written, known, "tables")));
        }
        return (format!("unknown key `{written}` in {place}"), Some(suggestion(written, known, "keys")));
    }
    if message.starts_with("unknown variant") && !quoted.is_empty() {
        let (written, known) = (quoted[0], &quoted[1..]);
        return (format!("unknown value `{written}` in {place}"), Some(suggestion(written, known, "values")));
    }
    if message.starts_with("missing field")
        && let Some(missing) = quoted.first()
    {
        return match place {
            "the recipe" if *missing == "loss" => (
                "there is no loss".into(),
                Some("add a table such as [loss.dpo]; also: [loss.ipo], [loss.kto], [loss.orpo], [loss.sft]".into()),
            ),
            "the recipe" => (format!("there is no [{missing}] table"), Some(format!("add one: [{missing}]"))),
            place => {
                (format!("`{missing}` is missing in {place}"), Some(format!("add `{missing} = ...` to {place}")))
            }
        };
    }
    let mismatch = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: "));
    if let Some((found, expected)) = mismatch.and_then(|rest| rest.split_once(", expected ")) {
        let (expected, example) = match expected {
            "f64" | "f32" => ("a number", "0.1"),
            "u64" | "usize" | "u32" | "i64" => ("a whole number", "8"),
            "a boolean" => ("true or false", "true"),
            "a string" | "path string" => ("text in quotes", "\"...\""),
            other if other.starts_with("struct ") => ("a table", "{ ... }"),
            other => (other, ""),
        };
        let found = found.replace("map", "a table").replace("sequence", "a list");
        let found = found.replace("string ", "the text ").replace("floating point", "the fraction");
        let found = found.replace("integer ", "the number ").replace("boolean ", "");
        let key = place.trim_matches('`');
        let key = key.strip_prefix("--set ").and_then(|set| set.split('=').next()).unwrap_or(key);
        let help = if example.is_empty() { None } else { Some(format!("for example {key} = {example}")) };
        return (format!("{place} has to be {expected}, not {found}"), help);
    }
    // what range.rs says of a number
    if let Some((value, range)) = message.split_once(" is not ")
        && value.parse::<f64>().is_ok()
    {
        return (format!("{place} is out of range: {value}"), Some(format!("it has to be {range}")));
    }
    (message.to_owned(), None)
}

fn suggestion(written: &str, known: &[&str], what: &str) -> String {
    match did_you_mean(written, known.iter().copied()) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("known {what}: {}", known.join(", ")),
    }
}

/// Where a position of the joined text belongs: the recipe's file, or one of the `--set` arguments after it.
#[derive(Debug, Clone)]
pub(super) struct Sources {
    /// Name, text, and where the text begins among all.
    parts: Vec<(String, String, usize)>,
}

impl Sources {
    pub(super) fn new(name: &str, text: &str) -> Self {
        Self { parts: vec![(name.to_owned(), text.to_owned(), 0)] }
    }

    /// Adds a text and says where it begins.
    pub(super) fn push(&mut self, name: &str, text: &str) -> usize {
        let start = self.parts.last().map_or(0, |(_, text, start)| start + text.len() + 1);
        self.parts.push((name.to_owned(), text.to_owned(), start));
        start
    }

    /// Whether a position lies in the file, not in an argument.
    pub(super) fn in_file(&self, position: usize) -> bool {
        position <= self.parts[0].1.len()
    }

    fn part(&self, position: usize) -> &(String, String, usize) {
        self.parts.iter().rev().find(|(_, _, start)| *start <= position).unwrap_or(&self.parts[0])
    }

    /// The table that a position of the file is in, or the argument, in words.
    pub(super) fn place(&self, span: &Range<usize>) -> String {
        let (name, text, start) = self.part(span.start);
        if !self.in_file(span.start) {
            return format!("`{name} {text}`");
        }
        let before = text.get(..span.end.saturating_sub(*start)).unwrap_or(text);
        let header = before.lines().rev().map(str::trim).find(|line| line.starts_with('['));
        match header.and_then(|line| line.split(']').next()) {
            Some(header) => format!("{}]", header.replace("[[", "[")),
            None => "the recipe".to_owned(),
        }
    }

    pub(super) fn error(&self, span: Range<usize>, problem: String, help: Option<String>) -> RecipeError {
        let (name, text, start) = self.part(span.start);
        let within = |position: usize| position.saturating_sub(*start).min(text.len());
        let (from, to) = (within(span.start), within(span.end));
        RecipeError::Mistake {
            problem,
            help,
            source_code: Arc::new(NamedSource::new(name, text.clone())),
            span: (from, to.saturating_sub(from)).into(),
            related: Vec::new(),
        }
    }
}
