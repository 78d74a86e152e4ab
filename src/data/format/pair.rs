//! `prompt`, `chosen`, `rejected`, all of them texts or all of them message lists; ShareGPT calls the prompt
//! `conversations`.

use super::{Bad, Columns, Form, Record, Sides, messages, text};

pub(super) fn record(mut row: Columns, form: Form) -> Result<Record, Bad> {
    match form {
        Form::Strings => Ok(Record::Plain(Sides {
            prompt: text(&mut row, "prompt")?,
            chosen: Some(text(&mut row, "chosen")?),
            rejected: Some(text(&mut row, "rejected")?),
        })),
        Form::Messages => {
            let prompt = if row.contains_key("prompt") { "prompt" } else { "conversations" };
            let prompt = messages::take(&mut row, prompt)?;
            let prompt = messages::with_system(&mut row, prompt)?;
            messages::pair(prompt, messages::take(&mut row, "chosen")?, messages::take(&mut row, "rejected")?)
        }
    }
}
