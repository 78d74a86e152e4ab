//! Answers of base and policy to prompts.

use std::io;

use super::{Failure, request};
use crate::cli;
use crate::data::{Answer, Codec, Prompt};
use crate::device::{self, Chosen, DeviceChoice};
use crate::model::generate::{End, Generator, Request, Sampling};
use crate::model::{Adapter, Model};
use crate::ops::FEW;
use crate::progress::{Console, one_line};

use super::trained::candle;

/// A model that answers.
pub(super) struct Answering<'a> {
    pub(super) model: &'a Model,
    pub(super) codec: &'a Codec,
    pub(super) decoding: &'a cli::Decoding,
    /// The most answers at once, where that was said.
    pub(super) batch: Option<u32>,
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Answered {
    pub(super) text: String,
    /// Without the one that ended it.
    pub(super) tokens: usize,
    pub(super) end: End,
    /// Those tokens.
    #[serde(skip)]
    pub(super) ids: Vec<u32>,
}

impl Answered {
    fn of(answer: &Answer<'_>, end: End) -> Self {
        let ids = answer.ids().to_vec();
        Self { text: answer.text().to_owned(), tokens: ids.len(), end, ids }
    }
}

impl Answering<'_> {
    /// Answers to all prompts, in their order. `each` gets every answer as it is done.
    pub(super) fn all(
        &self,
        prompts: &[Prompt],
        side: Adapter,
        console: &Console,
        mut each: impl FnMut(usize, &Answered) -> Result<(), Failure>,
    ) -> Result<Vec<Answered>, Failure> {
        if let Some(prompt) = prompts.iter().find(|prompt| prompt.ids.len() >= self.longest()) {
            return Err(self.too_long(prompt));
        }
        let positions =
            prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0) + self.decoding.max_new_tokens();
        let affordable = device::available_memory(self.model.decoder().device())
            .map_or(FEW, |bytes| bytes / 2 / Generator::slot_bytes(self.model, positions).max(1));
        let slots = self.batch.map_or(FEW, |batch| batch as usize).min(affordable).min(prompts.len()).max(1);
        let mut generator = Generator::new(self.model, side, slots, positions).map_err(candle)?;
        let bar = console.count_bar(
            match side {
                Adapter::Off => "answers of the base",
                _ => "answers of the policy",
            },
            prompts.len() as u64,
        );
        let mut answers: Vec<Option<Answered>> = vec![None; prompts.len()];
        let mut going: Vec<(u64, usize, Answer<'_>)> = Vec::new();
        let mut waiting = 0..prompts.len();
        loop {
            while generator.has_room() {
                let Some(number) = waiting.next() else { break };
                if let Some(key) = generator.add(self.request(&prompts[number], 0)) {
                    going.push((key, number, Answer::new(self.codec, &self.decoding.stop)));
                }
            }
            if generator.is_idle() {
                break;
            }
            let mut done = Vec::new();
            let step = generator.step(|next| {
                let Some(at) = going.iter().position(|(key, ..)| *key == next.key) else { return false };
                let end = if going[at].2.take(next.token) { Some(End::Stop) } else { next.end };
                if let Some(end) = end {
                    let (_, number, answer) = going.remove(at);
                    done.push((number, Answered::of(&answer, end)));
                }
                end.is_none()
            });
            step.map_err(candle)?;
            for (number, answered) in done {
                bar.advance(1);
                each(number, &answered)?;
                answers[number] = Some(answered);
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// The answer to one prompt, `show`n while it comes. Ends where `show` says so.
    pub(super) fn one(
        &self,
        prompt: &Prompt,
        side: Adapter,
        mut show: impl FnMut(&str) -> io::Result<()>,
    ) -> Result<Answered, Failure> {
        let positions = prompt.ids.len() + self.decoding.max_new_tokens();
        let mut generator = Generator::new(self.model, side, 1, positions).map_err(candle)?;
        if generator.add(self.request(prompt, 0)).is_none() {
            return Err(self.too_long(prompt));
        }
        let mut answer = Answer::new(self.codec, &self.decoding.stop);
        let (mut end, mut shown) = (None, Ok(()));
        while !generator.is_idle() {
            let step = generator.step(|next| {
                end = if answer.take(next.token) { Some(End::Stop) } else { next.end };
                shown = show(&answer.news(end.is_some()));
                shown.is_ok() && end.is_none()
            });
            step.map_err(candle)?;
        }
        shown.map_err(|e| Failure::Failed(miette::miette!("cannot write the answer: {e}")))?;
        Ok(Answered::of(&answer, end.unwrap_or(End::Length)))
    }

    /// Tokens of a prompt and its answer together.
    fn longest(&self) -> usize {
        self.model.decoder().config().max_position_embeddings
    }

    fn too_long(&self, prompt: &Prompt) -> Failure {
        let (tokens, longest) = (prompt.ids.len(), self.longest());
        request(TooLong { tokens, longest, text: one_line(&prompt.text, 60) })
    }

    fn request(&self, prompt: &Prompt, sample: u64) -> Request {
        let cli::Decoding { temperature, top_p, top_k, min_p, repetition_penalty, seed, .. } = *self.decoding;
        Request {
            prompt: prompt.ids.clone(),
            stop_tokens: self.codec.stop_tokens().to_vec(),
            max_new_tokens: self.decoding.max_new_tokens(),
            sampling: Sampling { temperature, top_p, top_k: top_k as usize, min_p, repetition_penalty },
            seed: Request::seed(seed, sample, &prompt.ids),
        }
    }
}

#[derive(Debug, thiserror::Error, miette::Diagnostic)]
#[error("a prompt has {tokens} tokens, and the model takes {longest} in all: {text}")]
#[diagnostic(help("shorten or leave it out"))]
struct TooLong {
    tokens: usize,
    longest: usize,
    text: String,
}

/// Base, adapter and tokenizer, ready to answer where `device` says.
pub(super) fn load(
    trained: &super::trained::Trained,
    device: DeviceChoice,
    console: &Console,
) -> Result<(Model, Codec), Failure> {
    let chosen = choose(device, console)?;
    let codec = trained.codec()?;
    Ok((trained.load(None, &chosen, console)?, codec))
}

/// The device that was asked for, with its reason told.
pub(super) fn choose(device: DeviceChoice, console: &Console) -> Result<Chosen, Failure> {
    let chosen = device::choose(device).map_err(request)?;
    console.fact("device", &chosen.reason);
    Ok(chosen)
}
