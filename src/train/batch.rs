//! The examples of an update as packed micro-batches.

use std::collections::HashMap;

use crate::data::Dataset;
use crate::loss::Loss;
use crate::model::packed::{self, Packed, Packer, PromptSpan};
use crate::ops::dropout;

/// A prompt and the completions to score after it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item<'d> {
    /// Names it for dropout.
    pub(super) key: u64,
    pub(super) prompt: &'d [u32],
    pub(super) chosen: Option<&'d [u32]>,
    pub(super) rejected: Option<&'d [u32]>,
}

impl<'d> Item<'d> {
    /// Example number `index` of `data`.
    pub(super) fn example(data: &'d Dataset, index: usize) -> Self {
        let example = data.get(index);
        let (prompt, chosen, rejected) = (example.prompt, example.chosen, example.rejected);
        Self { key: index as u64, prompt, chosen, rejected }
    }

    pub(super) fn sides(&self) -> impl Iterator<Item = &'d [u32]> {
        [self.chosen, self.rejected].into_iter().flatten()
    }
}

/// What a span of a packed batch scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Prompt,
    Chosen,
    Rejected,
}

/// How items become rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// A prompt is computed once for all completions after it: both of a pair, and those of all items of a micro-batch
    /// with the same prompt.
    pub(super) share_prompts: bool,
    pub(super) prompt_span: PromptSpan,
}

impl Layout {
    pub(super) fn new(loss: &Loss, share_prompts: bool) -> Self {
        Self { share_prompts, prompt_span: if loss.scores_prompt() { PromptSpan::Yes } else { PromptSpan::No } }
    }

    /// Rows that `items` take together.
    pub(super) fn rows(self, items: &[Item<'_>]) -> usize {
        self.groups(items).map(|group| self.group_rows(group)).sum()
    }

    /// Rows of items that have one prompt.
    fn group_rows(self, group: &[Item<'_>]) -> usize {
        let (prompt, sides) = (group[0].prompt.len(), group.iter().flat_map(Item::sides).map(<[u32]>::len));
        if self.share_prompts {
            packed::rows(prompt, &sides.collect::<Vec<_>>())
        } else {
            sides.map(|side| packed::rows(prompt, &[side])).sum()
        }
    }

    /// Neighbours with the same prompt together, where prompts are shared; else each item by itself.
    fn groups<'i, 'd>(self, items: &'i [Item<'d>]) -> impl Iterator<Item = &'i [Item<'d>]> {
        items.chunk_by(move |a, b| self.share_prompts && a.prompt == b.prompt)
    }

    /// Packs `items`; its spans are in the order of [`Layout::parts`].
    pub(super) fn pack(self, items: &[Item<'_>]) -> Packed {
        let mut packer = Packer::default();
        for group in self.groups(items) {
            let Item { key, prompt, .. } = group[0];
            let sides: Vec<_> = group.iter().flat_map(Item::sides).collect();
            if self.share_prompts {
                packer.push(key, prompt, &sides, self.prompt_span);
                if self.prompt_span == PromptSpan::Yes {
                    group[1..].iter().for_each(|_| packer.repeat_prompt());
                }
                continue;
            }
            let mut prompt_span = self.prompt_span;
            for (side, completion) in sides.into_iter().enumerate() {
                packer.push(dropout::key(key, side as u64), prompt, &[completion], prompt_span);
                prompt_span = PromptSpan::No;
            }
        }
        packer.finish()
    }

    /// The spans of packed items. For each group: the first item's prompt, if that is scored, then chosen and rejected
    /// of every item, then the prompt once more for each further item.
    pub(super) fn parts(self, items: &[Item<'_>]) -> Vec<(usize, Part)> {
        let (mut parts, mut start) = (Vec::new(), 0);
        for group in self.groups(items) {
            let prompts = match self.prompt_span {
                PromptSpan::Yes => start..start + group.len(),
                PromptSpan::No => start..start,
            };
            let mut prompts = prompts.map(|i| (i, Part::Prompt));
            parts.extend(prompts.next());
            for (i, item) in (start..).zip(group) {
                parts.extend(item.chosen.map(|_| (i, Part::Chosen)));
                parts.extend(item.rejected.map(|_| (i, Part::Rejected)));
            }
            parts.extend(prompts);
            start += group.len();
        }
        parts
    }

    /// Divides items into micro-batches of at most `budget` rows, by index. Items that share a prompt stay together; if
    /// they are larger than that, they are cut between items, and an item that is larger gets a micro-batch of its own.
    ///
    /// First fit, the largest first; within a micro-batch and among them the order is that of the items, those with the
    /// prompt of an earlier one right after it, so that the same items always give the same micro-batches.
    pub(super) fn micro_batches(self, items: &[Item<'_>], budget: usize) -> Vec<Vec<usize>> {
        let mut first_with = HashMap::new();
        let first: Vec<usize> = match self.share_prompts {
            true => items.iter().enumerate().map(|(i, item)| *first_with.entry(item.prompt).or_insert(i)).collect(),
            false => (0..items.len()).collect(),
        };
        let mut in_order: Vec<usize> = (0..items.len()).collect();
        in_order.sort_by_key(|&i| first[i]);

        let mut units: Vec<(usize, Vec<usize>)> = Vec::new();
        for &i in &in_order {
            let rows = self.group_rows(&items[i..=i]);
            let more = rows - items[i].prompt.len();
            match units.last_mut() {
                Some((filled, unit)) if first[unit[0]] == first[i] && *filled + more <= budget => {
                    *filled += more;
                    unit.push(i);
                }
                _ => units.push((rows, vec![i])),
            }
        }
        units.sort_by_key(|(rows, _)| std::cmp::Reverse(*rows));
        let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
        for (rows, unit) in units {
            match batches.iter_mut().find(|(filled, _)| filled + rows <= budget) {
                Some((filled, batch)) => {
                    *filled += rows;
                    batch.extend(unit);
                }
                None => batches.push((rows, unit)),
            }
        }
        let mut batches: Vec<Vec<usize>> = batches.into_iter().map(|(_, batch)| batch).collect();
        for batch in &mut batches {
            batch.sort_unstable_by_key(|&i| (first[i], i));
        }
        batches.sort_unstable_by_key(|batch| (first[batch[0]], batch[0]));
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { share_prompts: true, prompt_span: PromptSpan::No };

    fn item(tokens: &[u32]) -> Item<'_> {
        Item { key: 0, prompt: &tokens[..1], chosen: Some(&tokens[1..]), rejected: None }
    }

    #[test]
    fn micro_batches_hold_every_item_once_within_the_budget() {
        let tokens: Vec<u32> = (0..16).collect();
        // rows: 9, 3, 4, 1, 11, each after another prompt
        let items = [(0, 10), (1, 4), (2, 5), (3, 2), (4, 12)].map(|(at, length)| item(&tokens[at..at + length]));
        let batches = LAYOUT.micro_batches(&items, 10);
        assert_eq!(batches, [vec![0, 3], vec![1, 2], vec![4]]);
    }

    #[test]
    fn one_prompt_stays_together_as_long_as_it_fits() {
        let pair = |prompt, chosen, rejected| Item { key: 0, prompt, chosen: Some(chosen), rejected: Some(rejected) };
        let items = [
            pair(&[1, 2, 3], &[4, 5, 6], &[7]),
            pair(&[1, 2], &[3, 4], &[5, 6]),
            pair(&[1, 2, 3], &[8, 9], &[4, 5]),
            pair(&[1, 2, 3], &[5], &[6, 6]),
        ];
        // rows: 5, 4, 2 more, 1 more
        let unshared = Layout { share_prompts: false, ..LAYOUT };
        for (layout, budget, expected) in [
            (LAYOUT, 12, vec![vec![0, 2, 3, 1]]),
            (LAYOUT, 11, vec![vec![0, 2, 3], vec![1]]),
            // the first prompt is too large as a whole: 7, then the last pair's 4 beside the 4 of the other prompt
            (LAYOUT, 8, vec![vec![0, 2, 3], vec![1]]),
            (LAYOUT, 7, vec![vec![0, 2], vec![3], vec![1]]),
            (LAYOUT, 1, vec![vec![0], vec![2], vec![3], vec![1]]),
            (unshared, 100, vec![vec![0, 1, 2, 3]]),
        ] {
            assert_eq!(layout.micro_batches(&items, budget), expected, "{budget}");
        }
        let batch = [items[0], items[2], items[3], items[1]];
        assert_eq!(LAYOUT.rows(&batch), 12);
        let layout = Layout { prompt_span: PromptSpan::Yes, ..LAYOUT };
        let packed = layout.pack(&batch);
        assert_eq!(packed.ids, [1, 2, 3, 4, 5, 8, 4, 6, 1, 2, 3, 5]);
        assert_eq!(packed.tokens, (6 + 4) + (5 + 5) + (4 + 5) + (4 + 4));
        // the shared prompt is scored once, and a span for each of its items
        use Part::{Chosen, Prompt, Rejected};
        let group = [(0, Prompt), (0, Chosen), (0, Rejected), (1, Chosen), (1, Rejected), (2, Chosen), (2, Rejected)];
        let rest = [(1, Prompt), (2, Prompt), (3, Prompt), (3, Chosen), (3, Rejected)];
        assert_eq!(layout.parts(&batch), [&group[..], &rest[..]].concat());
        assert_eq!(packed.spans[..3], [0..2, 2..5, 5..6]);
        assert_eq!(packed.spans[7..10], [0..2, 0..2, 13..14]);
        assert_eq!(packed.targets.len(), 2 + 4 + 4 + 3 + 1 + 4);
    }

    #[test]
    fn an_unshared_prompt_is_there_twice_and_scored_once() {
        let pair = Item { key: 0, prompt: &[1, 2], chosen: Some(&[3]), rejected: Some(&[4, 5]) };
        let layout = Layout { share_prompts: false, prompt_span: PromptSpan::Yes };
        let packed = layout.pack(&[pair]);
        assert_eq!(packed.ids, [1, 2, 1, 2, 4]);
        assert_eq!(packed.targets, [2, 3, 4, 5]);
        let parts = layout.parts(&[pair]).into_iter().map(|(_, part)| part).collect::<Vec<_>>();
        assert_eq!(parts, [Part::Prompt, Part::Chosen, Part::Rejected]);
        // the prompt's span comes with the chosen side, the rejected side's last
        assert_eq!(packed.spans, [0..1, 1..2, 2..4]);
        assert_eq!(packed.ids.len(), layout.rows(&[pair]));
        assert_eq!(LAYOUT.rows(&[pair]), 3);
    }
}
