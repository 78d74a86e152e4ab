//! What `RUN` names on a command line: an adapter, the base that it belongs to, and the recipe that it came of.

use std::path::{Path, PathBuf};

use candle_core::DType;
use miette::{Diagnostic, miette};
use serde_json::Value;
use thiserror::Error;

use super::prepare::from_base;
use super::{Failure, failed, request};
use crate::adapter::{Adapters, peft};
use crate::cli;
use crate::data::{self, Codec, DataConfig, DataError, Dataset, Sources, Wanted};
use crate::device::Chosen;
use crate::export;
use crate::export::card::{self, Card};
use crate::files::{self, WriteError};
use crate::hub::{self, Cause, Hub};
use crate::loss::Examples;
use crate::model::{Base, DecoderConfig, Model, ModelConfig, Module};
use crate::progress::{Console, short};
use crate::quant::Quant;
use crate::recipe::{self, Recipe};
use crate::train::checkpoint;
use crate::train::reference::ReferenceModel;

/// An adapter and what it belongs to.
#[derive(Debug)]
pub(super) struct Trained {
    /// As the recipe or the adapter names the base.
    pub(super) model: ModelConfig,
    pub(super) base: Base,
    pub(super) decoder: DecoderConfig,
    pub(super) adapters: Adapters,
    /// The adapter's folder, of several the first.
    pub(super) folder: PathBuf,
    /// The run that it is of.
    pub(super) run: Option<PathBuf>,
    pub(super) recipe: Option<Recipe>,
}

#[derive(Debug, Error, Diagnostic)]
enum TrainedError {
    #[error("{} is neither a run nor an adapter", .0.display())]
    #[diagnostic(help(
        "name a run folder, one of its checkpoints, or a folder with adapter_config.json and adapter_model.safetensors"
    ))]
    Neither(PathBuf),
    #[error("the run in {} has no adapter yet", .0.display())]
    #[diagnostic(help("{1}"))]
    NotEnded(PathBuf, String),
    #[error("{}: base_model_name_or_path names no base", .0.display())]
    #[diagnostic(help("name the model that the adapter was trained on: --base DIR, FILE.gguf or ORG/NAME"))]
    NoBase(PathBuf),
    #[error("{weights} weights are given for {adapters} adapters")]
    #[diagnostic(help("--weights has one number for each: --weights 0.7,0.3"))]
    Weights { weights: usize, adapters: usize },
    #[error("the adapters are of different bases: {} and {}", .0.display(), .1.display())]
    #[diagnostic(help(
        "only adapters of one base can be added; --base names it, where it is the same one elsewhere"
    ))]
    Bases(PathBuf, PathBuf),
}

/// One adapter on the command line, before its base is opened.
struct Named {
    folder: PathBuf,
    run: Option<PathBuf>,
    recipe: Option<Recipe>,
    model: ModelConfig,
}

impl Named {
    fn find(path: &Path, arguments: &cli::Trained) -> Result<Self, Failure> {
        let is_adapter = |folder: &Path| folder.join(peft::CONFIG_FILE).is_file();
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        // RUN, RUN/adapter or RUN/checkpoints/step-000100
        let run = absolute.ancestors().take(3).find(|folder| folder.join("recipe.resolved.toml").is_file());
        let folder = match run {
            Some(run) if run == absolute => match is_adapter(&run.join("adapter")) {
                true => run.join("adapter"),
                false => {
                    let help = match checkpoint::list(run).pop() {
                        Some(newest) => {
                            format!(
                                "go on with it: dpo-lora run --resume {}; or name {}",
                                path.display(),
                                newest.display()
                            )
                        }
                        None => format!("go on with it: dpo-lora run --resume {}", path.display()),
                    };
                    return Err(request(TrainedError::NotEnded(path.to_owned(), help)));
                }
            },
            _ if absolute.is_dir() => absolute.clone(),
            _ => return Err(request(TrainedError::Neither(path.to_owned()))),
        };
        if !is_adapter(&folder)
            && !folder.join(peft::TENSORS_FILE).is_file()
            && !folder.join("adapter_model.bin").is_file()
        {
            return Err(request(TrainedError::Neither(path.to_owned())));
        }
        let recipe = match run {
            Some(run) => Some(recipe::load(&run.join("recipe.resolved.toml"), &[], run).map_err(request)?.recipe),
            None => None,
        };
        let model = match (&arguments.base, &recipe) {
            (Some(base), _) => ModelConfig { quant: arguments.quant.unwrap_or_default(), ..named_base(base) },
            (None, Some(recipe)) => {
                let quant = arguments.quant.unwrap_or(recipe.model.quant);
                ModelConfig { quant, ..recipe.model.clone() }
            }
            (None, None) => {
                let name =
                    base_of(&folder).ok_or_else(|| request(TrainedError::NoBase(folder.join(peft::CONFIG_FILE))))?;
                ModelConfig { quant: arguments.quant.unwrap_or_default(), ..named_base(Path::new(&name)) }
            }
        };
        Ok(Self { folder, run: run.map(Path::to_owned), recipe, model })
    }
}

/// A base by its name alone: a path, or a repository of the hub where there is no such path.
fn named_base(name: &Path) -> ModelConfig {
    let is_id = name.to_str().is_some_and(hub::is_id) && !name.exists();
    let source = if is_id { name.to_owned() } else { std::path::absolute(name).unwrap_or_else(|_| name.to_owned()) };
    ModelConfig { source, quant: Quant::None, revision: None, file: None }
}

fn base_of(adapter: &Path) -> Option<String> {
    let text = std::fs::read_to_string(adapter.join(peft::CONFIG_FILE)).ok()?;
    let config: Value = serde_json::from_str(&text).ok()?;
    Some(config.get("base_model_name_or_path")?.as_str().filter(|name| !name.is_empty())?.to_owned())
}

impl Trained {
    /// Finds the adapters and their base; of several, the weighted sum.
    pub(super) fn open(arguments: &cli::Trained, console: &Console) -> Result<Self, Failure> {
        let named =
            arguments.adapters.iter().map(|path| Named::find(path, arguments)).collect::<Result<Vec<_>, _>>()?;
        let (count, given) = (named.len(), arguments.weights.len());
        if given != 0 && given != count {
            return Err(request(TrainedError::Weights { weights: given, adapters: count }));
        }
        let mut named = named.into_iter();
        let Some(Named { folder, run, recipe, model }) = named.next() else {
            return Err(Failure::Request(miette!("no adapter is named")));
        };
        let base = Base::locate(&model, Hub::from_env, console).map_err(from_base)?;
        let decoder = base.config(model.quant).map_err(request)?;
        let modules = decoder.modules();
        let weight = |i: usize| arguments.weights.get(i).copied().unwrap_or(1.0);
        let mut terms = vec![(read(&folder, &modules)?, weight(0))];
        for (i, other) in named.enumerate() {
            if other.model.source != model.source {
                return Err(request(TrainedError::Bases(model.source, other.model.source)));
            }
            terms.push((read(&other.folder, &modules)?, weight(i + 1)));
        }
        let adapters = Adapters::sum(&terms).map_err(request)?;
        let kept = if model.quant == Quant::None { String::new() } else { format!(" in {}", model.quant.name()) };
        console.fact(
            "model",
            format_args!("{} parameters{kept}, {}", short(decoder.num_parameters()), model.source.display()),
        );
        console.fact("adapter", format_args!("{}, {}", arguments.names(), described(&adapters)));
        if adapters.is_zero().map_err(candle)? {
            console.warning("the adapter changes nothing: every B is zero");
        }
        Ok(Self { model, base, decoder, adapters, folder, run, recipe })
    }

    /// Base and adapters where they compute, with another reference than the base alone if there is one.
    pub(super) fn load(
        &self,
        reference: Option<Adapters>,
        chosen: &Chosen,
        console: &Console,
    ) -> Result<Model, Failure> {
        self.base.fetch_weights(console).map_err(from_base)?;
        let (decoder, _) = self.base.load(self.decoder.clone(), console).map_err(failed)?;
        let mut model = Model::new(decoder, self.adapters.clone()).map_err(candle)?;
        if let Some(reference) = reference {
            model = model.with_reference(reference).map_err(candle)?;
        }
        // what decoding reads most is the weights, and blocks are the least of them
        model.to_device(&chosen.device, chosen.dtype(), 0).map_err(candle)
    }

    /// The held-out pairs: those of `data`, or of the run; none where neither is known.
    pub(super) fn held_out(&self, data: Option<&Path>, console: &Console) -> Result<Option<Dataset>, Failure> {
        self.held_out_for(Examples::Pairs, data, console)
    }

    /// The same as a loss that learns from `examples` reads them; pairs stay pairs.
    pub(super) fn held_out_for(
        &self,
        examples: Examples,
        data: Option<&Path>,
        console: &Console,
    ) -> Result<Option<Dataset>, Failure> {
        let own = self.recipe.as_ref().and_then(|recipe| recipe.data.eval.clone());
        let Some(sources) = data.map(Sources::one).or(own) else { return Ok(None) };
        let config = match &self.recipe {
            Some(recipe) => recipe.data.clone(),
            None => DataConfig::of(sources.clone()),
        };
        let codec = self.codec()?;
        let wanted = Wanted { examples, keep_pairs: true };
        let dataset = data::load(&sources, &config, &codec, wanted, console).map_err(|error| match error {
            DataError::Hub(error) if error.cause != Cause::Request => failed(error),
            other => request(other),
        })?;
        Ok(Some(dataset))
    }

    /// The adapter that the policy is compared with, where its run says that it is not the base alone.
    pub(super) fn reference(&self) -> Result<Option<Adapters>, Failure> {
        let Some(recipe) = &self.recipe else { return Ok(None) };
        match (&recipe.adapter.init, recipe.reference_model()) {
            (Some(init), ReferenceModel::Init) => read(init, &self.decoder.modules()).map(Some),
            _ => Ok(None),
        }
    }

    /// Writes the tokenizer and chat template that stand beside the adapter, if any; in a folder with the base's own, over
    /// those.
    pub(super) fn write_tokenizer(&self, folder: &Path) -> Result<(), WriteError> {
        if self.folder.join("tokenizer.json").is_file() || self.folder.join("chat_template.jinja").is_file() {
            export::copy_text_files(&self.folder, folder)?;
        }
        Ok(())
    }

    /// The tokenizer of the base, with the template of the run.
    pub(super) fn codec(&self) -> Result<Codec, Failure> {
        let template = self.recipe.as_ref().and_then(|recipe| recipe.data.chat_template.as_deref());
        Codec::open(self.base.path(), template).map_err(request)
    }

    /// What PEFT's files call the base.
    pub(super) fn base_name(&self) -> String {
        self.model.source.display().to_string()
    }

    /// The model card of what is written.
    pub(super) fn card(&self, kind: card::Kind, adapters: &Adapters) -> String {
        let of_run = |name: &str| std::fs::read_to_string(self.run.as_ref()?.join(name)).ok();
        let base_card = if self.base.is_gguf() { None } else { Some(self.base.path().join("README.md")) };
        let card = Card {
            kind,
            base: &self.base_name(),
            quant: self.model.quant.name(),
            base_card: base_card.and_then(|path| std::fs::read_to_string(path).ok()),
            adapters,
            loss: self.recipe.as_ref().map(|recipe| &recipe.loss),
            recipe: of_run("recipe.toml"),
            summary: of_run("summary.json").and_then(|text| serde_json::from_str(&text).ok()),
            data: self.recipe.as_ref().map_or(Vec::new(), |recipe| recipe.data.train.names()),
        };
        card.markdown()
    }

    /// Writes a Modelfile beside what was made, with `adapter` on the base, or of a merged model.
    pub(super) fn write_modelfile(&self, path: &Path, from: &Path, adapter: Option<&Path>) -> Result<(), Failure> {
        let text = export::modelfile(from, adapter, &self.codec()?);
        files::write(path, text.as_bytes()).map_err(failed)
    }
}

fn read(folder: &Path, modules: &[Module]) -> Result<Adapters, Failure> {
    peft::load(folder, modules, DType::F32).map_err(request)
}

/// An adapter in a line.
pub(super) fn described(adapters: &Adapters) -> String {
    let ranks = || adapters.iter().map(crate::adapter::Lora::rank);
    let (least, most) = (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0));
    let rank = if least == most { format!("rank {most}") } else { format!("ranks {least} to {most}") };
    let dora = if adapters.config().dora { "DoRA, " } else { "" };
    format!("{dora}{rank} on {} modules", adapters.iter().count())
}

pub(super) fn candle(error: candle_core::Error) -> Failure {
    failed(crate::export::ExportError::from(error))
}
