//! A base's matrices with the adapters' updates added, one at a time.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::ExportError;
use crate::adapter::Adapters;
use crate::model::{Base, BaseFiles, DecoderConfig, Part};
use crate::quant::Weight;

/// A base on disk and the adapters to add to it.
///
/// The base is dequantized as it was while training, so that what is merged computes what base and adapter did.
#[derive(Debug)]
pub struct Merge<'m> {
    files: BaseFiles,
    config: &'m DecoderConfig,
    adapters: &'m Adapters,
}

impl<'m> Merge<'m> {
    /// Opens the files of `base`, kept as `config` says.
    ///
    /// # Errors
    /// They are missing or broken.
    pub fn new(base: &Base, config: &'m DecoderConfig, adapters: &'m Adapters) -> Result<Self, ExportError> {
        Ok(Self { files: base.files()?, config, adapters })
    }

    /// The base's files.
    #[must_use]
    pub fn files(&self) -> &BaseFiles {
        &self.files
    }

    /// The base's configuration.
    #[must_use]
    pub fn config(&self) -> &'m DecoderConfig {
        self.config
    }

    /// Whether an adapter sits on a part.
    #[must_use]
    pub fn is_adapted(&self, part: &Part) -> bool {
        part.module().is_some_and(|module| self.adapters.get(module).is_some())
    }

    /// A part as the base has it.
    ///
    /// # Errors
    /// It is missing or broken.
    pub fn base(&self, part: &Part) -> Result<Weight, ExportError> {
        Ok(self.files.read(part, self.config)?)
    }

    /// A part with the update, f32.
    ///
    /// # Errors
    /// It is missing or broken, or the merged values are no numbers.
    pub fn merged(&self, part: &Part) -> Result<Tensor, ExportError> {
        let weight = self.base(part)?.dense(DType::F32)?;
        let Some(lora) = part.module().and_then(|module| self.adapters.get(module)) else { return Ok(weight) };
        let merged = lora.merged(&weight)?;
        // the sum of anything with an infinity or NaN is none
        if !merged.sum_all()?.to_scalar::<f32>()?.is_finite() && !all_finite(&merged)? {
            return Err(ExportError::Values {
                tensor: part.name(self.config),
                problem: "merged values are infinite or not a number".into(),
                help: "the adapter or the base is broken; was the run's loss finite to its end?",
            });
        }
        Ok(merged)
    }
}

fn all_finite(tensor: &Tensor) -> Result<bool, candle_core::Error> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.iter().all(|x| x.is_finite()))
}

/// Rows of a frozen matrix, dequantized: `[rows, columns]`, one after the other.
pub(super) fn dense_rows(weight: &Weight, rows: Range<usize>) -> Result<Vec<f32>, candle_core::Error> {
    match weight {
        Weight::Dense(tensor) => tensor.narrow(0, rows.start, rows.len())?.flatten_all()?.to_vec1(),
        #[cfg(feature = "cuda")]
        Weight::OnDevice(resident) => {
            let ids: Vec<u32> = rows.map(|row| row as u32).collect();
            resident.gather(&ids, DType::F32)?.flatten_all()?.to_vec1()
        }
        Weight::Quantized(quantized) => {
            let mut values = vec![0.0; rows.len() * quantized.columns()];
            quantized.panel(rows, &mut values);
            Ok(values)
        }
    }
}
