//! Held-out examples: how well the policy does on what it does not train on.

use super::batch::{Item, Layout, Part};
use super::metrics::{Metrics, Sums, Tally};
use super::trainer::{TrainError, assemble, check_finite, mismatched_kl, nll_tokens};
use crate::data::Dataset;
use crate::loss::{Examples, Loss, Scored, Update};
use crate::model::{Adapter, Keep, Model};
use crate::ops::completion_logps::TokenScore;

/// Held-out examples, packed, with what the reference says about them.
#[derive(Debug)]
pub struct Evaluation<'d> {
    data: &'d Dataset,
    /// Number of each item's example.
    examples: Vec<usize>,
    items: Vec<Item<'d>>,
    layout: Layout,
    batches: Vec<Vec<usize>>,
    budget: usize,
    /// Of each scored token of each micro-batch, once computed.
    reference: Vec<Vec<f64>>,
    margins: Vec<Option<PairMargin>>,
}

/// How far the chosen answer of a pair is above the rejected one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairMargin {
    /// Of their implicit rewards; none for losses without rewards.
    pub reward: Option<f64>,
    /// Of their log-probabilities under the policy, in nats.
    pub logp: f64,
}

impl<'d> Evaluation<'d> {
    /// Plans micro-batches of at most `budget` rows; nothing is kept for a backward pass, so it may be several times
    /// that of training.
    #[must_use]
    pub fn new(data: &'d Dataset, loss: &Loss, share_prompts: bool, budget: usize) -> Self {
        Self::of((0..data.len()).collect(), data, loss, share_prompts, budget)
    }

    /// The same for some of the examples, by number.
    #[must_use]
    pub fn of(examples: Vec<usize>, data: &'d Dataset, loss: &Loss, share_prompts: bool, budget: usize) -> Self {
        let items: Vec<_> = examples.iter().map(|&index| Item::example(data, index)).collect();
        let layout = Layout::new(loss, share_prompts);
        let batches = layout.micro_batches(&items, budget);
        Self { data, examples, items, layout, batches, budget, reference: Vec::new(), margins: Vec::new() }
    }

    /// What was measured last of each example, in the order of the data; none for an example that is no pair.
    #[must_use]
    pub fn margins(&self) -> &[Option<PairMargin>] {
        &self.margins
    }

    /// Number of examples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The metrics of the policy; the whole set counts as one update, so they do not depend on any batch size.
    ///
    /// Besides TRL's: `perplexity` of the chosen completions, and `kl_to_reference`, the mean over completion tokens of
    /// `½ (log π/π_ref)²`. That is Schulman's k2 estimator on the tokens of the data, which are no samples of the policy:
    /// it tells how far the policy went. (k3, `r − 1 − log r`, is unbiased on samples and here dominated by the few
    /// rejected tokens that the policy has ruled out.)
    pub(super) fn measure(
        &mut self,
        model: &Model,
        loss: &Loss,
        step: usize,
        advance: &dyn Fn(u64),
    ) -> Result<Metrics, TrainError> {
        let (metrics, scored) = self.examine(model, loss, Adapter::On, step, advance)?;
        self.margins = scored.iter().map(|scored| PairMargin::of(scored, loss)).collect();
        Ok(metrics)
    }

    /// The metrics of [`measure`](Self::measure) for the model with `policy` on, and what each example was scored to. With
    /// [`Adapter::Off`] they are those of the base.
    ///
    /// # Errors
    /// See [`TrainError`].
    pub(crate) fn examine(
        &mut self,
        model: &Model,
        loss: &Loss,
        policy: Adapter,
        step: usize,
        advance: &dyn Fn(u64),
    ) -> Result<(Metrics, Vec<Scored>), TrainError> {
        // the same numbers, need not be computed twice
        let same = match policy {
            Adapter::On => model.is_reference()?,
            Adapter::Off => !model.has_reference_adapter(),
            Adapter::Reference => true,
        };
        let kl = match loss.needs_kl() && !same {
            true => mismatched_kl(model, policy, &self.items, self.layout, self.budget)?,
            false => 0.0,
        };
        let sides = |item: &Item<'_>| [item.chosen, item.rejected].into_iter().flatten().count();
        let examples = match loss.examples() {
            Examples::Labelled => self.items.iter().map(sides).sum(),
            Examples::Pairs | Examples::Demonstrations => self.items.len(),
        };
        let update = Update { examples, nll_tokens: nll_tokens(&self.items, loss), kl };
        let mut all = vec![Scored::default(); self.items.len()];
        let mut tally = Tally::default();
        let (mut k2, mut tokens) = (0.0, 0);
        for (number, batch) in self.batches.iter().enumerate() {
            let items: Vec<_> = batch.iter().map(|&i| self.items[i]).collect();
            let (packed, parts) = (self.layout.pack(&items), self.layout.parts(&items));
            let logps = |scores: &[TokenScore]| scores.iter().map(|score| score.logp).collect();
            let scores = match (self.reference.len() == number, same) {
                (true, false) => {
                    let (forward, reference) = model.forward_with_reference(&packed, policy, Keep::Scores)?;
                    self.reference.push(logps(&reference));
                    forward.scores
                }
                (unknown, _) => {
                    let scores = model.forward(&packed, policy, Keep::Scores)?.scores;
                    if unknown {
                        self.reference.push(logps(&scores));
                    }
                    scores
                }
            };
            let reference = &self.reference[number];
            let completions = parts.iter().zip(&packed.spans).filter(|((_, part), _)| *part != Part::Prompt);
            for token in completions.flat_map(|(_, span)| span.clone()) {
                let log_ratio = reference[token] - scores[token].logp;
                k2 += 0.5 * log_ratio * log_ratio;
                tokens += 1;
            }
            let spans = || packed.spans.iter().cloned();
            let sums: Vec<Sums> = spans().map(|span| Sums::of(&scores[span])).collect();
            let references: Vec<_> = spans().map(|span| Some(reference[span].iter().sum())).collect();
            let scored = assemble(items.len(), &parts, &sums, &references);
            let inputs: Vec<(usize, Scored)> = batch
                .iter()
                .zip(&scored)
                .flat_map(|(&i, scored)| rows(scored, loss).map(move |row| (i, row)))
                .collect();
            let evaluated = loss.evaluate(&inputs.iter().map(|(_, row)| *row).collect::<Vec<_>>(), &update)?;
            for ((example, row), &loss) in inputs.iter().zip(&evaluated.losses) {
                check_finite(step, self.data, self.examples[*example], row, loss)?;
            }
            tally.add(loss, &scored, &parts, &sums);
            tally.add_losses(&evaluated.losses, &evaluated.terms);
            batch.iter().zip(scored).for_each(|(&i, scored)| all[i] = scored);
            advance(batch.len() as u64);
        }
        let mut metrics = Metrics::default();
        metrics.push("loss", tally.loss(examples));
        metrics.extend("", &tally.metrics(loss));
        metrics.push("kl_to_reference", k2 / tokens.max(1) as f64);
        if let Some(perplexity) = tally.chosen_perplexity() {
            metrics.push("perplexity", perplexity);
        }
        Ok((metrics, all))
    }
}

impl PairMargin {
    fn of(scored: &Scored, loss: &Loss) -> Option<Self> {
        let (chosen, rejected) = (scored.chosen?, scored.rejected?);
        let reward = loss.reward(&chosen).zip(loss.reward(&rejected));
        Some(Self { reward: reward.map(|(chosen, rejected)| chosen - rejected), logp: chosen.logp - rejected.logp })
    }
}

/// The rows that the loss counts: KTO learns from each side of a pair by itself.
fn rows(scored: &Scored, loss: &Loss) -> impl Iterator<Item = Scored> + use<> {
    let apart = loss.examples() == Examples::Labelled;
    let one_side = |chosen, rejected| Scored { prompt: scored.prompt, chosen, rejected };
    let rows = match (scored.chosen, scored.rejected) {
        (Some(_), Some(_)) if apart => [Some(one_side(scored.chosen, None)), Some(one_side(None, scored.rejected))],
        _ => [Some(*scored), None],
    };
    rows.into_iter().flatten()
}
