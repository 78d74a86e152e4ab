//! Log-probabilities of the reference, kept once they were computed.

use super::batch::Part;
use crate::data::Dataset;

/// Of every example's sides, summed over the completion; what is not known yet is NaN.
///
/// A second epoch reads them from here. They are part of a checkpoint: computed again in another micro-batch they could
/// differ in the last bit, and a resumed run has to equal one that was not stopped.
#[derive(Debug, Clone)]
pub struct Reference {
    logps: Vec<[f64; 2]>,
}

impl Reference {
    pub(super) fn unknown(data: &Dataset) -> Self {
        Self { logps: vec![[f64::NAN; 2]; data.len()] }
    }

    /// From what [`Reference::flat`] gave; `None` if it is of another number of examples.
    #[must_use]
    pub fn restore(flat: &[f64], data: &Dataset) -> Option<Self> {
        let (logps, rest) = flat.as_chunks::<2>();
        (rest.is_empty() && logps.len() == data.len()).then(|| Self { logps: logps.to_vec() })
    }

    /// Chosen and rejected of each example.
    #[must_use]
    pub fn flat(&self) -> &[f64] {
        self.logps.as_flattened()
    }

    pub(super) fn get(&self, example: usize, part: Part) -> Option<f64> {
        Some(self.logps[example][side(part)]).filter(|logp| !logp.is_nan())
    }

    pub(super) fn set(&mut self, example: usize, part: Part, logp: f64) {
        self.logps[example][side(part)] = logp;
    }
}

fn side(part: Part) -> usize {
    match part {
        Part::Chosen => 0,
        Part::Rejected => 1,
        Part::Prompt => unreachable!("no loss compares prompts with the reference"),
    }
}
