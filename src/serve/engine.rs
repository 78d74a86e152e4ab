//! The one thread that computes: continuous batching of answers of both sides, and scores between their steps.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use candle_core::Result;
use tokio::sync::mpsc::UnboundedSender;

use super::score::{Scored, Scoring};
use crate::data::{Answer, Codec};
use crate::model::generate::{End, Generator, Next, Request};
use crate::model::{Adapter, Model};
use crate::ops::divergence::ln_sum;
use crate::progress::Console;

/// The log-probability of a token, and of those that were most probable in its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TokenLogprob {
    pub(super) id: u32,
    pub(super) logp: f64,
    /// The most probable first.
    pub(super) top: Vec<(u32, f64)>,
}

impl TokenLogprob {
    /// By the logits as the model gave them. The log-softmax is computed in f64.
    pub(super) fn of(logits: &[f32], id: u32, top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum = ln_sum(logits, largest);
        let logp = |id: u32| match logits.get(id as usize) {
            Some(&logit) => f64::from(logit - largest) - sum,
            None => f64::NEG_INFINITY,
        };
        let mut best: Vec<u32> = Vec::with_capacity(top + 1);
        for id in 0..logits.len() as u32 {
            let logit = logits[id as usize];
            if best.len() < top || best.last().is_some_and(|&last| logit > logits[last as usize]) {
                let at = best.partition_point(|&other| logits[other as usize] >= logit);
                best.insert(at, id);
                best.truncate(top);
            }
        }
        Self { id, logp: logp(id), top: best.into_iter().map(|id| (id, logp(id))).collect() }
    }
}

/// What the engine is asked for.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) side: Adapter,
    pub(super) work: Work,
    /// Where to what comes of it; nobody needs it any more when this is closed.
    pub(super) to: UnboundedSender<Event>,
}

#[derive(Debug)]
pub(super) enum Work {
    /// Answers, each by its number among the request's.
    Answers(Vec<Asked>),
    /// Scores of prompts, none of them empty; with so many of the most probable tokens in each place.
    Scores { prompts: Vec<Vec<u32>>, top: usize },
}

/// An answer that is asked for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) request: Request,
    pub(super) stops: Vec<String>,
    /// Whether its text goes on where the prompt's ends, or is one of its own.
    pub(super) continues: bool,
    /// How many of the most probable tokens are wanted with each of its own; none where not even its own log-probability
    /// is.
    pub(super) logprobs: Option<usize>,
}

/// What comes of a job, in order for each answer.
#[derive(Debug)]
pub(super) enum Event {
    /// More of an answer.
    Part { answer: usize, text: String, tokens: Vec<TokenLogprob> },
    /// An answer is whole. `cut` says how many of its tokens began before the stop text that ended it.
    End { answer: usize, end: End, tokens: usize, cut: Option<usize> },
    /// A prompt was scored.
    Scored(Scored),
    /// Nothing more comes: the computation failed.
    Failed,
    /// Nothing more comes: the server stops.
    Stopped,
}

/// The model with all that is asked of it.
#[derive(Debug)]
pub(super) struct Engine<'m> {
    model: &'m Model,
    console: &'m Console,
    sides: [Side<'m>; 2],
    scoring: VecDeque<(Scoring, Adapter, UnboundedSender<Event>)>,
}

/// Answers of base or policy.
#[derive(Debug)]
struct Side<'m> {
    codec: &'m Codec,
    generator: Generator<'m>,
    waiting: VecDeque<Waiting>,
    going: Vec<Going<'m>>,
}

/// A request with answers that are not begun, each with its number.
#[derive(Debug)]
struct Waiting {
    answers: VecDeque<(usize, Asked)>,
    to: UnboundedSender<Event>,
}

#[derive(Debug)]
struct Going<'m> {
    key: u64,
    number: usize,
    answer: Answer<'m>,
    continues: bool,
    logprobs: Option<usize>,
    /// Bytes of text before each token.
    begins: Vec<usize>,
    to: UnboundedSender<Event>,
}

impl<'m> Engine<'m> {
    /// So many answers at once for each side, of so many tokens with their prompts.
    ///
    /// # Errors
    /// What candle returns.
    pub(super) fn new(
        model: &'m Model,
        codec: &'m Codec,
        console: &'m Console,
        answers: usize,
        context: usize,
    ) -> Result<Self> {
        let side = |adapter| {
            let generator = Generator::new(model, adapter, answers, context)?;
            Ok::<_, candle_core::Error>(Side { codec, generator, waiting: VecDeque::new(), going: Vec::new() })
        };
        Ok(Self { model, console, sides: [side(Adapter::Off)?, side(Adapter::On)?], scoring: VecDeque::new() })
    }

    /// Works until nobody can send a job any more. Once `stop` is set, what there is ends as it is.
    pub(super) fn run(&mut self, jobs: &Receiver<Job>, stop: &AtomicBool) {
        loop {
            if self.is_idle() {
                match jobs.recv() {
                    Ok(job) => self.take(job),
                    Err(_) => return,
                }
            }
            while let Ok(job) = jobs.try_recv() {
                self.take(job);
            }
            if stop.load(Ordering::Relaxed) {
                self.end_all(|| Event::Stopped);
            }
            if let Err(error) = self.step() {
                self.console.error(format_args!("error: the model could not compute a request: {error}"));
                self.end_all(|| Event::Failed);
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.scoring.is_empty() && self.sides.iter().all(|side| side.waiting.is_empty() && side.going.is_empty())
    }

    fn take(&mut self, Job { side, work, to }: Job) {
        match work {
            Work::Scores { prompts, top } => self.scoring.push_back((Scoring::new(prompts, top), side, to)),
            Work::Answers(answers) => {
                let [off, on] = &mut self.sides;
                let side = if side == Adapter::Off { off } else { on };
                side.waiting.push_back(Waiting { answers: answers.into_iter().enumerate().collect(), to });
            }
        }
    }

    /// A token more for every answer, and a forward pass of scores.
    fn step(&mut self) -> Result<()> {
        for side in &mut self.sides {
            side.step()?;
        }
        self.scoring.retain(|(.., to)| !to.is_closed());
        if let Some((mut scoring, adapter, to)) = self.scoring.pop_front() {
            for scored in scoring.step(self.model, adapter)? {
                _ = to.send(Event::Scored(scored));
            }
            // behind those of the others, so that a long request does not hold up a short one
            if !scoring.is_done() {
                self.scoring.push_back((scoring, adapter, to));
            }
        }
        Ok(())
    }

    fn end_all(&mut self, event: impl Fn() -> Event) {
        for side in &mut self.sides {
            side.going.drain(..).for_each(|going| {
                side.generator.end(going.key);
                _ = going.to.send(event());
            });
            side.waiting.drain(..).for_each(|waiting| _ = waiting.to.send(event()));
        }
        self.scoring.drain(..).for_each(|(.., to)| _ = to.send(event()));
    }
}

impl Side<'_> {
    fn step(&mut self) -> Result<()> {
        let Self { codec, generator, waiting, going, .. } = self;
        waiting.retain(|waiting| !waiting.to.is_closed() && !waiting.answers.is_empty());
        // a client who has gone away makes room
        going.retain(|going| {
            let wanted = !going.to.is_closed();
            if !wanted {
                generator.end(going.key);
            }
            wanted
        });
        while generator.has_room() {
            let Some(at) = fewest(waiting.iter().map(|waiting| &waiting.to), going.iter().map(|going| &going.to))
            else {
                break;
            };
            let to = waiting[at].to.clone();
            let Some((number, asked)) = waiting[at].answers.pop_front() else { break };
            if waiting[at].answers.is_empty() {
                waiting.remove(at);
            }
            let Asked { request, stops, continues, logprobs } = asked;
            let context = if continues { &request.prompt[..] } else { &[] };
            let answer = Answer::after(codec, Cow::Owned(stops), context);
            match generator.add(request) {
                Some(key) => {
                    going.push(Going { key, number, answer, continues, logprobs, begins: Vec::new(), to });
                }
                // the prompt takes all there is
                None => _ = to.send(Event::End { answer: number, end: End::Length, tokens: 0, cut: None }),
            }
        }
        if generator.is_idle() {
            return Ok(());
        }
        generator.step(|next| {
            let Some(at) = going.iter().position(|going| going.key == next.key) else { return false };
            let goes_on = going[at].take(&next);
            if !goes_on {
                going.swap_remove(at);
            }
            goes_on
        })
    }
}

/// Which of the requests that wait has the fewest answers going, the first of equals: so one that asks for many answers
/// does not stand before those that ask for one.
fn fewest<'t>(
    waiting: impl Iterator<Item = &'t UnboundedSender<Event>>,
    going: impl Iterator<Item = &'t UnboundedSender<Event>> + Clone,
) -> Option<usize> {
    let count = |to: &UnboundedSender<Event>| going.clone().filter(|going| going.same_channel(to)).count();
    waiting.map(count).enumerate().min_by_key(|(_, count)| *count).map(|(at, _)| at)
}

impl Going<'_> {
    /// Takes a token, tells of it, and says whether the answer goes on.
    fn take(&mut self, next: &Next<'_>) -> bool {
        if next.token.is_some() {
            self.begins.push(self.answer.text().len());
        }
        let end = if self.answer.take(next.token) { Some(End::Stop) } else { next.end };
        let text = self.answer.news(end.is_some());
        // OpenAI's completions tell of the token that ends a text too, and its chats do not
        let told = self.logprobs.filter(|_| self.continues || next.token.is_some());
        let tokens: Vec<TokenLogprob> =
            told.map(|top| TokenLogprob::of(next.logits, next.chosen, top)).into_iter().collect();
        if !text.is_empty() || !tokens.is_empty() {
            _ = self.to.send(Event::Part { answer: self.number, text, tokens });
        }
        if let Some(end) = end {
            let characters = self.answer.text().len();
            let cut = self.answer.stopped().then(|| self.begins.partition_point(|&begin| begin < characters));
            _ = self.to.send(Event::End { answer: self.number, end, tokens: self.answer.ids().len(), cut });
        }
        end.is_none()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    #[test]
    fn the_request_with_the_fewest_answers_going_is_next() {
        let ((many, _a), (few, _b), (new, _c)) = (unbounded_channel(), unbounded_channel(), unbounded_channel());
        let next = |waiting: &[&UnboundedSender<Event>], going: &[&UnboundedSender<Event>]| {
            fewest(waiting.iter().copied(), going.iter().copied())
        };
        assert_eq!(next(&[], &[&many]), None);
        assert_eq!(next(&[&many, &few], &[]), Some(0), "in order of equals");
        assert_eq!(next(&[&many, &few], &[&many, &many, &few]), Some(1));
        assert_eq!(next(&[&many, &few, &new], &[&many, &many.clone(), &few]), Some(2));
        assert_eq!(next(&[&many, &few], &[&few, &many]), Some(0));
    }
}
