//! `dpo-lora chat`: a conversation, with the adapter on or off.

use std::io::{self, BufRead, IsTerminal, Write};

use super::answering::{self, Answering};
use super::generate::name;
use super::trained::Trained;
use super::{Failure, of_stdout};
use crate::cli;
use crate::model::Adapter;
use crate::progress::Console;

const HELP: &str = "/base, /policy and /both say who answers from here on; /again asks the last question once more; /reset \
                    forgets the conversation; /quit or Ctrl-D ends it";

/// Talks to the policy, or to the base, on one copy of the weights.
///
/// # Errors
/// See [`Failure`].
pub fn chat(arguments: &cli::Chat) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let trained = Trained::open(&arguments.trained, &console)?;
    let (model, codec) = answering::load(&trained, arguments.device.device, &console)?;
    let answering = Answering { model: &model, codec: &codec, decoding: &arguments.decoding, batch: None };
    console.line(format_args!("\n{HELP}"));
    let system: Vec<(String, String)> = arguments.system.iter().map(|text| ("system".into(), text.clone())).collect();
    let (mut turns, mut sides) = (system.clone(), vec![Adapter::On]);
    let mut input = io::stdin().lock();
    let shows_prompt = io::stdin().is_terminal();
    loop {
        let mut out = io::stdout().lock();
        if shows_prompt {
            let who: Vec<&str> = sides.iter().map(|side| name(*side)).collect();
            write!(out, "\n{}> ", who.join("+")).and_then(|()| out.flush()).map_err(of_stdout)?;
        }
        let mut line = String::new();
        let read = input.read_line(&mut line).map_err(|e| Failure::Failed(miette::miette!("cannot read: {e}")))?;
        if read == 0 {
            return Ok(());
        }
        let line = line.trim();
        match line {
            "" => continue,
            "/quit" | "/exit" => return Ok(()),
            "/base" => sides = vec![Adapter::Off],
            "/policy" => sides = vec![Adapter::On],
            "/both" => sides = vec![Adapter::Off, Adapter::On],
            "/reset" => turns.clone_from(&system),
            "/again" => {
                if turns.last().is_some_and(|(role, _)| role == "assistant") {
                    turns.pop();
                }
            }
            command if command.starts_with('/') => {
                console.line(HELP);
                continue;
            }
            text => turns.push(("user".into(), text.into())),
        }
        if line.starts_with('/') && line != "/again" || turns.last().is_none_or(|(role, _)| role != "user") {
            continue;
        }
        let prompt = match codec.chat_template() {
            Some(_) => codec.chat(&turns),
            // a model without turns continues what was said last
            None => codec.ask(&turns[turns.len() - 1].1, true),
        };
        let prompt = match prompt {
            Ok(prompt) => prompt,
            Err(error) => {
                console.error(format_args!("error: {error}"));
                turns.pop();
                continue;
            }
        };
        let mut answer = String::new();
        for &side in &sides {
            if sides.len() > 1 {
                writeln!(out, "{}:", name(side)).map_err(of_stdout)?;
            }
            let answered =
                answering.one(&prompt, side, |text| out.write_all(text.as_bytes()).and_then(|()| out.flush()));
            match answered {
                Ok(answered) => answer = answered.text,
                Err(Failure::Request(report)) => {
                    console.error(format_args!("{report:?}"));
                    turns.pop();
                    break;
                }
                Err(other) => return Err(other),
            }
            writeln!(out).map_err(of_stdout)?;
        }
        // of two answers the conversation goes on with the last, the policy's
        if turns.last().is_some_and(|(role, _)| role == "user") {
            turns.push(("assistant".into(), answer));
        }
    }
}
