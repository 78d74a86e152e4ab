//! Asking a model which of two answers is better: what is asked, what was answered before, and the calls for the rest.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use miette::Diagnostic;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use thiserror::Error;

use super::config::{EndpointJudge, Price};
use super::endpoint::{Chat, Endpoint, Reply, Trouble, pause};
use super::log::{self, Log, LogError};
use super::pace::Pace;
use super::prompt::{Message, Shown};
use super::report::Pair;
use super::verdict::{Answer, Understood};
use crate::interrupt::Interrupt;
use crate::ops::uniform;
use crate::progress::{Bar, one_line};
use crate::statistics::Order;

/// How often a call is made before its question is left for another time.
pub const TRIES: u32 = 6;
/// How often a question is asked: as it is, with a word on the form of the answer, and with another seed.
const ASKED: u32 = 3;
/// Judgements at the start of which too many must not be invalid, and how many are too many.
const START: usize = 30;
const TOO_MANY_INVALID: usize = 20;
/// So many questions in a row without an answer: the endpoint is gone.
const GONE: usize = 8;
/// How often who waits looks whether to stop.
const LOOK: Duration = Duration::from_millis(50);

/// One judgement to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// The number of the pair.
    pub pair: usize,
    /// Which answer is A.
    pub order: Order,
}

/// A call that a question needs.
#[derive(Debug, Clone)]
pub struct Asked {
    /// What its answer is kept under.
    pub key: String,
    messages: Vec<Message>,
    temperature: f64,
    seed: u64,
    attempt: u32,
}

/// What is known about a question.
#[derive(Debug, Clone)]
pub enum Known {
    /// Its answer was understood, with the keys of all answers that were looked at.
    Understood(Understood, Vec<String>),
    /// No answer could be understood: what is wrong with the last one.
    Invalid(String, Vec<String>),
    /// A call has to be made.
    Open(Asked),
}

impl EndpointJudge {
    /// What is known about a pair in an order, where `look` gives what was answered under a key.
    ///
    /// # Errors
    /// What is wrong with the judge's template.
    pub fn known(&self, shown: &Shown<'_>, mut look: impl FnMut(&str) -> Option<Value>) -> Result<Known, String> {
        let messages = self.prompt.messages(self.form, shown)?;
        let labels = [self.prompt.labels[0].as_str(), self.prompt.labels[1].as_str()];
        let (mut keys, mut problem) = (Vec::new(), String::new());
        for attempt in 0..ASKED {
            let asked = self.asked(messages.clone(), attempt);
            let Some(entry) = look(&asked.key) else { return Ok(Known::Open(asked)) };
            keys.push(asked.key);
            let response = entry.get("response").unwrap_or(&Value::Null);
            match (Answer { response }).understand(self.form, labels, self.scale()) {
                Ok(understood) => return Ok(Known::Understood(understood, keys)),
                Err(error) => problem = error,
            }
        }
        Ok(Known::Invalid(problem, keys))
    }

    /// A question of which everybody knows the answer.
    ///
    /// # Errors
    /// What is wrong with the judge's template.
    pub fn small_question(&self) -> Result<Asked, String> {
        let shown = Shown {
            prompt: "What is two and two?",
            turns: &[],
            a: "Two and two is four.",
            b: "Two and two is a kind of fish.",
            reference: Some("Four."),
        };
        Ok(self.asked(self.prompt.messages(self.form, &shown)?, 0))
    }

    fn asked(&self, mut messages: Vec<Message>, attempt: u32) -> Asked {
        let (mut temperature, mut seed) = (self.temperature, self.seed);
        if attempt > 0
            && let Some(last) = messages.last_mut()
        {
            last.content.push_str(&self.prompt.reminder(self.form));
        }
        if attempt > 1 {
            // at a temperature of 0 another seed would change nothing
            temperature = temperature.max(1.0);
            seed += u64::from(attempt);
        }
        let key = log::key(&json!({
            "schema": 1,
            "base_url": self.base_url,
            "model": self.model,
            "messages": messages,
            "verdict": self.form,
            "temperature": temperature,
            "max_tokens": self.max_tokens,
            "seed": seed,
            "extra_body": self.extra_body,
            "attempt": attempt,
        }));
        Asked { key, messages, temperature, seed, attempt }
    }
}

/// What a judge is shown of a pair.
#[must_use]
pub fn shown<'o>(pair: &Pair<'o>, order: Order) -> Shown<'o> {
    let (policy, against) = (pair.policy.output.as_str(), pair.against.output.as_str());
    let (a, b) = match order {
        Order::PolicyFirst => (policy, against),
        Order::PolicySecond => (against, policy),
    };
    let Pair { policy, .. } = pair;
    Shown { prompt: &policy.instruction, turns: &policy.turns, a, b, reference: policy.reference.as_deref() }
}

/// Tokens of a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Read.
    pub prompt: u64,
    /// Of those, cached by the endpoint.
    pub cached: u64,
    /// Written.
    pub completion: u64,
}

impl Usage {
    /// As an answer says it; none where it does not say both what was read and what was written.
    #[must_use]
    pub fn of(response: &Value) -> Option<Self> {
        let number = |path: &str| response.pointer(path).and_then(Value::as_u64);
        Some(Self {
            prompt: number("/usage/prompt_tokens")?,
            cached: number("/usage/prompt_tokens_details/cached_tokens").unwrap_or(0),
            completion: number("/usage/completion_tokens")?,
        })
    }

    /// What it costs.
    #[must_use]
    pub fn dollars(&self, price: &Price) -> f64 {
        price.of(self.prompt, self.cached, self.completion)
    }
}

/// What may be spent.
#[derive(Debug)]
pub struct Budget {
    max_calls: Option<u64>,
    max_cost: Option<f64>,
    price: Option<Price>,
    state: Mutex<Spent>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    /// Calls that were answered, and what they cost.
    calls: u64,
    dollars: f64,
    /// Calls that are under way, and what they may cost at most.
    going: u64,
    reserved: f64,
}

/// Whether a call may be made.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Room {
    /// With what it may cost at most.
    Yes(f64),
    /// It depends on what those under way will have cost.
    Later,
    /// There is none left.
    No,
}

impl Budget {
    /// Nothing is spent yet.
    #[must_use]
    pub fn new(max_calls: Option<u64>, max_cost: Option<f64>, price: Option<Price>) -> Self {
        Self { max_calls, max_cost, price, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, Spent> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a call may cost at most out of the budget.
    fn reserve(&self, read: u64, written: u64) -> Room {
        let cost = self.price.map_or(0.0, |price| price.of(read, 0, written));
        let mut state = self.state();
        let fits = |calls: u64, dollars: f64| {
            self.max_calls.is_none_or(|most| calls < most) && self.max_cost.is_none_or(|most| dollars + cost <= most)
        };
        if !fits(state.calls, state.dollars) {
            return Room::No;
        }
        if !fits(state.calls + state.going, state.dollars + state.reserved) {
            return Room::Later;
        }
        state.going += 1;
        state.reserved += cost;
        Room::Yes(cost)
    }

    /// Gives back what was reserved, and takes what was spent; nothing where there was no answer.
    fn settle(&self, reserved: f64, answer: Option<&Value>) {
        let mut state = self.state();
        state.going -= 1;
        state.reserved -= reserved;
        if let Some(response) = answer {
            state.calls += 1;
            state.dollars += match (Usage::of(response), &self.price) {
                (Some(usage), Some(price)) => usage.dollars(price),
                // whoever does not say what was read and written may charge all of it
                _ => reserved,
            };
        }
    }

    /// Calls that were answered.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// What they cost.
    #[must_use]
    pub fn dollars(&self) -> Option<f64> {
        self.price.map(|_| self.state().dollars)
    }
}

/// How asking ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// Every question was asked; so many have no answer, of which the first says why.
    Done(usize, Option<String>),
    /// The budget is spent.
    Spent,
    /// Somebody asked to stop.
    Interrupted(u8),
}

/// Why asking ended early.
#[derive(Debug, Error, Diagnostic)]
pub enum AskError {
    /// No call will have an answer.
    #[error("{problem}")]
    Fatal {
        /// What is wrong.
        problem: String,
        /// What to do.
        #[help]
        help: String,
    },
    /// The endpoint does not answer any more.
    #[error("the endpoint does not answer: {0}")]
    #[diagnostic(help("what was answered is kept; the same command goes on"))]
    Gone(String),
    /// It does not do what it is asked.
    #[error("{invalid} of the first {judged} verdicts cannot be understood: {last}")]
    #[diagnostic(help(
        "judgements.jsonl has what the judge said; try another --verdict, another --judge-prompt or another model"
    ))]
    Unreadable {
        /// How many.
        invalid: usize,
        /// Of how many.
        judged: usize,
        /// What is wrong with the last one.
        last: String,
    },
    /// The judge's template.
    #[error("the judge's prompt: {0}")]
    Template(String),
    /// The file with the answers.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Log(#[from] LogError),
}

/// Makes calls until they have an answer.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    /// To whom.
    pub endpoint: &'a Endpoint,
    /// How fast.
    pub pace: &'a Pace,
    /// For how much.
    pub budget: &'a Budget,
    /// Until when.
    pub interrupt: &'a Interrupt,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq)]
pub enum NoAnswer {
    /// To this call, this time.
    Failed(String),
    /// The endpoint has answered: this call will never have one.
    Refused(String),
    /// To any call: what is wrong, and what to do.
    Fatal(String, String),
    /// The budget is spent.
    Spent,
    /// Nobody wants it any more.
    Stopped,
}

impl Caller<'_> {
    /// Makes a call, again where it may have an answer later, up to `tries` times.
    ///
    /// # Errors
    /// See [`NoAnswer`].
    pub fn call(
        &self,
        chat: &Chat<'_>,
        tries: u32,
        jitter: &mut ChaCha8Rng,
        stop: impl Fn() -> bool,
    ) -> Result<Value, NoAnswer> {
        let read = chat.messages.iter().map(|message| message.content.len() as u64).sum::<u64>();
        let stop = || stop() || self.interrupt.asked().is_some();
        let mut tried = 0;
        loop {
            if stop() {
                return Err(NoAnswer::Stopped);
            }
            // about four bytes a token; half as many for what may be spent, so that it holds for other languages too
            let reserved = match self.budget.reserve(read / 2, chat.max_tokens.into()) {
                Room::Yes(reserved) => reserved,
                Room::No => return Err(NoAnswer::Spent),
                Room::Later => {
                    thread::sleep(LOOK);
                    continue;
                }
            };
            // after the budget: a turn counts as a call of this minute whether one is made or not
            let Some(turn) = self.pace.turn(read / 4 + u64::from(chat.max_tokens.min(256)), stop) else {
                self.budget.settle(reserved, None);
                return Err(NoAnswer::Stopped);
            };
            let result = self.endpoint.call(chat);
            drop(turn);
            let charged = match &result {
                Ok(reply) => Some(&reply.response),
                Err(Trouble::Later { charged, .. }) => charged.as_ref(),
                Err(_) => None,
            };
            self.budget.settle(reserved, charged);
            let (problem, wait) = match result {
                Ok(Reply { response, hold }) => {
                    self.pace.went_well(hold);
                    return Ok(response);
                }
                Err(Trouble::Changed(_)) => continue,
                Err(Trouble::Refused(problem)) => return Err(NoAnswer::Refused(problem)),
                Err(Trouble::Fatal { problem, help }) => return Err(NoAnswer::Fatal(problem, help)),
                Err(Trouble::Later { problem, wait, limited, .. }) => {
                    if limited {
                        self.pace.too_many();
                    }
                    (problem, wait)
                }
            };
            tried += 1;
            if tried >= tries {
                return Err(NoAnswer::Failed(problem));
            }
            let until = Instant::now() + Duration::from_secs_f64(pause(wait, tried - 1, uniform(jitter.next_u64())));
            while Instant::now() < until {
                if stop() {
                    return Err(NoAnswer::Stopped);
                }
                thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
            }
        }
    }
}

/// Random numbers for pauses, which no result depends on.
fn jitter(number: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64((u64::from(std::process::id()) << 32) | number)
}

/// Why a job of [`all`] has no answer.
#[derive(Debug)]
pub enum End {
    /// It will not have one this time.
    Failed(String),
    /// Nor any other time, though there is somebody who answers.
    Refused(String),
    /// Work ends, and why.
    Work(Result<Ended, AskError>),
    /// Work has ended elsewhere.
    Stopped,
}

impl From<NoAnswer> for End {
    fn from(why: NoAnswer) -> Self {
        match why {
            NoAnswer::Failed(problem) => Self::Failed(problem),
            NoAnswer::Refused(problem) => Self::Refused(problem),
            NoAnswer::Fatal(problem, help) => Self::Work(Err(AskError::Fatal { problem, help })),
            NoAnswer::Spent => Self::Work(Ok(Ended::Spent)),
            NoAnswer::Stopped => Self::Stopped,
        }
    }
}

impl From<AskError> for End {
    fn from(error: AskError) -> Self {
        Self::Work(Err(error))
    }
}

impl From<LogError> for End {
    fn from(error: LogError) -> Self {
        Self::Work(Err(error.into()))
    }
}

/// What workers share.
struct Shared<J> {
    jobs: Mutex<VecDeque<J>>,
    stop: AtomicBool,
    end: Mutex<Option<Result<Ended, AskError>>>,
    /// Jobs without an answer, all of them and since the last one that the endpoint has said anything to.
    failed: AtomicUsize,
    in_a_row: AtomicUsize,
    first_failure: Mutex<Option<String>>,
}

/// What a mutex holds, whatever became of those who had it before.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<J> Shared<J> {
    /// Ends the work; the first who says so is right.
    fn end(&self, how: Result<Ended, AskError>) {
        let mut end = locked(&self.end);
        // an error says more than that a budget is spent
        if end.is_none() || (how.is_err() && matches!(*end, Some(Ok(_)))) {
            *end = Some(how);
        }
        self.stop.store(true, Ordering::Relaxed);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn failed(&self, problem: String) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        locked(&self.first_failure).get_or_insert(problem);
    }

    fn work(&self, interrupt: &Interrupt, number: u64, each: &Each<'_, J>) {
        let mut jitter = jitter(number);
        while !self.stopped() {
            if let Some(code) = interrupt.asked() {
                return self.end(Ok(Ended::Interrupted(code)));
            }
            let Some(job) = locked(&self.jobs).pop_front() else { return };
            match each(job, &mut jitter, &|| self.stopped()) {
                Ok(()) => self.in_a_row.store(0, Ordering::Relaxed),
                Err(End::Refused(problem)) => {
                    self.failed(problem);
                    self.in_a_row.store(0, Ordering::Relaxed);
                }
                Err(End::Failed(problem)) => {
                    self.failed(problem.clone());
                    if self.in_a_row.fetch_add(1, Ordering::Relaxed) + 1 >= GONE {
                        self.end(Err(AskError::Gone(problem)));
                    }
                }
                Err(End::Work(how)) => self.end(how),
                // by somebody who asked to stop, or by another worker, who has said why
                Err(End::Stopped) => {}
            }
        }
    }
}

/// What is done for a job, with random numbers for pauses, and whether to stop.
type Each<'e, J> = dyn Fn(J, &mut ChaCha8Rng, &dyn Fn() -> bool) -> Result<(), End> + Sync + 'e;

/// Does jobs that need an endpoint, several at a time, in their order.
///
/// # Errors
/// See [`AskError`].
pub fn all<J: Send>(
    jobs: Vec<J>,
    workers: usize,
    interrupt: &Interrupt,
    each: &Each<'_, J>,
) -> Result<Ended, AskError> {
    let workers = workers.min(jobs.len());
    let shared = Shared {
        jobs: Mutex::new(jobs.into()),
        stop: AtomicBool::new(false),
        end: Mutex::new(None),
        failed: AtomicUsize::new(0),
        in_a_row: AtomicUsize::new(0),
        first_failure: Mutex::new(None),
    };
    thread::scope(|scope| {
        for number in 0..workers {
            let shared = &shared;
            scope.spawn(move || shared.work(interrupt, number as u64, each));
        }
    });
    let failed = shared.failed.into_inner();
    let first = shared.first_failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    shared.end.into_inner().unwrap_or_else(PoisonError::into_inner).unwrap_or(Ok(Ended::Done(failed, first)))
}

/// A judge that can be asked.
#[derive(Debug, Clone, Copy)]
pub struct Asking<'a> {
    /// Who judges.
    pub judge: &'a EndpointJudge,
    /// How it is called.
    pub caller: Caller<'a>,
}

impl Asking<'_> {
    /// Asks the questions that are open, several at a time, and keeps every answer as it comes.
    ///
    /// # Errors
    /// See [`AskError`]; what was answered is kept.
    pub fn all(
        &self,
        pairs: &[Pair<'_>],
        questions: Vec<Question>,
        workers: usize,
        log: &mut Log,
        bar: &Bar<'_>,
    ) -> Result<Ended, AskError> {
        let log = Mutex::new(log);
        let (judged, invalid) = (AtomicUsize::new(0), AtomicUsize::new(0));
        all(questions, workers, self.caller.interrupt, &|question, jitter, stopped| {
            let problem = self.answer(pairs, question, &log, jitter, stopped)?;
            bar.advance(1);
            let judged = judged.fetch_add(1, Ordering::Relaxed) + 1;
            let Some(last) = problem else { return Ok(()) };
            let invalid = invalid.fetch_add(1, Ordering::Relaxed) + 1;
            match invalid >= TOO_MANY_INVALID && judged <= START {
                true => Err(AskError::Unreadable { invalid, judged, last: one_line(&last, 300) }.into()),
                false => Ok(()),
            }
        })
    }

    /// Makes a question known: none where it was understood, what is wrong where it was not.
    fn answer(
        &self,
        pairs: &[Pair<'_>],
        question: Question,
        log: &Mutex<&mut Log>,
        jitter: &mut ChaCha8Rng,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<String>, End> {
        let shown = shown(&pairs[question.pair], question.order);
        loop {
            let known = self.judge.known(&shown, |key| locked(log).get(key).cloned());
            let asked = match known.map_err(AskError::Template)? {
                Known::Understood(..) => return Ok(None),
                Known::Invalid(problem, _) => return Ok(Some(problem)),
                Known::Open(asked) => asked,
            };
            let begun = Instant::now();
            let response = self.caller.call(&asked.chat(self.judge), TRIES, jitter, stopped)?;
            let entry = json!({
                "prompt": question.pair,
                "order": question.order.number(),
                "attempt": asked.attempt,
                "time": jiff::Timestamp::now().to_string(),
                "seconds": begun.elapsed().as_secs_f64(),
                "changes": self.caller.endpoint.changes(),
                "response": response,
            });
            locked(log).push(&asked.key, &entry)?;
        }
    }

    /// A small question of which everybody knows the answer, before anything that takes long: is the address right, the
    /// key, the model's name, and is the answer in the form that was asked for? Says what is wrong with the form, if
    /// anything.
    ///
    /// # Errors
    /// No call will have an answer.
    pub fn canary(&self, log: &mut Log, from_log: bool) -> Result<Option<String>, AskError> {
        const TRIES: u32 = 3;
        let asked = self.judge.small_question().map_err(AskError::Template)?;
        let understood = |response: &Value| {
            let [a, b] = &self.judge.prompt.labels;
            (Answer { response }).understand(self.judge.form, [a, b], self.judge.scale()).err()
        };
        if let Some(entry) = log.get(&asked.key).filter(|_| from_log) {
            return Ok(understood(entry.get("response").unwrap_or(&Value::Null)));
        }
        match self.caller.call(&asked.chat(self.judge), TRIES, &mut jitter(0), || false) {
            Ok(response) => {
                let time = jiff::Timestamp::now().to_string();
                log.push(&asked.key, &json!({ "canary": true, "time": time, "response": response }))?;
                Ok(understood(&response))
            }
            Err(NoAnswer::Fatal(problem, help)) => Err(AskError::Fatal { problem, help }),
            Err(NoAnswer::Failed(problem) | NoAnswer::Refused(problem)) => Err(AskError::Gone(problem)),
            Err(NoAnswer::Spent) => Err(AskError::Fatal {
                problem: "the budget does not suffice for a single call".into(),
                help: "raise --max-cost, or lower max_tokens in the judge's file".into(),
            }),
            Err(NoAnswer::Stopped) => Err(AskError::Gone("it was interrupted".into())),
        }
    }
}

impl Asked {
    /// Of all messages.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.messages.iter().map(|message| message.content.len() as u64).sum()
    }

    fn chat<'c>(&'c self, judge: &'c EndpointJudge) -> Chat<'c> {
        Chat {
            model: &judge.model,
            messages: &self.messages,
            temperature: Some(self.temperature),
            max_tokens: judge.max_tokens,
            seed: Some(self.seed),
            form: Some(judge.form),
            extra_body: &judge.extra_body,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::Calls;

    #[test]
    fn a_budget_holds_while_calls_are_under_way() {
        let price = Price { input: 1.0, cached_input: None, output: 10.0 };
        let budget = Budget::new(Some(3), Some(30e-6), Some(price));
        let fifteen = 15e-6;
        assert_eq!([(); 3].map(|()| budget.reserve(5, 1)), [Room::Yes(fifteen), Room::Yes(fifteen), Room::Later]);
        budget.settle(fifteen, Some(&json!({"usage": {"prompt_tokens": 4, "completion_tokens": 0}})));
        budget.settle(fifteen, None);
        assert_eq!((budget.calls(), budget.dollars().map(|d| (d * 1e6).round())), (1, Some(4.0)));
        assert_eq!(budget.reserve(5, 3), Room::No, "it could cost more than is left");
        assert_eq!([(); 3].map(|()| budget.reserve(0, 0)), [Room::Yes(0.0), Room::Yes(0.0), Room::Later]);
        budget.settle(0.0, Some(&json!({})));
        budget.settle(0.0, Some(&json!({})));
        assert_eq!(budget.reserve(0, 0), Room::No, "three calls were answered");
    }

    #[test]
    fn usage_is_what_the_endpoint_says() {
        let response = json!({"usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}});
        assert_eq!(Usage::of(&response), Some(Usage { prompt: 7, cached: 3, completion: 2 }));
        assert_eq!(Usage::of(&json!({"usage": null})), None);
        assert_eq!(Usage::of(&json!({})), None);
        assert_eq!(Usage::of(&json!({"usage": {"total_tokens": 900}})), None);
        assert_eq!(Usage::of(&json!({"usage": {"prompt_tokens": 7}})), None);
    }

    #[test]
    fn an_answer_that_does_not_say_what_it_took_costs_what_was_reserved() {
        let price = Price { input: 1.0, cached_input: None, output: 10.0 };
        let budget = Budget::new(None, Some(30e-6), Some(price));
        for spent in [15.0, 30.0] {
            let Room::Yes(reserved) = budget.reserve(5, 1) else { panic!("{spent}: there is room") };
            budget.settle(reserved, Some(&json!({"choices": [], "usage": {"total_tokens": 0}})));
            assert_eq!(budget.dollars().map(|dollars| (dollars * 1e6).round()), Some(spent));
        }
        assert_eq!(budget.reserve(5, 1), Room::No);
    }

    /// What becomes of so many jobs, where `each` says what becomes of one, by one worker.
    fn ended(jobs: usize, each: impl Fn(usize) -> Result<(), End> + Sync) -> (Result<Ended, AskError>, usize) {
        let done = AtomicUsize::new(0);
        let interrupt = Interrupt::listen().expect("signals");
        let ended = all((0..jobs).collect(), 1, &interrupt, &|job, _, _| {
            done.fetch_add(1, Ordering::Relaxed);
            each(job)
        });
        (ended, done.into_inner())
    }

    #[test]
    fn who_refuses_is_there_and_who_says_nothing_is_gone() {
        let refused = |job: usize| End::Refused(format!("{job} is too long"));
        let (end, done) = ended(20, |job| Err(refused(job)));
        assert_eq!((end.expect("done"), done), (Ended::Done(20, Some("0 is too long".into())), 20));
        let silent = |_: usize| Err(End::Failed("there is no answer in time".into()));
        let (end, done) = ended(20, silent);
        assert!(matches!(end, Err(AskError::Gone(_))) && done == GONE, "{done}");
        // seven, and then a word of it
        let (end, done) = ended(20, |job| if job % GONE == 7 { Err(refused(job)) } else { silent(job) });
        assert_eq!((end.expect("done"), done), (Ended::Done(20, Some("there is no answer in time".into())), 20));
    }

    #[test]
    fn waiting_for_the_budget_takes_nothing_of_a_minutes_calls() {
        let calls = Calls { rpm: Some(1), ..Calls::of("http://127.0.0.1:1", None) };
        let (pace, budget) = (Pace::new(&calls), Budget::new(Some(1), None, None));
        let endpoint = Endpoint::new("http://127.0.0.1:1", &calls).expect("an endpoint");
        let interrupt = Interrupt::listen().expect("signals");
        let caller = Caller { endpoint: &endpoint, pace: &pace, budget: &budget, interrupt: &interrupt };
        let none = serde_json::Map::new();
        let chat = Chat {
            model: "m",
            messages: &[],
            temperature: None,
            max_tokens: 1,
            seed: None,
            form: None,
            extra_body: &none,
        };
        // a call is under way, and who waits for what it leaves is stopped
        assert_eq!(budget.reserve(0, 0), Room::Yes(0.0));
        let after_three_looks = || {
            let looks = std::cell::Cell::new(0);
            move || looks.replace(looks.get() + 1) >= 3
        };
        assert_eq!(caller.call(&chat, 1, &mut jitter(0), after_three_looks()), Err(NoAnswer::Stopped));
        assert!(pace.turn(1, after_three_looks()).is_some(), "the one call of this minute can still be made");
    }
}
