//! From text to a recipe: the file, the `--set` arguments on top of it, and one deserializer for both.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{Sources, reword};
use super::{Recipe, RecipeError, anchored};
use crate::hub;
use crate::suggest::did_you_mean;
use crate::tensor_file::describe_io;

/// Keys of which a `--set` of one takes the place of the other.
const EITHER: [(&str, &str); 2] = [("epochs", "steps"), ("steps", "epochs")];

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It is not in the recipe.
    Default,
    /// The recipe's file.
    Recipe,
    /// A `--set` argument.
    Set,
}

/// A recipe with where its values came from.
#[derive(Debug, Clone)]
pub struct Parsed {
    /// The recipe, local paths made absolute.
    pub recipe: Recipe,
    /// The file as it was written.
    pub text: String,
    spans: Spans,
    sources: Sources,
}

/// Where each given key's value stands, by the key with its tables: `train.steps`.
type Spans = BTreeMap<String, Range<usize>>;

impl Parsed {
    /// Where the value of a key such as `train.steps` came from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        match self.spans.get(key) {
            None => Origin::Default,
            Some(span) if self.sources.in_file(span.start) => Origin::Recipe,
            Some(_) => Origin::Set,
        }
    }

    /// An error about a key, shown where it is given, or where its table is.
    #[must_use]
    pub fn error(&self, key: &str, problem: String, help: Option<String>) -> RecipeError {
        let table = key.rsplit_once('.').map_or("", |(table, _)| table);
        let span = self.spans.get(key).or_else(|| self.spans.get(table)).cloned();
        self.sources.error(span.unwrap_or(0..0), problem, help)
    }
}

/// Reads a recipe file, with `--set` arguments on top of it.
///
/// # Errors
/// See [`RecipeError`].
pub fn load(path: &Path, overrides: &[String], working_directory: &Path) -> Result<Parsed, RecipeError> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        let near = nearby_recipe(path);
        let (problem, help) = match e.kind() {
            std::io::ErrorKind::InvalidData => {
                ("is not UTF-8 text".to_owned(), Some("a recipe is a TOML file".to_owned()))
            }
            std::io::ErrorKind::NotFound => {
                (describe_io(&e), near.map(|near| format!("did you mean {}?", near.display())))
            }
            _ => (describe_io(&e), None),
        };
        RecipeError::Unreadable { path: path.display().to_string(), problem, help }
    })?;
    let folder = anchored(path, working_directory).parent().map_or_else(PathBuf::new, Path::to_owned);
    parse(&path.display().to_string(), &text, &folder, overrides, working_directory)
}

fn nearby_recipe(path: &Path) -> Option<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    let near = did_you_mean(path.file_name()?.to_str()?, names.iter().map(String::as_str))?;
    Some(path.with_file_name(near))
}

/// Parses a recipe. Its relative paths belong to `folder`, those of `overrides` to `working_directory`.
///
/// # Errors
/// See [`RecipeError`].
pub fn parse(
    name: &str,
    text: &str,
    folder: &Path,
    overrides: &[String],
    working_directory: &Path,
) -> Result<Parsed, RecipeError> {
    let mut sources = Sources::new(name, text);
    // each text is parsed behind as much white space as there is text before it, so that all positions are in one count
    let mut padded = vec![text.to_owned()];
    for argument in overrides {
        let argument = as_toml(argument, &mut sources)?;
        let start = sources.push("--set", &argument);
        padded.push(format!("{}{argument}", " ".repeat(start)));
    }
    let mut tables = Vec::new();
    for text in &padded {
        tables.push(DeTable::parse(text).map_err(|error| {
            let help = "here the file stops to be TOML: `key = value`, text in quotes, each key once in its [table]";
            sources.error(error.span().unwrap_or(0..0), error.message().to_owned(), Some(help.to_owned()))
        })?);
    }
    let mut tables = tables.into_iter();
    let root = tables.next().unwrap_or_else(|| Spanned::new(0..0, DeTable::new()));
    let whole = root.span();
    let mut given = root.into_inner();
    for table in tables {
        merge(&mut given, table.into_inner(), 0);
    }
    let mut spans = Spans::new();
    collect(&given, "", &mut spans);
    one_loss(&given, &sources)?;

    let mut recipe = Recipe::deserialize(toml::Deserializer::from(Spanned::new(whole, given))).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        // a key that is missing is reported at its table, a table that is missing at the whole file
        let missing = error.message().starts_with("missing field");
        let place = match spans.iter().find(|(_, known)| **known == span) {
            Some((key, _)) if missing => format!("[{key}]"),
            _ if missing => "the recipe".to_owned(),
            Some((key, _)) if sources.in_file(span.start) => format!("`{}`", key.rsplit('.').next().unwrap_or(key)),
            _ => sources.place(&span),
        };
        let (problem, help) = reword(error.message(), &place);
        let span = if missing && place == "the recipe" { 0..0 } else { span };
        sources.error(span, problem, help)
    })?;

    let origins = Parsed { recipe: recipe.clone(), text: text.to_owned(), spans, sources };
    for (key, path) in recipe.paths() {
        let base = if origins.origin(key) == Origin::Set { working_directory } else { folder };
        let local = anchored(path, base);
        // a path that is there comes first; what is not, and has the form of a hub id, is left as one
        let is_id = key == "model.source" && path.to_str().is_some_and(hub::is_id);
        if !is_id || local.exists() {
            *path = local;
        }
    }
    let parsed = Parsed { recipe, ..origins };
    let mut contradictions =
        parsed.recipe.contradictions().into_iter().map(|(key, problem, help)| parsed.error(key, problem, Some(help)));
    match contradictions.next() {
        None => {}
        Some(RecipeError::Mistake { problem, help, source_code, span, .. }) => {
            let related = contradictions.collect();
            return Err(RecipeError::Mistake { problem, help, source_code, span, related });
        }
        Some(other) => return Err(other),
    }
    Ok(parsed)
}

/// A `--set` argument as TOML; what is no TOML value is taken as text, so that a path needs no second pair of quotes.
fn as_toml(argument: &str, sources: &mut Sources) -> Result<String, RecipeError> {
    let mut wrong = |problem: &str| {
        let start = sources.push("--set", argument);
        let help = "write --set section.key=value, e.g. --set train.learning_rate=2e-5";
        sources.error(start..start + argument.len(), problem.to_owned(), Some(help.to_owned()))
    };
    let Some((key, value)) = argument.split_once('=') else { return Err(wrong("there is no `=`")) };
    if !key.contains('.') {
        return Err(wrong(&format!("`{key}` does not name a section and a key")));
    }
    if DeTable::parse(argument).is_ok() {
        return Ok(argument.to_owned());
    }
    Ok(format!("{key}={}", toml::Value::String(value.trim().to_owned())))
}

/// Puts `over` on top of `table`.
fn merge<'t>(table: &mut DeTable<'t>, over: DeTable<'t>, depth: usize) {
    for (key, value) in over {
        let name = key.get_ref().clone();
        if depth == 0
            && name == "loss"
            && let Some(DeValue::Table(old)) = table.get_mut(&*name).map(Spanned::get_mut)
            && let DeValue::Table(new) = value.get_ref()
        {
            // a loss of another name takes the place of the recipe's
            let replaced: Vec<_> = old.keys().map(Spanned::get_ref).cloned().collect();
            for loss in replaced.iter().filter(|loss| !new.contains_key(&***loss)) {
                old.remove(&**loss);
            }
        }
        for (_, other) in EITHER.into_iter().filter(|(one, _)| depth == 1 && name == *one) {
            table.remove(other);
        }
        match (table.get_mut(&*name).map(Spanned::get_mut), value) {
            (Some(DeValue::Table(old)), value) if value.get_ref().is_table() => {
                if let DeValue::Table(new) = value.into_inner() {
                    merge(old, new, depth + 1);
                }
            }
            (_, value) => {
                table.remove(&*name);
                table.insert(key, value);
            }
        }
    }
}

fn collect(table: &DeTable<'_>, prefix: &str, spans: &mut Spans) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
        if let DeValue::Table(inner) = value.get_ref() {
            collect(inner, &path, spans);
        }
        spans.insert(path, value.span());
    }
}

/// A recipe has one loss; without this the parser speaks of "exactly 1 element".
fn one_loss(given: &DeTable<'_>, sources: &Sources) -> Result<(), RecipeError> {
    let Some((key, value)) = given.iter().find(|(key, _)| key.get_ref() == "loss") else { return Ok(()) };
    let help = "a recipe has one loss, e.g. [loss.dpo]; also: loss.ipo, loss.kto, loss.orpo, loss.sft";
    match value.get_ref() {
        DeValue::Table(losses) if losses.len() == 1 => Ok(()),
        DeValue::Table(losses) => {
            let span = losses.keys().map(Spanned::span).max_by_key(|span| span.start).unwrap_or(key.span());
            let problem = if losses.is_empty() { "there is no loss in [loss]" } else { "there are several losses" };
            Err(sources.error(span, problem.to_owned(), Some(help.to_owned())))
        }
        _ => Err(sources.error(value.span(), "`loss` is no table".to_owned(), Some(help.to_owned()))),
    }
}
