//! One update after the other.

use std::time::Instant;

use miette::Diagnostic;
use thiserror::Error;

use super::Schedule;
use super::batch::{Item, Layout, Part};
use super::evaluate::Evaluation;
use super::metrics::{Metrics, Sums, Tally};
use super::optimizer::{self, AdamW, Rate};
use super::reference::{self, Reference};
use crate::adapter::{AdapterError, Gradients};
use crate::data::Dataset;
use crate::device;
use crate::loss::{Loss, Scored, Sequence, Slopes, Update};
use crate::model::memory::Saved;
use crate::model::packed::{Packed, PromptSpan};
use crate::model::{Adapter, Forward, Keep, Model};
use crate::ops::completion_logps::TokenScore;
use crate::ops::dropout;

/// Everything that shapes a run of updates, every value known.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Number of updates.
    pub steps: usize,
    /// Number of them over which the learning rate rises.
    pub warmup: usize,
    /// Examples an update.
    pub batch_size: usize,
    /// Rows of tokens computed at once.
    pub micro_batch_tokens: usize,
    /// The same where nothing is kept for a backward pass.
    pub scoring_tokens: usize,
    /// What each layer keeps for the backward pass.
    pub saved: Vec<Saved>,
    /// Whether completions of one prompt share its rows; not with dropout, where they would share a mask too.
    pub share_prompts: bool,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How it goes on after the warm-up.
    pub schedule: Schedule,
    /// How many times higher the learning rate of `B` is than that of `A`.
    pub loraplus_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The most the gradients' common norm may be; 0 leaves them.
    pub max_grad_norm: f64,
    /// Whether each epoch has its own order.
    pub shuffle: bool,
    /// Seeds order and dropout.
    pub seed: u64,
    /// Whether the policy is the reference before the first update.
    pub begins_as_reference: bool,
}

/// Why an update failed.
#[derive(Debug, Error, Diagnostic)]
pub enum TrainError {
    /// A loss or log-probability is NaN or infinite.
    #[error("update {step}: the loss of {row} is not finite ({detail})")]
    #[diagnostic(help(
        "if it went well before, the learning rate is too high: try a third of it; if it is the first update, the \
         base itself gives no number for this row"
    ))]
    LossNotFinite {
        /// The update, from 1.
        step: usize,
        /// Where the row came from.
        row: String,
        /// Its log-probabilities.
        detail: String,
    },
    /// A gradient is NaN or infinite.
    #[error("update {step}: the gradient of `{tensor}` is not finite")]
    #[diagnostic(help("the learning rate is too high, or max_grad_norm is off: try a third of the learning rate"))]
    GradientNotFinite {
        /// The update, from 1.
        step: usize,
        /// The tensor's name.
        tensor: String,
    },
    /// From the adapters.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Adapter(#[from] AdapterError),
    /// The policy is not the reference where it has to be.
    #[error("the policy begins as the reference, so the first {what} has to be {expected:.9}, but it is {found:.9}")]
    #[diagnostic(help(
        "policy and reference disagree; if a run with [reference] cache = \"off\" starts, the cache is wrong: remove it; \
         else this is a defect of dpo-lora, please report it"
    ))]
    Startup {
        /// What was compared.
        what: &'static str,
        /// The analytic value.
        expected: f64,
        /// The value computed.
        found: f64,
    },
    /// An adapter was given, and the policy is the base.
    #[error("the adapter that training begins from changes no log-prob of the first update")]
    #[diagnostic(help(
        "is it the adapter that was meant? One that is zero is the base itself: leave [adapter] init out"
    ))]
    NoChange,
    /// A GPU has no memory left.
    #[error("the GPU's memory is full")]
    #[diagnostic(help("{help}"))]
    GpuMemory {
        /// What to lower.
        help: &'static str,
        /// From candle.
        source: candle_core::Error,
    },
    /// From candle.
    #[error("while computing")]
    Candle(#[source] candle_core::Error),
}

impl From<candle_core::Error> for TrainError {
    fn from(error: candle_core::Error) -> Self {
        match device::out_of_memory(&error) {
            Some(help) => Self::GpuMemory { help, source: error },
            None => Self::Candle(error),
        }
    }
}

/// A policy in training.
#[derive(Debug)]
pub struct Trainer<'d> {
    model: Model,
    loss: Loss,
    data: &'d Dataset,
    plan: Plan,
    optimizer: AdamW,
    reference: Reference,
    order: Option<(u64, Vec<u32>)>,
    step: usize,
    num_tokens: u64,
}

/// What a trainer needs besides model, data and plan to go on where another stopped.
#[derive(Debug, Clone)]
pub struct Progress {
    /// Updates done.
    pub step: usize,
    /// Tokens seen.
    pub num_tokens: u64,
    /// The optimizer's state.
    pub optimizer: AdamW,
    /// The reference's log-probs known so far.
    pub reference: Reference,
}

impl Progress {
    /// The same on `device`.
    ///
    /// # Errors
    /// What candle returns.
    pub fn to_device(mut self, device: &candle_core::Device) -> candle_core::Result<Self> {
        self.optimizer = self.optimizer.to_device(device)?;
        Ok(self)
    }
}

impl<'d> Trainer<'d> {
    /// A trainer before its first update.
    ///
    /// # Errors
    /// What candle returns.
    pub fn new(model: Model, loss: Loss, data: &'d Dataset, plan: Plan) -> candle_core::Result<Self> {
        let progress = Progress {
            step: 0,
            num_tokens: 0,
            optimizer: AdamW::new(model.adapters())?,
            reference: Reference::unknown(data),
        };
        Ok(Self::resume(model, loss, data, plan, progress))
    }

    /// A trainer that goes on; the model's adapters are those of then.
    #[must_use]
    pub fn resume(model: Model, loss: Loss, data: &'d Dataset, plan: Plan, progress: Progress) -> Self {
        let Progress { step, num_tokens, optimizer, reference } = progress;
        Self { model, loss, data, plan, optimizer, reference, order: None, step, num_tokens }
    }

    /// Base and adapters.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the run was planned to be.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Updates done.
    #[must_use]
    pub fn step(&self) -> usize {
        self.step
    }

    /// The optimizer's state.
    #[must_use]
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// The reference's log-probs known so far.
    #[must_use]
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The same, to take over what a cache has.
    pub fn reference_mut(&mut self) -> &mut Reference {
        &mut self.reference
    }

    /// Examples whose reference the rest of the run needs, in the order of the data: examples with one prompt usually
    /// stand together there, and no shuffling has a say in what is computed with what.
    pub fn needed_references(&mut self) -> Vec<usize> {
        let mut needed = Vec::new();
        if !self.loss.needs_reference() {
            return needed;
        }
        let mut seen = vec![false; self.data.len()];
        for step in self.step..self.plan.steps {
            for example in self.examples(step).0 {
                if !std::mem::replace(&mut seen[example], true) {
                    needed.push(example);
                }
            }
            if needed.len() == seen.len() {
                break;
            }
        }
        needed.sort_unstable();
        needed
    }

    /// Whether the reference of an example is known.
    #[must_use]
    pub fn knows_reference(&self, example: usize) -> bool {
        self.reference.knows(example, &self.data.get(example))
    }

    /// Computes the reference of some examples, at most `budget` rows at once, and keeps it. Returns the tokens of their
    /// sequences.
    ///
    /// # Errors
    /// See [`TrainError`].
    pub fn compute_references(&mut self, examples: &[usize], budget: usize) -> Result<usize, TrainError> {
        let layout = Layout { prompt_span: PromptSpan::No, ..Layout::new(&self.loss, self.plan.share_prompts) };
        let items: Vec<_> = examples.iter().map(|&index| Item::example(self.data, index)).collect();
        self.reference.set_precomputed();
        let mut tokens = 0;
        for batch in layout.micro_batches(&items, budget) {
            let (examples, items): (Vec<usize>, Vec<Item<'_>>) =
                batch.iter().map(|&i| (examples[i], items[i])).unzip();
            let (packed, parts) = (layout.pack(&items), layout.parts(&items));
            tokens += packed.tokens;
            let scores = self.model.forward(&packed, Adapter::Reference, Keep::Scores)?.scores;
            self.set_references(&scores, &packed, &parts, &examples)?;
        }
        Ok(tokens)
    }

    /// Tokens seen, prompts counted with each completion.
    #[must_use]
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// Whether all updates are done.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.step >= self.plan.steps
    }

    /// Measures the policy on held-out examples.
    ///
    /// # Errors
    /// See [`TrainError`].
    pub fn evaluate(&self, evaluation: &mut Evaluation<'_>, advance: &dyn Fn(u64)) -> Result<Metrics, TrainError> {
        evaluation.measure(&self.model, &self.loss, self.step, advance)
    }

    /// The examples of update number `step` (from 0), and the epoch that is reached with it.
    fn examples(&mut self, step: usize) -> (Vec<usize>, f64) {
        let size = |order: &[u32]| order.len().div_ceil(self.plan.batch_size);
        // every epoch is as long as the first
        let per_epoch = match &self.order {
            Some((_, order)) => size(order),
            None => size(&self.data.epoch(0, self.plan.seed, self.plan.shuffle)),
        };
        let (epoch, within) = ((step / per_epoch) as u64, step % per_epoch);
        if self.order.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.order = Some((epoch, self.data.epoch(epoch, self.plan.seed, self.plan.shuffle)));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        let start = within * self.plan.batch_size;
        let end = (start + self.plan.batch_size).min(order.len());
        let indices = order[start..end].iter().map(|&index| index as usize).collect();
        (indices, epoch as f64 + end as f64 / order.len() as f64)
    }

    /// Does one update.
    ///
    /// # Errors
    /// See [`TrainError`]; the adapters are then as they were before.
    pub fn update(&mut self) -> Result<Metrics, TrainError> {
        let started = Instant::now();
        let step = self.step + 1;
        let (examples, epoch) = self.examples(self.step);
        let layout = Layout::new(&self.loss, self.plan.share_prompts);
        let items: Vec<_> = examples.iter().map(|&index| Item::example(self.data, index)).collect();
        let budget = self.plan.micro_batch_tokens;
        let kl =
            if self.loss.needs_kl() { mismatched_kl(&self.model, Adapter::On, &items, layout, budget)? } else { 0.0 };
        let update = Update { examples: items.len(), nll_tokens: nll_tokens(&items, &self.loss), kl };
        let first = self.step == 0;

        let mut gradients = Gradients::default();
        let mut tally = Tally::default();
        let (mut at_start, mut tokens) = (Vec::new(), 0);
        let dropout_key = dropout::key(self.plan.seed, self.step as u64);
        for batch in layout.micro_batches(&items, budget) {
            let examples: Vec<usize> = batch.iter().map(|&i| examples[i]).collect();
            let items: Vec<Item<'_>> = batch.iter().map(|&i| items[i]).collect();
            let (packed, parts) = (layout.pack(&items), layout.parts(&items));
            tokens += packed.tokens;
            let (Forward { scores, activations }, references) =
                self.forward(&packed, &parts, &examples, dropout_key)?;
            let sums: Vec<Sums> = packed.spans.iter().map(|span| Sums::of(&scores[span.clone()])).collect();
            let scored = assemble(items.len(), &parts, &sums, &references);
            let evaluated = self.loss.evaluate(&scored, &update)?;
            for ((&example, scored), &loss) in examples.iter().zip(&scored).zip(&evaluated.losses) {
                check_finite(step, self.data, example, scored, loss)?;
            }
            tally.add(&self.loss, &scored, &parts, &sums);
            tally.add_losses(&evaluated.losses, &evaluated.terms);
            if let Some(activations) = activations {
                let slopes = row_slopes(&packed, &parts, &evaluated.slopes);
                self.model.backward(&packed, activations, &slopes, &mut gradients)?;
            }
            if first {
                at_start.extend(scored);
            }
        }
        let loss = tally.loss(update.examples);
        if first {
            self.check_start(&at_start, loss)?;
        }

        let mut gradients = gradients.in_order(self.model.adapters())?;
        let grad_norm = match self.plan.max_grad_norm {
            0.0 => optimizer::norm(&gradients)?,
            max_norm => optimizer::clip(&mut gradients, max_norm)?,
        };
        if !grad_norm.is_finite() {
            return Err(self.gradient_not_finite(step, &gradients)?);
        }
        let factor = self.plan.schedule.factor(self.step, self.plan.warmup, self.plan.steps);
        let learning_rate = self.plan.learning_rate * factor;
        let Plan { weight_decay, loraplus_ratio, .. } = self.plan;
        let rate = Rate { learning_rate, loraplus_ratio, weight_decay };
        let updated = self.optimizer.step(self.model.adapters(), &gradients, rate)?;
        self.model.replace(updated)?;
        self.step = step;
        self.num_tokens += tokens as u64;

        let mut metrics = Metrics::default();
        metrics.push("step", step as f64);
        metrics.push("epoch", epoch);
        metrics.push("loss", loss);
        metrics.push("grad_norm", grad_norm);
        metrics.push("learning_rate", learning_rate);
        metrics.extend("", &tally.metrics(&self.loss));
        if self.loss.needs_kl() {
            metrics.push("kl", kl);
        }
        metrics.push("num_tokens", self.num_tokens as f64);
        metrics.push("tokens_per_sec", tokens as f64 / started.elapsed().as_secs_f64());
        Ok(metrics)
    }

    /// The policy over a micro-batch, and the reference's log-prob of each span, where the loss needs it.
    fn forward(
        &mut self,
        packed: &Packed,
        parts: &[(usize, Part)],
        examples: &[usize],
        dropout_key: u64,
    ) -> Result<(Forward, Vec<Option<f64>>), TrainError> {
        let known = |memo: &Reference| -> Vec<Option<f64>> {
            parts.iter().map(|&(i, part)| memo.get(examples[i], part)).collect()
        };
        let keep = Keep::Activations { dropout_key, saved: &self.plan.saved };
        if !self.loss.needs_reference() {
            return Ok((self.model.forward(packed, Adapter::On, keep)?, vec![None; parts.len()]));
        }
        let references = known(&self.reference);
        if references.iter().all(Option::is_some) {
            return Ok((self.model.forward(packed, Adapter::On, keep)?, references));
        }
        let (forward, scores) = self.model.forward_with_reference(packed, Adapter::On, keep)?;
        self.set_references(&scores, packed, parts, examples)?;
        Ok((forward, known(&self.reference)))
    }

    /// Keeps what was not known. What is known stays: it came from another micro-batch and may differ in the last bit.
    fn set_references(
        &mut self,
        scores: &[TokenScore],
        packed: &Packed,
        parts: &[(usize, Part)],
        examples: &[usize],
    ) -> Result<(), TrainError> {
        for (&(i, part), span) in parts.iter().zip(&packed.spans) {
            if self.reference.get(examples[i], part).is_none() {
                let logp = Sums::of(&scores[span.clone()]).logp;
                if !logp.is_finite() {
                    let (row, detail) = (self.data.origin(examples[i]), format!("the base gives it {logp}"));
                    return Err(TrainError::LossNotFinite { step: self.step + 1, row, detail });
                }
                self.reference.set(examples[i], part, logp);
            }
        }
        Ok(())
    }

    /// Whether the reference is what the recipe says: what the policy begins as, or the base below an adapter.
    fn check_start(&self, scored: &[Scored], loss: f64) -> Result<(), TrainError> {
        let sides = || scored.iter().flat_map(|s| [s.chosen, s.rejected]).flatten();
        let differs = |s: &Sequence| s.reference.is_some_and(|reference| !reference::agree(s.logp, reference));
        if !(self.plan.begins_as_reference || self.model.is_reference()?) {
            return match sides().any(|s| s.reference.is_some()) && !sides().any(|s| s.reference != Some(s.logp)) {
                true => Err(TrainError::NoChange),
                false => Ok(()),
            };
        }
        // a zero adapter adds exact zeros, so the two agree to the rounding of the sum over examples; otherwise another
        // packing, or an update that takes another back, rounds its own way
        if self.model.is_reference()? && !self.reference.is_precomputed() {
            return match self.loss.initial_value(scored) {
                Some(expected) if (loss - expected).abs() > 1e-9 * expected.abs().max(1.0) => {
                    Err(TrainError::Startup { what: "loss", expected, found: loss })
                }
                _ => Ok(()),
            };
        }
        match sides().find(differs) {
            Some(Sequence { logp, reference: Some(expected), .. }) => {
                Err(TrainError::Startup { what: "log-prob", expected, found: logp })
            }
            _ => Ok(()),
        }
    }

    fn gradient_not_finite(&self, step: usize, gradients: &[candle_core::Tensor]) -> candle_core::Result<TrainError> {
        for ((name, _), gradient) in self.model.adapters().tensors().zip(gradients) {
            if !optimizer::norm(std::slice::from_ref(gradient))?.is_finite() {
                return Ok(TrainError::GradientNotFinite { step, tensor: name });
            }
        }
        Ok(TrainError::GradientNotFinite { step, tensor: "all of them together".into() })
    }
}

/// What each of `examples` examples was scored to, from the sums of its spans.
pub(super) fn assemble(
    examples: usize,
    parts: &[(usize, Part)],
    sums: &[Sums],
    references: &[Option<f64>],
) -> Vec<Scored> {
    let mut scored = vec![Scored { prompt: None, chosen: None, rejected: None }; examples];
    for ((&(i, part), sums), &reference) in parts.iter().zip(sums).zip(references) {
        let side = match part {
            Part::Prompt => &mut scored[i].prompt,
            Part::Chosen => &mut scored[i].chosen,
            Part::Rejected => &mut scored[i].rejected,
        };
        *side = Some(Sequence { logp: sums.logp, reference, tokens: sums.tokens });
    }
    scored
}

/// The slope of each scored row: that of the sequence it belongs to, summed over the examples that name it.
fn row_slopes(packed: &Packed, parts: &[(usize, Part)], slopes: &[Slopes]) -> Vec<f64> {
    let mut rows = vec![0.0; packed.targets.len()];
    for (span, &(i, part)) in packed.spans.iter().zip(parts) {
        let slope = match part {
            Part::Prompt => slopes[i].prompt,
            Part::Chosen => slopes[i].chosen,
            Part::Rejected => slopes[i].rejected,
        };
        rows[span.clone()].iter_mut().for_each(|row| *row += slope);
    }
    rows
}

/// Tokens that a negative log-likelihood is averaged over: of the chosen completions, and of their prompts if the loss
/// scores those (a prompt's first token is predicted by nothing).
pub(super) fn nll_tokens(items: &[Item<'_>], loss: &Loss) -> usize {
    let prompt = |item: &Item<'_>| if loss.scores_prompt() { item.prompt.len() - 1 } else { 0 };
    items.iter().filter_map(|item| Some(item.chosen?.len() + prompt(item))).sum()
}

/// KTO's estimate of `KL(policy ‖ reference)`: the mean of `log π/π_ref` over completions after prompts they do not
/// belong to, at least zero. Each completion of the update stands after the prompt of the next example that has another
/// one; where there is none, nothing can be mismatched and the estimate is zero.
pub(super) fn mismatched_kl(
    model: &Model,
    policy: Adapter,
    items: &[Item<'_>],
    layout: Layout,
    budget: usize,
) -> candle_core::Result<f64> {
    let mut mismatched = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let before = (1..items.len()).map(|back| &items[(i + items.len() - back) % items.len()]);
        let other = before.into_iter().find(|other| other.prompt != item.prompt);
        if let Some(completion) = other.and_then(|other| other.chosen.or(other.rejected)) {
            mismatched.push(Item { key: 0, prompt: item.prompt, chosen: Some(completion), rejected: None });
        }
    }
    if mismatched.is_empty() {
        return Ok(0.0);
    }
    let mut sum = 0.0;
    for batch in layout.micro_batches(&mismatched, budget) {
        let packed = layout.pack(&batch.into_iter().map(|i| mismatched[i]).collect::<Vec<_>>());
        let (forward, reference) = model.forward_with_reference(&packed, policy, Keep::Scores)?;
        let logp = |scores: &[TokenScore]| scores.iter().map(|score| score.logp).sum::<f64>();
        sum += logp(&forward.scores) - logp(&reference);
    }
    Ok((sum / mismatched.len() as f64).max(0.0))
}

pub(super) fn check_finite(
    step: usize,
    data: &Dataset,
    example: usize,
    scored: &Scored,
    loss: f64,
) -> Result<(), TrainError> {
    let sides = [("chosen", &scored.chosen), ("rejected", &scored.rejected)];
    let finite = |x: f64| x.is_finite();
    let sequences = || sides.iter().filter_map(|(name, sequence)| sequence.as_ref().map(|s| (name, s)));
    if finite(loss) && sequences().all(|(_, s)| finite(s.logp) && s.reference.is_none_or(finite)) {
        return Ok(());
    }
    let describe = |(name, s): (&&str, &Sequence)| match s.reference {
        Some(reference) => format!("{name}: policy {}, reference {reference}", s.logp),
        None => format!("{name}: policy {}", s.logp),
    };
    let detail = sequences().map(describe).collect::<Vec<_>>().join("; ");
    Err(TrainError::LossNotFinite { step, row: data.origin(example), detail })
}
