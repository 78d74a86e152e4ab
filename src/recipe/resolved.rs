//! The recipe with nothing left open: every default filled in, every derived value with its reason.

use std::fmt::Write as _;
use std::path::Path;

use super::{Origin, Parsed, Recipe, RecipeError};
use crate::adapter::LoraConfig;
use crate::bytes::{self, Bytes};
use crate::data::Dataset;
use crate::hub;
use crate::model::DecoderConfig;
use crate::model::memory::Shape;
use crate::progress::thousands;
use crate::range::{Count, Positive};
use crate::train::Plan;
use crate::train::memory::{Choice, Demand};
use crate::train::reference::ReferenceModel;

/// A run takes at most this share of the memory that is free, where the recipe sets none.
const SHARE_OF_FREE: f64 = 0.75;
/// The same of a GPU, which seldom has to serve anybody else meanwhile.
const SHARE_OF_GPU: f64 = 0.9;
/// What a run takes at most where the system does not tell what is free.
const UNKNOWN_FREE: usize = 4 << 30;

/// What the derived values depend on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The run folder.
    pub out: &'a Path,
    /// Examples an epoch, weights applied.
    pub epoch_examples: usize,
    /// The commit that the base is at, if it is of the hub.
    pub commit: Option<&'a str>,
    /// The base's shape.
    pub decoder: &'a DecoderConfig,
    /// The adapter, from the recipe or from `init`.
    pub lora: &'a LoraConfig,
    /// The rank of all that stands on each of the base's modules, 0 where there is nothing.
    pub ranks: &'a [usize],
    /// The training data.
    pub train: &'a Dataset,
    /// The held-out data.
    pub eval: Option<&'a Dataset>,
    /// Bytes of the tokenizer.
    pub tokenizer: usize,
    /// Free memory in bytes, where the system tells: of the GPU, if that computes.
    pub free: Option<usize>,
    /// The device and why it is that one, in words.
    pub device: &'a str,
    /// Whether it is a GPU.
    pub on_gpu: bool,
}

/// A recipe in which every value is known.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The recipe.
    pub recipe: Recipe,
    /// The run it makes.
    pub plan: Plan,
    /// How it fits into memory.
    pub memory: Memory,
    /// Reasons of derived values, by key.
    reasons: Vec<(&'static str, String)>,
}

/// A run's memory.
#[derive(Debug, Clone)]
pub struct Memory {
    /// Bytes that it may take.
    pub budget: usize,
    /// What was made of them.
    pub choice: Choice,
    /// What they were chosen for.
    pub demand: Demand,
    /// What was free, where the system tells.
    pub free: Option<usize>,
}

impl Memory {
    /// Whether the run fits.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.choice.at_most.total() <= self.budget
    }

    /// Why the run does not fit, shown where its memory is given.
    ///
    /// # Errors
    /// It does not.
    pub fn check(&self, parsed: &Parsed) -> Result<(), RecipeError> {
        if self.fits() {
            return Ok(());
        }
        let needed = bytes::shown(self.choice.at_most.total());
        let budget = bytes::shown(self.budget);
        let problem = match (parsed.origin("train.memory"), self.free) {
            (Origin::Recipe | Origin::Set, _) => format!("{budget} of memory are too little: the run needs {needed}"),
            (Origin::Default, Some(free)) => {
                format!(
                    "the run needs {needed} of memory, more than {} of the {} that are free",
                    if self.demand.shape.on_gpu { "nine tenths" } else { "three quarters" },
                    bytes::shown(free)
                )
            }
            (Origin::Default, None) => format!("the run needs {needed} of memory, and {budget} are taken to be free"),
        };
        let at_most = &self.choice.at_most;
        let (rows, row) = &self.demand.longest;
        let given = match parsed.origin("train.micro_batch_tokens") {
            Origin::Default => "",
            Origin::Recipe | Origin::Set => "lower micro_batch_tokens, or ",
        };
        let help = format!(
            "with every layer keeping its input only, {} rows at once take {} besides {} for the base; the longest \
             example is {row} with {}: {given}lower [data] max_length, or give the run memory = \"{}\"",
            thousands(self.choice.micro_batch_tokens.max(*rows)),
            bytes::shown(at_most.saved + at_most.scratch),
            bytes::shown(at_most.base),
            thousands(*rows),
            Bytes::whole_mebibytes(at_most.total()),
        );
        Err(parsed.error("train.memory", problem, Some(help)))
    }
}

impl Resolved {
    /// Fills in what the recipe leaves open.
    ///
    /// # Errors
    /// A value that only now proves wrong, such as a warm-up longer than the run.
    pub fn new(parsed: &Parsed, inputs: &Inputs<'_>) -> Result<Self, RecipeError> {
        let mut recipe = parsed.recipe.clone();
        let mut reasons = Vec::new();
        recipe.run.out = Some(inputs.out.to_owned());
        reasons.push(("run.device", inputs.device.to_owned()));
        if let Some(commit) = inputs.commit {
            let named = recipe.model.revision.replace(commit.to_owned());
            let named = named.unwrap_or_else(|| hub::MAIN.to_owned());
            if named != commit {
                reasons.push(("model.revision", format!("{named} when the run was begun")));
            }
        }

        let batch_size = recipe.train.batch_size.get();
        let per_epoch = inputs.epoch_examples.div_ceil(batch_size);
        let steps = match recipe.train.steps {
            Some(steps) => steps.get(),
            None => {
                let epochs = *recipe.train.epochs.get_or_insert(Positive::constant(1.0));
                let steps = (epochs.get() * per_epoch as f64).ceil() as usize;
                let (rows, epochs) = (thousands(inputs.epoch_examples), epochs.get());
                reasons.push(("train.epochs", format!("{steps} updates: {rows} rows / {batch_size} × {epochs}")));
                steps
            }
        };
        let warmup = recipe.train.warmup.updates(steps);
        if warmup > steps {
            let problem = format!("the warm-up of {warmup} updates is longer than the run of {steps}");
            return Err(parsed.error("train.warmup", problem, Some("a share of the run: warmup = 0.1".into())));
        }
        reasons.push(("train.warmup", format!("{warmup} of {steps} updates")));

        let dropout = inputs.lora.dropout;
        if let Some((key, problem, help)) = recipe.sharing_under(dropout) {
            return Err(parsed.error(key, problem, Some(help)));
        }
        let share_prompts = *recipe.train.share_prompts.get_or_insert(dropout == 0.0);
        if parsed.recipe.train.share_prompts.is_none() && !share_prompts {
            let reason = format!("with dropout {dropout} each completion of a prompt needs a mask of its own on it");
            reasons.push(("train.share_prompts", reason));
        }
        let mut shape = Shape::new(inputs.decoder, inputs.ranks);
        shape.on_gpu = inputs.on_gpu;
        let (train, eval, tokenizer) = (inputs.train, inputs.eval, inputs.tokenizer);
        let demand = Demand::of(shape, train, eval, &recipe.loss, share_prompts, batch_size, tokenizer);
        let of_free = if inputs.on_gpu { SHARE_OF_GPU } else { SHARE_OF_FREE };
        let share = |free: usize| (free as f64 * of_free) as usize;
        let default_budget = inputs.free.map_or(UNKNOWN_FREE, share);
        let budget = recipe.train.memory.map_or(default_budget, Bytes::get);
        let choice = demand.choose(budget, recipe.train.micro_batch_tokens.map(Count::get));
        let needed = choice.at_most.total();
        if recipe.train.memory.is_none() {
            recipe.train.memory = Some(Bytes::whole_mebibytes(needed));
            let rows = thousands(choice.micro_batch_tokens);
            let free = inputs.free.map_or(String::new(), |free| format!("; {} are free", bytes::shown(free)));
            reasons.push(("train.memory", format!("what {rows} tokens at once need{free}")));
        } else {
            reasons.push(("train.memory", format!("{} of it are needed", bytes::shown(needed))));
        }
        if recipe.train.micro_batch_tokens.is_none() {
            recipe.train.micro_batch_tokens = Some(Count::constant(choice.micro_batch_tokens));
        }
        reasons.push(("train.micro_batch_tokens", choice.describe_saved()));
        let memory = Memory { budget, choice, demand, free: inputs.free };
        if recipe.run.checkpoint_every.is_none() {
            recipe.run.checkpoint_every = Some(Count::constant((steps / 10).max(50)));
            reasons.push(("run.checkpoint_every", "a tenth of the run, at least 50".to_owned()));
        }
        if recipe.eval.every.is_none() && recipe.data.eval.is_some() {
            recipe.eval.every = Some(Count::constant((steps / 4).max(1)));
            reasons.push(("eval.every", "a quarter of the run".to_owned()));
        }
        let LoraConfig { rank, alpha, rslora, dora, dropout, targets, weights, .. } = inputs.lora;
        let adapter = &mut recipe.adapter;
        adapter.dropout = crate::range::Share::try_from(*dropout).ok();
        if adapter.continues() {
            let scale = if *rslora { ", rslora" } else { "" };
            reasons.push(("adapter.init", format!("brings rank {rank}, alpha {alpha}{scale}")));
        } else {
            if adapter.alpha.is_none() {
                reasons.push(("adapter.alpha", "twice the rank".to_owned()));
            }
            adapter.rank = Some(Count::constant(*rank));
            adapter.alpha = Some(Positive::constant(*alpha));
            adapter.rslora = Some(*rslora);
            adapter.dora = Some(*dora);
            adapter.targets = Some(targets.clone());
            adapter.init_weights = Some(*weights);
        }
        if adapter.init.is_some() {
            adapter.init_mode.get_or_insert_default();
        }
        if recipe.reference.model.is_none() {
            recipe.reference.model = Some(recipe.reference_model());
            if recipe.adapter.init.is_some() {
                reasons.push(("reference.model", "training begins from `adapter.init`".to_owned()));
            }
        }
        let train = &recipe.train;
        let plan = Plan {
            steps,
            warmup,
            batch_size,
            micro_batch_tokens: memory.choice.micro_batch_tokens,
            scoring_tokens: memory.choice.scoring_tokens,
            saved: memory.choice.saved.clone(),
            share_prompts,
            learning_rate: train.learning_rate.get(),
            schedule: train.schedule,
            loraplus_ratio: train.loraplus_ratio.get(),
            weight_decay: train.weight_decay.get(),
            max_grad_norm: train.max_grad_norm.get(),
            shuffle: train.shuffle,
            seed: train.seed,
            begins_as_reference: recipe.adapter.init.is_none() || recipe.reference_model() == ReferenceModel::Init,
        };
        Ok(Self { recipe, plan, memory, reasons })
    }

    /// The recipe as TOML, each value with where it came from.
    ///
    /// # Errors
    /// What the serializer returns.
    pub fn toml(&self, parsed: &Parsed) -> Result<String, toml::ser::Error> {
        let mut text = String::from("# Every value of this run, and where it came from. It is a recipe itself.\n");
        let mut sections = toml::Table::try_from(&self.recipe)?;
        for section in ["run", "model", "adapter", "data", "loss", "reference", "train", "eval"] {
            let Some(toml::Value::Table(mut table)) = sections.remove(section) else { continue };
            let mut path = section.to_owned();
            if section == "loss"
                && let Some((name, toml::Value::Table(inner))) = table.clone().into_iter().next()
            {
                path = format!("loss.{name}");
                table = inner;
            }
            let _ = writeln!(text, "\n[{path}]");
            for (key, value) in table {
                let key_path = format!("{path}.{key}");
                let origin = match parsed.origin(&key_path) {
                    Origin::Recipe => "recipe",
                    Origin::Set => "--set",
                    Origin::Default => "default",
                };
                let reason = self.reasons.iter().find(|(known, _)| *known == key_path);
                let because = reason.map_or(String::new(), |(_, reason)| format!(": {reason}"));
                let _ = writeln!(text, "{:<40} # {origin}{because}", format!("{key} = {value}"));
            }
        }
        Ok(text)
    }
}
