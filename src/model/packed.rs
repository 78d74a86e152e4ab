//! One packed batch: many sequences as rows of one matrix.

use std::ops::Range;

use crate::ops::attention::{Segment, Segments};
use crate::ops::dropout;

/// Rows of a forward pass and the tokens to score at them.
///
/// A prompt with its branches (completions) is one group of rows: the prompt once, then each branch without its last
/// token, which predicts nothing. Every branch attends to the prompt and to itself; positions go on after the prompt
/// in each. The row of the prompt's last token predicts the first token of every branch.
///
/// ```text
/// rows       p0 p1 p2 | c0 c1    | r0 r1 r2       prompt p0 p1 p2, branches c0 c1 c2 and r0 r1 r2 r3
/// position    0  1  2 |  3  4    |  3  4  5
/// scores            c0 r0| c1 c2 | r1 r2 r3
/// ```
#[derive(Debug, Clone, Default)]
pub struct Packed {
    /// Token of each row.
    pub ids: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Who attends to whom.
    pub segments: Segments,
    /// Names each row for dropout.
    pub row_keys: Vec<u64>,
    /// Rows that score something, by span; a row may stand in several spans.
    pub scored_rows: Vec<u32>,
    /// The token scored at each of `scored_rows`.
    pub targets: Vec<u32>,
    /// Ranges of `scored_rows`, one for each completion (or prompt) that was asked for; the same one for the prompt of
    /// several examples.
    pub spans: Vec<Range<usize>>,
    /// Tokens of the sequences, prompt and completion, shared prompts counted for each.
    pub tokens: usize,
}

/// The rows that the last layer computes past its keys and values: nothing but a scored row leaves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LastRows {
    /// Rows of the batch, ascending.
    pub(super) rows: Vec<u32>,
    /// The segments, with queries counted among `rows`.
    pub(super) segments: Segments,
    /// Where each scored row stands among `rows`.
    pub(super) scored: Vec<u32>,
}

impl Packed {
    /// For each row, the tokens of the longest sequence of its group, the last token, which has no row, among them.
    pub(super) fn lengths(&self) -> Vec<usize> {
        let mut lengths = vec![0; self.ids.len()];
        for group in self.segments.groups() {
            let rows = || group.iter().flat_map(|segment| segment.queries.clone());
            let longest = rows().map(|row| self.positions[row] as usize + 2).max().unwrap_or(0);
            rows().for_each(|row| lengths[row] = longest);
        }
        lengths
    }

    /// `None` where every row goes on.
    pub(super) fn last_rows(&self) -> Option<LastRows> {
        let mut is_scored = vec![false; self.ids.len()];
        self.scored_rows.iter().for_each(|&row| is_scored[row as usize] = true);
        let (mut rows, mut place) = (Vec::new(), vec![0; self.ids.len()]);
        let mut keep = |segment: &Segment| {
            // queries are the last of a segment's own rows, so the first ones can be left out
            let first = segment.queries.clone().find(|&row| is_scored[row])?;
            let start = rows.len();
            rows.extend(first as u32..segment.queries.end as u32);
            for (place, at) in place[first..segment.queries.end].iter_mut().zip(start as u32..) {
                *place = at;
            }
            Some(Segment { queries: start..rows.len(), ..segment.clone() })
        };
        let groups = self.segments.groups().iter();
        let groups = groups.map(|group| group.iter().filter_map(&mut keep).collect()).collect();
        let scored = self.scored_rows.iter().map(|&row| place[row as usize]).collect();
        (rows.len() < self.ids.len()).then(|| LastRows { rows, segments: Segments::new(groups), scored })
    }
}

/// Builds a [`Packed`] batch.
#[derive(Debug, Default)]
pub struct Packer {
    packed: Packed,
    groups: Vec<Vec<Segment>>,
    /// The span of the prompt last scored.
    prompt: Range<usize>,
}

/// Whether a prompt's own tokens are scored too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptSpan {
    /// Only the branches are scored.
    No,
    /// A span for the prompt, all but its first token, comes before the spans of the branches.
    Yes,
}

impl Packer {
    /// Adds a prompt and its branches, each scored as one span in the order given.
    ///
    /// `key` names the sequence for dropout.
    ///
    /// # Panics
    /// For an empty prompt or branch: nothing would predict the first token, or nothing would be predicted. The data
    /// stage lets neither through.
    pub fn push(&mut self, key: u64, prompt: &[u32], branches: &[&[u32]], prompt_span: PromptSpan) {
        assert!(!prompt.is_empty(), "an empty prompt predicts nothing");
        let start = self.packed.ids.len();
        let mut group = vec![self.rows(key, prompt, 0..0, 0)];
        if prompt_span == PromptSpan::Yes {
            self.prompt = self.span((start..start + prompt.len() - 1).zip(&prompt[1..]));
        }
        let last = start + prompt.len() - 1;
        for branch in branches {
            assert!(!branch.is_empty(), "an empty branch scores nothing");
            let first = self.packed.ids.len();
            let rows = &branch[..branch.len() - 1];
            let segment = self.rows(key, rows, start..last + 1, prompt.len());
            self.span(std::iter::once(last).chain(first..).zip(branch.iter()));
            if !segment.queries.is_empty() {
                group.push(segment);
            }
            self.packed.tokens += prompt.len() + branch.len();
        }
        // one branch is simply the rest of one causal sequence
        if let [prompt, branch] = &group[..] {
            let rows = prompt.queries.start..branch.queries.end;
            group = vec![Segment { queries: rows.clone(), prefix: 0..0, own: rows }];
        }
        self.groups.push(group);
    }

    /// Names the span of the prompt last scored once more, for another example that has it; its rows are scored once.
    pub fn repeat_prompt(&mut self) {
        self.packed.spans.push(self.prompt.clone());
    }

    fn rows(&mut self, key: u64, ids: &[u32], prefix: Range<usize>, position: usize) -> Segment {
        let start = self.packed.ids.len();
        self.packed.ids.extend_from_slice(ids);
        for position in position..position + ids.len() {
            self.packed.positions.push(position as u32);
            self.packed.row_keys.push(dropout::key(key, position as u64));
        }
        let rows = start..start + ids.len();
        Segment { queries: rows.clone(), prefix, own: rows }
    }

    fn span<'t>(&mut self, scored: impl Iterator<Item = (usize, &'t u32)>) -> Range<usize> {
        let start = self.packed.targets.len();
        for (row, &target) in scored {
            self.packed.scored_rows.push(row as u32);
            self.packed.targets.push(target);
        }
        let span = start..self.packed.targets.len();
        self.packed.spans.push(span.clone());
        span
    }

    /// The batch.
    #[must_use]
    pub fn finish(self) -> Packed {
        Packed { segments: Segments::new(self.groups), ..self.packed }
    }
}

/// How many rows a prompt and its branches take.
#[must_use]
pub fn rows(prompt: usize, branches: &[usize]) -> usize {
    prompt + branches.iter().map(|branch| branch - 1).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_prompt_is_laid_out_as_documented() {
        let mut packer = Packer::default();
        packer.push(1, &[1, 2, 3], &[&[10, 11, 12], &[20, 21, 22, 23]], PromptSpan::No);
        let packed = packer.finish();
        assert_eq!(packed.ids, [1, 2, 3, 10, 11, 20, 21, 22]);
        assert_eq!(packed.positions, [0, 1, 2, 3, 4, 3, 4, 5]);
        assert_eq!(packed.scored_rows, [2, 3, 4, 2, 5, 6, 7]);
        assert_eq!(packed.targets, [10, 11, 12, 20, 21, 22, 23]);
        assert_eq!(packed.spans, [0..3, 3..7]);
        assert_eq!(packed.tokens, 13);
        let groups = packed.segments.groups();
        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0][1], Segment { queries: 3..5, prefix: 0..3, own: 3..5 });
        assert_eq!(groups[0][2], Segment { queries: 5..8, prefix: 0..3, own: 5..8 });
        assert_eq!(packed.ids.len(), rows(3, &[3, 4]));
    }

    #[test]
    fn the_last_layer_leaves_out_what_scores_nothing() {
        let mut packer = Packer::default();
        packer.push(1, &[1, 2, 3], &[&[10, 11, 12], &[20, 21]], PromptSpan::No);
        packer.push(2, &[4, 5], &[&[6, 7]], PromptSpan::No);
        let last = packer.finish().last_rows().expect("prompts score nothing but their last row");
        assert_eq!(last.rows, [2, 3, 4, 5, 7, 8]);
        assert_eq!(last.scored, [0, 1, 2, 0, 3, 4, 5]);
        let queries: Vec<_> =
            last.segments.groups().iter().flatten().map(|s| (s.queries.clone(), s.own.clone())).collect();
        assert_eq!(queries, [(0..1, 0..3), (1..3, 3..5), (3..4, 5..6), (4..6, 6..9)]);

        let mut packer = Packer::default();
        packer.push(1, &[1, 2], &[&[3, 4], &[5, 6]], PromptSpan::Yes);
        assert_eq!(packer.finish().last_rows(), None);
    }

    #[test]
    fn one_branch_is_one_causal_segment_and_the_mask_covers_exactly_the_completion() {
        let mut packer = Packer::default();
        packer.push(1, &[7], &[&[8]], PromptSpan::No);
        packer.push(2, &[1, 2], &[&[3, 4, 5]], PromptSpan::Yes);
        let packed = packer.finish();
        assert_eq!(packed.ids, [7, 1, 2, 3, 4]);
        assert_eq!(packed.spans, [0..1, 1..2, 2..5]);
        assert_eq!(packed.targets, [8, 2, 3, 4, 5]);
        assert_eq!(packed.scored_rows, [0, 1, 2, 3, 4]);
        let segment = Segment { queries: 1..5, prefix: 0..0, own: 1..5 };
        assert_eq!(packed.segments.groups()[1], [segment]);
    }
}
