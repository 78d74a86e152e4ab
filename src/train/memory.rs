//! How much memory a run takes, and how it is made to fit: rows computed at once, and what each layer keeps of them.

use super::batch::{Item, Layout};
use crate::data::Dataset;
use crate::loss::Loss;
use crate::model::flops::Load;
use crate::model::memory::{Rows, Saved, Shape};

/// The program, its threads' stacks and small change: 14 MiB of code that is in use, and what a run of the quickstart takes
/// beyond its tensors.
const PROGRAM: usize = 24 << 20;
/// Bytes of an element.
const F32: usize = 4;
/// Choices of rows computed at once, where the recipe makes none. More than the last gain nothing.
const ROWS: [usize; 7] = [128, 256, 512, 1024, 2048, 4096, 8192];
/// Rows at which a product runs at half its speed: at 64, 128, 256 and 1024 rows it was measured to reach 0.75, 0.88, 0.95
/// and 0.98 of it, which is `rows / (rows + HALF_SPEED)`.
const HALF_SPEED: f64 = 20.0;
/// The same on a GPU, where it was not measured: so that four thousand rows are chosen where there is room.
const HALF_SPEED_GPU: f64 = 40.0;
/// Time that is not worth any memory.
const INDIFFERENT: f64 = 1.01;
/// A pass that keeps nothing may have this many times the rows, while it takes no more memory than one that does.
const SCORING: [usize; 3] = [4, 2, 1];

/// What a run asks for: the model, and the rows of its data.
#[derive(Debug, Clone)]
pub struct Demand {
    /// Base and adapters.
    pub shape: Shape,
    /// Of all training examples.
    pub load: Load,
    /// Rows of the longest training example, and where that comes from.
    pub longest: (usize, String),
    /// Rows of the longest example of all data.
    longest_scored: usize,
    /// No update has more rows.
    update_rows: usize,
    /// Everything but activations.
    fixed: Inventory,
}

/// What takes memory at the worst moment of a run, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inventory {
    /// The frozen weights.
    pub base: usize,
    /// The adapters' weights.
    pub adapters: usize,
    /// Their gradients.
    pub gradients: usize,
    /// AdamW's two means.
    pub optimizer: usize,
    /// Activations kept for the backward pass.
    pub saved: usize,
    /// What a layer at work computes and drops.
    pub scratch: usize,
    /// Token ids.
    pub data: usize,
    /// The tokenizer's tables.
    pub tokenizer: usize,
    /// The program itself.
    pub program: usize,
}

impl Inventory {
    /// What neither rows nor levels change; `data` and `tokenizer` are their bytes.
    fn fixed(shape: &Shape, data: usize, tokenizer: usize) -> Self {
        let (base, adapters) = (shape.base_bytes(), F32 * shape.adapter_parameters());
        // on a GPU parameters, gradients and what becomes of them are in one buffer each while they are updated
        let (gradients, optimizer) = (adapters, if shape.on_gpu { 5 * adapters } else { 2 * adapters });
        Self { base, adapters, gradients, optimizer, saved: 0, scratch: 0, data, tokenizer, program: PROGRAM }
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> usize {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Its parts by name.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, usize); 9] {
        let Self { base, adapters, gradients, optimizer, saved, scratch, data, tokenizer, program } = *self;
        [
            ("base", base),
            ("adapters", adapters),
            ("gradients", gradients),
            ("optimizer", optimizer),
            ("saved", saved),
            ("scratch", scratch),
            ("data", data),
            ("tokenizer", tokenizer),
            ("program", program),
        ]
    }
}

/// How a run is made to fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Rows computed at once while learning; one example may be more.
    pub micro_batch_tokens: usize,
    /// Rows computed at once where nothing is kept for a backward pass.
    pub scoring_tokens: usize,
    /// What each layer keeps.
    pub saved: Vec<Saved>,
    /// The most that this can take.
    pub at_most: Inventory,
    /// Operations done again, relative to all that have to be done.
    pub recomputed: f64,
}

impl Demand {
    /// Measures the data, as a run will lay it out. `tokenizer` is the memory of that.
    #[must_use]
    pub fn of(
        shape: Shape,
        train: &Dataset,
        eval: Option<&Dataset>,
        loss: &Loss,
        share_prompts: bool,
        batch_size: usize,
        tokenizer: usize,
    ) -> Self {
        let layout = Layout::new(loss, share_prompts);
        let rows_of = |data: &Dataset| -> Vec<usize> {
            (0..data.len()).map(|index| layout.rows(&[Item::example(data, index)])).collect()
        };
        let mut load = Load::default();
        for index in 0..train.len() {
            let packed = layout.pack(&[Item::example(train, index)]);
            let (rows, scored) = (packed.ids.len() as f64, packed.targets.len() as f64);
            load.rows += rows;
            load.scored += scored;
            load.skipped += (rows - scored).max(0.0);
            load.pairs += packed.segments.pairs() as f64;
        }
        let mut rows = rows_of(train);
        let longest = rows.iter().enumerate().max_by_key(|(_, rows)| **rows);
        let longest = longest.map_or((0, String::new()), |(index, &rows)| (rows, train.origin(index)));
        rows.sort_unstable_by_key(|rows| std::cmp::Reverse(*rows));
        let fixed = Inventory::fixed(&shape, train.num_bytes() + eval.map_or(0, Dataset::num_bytes), tokenizer);
        Self {
            shape,
            load,
            longest_scored: eval.into_iter().flat_map(rows_of).max().unwrap_or(0).max(longest.0),
            longest,
            // weights may repeat an example within an update
            update_rows: rows.iter().cycle().take(batch_size).sum(),
            fixed,
        }
    }

    /// What a run takes whose largest micro-batch has `rows`.
    #[must_use]
    pub fn inventory(&self, saved: &[Saved], rows: Rows, scoring_rows: usize) -> Inventory {
        let training = self.shape.training(saved, rows);
        let scoring = self.shape.scoring(Rows { all: scoring_rows, scored: scoring_rows });
        let scratch = training.total().max(scoring.total()) - training.saved;
        Inventory { saved: training.saved, scratch, ..self.fixed }
    }

    /// The rows and levels with which a run that may take `budget` bytes loses least time. Where there is room, that is no
    /// work done twice and the least memory at which products run at full speed. The smallest there are, if nothing fits.
    ///
    /// Lower layers keep less than upper ones: what they keep lives longest.
    #[must_use]
    pub fn choose(&self, budget: usize, micro_batch_tokens: Option<usize>) -> Choice {
        let layers = self.shape.ranks.len();
        let choices = micro_batch_tokens.map_or(ROWS.to_vec(), |rows| vec![rows]);
        let mut fitting = Vec::new();
        for &tokens in &choices {
            let try_levels = |saved: Vec<Saved>| {
                let total = self.at_most(tokens, &saved, self.longest_scored).total();
                Candidate { tokens, again: self.recomputed(&saved), total, saved }
            };
            let all = try_levels(vec![Saved::All; layers]);
            if all.total <= budget {
                fitting.push(all);
                continue;
            }
            let lowest = self.shape.lowest_adapted();
            for (input, attention) in (lowest..=layers).flat_map(|i| (i..=layers).map(move |a| (i, a))) {
                let levels = |without: usize| {
                    let level = |layer| match layer {
                        l if l < lowest => Saved::All,
                        l if l < input => Saved::Input,
                        l if l < attention => Saved::AttentionAndInput,
                        l if l < without => Saved::WithoutGateUp,
                        _ => Saved::All,
                    };
                    (0..layers).map(level).collect()
                };
                // each more takes less memory, so the first that fits is found by halving
                let (mut fewest, mut most) = (attention, layers + 1);
                while fewest < most {
                    let middle = usize::midpoint(fewest, most);
                    if middle > layers || try_levels(levels(middle)).total <= budget {
                        most = middle;
                    } else {
                        fewest = middle + 1;
                    }
                }
                fitting.extend((fewest <= layers).then(|| try_levels(levels(fewest))));
            }
        }
        let ideal = choices.iter().map(|&tokens| self.time(tokens, 0.0)).fold(f64::INFINITY, f64::min);
        let best = fitting.into_iter().min_by(|a, b| {
            // all that are fast enough are equally fast
            let time = |c: &Candidate| self.time(c.tokens, c.again).max(ideal * INDIFFERENT);
            time(a).total_cmp(&time(b)).then(a.again.total_cmp(&b.again)).then(a.total.cmp(&b.total))
        });
        match best {
            Some(Candidate { tokens, saved, .. }) => self.choice(tokens, saved),
            None => self.choice(choices[0], vec![Saved::Input; layers]),
        }
    }

    fn choice(&self, micro_batch_tokens: usize, saved: Vec<Saved>) -> Choice {
        let at_most = |tokens: usize| self.at_most(micro_batch_tokens, &saved, tokens.max(self.longest_scored));
        let alone = at_most(0).total();
        let scoring_tokens = SCORING.map(|times| times * micro_batch_tokens).into_iter();
        let affordable = { scoring_tokens }.find(|&tokens| at_most(tokens).total() <= alone);
        let scoring_tokens = affordable.unwrap_or(micro_batch_tokens);
        Choice {
            micro_batch_tokens,
            scoring_tokens,
            at_most: at_most(scoring_tokens),
            recomputed: self.recomputed(&saved),
            saved,
        }
    }

    fn at_most(&self, micro_batch_tokens: usize, saved: &[Saved], scoring_rows: usize) -> Inventory {
        let rows = micro_batch_tokens.min(self.update_rows).max(self.longest.0);
        self.inventory(saved, Rows { all: rows, scored: rows }, scoring_rows)
    }

    /// Operations done again, relative to all that have to be done.
    fn recomputed(&self, saved: &[Saved]) -> f64 {
        let Load { rows, pairs, .. } = self.load;
        let again = |(layer, &saved): (usize, &Saved)| self.shape.recomputed_flops(layer, saved, rows, pairs);
        saved.iter().enumerate().map(again).sum::<f64>() / self.shape.training_work(self.load).total().max(1.0)
    }

    /// Of an update, in no unit.
    fn time(&self, micro_batch_tokens: usize, recomputed: f64) -> f64 {
        let rows = micro_batch_tokens.min(self.update_rows).max(1) as f64;
        let half = if self.shape.on_gpu { HALF_SPEED_GPU } else { HALF_SPEED };
        (1.0 + recomputed) * (rows + half) / rows
    }
}

/// Rows and levels that could be chosen.
struct Candidate {
    tokens: usize,
    saved: Vec<Saved>,
    /// Share of work done again.
    again: f64,
    /// Bytes.
    total: usize,
}

impl Choice {
    /// What the layers keep, in words: `all 30 layers keep everything`, `layer 0 keeps input only, layers 1-29 keep ...`.
    #[must_use]
    pub fn describe_saved(&self) -> String {
        let runs: Vec<&[Saved]> = self.saved.chunk_by(|a, b| a == b).collect();
        if let [one] = runs[..] {
            return format!("all {} layers keep {}", one.len(), one[0].describe());
        }
        let mut first = 0;
        let part = |run: &&[Saved]| {
            let last = first + run.len() - 1;
            let layers = match run.len() {
                1 => format!("layer {first} keeps"),
                _ => format!("layers {first}-{last} keep"),
            };
            first = last + 1;
            format!("{layers} {}", run[0].describe())
        };
        runs.iter().map(part).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::memory::tests::{decoder, rank_16};

    const MIB: usize = 1 << 20;

    /// UltraFeedback's lengths on a model of the shape of SmolLM2-135M.
    fn demand(decoder: &crate::model::DecoderConfig) -> Demand {
        let shape = rank_16(decoder);
        Demand {
            fixed: Inventory::fixed(&shape, MIB, MIB),
            shape,
            load: Load { rows: 695.0, scored: 576.0, pairs: 160_000.0, skipped: 121.0 },
            longest: (1800, "pairs.jsonl row 7".into()),
            longest_scored: 1900,
            update_rows: 30_000,
        }
    }

    #[test]
    fn with_room_everything_is_kept_and_no_more_is_taken_than_speed_needs() {
        let decoder = decoder(576, 30, 9, 3, 1536, 49152);
        let demand = demand(&decoder);
        let choice = demand.choose(1 << 40, None);
        assert_eq!((choice.micro_batch_tokens, choice.recomputed), (2048, 0.0));
        assert_eq!(choice.describe_saved(), "all 30 layers keep everything");
        assert_eq!(choice.scoring_tokens, 4 * 2048);
        // twice as much room changes nothing
        assert_eq!(demand.choose(choice.at_most.total(), None), choice);
        assert_eq!(demand.choose(2 * choice.at_most.total(), None), choice);
    }

    #[test]
    fn every_choice_is_within_its_budget_and_less_budget_is_never_less_work() {
        let decoder = decoder(576, 30, 9, 3, 1536, 49152);
        let demand = demand(&decoder);
        let (mut recomputed, mut taken) = (0.0, usize::MAX);
        let mut budgets = 0;
        for mib in (750..2600).rev().step_by(50) {
            let choice = demand.choose(mib * MIB, None);
            if choice.at_most.total() > mib * MIB {
                // from here on nothing fits, and what is returned is the smallest there is
                assert!(choice.saved.iter().all(|saved| *saved == Saved::Input));
                assert_eq!(demand.choose(0, None), choice);
                continue;
            }
            budgets += 1;
            assert!(choice.at_most.total() <= taken && choice.recomputed >= recomputed - 0.01, "{mib} MiB");
            (recomputed, taken) = (choice.recomputed, choice.at_most.total());
            assert!(choice.saved.is_sorted_by(|a, b| a >= b), "{mib} MiB: lower layers keep less");
        }
        assert!(budgets > 10 && recomputed > 0.1, "{budgets} {recomputed}");
    }

    #[test]
    fn given_rows_are_kept_to() {
        let decoder = decoder(576, 30, 9, 3, 1536, 49152);
        let demand = demand(&decoder);
        assert_eq!(demand.choose(1 << 40, Some(5000)).micro_batch_tokens, 5000);
        let tight = demand.choose(1800 * MIB, Some(5000));
        assert_eq!(tight.micro_batch_tokens, 5000);
        assert!(tight.recomputed > 0.1 && tight.at_most.total() <= 1800 * MIB);
        // one example is never divided
        assert_eq!(demand.choose(1 << 40, Some(1)).at_most, demand.choose(1 << 40, Some(1800)).at_most);
    }

    #[test]
    fn an_inventory_adds_up() {
        let decoder = decoder(576, 30, 9, 3, 1536, 49152);
        let demand = demand(&decoder);
        let Inventory { base, adapters, gradients, optimizer, saved, .. } = demand.choose(1 << 40, None).at_most;
        assert_eq!(base, 4 * 134_515_008, "the head is the embedding");
        assert_eq!((adapters, gradients, optimizer), (4 * 4_884_480, 4 * 4_884_480, 8 * 4_884_480));
        let row: usize = (0..30).map(|layer| demand.shape.bytes_per_row(layer, Saved::All)).sum();
        assert_eq!(saved, 2048 * row);
    }
}
