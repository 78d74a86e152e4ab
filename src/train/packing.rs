//! What an epoch costs in rows: what packing and shared prompts save on the data at hand.

use super::Plan;
use super::batch::{Item, Layout};
use crate::data::Dataset;
use crate::loss::Loss;

/// The first epoch of a run, update by update and micro-batch by micro-batch as the run will make them. No model is
/// needed.
///
/// The sharing factor of the data is `rows_unshared / rows_shared`, the padding factor at a device batch
/// `padded_tokens / logical_tokens`.
#[derive(Debug, Clone, PartialEq)]
pub struct PackingFacts {
    /// Updates of an epoch.
    pub updates: usize,
    /// Tokens of all prompts with their completions, a prompt counted with each; what rates are given in.
    pub logical_tokens: u64,
    /// Rows with prompts shared, whether or not the run shares them.
    pub rows_shared: u64,
    /// Rows with each completion after a prompt of its own.
    pub rows_unshared: u64,
    /// Rows that the head sees.
    pub scored_rows: u64,
    /// Pairs of a query and a visible key, of one head: what attention's work is proportional to.
    pub attention_pairs: u64,
    /// Tokens of the same epoch in padded batches, for each of [`Self::DEVICE_BATCHES`]: both sides of `n` pairs are padded to
    /// the longest of all of them, as TRL's collator does.
    pub padded_tokens: [u64; 4],
    /// Micro-batches of an update.
    pub micro_batches: Spread,
    /// Rows of the largest micro-batch.
    pub largest_rows: usize,
    /// The most rows of one micro-batch that the head sees.
    pub largest_scored_rows: usize,
}

/// Of a number that differs between updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The smallest.
    pub min: usize,
    /// The mean.
    pub mean: f64,
    /// The largest.
    pub max: usize,
}

impl PackingFacts {
    /// Pairs in a padded batch that `padded_tokens` tells of.
    pub const DEVICE_BATCHES: [usize; 4] = [1, 2, 4, 8];

    /// Packs the first epoch of `data` as a run by `plan` will.
    #[must_use]
    pub fn of(data: &Dataset, loss: &Loss, plan: &Plan) -> Self {
        let order = data.epoch(0, plan.seed, plan.shuffle);
        let items: Vec<Item<'_>> = order.iter().map(|&index| Item::example(data, index as usize)).collect();
        let layout = Layout::new(loss, plan.share_prompts);
        let mut facts = Self {
            updates: items.len().div_ceil(plan.batch_size),
            logical_tokens: 0,
            rows_shared: 0,
            rows_unshared: 0,
            scored_rows: 0,
            attention_pairs: 0,
            padded_tokens: Self::DEVICE_BATCHES.map(|pairs| items.chunks(pairs).map(padded).sum()),
            micro_batches: Spread { min: usize::MAX, mean: 0.0, max: 0 },
            largest_rows: 0,
            largest_scored_rows: 0,
        };
        let mut batches = 0;
        for update in items.chunks(plan.batch_size) {
            let rows = |share_prompts| {
                let layout = Layout { share_prompts, ..layout };
                let of_batch = |batch: &Vec<usize>| layout.rows(&picked(update, batch)) as u64;
                layout.micro_batches(update, plan.micro_batch_tokens).iter().map(of_batch).sum::<u64>()
            };
            facts.rows_shared += rows(true);
            facts.rows_unshared += rows(false);
            let micro_batches = layout.micro_batches(update, plan.micro_batch_tokens);
            for batch in &micro_batches {
                let packed = layout.pack(&picked(update, batch));
                facts.logical_tokens += packed.tokens as u64;
                facts.scored_rows += packed.targets.len() as u64;
                facts.attention_pairs += packed.segments.pairs();
                facts.largest_rows = facts.largest_rows.max(packed.ids.len());
                facts.largest_scored_rows = facts.largest_scored_rows.max(packed.targets.len());
            }
            facts.micro_batches.min = facts.micro_batches.min.min(micro_batches.len());
            facts.micro_batches.max = facts.micro_batches.max.max(micro_batches.len());
            batches += micro_batches.len();
        }
        facts.micro_batches.min = facts.micro_batches.min.min(batches);
        facts.micro_batches.mean = batches as f64 / facts.updates.max(1) as f64;
        facts
    }
}

fn picked<'d>(items: &[Item<'d>], batch: &[usize]) -> Vec<Item<'d>> {
    batch.iter().map(|&i| items[i]).collect()
}

/// Tokens of one padded batch.
fn padded(items: &[Item<'_>]) -> u64 {
    let lengths = || items.iter().flat_map(|item| item.sides().map(|side| item.prompt.len() + side.len()));
    (lengths().count() * lengths().max().unwrap_or(0)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Schedule;

    fn plan(batch_size: usize, micro_batch_tokens: usize, share_prompts: bool) -> Plan {
        Plan {
            steps: 1,
            warmup: 0,
            batch_size,
            micro_batch_tokens,
            scoring_tokens: micro_batch_tokens,
            saved: Vec::new(),
            share_prompts,
            learning_rate: 1e-3,
            loraplus_ratio: 1.0,
            schedule: Schedule::Constant,
            weight_decay: 0.0,
            max_grad_norm: 0.0,
            shuffle: false,
            seed: 0,
            begins_as_reference: false,
        }
    }

    #[test]
    fn an_epoch_counted_by_hand() {
        let loss = Loss::Dpo(crate::loss::Dpo::default());
        let data =
            Dataset::of(&[(&[1, 2, 3], &[4, 5], &[6, 7, 8, 9]), (&[1, 9], &[4], &[5, 6]), (&[1, 2, 3], &[4], &[5])]);
        // unshared: (3+2-1) + (3+4-1), (2+1-1) + (2+2-1), (3+1-1) + (3+1-1); shared: 3+1+3, 2+0+1, and the third pair's
        // completions of one token add no row to the first
        let facts = PackingFacts::of(&data, &loss, &plan(3, 7, true));
        assert_eq!(facts.updates, 1);
        assert_eq!(facts.logical_tokens, (5 + 7) + (3 + 4) + (4 + 4));
        assert_eq!((facts.rows_unshared, facts.rows_shared), (10 + 5 + 6, 7 + 3));
        assert_eq!(facts.scored_rows, 6 + 3 + 2);
        // 1+2+3 of the prompt, then 4 and 4+5+6; 1+2 and 3
        assert_eq!(facts.attention_pairs, (6 + 4 + 15) + (3 + 3));
        // one pair: 2·7, 2·4, 2·4; two: 4·7 and 2·4; more: 6·7
        assert_eq!(facts.padded_tokens, [14 + 8 + 8, 28 + 8, 42, 42]);
        assert_eq!(facts.micro_batches, Spread { min: 2, mean: 2.0, max: 2 });
        assert_eq!((facts.largest_rows, facts.largest_scored_rows), (7, 8));

        let apart = PackingFacts::of(&data, &loss, &plan(2, 1000, false));
        // the third pair is in another update and shares nothing but its own prompt
        assert_eq!((apart.rows_unshared, apart.rows_shared), (21, 10 + 3));
        assert_eq!(apart.micro_batches, Spread { min: 1, mean: 1.0, max: 1 });
        assert_eq!((apart.updates, apart.largest_rows), (2, 15));
        // two causal sequences of 4 and 6 rows, of 2 and 3, of 3 and 3
        assert_eq!(apart.attention_pairs, (10 + 21) + (3 + 6) + (6 + 6));
        assert_eq!((apart.logical_tokens, apart.padded_tokens), (facts.logical_tokens, facts.padded_tokens));
    }
}
