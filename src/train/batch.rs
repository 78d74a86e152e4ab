//! The examples of an update as packed micro-batches.

use crate::data::Dataset;
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

    fn sides(&self) -> impl Iterator<Item = &'d [u32]> {
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
    /// A pair's prompt is computed once for both completions. Not under dropout: both would see one mask.
    pub(super) share_prompts: bool,
    pub(super) prompt_span: PromptSpan,
}

impl Layout {
    pub(super) fn rows(self, item: &Item<'_>) -> usize {
        let lengths = item.sides().map(<[u32]>::len);
        if self.share_prompts {
            packed::rows(item.prompt.len(), &lengths.collect::<Vec<_>>())
        } else {
            lengths.map(|length| packed::rows(item.prompt.len(), &[length])).sum()
        }
    }

    /// Packs `items`; its spans are in the order of [`Layout::parts`].
    pub(super) fn pack(self, items: &[Item<'_>]) -> Packed {
        let mut packer = Packer::default();
        for item in items {
            let sides: Vec<_> = item.sides().collect();
            if self.share_prompts {
                packer.push(item.key, item.prompt, &sides, self.prompt_span);
                continue;
            }
            let mut prompt_span = self.prompt_span;
            for (side, completion) in sides.into_iter().enumerate() {
                packer.push(dropout::key(item.key, side as u64), item.prompt, &[completion], prompt_span);
                prompt_span = PromptSpan::No;
            }
        }
        packer.finish()
    }

    /// The spans of packed items: for each item its prompt, if that is scored, then chosen and rejected.
    pub(super) fn parts(self, items: &[Item<'_>]) -> Vec<(usize, Part)> {
        let of_item = |(i, item): (usize, &Item<'_>)| {
            let prompt = (self.prompt_span == PromptSpan::Yes).then_some(Part::Prompt);
            let chosen = item.chosen.map(|_| Part::Chosen);
            let rejected = item.rejected.map(|_| Part::Rejected);
            [prompt, chosen, rejected].into_iter().flatten().map(move |part| (i, part))
        };
        items.iter().enumerate().flat_map(of_item).collect()
    }

    /// Divides items into micro-batches of at most `budget` rows, by index. An item larger than that gets one of its
    /// own.
    ///
    /// First fit, the largest first; within a micro-batch and among them the order is that of the items, so that the
    /// same items always give the same micro-batches.
    pub(super) fn micro_batches(self, items: &[Item<'_>], budget: usize) -> Vec<Vec<usize>> {
        let rows: Vec<usize> = items.iter().map(|item| self.rows(item)).collect();
        let mut largest_first: Vec<usize> = (0..items.len()).collect();
        largest_first.sort_by_key(|&i| std::cmp::Reverse(rows[i]));
        let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
        for i in largest_first {
            match batches.iter_mut().find(|(filled, _)| filled + rows[i] <= budget) {
                Some((filled, batch)) => {
                    *filled += rows[i];
                    batch.push(i);
                }
                None => batches.push((rows[i], vec![i])),
            }
        }
        let mut batches: Vec<Vec<usize>> = batches.into_iter().map(|(_, batch)| batch).collect();
        for batch in &mut batches {
            batch.sort_unstable();
        }
        batches.sort_unstable();
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
        let tokens = [7; 12];
        // rows: 9, 3, 4, 1, 11
        let items = [item(&tokens[..10]), item(&tokens[..4]), item(&tokens[..5]), item(&tokens[..2]), item(&tokens)];
        let batches = LAYOUT.micro_batches(&items, 10);
        assert_eq!(batches, [vec![0, 3], vec![1, 2], vec![4]]);
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
        assert_eq!(packed.ids.len(), layout.rows(&pair));
        assert_eq!(LAYOUT.rows(&pair), 3);
    }
}
