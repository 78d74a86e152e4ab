//! `dpo-lora run`: from a recipe to a trained adapter, or on from a checkpoint.

mod prepare;
mod reference;
mod summary;

use std::time::Instant;

use miette::miette;
use serde_json::{Value, json};

use self::prepare::{Prepared, Run};
use super::{Failure, failed, print_json};
use crate::adapter::peft;
use crate::cli;
use crate::files;
use crate::interrupt::Interrupt;
use crate::model::Adapter;
use crate::model::generate::Stop;
use crate::progress::{Bar, Console, duration, short};
use crate::report::{self, Margins, Sample, tensorboard};
use crate::run_folder::MetricsLog;
use crate::train::checkpoint::{self, State};
use crate::train::{Evaluation, Metrics, TrainError, Trainer};

/// Trains adapters as a recipe says.
///
/// # Errors
/// See [`Failure`].
pub fn run(arguments: &cli::Run) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let interrupt = Interrupt::listen().map_err(|e| Failure::Failed(miette!("cannot listen for signals: {e}")))?;
    // fetching a model may take long; what came of it is kept
    let prepared = prepare::prepare(arguments, &console)?;
    interrupt.save_first();
    let training = Training::begin(&prepared, &console, &interrupt)?;
    let summary = training.finish()?;
    if arguments.json {
        print_json(&summary)?;
    }
    Ok(())
}

/// A run at work.
struct Training<'p> {
    run: &'p Run,
    prepared: &'p Prepared,
    console: &'p Console,
    interrupt: &'p Interrupt,
    trainer: Trainer<'p>,
    evaluation: Option<Evaluation<'p>>,
    log: MetricsLog,
    tensorboard: Option<tensorboard::Writer>,
    before: Option<Metrics>,
    margins: Margins,
    /// Where the reference's log-probs came from, if they were known before the first update.
    reference: Option<reference::Report>,
    started: Instant,
    /// Seconds of the run before it was resumed.
    seconds_before: f64,
    saved_step: Option<usize>,
}

impl<'p> Training<'p> {
    fn begin(prepared: &'p Prepared, console: &'p Console, interrupt: &'p Interrupt) -> Result<Self, Failure> {
        let Prepared { run, model, loss, train, eval, .. } = prepared;
        let plan = run.resolved.plan.clone();
        let budget = plan.scoring_tokens;
        let evaluation = eval.as_ref().map(|eval| Evaluation::new(eval, loss, plan.share_prompts, budget));
        let (trainer, log, seconds_before, saved_step) = match &prepared.resumed {
            None => {
                let trainer = Trainer::new(model.clone(), loss.clone(), train, plan).map_err(TrainError::from);
                (trainer.map_err(failed)?, MetricsLog::open(&run.folder, 0).map_err(failed)?, 0.0, None)
            }
            Some((state, progress)) => {
                let trainer = Trainer::resume(model.clone(), loss.clone(), train, plan, progress.clone());
                let log = MetricsLog::open(&run.folder, state.metrics_bytes).map_err(failed)?;
                (trainer, log, state.seconds, Some(state.step))
            }
        };
        let started = Instant::now();
        let (before, margins) = match saved_step {
            Some(_) => (summary::read_before(&run.folder), Margins::read(&run.folder)),
            None => (None, Margins::default()),
        };
        let tensorboard = match run.resolved.recipe.run.tensorboard {
            true => open_tensorboard(run, saved_step, console),
            false => None,
        };
        Ok(Self {
            run,
            prepared,
            console,
            interrupt,
            trainer,
            evaluation,
            log,
            tensorboard,
            before,
            margins,
            reference: None,
            started,
            seconds_before,
            saved_step,
        })
    }

    fn finish(mut self) -> Result<Value, Failure> {
        match reference::fill(self.prepared, &mut self.trainer, self.console, self.interrupt)? {
            reference::Outcome::Done(report) => self.reference = Some(report),
            reference::Outcome::InTheUpdate => {}
            reference::Outcome::Interrupted(code) => return Err(self.stop(code)),
        }
        if self.saved_step.is_none() {
            self.before = self.evaluate()?;
            if let Some(before) = &self.before {
                self.console.fact("before", held_out(before));
                let mut line = Metrics::default();
                line.push("step", 0.0);
                line.push("epoch", 0.0);
                line.extend("eval_", before);
                self.log(&line)?;
            }
        }
        self.report(true);
        let mut after = self.updates()?;
        if after.is_none() && self.trainer.is_done() {
            // resumed after the last update, or there was none
            after = self.evaluate()?;
        }
        let samples = self.samples()?;
        self.write_adapter()?;
        let summary = summary::Summary {
            prepared: self.prepared,
            trainer: &self.trainer,
            before: self.before.as_ref(),
            after: after.as_ref(),
            reference: self.reference.as_ref(),
            seconds: self.seconds(),
        };
        let json = summary.json();
        files::write(&self.run.folder.summary(), format!("{json:#}\n").as_bytes()).map_err(failed)?;
        self.report(false);
        summary.tell(&samples, self.console);
        Ok(json)
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    /// Every update that is left. The held-out metrics after the last one.
    fn updates(&mut self) -> Result<Option<Metrics>, Failure> {
        let total = self.trainer.plan().steps;
        let bar = self.console.step_bar(total as u64, self.trainer.step() as u64);
        let begun = (Instant::now(), self.trainer.step());
        let eval_every = self.run.resolved.recipe.eval.every.map_or(usize::MAX, |every| every.get());
        let checkpoint_every = self.run.resolved.recipe.run.checkpoint_every.map_or(usize::MAX, |every| every.get());
        let mut held = None;
        while !self.trainer.is_done() {
            if let Some(code) = self.interrupt.asked() {
                drop(bar);
                return Err(self.stop(code));
            }
            let mut metrics = self.trainer.update().map_err(failed)?;
            let step = self.trainer.step();
            let left = begun.0.elapsed().as_secs_f64() / (step - begun.1) as f64 * (total - step) as f64;
            bar.advance(1);
            bar.state(&format!("{}  {} left", in_short(&metrics), duration(left)), step == total);
            let evaluates = step.is_multiple_of(eval_every) || step == total;
            if evaluates {
                held = self.evaluate()?;
                if let Some(held) = &held {
                    metrics.extend("eval_", held);
                    if step < total {
                        self.console.fact(&format!("step {step}"), held_out(held));
                    }
                }
            }
            self.log(&metrics)?;
            let saves = step.is_multiple_of(checkpoint_every) || step == total;
            if saves {
                self.checkpoint()?;
            }
            if evaluates || saves {
                self.report(true);
            }
        }
        Ok(held)
    }

    fn evaluate(&mut self) -> Result<Option<Metrics>, Failure> {
        let Some(evaluation) = &mut self.evaluation else { return Ok(None) };
        let bar = self.console.count_bar("evaluating", evaluation.len() as u64);
        let advance = |by| Bar::advance(&bar, by);
        let metrics = self.trainer.evaluate(evaluation, &advance).map_err(failed)?;
        self.margins.put(self.trainer.step() as u64, evaluation.margins());
        self.margins.write(&self.run.folder).map_err(failed)?;
        Ok(Some(metrics))
    }

    /// Writes down what an update or an evaluation said.
    fn log(&mut self, metrics: &Metrics) -> Result<(), Failure> {
        self.log.push(metrics.json()).map_err(failed)?;
        if let Some(writer) = &mut self.tensorboard
            && let Err(error) = writer.scalars(metrics)
        {
            self.console.warning(format_args!("{error}; there will be no more TensorBoard events"));
            self.tensorboard = None;
        }
        Ok(())
    }

    /// Writes the report of how far it is. A report that cannot be written is no reason to end a run.
    fn report(&self, running: bool) {
        if let Err(error) = report::write(&self.run.folder, running) {
            self.console.warning(error);
        }
    }

    fn checkpoint(&mut self) -> Result<(), Failure> {
        let step = self.trainer.step();
        if self.saved_step == Some(step) {
            return Ok(());
        }
        let metrics_bytes = self.log.sync().map_err(failed)?;
        let Prepared { fingerprints, .. } = self.prepared;
        let state = State::of(&self.trainer, metrics_bytes, self.seconds(), fingerprints.clone());
        let keep = self.run.resolved.recipe.run.keep.get();
        let base = &self.prepared.base_name;
        checkpoint::save(self.run.folder.path(), &self.trainer, &state, base, keep).map_err(failed)?;
        self.saved_step = Some(step);
        Ok(())
    }

    /// Saves and says how to go on.
    fn stop(&mut self, code: u8) -> Failure {
        let (step, total) = (self.trainer.step(), self.trainer.plan().steps);
        if step > 0
            && let Err(failure) = self.checkpoint()
        {
            return failure;
        }
        self.report(false);
        self.console.line(format_args!("\nstopped after update {step} of {total}; to go on:"));
        self.console.line(format_args!("  dpo-lora run --resume {}", self.run.folder.shown()));
        Failure::Interrupted(code)
    }

    /// Answers of base and policy to a few held-out prompts.
    fn samples(&mut self) -> Result<Vec<Sample>, Failure> {
        let Prepared { eval, codec, .. } = self.prepared;
        let Some(eval) = eval else { return Ok(Vec::new()) };
        let config = &self.run.resolved.recipe.eval;
        let mut samples = Vec::<Sample>::new();
        let bar = self.console.count_bar("answering", config.samples as u64);
        let stop = Stop { tokens: codec.stop_tokens(), max_new_tokens: config.max_new_tokens.get() };
        let generate = |prompt: &[u32], adapter| {
            let answer = self.trainer.model().generate(prompt, adapter, &stop);
            answer.map(|ids| codec.decode(&ids)).map_err(|e| failed(TrainError::from(e)))
        };
        // spread over the file; the same prompt is not asked twice
        let spread = (0..config.samples).map(|i| i * eval.len() / config.samples);
        for index in spread.chain(0..eval.len()) {
            if samples.len() == config.samples || self.interrupt.asked().is_some() {
                break;
            }
            let example = eval.get(index);
            let prompt = codec.decode(example.prompt);
            if samples.iter().any(|sample| sample.prompt == prompt) {
                continue;
            }
            samples.push(Sample {
                base: generate(example.prompt, Adapter::Off)?,
                policy: generate(example.prompt, Adapter::On)?,
                chosen: example.chosen.map(|ids| codec.decode(ids)),
                rejected: example.rejected.map(|ids| codec.decode(ids)),
                prompt,
            });
            bar.advance(1);
        }
        let lines: String = samples.iter().map(|sample| format!("{}\n", json!(sample))).collect();
        files::write(&self.run.folder.samples(), lines.as_bytes()).map_err(failed)?;
        Ok(samples)
    }

    /// `adapter/`: PEFT's files, and the tokenizer with its template beside them.
    fn write_adapter(&self) -> Result<(), Failure> {
        let Prepared { codec, base_name, .. } = self.prepared;
        files::write_folder(&self.run.folder.adapter(), |folder| {
            peft::save(self.trainer.model().adapters(), base_name, folder)?;
            codec.save(folder)?;
            Ok::<_, peft::SaveError>(())
        })
        .map_err(failed)
    }
}

/// The event file of this run, or of its part after a resume.
fn open_tensorboard(run: &Run, saved_step: Option<usize>, console: &Console) -> Option<tensorboard::Writer> {
    let recipe = std::fs::read_to_string(run.folder.resolved_recipe()).unwrap_or_default();
    match tensorboard::Writer::create(
        &run.folder.tensorboard(),
        saved_step.map_or(0, |step| step as u64 + 1),
        &recipe,
    ) {
        Ok(writer) => Some(writer),
        Err(error) => {
            console.warning(format_args!("{error}; there will be no TensorBoard events"));
            None
        }
    }
}

/// An update at a glance.
fn in_short(metrics: &Metrics) -> String {
    let mut text = String::new();
    let shown = [("loss", "loss", 3), ("rewards/accuracies", "acc", 2), ("rewards/margins", "margin", 2)];
    for (name, label, digits) in shown {
        if let Some(value) = metrics.get(name) {
            text.push_str(&format!("{label} {value:.digits$}  "));
        }
    }
    let rate = metrics.get("tokens_per_sec").unwrap_or(0.0);
    text + &format!("{} tok/s", short(rate as usize))
}

/// Held-out metrics at a glance.
fn held_out(metrics: &Metrics) -> String {
    let shown = [
        ("loss", "held-out loss", 4),
        ("logps/accuracies", "prefers chosen", 3),
        ("rewards/accuracies", "accuracy", 3),
        ("rewards/margins", "margin", 3),
        ("kl_to_reference", "KL", 4),
        ("perplexity", "perplexity", 2),
    ];
    let shown = shown
        .into_iter()
        .filter_map(|(name, label, digits)| Some(format!("{label} {:.digits$}", metrics.get(name)?)));
    shown.collect::<Vec<_>>().join("  ")
}
