//! `dpo-lora plan`: what a run will do and take, without doing it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use miette::miette;
use serde_json::{Map, Value, json};

use super::prepare::{Forecast, Setup};
use super::{Failure, of_stdout, request};
use crate::bytes;
use crate::cli;
use crate::device::Chosen;
use crate::model::flops::{Load, Work};
use crate::ops::cpu::gemm::{Matrix, product};
use crate::progress::{Console, duration, short, thousands};
use crate::quant::Quant;
use crate::recipe::{self, Resolved};
use crate::train::PackingFacts;

/// The share of the measured rate of products that a whole run is taken to reach. Norms, softmax and the optimizer take
/// the rest.
const EFFICIENCY: f64 = 0.75;

/// Rows and columns of the product that is measured.
const SIDE: usize = 1024;

/// How long it is repeated.
const MEASURING: Duration = Duration::from_millis(500);

/// Shows what a recipe will do.
///
/// # Errors
/// See [`Failure`]; [`Failure::Gate`] where the run does not fit its memory.
pub fn plan(arguments: &cli::Plan) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let here = std::env::current_dir();
    let here = here.map_err(|e| Failure::Request(miette!("there is no working directory: {e}")))?;
    let parsed = recipe::load(&arguments.recipe, &arguments.overrides(), &here).map_err(request)?;
    console.fact("recipe", arguments.recipe.display());
    let setup = Setup::read(parsed, &console)?;
    let out = setup.parsed.recipe.run.out.clone().unwrap_or_else(|| here.join("runs"));
    let resolved = setup.resolve(&out)?;
    let rate = match setup.device.device.is_cuda() {
        true => {
            gpu_product_rate(&setup.device).map_err(|e| Failure::Failed(miette!("cannot measure the GPU: {e}")))?
        }
        false => product_rate(),
    };
    let report = Report::new(&setup, &resolved, rate);
    let text = if arguments.json { format!("{:#}\n", report.json()) } else { report.text() };
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(of_stdout)?;
    if resolved.memory.fits() { Ok(()) } else { Err(Failure::Gate) }
}

/// Operations a second of a large product on all threads, the best of what half a second gives.
fn product_rate() -> f64 {
    let values: Vec<f32> = (0..SIDE * SIDE).map(|i| (i % 7) as f32 * 0.1 - 0.3).collect();
    let matrix = Matrix::new(&values, SIDE, SIDE);
    let (started, mut best) = (Instant::now(), f64::INFINITY);
    while started.elapsed() < MEASURING {
        let began = Instant::now();
        std::hint::black_box(product(matrix, matrix));
        best = best.min(began.elapsed().as_secs_f64());
    }
    2.0 * (SIDE as f64).powi(3) / best
}

/// The same of a GPU, where the product has to be larger.
fn gpu_product_rate(chosen: &Chosen) -> candle_core::Result<f64> {
    const FACTOR: usize = 4;
    let side = FACTOR * SIDE;
    let matrix = Tensor::rand(-1f32, 1.0, (side, side), &chosen.device)?.to_dtype(chosen.dtype())?;
    let (started, mut best) = (Instant::now(), f64::INFINITY);
    while started.elapsed() < MEASURING {
        let began = Instant::now();
        // a number that the host reads waits for the product
        matrix.matmul(&matrix)?.narrow(0, 0, 1)?.narrow(1, 0, 1)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    Ok(2.0 * (side as f64).powi(3) / best)
}

/// A run before it is begun.
struct Report<'a> {
    setup: &'a Setup,
    resolved: &'a Resolved,
    forecast: Forecast,
    work: RunWork,
    /// Operations a second.
    rate: f64,
}

/// The least operations of a run, and those done on top.
struct RunWork {
    /// Of a mean update.
    update: Work,
    /// Of a mean update, again because not everything is kept.
    recomputed: f64,
    /// Of a mean update: KTO's KL, two passes over prompts with another completion.
    kl: f64,
    /// Of all examples that the run sees, once.
    reference: f64,
    /// Of one evaluation, and how many there are.
    evaluation: f64,
    evaluations: usize,
}

/// What the passes over an epoch work on.
fn load(facts: &PackingFacts, share_prompts: bool) -> Load {
    let rows = if share_prompts { facts.rows_shared } else { facts.rows_unshared };
    let (rows, scored) = (rows as f64, facts.scored_rows as f64);
    Load { rows, scored, pairs: facts.attention_pairs as f64, skipped: (rows - scored).max(0.0) }
}

impl RunWork {
    fn new(setup: &Setup, resolved: &Resolved, forecast: &Forecast) -> Self {
        let (plan, memory, loss) = (&resolved.plan, &resolved.memory, &setup.parsed.recipe.loss);
        let shape = &memory.demand.shape;
        let epoch = load(&forecast.train, plan.share_prompts);
        let an_update = epoch.times(1.0 / forecast.train.updates.max(1) as f64);
        let update = shape.training_work(an_update);
        let once = |needed: bool, work: f64| if needed { work } else { 0.0 };
        let seen = (plan.steps as f64 / forecast.train.updates.max(1) as f64).min(1.0);
        let eval = forecast.eval.as_ref().map(|eval| shape.scoring_work(load(eval, plan.share_prompts)).total());
        let every = resolved.recipe.eval.every.map_or(usize::MAX, |every| every.get());
        // before, every so often, and after the last update
        let evaluations = 1 + plan.steps / every + usize::from(!plan.steps.is_multiple_of(every));
        Self {
            recomputed: memory.choice.recomputed * update.total(),
            kl: once(loss.needs_kl(), 2.0 * shape.scoring_work(an_update).total()),
            reference: once(loss.needs_reference(), shape.scoring_work(epoch.times(seen)).total()),
            evaluation: eval.unwrap_or(0.0),
            evaluations: if eval.is_some() { evaluations } else { 0 },
            update,
        }
    }

    fn of_update(&self) -> f64 {
        self.update.total() + self.recomputed + self.kl
    }

    /// The held-out data is scored once by the reference too.
    fn of_evaluations(&self) -> f64 {
        self.evaluation * if self.evaluations > 0 { (self.evaluations + 1) as f64 } else { 0.0 }
    }

    fn of_run(&self, steps: usize) -> f64 {
        self.of_update() * steps as f64 + self.reference + self.of_evaluations()
    }
}

impl<'a> Report<'a> {
    fn new(setup: &'a Setup, resolved: &'a Resolved, rate: f64) -> Self {
        let forecast = setup.forecast(resolved);
        let work = RunWork::new(setup, resolved, &forecast);
        Self { setup, resolved, forecast, work, rate }
    }

    fn seconds(&self, work: f64) -> f64 {
        work / (EFFICIENCY * self.rate)
    }

    fn rows(&self) -> u64 {
        let facts = &self.forecast.train;
        if self.resolved.plan.share_prompts { facts.rows_shared } else { facts.rows_unshared }
    }

    fn padding_factors(&self) -> [(usize, f64); 4] {
        let facts = &self.forecast.train;
        let factor = |i: usize| facts.padded_tokens[i] as f64 / facts.logical_tokens.max(1) as f64;
        std::array::from_fn(|i| (PackingFacts::DEVICE_BATCHES[i], factor(i)))
    }

    fn sharing_factor(&self) -> f64 {
        self.forecast.train.rows_unshared as f64 / self.forecast.train.rows_shared.max(1) as f64
    }

    /// Modules that carry an adapter.
    fn modules(&self) -> usize {
        self.setup.ranks.iter().filter(|rank| **rank > 0).count()
    }

    fn json(&self) -> Value {
        let Self { setup, resolved, forecast: Forecast { train, inventory, .. }, work, rate } = self;
        let (plan, memory) = (&resolved.plan, &resolved.memory);
        let inventory: Map<String, Value> =
            inventory.parts().into_iter().map(|(name, bytes)| (name.to_owned(), json!(bytes))).collect();
        let padding: Map<String, Value> =
            self.padding_factors().into_iter().map(|(pairs, factor)| (pairs.to_string(), json!(factor))).collect();
        let Work { linears, attention, lora, head } = work.update;
        let update_seconds = self.seconds(work.of_update());
        json!({
            "model": {
                "source": setup.parsed.recipe.model.source,
                "parameters": setup.decoder.num_parameters(),
                "layers": setup.decoder.num_layers(),
            },
            "adapter": {
                "rank": setup.lora.rank,
                "alpha": setup.lora.alpha,
                "modules": self.modules(),
                "parameters": memory.demand.shape.adapter_parameters(),
            },
            "loss": setup.parsed.recipe.loss.name(),
            "run": {
                "updates": plan.steps,
                "updates_per_epoch": train.updates,
                "batch_size": plan.batch_size,
                "examples": setup.train.len(),
            },
            "memory": {
                "fits": memory.fits(),
                "budget_bytes": memory.budget,
                "free_bytes": memory.free,
                "expected_bytes": self.forecast.inventory.total(),
                "at_most_bytes": memory.choice.at_most.total(),
                "inventory": inventory,
                "saved_by_layer": plan.saved,
            },
            "batches": {
                "micro_batch_tokens": plan.micro_batch_tokens,
                "scoring_tokens": plan.scoring_tokens,
                "per_update": {
                    "min": train.micro_batches.min,
                    "mean": train.micro_batches.mean,
                    "max": train.micro_batches.max,
                },
                "largest_rows": train.largest_rows,
            },
            "epoch": {
                "logical_tokens": train.logical_tokens,
                "rows": self.rows(),
                "rows_shared": train.rows_shared,
                "rows_unshared": train.rows_unshared,
                "scored_rows": train.scored_rows,
                "attention_pairs": train.attention_pairs,
                "sharing_factor": self.sharing_factor(),
                "padding_factor": padding,
            },
            "update_flops": {
                "linears": linears,
                "attention": attention,
                "lora": lora,
                "head": head,
                "total": work.update.total(),
                "recomputed": work.recomputed,
                "kl": work.kl,
            },
            "run_flops": {
                "updates": work.of_update() * plan.steps as f64,
                "reference": work.reference,
                "evaluations": work.of_evaluations(),
                "total": work.of_run(plan.steps),
            },
            "time": {
                "product_flops_per_second": rate,
                "efficiency": EFFICIENCY,
                "update_seconds": update_seconds,
                "logical_tokens_per_second":
                    train.logical_tokens as f64 / train.updates.max(1) as f64 / update_seconds,
                "run_seconds": self.seconds(work.of_run(plan.steps)),
            },
        })
    }

    fn text(&self) -> String {
        let mut table = Table::default();
        self.tell_run(&mut table);
        self.tell_memory(&mut table);
        self.tell_data(&mut table);
        self.tell_work(&mut table);
        self.tell_time(&mut table);
        table.text
    }

    fn tell_run(&self, table: &mut Table) {
        let Self { setup, resolved, .. } = self;
        let (plan, recipe) = (&resolved.plan, &setup.parsed.recipe);
        let (base, trainable) = (setup.decoder.num_parameters(), resolved.memory.demand.shape.adapter_parameters());
        table.fact("model", format!("{} parameters, {}", short(base), recipe.model.source.display()));
        table.fact(
            "adapter",
            format!(
                "rank {}, alpha {}, on {} modules: {} parameters, {:.1} % of the base",
                setup.lora.rank,
                setup.lora.alpha,
                self.modules(),
                short(trainable),
                100.0 * trainable as f64 / base as f64
            ),
        );
        table.fact("loss", recipe.loss.name().to_owned());
        let updates = self.forecast.train.updates;
        table.fact(
            "run",
            format!(
                "{} updates of {}; an epoch of {} examples has {}",
                thousands(plan.steps),
                plan.batch_size,
                thousands(setup.train.len()),
                thousands(updates)
            ),
        );
    }

    fn tell_memory(&self, table: &mut Table) {
        let Self { resolved, forecast, .. } = self;
        let (memory, plan) = (&resolved.memory, &resolved.plan);
        table.heading("memory");
        for (name, bytes) in forecast.inventory.parts() {
            let note = match name {
                "base" => {
                    let kept = match (self.setup.decoder.quant, self.setup.decoder.quantized_bytes) {
                        (_, Some(_)) => "as the file has them",
                        (Quant::None, None) => "in f32",
                        (quant, None) => &format!("in {}", quant.name()),
                    };
                    format!("frozen weights {kept}")
                }
                "optimizer" => "AdamW's two means".to_owned(),
                "saved" => memory.choice.describe_saved(),
                "scratch" => "one layer at work".to_owned(),
                "data" => "token ids".to_owned(),
                _ => String::new(),
            };
            table.row(name, bytes::shown(bytes), note);
        }
        let (most, budget) = (memory.choice.at_most.total(), bytes::shown(memory.budget));
        let verdict = match memory.fits() {
            true => format!("never more than {}; the budget is {budget}", bytes::shown(most)),
            false => format!("does not fit: it may take {}, and the budget is {budget}", bytes::shown(most)),
        };
        table.row("all", bytes::shown(forecast.inventory.total()), verdict);
        table.heading("batches");
        let per_update = &forecast.train.micro_batches;
        let (min, max) = (per_update.min, per_update.max);
        table.row("micro-batches", format!("{:.1}", per_update.mean), format!("an update, {min} to {max}"));
        let note = format!("in the largest; {} at most", thousands(plan.micro_batch_tokens));
        table.row("rows", thousands(forecast.train.largest_rows), note);
        let note = "at most, where nothing is kept for a backward pass".to_owned();
        table.row("rows scored", thousands(plan.scoring_tokens), note);
    }

    fn tell_data(&self, table: &mut Table) {
        let facts = &self.forecast.train;
        table.heading("an epoch");
        let count = |count: u64| thousands(usize::try_from(count).unwrap_or(usize::MAX));
        table.row("tokens", count(facts.logical_tokens), "of prompts and completions, a prompt with each".to_owned());
        let note = match self.resolved.plan.share_prompts {
            true => format!("computed; {:.2} times as many without shared prompts", self.sharing_factor()),
            false => format!("computed; {:.2} times as few with shared prompts", self.sharing_factor()),
        };
        table.row("rows", count(self.rows()), note);
        table.row("scored", count(facts.scored_rows), "rows that the head sees".to_owned());
        let factors = self.padding_factors();
        let [first, rest @ ..] = factors.map(|(pairs, factor)| (pairs, format!("{factor:.2}")));
        let rest: Vec<String> = rest.iter().map(|(pairs, factor)| format!("{factor} at {pairs}")).collect();
        let note = format!("times the tokens in padded batches of one pair; {}", rest.join(", "));
        table.row("padding", first.1, note);
    }

    fn tell_work(&self, table: &mut Table) {
        let Self { work, resolved, .. } = self;
        table.heading("GFLOP an update, at least");
        let Work { linears, attention, lora, head } = work.update;
        let all = work.update.total();
        let share = |part: f64| format!("{:.0} %", 100.0 * part / all.max(1.0));
        let giga = |flops: f64| format!("{:.1}", flops / 1e9);
        for (name, part) in [("layers", linears), ("attention", attention), ("adapters", lora), ("head", head)] {
            table.row(name, giga(part), share(part));
        }
        table.row("all", giga(all), String::new());
        if work.recomputed > 0.0 {
            table.row("again", giga(work.recomputed), "what was not kept".to_owned());
        }
        if work.kl > 0.0 {
            table.row("KL", giga(work.kl), "mismatched completions".to_owned());
        }
        table.heading("GFLOP a run");
        table.row("updates", giga(work.of_update() * resolved.plan.steps as f64), String::new());
        if work.reference > 0.0 {
            table.row("reference", giga(work.reference), "each example once".to_owned());
        }
        if work.evaluations > 0 {
            let note = format!("{} times, and once by the reference", work.evaluations);
            table.row("evaluation", giga(work.of_evaluations()), note);
        }
    }

    fn tell_time(&self, table: &mut Table) {
        let Self { work, resolved, rate, .. } = self;
        table.heading("time");
        let note = format!("GFLOP/s measured in a product; {:.0} % of it assumed", 100.0 * EFFICIENCY);
        table.row("rate", format!("{:.0}", rate / 1e9), note);
        table.row("an update", duration(self.seconds(work.of_update())), String::new());
        let note = "without loading and sample answers".to_owned();
        table.row("the run", duration(self.seconds(work.of_run(resolved.plan.steps))), note);
    }
}

/// Lines in columns.
#[derive(Default)]
struct Table {
    text: String,
}

impl Table {
    fn fact(&mut self, name: &str, text: String) {
        let _ = writeln!(self.text, "{name:<10} {text}");
    }

    fn heading(&mut self, name: &str) {
        let _ = writeln!(self.text, "\n{name}");
    }

    fn row(&mut self, name: &str, value: String, note: String) {
        let _ = writeln!(self.text, "{}", format!("  {name:<14}{value:>14}  {note}").trim_end());
    }
}
