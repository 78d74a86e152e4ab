//! Losses: formulas on the log-probabilities of whole sequences. Nothing here knows of models or tokens.
//!
//! | table | learns from | reference | of the paper |
//! |---|---|---|---|
//! | [`[loss.dpo]`](Dpo) | pairs | yes | <https://arxiv.org/abs/2305.18290> |
//! | [`[loss.ipo]`](Ipo) | pairs | yes | <https://arxiv.org/abs/2310.12036> |
//! | [`[loss.kto]`](Kto) | labelled completions | yes | <https://arxiv.org/abs/2402.01306> |
//! | [`[loss.orpo]`](Orpo) | pairs | no | <https://arxiv.org/abs/2403.07691> |
//! | [`[loss.sft]`](Sft) | chosen completions | no | |
//!
//! A loss is written forward only, on f64 vectors with one number an example, and candle differentiates those few
//! numbers. Its derivative with respect to each summed log-probability is all that the model's backward pass needs.
//!
//! The loss belongs to the whole update: [`Loss::evaluate`] takes any part of an update, and the parts add up to the
//! same loss and the same gradient however the update is cut.
//!
//! To add a loss, write its file and its variant of [`Loss`]; the compiler asks for the rest.

mod dpo;
pub mod elementwise;
mod ipo;
mod kto;
mod orpo;
mod sft;

use candle_core::{Device, Result, Tensor, Var, bail};
use serde::{Deserialize, Serialize};

pub use dpo::Dpo;
pub use ipo::{Ipo, Reduction};
pub use kto::Kto;
pub use orpo::{Nll, Orpo};
pub use sft::Sft;

/// The loss of a recipe: `[loss.dpo]` is `Loss::Dpo`, and the table's keys are its struct's fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Direct Preference Optimization, and cDPO.
    Dpo(Dpo),
    /// Identity Preference Optimization.
    Ipo(Ipo),
    /// Kahneman-Tversky Optimization.
    Kto(Kto),
    /// Odds Ratio Preference Optimization.
    Orpo(Orpo),
    /// Supervised fine-tuning.
    Sft(Sft),
}

/// What a loss learns from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Examples {
    /// A chosen and a rejected completion of one prompt.
    Pairs,
    /// A completion that is chosen (desirable) or rejected (undesirable).
    Labelled,
    /// A chosen completion; a rejected one is not looked at.
    Demonstrations,
}

/// Log-probabilities of one sequence of tokens, each the sum over its tokens, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sequence {
    /// Under the policy.
    pub logp: f64,
    /// Under the reference, where it was asked.
    pub reference: Option<f64>,
    /// Number of tokens in the sum.
    pub tokens: usize,
}

/// One scored example: a pair has both sides, a labelled completion the one of its label.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scored {
    /// The prompt's own tokens, from the second on; only where [`Loss::scores_prompt`].
    pub prompt: Option<Sequence>,
    /// The chosen or desirable completion.
    pub chosen: Option<Sequence>,
    /// The rejected or undesirable completion.
    pub rejected: Option<Sequence>,
}

/// What a loss must know of the whole update to evaluate a part of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Number of examples.
    pub examples: usize,
    /// Number of tokens of all chosen completions, and of all prompts where [`Loss::scores_prompt`].
    pub nll_tokens: usize,
    /// The reference point of [`Kto`] in nats, not below zero; 0 where not [`Loss::needs_kl`].
    pub kl: f64,
}

/// Derivatives of the update's loss with respect to the summed log-probabilities of one example; 0 for a
/// side that it does not have.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Slopes {
    /// With respect to the prompt's.
    pub prompt: f64,
    /// With respect to the chosen completion's.
    pub chosen: f64,
    /// With respect to the rejected completion's.
    pub rejected: f64,
}

/// What part of an update contributes to its loss, with one entry an example.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluated {
    /// Contributions: the loss of the update is their sum over all its parts, divided by [`Update::examples`].
    pub losses: Vec<f64>,
    /// Derivatives of the update's loss, the division included.
    pub slopes: Vec<Slopes>,
    /// Parts of the loss that are reported beside it, by TRL's name; to be averaged as `losses` are.
    pub terms: Vec<(&'static str, Vec<f64>)>,
}

impl Loss {
    /// The name of its table in a recipe.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dpo(_) => "dpo",
            Self::Ipo(_) => "ipo",
            Self::Kto(_) => "kto",
            Self::Orpo(_) => "orpo",
            Self::Sft(_) => "sft",
        }
    }

    /// β, of those that have one.
    #[must_use]
    pub fn beta(&self) -> Option<f64> {
        match self {
            Self::Dpo(dpo) => Some(dpo.beta.get()),
            Self::Ipo(ipo) => Some(ipo.beta.get()),
            Self::Kto(kto) => Some(kto.beta.get()),
            Self::Orpo(orpo) => Some(orpo.beta.get()),
            Self::Sft(_) => None,
        }
    }

    /// What it learns from.
    #[must_use]
    pub fn examples(&self) -> Examples {
        match self {
            Self::Dpo(_) | Self::Ipo(_) | Self::Orpo(_) => Examples::Pairs,
            Self::Kto(_) => Examples::Labelled,
            Self::Sft(_) => Examples::Demonstrations,
        }
    }

    /// Whether completions must be scored under the reference too.
    #[must_use]
    pub fn needs_reference(&self) -> bool {
        match self {
            Self::Dpo(_) | Self::Ipo(_) | Self::Kto(_) => true,
            Self::Orpo(_) | Self::Sft(_) => false,
        }
    }

    /// Whether it needs [`Update::kl`].
    #[must_use]
    pub fn needs_kl(&self) -> bool {
        match self {
            Self::Kto(_) => true,
            Self::Dpo(_) | Self::Ipo(_) | Self::Orpo(_) | Self::Sft(_) => false,
        }
    }

    /// Whether the tokens of the prompt must be scored too.
    #[must_use]
    pub fn scores_prompt(&self) -> bool {
        match self {
            Self::Orpo(orpo) => orpo.nll == Nll::PromptAndCompletion,
            Self::Dpo(_) | Self::Ipo(_) | Self::Kto(_) | Self::Sft(_) => false,
        }
    }

    /// The update that consists of `examples` and nothing else.
    #[must_use]
    pub fn update(&self, examples: &[Scored], kl: f64) -> Update {
        let sides = |e: &Scored| [e.chosen, e.prompt.filter(|_| self.scores_prompt())];
        let nll_tokens = examples.iter().flat_map(sides).flatten().map(|sequence| sequence.tokens).sum();
        Update { examples: examples.len(), nll_tokens, kl }
    }

    /// The loss of an update of `examples` whose policy is the reference, if the loss is the same for all policies of
    /// which that is true. Of the examples only the labels are looked at.
    #[must_use]
    pub fn initial_value(&self, examples: &[Scored]) -> Option<f64> {
        match self {
            Self::Dpo(_) => Some(std::f64::consts::LN_2),
            Self::Ipo(ipo) => Some(ipo.target().powi(2)),
            Self::Kto(kto) => {
                let weights = examples.iter().map(|example| kto.weight(example.chosen.is_some()));
                Some(weights.sum::<f64>() / 2.0 / examples.len() as f64)
            }
            Self::Orpo(_) | Self::Sft(_) => None,
        }
    }

    /// The implicit reward of a completion, as TRL reports it: `β (log π − log π_ref)`, or `β log π / |y|` for ORPO.
    /// None for SFT, and where the reference is needed and was not asked.
    #[must_use]
    pub fn reward(&self, completion: &Sequence) -> Option<f64> {
        let log_ratio = completion.reference.map(|reference| completion.logp - reference);
        match self {
            Self::Dpo(dpo) => log_ratio.map(|a| dpo.beta.get() * a),
            Self::Ipo(ipo) => log_ratio.map(|a| ipo.beta.get() * a),
            Self::Kto(kto) => log_ratio.map(|a| kto.beta.get() * a),
            Self::Orpo(orpo) => Some(orpo.beta.get() * completion.logp / completion.tokens as f64),
            Self::Sft(_) => None,
        }
    }

    /// Evaluates and differentiates what `examples`, a part of `update`, contribute to its loss.
    ///
    /// # Errors
    /// An example without a side, a reference or a token that the loss needs.
    pub fn evaluate(&self, examples: &[Scored], update: &Update) -> Result<Evaluated> {
        self.check(examples)?;
        let prompt = Side::new(examples.iter().map(|example| example.prompt))?;
        let chosen = Side::new(examples.iter().map(|example| example.chosen))?;
        let rejected = Side::new(examples.iter().map(|example| example.rejected))?;

        let mut terms = Vec::new();
        let losses = match self {
            Self::Dpo(dpo) => dpo.losses(&chosen.log_ratios()?, &rejected.log_ratios()?)?,
            Self::Ipo(ipo) => match ipo.reduction {
                Reduction::Sum => ipo.losses(&chosen.log_ratios()?, &rejected.log_ratios()?)?,
                Reduction::TokenMean => {
                    let mean = |side: &Side| side.log_ratios()? / &side.tokens;
                    ipo.losses(&mean(&chosen)?, &mean(&rejected)?)?
                }
            },
            Self::Kto(kto) => {
                let desirable: Vec<bool> = examples.iter().map(|example| example.chosen.is_some()).collect();
                // of the two, the side that an example does not have is zero
                let log_ratios = (chosen.log_ratios()? + rejected.log_ratios()?)?;
                kto.losses(&log_ratios, &desirable, update.kl)?
            }
            Self::Orpo(orpo) => {
                let nll = match orpo.nll {
                    Nll::Completion => Sft {}.losses(&chosen.logps, update)?,
                    Nll::PromptAndCompletion => Sft {}.losses(&(&*prompt.logps + &*chosen.logps)?, update)?,
                };
                let log_odds_ratios = orpo
                    .log_odds_ratios(&(&*chosen.logps / &chosen.tokens)?, &(&*rejected.logps / &rejected.tokens)?)?;
                terms.push(("nll_loss", nll.to_vec1()?));
                terms.push(("log_odds_ratio", elementwise::log_sigmoid(&log_odds_ratios)?.to_vec1()?));
                terms.push(("log_odds_chosen", log_odds_ratios.to_vec1()?));
                (nll + orpo.losses(&log_odds_ratios)?)?
            }
            Self::Sft(sft) => sft.losses(&chosen.logps, update)?,
        };

        let mut gradients = (losses.sum_all()? / update.examples as f64)?.backward()?;
        let mut slopes = |side: &Side| match gradients.remove(&side.logps) {
            Some(gradient) => gradient.to_vec1::<f64>(),
            None => Ok(vec![0.0; examples.len()]),
        };
        let columns = slopes(&prompt)?.into_iter().zip(slopes(&chosen)?).zip(slopes(&rejected)?);
        Ok(Evaluated {
            losses: losses.to_vec1()?,
            slopes: columns.map(|((prompt, chosen), rejected)| Slopes { prompt, chosen, rejected }).collect(),
            terms,
        })
    }

    /// Refuses examples that lack what the loss is a function of.
    fn check(&self, examples: &[Scored]) -> Result<()> {
        for (i, example) in examples.iter().enumerate() {
            let (chosen, rejected) = (example.chosen.is_some(), example.rejected.is_some());
            match self.examples() {
                Examples::Pairs if chosen && rejected => {}
                Examples::Labelled if chosen != rejected => {}
                Examples::Demonstrations if chosen => {}
                needed => bail!("{}: example {i} is not one of {needed:?}", self.name()),
            }
            for completion in [example.chosen, example.rejected].into_iter().flatten() {
                if completion.tokens == 0 {
                    bail!("{}: a completion of example {i} has no tokens", self.name())
                }
                if self.needs_reference() && completion.reference.is_none() {
                    bail!("{}: a completion of example {i} was not scored under the reference", self.name())
                }
            }
            if self.scores_prompt() && example.prompt.is_none() {
                bail!("{}: the prompt of example {i} was not scored", self.name())
            }
        }
        Ok(())
    }
}

/// One side of the examples as vectors `[n]`, with zeros where an example does not have it.
struct Side {
    logps: Var,
    references: Tensor,
    tokens: Tensor,
    /// 1 where an example has this side.
    present: Tensor,
}

impl Side {
    fn new(sequences: impl Iterator<Item = Option<Sequence>>) -> Result<Self> {
        let sequences: Vec<_> = sequences.collect();
        let column = |of: fn(Sequence) -> f64| {
            let values: Vec<f64> = sequences.iter().map(|sequence| sequence.map_or(0.0, of)).collect();
            Tensor::from_vec(values, sequences.len(), &Device::Cpu)
        };
        Ok(Self {
            logps: Var::from_tensor(&column(|sequence| sequence.logp)?)?,
            references: column(|sequence| sequence.reference.unwrap_or(0.0))?,
            tokens: column(|sequence| sequence.tokens as f64)?,
            present: column(|_| 1.0)?,
        })
    }

    /// `log π − log π_ref`; zero, whatever the variable is, where an example does not have this side.
    fn log_ratios(&self) -> Result<Tensor> {
        (&*self.logps - &self.references)? * &self.present
    }
}

#[cfg(test)]
mod tests;
