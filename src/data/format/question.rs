//! `prompt` as text beside `chosen` and `rejected` as message lists: UltraFeedback-binarized, whose lists are whole
//! conversations that begin with the prompt, or lists that hold the answer alone.

use super::messages::{self, Message};
use super::{Bad, Columns, Record, implicit, text};
use crate::data::DropReason;

pub(super) fn record(mut row: Columns) -> Result<Record, Bad> {
    let question = text(&mut row, "prompt")?;
    let chosen = messages::take(&mut row, "chosen")?;
    let rejected = messages::take(&mut row, "rejected")?;
    let begins_with_answer = |side: &[Message]| side.first().is_none_or(Message::is_models);
    if begins_with_answer(&chosen) && begins_with_answer(&rejected) {
        let prompt = messages::with_system(&mut row, vec![Message::new("user", question)])?;
        return messages::pair(prompt, chosen, rejected);
    }
    for (side, column) in [(&chosen, "chosen"), (&rejected, "rejected")] {
        // a conversation that is not about the prompt is a row whose columns were mixed up
        let first = side.iter().find(|message| message.role == "user");
        if first.is_none_or(|first| first.content.trim() != question.trim()) {
            let detail = format!("`{column}` does not begin with the prompt as the user's first message");
            return Err(Bad::new(DropReason::NoCommonPrompt, detail));
        }
    }
    implicit::split(&mut row, chosen, rejected)
}
