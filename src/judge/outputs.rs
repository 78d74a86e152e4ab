//! Files of answers, in the form of AlpacaEval, so that others can judge the same ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use crate::model::generate::End;
use crate::tensor_file::describe_io;

/// An answer and what it answers: a row of AlpacaEval's outputs, with some more columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// What was asked.
    pub instruction: String,
    /// The answer.
    pub output: String,
    /// Who gave it.
    pub generator: String,
    /// What its result is counted under, by AlpacaEval's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// The same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    /// Prompts of one group are not independent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The prompt's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// A good answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// `(role, content)` where what was asked is a conversation of more than the user's text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<(String, String)>,
    /// Tokens of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// Why the answer ended; not known of a file that others wrote.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
}

/// What is wrong with a file of answers.
#[derive(Debug, Error, Diagnostic)]
#[error("{}{}: {problem}", file.display(), line.map(|line| format!(" line {line}")).unwrap_or_default())]
pub struct OutputsError {
    file: PathBuf,
    line: Option<usize>,
    problem: String,
    #[help]
    help: Option<String>,
}

const UNDERSTOOD: &str = "what is understood: AlpacaEval's outputs, a JSON list or lines of {\"instruction\", \"output\", \
                          \"generator\"}; Arena-Hard's answers, lines of {\"uid\", \"model\", \"messages\"}; answers of \
                          `generate --json`, lines of {\"prompt\", \"policy\"}";

/// Reads answers.
///
/// # Errors
/// The file is not there, or a row is no answer.
pub fn read(file: &Path) -> Result<Vec<Output>, OutputsError> {
    let error = |line: Option<usize>, problem: String, help: Option<&str>| OutputsError {
        file: file.to_owned(),
        line,
        problem,
        help: help.map(ToOwned::to_owned),
    };
    let text = std::fs::read_to_string(file).map_err(|e| error(None, describe_io(&e), None))?;
    let rows: Vec<(Option<usize>, Value)> = if text.trim_start().starts_with('[') {
        let list: Vec<Value> =
            serde_json::from_str(&text).map_err(|e| error(None, format!("is no valid JSON: {e}"), None))?;
        list.into_iter().map(|row| (None, row)).collect()
    } else {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let read = |(number, line): (usize, &str)| match serde_json::from_str(line) {
            Ok(row) => Ok((Some(number + 1), row)),
            Err(e) => Err(error(Some(number + 1), format!("is no valid JSON: {e}"), Some(UNDERSTOOD))),
        };
        lines.map(read).collect::<Result<_, _>>()?
    };
    let understood = |(number, (line, row)): (usize, (Option<usize>, Value))| {
        let place = |problem: &str| match line {
            Some(_) => problem.to_owned(),
            None => format!("row {}: {problem}", number + 1),
        };
        output(&row).map_err(|problem| error(line, place(&problem), Some(UNDERSTOOD)))
    };
    let outputs = rows.into_iter().enumerate().map(understood).collect::<Result<Vec<_>, _>>()?;
    if outputs.is_empty() { Err(error(None, "has no answers".into(), Some(UNDERSTOOD))) } else { Ok(outputs) }
}

fn output(row: &Value) -> Result<Output, String> {
    if row.get("instruction").is_some() {
        return serde_json::from_value(row.clone()).map_err(|e| e.to_string());
    }
    let text = |keys: &[&str]| keys.iter().find_map(|key| row.get(key)?.as_str().map(ToOwned::to_owned));
    let new = |instruction: String, output: String, generator: String| Output {
        instruction,
        output,
        generator,
        dataset: None,
        category: text(&["category"]),
        group: None,
        id: text(&["uid", "question_id", "id"]),
        reference: None,
        turns: Vec::new(),
        tokens: None,
        end: None,
    };
    if let Some(messages) = row.get("messages").and_then(Value::as_array) {
        let turns = messages.iter().map(|message| {
            let content = message.get("content")?;
            // newer files have {"answer": "..."} there
            let content = content.as_str().or_else(|| content.get("answer")?.as_str())?;
            Some((message.get("role")?.as_str()?.to_owned(), content.to_owned()))
        });
        let mut turns = turns.collect::<Option<Vec<_>>>().ok_or("a message has no `role` or no `content`")?;
        let Some((role, answer)) = turns.pop() else { return Err("has no messages".into()) };
        if role != "assistant" {
            return Err("the last message is not the assistant's".into());
        }
        let instruction = match &turns[..] {
            [(_, only)] => only.clone(),
            turns => turns.iter().map(|(role, content)| format!("{role}: {content}\n\n")).collect(),
        };
        let model = text(&["model", "model_id"]).unwrap_or_else(|| "unnamed".into());
        return Ok(Output { turns, ..new(instruction.trim_end().to_owned(), answer, model) });
    }
    for side in ["policy", "base"] {
        if let (Some(prompt), Some(answer)) = (text(&["prompt"]), row.get(side)) {
            let answer: Answered = serde_json::from_value(answer.clone()).map_err(|e| e.to_string())?;
            let output = new(prompt, answer.text, side.to_owned());
            return Ok(Output { tokens: Some(answer.tokens), end: Some(answer.end), ..output });
        }
    }
    Err("is no answer".into())
}

#[derive(Deserialize)]
struct Answered {
    text: String,
    tokens: usize,
    end: End,
}

/// Answers by what they answer: by the text, else by id where both sides have one.
#[derive(Debug)]
pub struct Answers {
    by_id: BTreeMap<String, usize>,
    by_text: BTreeMap<String, usize>,
}

impl Answers {
    /// Of a file.
    #[must_use]
    pub fn new(outputs: &[Output]) -> Self {
        let with_id = outputs.iter().enumerate().filter_map(|(i, output)| Some((output.id.clone()?, i)));
        let texts = outputs.iter().enumerate().map(|(i, output)| (normal(&output.instruction), i));
        Self { by_id: with_id.collect(), by_text: texts.collect() }
    }

    /// The number of the answer to a prompt.
    #[must_use]
    pub fn find(&self, id: Option<&str>, text: &str) -> Option<usize> {
        self.by_text.get(&normal(text)).or_else(|| self.by_id.get(id?)).copied()
    }
}

/// White space differs between files of the same prompts.
fn normal(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<Output>, String> {
        let place = tempfile::tempdir().expect("a folder");
        let file = place.path().join("outputs.json");
        std::fs::write(&file, text).expect("written");
        read(&file).map_err(|error| error.to_string())
    }

    #[test]
    fn forms_of_other_programs() {
        let alpaca = r#"[{"dataset": "helpful_base", "instruction": "Who?", "output": "Me.", "generator": "m", "datasplit": "eval"}]"#;
        let [output] = &read_text(alpaca).expect("read")[..] else { panic!("one") };
        assert_eq!((&*output.instruction, &*output.output, &*output.generator), ("Who?", "Me.", "m"));
        assert_eq!(output.dataset.as_deref(), Some("helpful_base"));

        let arena = r#"{"uid": "a1", "ans_id": "x", "model": "g", "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": {"answer": "Me."}}], "tstamp": 1.0, "metadata": {}}"#;
        let [output] = &read_text(arena).expect("read")[..] else { panic!("one") };
        assert_eq!((&*output.instruction, &*output.output, output.id.as_deref()), ("Who?", "Me.", Some("a1")));

        let generated = r#"{"prompt": "Who?", "policy": {"text": "Me.", "tokens": 2, "end": "stop"}}"#;
        let [output] = &read_text(generated).expect("read")[..] else { panic!("one") };
        assert_eq!((&*output.output, output.tokens, output.end), ("Me.", Some(2), Some(End::Stop)));
    }

    #[test]
    fn what_is_no_answer_is_refused_with_its_place() {
        for (text, problem) in [
            ("", "has no answers"),
            ("[]", "has no answers"),
            ("[{\"instruction\": \"a\"}]", "row 1: missing field"),
            ("{\"instruction\": \"a\", \"output\": \"b\", \"generator\": \"c\"}\n{\"x\": 1}", "line 2: is no answer"),
            ("{", "line 1: is no valid JSON"),
            ("{\"messages\": []}", "line 1: has no messages"),
            ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "not the assistant's"),
        ] {
            let error = read_text(text).expect_err(text);
            assert!(error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn answers_are_found_by_text_or_by_id() {
        let row = |id: &str, text: &str| {
            let rest = format!("\"instruction\": {text:?}, \"output\": \"\", \"generator\": \"\"");
            if id.is_empty() { format!("{{{rest}}}") } else { format!("{{\"id\": {id:?}, {rest}}}") }
        };
        let outputs = read_text(&[row("a", "One?"), row("", "Two  words?\n")].join("\n")).expect("read");
        let answers = Answers::new(&outputs);
        assert_eq!(answers.find(Some("a"), "something else"), Some(0));
        assert_eq!(answers.find(Some("b"), "Two words?"), Some(1));
        assert_eq!(answers.find(None, "Three?"), None);
    }
}
