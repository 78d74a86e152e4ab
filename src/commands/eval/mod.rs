//! `dpo-lora eval`: what an adapter has changed, without a judge.

mod report;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;

use self::report::{Chosen, Data, Report, Sampling};
use super::answering::{self, Answering};
use super::trained::{Trained, candle, described};
use super::{Failure, failed, of_stdout, print_json, request};
use crate::cli::{self, Bound};
use crate::data::{ChoiceForm, Codec, Dataset, Prompt, Question, load_choices};
use crate::eval::{Answers, BATCH_ROWS, ChoiceResult, Distance, Pairs, Sampled, score_choices};
use crate::files;
use crate::loss::{Dpo, Loss};
use crate::model::generate::End;
use crate::model::{Adapter, Model};
use crate::progress::{Bar, Console};
use crate::run_folder::RunFolder;
use crate::statistics::{Bootstrap, mean};
use crate::suggest::did_you_mean;
use crate::train::{Evaluation, TrainError};

#[derive(Debug, Error, Diagnostic)]
enum EvalError {
    #[error("there is nothing to evaluate on: no held-out pairs are known, and no questions are named")]
    #[diagnostic(help("--data FILE names pairs, --choices FILE multiple-choice questions"))]
    Nothing,
    #[error("{option} {name}: no value has this name")]
    UnknownName {
        option: &'static str,
        name: String,
        #[help]
        help: String,
    },
    #[error("{option} {name}: that is not measured here")]
    NotMeasured {
        option: &'static str,
        name: String,
        #[help]
        help: &'static str,
    },
    #[error("the log-prob of {row} is not finite ({detail})")]
    #[diagnostic(help(
        "base or adapter give no number for this row: were they trained in another type, or is a file broken?"
    ))]
    NotFinite { row: String, detail: String },
    #[error("--choices-chat needs a chat template, and the model has none")]
    #[diagnostic(help("leave it out: questions are then put as plain text"))]
    NoTemplate,
}

/// Evaluates an adapter.
///
/// # Errors
/// See [`Failure`].
pub fn eval(arguments: &cli::Eval) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let trained = Trained::open(&arguments.trained, &console)?;
    let loss = trained.recipe.as_ref().map_or_else(|| Loss::Dpo(Dpo::default()), |recipe| recipe.loss.clone());
    let data = trained.held_out_for(loss.examples(), arguments.data.as_deref(), &console)?;
    if data.is_none() && arguments.choices.is_empty() {
        return Err(request(EvalError::Nothing));
    }
    check_names(arguments, data.as_ref(), &loss)?;
    if data.is_none() {
        console.warning("no held-out pairs are known, so only the questions are evaluated; --data FILE names some");
    }
    let codec = trained.codec()?;
    let questions = questions(arguments, &codec, &console)?;
    let reference = trained.reference()?;
    let chosen = answering::choose(arguments.device.device, &console)?;

    let model = trained.load(reference, &chosen, &console)?;
    let work = Work { arguments, loss: &loss, model: &model, codec: &codec, console: &console };
    let mut report = Report {
        name: arguments.trained.names(),
        base: trained.base_name(),
        adapter: described(&trained.adapters),
        loss: loss.clone(),
        run_loss: trained.recipe.is_some(),
        reference_adapter: model.has_reference_adapter(),
        seed: arguments.seed,
        data: None,
        pairs: None,
        sampling: None,
        choices: Vec::new(),
    };
    if let Some(data) = &data {
        let examples = spread(data.len(), arguments.limit);
        let prompts = prompt_numbers(data, &examples);
        report.data = Some(Data {
            files: source_names(&trained, arguments),
            examples: examples.len(),
            facts: data.facts(),
            drops: data.drops().clone(),
        });
        report.pairs = Some(work.pairs(data, &examples, &prompts)?);
        if arguments.kl_prompts > 0 {
            report.sampling = Some(work.answers(data, &examples, &prompts)?);
        }
    }
    for (file, questions) in &questions {
        report.choices.push((file.clone(), work.choices(questions)?));
    }
    finish(arguments, &trained, &report, &console)
}

/// Writes, prints and holds the values to what was asked.
fn finish(arguments: &cli::Eval, trained: &Trained, report: &Report, console: &Console) -> Result<(), Failure> {
    let json = report.json();
    if let Some(out) = out(arguments, trained) {
        files::write(&out, format!("{json:#}\n").as_bytes()).map_err(failed)?;
        console.fact("written", out.display());
    }
    if arguments.json {
        print_json(&json)?;
    } else {
        use std::io::Write;
        let written = std::io::stdout().write_all(report.text().as_bytes());
        written.map_err(of_stdout)?;
    }
    let mut met = true;
    for (option, bounds, sign) in
        [("--fail-under", &arguments.fail_under, 1.0), ("--fail-over", &arguments.fail_over, -1.0)]
    {
        for Bound { name, value } in bounds {
            let found = report.value(name);
            // what is no number is within no bound
            if !found.is_some_and(|found| sign * found >= sign * value) {
                let found = found.map_or("unknown".to_owned(), |found| format!("{found:.4}"));
                console.line(format_args!("{option} {name}={value}: it is {found}"));
                met = false;
            }
        }
    }
    if met { Ok(()) } else { Err(Failure::Gate) }
}

/// Where results go: what was asked for, or the folder of a run that is evaluated as it ended. A checkpoint's values are
/// not the run's.
fn out(arguments: &cli::Eval, trained: &Trained) -> Option<PathBuf> {
    let ended = || {
        let run = RunFolder::open(trained.run.as_ref()?).ok()?;
        let alone = arguments.trained.adapters.len() == 1 && arguments.trained.weights.is_empty();
        (alone && trained.folder == run.adapter()).then(|| run.eval())
    };
    arguments.out.clone().or_else(ended)
}

fn source_names(trained: &Trained, arguments: &cli::Eval) -> Vec<String> {
    match (&arguments.data, &trained.recipe) {
        (Some(file), _) => vec![file.display().to_string()],
        (None, Some(recipe)) => recipe.data.eval.as_ref().map_or(Vec::new(), |eval| eval.names()),
        (None, None) => Vec::new(),
    }
}

/// Refuses a bound on what will not be there, before anything is computed.
fn check_names(arguments: &cli::Eval, data: Option<&Dataset>, loss: &Loss) -> Result<(), Failure> {
    for (option, bounds) in [("--fail-under", &arguments.fail_under), ("--fail-over", &arguments.fail_over)] {
        for Bound { name, .. } in bounds {
            let needs = report::needs(name).ok_or_else(|| {
                let help = match did_you_mean(name, report::names()) {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => format!("names are {}", report::names().collect::<Vec<_>>().join(", ")),
                };
                request(EvalError::UnknownName { option, name: name.clone(), help })
            })?;
            let missing = match needs {
                report::Needs::Rows(..) if data.is_none() => "it needs held-out pairs: --data FILE",
                report::Needs::Rows(_, report::Of::Rewards) if loss.beta().is_none() => {
                    "the run's loss has no rewards; accuracy and margin are those of DPO with its default beta"
                }
                report::Needs::Rows(_, report::Of::Orpo) if !matches!(loss, Loss::Orpo(_)) => {
                    "it is a part of ORPO's loss alone"
                }
                report::Needs::Rows(rows, _) if !data.is_some_and(|data| has(data, rows)) => match rows {
                    report::Rows::Chosen => "no held-out row has a chosen answer: --data FILE",
                    report::Rows::Rejected => "no held-out row has a rejected answer: --data FILE",
                    _ => "it needs pairs, and no held-out row has both answers: --data FILE",
                },
                report::Needs::Answers if data.is_none() => {
                    "it needs held-out pairs, whose prompts are answered: --data FILE"
                }
                report::Needs::Answers if arguments.kl_prompts == 0 => {
                    "it needs sampled answers: --kl-prompts above 0"
                }
                report::Needs::Choices if arguments.choices.is_empty() => "it needs questions: --choices FILE",
                _ => continue,
            };
            return Err(request(EvalError::NotMeasured { option, name: name.clone(), help: missing }));
        }
    }
    Ok(())
}

/// Whether there are such rows.
fn has(data: &Dataset, rows: report::Rows) -> bool {
    let mut all =
        (0..data.len()).map(|index| data.get(index)).map(|row| (row.chosen.is_some(), row.rejected.is_some()));
    match rows {
        report::Rows::Any => all.next().is_some(),
        report::Rows::Chosen => all.any(|(chosen, _)| chosen),
        report::Rows::Rejected => all.any(|(_, rejected)| rejected),
        report::Rows::Sides => has(data, report::Rows::Chosen) && has(data, report::Rows::Rejected),
        report::Rows::Pairs => all.any(|(chosen, rejected)| chosen && rejected),
    }
}

fn questions(
    arguments: &cli::Eval,
    codec: &Codec,
    console: &Console,
) -> Result<Vec<(PathBuf, Vec<Question>)>, Failure> {
    let form = if arguments.choices_chat { ChoiceForm::Chat } else { ChoiceForm::Plain };
    if arguments.choices_chat && codec.chat_template().is_none() {
        return Err(request(EvalError::NoTemplate));
    }
    let load = |file: &PathBuf| {
        let all = load_choices(file, codec, form, console).map_err(request)?;
        let kept = spread(all.len(), arguments.limit);
        Ok((file.clone(), if kept.len() == all.len() { all } else { kept.iter().map(|&i| all[i].clone()).collect() }))
    };
    arguments.choices.iter().map(load).collect()
}

/// At most `limit` of `all` numbers, spread over them.
fn spread(all: usize, limit: Option<u32>) -> Vec<usize> {
    let count = limit.map_or(all, |limit| (limit as usize).min(all));
    (0..count).map(|i| i * all / count).collect()
}

/// Numbers the prompts of examples, equal ones alike.
fn prompt_numbers(data: &Dataset, examples: &[usize]) -> Vec<usize> {
    let mut numbers = HashMap::new();
    let number = |&example: &usize| {
        let next = numbers.len();
        *numbers.entry(data.get(example).prompt).or_insert(next)
    };
    examples.iter().map(number).collect()
}

/// What there is to evaluate with.
struct Work<'a> {
    arguments: &'a cli::Eval,
    loss: &'a Loss,
    model: &'a Model,
    codec: &'a Codec,
    console: &'a Console,
}

impl Work<'_> {
    fn bootstrap(&self) -> Bootstrap {
        Bootstrap { seed: self.arguments.seed, ..Bootstrap::default() }
    }

    fn pairs(&self, data: &Dataset, examples: &[usize], prompts: &[usize]) -> Result<Pairs, Failure> {
        let mut evaluation = Evaluation::of(examples.to_vec(), data, self.loss, true, BATCH_ROWS);
        let bar = self.console.count_bar("held-out pairs", 2 * evaluation.len() as u64);
        let mut examine = |adapter| {
            let examined = evaluation.examine(self.model, self.loss, adapter, 0, &|by| Bar::advance(&bar, by));
            examined.map_err(|error| match error {
                TrainError::LossNotFinite { row, detail, .. } => failed(EvalError::NotFinite { row, detail }),
                other => failed(other),
            })
        };
        let (base, policy) = (examine(Adapter::Off)?, examine(Adapter::On)?);
        Ok(Pairs::new(self.loss, base, policy, prompts, self.bootstrap()))
    }

    /// Answers of both sides to some of the prompts, at temperature 1: only such answers tell the KL.
    fn answers(&self, data: &Dataset, examples: &[usize], numbers: &[usize]) -> Result<Sampling, Failure> {
        let count = numbers.iter().max().map_or(0, |last| last + 1);
        let mut first = vec![None; count];
        let mut chosen_tokens = vec![Vec::new(); count];
        for (&example, &number) in examples.iter().zip(numbers) {
            let example = data.get(example);
            first[number].get_or_insert(example.prompt);
            // without what ends it, as answers are counted
            let ended = |ids: &[u32]| ids.last().is_some_and(|last| self.codec.stop_tokens().contains(last));
            chosen_tokens[number].extend(example.chosen.map(|ids| (ids.len() - usize::from(ended(ids))) as f64));
        }
        let asked: Vec<usize> = spread(count, Some(self.arguments.kl_prompts));
        let prompts: Vec<Prompt> = asked.iter().filter_map(|&number| first[number]).map(prompt_of).collect();
        let decoding = cli::Decoding {
            max_new_tokens: self.arguments.max_new_tokens,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop: Vec::new(),
            seed: self.arguments.seed,
        };
        let batch = self.arguments.batch;
        let answering = Answering { model: self.model, codec: self.codec, decoding: &decoding, batch };
        let sample = |adapter| -> Result<Vec<Sampled>, Failure> {
            let answers = answering.all(&prompts, adapter, self.console, |_, _| Ok(()))?;
            let sampled = prompts.iter().zip(answers).map(|(prompt, answer)| Sampled {
                prompt: prompt.ids.clone(),
                ended: answer.end == End::Stop,
                ids: answer.ids,
            });
            Ok(sampled.collect())
        };
        let (base, policy) = (sample(Adapter::Off)?, sample(Adapter::On)?);
        let stop = self.codec.stop_tokens().first().copied().unwrap_or(0);
        let distance = Distance::of(self.model, &policy, stop, self.bootstrap(), self.console).map_err(candle)?;
        let chosen: Vec<f64> = asked
            .iter()
            .filter(|&&number| !chosen_tokens[number].is_empty())
            .map(|&n| mean(&chosen_tokens[n]))
            .collect();
        Ok(Sampling {
            prompts: prompts.len(),
            max_new_tokens: self.arguments.max_new_tokens,
            answers: Answers::of(&base, &policy, self.bootstrap()),
            distance,
            chosen: (!chosen.is_empty()).then(|| Chosen { tokens: mean(&chosen) }),
        })
    }

    fn choices(&self, questions: &[Question]) -> Result<ChoiceResult, Failure> {
        score_choices(self.model, questions, self.bootstrap(), self.console).map_err(candle)
    }
}

fn prompt_of(ids: &[u32]) -> Prompt {
    Prompt::new(ids.to_vec(), String::new(), Vec::new())
}

/// What a file of questions is called in a table.
fn file_name(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
