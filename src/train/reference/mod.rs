//! Log-probabilities of the reference: computed once, kept in memory, in checkpoints and in a cache.

mod cache;

use serde::{Deserialize, Serialize};

pub use cache::{BrokenPart, Entry, ReferenceCache};

use super::batch::Part;
use crate::data::{Dataset, Example};

/// The `[reference]` table of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReferenceConfig {
    /// Whether it is the base alone or the base with the adapter of `[adapter] init`. Default: the latter if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ReferenceModel>,
    /// Where its log-probs are kept between runs.
    pub cache: CachePlace,
}

/// What the policy is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReferenceModel {
    /// The base with no adapter.
    Base,
    /// The base with the adapter that training begins from.
    Init,
}

/// Where the reference's log-probs are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePlace {
    /// In the user's cache folder, for all runs.
    #[default]
    User,
    /// In the run folder.
    Run,
    /// Nowhere: they are computed in the update that first needs them.
    Off,
}

/// A side of an example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Chosen,
    Rejected,
}

impl Side {
    pub(crate) const BOTH: [Self; 2] = [Self::Chosen, Self::Rejected];

    fn of(part: Part) -> Self {
        match part {
            Part::Chosen => Self::Chosen,
            Part::Rejected => Self::Rejected,
            Part::Prompt => unreachable!("no loss compares prompts with the reference"),
        }
    }

    pub(crate) fn tokens<'d>(self, example: &Example<'d>) -> Option<&'d [u32]> {
        match self {
            Self::Chosen => example.chosen,
            Self::Rejected => example.rejected,
        }
    }
}

/// Of every example's sides, summed over the completion; what is not known yet is NaN.
///
/// They are part of a checkpoint: a resumed run has to equal one that was not stopped, even where a cache is gone.
#[derive(Debug, Clone)]
pub struct Reference {
    logps: Vec<[f64; 2]>,
    /// Whether any of them was computed otherwise than in the update that needed it.
    precomputed: bool,
}

impl Reference {
    pub(super) fn unknown(data: &Dataset) -> Self {
        Self { logps: vec![[f64::NAN; 2]; data.len()], precomputed: false }
    }

    /// From what [`Reference::flat`] gave; `None` if it is of another number of examples.
    #[must_use]
    pub fn restore(flat: &[f64], data: &Dataset) -> Option<Self> {
        let (logps, rest) = flat.as_chunks::<2>();
        let fits = rest.is_empty() && logps.len() == data.len();
        fits.then(|| Self { logps: logps.to_vec(), precomputed: true })
    }

    /// Chosen and rejected of each example.
    #[must_use]
    pub fn flat(&self) -> &[f64] {
        self.logps.as_flattened()
    }

    /// Takes over what a cache has.
    pub fn take(&mut self, entries: &[Entry]) {
        for Entry { example, logps } in entries {
            for (known, logp) in self.logps[*example].iter_mut().zip(logps) {
                *known = logp.unwrap_or(*known);
            }
        }
        self.precomputed |= !entries.is_empty();
    }

    /// What a cache has to hold of these examples.
    #[must_use]
    pub fn entries(&self, examples: &[usize]) -> Vec<Entry> {
        let entry = |&example: &usize| Entry {
            example,
            logps: self.logps[example].map(|logp| Some(logp).filter(|logp| !logp.is_nan())),
        };
        examples.iter().map(entry).collect()
    }

    /// Whether both sides of an example are known, as far as it has them.
    pub(super) fn knows(&self, index: usize, example: &Example<'_>) -> bool {
        let known = |side: Side| side.tokens(example).is_none() || !self.logps[index][side as usize].is_nan();
        Side::BOTH.into_iter().all(known)
    }

    /// Makes these examples unknown again.
    pub fn forget(&mut self, examples: &[usize]) {
        examples.iter().for_each(|&example| self.logps[example] = [f64::NAN; 2]);
    }

    /// Whether values may come from another packing than the update's, and differ from it by rounding.
    pub(super) fn is_precomputed(&self) -> bool {
        self.precomputed
    }

    pub(super) fn set_precomputed(&mut self) {
        self.precomputed = true;
    }

    pub(super) fn get(&self, example: usize, part: Part) -> Option<f64> {
        Some(self.logps[example][Side::of(part) as usize]).filter(|logp| !logp.is_nan())
    }

    pub(super) fn set(&mut self, example: usize, part: Part, logp: f64) {
        self.logps[example][Side::of(part) as usize] = logp;
    }
}

/// Whether two computations of one log-prob agree.
///
/// Another packing or another processor adds in another order: f32 leaves each token's log-prob right to some 1e-6 and
/// their sum to about 1e-6 of its size. Another base or another row differs by nats.
#[must_use]
pub fn agree(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-3 + 1e-5 * b.abs()
}
