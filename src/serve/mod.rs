//! An OpenAI-style server: base and policy as two models, on one copy of the weights.
//!
//! One thread serves connections (`http`), one computes (`engine`); between them are channels, and nothing else is
//! shared but the tokenizer. Answers of one side are generated together as they come, each to the bit as if alone.

mod api;
mod connection;
mod engine;
mod error;
mod reply;
mod request;
mod score;

use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{io, thread};

use miette::Diagnostic;
use thiserror::Error;

use crate::data::Codec;
use crate::interrupt::Interrupt;
use crate::model::Model;
use crate::progress::Console;

/// How a model is served.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What clients call the base.
    pub base: String,
    /// What clients call the policy.
    pub policy: String,
    /// What clients have to send.
    pub key: Option<Key>,
    /// Answers that are generated at once, of each side.
    pub answers: usize,
    /// The most tokens of prompt and answer together.
    pub context: usize,
    /// The most tokens of an answer.
    pub max_tokens: usize,
    /// Requests that may be answered or wait at once.
    pub queue: usize,
    /// The most bytes of a request.
    pub body: usize,
    /// How long a client may take to send a request, or to read any part of an answer.
    pub timeout: Duration,
    /// How long answers may take when the server is asked to stop.
    pub grace: Duration,
}

/// A secret that clients send. Only its hash is kept.
#[derive(Clone)]
pub struct Key(blake3::Hash);

impl Key {
    /// Of the secret itself.
    #[must_use]
    pub fn new(secret: &str) -> Self {
        Self(blake3::hash(secret.as_bytes()))
    }

    /// Takes as long whatever `sent` is: hashes are compared, and in constant time.
    fn is(&self, sent: &str) -> bool {
        self.0 == blake3::hash(sent.as_bytes())
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

/// Why serving ended otherwise than by being asked to.
#[derive(Debug, Error, Diagnostic)]
pub enum ServeError {
    /// The system gives no thread or no socket.
    #[error("cannot serve: {0}")]
    Io(#[from] io::Error),
    /// Keys and values of the answers do not fit.
    #[error("there is no memory for {answers} answers of {context} tokens: {error}")]
    #[diagnostic(help("--context and --batch make it less"))]
    Memory {
        /// Answers at once.
        answers: usize,
        /// Tokens of each.
        context: usize,
        /// What candle says.
        error: candle_core::Error,
    },
}

/// Serves until a signal asks to stop.
///
/// # Errors
/// The system's, or there is no memory for the settings.
pub fn serve(
    model: &Model,
    codec: Arc<Codec>,
    console: Arc<Console>,
    listener: TcpListener,
    settings: Settings,
    interrupt: Interrupt,
) -> Result<(), ServeError> {
    let (answers, context) = (settings.answers, settings.context);
    let mut engine = engine::Engine::new(model, &codec, &console, answers, context)
        .map_err(|error| ServeError::Memory { answers, context, error })?;
    let (jobs, received) = mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let app = Arc::new(api::App {
        codec: codec.clone(),
        console: console.clone(),
        jobs,
        stop: stop.clone(),
        stopping: AtomicBool::new(false),
        places: Arc::new(tokio::sync::Semaphore::new(settings.queue)),
        vocabulary: model.decoder().config().vocab_size,
        created: reply::now(),
        is_local: listener.local_addr()?.ip().is_loopback(),
        ended: AtomicUsize::new(0),
        settings,
    });
    let http = thread::Builder::new().name("http".into()).spawn(move || {
        // the tokenizer and the chat template take their time, on threads of their own
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build()?;
        runtime.block_on(connection::accept(app, listener, &interrupt))
    })?;
    engine.run(&received, &stop);
    match http.join() {
        Ok(ended) => Ok(ended?),
        Err(_) => Err(io::Error::other("the thread that serves connections has failed").into()),
    }
}

/// A number that nobody can guess.
fn any_seed() -> u64 {
    // the standard library's hash keys are random
    RandomState::new().hash_one(0)
}
