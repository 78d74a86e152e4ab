//! Generation with a key/value cache: several sequences at a time, each as if it were alone.

use candle_core::{Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::Model;
use super::decoder::Adapter;
use super::layer::LayerCache;
use crate::ops::{FEW, uniform};

/// How the next token is chosen, in the order of transformers: the penalty first, then temperature, `top_k`, `top_p` and
/// `min_p`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// What logits are divided by; at 0 the most probable token is taken.
    pub temperature: f64,
    /// Only the fewest tokens that have this much of the probability.
    pub top_p: f64,
    /// Only so many tokens; 0 is all of them.
    pub top_k: usize,
    /// Only tokens at least so probable as this share of the most probable one.
    pub min_p: f64,
    /// What logits of tokens that are there already are divided by (multiplied where they are negative), prompt included.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    /// The most probable token.
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// When an answer ends.
#[derive(Debug, Clone)]
pub struct Stop<'a> {
    /// Tokens that end it; they are not part of the answer.
    pub tokens: &'a [u32],
    /// The most tokens it may have.
    pub max_new_tokens: usize,
}

/// Something to continue.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its ids; at least one.
    pub prompt: Vec<u32>,
    /// Tokens that end the answer.
    pub stop_tokens: Vec<u32>,
    /// The most tokens it may have.
    pub max_new_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Where its random numbers begin.
    pub seed: u64,
}

impl Request {
    /// Where the random numbers of an answer begin: of the prompt, the seed and which of its answers it is, and of nothing
    /// else, so that neither order nor neighbours change an answer.
    #[must_use]
    pub fn seed(seed: u64, sample: u64, prompt: &[u32]) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&sample.to_le_bytes());
        prompt.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(first)
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// With a token that ends an answer, or as was asked.
    Stop,
    /// It had as many tokens as it may have, or the model's longest position.
    Length,
}

/// A sequence that is being continued.
#[derive(Debug)]
struct Sequence {
    key: u64,
    /// Prompt and answer.
    ids: Vec<u32>,
    /// How many of them are the prompt's.
    prompt: usize,
    stop_tokens: Vec<u32>,
    sampling: Sampling,
    /// Positions that are in the cache.
    filled: usize,
    slot: usize,
    /// Tokens that the answer may have.
    budget: usize,
    rng: ChaCha8Rng,
}

/// A token that was chosen.
#[derive(Debug)]
pub struct Next<'g> {
    /// What [`Generator::add`] gave.
    pub key: u64,
    /// The token; none where the answer ended before it.
    pub token: Option<u32>,
    /// The token that was chosen, one that ends the answer too.
    pub chosen: u32,
    /// The logits that it was chosen by, as the model gave them. `[V]`
    pub logits: &'g [f32],
    /// Whether the answer is at its end, and why.
    pub end: Option<End>,
}

/// Continues several sequences together. Every sequence gets the tokens that it would get alone, to the bit: its prompt
/// is computed by itself, and a step of several rows treats each by itself too.
#[derive(Debug)]
pub struct Generator<'m> {
    model: &'m Model,
    adapter: Adapter,
    /// Keys and values of all slots, one after the other.
    cache: Vec<LayerCache>,
    /// Positions of a slot.
    positions: usize,
    free: Vec<usize>,
    sequences: Vec<Sequence>,
    next_key: u64,
}

impl<'m> Generator<'m> {
    /// Room for so many sequences of at most so many positions, prompt and answer together.
    ///
    /// # Errors
    /// What candle returns.
    pub fn new(model: &'m Model, adapter: Adapter, slots: usize, positions: usize) -> Result<Self> {
        let config = model.decoder.config();
        let positions = positions.min(config.max_position_embeddings);
        let width = config.num_key_value_heads * config.head_dim;
        let (dtype, device) = (model.decoder.dtype(), model.decoder.device());
        let empty = || Tensor::zeros((slots * positions, width), dtype, device);
        let cache = (0..config.num_layers())
            .map(|_| Ok(LayerCache { keys: empty()?, values: empty()? }))
            .collect::<Result<Vec<_>>>()?;
        let free = (0..slots).rev().collect();
        Ok(Self { model, adapter, cache, positions, free, sequences: Vec::new(), next_key: 0 })
    }

    /// Bytes of the cache of one slot.
    #[must_use]
    pub fn slot_bytes(model: &Model, positions: usize) -> usize {
        let config = model.decoder.config();
        let width = config.num_key_value_heads * config.head_dim * model.decoder.dtype().size_in_bytes();
        2 * config.num_layers() * positions.min(config.max_position_embeddings) * width
    }

    /// Whether another sequence has room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is being continued.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Takes something to continue, and gives the key that its tokens come with. `None` where there is no room for the
    /// prompt and one token: no slot, or no positions.
    pub fn add(&mut self, request: Request) -> Option<u64> {
        let budget = request.max_new_tokens.min(self.positions.saturating_sub(request.prompt.len()));
        if budget == 0 || request.prompt.is_empty() {
            return None;
        }
        let (slot, key) = (self.free.pop()?, self.next_key);
        self.next_key += 1;
        let Request { prompt: ids, stop_tokens, sampling, seed, .. } = request;
        let (prompt, rng) = (ids.len(), ChaCha8Rng::seed_from_u64(seed));
        self.sequences.push(Sequence { key, ids, prompt, stop_tokens, sampling, filled: 0, slot, budget, rng });
        Some(key)
    }

    /// Ends a sequence.
    pub fn end(&mut self, key: u64) {
        if let Some(at) = self.sequences.iter().position(|sequence| sequence.key == key) {
            self.free.push(self.sequences.remove(at).slot);
        }
    }

    /// One token more for every sequence. `each` says whether its sequence is to go on.
    ///
    /// # Errors
    /// A token outside the vocabulary, logits that are no numbers, or what candle returns. Sequences that `each` was not
    /// called for are as they were.
    pub fn step(&mut self, each: impl FnMut(Next<'_>) -> bool) -> Result<()> {
        let mut ended = Vec::new();
        let computed = self.pass_all(each, &mut ended);
        // those of the passes before one that fails, too
        ended.into_iter().for_each(|key| self.end(key));
        computed
    }

    /// The passes of a step; `ended` gets the keys of the sequences that are at their end.
    fn pass_all(&mut self, mut each: impl FnMut(Next<'_>) -> bool, ended: &mut Vec<u64>) -> Result<()> {
        let config = self.model.decoder.config();
        for sequence in &mut self.sequences {
            let turns_over = |(above, _): &(usize, Vec<f32>)| sequence.ids.len() == above + 1;
            if config.ropes.iter().any(|rope| rope.long.as_ref().is_some_and(turns_over)) {
                // from here on all positions turn by other frequencies, those of the keys in the cache too
                sequence.filled = 0;
            }
        }
        let new = |sequence: &Sequence| sequence.ids.len() - sequence.filled;
        let (single, prompts): (Vec<usize>, Vec<usize>) =
            (0..self.sequences.len()).partition(|&i| new(&self.sequences[i]) == 1);
        let passes = prompts.chunks(1).chain(single.chunks(FEW));
        let adapters = self.model.switched(self.adapter);
        for pass in passes {
            let rows: Vec<Continued<'_>> = pass
                .iter()
                .map(|&i| {
                    let Sequence { ids, filled, slot, .. } = &self.sequences[i];
                    Continued { ids, filled: *filled, start: slot * self.positions }
                })
                .collect();
            let logits = self.model.decoder.step(&rows, &self.cache, adapters)?.to_dtype(candle_core::DType::F32)?;
            for (&i, logits) in pass.iter().zip(logits.to_vec2::<f32>()?) {
                let sequence = &mut self.sequences[i];
                if !is_distribution(&logits) {
                    candle_core::bail!("the model's logits are not numbers: its weights or the adapter's are broken")
                }
                sequence.filled = sequence.ids.len();
                let token = choose(&logits, &sequence.ids, &sequence.sampling, &mut sequence.rng);
                let stopped = sequence.stop_tokens.contains(&token);
                if !stopped {
                    sequence.ids.push(token);
                }
                let full = sequence.ids.len() - sequence.prompt == sequence.budget;
                let end = match (stopped, full) {
                    (true, _) => Some(End::Stop),
                    (false, true) => Some(End::Length),
                    (false, false) => None,
                };
                let goes_on = each(Next {
                    key: sequence.key,
                    token: (!stopped).then_some(token),
                    chosen: token,
                    logits: &logits,
                    end,
                });
                if end.is_some() || !goes_on {
                    ended.push(sequence.key);
                }
            }
        }
        Ok(())
    }
}

/// The new part of a sequence.
pub(super) struct Continued<'i> {
    /// All of its ids so far.
    pub(super) ids: &'i [u32],
    /// How many of them the cache has.
    pub(super) filled: usize,
    /// Where its positions begin in the cache.
    pub(super) start: usize,
}

/// Whether probabilities can be made of logits: none is NaN, and the largest is finite.
fn is_distribution(logits: &[f32]) -> bool {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    largest.is_finite() && !logits.iter().any(|logit| logit.is_nan())
}

/// The next token, by logits as the model gave them.
fn choose(logits: &[f32], ids: &[u32], sampling: &Sampling, rng: &mut ChaCha8Rng) -> u32 {
    let kept = candidates(logits, ids, sampling);
    let mut left = uniform(rng.next_u64()) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
    let drawn = kept.iter().find(|(_, weight)| {
        left -= weight;
        left < 0.0
    });
    drawn.or(kept.last()).map_or(0, |(token, _)| *token)
}

/// The tokens that may come next with what each weighs, the most probable first; one where there is no temperature.
fn candidates(logits: &[f32], ids: &[u32], sampling: &Sampling) -> Vec<(u32, f64)> {
    /// What is less probable than the most probable token by this factor's exponential, one in 10¹², is never drawn.
    const NEVER: f64 = 28.0;
    let Sampling { temperature, top_p, top_k, min_p, repetition_penalty } = *sampling;
    let mut logits = std::borrow::Cow::Borrowed(logits);
    if repetition_penalty != 1.0 {
        let mut there = ids.to_vec();
        there.sort_unstable();
        there.dedup();
        let logits = logits.to_mut();
        for id in there {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit *= if *logit < 0.0 { repetition_penalty } else { repetition_penalty.recip() } as f32;
            }
        }
    }
    // the first of equals
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    if temperature <= 0.0 {
        return vec![(best as u32, 1.0)];
    }
    let below = |i: usize| f64::from(logits[best] - logits[i]) / temperature;
    let mut kept: Vec<(u32, f64)> =
        (0..logits.len()).map(|i| (i as u32, below(i))).filter(|(_, below)| *below < NEVER).collect();
    // of equals transformers leaves out the first one first
    kept.sort_unstable_by(|one, two| one.1.total_cmp(&two.1).then(two.0.cmp(&one.0)));
    if let Some((_, last)) = top_k.checked_sub(1).and_then(|last| kept.get(last)).copied() {
        // and what is equal to the last
        kept.retain(|(_, below)| *below <= last);
    }
    kept.iter_mut().for_each(|(_, below)| *below = (-*below).exp());
    let all: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let least = kept.first().map_or(1.0, |(_, weight)| *weight) * min_p;
    let mut before = 0.0;
    let is_kept = |(_, weight): &&(u32, f64)| {
        let kept = before < top_p * all && *weight >= least;
        before += weight;
        kept
    };
    let count = kept.iter().take_while(is_kept).count().max(1);
    kept.truncate(count);
    kept
}

impl Model {
    /// Continues `prompt` with the most probable token each time (the first of equals).
    ///
    /// Ends at a stop token, after `max_new_tokens`, or at the model's longest position.
    ///
    /// # Errors
    /// A token outside the vocabulary, or what candle returns.
    pub fn generate(&self, prompt: &[u32], adapter: Adapter, stop: &Stop<'_>) -> Result<Vec<u32>> {
        let mut generator = Generator::new(self, adapter, 1, prompt.len() + stop.max_new_tokens)?;
        let mut answer = Vec::new();
        generator.add(Request {
            prompt: prompt.to_vec(),
            stop_tokens: stop.tokens.to_vec(),
            max_new_tokens: stop.max_new_tokens,
            sampling: Sampling::default(),
            seed: 0,
        });
        while !generator.is_idle() {
            generator.step(|next| {
                answer.extend(next.token);
                true
            })?;
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What its logits processors leave, in their order; `scripts/make_generation_fixtures.py`.
    #[test]
    fn tokens_are_as_probable_as_in_transformers() {
        #[derive(Deserialize)]
        struct Case {
            logits: Vec<f32>,
            ids: Vec<u32>,
            sampling: Sampling,
            probabilities: Vec<f64>,
        }
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../tests/fixtures/sampling.json")).expect("the fixture");
        assert_eq!(cases.len(), 13);
        for Case { logits, ids, sampling, probabilities } in cases {
            let kept = candidates(&logits, &ids, &sampling);
            let all: f64 = kept.iter().map(|(_, weight)| weight).sum();
            let mut found = vec![0.0; logits.len()];
            kept.iter().for_each(|(token, weight)| found[*token as usize] = weight / all);
            for (token, (found, expected)) in found.iter().zip(&probabilities).enumerate() {
                // the penalty multiplies logits in f32
                assert!((found - expected).abs() < 1e-7, "{sampling:?}, {token}: {found} and {expected}");
            }
            // as often as that, in so many draws: four standard deviations, and a count or two of what is rare
            let (mut rng, mut counts) = (ChaCha8Rng::seed_from_u64(1), vec![0; logits.len()]);
            const DRAWS: u32 = 4000;
            (0..DRAWS).for_each(|_| counts[choose(&logits, &ids, &sampling, &mut rng) as usize] += 1);
            for (count, expected) in counts.into_iter().zip(&probabilities) {
                let deviation = (expected * (1.0 - expected) / f64::from(DRAWS)).sqrt();
                let share = f64::from(count) / f64::from(DRAWS);
                assert!(
                    (share - expected).abs() <= 4.0 * deviation + 2.0 / f64::from(DRAWS),
                    "{sampling:?}: {share} of {expected}"
                );
            }
        }
    }

    #[test]
    fn logits_that_make_no_probabilities_are_refused() {
        const LOW: f32 = f32::NEG_INFINITY;
        assert!(is_distribution(&[1.0, LOW, -2.0]));
        for broken in [&[1.0, f32::NAN][..], &[f32::INFINITY, 1.0], &[LOW, LOW], &[LOW, f32::NAN], &[]] {
            assert!(!is_distribution(broken), "{broken:?}");
        }
    }

    #[test]
    fn without_a_temperature_the_first_of_the_most_probable_is_taken() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let sampling = Sampling::default();
        assert_eq!(choose(&[0.5, 2.0, 2.0, -1.0], &[], &sampling, &mut rng), 1);
        let penalized = Sampling { repetition_penalty: 1.5, ..sampling };
        assert_eq!(choose(&[0.5, 2.0, 1.9, -1.0], &[1], &penalized, &mut rng), 2);
    }
}
