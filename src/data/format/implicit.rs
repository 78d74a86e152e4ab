//! `chosen` and `rejected` alone: they begin with the same prompt.
//!
//! In conversations the prompt is what comes before the last turns of the assistant, and has to be the same on both
//! sides. In texts it is the longest common beginning, by characters, less a space at its end, which tokenizers put at
//! the beginning of a word. TRL's `extract_prompt` leaves the last shared character in both completions where one text
//! is the beginning of the other, and tests the end of `chosen` for the space where the first characters differ; here
//! such rows are dropped: where they branch cannot be known.

use super::messages::{self, Message};
use super::{Bad, Columns, Form, Record, Sides, text};
use crate::data::DropReason;

pub(super) fn record(mut row: Columns, form: Form) -> Result<Record, Bad> {
    match form {
        Form::Messages => {
            let (chosen, rejected) = (messages::take(&mut row, "chosen")?, messages::take(&mut row, "rejected")?);
            split(&mut row, chosen, rejected)
        }
        Form::Strings => {
            let (chosen, rejected) = (text(&mut row, "chosen")?, text(&mut row, "rejected")?);
            let at = boundary(&chosen, &rejected)?;
            Ok(Record::Plain(Sides {
                prompt: chosen[..at].to_owned(),
                chosen: Some(chosen[at..].to_owned()),
                rejected: Some(rejected[at..].to_owned()),
            }))
        }
    }
}

/// Splits two conversations after the prompt that they share.
pub(super) fn split(row: &mut Columns, mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Result<Record, Bad> {
    let prompt_of =
        |side: &[Message]| side.iter().rposition(|message| !message.is_models()).map_or(0, |last| last + 1);
    let (at, other) = (prompt_of(&chosen), prompt_of(&rejected));
    let completions = (chosen.split_off(at), rejected.split_off(other));
    if completions.0.is_empty() || completions.1.is_empty() {
        return Err(Bad::new(DropReason::EmptyCompletion, "a conversation does not end in a turn of the assistant"));
    }
    if chosen != rejected {
        let detail = "chosen and rejected differ before the last turn of the assistant";
        return Err(Bad::new(DropReason::NoCommonPrompt, detail));
    }
    messages::pair(messages::with_system(row, chosen)?, completions.0, completions.1)
}

/// Where two texts branch, in bytes.
fn boundary(chosen: &str, rejected: &str) -> Result<usize, Bad> {
    if chosen == rejected {
        return Err(Bad::new(DropReason::Identical, "chosen and rejected are the same text"));
    }
    let common = chosen.chars().zip(rejected.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
    let no_prompt = |detail: &str| Err(Bad::new(DropReason::NoCommonPrompt, detail));
    if common == chosen.len() || common == rejected.len() {
        return no_prompt("one text is the beginning of the other: where the prompt ends cannot be known");
    }
    match chosen[..common].strip_suffix(' ').map_or(common, str::len) {
        0 => no_prompt("chosen and rejected have no beginning in common"),
        at => Ok(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_branch_where_they_differ() {
        let split = |chosen: &'static str, rejected| boundary(chosen, rejected).map(|at| chosen.split_at(at));
        assert_eq!(split("The sky is blue.", "The sky is green."), Ok(("The sky is", " blue.")));
        assert_eq!(split("Say: yes", "Say: no"), Ok(("Say:", " yes")));
        assert_eq!(split("Sky:\nblue", "Sky:\ngreen"), Ok(("Sky:\n", "blue")));
        // ö and ø share their first byte
        assert_eq!(split("schön", "schøn"), Ok(("sch", "ön")));
        let reason = |chosen, rejected| boundary(chosen, rejected).expect_err("no boundary").reason;
        assert_eq!(reason("same", "same"), DropReason::Identical);
        assert_eq!(reason("Q: A", "Q: A B"), DropReason::NoCommonPrompt);
        assert_eq!(reason("yes ", "no"), DropReason::NoCommonPrompt);
        assert_eq!(reason(" a", " b"), DropReason::NoCommonPrompt);
        assert_eq!(reason("", "no"), DropReason::NoCommonPrompt);
    }
}
