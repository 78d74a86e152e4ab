//! The recipe with nothing left open: every default filled in, every derived value with its reason.

use std::fmt::Write as _;
use std::path::Path;

use super::{Origin, Parsed, Recipe, RecipeError};
use crate::adapter::LoraConfig;
use crate::model::{DecoderConfig, Projection};
use crate::progress::thousands;
use crate::range::{Count, Positive};
use crate::train::Plan;

/// Activations kept for the backward pass of one micro-batch, where the recipe sets no `micro_batch_tokens`.
const ACTIVATION_BYTES: usize = 1 << 30;
/// Fewer rows make every matrix product slow, more gain nothing.
const ROWS: std::ops::RangeInclusive<usize> = 512..=8192;

/// What the derived values depend on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The run folder.
    pub out: &'a Path,
    /// Examples an epoch, weights applied.
    pub epoch_examples: usize,
    /// The base's shape.
    pub decoder: &'a DecoderConfig,
    /// The adapter, from the recipe or from `init`.
    pub lora: &'a LoraConfig,
}

/// A recipe in which every value is known.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The recipe.
    pub recipe: Recipe,
    /// The run it makes.
    pub plan: Plan,
    /// Reasons of derived values, by key.
    reasons: Vec<(&'static str, String)>,
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

        if recipe.train.micro_batch_tokens.is_none() {
            let bytes = activation_bytes(inputs.decoder, inputs.lora.rank);
            let rows = (ACTIVATION_BYTES / bytes).clamp(*ROWS.start(), *ROWS.end());
            recipe.train.micro_batch_tokens = Some(Count::constant(rows));
            let reason =
                format!("{} bytes of activations a token, at most 1 GiB and {} rows", thousands(bytes), ROWS.end());
            reasons.push(("train.micro_batch_tokens", reason));
        }
        let dropout = inputs.lora.dropout;
        if let Some((key, problem, help)) = recipe.sharing_under(dropout) {
            return Err(parsed.error(key, problem, Some(help)));
        }
        let share_prompts = *recipe.train.share_prompts.get_or_insert(dropout == 0.0);
        if parsed.recipe.train.share_prompts.is_none() && !share_prompts {
            let reason = format!("with dropout {dropout} each completion of a prompt needs a mask of its own on it");
            reasons.push(("train.share_prompts", reason));
        }
        if recipe.run.checkpoint_every.is_none() {
            recipe.run.checkpoint_every = Some(Count::constant((steps / 10).max(50)));
            reasons.push(("run.checkpoint_every", "a tenth of the run, at least 50".to_owned()));
        }
        if recipe.eval.every.is_none() && recipe.data.eval.is_some() {
            recipe.eval.every = Some(Count::constant((steps / 4).max(1)));
            reasons.push(("eval.every", "a quarter of the run".to_owned()));
        }
        let LoraConfig { rank, alpha, rslora, dropout, targets } = inputs.lora;
        recipe.adapter.dropout = crate::range::Share::try_from(*dropout).ok();
        if recipe.adapter.init.is_none() {
            if recipe.adapter.alpha.is_none() {
                reasons.push(("adapter.alpha", "twice the rank".to_owned()));
            }
            recipe.adapter.rank = Some(Count::constant(*rank));
            recipe.adapter.alpha = Some(Positive::constant(*alpha));
            recipe.adapter.rslora = Some(*rslora);
            recipe.adapter.targets = Some(targets.clone());
        } else {
            let scale = if *rslora { ", rslora" } else { "" };
            reasons.push(("adapter.init", format!("brings rank {rank}, alpha {alpha}{scale}")));
        }
        let train = &recipe.train;
        let plan = Plan {
            steps,
            warmup,
            batch_size,
            micro_batch_tokens: train.micro_batch_tokens.map_or(*ROWS.end(), Count::get),
            share_prompts,
            learning_rate: train.learning_rate.get(),
            schedule: train.schedule,
            weight_decay: train.weight_decay.get(),
            max_grad_norm: train.max_grad_norm.get(),
            shuffle: train.shuffle,
            seed: train.seed,
        };
        Ok(Self { recipe, plan, reasons })
    }

    /// The recipe as TOML, each value with where it came from.
    ///
    /// # Errors
    /// What the serializer returns.
    pub fn toml(&self, parsed: &Parsed) -> Result<String, toml::ser::Error> {
        let mut text = String::from("# Every value of this run, and where it came from. It is a recipe itself.\n");
        let mut sections = toml::Table::try_from(&self.recipe)?;
        for section in ["run", "model", "adapter", "data", "loss", "train", "eval"] {
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

/// Bytes that one row of tokens leaves behind for the backward pass, over all layers, in f32.
fn activation_bytes(decoder: &DecoderConfig, rank: usize) -> usize {
    let outputs = |projection| decoder.shape(projection).0;
    let kept: usize = [Projection::Query, Projection::Key, Projection::Value, Projection::Gate, Projection::Up]
        .map(outputs)
        .iter()
        .sum();
    // x, the attention's output, the middle, and A x of seven projections
    let row = kept + 2 * decoder.hidden_size + outputs(Projection::Query) + Projection::ALL.len() * rank;
    4 * row * decoder.num_hidden_layers
}
