//! `dpo-lora serve`: base and policy for other programs, over HTTP.

use std::io::{self, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use miette::Diagnostic;
use thiserror::Error;

use super::trained::Trained;
use super::{Failure, answering, failed, of_stdout, request};
use crate::cli;
use crate::device;
use crate::interrupt::Interrupt;
use crate::model::Model;
use crate::model::generate::Generator;
use crate::ops::FEW;
use crate::progress::Console;
use crate::serve::{self, Key, Settings};

#[derive(Debug, Error, Diagnostic)]
enum CannotServe {
    #[error("cannot listen at {address}: {error}")]
    #[diagnostic(help("--port 0 takes any port that is free"))]
    Listen { address: String, error: io::Error },
    #[error("{0} can be reached from other machines, and no key is asked for")]
    #[diagnostic(help(
        "--key-env NAME names the environment variable with the key that clients send; --no-key serves whoever comes"
    ))]
    Open(String),
    #[error("--key-env: the environment variable {0} is not set, or empty")]
    #[diagnostic(help("name the variable, not the key: KEY=... dpo-lora serve RUN --key-env KEY"))]
    NoKey(String),
    #[error("base and policy are both called {0}")]
    #[diagnostic(help("--name or --base-name gives one of them another name"))]
    SameName(String),
    #[error("--context {asked} is more than the model's {longest} positions")]
    Context { asked: usize, longest: usize },
}

/// Serves base and policy until a signal asks to stop.
///
/// # Errors
/// See [`Failure`].
pub fn serve(arguments: &cli::Serve) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let key = key(arguments)?;
    // an address that is taken is no reason to load a model first
    let address = std::net::SocketAddr::new(arguments.host, arguments.port);
    let cannot = |error| request(CannotServe::Listen { address: address.to_string(), error });
    let listener = TcpListener::bind(address).map_err(cannot)?;
    let address = listener.local_addr().map_err(cannot)?;
    let trained = Trained::open(&arguments.trained, &console)?;
    let (base, policy) = names(arguments, &trained)?;
    let longest = trained.decoder.max_position_embeddings;
    let asked = arguments.context.map(|context| context as usize);
    if let Some(asked) = asked.filter(|&asked| asked > longest) {
        return Err(request(CannotServe::Context { asked, longest }));
    }
    let interrupt = Interrupt::listen().map_err(|error| failed(serve::ServeError::Io(error)))?;
    let (model, codec) = answering::load(&trained, arguments.device.device, &console)?;
    let (context, answers) = room(&model, asked, arguments.batch.map(|batch| batch as usize));
    let settings = Settings {
        base,
        policy,
        key,
        answers,
        context,
        max_tokens: arguments.max_tokens.map_or(context, |most| (most as usize).min(context)),
        queue: arguments.queue as usize,
        body: arguments.max_body.get(),
        timeout: Duration::from_secs(arguments.timeout.into()),
        grace: Duration::from_secs(arguments.grace.into()),
    };
    console.fact("models", format_args!("{} (base), {} (policy)", settings.base, settings.policy));
    console.fact("answers", format_args!("{answers} at once of each, of {context} tokens with their prompts"));
    console.fact("serving", format_args!("http://{address}/v1"));
    interrupt.save_first();
    let mut out = io::stdout();
    let written = writeln!(out, "http://{address}").and_then(|()| out.flush());
    written.map_err(of_stdout)?;
    serve::serve(&model, Arc::new(codec), Arc::new(console), listener, settings, interrupt).map_err(failed)
}

fn key(arguments: &cli::Serve) -> Result<Option<Key>, Failure> {
    match &arguments.key_env {
        Some(name) => match std::env::var(name) {
            Ok(secret) if !secret.trim().is_empty() => Ok(Some(Key::new(secret.trim()))),
            _ => Err(request(CannotServe::NoKey(name.clone()))),
        },
        None if arguments.no_key || arguments.host.is_loopback() => Ok(None),
        None => Err(request(CannotServe::Open(arguments.host.to_string()))),
    }
}

/// What clients call base and policy: the ends of their paths, a name on the hub whole.
fn names(arguments: &cli::Serve, trained: &Trained) -> Result<(String, String), Failure> {
    let end = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let base = match &arguments.base_name {
        Some(name) => name.clone(),
        None if trained.model.source.is_absolute() => end(&trained.model.source).unwrap_or_else(|| "base".into()),
        None => trained.base_name(),
    };
    let policy = match (&arguments.name, &trained.run) {
        (Some(name), _) => name.clone(),
        // RUN/checkpoints/step-000100 is another policy than RUN
        (None, Some(run)) if trained.folder.parent().is_some_and(|parent| parent.ends_with("checkpoints")) => {
            [end(run), end(&trained.folder)].into_iter().flatten().collect::<Vec<_>>().join("-")
        }
        (None, Some(run)) => end(run).unwrap_or_else(|| "policy".into()),
        (None, None) => end(&trained.folder).unwrap_or_else(|| "policy".into()),
    };
    if base == policy { Err(request(CannotServe::SameName(base))) } else { Ok((base, policy)) }
}

/// Tokens of an answer with its prompt, and answers at once of each side, that half of the free memory has room for.
fn room(model: &Model, context: Option<usize>, answers: Option<usize>) -> (usize, usize) {
    /// A conversation of some turns; fewer answers at once rather than less.
    const ENOUGH: usize = 4096;
    let memory = device::available_memory(model.decoder().device()).map_or(usize::MAX, |bytes| bytes / 2);
    let longest = model.decoder().config().max_position_embeddings;
    let fit = |context: usize| memory / (2 * Generator::slot_bytes(model, context)).max(1);
    let context = context.unwrap_or_else(|| {
        let mut context = longest;
        while context > ENOUGH && fit(context) < FEW {
            context /= 2;
        }
        context.max(ENOUGH.min(longest))
    });
    (context, answers.unwrap_or_else(|| fit(context).clamp(1, FEW)))
}
