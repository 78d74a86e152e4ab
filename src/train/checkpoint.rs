//! Everything a run needs to go on as if it had not stopped.
//!
//! ```text
//! checkpoints/step-000100/
//!   adapter_config.json  adapter_model.safetensors    the policy, a PEFT adapter like any other
//!   optimizer.safetensors                             both moments of every trainable tensor
//!   reference.safetensors                             the reference's log-probs known so far
//!   state.json                                        step, tokens, and what the run is made of
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::DType;
use miette::Diagnostic;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Reference;
use super::optimizer::{AdamW, Moments};
use super::trainer::{Progress, Trainer};
use crate::adapter::{AdapterError, Adapters, peft};
use crate::data::Dataset;
use crate::files::{self, WriteError};
use crate::tensor_file::{TensorFile, TensorFileError, describe_io, read_text};

const OPTIMIZER: &str = "optimizer.safetensors";
const REFERENCE: &str = "reference.safetensors";
const STATE: &str = "state.json";
/// Changes when the meaning of these files does.
const VERSION: u32 = 1;

/// What a checkpoint says of the run it belongs to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    /// Updates done.
    pub step: usize,
    /// Tokens seen.
    pub num_tokens: u64,
    /// Length of `metrics.jsonl` at this point.
    pub metrics_bytes: u64,
    /// Seconds the run took so far.
    pub seconds: f64,
    /// What the run is made of.
    pub fingerprints: Fingerprints,
}

/// Hashes of what a run is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// Of the training rows, as token ids.
    pub data: String,
    /// Of the base's weights.
    pub base: String,
    /// Of the adapter that training begins from, where one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
}

impl State {
    /// That of `trainer` now.
    #[must_use]
    pub fn of(trainer: &Trainer<'_>, metrics_bytes: u64, seconds: f64, fingerprints: Fingerprints) -> Self {
        let (step, num_tokens) = (trainer.step(), trainer.num_tokens());
        Self { version: VERSION, step, num_tokens, metrics_bytes, seconds, fingerprints }
    }
}

/// Why a checkpoint could not be written or read.
#[derive(Debug, Error, Diagnostic)]
pub enum CheckpointError {
    /// The system.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Write(#[from] WriteError),
    /// A file of it.
    #[error("{}: {problem}", file.display())]
    #[diagnostic(help("remove this checkpoint's folder to go on from the one before"))]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Its adapter.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Adapter(#[from] AdapterError),
    /// It is of another run.
    #[error("{}: {what} changed since this checkpoint was written", folder.display())]
    #[diagnostic(help("resuming would not give what the run would have given; start a new run"))]
    Changed {
        /// The checkpoint.
        folder: PathBuf,
        /// What is not as it was.
        what: &'static str,
    },
    /// From candle.
    #[error("while saving or loading a checkpoint")]
    Candle(#[from] candle_core::Error),
}

impl From<TensorFileError> for CheckpointError {
    fn from(TensorFileError { file, problem, .. }: TensorFileError) -> Self {
        Self::File { file, problem }
    }
}

impl From<peft::SaveError> for CheckpointError {
    fn from(error: peft::SaveError) -> Self {
        match error {
            peft::SaveError::Write(error) => Self::Write(error),
            peft::SaveError::Adapter(error) => Self::Adapter(error),
        }
    }
}

/// The checkpoints of a run folder, oldest first.
#[must_use]
pub fn list(run: &Path) -> Vec<PathBuf> {
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<usize>().ok();
    let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries.filter_map(|entry| Some((step(&entry.path())?, entry.path()))).collect();
    found.sort_unstable();
    found.into_iter().map(|(_, path)| path).collect()
}

/// Writes a checkpoint of `trainer` into the run folder, whole or not at all, and removes all but the newest `keep`.
///
/// # Errors
/// See [`CheckpointError`].
pub fn save(
    run: &Path,
    trainer: &Trainer<'_>,
    state: &State,
    base: &str,
    keep: usize,
) -> Result<(), CheckpointError> {
    let folder = run.join("checkpoints").join(format!("step-{:06}", state.step));
    let adapters = trainer.model().adapters();
    let mut moments = Vec::new();
    for ((name, _), Moments { first, second }) in adapters.tensors().zip(trainer.optimizer().moments()) {
        for (moment, tensor) in [("first", first), ("second", second)] {
            moments.push((format!("{name}.{moment}"), tensor.clone()));
        }
    }
    let moments = peft::serialize(&moments)?;
    let reference = reference_bytes(trainer.reference())
        .map_err(|e| CheckpointError::File { file: folder.join(REFERENCE), problem: e.to_string() })?;
    let state = serde_json::to_vec_pretty(state)
        .map_err(|e| CheckpointError::File { file: folder.join(STATE), problem: e.to_string() })?;
    files::write_folder(&folder, |folder| {
        peft::save(adapters, base, folder)?;
        files::write(&folder.join(OPTIMIZER), &moments)?;
        files::write(&folder.join(REFERENCE), &reference)?;
        Ok::<_, CheckpointError>(files::write(&folder.join(STATE), &state)?)
    })?;
    let checkpoints = list(run);
    for old in &checkpoints[..checkpoints.len().saturating_sub(keep)] {
        // one that cannot be removed only takes room
        let _ = fs::remove_dir_all(old);
    }
    Ok(())
}

/// Reads what [`save`] wrote of a run whose adapters were `initial` before the first update.
///
/// # Errors
/// See [`CheckpointError`].
pub fn load(
    folder: &Path,
    initial: &Adapters,
    data: &Dataset,
    now: &Fingerprints,
) -> Result<(State, Adapters, Progress), CheckpointError> {
    let file = folder.join(STATE);
    let problem = |problem: String| CheckpointError::File { file: file.clone(), problem };
    let state: State = serde_json::from_str(&read_text(&file)?).map_err(|e| problem(e.to_string()))?;
    if state.version != VERSION {
        return Err(problem(format!("is of version {}, not {VERSION}", state.version)));
    }
    let then = &state.fingerprints;
    let of = [
        ("the data", then.data != now.data),
        ("the base model", then.base != now.base),
        ("the adapter of [adapter] init", then.init != now.init),
    ];
    for (what, changed) in of {
        if changed {
            return Err(CheckpointError::Changed { folder: folder.to_owned(), what });
        }
    }
    let mut adapters = initial.clone();
    adapters.replace(peft::load_trainable(folder, initial)?)?;
    let tensors = TensorFile::open(&folder.join(OPTIMIZER))?;
    let moments = adapters.tensors().map(|(name, tensor)| {
        let read = |moment| tensors.read(&format!("{name}.{moment}"), tensor.dims(), DType::F32);
        Ok(Moments { first: read("first")?, second: read("second")? })
    });
    let moments = moments.collect::<Result<Vec<_>, TensorFileError>>()?;
    let reference = read_reference(&folder.join(REFERENCE), data)?;
    let steps = u32::try_from(state.step).map_err(|e| problem(e.to_string()))?;
    let optimizer = AdamW::resume(moments, steps);
    let progress = Progress { step: state.step, num_tokens: state.num_tokens, optimizer, reference };
    Ok((state, adapters, progress))
}

fn read_reference(file: &Path, data: &Dataset) -> Result<Reference, CheckpointError> {
    let problem = |problem: String| CheckpointError::File { file: file.to_owned(), problem };
    let bytes = fs::read(file).map_err(|e| problem(describe_io(&e)))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| problem(e.to_string()))?;
    let logps = tensors.tensor("logps").map_err(|e| problem(e.to_string()))?;
    let (numbers, _) = logps.data().as_chunks::<8>();
    let numbers: Vec<f64> = numbers.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect();
    let restored = if logps.dtype() == Dtype::F64 { Reference::restore(&numbers, data) } else { None };
    restored.ok_or_else(|| problem("does not belong to these rows".into()))
}

/// In f64, as it was computed.
fn reference_bytes(reference: &Reference) -> Result<Vec<u8>, SafeTensorError> {
    let bytes: Vec<u8> = reference.flat().iter().flat_map(|logp| logp.to_le_bytes()).collect();
    let logps = TensorView::new(Dtype::F64, vec![reference.flat().len()], &bytes)?;
    safetensors::serialize([("logps", logps)], None)
}
