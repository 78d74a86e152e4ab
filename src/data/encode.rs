//! From a row to ids: where the completion begins, how it ends, and what is dropped.

use super::Wanted;
use super::codec::Codec;
use super::dataset::{DropReason, Encoded};
use super::format::{Bad, Columns, Message, Record, Shape, Sides};
use crate::loss::Examples;

/// Maximum lengths in tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Prompt and completion together.
    pub(super) total: usize,
    /// The prompt.
    pub(super) prompt: usize,
}

/// The examples that a row gives: one, or two where a pair is taken apart.
pub(super) fn examples(
    shape: Shape,
    row: Columns,
    codec: &Codec,
    wanted: Wanted,
    limits: Limits,
) -> Vec<Result<Encoded, Bad>> {
    match shape.record(row, codec.chat_template().is_some()) {
        Err(bad) => vec![Err(bad)],
        Ok(Record::Plain(sides)) => split(sides, wanted, |sides| plain(sides, codec, limits)),
        Ok(Record::Chat(sides)) => split(sides, wanted, |sides| chat(sides, codec, limits)),
    }
}

/// Turns a row into what the loss reads, as TRL's `unpair_preference_dataset` does.
fn split<T: PartialEq + Clone>(
    sides: Sides<T>,
    wanted: Wanted,
    encode: impl Fn(Sides<T>) -> Result<Encoded, Bad>,
) -> Vec<Result<Encoded, Bad>> {
    let Sides { prompt, chosen, rejected } = sides;
    let only = |chosen, rejected| encode(Sides { prompt: prompt.clone(), chosen, rejected });
    match (chosen, rejected, wanted.examples) {
        (Some(chosen), Some(rejected), _) if chosen == rejected => {
            vec![Err(Bad::new(DropReason::Identical, "chosen and rejected are the same"))]
        }
        (chosen @ Some(_), rejected @ Some(_), _) if wanted.keep_pairs => vec![only(chosen, rejected)],
        (chosen @ Some(_), rejected @ Some(_), Examples::Labelled) => vec![only(chosen, None), only(None, rejected)],
        (None, _, Examples::Demonstrations) => {
            vec![Err(Bad::new(DropReason::NotDesired, "the row is labelled undesirable"))]
        }
        (chosen, _, Examples::Demonstrations) => vec![only(chosen, None)],
        (chosen, rejected, Examples::Pairs | Examples::Labelled) => vec![only(chosen, rejected)],
    }
}

/// Texts as they stand, an EOS after each completion that has none.
fn plain(sides: Sides<String>, codec: &Codec, limits: Limits) -> Result<Encoded, Bad> {
    let prompt = codec.encode(&sides.prompt)?;
    let whole = |completion: &Option<String>, name: &str| {
        let Some(completion) = completion else { return Ok(None) };
        if completion.trim().is_empty() {
            return Err(Bad::new(DropReason::EmptyCompletion, format!("the {name} completion is empty")));
        }
        let mut ids = codec.encode(&format!("{}{completion}", sides.prompt))?;
        if ids.last() != Some(&codec.eos()) {
            ids.push(codec.eos());
        }
        Ok(Some(ids))
    };
    cut(prompt, whole(&sides.chosen, "chosen")?, whole(&sides.rejected, "rejected")?, limits)
}

/// Conversations as the template renders them.
fn chat(sides: Sides<Vec<Message>>, codec: &Codec, limits: Limits) -> Result<Encoded, Bad> {
    let prompt: Vec<&Message> = sides.prompt.iter().collect();
    let whole = |completion: &Option<Vec<Message>>| {
        let Some(completion) = completion else { return Ok(None) };
        let messages: Vec<&Message> = prompt.iter().copied().chain(completion).collect();
        codec.encode_chat(&messages, false).map(Some)
    };
    cut(codec.encode_chat(&prompt, true)?, whole(&sides.chosen)?, whole(&sides.rejected)?, limits)
}

/// Separates completions from the prompt where their ids part, and cuts what is too long.
///
/// The boundary is the shorter one of the two longest common beginnings of the prompt's ids with the whole sequences',
/// so that both completions have the same prompt, each in its own tokenisation (TRL 1.16).
fn cut(
    prompt: Vec<u32>,
    chosen: Option<Vec<u32>>,
    rejected: Option<Vec<u32>>,
    limits: Limits,
) -> Result<Encoded, Bad> {
    let common = |whole: &Vec<u32>| prompt.iter().zip(whole).take_while(|(a, b)| a == b).count();
    let at = [&chosen, &rejected].into_iter().flatten().map(common).min().unwrap_or(0);
    if at == 0 {
        return Err(Bad::new(DropReason::EmptyPrompt, "the prompt has no tokens before the completion begins"));
    }
    if at >= limits.total || at > limits.prompt {
        let (limit, name) = if at >= limits.total {
            (limits.total, "max_length, which leaves nothing of the completion")
        } else {
            (limits.prompt, "max_prompt_length")
        };
        return Err(Bad::new(DropReason::LongPrompt, format!("the prompt is {at} tokens; {limit} is {name}")));
    }
    let room = limits.total - at;
    let completion = |whole: Option<Vec<u32>>, name: &str| match whole {
        None => Ok((Vec::new(), false)),
        Some(mut whole) => {
            let mut ids = whole.split_off(at);
            let truncated = ids.len() > room;
            ids.truncate(room);
            if ids.is_empty() {
                return Err(Bad::new(DropReason::EmptyCompletion, format!("the {name} completion has no tokens")));
            }
            Ok((ids, truncated))
        }
    };
    let both = chosen.is_some() && rejected.is_some();
    let (chosen, chosen_truncated) = completion(chosen, "chosen")?;
    let (rejected, rejected_truncated) = completion(rejected, "rejected")?;
    let truncated = chosen_truncated || rejected_truncated;
    if both && chosen == rejected {
        let detail = if truncated {
            "chosen and rejected are the same up to max_length"
        } else {
            "chosen and rejected are the same tokens"
        };
        return Err(Bad::new(DropReason::Identical, detail));
    }
    let boundary_moved = at < prompt.len();
    let mut prompt = prompt;
    prompt.truncate(at);
    Ok(Encoded { prompt, chosen, rejected, truncated, boundary_moved })
}
