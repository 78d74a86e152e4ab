//! What a recipe names, read and checked: configuration, tokenizer and data, but no weight. What is wrong here is a wrong
//! request.

use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;

use super::{Failure, failed, request};
use crate::adapter::{AdapterConfig, AdapterError, InitialWeights, LoraConfig, peft};
use crate::data::{self, Codec, DataError, Dataset, Wanted};
use crate::device::{self, Chosen, DeviceError};
use crate::hub::{Cause, Hub};
use crate::machine;
use crate::model::memory::Rows;
use crate::model::{Base, DecoderConfig, ModelError, Module};
use crate::progress::Console;
use crate::recipe::{Inputs, Parsed, Resolved};
use crate::train::memory::Inventory;
use crate::train::{PackingFacts, Plan};

/// A recipe and what it names.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) parsed: Parsed,
    pub(super) device: Chosen,
    pub(super) base: Base,
    pub(super) decoder: DecoderConfig,
    pub(super) modules: Vec<Module>,
    pub(super) lora: LoraConfig,
    /// The rank of all that stands on each of the modules, 0 where there is nothing.
    pub(super) ranks: Vec<usize>,
    pub(super) codec: Codec,
    pub(super) train: Dataset,
    pub(super) eval: Option<Dataset>,
}

#[derive(Debug, Error, Diagnostic)]
#[error("{what} has token {id}, and the model's vocabulary ends at {}", vocabulary - 1)]
#[diagnostic(help("tokenizer.json and config.json in {} do not belong together", model.display()))]
struct TokenOutside {
    what: &'static str,
    id: u32,
    vocabulary: usize,
    model: PathBuf,
}

impl Setup {
    pub(super) fn read(parsed: Parsed, console: &Console) -> Result<Self, Failure> {
        let chosen = device::choose(parsed.recipe.run.device).map_err(|error| request(in_run(&error, &parsed)))?;
        console.fact("device", &chosen.reason);
        let recipe = &parsed.recipe;
        let base = Base::locate(&recipe.model, Hub::from_env, console).map_err(|e| in_recipe(e, &parsed))?;
        let source = base.path();
        let decoder = base.config(recipe.model.quant).map_err(request)?;
        let modules = decoder.modules();
        // before any data is read: names that match nothing are a matter of the recipe
        let (lora, ranks) = lora_config(&recipe.adapter, &modules).map_err(request)?;

        let codec = Codec::open(source, recipe.data.chat_template.as_deref()).map_err(request)?;
        if codec.depends_on_date() {
            console.warning(
                "the chat template writes today's date: tomorrow the same recipe gives other tokens, and this run cannot \
                 be resumed; [data] chat_template names another template",
            );
        }
        let load = |sources, keep_pairs| {
            let wanted = Wanted { examples: recipe.loss.examples(), keep_pairs };
            data::load(sources, &recipe.data, &codec, wanted, console).map_err(|error| match error {
                DataError::Hub(error) if error.cause != Cause::Request => failed(error),
                other => request(other),
            })
        };
        let train = load(&recipe.data.train, false)?;
        tell_data(console, "train", &train);
        let eval = match &recipe.data.eval {
            Some(eval) => {
                let eval = load(eval, true)?;
                tell_data(console, "held out", &eval);
                Some(eval)
            }
            None => None,
        };
        let outside = |what, dataset: &Dataset| {
            let (id, vocabulary) = (dataset.facts().largest_id, decoder.vocab_size);
            let error = || TokenOutside { what, id, vocabulary, model: source.to_owned() };
            if (id as usize) < vocabulary { Ok(()) } else { Err(request(error())) }
        };
        outside("the training data", &train)?;
        eval.as_ref().map_or(Ok(()), |eval| outside("the held-out data", eval))?;
        Ok(Self { device: chosen, base, decoder, modules, lora, ranks, codec, train, eval, parsed })
    }

    /// The recipe with every value, for a run into the folder `out`.
    pub(super) fn resolve(&self, out: &Path) -> Result<Resolved, Failure> {
        let Self { parsed, base, decoder, lora, ranks, codec, train, eval, .. } = self;
        let config = &parsed.recipe.train;
        let inputs = Inputs {
            out,
            epoch_examples: train.epoch(0, config.seed, config.shuffle).len(),
            commit: base.commit(),
            decoder,
            lora,
            ranks,
            train,
            eval: eval.as_ref(),
            tokenizer: codec.num_bytes(),
            free: self.device.free.or_else(machine::available_memory),
            device: &self.device.reason,
            on_gpu: self.device.device.is_cuda(),
        };
        Resolved::new(parsed, &inputs).map_err(request)
    }

    /// The data as the run will pack it, and the memory that this takes.
    pub(super) fn forecast(&self, resolved: &Resolved) -> Forecast {
        let (loss, plan) = (&self.parsed.recipe.loss, &resolved.plan);
        let train = PackingFacts::of(&self.train, loss, plan);
        let eval = self.eval.as_ref().map(|eval| {
            // it counts as one update, and nothing is kept of it
            let (batch_size, micro_batch_tokens) = (eval.len(), plan.scoring_tokens);
            PackingFacts::of(eval, loss, &Plan { batch_size, micro_batch_tokens, shuffle: false, ..plan.clone() })
        });
        let rows = Rows { all: train.largest_rows, scored: train.largest_scored_rows };
        let demand = &resolved.memory.demand;
        // the reference goes through the examples in any order, in batches as full as they can be
        let reference = if loss.needs_reference() { plan.scoring_tokens.min(demand.load.rows as usize) } else { 0 };
        let scoring_rows = eval.as_ref().map_or(0, |eval| eval.largest_rows).max(reference);
        let inventory = demand.inventory(&plan.saved, rows, scoring_rows);
        Forecast { train, eval, inventory }
    }
}

/// What is known of a run before it.
#[derive(Debug)]
pub(super) struct Forecast {
    pub(super) train: PackingFacts,
    /// Of the held-out data, as one update.
    pub(super) eval: Option<PackingFacts>,
    pub(super) inventory: Inventory,
}

/// A device that cannot be used, shown in the recipe.
fn in_run(error: &DeviceError, parsed: &Parsed) -> crate::recipe::RecipeError {
    parsed.error("run.device", error.to_string(), error.help().map(|help| help.to_string()))
}

/// A model that is not there is a mistake in the recipe.
fn in_recipe(error: ModelError, parsed: &Parsed) -> Failure {
    let mistake = |problem: String, help| request(parsed.error("model.source", problem, help));
    match error {
        ModelError::NoFolder(path, help) => mistake(format!("there is no folder {}", path.display()), Some(help)),
        ModelError::NoFile(path, help) => mistake(format!("there is no file {}", path.display()), Some(help)),
        ModelError::Hub(error) if error.cause == Cause::Request => {
            let path = parsed.recipe.model.source.display();
            let tried = format!("there is no local path {path}, so it was looked up on the hub");
            let help = error.help.as_ref().map_or_else(|| tried.clone(), |help| format!("{help} ({tried})"));
            mistake(error.to_string(), Some(help))
        }
        other => from_base(other),
    }
}

/// What is wrong with a base is a wrong request, but for a transfer that failed.
pub(super) fn from_base(error: ModelError) -> Failure {
    match error {
        ModelError::Hub(error) if error.cause != Cause::Request => failed(error),
        other => request(other),
    }
}

/// The adapter that is trained, and the rank of all that stands on each module.
fn lora_config(config: &AdapterConfig, modules: &[Module]) -> Result<(LoraConfig, Vec<usize>), AdapterError> {
    let ranks = |lora: &LoraConfig| -> Result<Vec<usize>, AdapterError> {
        Ok(lora.select(modules)?.into_iter().map(|of| of.map_or(0, |(rank, _)| rank)).collect())
    };
    let Some(init) = &config.init else {
        let lora = config.lora();
        let own = ranks(&lora)?;
        return Ok((lora.clone(), with_frozen(&lora, own)));
    };
    let brought = peft::load_config(init)?;
    if config.continues() {
        let lora = LoraConfig { dropout: config.dropout.map_or(brought.dropout, |dropout| dropout.get()), ..brought };
        let own = ranks(&lora)?;
        return Ok((lora, own));
    }
    let lora = config.lora();
    let own = with_frozen(&lora, ranks(&lora)?);
    let both = own.into_iter().zip(ranks(&brought)?).map(|(own, below)| own + below).collect();
    Ok((lora, both))
}

/// First values that are not zero stand there a second time, to be taken out.
fn with_frozen(lora: &LoraConfig, ranks: Vec<usize>) -> Vec<usize> {
    match lora.weights {
        InitialWeights::Kaiming | InitialWeights::Gaussian => ranks,
        InitialWeights::Pissa | InitialWeights::Olora => ranks.into_iter().map(|rank| 2 * rank).collect(),
    }
}

fn tell_data(console: &Console, name: &str, dataset: &Dataset) {
    console.fact(name, dataset.facts());
    let drops = dataset.drops();
    if drops.total() > 0 {
        let first = drops.listed().first().map_or("", |drop| &drop.origin);
        console.fact("", format_args!("left out: {drops} (the first is {first}; summary.json lists them)"));
    }
}
