//! Everything that has to be right before the first update. What is wrong here is a wrong request: nothing has been
//! written yet.

use std::env;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use jiff::Zoned;
use miette::{Diagnostic, miette};
use thiserror::Error;

use super::super::prepare::{Setup, from_base};
use super::super::{Failure, failed, request};
use crate::adapter::{self, AdapterConfig, Adapters, LoraConfig, peft};
use crate::bytes;
use crate::cli;
use crate::data::{Codec, Dataset};
use crate::files;
use crate::loss::Loss;
use crate::model::{Decoder, Model, Module};
use crate::progress::{Console, short, thousands};
use crate::quant::Quant;
use crate::recipe::{self, Parsed, Resolved};
use crate::run_folder::RunFolder;
use crate::train::checkpoint::{self, Fingerprints, State};
use crate::train::reference::ReferenceModel;
use crate::train::{Progress, TrainError};

/// A run folder and the recipe in it.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) folder: RunFolder,
    pub(super) resolved: Resolved,
}

/// What a run is made of.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) run: Run,
    pub(super) model: Model,
    pub(super) loss: Loss,
    pub(super) codec: Codec,
    pub(super) train: Dataset,
    pub(super) eval: Option<Dataset>,
    /// What PEFT's files call the base.
    pub(super) base_name: String,
    pub(super) fingerprints: Fingerprints,
    /// In bytes, at the worst moment.
    pub(super) expected_memory: usize,
    /// The checkpoint to go on from.
    pub(super) resumed: Option<(State, Progress)>,
}

#[derive(Debug, Error, Diagnostic)]
enum RequestError {
    #[error("no recipe is named")]
    #[diagnostic(help("dpo-lora run RECIPE.toml, or dpo-lora run --resume RUN"))]
    NoRecipe,
    #[error("--resume names no run folder")]
    #[diagnostic(help("dpo-lora run --resume RUN, or dpo-lora run RECIPE.toml --out RUN --resume"))]
    NoRun,
    #[error("--out {} and --resume {} are different folders", out.display(), resume.display())]
    TwoFolders { out: PathBuf, resume: PathBuf },
    #[error("`{key}` is not what it was when {} was begun", run.display())]
    #[diagnostic(help(
        "it was {was} and is {is}; resume without a recipe, `dpo-lora run --resume {}`, or start a new run",
        run.display()
    ))]
    RecipeChanged { key: String, was: String, is: String, run: PathBuf },
}

pub(super) fn prepare(arguments: &cli::Run, console: &Console) -> Result<Prepared, Failure> {
    let working_directory =
        env::current_dir().map_err(|e| Failure::Request(miette!("there is no working directory: {e}")))?;
    let resumed = run_to_resume(arguments)?;
    let path = match (&resumed, &arguments.recipe) {
        (_, Some(recipe)) => recipe.clone(),
        (Some(run), None) => run.resolved_recipe(),
        (None, None) => return Err(request(RequestError::NoRecipe)),
    };
    let mut parsed = recipe::load(&path, &arguments.overrides(), &working_directory).map_err(request)?;
    if let Some(folder) = &resumed {
        keep_memory(&mut parsed, folder)?;
    }
    console.fact("recipe", path.display());
    let out = match &resumed {
        Some(run) => absolute(run.path(), &working_directory),
        None => {
            let out = arguments.out.as_ref().map(|out| absolute(out, &working_directory));
            let default = || working_directory.join("runs").join(default_name(&path));
            let out = out.or_else(|| parsed.recipe.run.out.clone()).unwrap_or_else(default);
            RunFolder::check_free(&out).map_err(request)?;
            out
        }
    };

    let setup = Setup::read(parsed, console)?;
    let resolved = setup.resolve(&out)?;
    resolved.memory.check(&setup.parsed).map_err(request)?;
    let expected_memory = setup.forecast(&resolved).inventory.total();
    let Setup { parsed, device, base, decoder: decoder_config, modules, lora, codec, train, eval, .. } = setup;
    let recipe = &parsed.recipe;
    let (source, loss) = (&recipe.model.source, recipe.loss.clone());
    let parameters = decoder_config.num_parameters();
    base.fetch_weights(console).map_err(from_base)?;
    let kept = match decoder_config.quant {
        Quant::None => String::new(),
        quant => format!(" in {}, {}", quant.name(), bytes::shown(decoder_config.num_bytes())),
    };
    let (decoder, base) = base.load(decoder_config, console).map_err(request)?;
    console.fact("model", format_args!("{} parameters{kept}, {}", short(parameters), source.display()));
    let initial = initial_adapters(&recipe.adapter, &lora, &modules, &decoder, recipe.train.seed, console)?;
    let init = match &recipe.adapter.init {
        Some(_) => Some(initial.fingerprint().map_err(request)?),
        None => None,
    };
    let fingerprints = Fingerprints { data: train.fingerprint().to_string(), base, init };

    let (adapters, resumed, folder) = match resumed {
        Some(folder) => {
            unchanged(&folder, &resolved)?;
            match checkpoint::list(folder.path()).pop() {
                Some(newest) => {
                    let (state, adapters, progress) =
                        checkpoint::load(&newest, &initial, &train, &fingerprints).map_err(request)?;
                    console.fact("resume", format_args!("after update {}", state.step));
                    (adapters, Some((state, progress)), folder)
                }
                None => {
                    console.fact("resume", "from the start: there is no checkpoint yet");
                    (initial.clone(), None, folder)
                }
            }
        }
        None => {
            let folder = RunFolder::create(&out).map_err(failed)?;
            write_recipes(&folder, &parsed, &resolved)?;
            (initial.clone(), None, folder)
        }
    };
    let trainable = adapters.num_parameters();
    console.fact(
        "adapter",
        format_args!(
            "{}rank {}, alpha {}, on {} modules: {} trainable parameters, {:.1} % of the base",
            if lora.dora { "DoRA, " } else { "" },
            lora.rank,
            lora.alpha,
            adapters.iter().count(),
            short(trainable),
            100.0 * trainable as f64 / parameters as f64
        ),
    );
    if let Some(init) = &recipe.adapter.init {
        let what = if recipe.adapter.continues() { "goes on with" } else { "stands on" };
        let with = match recipe.reference_model() {
            ReferenceModel::Init => "that adapter",
            ReferenceModel::Base => "the base alone",
        };
        console.fact("", format_args!("{what} {}; the reference is {with}", init.display()));
    }
    let plan = &resolved.plan;
    let beta = loss.beta().map_or(String::new(), |beta| format!(", beta {beta}"));
    console.fact("loss", format_args!("{}{beta}", loss.name()));
    console.fact(
        "plan",
        format_args!(
            "{} updates of {}, learning rate {} ({}), at most {} tokens at once{}",
            thousands(plan.steps),
            plan.batch_size,
            plan.learning_rate,
            format!("{:?}", plan.schedule).to_lowercase(),
            thousands(plan.micro_batch_tokens),
            if plan.share_prompts { "" } else { ", prompts not shared" },
        ),
    );
    let memory = &resolved.memory;
    console.fact(
        "memory",
        format_args!("{} expected; {}", bytes::shown(expected_memory), memory.choice.describe_saved()),
    );
    console.fact("run", folder.shown());
    let base_name = source.display().to_string();
    let mut model = Model::new(decoder, adapters).map_err(candle)?;
    if recipe.reference_model() == ReferenceModel::Init {
        model = model.with_reference(initial).map_err(candle)?;
    }
    // what the run may take of a GPU and does not need holds layers dequantized
    let spare = device
        .free
        .map_or(0, |free| memory.budget.min(free - free / 16).saturating_sub(memory.choice.at_most.total()));
    let model = model.to_device(&device.device, device.dtype(), spare).map_err(candle)?;
    let resumed = match resumed {
        Some((state, progress)) => Some((state, progress.to_device(&device.device).map_err(candle)?)),
        None => None,
    };
    let run = Run { folder, resolved };
    Ok(Prepared { run, model, loss, codec, train, eval, base_name, fingerprints, expected_memory, resumed })
}

/// The folder to go on in, if that was asked for.
fn run_to_resume(arguments: &cli::Run) -> Result<Option<RunFolder>, Failure> {
    let Some(resume) = &arguments.resume else { return Ok(None) };
    let folder = match (resume, &arguments.out) {
        (Some(resume), Some(out)) if resume != out => {
            return Err(request(RequestError::TwoFolders { out: out.clone(), resume: resume.clone() }));
        }
        (Some(folder), _) | (None, Some(folder)) => folder,
        (None, None) => return Err(request(RequestError::NoRun)),
    };
    let folder = RunFolder::open(folder).map_err(request)?;
    folder.remove_partials();
    Ok(Some(folder))
}

/// `quickstart-20260102-150405`
fn default_name(recipe: &Path) -> String {
    let stem = recipe.file_stem().unwrap_or_default().to_string_lossy();
    format!("{stem}-{}", Zoned::now().strftime("%Y%m%d-%H%M%S"))
}

fn absolute(path: &Path, working_directory: &Path) -> PathBuf {
    working_directory.join(path)
}

/// What the machine has free may be another amount than when the run was begun; it goes on with what it had.
fn keep_memory(parsed: &mut Parsed, folder: &RunFolder) -> Result<(), Failure> {
    let then = recipe::load(&folder.resolved_recipe(), &[], folder.path()).map_err(request)?.recipe.train;
    let now = &mut parsed.recipe.train;
    now.memory = now.memory.or(then.memory);
    now.micro_batch_tokens = now.micro_batch_tokens.or(then.micro_batch_tokens);
    Ok(())
}

fn candle(error: candle_core::Error) -> Failure {
    failed(TrainError::from(error))
}

/// The adapters before the first update.
fn initial_adapters(
    config: &AdapterConfig,
    lora: &LoraConfig,
    modules: &[Module],
    decoder: &Decoder,
    seed: u64,
    console: &Console,
) -> Result<Adapters, Failure> {
    let read = |init: &Path| peft::load(init, modules, DType::F32).map_err(request);
    let new = || adapter::new(lora, modules, seed, DType::F32, &Device::Cpu).map_err(request);
    let mut adapters = match &config.init {
        Some(init) if config.continues() => return Ok(read(init)?.with_dropout(lora.dropout)),
        Some(init) => new()?.stack(&read(init)?).map_err(request)?,
        None => new()?,
    };
    adapters.fit(decoder, seed, console).map_err(failed)?;
    Ok(adapters)
}

fn write_recipes(folder: &RunFolder, parsed: &Parsed, resolved: &Resolved) -> Result<(), Failure> {
    let text =
        resolved.toml(parsed).map_err(|e| Failure::Failed(miette!("cannot write the resolved recipe: {e}")))?;
    files::write(&folder.recipe(), parsed.text.as_bytes()).map_err(failed)?;
    files::write(&folder.resolved_recipe(), text.as_bytes()).map_err(failed)
}

/// Refuses to go on with another recipe than the run was begun with.
fn unchanged(folder: &RunFolder, resolved: &Resolved) -> Result<(), Failure> {
    let path = folder.resolved_recipe();
    let then = recipe::load(&path, &[], folder.path()).map_err(request)?.recipe;
    let values = |recipe: &recipe::Recipe| toml::Table::try_from(recipe).map(toml::Value::Table);
    let (Ok(mut was), Ok(mut is)) = (values(&then), values(&resolved.recipe)) else { return Ok(()) };
    for values in [&mut was, &mut is] {
        if let Some(run) = values.get_mut("run").and_then(toml::Value::as_table_mut) {
            // the folder may have been moved, and what is kept of it does not change the result
            run.retain(|_, _| false);
        }
    }
    match difference("", &was, &is) {
        None => Ok(()),
        Some((key, was, is)) => {
            Err(request(RequestError::RecipeChanged { key, was, is, run: folder.path().to_owned() }))
        }
    }
}

/// The first key at which two tables differ, and both values.
fn difference(prefix: &str, was: &toml::Value, is: &toml::Value) -> Option<(String, String, String)> {
    let (Some(a), Some(b)) = (was.as_table(), is.as_table()) else {
        return (was != is).then(|| (prefix.to_owned(), was.to_string(), is.to_string()));
    };
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter().find_map(|key| {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match (a.get(key), b.get(key)) {
            (Some(was), Some(is)) => difference(&path, was, is),
            (was, is) => {
                let text = |value: Option<&toml::Value>| value.map_or("not given".into(), ToString::to_string);
                Some((path, text(was), text(is)))
            }
        }
    })
}
