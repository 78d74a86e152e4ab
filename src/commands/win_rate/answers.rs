//! Answers of both sides to the same prompts.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use miette::Diagnostic;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::place::{Answers, Place};
use super::{Failure, failed, interrupted, request};
use crate::cli;
use crate::commands::answering::{self, Answered, Answering};
use crate::commands::prepare::from_base;
use crate::commands::trained::Trained;
use crate::commands::user_cache;
use crate::data::{Codec, Columns, Prompt, Sources, load_prompts, shuffle_first};
use crate::files::cannot_write;
use crate::interrupt::Interrupt;
use crate::judge::Calls;
use crate::judge::ask::{self, AskError, Budget, Caller, Ended, TRIES, locked};
use crate::judge::config::{JudgeError, address};
use crate::judge::endpoint::{Chat, Endpoint};
use crate::judge::log::{self, Busy, Log, LogError};
use crate::judge::outputs::{self, Output};
use crate::judge::pace::Pace;
use crate::judge::prompt::Message;
use crate::judge::verdict::Answer;
use crate::model::Adapter;
use crate::model::generate::{End, Sampling};
use crate::progress::{Console, one_line, thousands};

/// Changes when the same inputs would give other answers.
const VERSION: u32 = 1;
/// The same of answers of endpoints. Before 2 what had no text was kept as an answer.
const ENDPOINT_VERSION: u32 = 2;

#[derive(Debug, Error, Diagnostic)]
enum AnswersError {
    #[error("the adapter's run has no held-out rows, so it is not known what to ask")]
    #[diagnostic(help("--prompts FILE names prompts: texts, or rows of .jsonl, .json or .parquet files"))]
    NoPrompts,
    #[error("{leaked} of {prompts} prompts were trained on, such as: {first}")]
    #[diagnostic(help(
        "a policy knows the answers of what it was trained on: name others with --prompts, or say --allow-leak"
    ))]
    Leak { leaked: usize, prompts: usize, first: String },
    #[error("--against {0}: there is no such folder or file")]
    #[diagnostic(help(
        "`base` is the base alone; otherwise it is a run or an adapter, a file of answers, or the address of an endpoint"
    ))]
    NoSuch(String),
    #[error("--against {0}: it is not said which model answers there")]
    #[diagnostic(help("--against-model NAME"))]
    NoModel(String),
    #[error("{failed} of {prompts} prompts have no answer of {model}; the first: {why}")]
    #[diagnostic(help("what was answered is kept; the same command goes on"))]
    NoAnswers { failed: usize, prompts: usize, model: String, why: String },
    #[error("{0} means nothing to --against {1}")]
    #[diagnostic(help("it is for the address of an endpoint; leave it out"))]
    NoEndpoint(&'static str, String),
    #[error("{} is an adapter of another base: {}, and not {}", path.display(), theirs.display(), ours.display())]
    #[diagnostic(help("answers of other models come from a file or an endpoint: `win-rate {} --stage generate` writes \
                       outputs_policy.json", path.display()))]
    OtherBase { path: PathBuf, theirs: PathBuf, ours: PathBuf },
    #[error("{} has no answer to {missing} of {prompts} prompts, such as: {first}", file.display())]
    #[diagnostic(help("scores over different prompts cannot be compared; --prompts {} asks what it answers", file.display()))]
    NotAnswered { file: PathBuf, missing: usize, prompts: usize, first: String },
}

/// Who the policy is compared with.
enum Against {
    Base,
    Adapter(Box<Trained>),
    File(PathBuf, Vec<Output>),
    Endpoint(Box<Other>),
}

/// A model behind an endpoint.
struct Other {
    url: String,
    model: String,
    endpoint: Endpoint,
    calls: Calls,
}

/// What is to be answered by whom: everything that can be wrong with the request is known, and no weight was read.
pub(super) struct Request {
    trained: Trained,
    codec: Codec,
    prompts: Vec<Prompt>,
    about_prompts: Value,
    against: Against,
    policy_name: String,
    against_name: String,
}

impl Request {
    pub(super) fn new(arguments: &cli::WinRate, console: &Console) -> Result<Self, Failure> {
        let trained = Trained::open(&arguments.trained, console)?;
        let codec = trained.codec()?;
        let (prompts, about_prompts) = prompts(arguments, &trained, &codec, console)?;
        let against = Against::find(arguments, &trained, console)?;
        let policy_name = name_of(&arguments.trained.adapters);
        let against_name = match &against {
            Against::Base => "base".to_owned(),
            Against::Adapter(_) => name_of(std::slice::from_ref(&PathBuf::from(&arguments.against))),
            Against::Endpoint(other) => other.model.clone(),
            Against::File(file, outputs) => match outputs.first() {
                Some(first) if outputs.iter().all(|output| output.generator == first.generator) => {
                    first.generator.clone()
                }
                _ => file.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            },
        };
        let against_name =
            if against_name == policy_name { format!("{against_name} (against)") } else { against_name };
        if let Against::File(file, outputs) = &against {
            let answers = outputs::Answers::new(outputs);
            let missing: Vec<&Prompt> =
                prompts.iter().filter(|prompt| answers.find(prompt.id.as_deref(), &prompt.text).is_none()).collect();
            if let Some(first) = missing.first() {
                return Err(request(AnswersError::NotAnswered {
                    file: file.clone(),
                    missing: missing.len(),
                    prompts: prompts.len(),
                    first: one_line(&first.text, 60),
                }));
            }
        }
        Ok(Self { trained, codec, prompts, about_prompts, against, policy_name, against_name })
    }

    /// Whether each prompt has a good answer to show to the judge.
    pub(super) fn references(&self) -> impl Iterator<Item = bool> {
        self.prompts.iter().map(|prompt| prompt.reference.is_some())
    }

    /// Answers all prompts that were not answered before, and writes both files.
    pub(super) fn answer(
        self,
        arguments: &cli::WinRate,
        place: &Place,
        console: &Console,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let Self { trained, codec, prompts, about_prompts, against, policy_name, against_name } = self;
        let mut sampling = sampling(&arguments.decoding);
        // before any weight is fetched: a wrong key or name is known at once
        let asked = match &against {
            Against::Endpoint(endpoint) => {
                let mut kept = Kept::of_endpoint(endpoint, &sampling, place, console)?;
                kept.ask(endpoint, &prompts, arguments, &codec, console, interrupt)?;
                Some((format!("{} at {}", endpoint.model, endpoint.url), kept))
            }
            _ => None,
        };
        let chosen = answering::choose(arguments.device.device, console)?;
        trained.base.fetch_weights(console).map_err(from_base)?;
        let base = trained.base.fingerprint(trained.decoder.quant, console).map_err(failed)?;
        let policy = trained.adapters.fingerprint().map_err(failed)?;
        let template = codec.chat_template().map(|text| blake3::hash(text.as_bytes()).to_hex().to_string());
        if chosen.device.is_cuda() {
            // bf16 gives other answers than f32
            sampling["dtype"] = json!(chosen.dtype().as_str());
        }
        let base_name = trained.base_name();
        let kept =
            |adapter: &str| Kept::open(&base, &format!("{:?}", trained.decoder), adapter, &sampling, place, console);
        let (side, adapter) = match &against {
            Against::Base => (Adapter::Off, Some("off".to_owned())),
            Against::Adapter(other) => (Adapter::Reference, Some(other.adapters.fingerprint().map_err(failed)?)),
            Against::File(..) | Against::Endpoint(_) => (Adapter::Off, None),
        };
        // the same log cannot be opened twice
        let (mut policy_kept, mut other) = match adapter.filter(|adapter| *adapter != policy) {
            Some(adapter) => {
                // always in the same order: of two processes that compare the same two the other way round each would wait
                // for what the other has
                let (policy_kept, kept) = if policy < adapter {
                    let first = kept(&policy)?;
                    (first, kept(&adapter)?)
                } else {
                    let first = kept(&adapter)?;
                    (kept(&policy)?, first)
                };
                (policy_kept, Some((adapter, kept)))
            }
            None => (kept(&policy)?, asked),
        };
        let missing =
            policy_kept.missing(&prompts).len() + other.as_ref().map_or(0, |(_, kept)| kept.missing(&prompts).len());
        if missing > 0 {
            let reference = match &against {
                Against::Adapter(other) => Some(other.adapters.clone()),
                _ => None,
            };
            let model = trained.load(reference, &chosen, console)?;
            let answering =
                Answering { model: &model, codec: &codec, decoding: &arguments.decoding, batch: arguments.batch };
            interrupt.save_first();
            if let Some((_, other)) = &mut other {
                other.fill(&answering, side, &prompts, console, interrupt)?;
            }
            policy_kept.fill(&answering, Adapter::On, &prompts, console, interrupt)?;
        }
        let cached = prompts.len() * (1 + usize::from(other.is_some())) - missing;
        console
            .fact("answers", format_args!("{} made now, {} kept from before", thousands(missing), thousands(cached)));
        let row = |prompt: &Prompt, answered: Answered, generator: &str| Output {
            instruction: prompt.text.clone(),
            output: answered.text,
            generator: generator.to_owned(),
            dataset: None,
            category: prompt.category.clone(),
            group: prompt.group.clone(),
            id: prompt.id.clone(),
            reference: prompt.reference.clone(),
            turns: match &prompt.turns[..] {
                [(role, _)] if role == "user" => Vec::new(),
                turns => turns.to_vec(),
            },
            tokens: Some(answered.tokens),
            end: Some(answered.end),
        };
        let rows = |kept: &Kept, generator: &str| -> Vec<Output> {
            let answers = prompts.iter().filter_map(|prompt| Some(row(prompt, kept.get(prompt)?, generator)));
            answers.collect()
        };
        let policy_rows = rows(&policy_kept, &policy_name);
        let (against_rows, against_hash) = match (&against, &other) {
            (_, Some((hash, kept))) => (rows(kept, &against_name), json!(hash)),
            (Against::File(_, outputs), None) => {
                let answers = outputs::Answers::new(outputs);
                let of = |(prompt, policy): (&Prompt, &Output)| {
                    let found = &outputs[answers.find(prompt.id.as_deref(), &prompt.text)?];
                    // the judge sees the same prompt for both
                    Some(Output {
                        output: found.output.clone(),
                        generator: found.generator.clone(),
                        tokens: found.tokens.or_else(|| Some(tokens(&codec, &found.output))),
                        end: found.end,
                        ..policy.clone()
                    })
                };
                let rows: Vec<Output> = prompts.iter().zip(&policy_rows).filter_map(of).collect();
                let texts: Vec<&str> = rows.iter().map(|row| row.output.as_str()).collect();
                let hash = log::key(&json!(texts));
                (rows, json!(hash))
            }
            (_, None) => (rows(&policy_kept, &against_name), json!(policy)),
        };
        if policy_rows.iter().zip(&against_rows).all(|(one, two)| one.output == two.output) {
            console.warning(
                "both sides give the same answer to every prompt: if the adapter was trained, it was not trained enough \
                 to show, or it is not the one that was meant",
            );
        }
        let answers = Answers {
            schema: 1,
            policy: policy_name,
            against: against_name,
            base: base_name,
            prompts: about_prompts,
            sampling,
            hashes: json!({
                "base": base, "policy": policy, "against": against_hash, "chat_template": template,
            }),
            seed: arguments.decoding.seed,
        };
        place.write_answers(&policy_rows, &against_rows, &answers)
    }
}

impl Against {
    fn find(arguments: &cli::WinRate, trained: &Trained, console: &Console) -> Result<Self, Failure> {
        if arguments.against == "base" {
            return Ok(Self::Base);
        }
        if is_address(&arguments.against) {
            let what = "--against";
            let url = address(&arguments.against).ok_or_else(|| request(JudgeError::Address { what }))?;
            let model = arguments.against_model.clone();
            let model = model.ok_or_else(|| request(AnswersError::NoModel(url.clone())))?;
            let calls = Calls::of(&url, arguments.against_key_env.clone());
            let endpoint = Endpoint::new(&url, &calls).map_err(request)?;
            return Ok(Self::Endpoint(Box::new(Other { url, model, endpoint, calls })));
        }
        let path = Path::new(&arguments.against);
        if path.is_file() {
            return Ok(Self::File(path.to_owned(), outputs::read(path).map_err(request)?));
        }
        if !path.is_dir() {
            return Err(request(AnswersError::NoSuch(arguments.against.clone())));
        }
        let named = cli::Trained {
            adapters: vec![path.to_owned()],
            weights: Vec::new(),
            base: arguments.trained.base.clone(),
            quant: arguments.trained.quant,
        };
        let other = Trained::open(&named, console)?;
        if (&other.model.source, other.model.quant) != (&trained.model.source, trained.model.quant) {
            let (theirs, ours) = (other.model.source, trained.model.source.clone());
            return Err(request(AnswersError::OtherBase { path: path.to_owned(), theirs, ours }));
        }
        Ok(Self::Adapter(Box::new(other)))
    }
}

/// The prompts, and where they come from.
fn prompts(
    arguments: &cli::WinRate,
    trained: &Trained,
    codec: &Codec,
    console: &Console,
) -> Result<(Vec<Prompt>, Value), Failure> {
    let data = trained.recipe.as_ref().map(|recipe| &recipe.data);
    let sources = match (&arguments.prompts, data.and_then(|data| data.eval.as_ref())) {
        (Some(file), _) => Sources::one(file),
        (None, Some(eval)) => eval.clone(),
        (None, None) => return Err(request(AnswersError::NoPrompts)),
    };
    // the recipe's names of columns are those of its own files
    let named = data.map(|data| data.columns.clone()).unwrap_or_default();
    let columns = if arguments.prompts.is_some() { Columns::default() } else { named.clone() };
    let all = load_prompts(&sources, &columns, codec, arguments.plain, console).map_err(request)?;
    let (rows, mut seen) = (all.len(), BTreeSet::new());
    let mut prompts: Vec<Prompt> = all.into_iter().filter(|prompt| seen.insert(prompt.ids.clone())).collect();
    let distinct = prompts.len();
    let mut leaked = Value::Null;
    if let Some(data) = data {
        match load_prompts(&data.train, &named, codec, arguments.plain, console) {
            Ok(trained_on) => {
                let trained_on: BTreeSet<Vec<u32>> = trained_on.into_iter().map(|prompt| prompt.ids).collect();
                let known: Vec<&Prompt> = prompts.iter().filter(|prompt| trained_on.contains(&prompt.ids)).collect();
                leaked = json!(known.len());
                if let (Some(first), false) = (known.first(), arguments.allow_leak) {
                    return Err(request(AnswersError::Leak {
                        leaked: known.len(),
                        prompts: prompts.len(),
                        first: one_line(&first.text, 60),
                    }));
                }
            }
            Err(error) => {
                console.warning(format_args!("it cannot be checked whether prompts were trained on: {error}"));
            }
        }
    }
    if let Some(limit) = arguments.limit {
        prompts = sample(prompts, limit as usize, arguments.decoding.seed);
    }
    let again =
        if rows > distinct { format!(", {} the same again", thousands(rows - distinct)) } else { String::new() };
    let names = match sources.names() {
        names if names.len() > 3 => format!("{} files", names.len()),
        names => names.join(", "),
    };
    console.fact("prompts", format_args!("{} of {} in {names}{again}", thousands(prompts.len()), thousands(rows)));
    let about = json!({
        "files": sources.names(), "rows": rows, "distinct": distinct, "used": prompts.len(), "limit": arguments.limit,
        "seed": arguments.decoding.seed, "trained_on": leaked,
    });
    Ok((prompts, about))
}

/// So many prompts, each set as likely as any other, in their order.
fn sample(prompts: Vec<Prompt>, count: usize, seed: u64) -> Vec<Prompt> {
    if count >= prompts.len() {
        return prompts;
    }
    let mut numbers: Vec<u32> = (0..prompts.len() as u32).collect();
    shuffle_first(&mut numbers, count, &mut ChaCha8Rng::seed_from_u64(seed));
    let chosen: BTreeSet<u32> = numbers[..count].iter().copied().collect();
    (0..).zip(prompts).filter(|(i, _)| chosen.contains(i)).map(|(_, prompt)| prompt).collect()
}

fn sampling(decoding: &cli::Decoding) -> Value {
    json!({
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": decoding.min_p,
        "repetition_penalty": decoding.repetition_penalty,
        "stop": decoding.stop,
        "seed": decoding.seed,
    })
}

/// Answers that one side has given, on disk.
struct Kept {
    log: Log,
    /// Whether a prompt is known by what was said, and not by its ids.
    by_text: bool,
}

impl Kept {
    /// The answers under everything that they depend on but the prompt.
    fn open(
        base: &str,
        decoder: &str,
        adapter: &str,
        sampling: &Value,
        place: &Place,
        console: &Console,
    ) -> Result<Self, Failure> {
        let of = json!({
            "version": VERSION, "base": base, "decoder": decoder, "adapter": adapter, "sampling": sampling,
        });
        Self::under(&of, false, place, console)
    }

    fn of_endpoint(other: &Other, sampling: &Value, place: &Place, console: &Console) -> Result<Self, Failure> {
        let of = json!({ "version": ENDPOINT_VERSION, "url": other.url, "model": other.model, "sampling": sampling });
        Self::under(&of, true, place, console)
    }

    fn under(of: &Value, by_text: bool, place: &Place, console: &Console) -> Result<Self, Failure> {
        let folder = user_cache("answers").unwrap_or_else(|| place.path().join("answers"));
        std::fs::create_dir_all(&folder).map_err(|e| failed(cannot_write(&folder)(e)))?;
        let file = folder.join(format!("{}.jsonl", &log::key(of)[..32]));
        Ok(Self { log: Log::open(&file, Busy::Wait, console).map_err(failed)?, by_text })
    }

    fn key(&self, prompt: &Prompt) -> String {
        if self.by_text {
            return log::key(&json!(messages(prompt)));
        }
        let bytes: Vec<u8> = prompt.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        blake3::hash(&bytes).to_hex().to_string()
    }

    fn get(&self, prompt: &Prompt) -> Option<Answered> {
        serde_json::from_value(self.log.get(&self.key(prompt))?.get("answer")?.clone()).ok()
    }

    fn missing(&self, prompts: &[Prompt]) -> Vec<Prompt> {
        prompts.iter().filter(|prompt| self.get(prompt).is_none()).cloned().collect()
    }

    fn keep(&mut self, prompt: &Prompt, answered: &Answered) -> Result<(), LogError> {
        self.log.push(&self.key(prompt), &json!({ "answer": answered }))
    }

    /// Has everything answered that is not there yet.
    fn fill(
        &mut self,
        answering: &Answering<'_>,
        side: Adapter,
        prompts: &[Prompt],
        console: &Console,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let missing = self.missing(prompts);
        if missing.is_empty() {
            return Ok(());
        }
        let answered = answering.all(&missing, side, console, |number, answered| {
            self.keep(&missing[number], answered).map_err(failed)?;
            interrupt.asked().map_or(Ok(()), |code| Err(Failure::Interrupted(code)))
        });
        match answered {
            Err(Failure::Interrupted(code)) => Err(interrupted(code, console)),
            answered => answered.map(|_| ()),
        }
    }

    /// The same, of a model behind an endpoint.
    fn ask(
        &mut self,
        other: &Other,
        prompts: &[Prompt],
        arguments: &cli::WinRate,
        codec: &Codec,
        console: &Console,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let missing = self.missing(prompts);
        if missing.is_empty() {
            return Ok(());
        }
        interrupt.save_first();
        let (pace, budget) = (Pace::new(&other.calls), Budget::new(None, None, None));
        let caller = Caller { endpoint: &other.endpoint, pace: &pace, budget: &budget, interrupt };
        let decoding = &arguments.decoding;
        let extra = extra(decoding);
        let ended = {
            let bar = console.count_bar("answers of the endpoint", missing.len() as u64);
            let kept = Mutex::new(self);
            let jobs = missing.iter().collect();
            ask::all(jobs, other.calls.concurrency, interrupt, &|prompt: &Prompt, jitter, stopped| {
                let chat = Chat {
                    model: &other.model,
                    messages: &messages(prompt),
                    temperature: Some(decoding.temperature),
                    max_tokens: decoding.max_new_tokens,
                    seed: Some(decoding.seed),
                    form: None,
                    extra_body: &extra,
                };
                let response = caller.call(&chat, TRIES, jitter, stopped)?;
                let answered = answered(&response, codec);
                let answered = answered.ok_or_else(|| ask::End::Refused("its answer has no text".into()))?;
                locked(&kept).keep(prompt, &answered)?;
                bar.advance(1);
                Ok(())
            })
        };
        interrupt.saved();
        match ended {
            Ok(Ended::Done(0, _)) => Ok(()),
            Ok(Ended::Done(failures, why)) => Err(failed(AnswersError::NoAnswers {
                failed: failures,
                prompts: prompts.len(),
                model: other.model.clone(),
                why: why.unwrap_or_default(),
            })),
            Ok(Ended::Spent) => Err(Failure::Unfinished),
            Ok(Ended::Interrupted(code)) => Err(interrupted(code, console)),
            // another address, key or model has to be named
            Err(error @ AskError::Fatal { .. }) => Err(request(error)),
            Err(error) => Err(failed(error)),
        }
    }
}

/// What an endpoint is told.
fn messages(prompt: &Prompt) -> Vec<Message> {
    let message = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
    match &prompt.turns[..] {
        [] => vec![message("user", &prompt.text)],
        turns => turns.iter().map(|(role, content)| message(role, content)).collect(),
    }
}

/// What most endpoints take beside OpenAI's own, where it is asked for.
fn extra(decoding: &cli::Decoding) -> Map<String, Value> {
    let plain = Sampling::default();
    let given = [
        ("top_p", json!(decoding.top_p), decoding.top_p != plain.top_p),
        ("top_k", json!(decoding.top_k), decoding.top_k != 0),
        ("min_p", json!(decoding.min_p), decoding.min_p != plain.min_p),
        (
            "repetition_penalty",
            json!(decoding.repetition_penalty),
            decoding.repetition_penalty != plain.repetition_penalty,
        ),
        ("stop", json!(decoding.stop), !decoding.stop.is_empty()),
    ];
    given.into_iter().filter(|(.., given)| *given).map(|(name, value, _)| (name.to_owned(), value)).collect()
}

/// The answer of an endpoint; none where it says nothing and was not cut off before it could.
fn answered(response: &Value, codec: &Codec) -> Option<Answered> {
    let was_cut = response.pointer("/choices/0/finish_reason").and_then(Value::as_str) == Some("length");
    let end = if was_cut { End::Length } else { End::Stop };
    let answer = Answer { response };
    let text = answer.text().filter(|text| !text.trim().is_empty()).or(was_cut.then_some(""))?.to_owned();
    // not the endpoint's own count, which is another tokenizer's and has thoughts in it
    Some(Answered { tokens: tokens(codec, &text), text, ids: Vec::new(), end })
}

/// Tokens of an answer that others gave, as the policy's tokenizer counts them.
fn tokens(codec: &Codec, text: &str) -> usize {
    codec.tokenize(text, false).map_or(0, |ids| ids.len())
}

/// Whether what is said of an endpoint to compare with is said of one.
pub(super) fn check(arguments: &cli::WinRate) -> Result<(), Failure> {
    let cli::WinRate { against, against_model, against_key_env, .. } = arguments;
    let given = [("--against-model", against_model), ("--against-key-env", against_key_env)];
    match given.into_iter().find(|(_, given)| given.is_some()) {
        Some((name, _)) if !is_address(against) => Err(request(AnswersError::NoEndpoint(name, against.clone()))),
        _ => Ok(()),
    }
}

/// Whether it is an endpoint that answers.
pub(super) fn is_address(against: &str) -> bool {
    against.contains("://")
}

/// What adapters are called: the names of their folders, a run's where they are a run's.
pub(super) fn name_of(adapters: &[PathBuf]) -> String {
    let name = |path: &PathBuf| {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let named = match absolute.file_name() {
            Some(name) if name == "adapter" => absolute.parent().and_then(Path::file_name),
            name => name,
        };
        named.unwrap_or_default().to_string_lossy().into_owned()
    };
    adapters.iter().map(name).collect::<Vec<_>>().join(" + ")
}
