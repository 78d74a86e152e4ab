//! What a merge or a quantization has cost: how much of the update is still there, and what that does to answers.
//!
//! Everything is taken from what was written, read back as any reader would: an update that was lost in rounding, or in
//! the writing, is seen.

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use super::{ExportError, Merge};
use crate::data::Dataset;
use crate::model::packed::rows;
use crate::model::{BaseFiles, Decoder, DecoderConfig, Packed, Packer, PromptSpan};
use crate::ops::completion_logps::{self, Head, TokenScore, Want};
use crate::ops::divergence::{self, Divergence};
use crate::progress::{Bar, Console};
use crate::quant::Weight;

/// Rows that are packed into one batch, but for a single longer pair.
const BATCH_ROWS: usize = 1024;

/// What became of the updates of a layer's modules.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LayerAccount {
    /// Number of the layer, none where it is of all.
    pub layer: Option<usize>,
    /// Root mean square of the update's elements.
    pub update: f64,
    /// Root mean square of what the written values differ by from the merged ones.
    pub rounding: f64,
    /// How much of the update is there: the written change from the base, in the direction of the update, as a share of
    /// it. `1 + ⟨written − merged, update⟩ / ‖update‖²`.
    pub kept: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Squares {
    elements: f64,
    update: f64,
    error: f64,
    along: f64,
}

impl Squares {
    fn of(base: &[f32], merged: &[f32], written: &[f32]) -> Self {
        let rows = base.par_chunks(1 << 14).zip(merged.par_chunks(1 << 14)).zip(written.par_chunks(1 << 14));
        let sums = rows.map(|((base, merged), written)| {
            let mut sums = Self { elements: base.len() as f64, ..Self::default() };
            for ((base, merged), written) in base.iter().zip(merged).zip(written) {
                let (update, error) = (f64::from(merged - base), f64::from(written - merged));
                sums.update += update * update;
                sums.error += error * error;
                sums.along += update * error;
            }
            sums
        });
        sums.reduce(Self::default, Self::plus)
    }

    fn plus(self, other: Self) -> Self {
        Self {
            elements: self.elements + other.elements,
            update: self.update + other.update,
            error: self.error + other.error,
            along: self.along + other.along,
        }
    }

    fn account(self, layer: Option<usize>) -> LayerAccount {
        let elements = self.elements.max(1.0);
        LayerAccount {
            layer,
            update: (self.update / elements).sqrt(),
            rounding: (self.error / elements).sqrt(),
            kept: if self.update > 0.0 { 1.0 + self.along / self.update } else { 1.0 },
        }
    }
}

/// Compares the matrices that carry an adapter with what was `written` of them, a layer at a time; of all layers last.
///
/// # Errors
/// A file is broken, or what was written is of another model.
pub fn layers(
    merge: &Merge<'_>,
    written: &BaseFiles,
    written_config: &DecoderConfig,
    console: &Console,
) -> Result<Vec<LayerAccount>, ExportError> {
    let parts = merge.config().parts()?;
    let others = written_config.parts()?;
    let shapes = |parts: &[crate::model::Part]| parts.iter().map(|part| part.shape().to_vec()).collect::<Vec<_>>();
    if shapes(&parts) != shapes(&others) {
        return Err(ExportError::Impossible {
            problem: "what was written is another model than base and adapter: its matrices have other shapes".into(),
            help: "name the merged model of this very run".into(),
        });
    }
    let adapted = || parts.iter().zip(&others).filter(|(part, _)| merge.is_adapted(part));
    let bar = console.count_bar("reading back", adapted().count() as u64);
    let of_layer = merge.config().projections().len();
    let mut accounts: Vec<(usize, Squares)> = Vec::new();
    for (part, other) in adapted() {
        let layer = part.module().unwrap_or(0) / of_layer;
        let numbers = |tensor: Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let base = numbers(merge.base(part)?.dense(DType::F32)?)?;
        let merged = numbers(merge.merged(part)?)?;
        let read = numbers(written.read(other, written_config)?.dense(DType::F32)?)?;
        let squares = Squares::of(&base, &merged, &read);
        match accounts.last_mut() {
            Some((last, sums)) if *last == layer => *sums = sums.plus(squares),
            _ => accounts.push((layer, squares)),
        }
        bar.advance(1);
    }
    let all = accounts.iter().fold(Squares::default(), |all, (_, squares)| all.plus(*squares));
    let mut listed: Vec<_> = accounts.into_iter().map(|(layer, squares)| squares.account(Some(layer))).collect();
    listed.push(all.account(None));
    Ok(listed)
}

/// How a model answers held-out pairs.
#[derive(Debug, Clone, Serialize)]
pub struct Behaviour {
    /// What the model is.
    pub model: String,
    /// Share of pairs whose chosen completion has the higher log-prob.
    pub prefers_chosen: f64,
    /// Share of pairs whose log-ratio to the base is higher for the chosen completion.
    pub reward_accuracy: f64,
    /// Mean difference of these log-ratios in nats: TRL's `rewards/margins` divided by beta.
    pub margin: f64,
    /// KL(base + adapter ‖ model) in nats, mean over completion tokens.
    pub kl: f64,
    /// Share of completion tokens at which both have the same most probable token.
    pub top1: f64,
    /// Largest difference to base + adapter of a completion's log-prob in nats.
    pub largest_difference: f64,
}

/// Held-out pairs, packed, and what base + adapter says about them.
pub struct Witnesses {
    batches: Vec<Packed>,
    pairs: usize,
    /// Of base + adapter, for each batch.
    hidden: Vec<Tensor>,
    head: Weight,
    softcap: Option<f64>,
    /// Log-probs of chosen and rejected by base + adapter.
    policy: Vec<[f64; 2]>,
    /// The same by the base.
    base: Vec<[f64; 2]>,
}

impl Witnesses {
    /// At most `pairs` of the pairs in `data`, spread over it, scored by the base and by base + adapter.
    ///
    /// # Errors
    /// What candle returns.
    pub fn new(
        data: &Dataset,
        pairs: usize,
        decoder: &Decoder,
        adapters: &crate::adapter::Adapters,
        console: &Console,
    ) -> Result<(Self, [Behaviour; 2]), ExportError> {
        let all: Vec<_> = (0..data.len())
            .map(|i| data.get(i))
            .filter_map(|example| Some((example.prompt, [example.chosen?, example.rejected?])))
            .collect();
        let count = pairs.min(all.len());
        let mut batches = Vec::new();
        let (mut packer, mut filled) = (Packer::default(), 0);
        for i in 0..count {
            let (prompt, branches) = all[i * all.len() / count];
            let more = rows(prompt.len(), &branches.map(<[u32]>::len));
            if filled > 0 && filled + more > BATCH_ROWS {
                batches.push(std::mem::take(&mut packer).finish());
                filled = 0;
            }
            packer.push(0, prompt, &branches, PromptSpan::No);
            filled += more;
        }
        batches.push(packer.finish());
        let bar = console.count_bar("base and adapter", 2 * batches.len() as u64);
        let mut measured = adapters.clone();
        measured.measure(decoder)?;
        let head = decoder.head();
        let mut witnesses = Self {
            batches,
            pairs: count,
            hidden: Vec::new(),
            head: head.weight.clone(),
            softcap: head.softcap,
            policy: Vec::new(),
            base: Vec::new(),
        };
        for batch in &witnesses.batches {
            let hidden = decoder.hidden(batch, Some(&measured))?;
            witnesses.policy.extend(sums(batch, &hidden, head)?);
            witnesses.hidden.push(hidden);
            witnesses.base.extend(sums(batch, &decoder.hidden(batch, None)?, head)?);
            bar.advance(2);
        }
        drop(bar);
        let base = witnesses.behaviour("base", decoder, console)?;
        let policy = Behaviour {
            model: "base + adapter".into(),
            kl: 0.0,
            top1: 1.0,
            largest_difference: 0.0,
            ..witnesses.preferences(&witnesses.policy)
        };
        Ok((witnesses, [base, policy]))
    }

    /// Number of pairs.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Number of completion tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.batches.iter().map(|batch| batch.targets.len()).sum()
    }

    /// What `decoder` says about the pairs, beside base + adapter.
    ///
    /// # Errors
    /// What candle returns.
    pub fn behaviour(&self, model: &str, decoder: &Decoder, console: &Console) -> Result<Behaviour, ExportError> {
        let bar = console.count_bar("comparing", self.batches.len() as u64);
        let (mut logps, mut kl, mut top1) = (Vec::new(), 0.0, 0);
        let head = decoder.head();
        let policy_head = Head { weight: &self.head, softcap: self.softcap };
        for (batch, policy) in self.batches.iter().zip(&self.hidden) {
            let hidden = decoder.hidden(batch, None)?;
            logps.extend(sums(batch, &hidden, head)?);
            for Divergence { kl: of_row, same_top } in divergence::of_rows((policy, policy_head), (&hidden, head))? {
                kl += of_row;
                top1 += usize::from(same_top);
            }
            Bar::advance(&bar, 1);
        }
        let tokens = self.tokens().max(1) as f64;
        let differences = logps.iter().flatten().zip(self.policy.iter().flatten()).map(|(a, b)| (a - b).abs());
        Ok(Behaviour {
            model: model.to_owned(),
            kl: kl / tokens,
            top1: top1 as f64 / tokens,
            largest_difference: differences.fold(0.0, f64::max),
            ..self.preferences(&logps)
        })
    }

    fn preferences(&self, logps: &[[f64; 2]]) -> Behaviour {
        let pairs = logps.len().max(1) as f64;
        let share = |holds: &dyn Fn(&[f64; 2], &[f64; 2]) -> bool| {
            logps.iter().zip(&self.base).filter(|(model, base)| holds(model, base)).count() as f64 / pairs
        };
        let margin = |[chosen, rejected]: &[f64; 2], base: &[f64; 2]| (chosen - base[0]) - (rejected - base[1]);
        Behaviour {
            model: String::new(),
            prefers_chosen: share(&|[chosen, rejected], _| chosen > rejected),
            reward_accuracy: share(&|model, base| margin(model, base) > 0.0),
            margin: logps.iter().zip(&self.base).map(|(model, base)| margin(model, base)).sum::<f64>() / pairs,
            kl: 0.0,
            top1: 0.0,
            largest_difference: 0.0,
        }
    }
}

/// Summed log-probs of chosen and rejected of each pair of a batch.
fn sums(batch: &Packed, hidden: &Tensor, head: Head<'_>) -> Result<Vec<[f64; 2]>, candle_core::Error> {
    let (scores, _) = completion_logps::score(hidden, head, &batch.targets, Want::Scores)?;
    let sum = |scores: &[TokenScore]| scores.iter().map(|score| score.logp).sum();
    let (pairs, _) = batch.spans.as_chunks::<2>();
    Ok(pairs.iter().map(|spans| spans.each_ref().map(|span| sum(&scores[span.clone()]))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_that_rounding_takes_away_is_not_kept() {
        let base = [1.0f32, 2.0, 3.0, 4.0];
        let merged = [1.1f32, 1.9, 3.1, 3.9];
        let of = |written: &[f32]| Squares::of(&base, &merged, written).account(None);
        let (all, none) = (of(&merged), of(&base));
        assert!((all.update - 0.1).abs() < 1e-6 && all.rounding == 0.0 && all.kept == 1.0);
        assert!((none.rounding - none.update).abs() < 1e-6 && none.kept.abs() < 1e-6, "{none:?}");
        let half = of(&[1.05, 1.95, 3.05, 3.95]);
        assert!((half.kept - 0.5).abs() < 1e-5, "{half:?}");
    }
}
