//! Log-probabilities of given tokens: what `echo` with `logprobs` asks for.
//!
//! The prompts of one request are packed into few forward passes, and a beginning that several of them share (the
//! question before each of its answers) is computed once. Prompts of different requests are never packed together, so
//! what a request gets does not depend on what else is served.

use candle_core::{DType, Result};
use rayon::prelude::*;

use super::engine::TokenLogprob;
use crate::model::{Adapter, Keep, Model, Packed, Packer, PromptSpan};

/// Rows of one forward pass, unless a single prompt has more, or prompts with a long beginning in common: enough for
/// products of full speed, few enough that answers beside it do not wait long.
const ROWS: usize = 1024;
/// Rows whose logits are held at once where more than the most probable token is asked for.
const CHUNK: usize = 32;

/// The scores of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scored {
    /// Which prompt.
    pub(super) prompt: usize,
    /// Of its ids, from the second on.
    pub(super) tokens: Vec<TokenLogprob>,
    /// The most probable token after it.
    pub(super) next: TokenLogprob,
}

/// Prompts with a common beginning.
#[derive(Debug, Clone, PartialEq)]
struct Group {
    /// Ids that all of them begin with, at least one.
    shared: usize,
    /// Which prompts.
    members: Vec<usize>,
}

/// Prompts to score, and how far that is.
#[derive(Debug)]
pub(super) struct Scoring {
    prompts: Vec<Vec<u32>>,
    /// Most probable tokens of each position that are wanted.
    top: usize,
    /// What is left, in reverse order.
    passes: Vec<Vec<Group>>,
}

impl Scoring {
    /// None of the prompts may be empty.
    pub(super) fn new(prompts: Vec<Vec<u32>>, top: usize) -> Self {
        let mut passes: Vec<Vec<Group>> = Vec::new();
        let mut rows = ROWS;
        for group in groups(&prompts) {
            let own = group.rows(&prompts);
            match passes.last_mut() {
                Some(pass) if rows + own <= ROWS => pass.push(group),
                _ => {
                    passes.push(vec![group]);
                    rows = 0;
                }
            }
            rows += own;
        }
        passes.reverse();
        Self { prompts, top, passes }
    }

    /// Whether all of it was scored.
    pub(super) fn is_done(&self) -> bool {
        self.passes.is_empty()
    }

    /// One forward pass: the scores of some of the prompts.
    ///
    /// # Errors
    /// What candle returns.
    pub(super) fn step(&mut self, model: &Model, adapter: Adapter) -> Result<Vec<Scored>> {
        let Some(pass) = self.passes.pop() else { return Ok(Vec::new()) };
        let mut packer = Packer::default();
        for Group { shared, members } in &pass {
            // which token comes after a prompt is not known, and need not be: the row's distribution is the same
            // whatever is scored there
            let branch = |&prompt: &usize| self.prompts[prompt][*shared..].iter().copied().chain([0]).collect();
            let branches: Vec<Vec<u32>> = members.iter().map(branch).collect();
            let branches: Vec<&[u32]> = branches.iter().map(Vec::as_slice).collect();
            packer.push(0, &self.prompts[members[0]][..*shared], &branches, PromptSpan::Yes);
        }
        let batch = packer.finish();
        let rows = rows(model, adapter, &batch, self.top)?;
        let mut spans = batch.spans.iter().map(|span| &rows[span.clone()]);
        let mut scored = Vec::new();
        for Group { members, .. } in &pass {
            let shared = spans.next().unwrap_or_default();
            for &prompt in members {
                let Some((last, own)) = spans.next().and_then(<[Row]>::split_last) else { continue };
                let tokens = shared.iter().chain(own).map(|row| row.target.clone()).collect();
                let (id, logp) = last.best;
                scored.push(Scored { prompt, tokens, next: TokenLogprob { id, logp, top: last.target.top.clone() } });
            }
        }
        Ok(scored)
    }
}

impl Group {
    /// Rows that a forward pass has for it.
    fn rows(&self, prompts: &[Vec<u32>]) -> usize {
        self.shared + self.members.iter().map(|&prompt| prompts[prompt].len() - self.shared).sum::<usize>()
    }
}

/// Puts prompts together that begin alike, where that saves rows, and as far as one pass has room for what follows their
/// beginning.
fn groups(prompts: &[Vec<u32>]) -> Vec<Group> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by(|&a, &b| prompts[a].cmp(&prompts[b]));
    let mut groups: Vec<Group> = Vec::new();
    // ids of the last group's members
    let mut all = 0;
    for prompt in order {
        let ids = &prompts[prompt];
        if let Some(group) = groups.last_mut() {
            let beginning = &prompts[group.members[0]][..group.shared];
            let common = beginning.iter().zip(ids).take_while(|(a, b)| a == b).count();
            // the members so far have to compute by themselves what is not common to all any more; and what shares little
            // may share more with the next one
            let saves = 2 * common >= ids.len() && common > (group.members.len() - 1) * (group.shared - common);
            let own = all + ids.len() - (group.members.len() + 1) * common;
            if saves && own <= ROWS && group.members.len() < ROWS {
                group.shared = common;
                group.members.push(prompt);
                all += ids.len();
                continue;
            }
        }
        all = ids.len();
        groups.push(Group { shared: ids.len(), members: vec![prompt] });
    }
    groups
}

/// What a scored row gave.
struct Row {
    target: TokenLogprob,
    best: (u32, f64),
}

fn rows(model: &Model, adapter: Adapter, batch: &Packed, top: usize) -> Result<Vec<Row>> {
    if top <= 1 {
        let scores = model.forward(batch, adapter, Keep::Scores)?.scores;
        let row = |(score, &id): (&crate::ops::completion_logps::TokenScore, &u32)| {
            let best = (score.best, score.best_logp);
            let top = if top == 1 { vec![best] } else { Vec::new() };
            Row { target: TokenLogprob { id, logp: score.logp, top }, best }
        };
        return Ok(scores.iter().zip(&batch.targets).map(row).collect());
    }
    let hidden = model.decoder().hidden(batch, model.switched(adapter))?;
    let mut rows = Vec::with_capacity(batch.targets.len());
    for (chunk, targets) in batch.targets.chunks(CHUNK).enumerate() {
        let hidden = hidden.narrow(0, chunk * CHUNK, targets.len())?;
        let logits = model.decoder().head().logits(&hidden)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let row = |(logits, &id): (&Vec<f32>, &u32)| {
            let target = TokenLogprob::of(logits, id, top);
            Row { best: target.top.first().copied().unwrap_or((id, target.logp)), target }
        };
        rows.par_extend(logits.par_iter().zip(targets).map(row));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_computed_once_for_all_of_its_answers() {
        let prompts: Vec<Vec<u32>> =
            [&[1, 2, 3, 4, 9][..], &[7, 8], &[1, 2, 3, 5], &[1, 2, 3, 4, 9], &[1, 2, 3, 6, 6, 6]]
                .iter()
                .map(|ids| ids.to_vec())
                .collect();
        let groups = groups(&prompts);
        assert_eq!(groups[0], Group { shared: 3, members: vec![0, 3, 2, 4] });
        assert_eq!(groups[1], Group { shared: 2, members: vec![1] });
        assert_eq!(groups[0].rows(&prompts), 3 + 2 + 2 + 1 + 3);
        // sharing one id of two long prompts would save nothing worth a third of theirs
        let long = |first: u32| (0..50).map(|i| if i == 0 { first } else { 60 }).collect::<Vec<u32>>();
        let prompts = [long(1), long(1), [1].into(), [2].into()];
        let found: Vec<usize> = super::groups(&prompts).iter().map(|group| group.shared).collect();
        assert_eq!(found, [1, 50, 1]);
    }

    #[test]
    fn a_long_request_is_many_passes() {
        // 2048 prompts of one beginning, and as many that are the same
        let prompts = |own: u32| -> Vec<Vec<u32>> {
            (0..2048).map(|i| (0..100).map(|at| if at < 60 { at } else { i * own }).collect()).collect()
        };
        // what is the same for all is computed once, and one pass has room for it
        for (prompts, least, passes) in [(prompts(1), 2048 * 40 / ROWS, 2048 * 40 / ROWS), (prompts(0), 2, 1)] {
            let groups = groups(&prompts);
            assert!((least..=least + 8).contains(&groups.len()), "{}", groups.len());
            assert!(groups.iter().all(|group| group.rows(&prompts) <= ROWS + 60 && group.members.len() <= ROWS));
            let mut all: Vec<usize> = groups.iter().flat_map(|group| group.members.clone()).collect();
            all.sort_unstable();
            assert_eq!(all, (0..2048).collect::<Vec<_>>());
            assert!(Scoring::new(prompts, 0).passes.len() >= passes);
        }
        // a long question is computed once for its answers all the same
        let long: Vec<Vec<u32>> =
            (0..4).map(|i| (0..3001).map(|at| if at < 3000 { at } else { i }).collect()).collect();
        assert_eq!(groups(&long), [Group { shared: 3000, members: vec![0, 1, 2, 3] }]);
    }
}
