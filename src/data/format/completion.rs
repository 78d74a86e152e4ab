//! `prompt`, `completion` and, for KTO, `label`: true or 1 for desirable, false or 0 for not. Without a label, a
//! demonstration.

use serde_json::Value;

use super::{Bad, Columns, Form, Record, Sides, messages, text};
use crate::data::source::kind;

pub(super) fn record(mut row: Columns, form: Form, labelled: bool) -> Result<Record, Bad> {
    let desirable = !labelled || label(&row)?;
    Ok(match form {
        Form::Strings => {
            let (prompt, completion) = (text(&mut row, "prompt")?, text(&mut row, "completion")?);
            Record::Plain(Sides::one(prompt, completion, desirable))
        }
        Form::Messages => {
            let prompt = if row.contains_key("prompt") { "prompt" } else { "conversations" };
            let prompt = messages::take(&mut row, prompt)?;
            let prompt = messages::with_system(&mut row, prompt)?;
            let completion = messages::take(&mut row, "completion")?;
            messages::check_prompt(&prompt)?;
            messages::check_completion(&completion, "completion")?;
            Record::Chat(Sides::one(prompt, completion, desirable))
        }
    })
}

impl<T> Sides<T> {
    /// A prompt with one completion.
    pub(super) fn one(prompt: T, completion: T, desirable: bool) -> Self {
        let (chosen, rejected) = if desirable { (Some(completion), None) } else { (None, Some(completion)) };
        Self { prompt, chosen, rejected }
    }
}

fn label(row: &Columns) -> Result<bool, Bad> {
    match row.get("label") {
        Some(Value::Bool(label)) => Ok(*label),
        Some(Value::Number(number)) if number.as_f64() == Some(1.0) => Ok(true),
        Some(Value::Number(number)) if number.as_f64() == Some(0.0) => Ok(false),
        Some(Value::Number(number)) => Err(Bad::malformed(format!("`label` is {number}, not true, false, 1 or 0"))),
        Some(other) => Err(Bad::malformed(format!("`label` is {}, not true or false", kind(other)))),
        None => Err(Bad::malformed("`label` is missing")),
    }
}
