//! `dpo-lora generate`: answers of policy and base, one after the other or side by side.

use std::io::{self, BufRead, IsTerminal, Write};

use miette::Diagnostic;
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::answering::{self, Answered, Answering};
use super::trained::Trained;
use super::{Failure, of_stdout, request};
use crate::cli::{self, Side};
use crate::data::{Codec, Columns, Prompt, Sources, load_prompts};
use crate::model::Adapter;
use crate::progress::Console;

#[derive(Debug, Error, Diagnostic)]
enum GenerateError {
    #[error("there is no prompt")]
    #[diagnostic(help("--prompt TEXT, --prompts FILE, or a prompt a line on standard input"))]
    NoPrompt,
    #[error("standard input cannot be read: {0}")]
    Input(io::Error),
}

/// Writes answers to stdout.
///
/// # Errors
/// See [`Failure`].
pub fn generate(arguments: &cli::Generate) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    if arguments.prompt.is_empty() && arguments.prompts.is_none() && io::stdin().is_terminal() {
        return Err(request(GenerateError::NoPrompt));
    }
    let trained = Trained::open(&arguments.trained, &console)?;
    let codec = trained.codec()?;
    let prompts = prompts(arguments, &codec, &console)?;
    let model = trained.load(None, &answering::choose(arguments.device.device, &console)?, &console)?;
    let answering = Answering { model: &model, codec: &codec, decoding: &arguments.decoding, batch: arguments.batch };
    let sides = arguments.side.adapters();
    let mut out = io::stdout().lock();
    if let ([prompt], false) = (&prompts[..], arguments.json) {
        for &side in sides {
            if sides.len() > 1 {
                writeln!(out, "{}", name(side)).map_err(of_stdout)?;
            }
            answering.one(prompt, side, |text| out.write_all(text.as_bytes()).and_then(|()| out.flush()))?;
            writeln!(out).map_err(of_stdout)?;
        }
        return Ok(());
    }
    // those of the first side wait for those of the second; a single side is written as far as it is in order
    let mut answers: Vec<Vec<Option<Answered>>> = vec![vec![None; prompts.len()]; sides.len()];
    let mut written = 0;
    for (number, &side) in sides.iter().enumerate() {
        let last = number + 1 == sides.len();
        answering.all(&prompts, side, &console, |prompt, answered| {
            answers[number][prompt] = Some(answered.clone());
            while last && written < prompts.len() && answers.iter().all(|side| side[written].is_some()) {
                let of = sides.iter().zip(answers.iter().filter_map(|side| side[written].as_ref()));
                write(&mut out, &prompts[written], of, arguments.json)?;
                written += 1;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn prompts(arguments: &cli::Generate, codec: &Codec, console: &Console) -> Result<Vec<Prompt>, Failure> {
    let mut prompts = Vec::new();
    for text in &arguments.prompt {
        prompts.push(codec.ask(text, arguments.plain).map_err(request)?);
    }
    match &arguments.prompts {
        Some(file) if file.as_os_str() != "-" => {
            let rows = load_prompts(&Sources::one(file), &Columns::default(), codec, arguments.plain, console);
            prompts.extend(rows.map_err(request)?);
        }
        None if !prompts.is_empty() => {}
        _ => {
            for line in io::stdin().lock().lines() {
                let line = line.map_err(|e| request(GenerateError::Input(e)))?;
                if !line.trim().is_empty() {
                    prompts.push(codec.ask(&line, arguments.plain).map_err(request)?);
                }
            }
        }
    }
    if let Some(limit) = arguments.limit {
        prompts.truncate(limit as usize);
    }
    if prompts.is_empty() { Err(request(GenerateError::NoPrompt)) } else { Ok(prompts) }
}

fn write<'a>(
    out: &mut impl Write,
    prompt: &Prompt,
    answers: impl Iterator<Item = (&'a Adapter, &'a Answered)>,
    json: bool,
) -> Result<(), Failure> {
    if json {
        let mut row = Map::new();
        row.extend(prompt.id.as_ref().map(|id| ("id".to_owned(), json!(id))));
        row.insert("prompt".into(), json!(prompt.text));
        row.extend(answers.map(|(side, answered)| (name(*side).to_owned(), json!(answered))));
        return writeln!(out, "{}", Value::Object(row)).map_err(of_stdout);
    }
    writeln!(out, "prompt   {}", prompt.text).map_err(of_stdout)?;
    for (side, answered) in answers {
        writeln!(out, "{:<9}{}", name(*side), answered.text).map_err(of_stdout)?;
    }
    writeln!(out).map_err(of_stdout)
}

pub(super) fn name(side: Adapter) -> &'static str {
    if side == Adapter::Off { "base" } else { "policy" }
}

impl Side {
    fn adapters(self) -> &'static [Adapter] {
        match self {
            Self::Policy => &[Adapter::On],
            Self::Base => &[Adapter::Off],
            Self::Both => &[Adapter::Off, Adapter::On],
        }
    }
}
