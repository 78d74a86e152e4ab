//! Anthropic's HH: `chosen` and `rejected` are transcripts whose turns begin with `\n\nHuman:` and `\n\nAssistant:`.
//!
//! They become messages, texts trimmed, where the model has a chat template. [`plain`] splits the text itself after the
//! last common `\n\nAssistant:` where it has none.

use super::messages::{ASSISTANT, Message};
use super::{Bad, Columns, Record, Sides, implicit, text};
use crate::data::DropReason;

const MARKERS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", ASSISTANT)];

/// Whether a text is a transcript.
pub(super) fn looks_like(text: &str) -> bool {
    MARKERS.iter().all(|(marker, _)| text.contains(marker)) && starts_with_turn(text)
}

fn starts_with_turn(text: &str) -> bool {
    MARKERS.iter().any(|(marker, _)| text.starts_with(marker) || text.starts_with(marker.trim_start()))
}

pub(super) fn record(mut row: Columns) -> Result<Record, Bad> {
    let (chosen, rejected) = (text(&mut row, "chosen")?, text(&mut row, "rejected")?);
    implicit::split(&mut row, turns(&chosen, "chosen")?, turns(&rejected, "rejected")?)
}

/// The same, as texts.
pub(super) fn plain(mut row: Columns) -> Result<Record, Bad> {
    let (chosen, rejected) = (text(&mut row, "chosen")?, text(&mut row, "rejected")?);
    // the checks are those of conversations
    implicit::split(&mut row, turns(&chosen, "chosen")?, turns(&rejected, "rejected")?)?;
    let (marker, _) = MARKERS[1];
    let end = |text: &str| text.rfind(marker).map_or(0, |at| at + marker.len());
    let (at, other) = (end(&chosen), end(&rejected));
    if chosen[..at] != rejected[..other] {
        let detail = "chosen and rejected differ before the last turn of the assistant";
        return Err(Bad::new(DropReason::NoCommonPrompt, detail));
    }
    Ok(Record::Plain(Sides {
        prompt: chosen[..at].to_owned(),
        chosen: Some(chosen[at..].to_owned()),
        rejected: Some(rejected[other..].to_owned()),
    }))
}

fn turns(text: &str, column: &str) -> Result<Vec<Message>, Bad> {
    if !starts_with_turn(text) {
        return Err(Bad::malformed(format!("`{column}` does not begin with `Human:` or `Assistant:`")));
    }
    let mut starts: Vec<(usize, usize, &str)> = MARKERS
        .iter()
        .flat_map(|(marker, role)| text.match_indices(marker).map(|(at, _)| (at, at + marker.len(), *role)))
        .collect();
    for (marker, role) in MARKERS {
        let first = marker.trim_start();
        if text.starts_with(first) {
            starts.push((0, first.len(), role));
        }
    }
    starts.sort_unstable();
    let ends = starts.iter().skip(1).map(|(start, ..)| *start).chain([text.len()]);
    Ok(starts.iter().zip(ends).map(|((_, start, role), end)| Message::new(role, text[*start..end].trim())).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::messages;
    use super::*;

    fn row(chosen: &str, rejected: &str) -> Columns {
        let serde_json::Value::Object(row) = json!({"chosen": chosen, "rejected": rejected}) else { panic!("a row") };
        row
    }

    const START: &str = "\n\nHuman: Hi\n\nAssistant: Hello. What is it?\n\nHuman: Rain?\n\nAssistant:";

    #[test]
    fn the_last_turn_is_the_completion() {
        let read = record(row(&format!("{START} No.\n\nReally."), &format!("{START} Yes."))).expect("a record");
        let prompt = [("user", "Hi"), (ASSISTANT, "Hello. What is it?"), ("user", "Rain?")];
        let expected = messages::pair(
            prompt.map(|(role, content)| Message::new(role, content)).into(),
            vec![Message::new(ASSISTANT, "No.\n\nReally.")],
            vec![Message::new(ASSISTANT, "Yes.")],
        );
        assert_eq!(Ok(read), expected);
        let read = plain(row(&format!("{START} No."), &format!("{START} Yes."))).expect("a record");
        let (chosen, rejected) = (Some(" No.".to_owned()), Some(" Yes.".to_owned()));
        assert_eq!(read, Record::Plain(Sides { prompt: START.to_owned(), chosen, rejected }));
    }

    #[test]
    fn transcripts_that_branch_early_or_end_early_are_dropped() {
        let reason = |chosen: &str, rejected: &str| {
            let both = [record(row(chosen, rejected)), plain(row(chosen, rejected))];
            both.map(|read| read.expect_err("not a pair").reason)
        };
        let early = format!("{START} No.\n\nHuman: Why?\n\nAssistant: Sun.");
        assert_eq!(reason(&early, &format!("{START} Yes.")), [DropReason::NoCommonPrompt; 2]);
        assert_eq!(reason(&format!("{START} No."), START), [DropReason::EmptyCompletion; 2]);
        assert_eq!(reason("No.", &format!("{START} No.")), [DropReason::Malformed; 2]);
        assert_eq!(reason("\n\nHuman: Hi", "\n\nHuman: Hi"), [DropReason::EmptyCompletion; 2]);
    }
}
