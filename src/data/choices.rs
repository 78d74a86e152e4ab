//! Multiple-choice questions, in the shapes that evaluations are published in.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::codec::Codec;
use super::format::{Bad, Columns, Message};
use super::source::{self, Row, Rows, kind};
use super::{DataError, DropReason, Sources};
use crate::progress::Console;
use crate::suggest::list;

/// A question, ready to be scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Ids up to where the choices part.
    pub prompt: Vec<u32>,
    /// Ids of each choice after it.
    pub choices: Vec<Vec<u32>>,
    /// Characters of each choice: what lm-eval divides by for `acc_norm`.
    pub characters: Vec<usize>,
    /// Which choice is right.
    pub gold: usize,
}

/// How a question is put.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ChoiceForm {
    /// As lm-evaluation-harness puts it to a base model: `Question: …\nAnswer:` and ` ` before each choice; a query or the
    /// beginning of a text (HellaSwag) as it stands.
    #[default]
    Plain,
    /// As the user's message, each choice being the assistant's whole answer, by the chat template.
    Chat,
}

/// Columns that are read: those of a question, of its choices, and of the answer, the first of each that is there.
const QUESTIONS: [&str; 3] = ["question", "query", "ctx"];
const CHOICES: [&str; 3] = ["choices", "options", "endings"];
const ANSWERS: [&str; 5] = ["answer", "answerKey", "answer_key", "gold", "label"];
const UNDERSTOOD: &str = "a row has the question in `question`, `query` or `ctx`, the choices as a list of texts (or {text, \
                          label} lists, as ARC has them) in `choices`, `options` or `endings`, and the right one in `answer`, \
                          `answerKey`, `gold` or `label`: its number from 0, its letter, or its text";

/// Reads the questions of a file.
///
/// # Errors
/// The file is missing or broken, has no rows, or a row is no question with a right answer: a share of questions left out
/// would be another evaluation under the same name.
pub fn load_choices(
    file: &Path,
    codec: &Codec,
    form: ChoiceForm,
    console: &Console,
) -> Result<Vec<Question>, DataError> {
    struct Reading<'a> {
        questions: Vec<Question>,
        codec: &'a Codec,
        form: ChoiceForm,
        file: PathBuf,
        columns: Vec<String>,
    }
    impl Rows for Reading<'_> {
        fn columns(&mut self, columns: Vec<String>) -> Result<(), DataError> {
            self.columns = columns;
            Ok(())
        }

        fn row(&mut self, Row { place, values, .. }: Row) -> Result<(), DataError> {
            let raw = RawQuestion::of(&values).map_err(|mut problem| {
                if values.is_empty() || problem.starts_with("has no") {
                    problem = format!("{problem}; its columns are {}", list(&self.columns));
                }
                DataError::row(&self.file, place, problem).help(UNDERSTOOD)
            })?;
            let question = raw.encode(self.codec, self.form);
            self.questions.push(question.map_err(|bad| DataError::row(&self.file, place, bad.detail))?);
            Ok(())
        }
    }
    let files = source::resolve(&Sources::one(file), console)?;
    let bar = console.bytes_bar("reading questions", files.iter().map(|file| file.bytes).sum());
    let mut reading = Reading { questions: Vec::new(), codec, form, file: file.to_owned(), columns: Vec::new() };
    let known = |name: &str| QUESTIONS.iter().chain(&CHOICES).chain(&ANSWERS).find(|own| **own == name).copied();
    for file in &files {
        reading.file.clone_from(&file.name);
        file.read(&known, &bar, &mut reading)?;
    }
    if reading.questions.is_empty() {
        return Err(DataError::file(file, "has no rows"));
    }
    Ok(reading.questions)
}

/// A row with its meaning.
#[derive(Debug, PartialEq)]
struct RawQuestion {
    text: String,
    /// Whether it is asked as a question, and not continued as it stands.
    asks: bool,
    choices: Vec<String>,
    gold: usize,
}

impl RawQuestion {
    fn of(row: &Columns) -> Result<Self, String> {
        let first = |names: &[&'static str]| {
            names.iter().find_map(|name| row.get(*name).filter(|value| !value.is_null()).map(|value| (*name, value)))
        };
        let (name, text) = first(&QUESTIONS).ok_or("has no question")?;
        let text = text.as_str().ok_or_else(|| format!("`{name}` is {}, not a text", kind(text)))?;
        if text.trim().is_empty() {
            return Err(format!("`{name}` is empty"));
        }
        let (column, value) = first(&CHOICES).ok_or("has no choices")?;
        let (choices, labels) = choices_of(value).map_err(|problem| format!("`{column}` {problem}"))?;
        if choices.len() < 2 {
            return Err(format!("`{column}` has {} of them, and two are the least", choices.len()));
        }
        if let Some(empty) = choices.iter().position(|choice| choice.trim().is_empty()) {
            return Err(format!("`{column}`: number {} is empty", empty + 1));
        }
        let (answer, value) = first(&ANSWERS).ok_or("has no answer")?;
        let gold = gold(value, &choices, &labels).map_err(|problem| format!("`{answer}` {problem}"))?;
        Ok(Self { text: text.to_owned(), asks: name == "question", choices, gold })
    }

    fn encode(&self, codec: &Codec, form: ChoiceForm) -> Result<Question, Bad> {
        let (prompt, wholes) = match form {
            ChoiceForm::Plain => self.plain(codec)?,
            ChoiceForm::Chat => self.chat(codec)?,
        };
        let choices: Vec<Vec<u32>> =
            wholes.iter().map(|whole| whole[prompt.len().min(whole.len())..].to_vec()).collect();
        if prompt.is_empty() || choices.iter().any(Vec::is_empty) {
            return Err(Bad::new(
                DropReason::EmptyCompletion,
                "a choice has no tokens of its own after the question",
            ));
        }
        let characters = self.choices.iter().map(|choice| choice.chars().count()).collect();
        Ok(Question { prompt, choices, characters, gold: self.gold })
    }

    /// lm-eval's `_encode_pair`: white space at the end of the question goes to the choices, the whole is tokenised, and
    /// what is longer than the question alone is the choice.
    fn plain(&self, codec: &Codec) -> Result<(Vec<u32>, Vec<Vec<u32>>), Bad> {
        let text = if self.asks { format!("Question: {}\nAnswer:", self.text.trim()) } else { self.text.clone() };
        let context = text.trim_end();
        let space = if context.len() < text.len() { &text[context.len()..] } else { " " };
        let prompt = codec.encode(context)?;
        let wholes = self.choices.iter().map(|choice| {
            let space = if choice.starts_with(char::is_whitespace) { "" } else { space };
            codec.encode(&format!("{context}{space}{choice}"))
        });
        Ok((prompt, wholes.collect::<Result<_, _>>()?))
    }

    /// Up to where the ids of all whole conversations are those of the question's.
    fn chat(&self, codec: &Codec) -> Result<(Vec<u32>, Vec<Vec<u32>>), Bad> {
        let user = Message::new("user", self.text.as_str());
        let mut prompt = codec.encode_chat(&[&user], true)?;
        let wholes = self.choices.iter().map(|choice| {
            let assistant = Message::new("assistant", choice.as_str());
            codec.encode_chat(&[&user, &assistant], false)
        });
        let wholes = wholes.collect::<Result<Vec<_>, _>>()?;
        let common = |whole: &Vec<u32>| prompt.iter().zip(whole).take_while(|(a, b)| a == b).count();
        prompt.truncate(wholes.iter().map(common).min().unwrap_or(0));
        Ok((prompt, wholes))
    }
}

/// Choices and, where they have some, their labels.
fn choices_of(value: &Value) -> Result<(Vec<String>, Vec<String>), String> {
    let texts = |value: &Value| -> Option<Vec<String>> { value.as_array()?.iter().map(text).collect() };
    match value {
        Value::Object(lists) => {
            let choices = lists.get("text").and_then(texts).ok_or("has no list of texts in `text`")?;
            let labels = lists.get("label").and_then(texts).unwrap_or_default();
            if !labels.is_empty() && labels.len() != choices.len() {
                return Err(format!("has {} texts and {} labels", choices.len(), labels.len()));
            }
            Ok((choices, labels))
        }
        Value::Array(list) if list.iter().all(Value::is_object) && !list.is_empty() => {
            let of = |key: &str| list.iter().map(|one| text(one.get(key)?)).collect::<Option<Vec<_>>>();
            Ok((of("text").ok_or("has objects without `text`")?, of("label").unwrap_or_default()))
        }
        value => Ok((texts(value).ok_or_else(|| format!("is {}, not a list of texts", kind(value)))?, Vec::new())),
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The right choice: by label where there are labels, by text, by letter, by number from 0.
fn gold(value: &Value, choices: &[String], labels: &[String]) -> Result<usize, String> {
    let count = choices.len();
    let within = |index: u64| {
        usize::try_from(index)
            .ok()
            .filter(|index| *index < count)
            .ok_or_else(|| format!("is {index}, and {count} choices have the numbers 0 to {}", count - 1))
    };
    let written = text(value).ok_or_else(|| format!("is {}, not a number, a letter or a text", kind(value)))?;
    let written = written.trim();
    if written.is_empty() {
        return Err("is empty".into());
    }
    if let Some(index) = labels.iter().position(|label| label.trim() == written) {
        return Ok(index);
    }
    if let Some(index) = value.as_u64() {
        return within(index);
    }
    if value.is_number() {
        return Err(format!("is {written}, and choices are numbered from 0"));
    }
    let mut same = (0..count).filter(|&i| choices[i].trim() == written);
    match (same.next(), same.next()) {
        (Some(index), None) => return Ok(index),
        (Some(_), Some(_)) => return Err(format!("{written:?} is the text of two choices")),
        (None, _) => {}
    }
    if let Ok(index) = written.parse() {
        return within(index);
    }
    let mut letters = written.chars();
    match (letters.next(), letters.next()) {
        (Some(letter), None) if letter.is_ascii_alphabetic() => {
            let index = usize::from(letter.to_ascii_uppercase() as u8 - b'A');
            let last = char::from(b'A' + (count.min(26) - 1) as u8);
            if index < count { Ok(index) } else { Err(format!("is {written}, and the last choice is {last}")) }
        }
        _ => Err(format!("is {written:?}, which is no choice's number, letter or text")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(row: &str) -> Result<RawQuestion, String> {
        match serde_json::from_str(row).expect("JSON") {
            Value::Object(row) => RawQuestion::of(&row),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_published_shapes_are_understood() {
        for (row, gold) in [
            // MMLU
            (r#"{"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1}"#, 1),
            (r#"{"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": "B"}"#, 1),
            // the text wins over the number
            (r#"{"question": "2 + 2?", "choices": ["3", "4", "1", "0"], "answer": "0"}"#, 3),
            (r#"{"question": "2 + 2?", "options": ["three", "four"], "answer": "four"}"#, 1),
            // ARC, whose labels may be numbers from 1
            (r#"{"question": "?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}"#, 1),
            (
                r#"{"question": "?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}], "answerKey": "B"}"#,
                1,
            ),
            // lm-eval's own, and HellaSwag
            (r#"{"query": "Two and two are", "choices": ["four", "five"], "gold": 0}"#, 0),
            (r#"{"ctx": "He sits down and", "endings": ["eats.", "flies.", "x"], "label": "2"}"#, 2),
        ] {
            assert_eq!(read(row).map(|question| question.gold), Ok(gold), "{row}");
        }
        assert!(read(r#"{"question": "?", "choices": ["a", "b"], "answer": 0}"#).expect("read").asks);
        assert!(!read(r#"{"query": "?", "choices": ["a", "b"], "gold": 0}"#).expect("read").asks);
    }

    #[test]
    fn what_has_no_right_answer_is_refused() {
        for (row, problem) in [
            (r#"{"question": "?", "choices": ["a", "b"]}"#, "has no answer"),
            (r#"{"question": "?", "choices": ["a", "b"], "answer": null}"#, "has no answer"),
            (r#"{"ctx": "x", "endings": ["a", "b"], "label": ""}"#, "`label` is empty"),
            (r#"{"question": "?", "choices": ["a", "b"], "answer": 2}"#, "2 choices have the numbers 0 to 1"),
            (r#"{"question": "?", "choices": ["a", "b"], "answer": -1}"#, "numbered from 0"),
            (r#"{"question": "?", "choices": ["a", "b"], "answer": "C"}"#, "the last choice is B"),
            (
                r#"{"question": "?", "choices": ["a", "b"], "answer": "neither"}"#,
                "no choice's number, letter or text",
            ),
            (r#"{"question": "?", "choices": ["yes", "yes"], "answer": "yes"}"#, "the text of two choices"),
            (r#"{"question": "?", "choices": ["a"], "answer": 0}"#, "two are the least"),
            (r#"{"question": "?", "choices": ["a", " "], "answer": 0}"#, "number 2 is empty"),
            (r#"{"question": "?", "choices": "a or b", "answer": 0}"#, "not a list of texts"),
            (
                r#"{"question": "?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answer": 0}"#,
                "2 texts and 1 labels",
            ),
            (r#"{"question": " ", "choices": ["a", "b"], "answer": 0}"#, "`question` is empty"),
            (r#"{"text": "?", "answer": 0}"#, "has no question"),
        ] {
            let found = read(row).expect_err(row);
            assert!(found.contains(problem), "{row}: {found}");
        }
    }
}
