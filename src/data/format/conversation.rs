//! `messages`, or ShareGPT's `conversations`: the last turn of the assistant is imitated.

use super::messages::{self, Message};
use super::{Bad, Columns, Record, Sides};
use crate::data::DropReason;

pub(super) fn record(mut row: Columns) -> Result<Record, Bad> {
    let column = if row.contains_key("messages") { "messages" } else { "conversations" };
    let mut prompt = messages::take(&mut row, column)?;
    let at = prompt.iter().rposition(|message| !message.is_models()).map_or(0, |last| last + 1);
    let completion: Vec<Message> = prompt.split_off(at);
    if completion.is_empty() {
        let detail = format!("`{column}` does not end in a turn of the assistant");
        return Err(Bad::new(DropReason::EmptyCompletion, detail));
    }
    let prompt = messages::with_system(&mut row, prompt)?;
    messages::check_prompt(&prompt)?;
    messages::check_completion(&completion, column)?;
    Ok(Record::Chat(Sides::one(prompt, completion, true)))
}
