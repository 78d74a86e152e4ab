//! A model judges: what is open is asked, what was answered is read.

use std::collections::{BTreeMap, BTreeSet};

use miette::{Diagnostic, miette};
use serde_json::Value;
use thiserror::Error;

use super::place::Place;
use super::{Failure, failed, interrupted, request};
use crate::cli;
use crate::interrupt::Interrupt;
use crate::judge::ask::{AskError, Asking, Budget, Caller, Ended, Known, Question, Usage, shown};
use crate::judge::endpoint::Endpoint;
use crate::judge::log::{Busy, Log};
use crate::judge::pace::Pace;
use crate::judge::report::{Cost, Judged, Pair, Said};
use crate::judge::verdict::Form;
use crate::judge::{Calls, EndpointJudge};
use crate::progress::{Console, short, thousands};
use crate::statistics::{Order, Votes};

#[derive(Debug, Error, Diagnostic)]
enum JudgingError {
    #[error("nobody answers at {0}: {1}")]
    #[diagnostic(help("is it running, and is the address right?"))]
    NotThere(String, String),
    #[error("the judge prompt `{prompt}` shows a reference answer, and {missing} of {prompts} prompts have none")]
    #[diagnostic(help("rows of prompts may have a `reference`; other judge prompts need none"))]
    NoReference { prompt: String, missing: usize, prompts: usize },
}

/// A judge that can be called, and its answers so far.
pub(super) struct Judging<'a> {
    judge: &'a EndpointJudge,
    endpoint: Endpoint,
    pace: Pace,
    workers: usize,
    budget: Budget,
    log: Log,
}

impl<'a> Judging<'a> {
    /// Finds out whether the judge can be asked at all: the key is there, the folder is nobody else's, and a small question
    /// is answered.
    pub(super) fn new(
        judge: &'a EndpointJudge,
        calls: &Calls,
        arguments: &cli::WinRate,
        place: &Place,
        console: &Console,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let endpoint = Endpoint::new(&judge.base_url, calls).map_err(request)?;
        if endpoint.sends_key_openly() {
            console.warning("the key goes over the network unencrypted: the endpoint's address begins with http://");
        }
        place.make()?;
        let log = Log::open(&place.judgements(), Busy::Refuse, console).map_err(failed)?;
        let cli::JudgeArguments { max_calls, max_cost, .. } = arguments.judge;
        let budget = Budget::new(max_calls, max_cost, judge.price);
        let mut judging = Self { judge, endpoint, pace: Pace::new(calls), workers: calls.concurrency, budget, log };
        // before answers are made it is asked anew; later, what is open will tell
        let known = place.has_answers() || arguments.stage == Some(cli::Stage::Judge);
        let (asking, log) = judging.asking(interrupt);
        let asked = asking.canary(log, known);
        if asked.is_err() && log.entries().is_empty() {
            // nothing was begun
            let _ = std::fs::remove_file(place.judgements());
            let _ = std::fs::remove_dir(place.path());
        }
        let problem = asked.map_err(|error| match error {
            // another address, key or model has to be asked for
            AskError::Fatal { .. } => request(error),
            AskError::Gone(problem) => failed(JudgingError::NotThere(judge.base_url.clone(), problem)),
            other => of_asking(other),
        })?;
        if let Some(problem) = problem {
            console.warning(format_args!("a small question to the judge has no verdict: {problem}"));
        }
        judging.tell_changes(&[], console);
        Ok(judging)
    }

    /// Says what the endpoint does not take, but for what was said already.
    fn tell_changes(&self, told: &[&str], console: &Console) {
        for change in self.endpoint.changes().iter().filter(|change| !told.contains(change)) {
            console.line(format_args!("the endpoint is asked otherwise: {change}"));
        }
    }

    fn asking<'s>(&'s mut self, interrupt: &'s Interrupt) -> (Asking<'s>, &'s mut Log) {
        let Self { judge, endpoint, pace, budget, log, .. } = self;
        (Asking { judge, caller: Caller { endpoint, pace, budget, interrupt } }, log)
    }

    /// Asks everything that is open.
    pub(super) fn judge(
        &mut self,
        pairs: &[Pair<'_>],
        refresh: bool,
        console: &Console,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        check_references(self.judge, pairs.iter().map(|pair| pair.policy.reference.is_some()))?;
        let judged: Vec<usize> = (0..pairs.len()).filter(|&i| !pairs[i].is_identical()).collect();
        let mut open = Vec::new();
        let mut read = 0;
        for order in Order::BOTH {
            for &pair in &judged {
                let shown = shown(&pairs[pair], order);
                let known = |log: &Log| {
                    let known = self.judge.known(&shown, |key| log.get(key).cloned());
                    known.map_err(|problem| failed(AskError::Template(problem)))
                };
                let mut is = known(&self.log)?;
                if let (Known::Invalid(_, keys), true) = (&is, refresh) {
                    keys.iter().for_each(|key| self.log.forget(key));
                    is = known(&self.log)?;
                }
                if let Known::Open(asked) = is {
                    read += asked.bytes() / 4;
                    open.push(Question { pair, order });
                }
            }
        }
        // both orders of a prompt one after the other, so that what is stopped early has whole prompts
        open.sort_by_key(|question| question.pair);
        let all = 2 * judged.len();
        self.announce(pairs.len(), all, open.len(), read, console);
        if open.is_empty() {
            return Ok(());
        }
        interrupt.save_first();
        let count = open.len();
        let changes = self.endpoint.changes();
        let ended = {
            let bar = console.count_bar("verdicts", count as u64);
            let workers = self.workers;
            let (asking, log) = self.asking(interrupt);
            asking.all(pairs, open, workers, log, &bar).map_err(of_asking)?
        };
        self.tell_changes(&changes, console);
        let spent = self.budget.dollars().map(|dollars| format!(", ${dollars:.4}")).unwrap_or_default();
        console.fact("judge", format_args!("{} calls were answered{spent}", thousands(self.budget.calls() as usize)));
        match ended {
            Ended::Done(0, _) => Ok(()),
            Ended::Done(failed, why) => {
                let why = why.unwrap_or_default();
                console.warning(format_args!("{failed} questions have no answer; the first: {why}"));
                Ok(())
            }
            Ended::Spent => {
                console.line("\nthe budget is spent; what was answered is kept, and the same command goes on");
                Err(Failure::Unfinished)
            }
            Ended::Interrupted(code) => Err(interrupted(code, console)),
        }
    }

    /// What will be done and what it may cost, before it is.
    fn announce(&self, prompts: usize, all: usize, open: usize, read: u64, console: &Console) {
        // a verdict with a sentence or two; one token where it is a probability
        let written = open as u64 * if self.judge.form == Form::Logprob { 1 } else { 150 };
        let cost =
            self.judge.price.map(|price| format!(", ≈ ${:.2}", price.of(read, 0, written))).unwrap_or_default();
        let identical = prompts - all / 2;
        let identical = if identical > 0 { format!(" ({} identical)", thousands(identical)) } else { String::new() };
        console.fact(
            "judge",
            format_args!(
                "{} prompts{identical} × 2 orders = {} calls, {} cached, ≈ {} tokens in and {} out{cost}",
                thousands(prompts),
                thousands(all),
                thousands(all - open),
                short(read as usize),
                short(written as usize),
            ),
        );
    }
}

/// Whether every prompt has a good answer, where the judge is shown one; `references` says it of each.
pub(super) fn check_references(judge: &EndpointJudge, references: impl Iterator<Item = bool>) -> Result<(), Failure> {
    let references: Vec<bool> = references.collect();
    let missing = references.iter().filter(|has| !**has).count();
    if missing > 0 && judge.prompt.needs_reference() {
        let prompt = judge.prompt.name.clone();
        return Err(request(JudgingError::NoReference { prompt, missing, prompts: references.len() }));
    }
    Ok(())
}

/// What the answers of the judge mean, and what they cost. Nothing is asked.
pub(super) fn read(
    judge: &EndpointJudge,
    pairs: &[Pair<'_>],
    entries: &BTreeMap<String, Value>,
) -> Result<(Vec<Judged>, Cost), Failure> {
    let mut used: BTreeSet<String> = BTreeSet::new();
    let mut cost = Cost::default();
    let mut judged = Vec::with_capacity(pairs.len());
    for pair in pairs {
        if pair.is_identical() {
            judged.push(Judged::Identical);
            continue;
        }
        let (mut votes, mut said, mut open) = (Votes::default(), Vec::new(), false);
        for order in Order::BOTH {
            let known = judge.known(&shown(pair, order), |key| entries.get(key).cloned());
            let (verdict, reason, keys) = match known.map_err(|problem| failed(AskError::Template(problem)))? {
                Known::Understood(understood, keys) => {
                    let vote = Some(order.policy(understood.vote));
                    match order {
                        Order::PolicyFirst => votes.first = vote,
                        Order::PolicySecond => votes.second = vote,
                    }
                    (understood.verdict, understood.reason, keys)
                }
                Known::Invalid(problem, keys) => ("invalid".into(), Some(problem), keys),
                Known::Open(_) => {
                    open = true;
                    continue;
                }
            };
            cost.reasked += keys.len() - 1;
            for key in keys {
                if !used.insert(key) {
                    cost.cached += 1;
                }
            }
            said.push(Said { order: order.number(), verdict, reason });
        }
        judged.push(match (votes.score(), open) {
            (Some(_), _) => Judged::Votes(votes, said),
            (None, true) => Judged::Missing(votes, said),
            (None, false) => Judged::Invalid(votes, said),
        });
    }
    // the small question at the start was paid for too; other judges of the same folder have their own
    let small = judge.small_question().map_err(|problem| failed(AskError::Template(problem)))?.key;
    used.extend(entries.contains_key(&small).then_some(small));
    for key in &used {
        match entries.get(key).and_then(|entry| Usage::of(entry.get("response")?)) {
            Some(usage) => {
                cost.prompt_tokens += usage.prompt;
                cost.cached_tokens += usage.cached;
                cost.completion_tokens += usage.completion;
            }
            None => cost.without_usage += 1,
        }
    }
    cost.calls = used.len();
    cost.dollars = judge.price.map(|price| price.of(cost.prompt_tokens, cost.cached_tokens, cost.completion_tokens));
    Ok((judged, cost))
}

fn of_asking(error: AskError) -> Failure {
    match error {
        AskError::Template(problem) => Failure::Request(miette!("the judge's prompt: {problem}")),
        other => failed(other),
    }
}
