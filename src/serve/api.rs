//! Routes, who may use them, and what each of them does.

use std::fmt::Display;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::body::{Body as _, Frame};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::engine::{Asked, Event, Job, TokenLogprob, Work};
use super::error::ApiError;
use super::reply::{Choice, Entry, Head, Kind, Stream, Used, json};
use super::request::{self, Chat, Common, Completions, MOST_ANSWERS, MOST_PROMPTS, Text, Tokenize};
use super::{Settings, any_seed};
use crate::data::{Answer, Codec, DataError};
use crate::machine::is_this_machine;
use crate::model::Adapter;
use crate::model::generate::{End, Request as Continuation};
use crate::progress::Console;

/// The most log-probabilities that one request gets, so that its answer is some tens of megabytes and not gigabytes.
const MOST_LOGPROBS: usize = 1_000_000;
/// Tokens of a completion that names no number, as in OpenAI's API.
const COMPLETION_TOKENS: usize = 16;
/// How long what is left of a refused request is read, so that the client reads the refusal.
const DRAIN: Duration = Duration::from_secs(1);

/// What all requests share.
#[derive(Debug)]
pub(super) struct App {
    pub(super) settings: Settings,
    pub(super) codec: Arc<Codec>,
    pub(super) console: Arc<Console>,
    pub(super) jobs: Sender<Job>,
    /// Tells the engine to end what there is.
    pub(super) stop: Arc<AtomicBool>,
    /// Nothing new is begun.
    pub(super) stopping: AtomicBool,
    /// One for each request that may be answered or wait.
    pub(super) places: Arc<Semaphore>,
    pub(super) vocabulary: usize,
    pub(super) created: u64,
    /// Whether only this machine can connect.
    pub(super) is_local: bool,
    /// Requests that were answered.
    pub(super) ended: AtomicUsize,
}

pub(super) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/tokenizer_info", get(tokenizer_info))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .fallback(nowhere)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

/// Who may ask, and the log.
async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let mut line = Line::new(&app, &request);
    let mut response = match admitted(&app, request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refused) => {
            drain(request.into_body()).await;
            refused.into_response()
        }
    };
    line.used = response.extensions_mut().remove::<Arc<Used>>();
    line.status = Some(response.status());
    line.sent = response.body().is_end_stream();
    response.map(|body| Body::new(Logged { body, line }))
}

fn admitted(app: &App, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
    if app.is_local {
        // a web page whose name was made to mean this machine still sends that name
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).or(uri.host()).unwrap_or_default();
        if !is_this_machine(host) {
            let message = "this server answers to localhost only; the Host header names something else";
            return Err(ApiError::request(message).with(StatusCode::FORBIDDEN, "wrong_host"));
        }
    }
    if uri.path() == "/health" {
        return Ok(());
    }
    let Some(key) = &app.settings.key else { return Ok(()) };
    let sent = headers.get(header::AUTHORIZATION).ok_or_else(ApiError::no_key)?;
    let sent = sent
        .to_str()
        .ok()
        .and_then(|sent| sent.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    match sent {
        Some((_, sent)) if key.is(sent.trim()) => Ok(()),
        Some(_) => Err(ApiError::wrong_key()),
        None => Err(ApiError::no_key()),
    }
}

async fn health(State(app): State<Arc<App>>) -> Response {
    if app.stopping.load(Ordering::Relaxed) {
        return ApiError::stopping().into_response();
    }
    json(StatusCode::OK, &json!({"status": "ok", "answered": app.ended.load(Ordering::Relaxed)}))
}

impl App {
    fn names(&self) -> [(&str, Adapter); 2] {
        [(&self.settings.base, Adapter::Off), (&self.settings.policy, Adapter::On)]
    }

    fn model(&self, name: &str) -> Result<Adapter, ApiError> {
        let found = self.names().into_iter().find(|(known, _)| *known == name);
        found.map(|(_, side)| side).ok_or_else(|| {
            let shown: String = name.chars().take(80).collect();
            let Settings { base, policy, .. } = &self.settings;
            let message =
                format!("there is no model {shown:?} here; there are {base:?} (base) and {policy:?} (policy)");
            ApiError::param("model", message).with(StatusCode::NOT_FOUND, "model_not_found")
        })
    }

    fn described(&self, name: &str, side: Adapter) -> Value {
        let parent = (side != Adapter::Off).then_some(&self.settings.base);
        json!({"id": name, "object": "model", "created": self.created, "owned_by": "dpo-lora", "parent": parent,
            "max_model_len": self.settings.context})
    }

    /// A request's JSON.
    async fn body(&self, request: Request) -> Result<Vec<u8>, ApiError> {
        let too_large = || {
            let message = format!("a request has at most {} bytes here", self.settings.body);
            ApiError::request(message).with(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large")
        };
        // a page of another site can send a form without being asked, but no JSON
        let kind =
            request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let is_json = kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
        let length = request.body().size_hint().lower();
        let mut body = request.into_body();
        if !is_json {
            drain(body).await;
            let message = "the Content-Type of a request is application/json";
            return Err(ApiError::request(message).with(StatusCode::UNSUPPORTED_MEDIA_TYPE, "wrong_content_type"));
        }
        if length > self.settings.body as u64 {
            drain(body).await;
            return Err(too_large());
        }
        let read = async {
            let mut bytes = Vec::new();
            while let Some(frame) = next_frame(&mut body).await {
                let frame = frame.map_err(|_| ApiError::request("the request ends before its body does"))?;
                if let Ok(data) = frame.into_data() {
                    if bytes.len() + data.len() > self.settings.body {
                        return Err(too_large());
                    }
                    bytes.extend_from_slice(&data);
                }
            }
            Ok(bytes)
        };
        let read = timeout(self.settings.timeout, read).await;
        let read = read.unwrap_or_else(|_| {
            let message = format!("the request did not come within {} s", self.settings.timeout.as_secs());
            Err(ApiError::request(message).with(StatusCode::REQUEST_TIMEOUT, "request_timeout"))
        });
        if read.as_ref().is_err_and(|error| error.status == StatusCode::PAYLOAD_TOO_LARGE) {
            drain(body).await;
        }
        read
    }

    /// A place among the requests that are answered or wait.
    fn place(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::stopping());
        }
        self.places.clone().try_acquire_owned().map_err(|_| ApiError::busy(self.settings.queue))
    }

    fn send(&self, side: Adapter, work: Work) -> UnboundedReceiver<Event> {
        let (to, events) = unbounded_channel();
        // where the engine is gone, the channel is closed, and that is what is seen
        _ = self.jobs.send(Job { side, work, to });
        events
    }

    fn in_vocabulary(&self, ids: &[u32], param: &str) -> Result<(), ApiError> {
        match ids.iter().find(|&&id| id as usize >= self.vocabulary) {
            Some(id) => {
                let problem = format!("token {id} is outside the model's vocabulary of {}", self.vocabulary);
                Err(ApiError::param(param, problem))
            }
            None => Ok(()),
        }
    }

    /// Refuses an answer of `wanted` tokens that has no room after so many of the prompt.
    fn room(&self, param: &str, prompt: usize, wanted: usize) -> Result<(), ApiError> {
        let Settings { context, max_tokens, .. } = self.settings;
        if wanted > max_tokens {
            return Err(ApiError::param("max_tokens", format!("an answer has at most {max_tokens} tokens here")));
        }
        if prompt + wanted > context {
            let message = format!(
                "the model's context is {context} tokens here; these are {}: {prompt} of {param} and {wanted} of the \
                 answer",
                prompt + wanted
            );
            let error = ApiError::param(param, message);
            return Err(error.with(StatusCode::BAD_REQUEST, "context_length_exceeded"));
        }
        Ok(())
    }
}

/// Work that takes a processor for a while.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::failed())
}

async fn next_frame(body: &mut Body) -> Option<Result<Frame<Bytes>, axum::Error>> {
    poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await
}

/// Reads what a client still sends: one that is answered while it writes might never see the answer.
async fn drain(mut body: Body) {
    let all = async { while let Some(Ok(_)) = next_frame(&mut body).await {} };
    _ = timeout(DRAIN, all).await;
}

async fn nowhere(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(80).collect();
    let known =
        "/v1/models, /v1/completions, /v1/chat/completions, /tokenize, /detokenize, /tokenizer_info and /health";
    ApiError::request(format!("there is nothing at {path}; there are {known}"))
        .with(StatusCode::NOT_FOUND, "unknown_url")
}

async fn wrong_method(method: Method) -> ApiError {
    ApiError::request(format!("{method} is not for this path"))
        .with(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed")
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let data: Vec<Value> = app.names().into_iter().map(|(name, side)| app.described(name, side)).collect();
    json(StatusCode::OK, &json!({"object": "list", "data": data}))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let side = app.model(&id)?;
    Ok(json(StatusCode::OK, &app.described(&id, side)))
}

async fn tokenizer_info(State(app): State<Arc<App>>) -> Response {
    let mut info = Map::new();
    info.extend(app.codec.named_tokens().map(|(name, token)| (name.to_owned(), json!(token))));
    info.insert("chat_template".into(), json!(app.codec.chat_template()));
    info.insert("max_model_len".into(), json!(app.settings.context));
    json(StatusCode::OK, &Value::Object(info))
}

async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let Tokenize { text, special } = Tokenize::read(&app.body(request).await?)?;
    let _place = app.place()?;
    let codec = app.codec.clone();
    let ids = aside(move || match text {
        Ok(text) => codec.tokenize(&text, special).map_err(|error| of_text("prompt", &error)),
        Err(messages) => codec.chat(&messages).map(|prompt| prompt.ids).map_err(|error| of_text("messages", &error)),
    });
    let ids = ids.await??;
    Ok(json(StatusCode::OK, &json!({"tokens": ids, "count": ids.len(), "max_model_len": app.settings.context})))
}

async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let ids = request::detokenize(&app.body(request).await?)?;
    app.in_vocabulary(&ids, "tokens")?;
    let _place = app.place()?;
    let codec = app.codec.clone();
    let text = aside(move || codec.decode(&ids)).await?;
    Ok(json(StatusCode::OK, &json!({"prompt": text})))
}

fn of_text(param: &str, error: &impl Display) -> ApiError {
    ApiError::param(param, error.to_string())
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let Completions { model, prompts, echo, logprobs, common } = Completions::read(&app.body(request).await?)?;
    let side = app.model(&model)?;
    let place = app.place()?;
    let codec = app.codec.clone();
    let wanted = common.max_tokens.unwrap_or(COMPLETION_TOKENS.min(app.settings.max_tokens));
    if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
        return Err(ApiError::param("prompt", format!("a request has from 1 to {MOST_PROMPTS} prompts")));
    }
    let read = aside(move || {
        let one = |text| {
            let ids = match text {
                Text::Ids(ids) => ids,
                Text::Words(text) => codec.tokenize(&text, true).map_err(|error| of_text("prompt", &error))?,
            };
            let choice = Choice { text: if echo { codec.decode(&ids) } else { String::new() }, ..Choice::default() };
            Ok((ids, choice))
        };
        prompts.into_iter().map(one).collect::<Result<(Vec<_>, Vec<_>), ApiError>>()
    });
    let (prompts, mut choices) = read.await??;
    for ids in &prompts {
        if ids.is_empty() {
            return Err(ApiError::param("prompt", "a prompt has no tokens, and nothing could come after it"));
        }
        app.in_vocabulary(ids, "prompt")?;
    }
    if wanted == 0 && !echo {
        return Err(ApiError::param("max_tokens", "max_tokens is 0, and without echo there is nothing to tell"));
    }
    let is_greedy = common.sampling.temperature == 0.0 && common.sampling.repetition_penalty == 1.0;
    // the scores of a prompt tell what would be next
    let is_scored = echo && logprobs.is_some();
    let scores_only = is_scored && (wanted == 0 || wanted == 1 && is_greedy) && common.stop.is_empty();
    for ids in &prompts {
        app.room("prompt", ids.len(), if scores_only || wanted == 0 { 0 } else { wanted })?;
    }
    let scored: usize = if is_scored { prompts.iter().map(Vec::len).sum() } else { 0 };
    few_logprobs(logprobs, scored.saturating_mul(common.n), prompts.len().saturating_mul(common.n), wanted)?;
    if !scores_only && prompts.len() * common.n > MOST_ANSWERS {
        return Err(ApiError::param("n", format!("a request has at most {MOST_ANSWERS} answers")));
    }
    let used = Arc::new(Used { model, prompt: prompts.iter().map(Vec::len).sum(), ..Used::default() });
    let mut next = vec![None; prompts.len()];
    if let (true, Some(top)) = (is_scored, logprobs) {
        let mut events = app.send(side, Work::Scores { prompts: prompts.clone(), top });
        for _ in 0..prompts.len() {
            match events.recv().await {
                Some(Event::Scored(scored)) => {
                    let first = Entry { id: prompts[scored.prompt][0], logp: None, top: Vec::new() };
                    let rest = scored.tokens.into_iter().map(Entry::from);
                    let choice = &mut choices[scored.prompt];
                    choice.tokens = std::iter::once(first).chain(rest).collect();
                    choice.echoed = choice.tokens.len();
                    next[scored.prompt] = Some(scored.next);
                }
                Some(Event::Failed) => return Err(ApiError::failed()),
                _ => return Err(ApiError::stopping()),
            }
        }
    }
    // one after the other for each prompt
    let samples: Vec<u64> = (0..common.n as u64).collect();
    let mut choices: Vec<Choice> = choices.into_iter().flat_map(|choice| vec![choice; common.n]).collect();
    let mut answers = Vec::new();
    if wanted == 0 {
        choices.iter_mut().for_each(|choice| choice.end = Some(End::Length));
    } else if scores_only {
        for (i, choice) in choices.iter_mut().enumerate() {
            let prompt = i / common.n;
            if let Some(next) = &next[prompt] {
                take_next(choice, next.clone(), &app.codec, &prompts[prompt], &used);
            }
        }
    } else {
        for ids in prompts {
            answers.extend(samples.iter().map(|&sample| asked(&app, &ids, wanted, &common, sample, logprobs, true)));
        }
    }
    let head = Head::new(Kind::Completion, used, app.codec.clone(), logprobs.is_some(), common.include_usage);
    reply(&app, side, answers, choices, head, common.stream, place).await
}

/// Tokens that each of so many answers has with as many log-probabilities as there may be.
fn told(logprobs: Option<usize>, answers: usize) -> usize {
    logprobs.map_or(usize::MAX, |top| MOST_LOGPROBS / ((top + 1) * answers))
}

/// Refuses what asks for too many log-probabilities: of so many tokens of prompts, and of answers with so many each.
fn few_logprobs(logprobs: Option<usize>, prompts: usize, answers: usize, tokens: usize) -> Result<(), ApiError> {
    let Some(top) = logprobs else { return Ok(()) };
    let asked = answers.saturating_mul(tokens).saturating_add(prompts).saturating_mul(top + 1);
    if asked <= MOST_LOGPROBS {
        return Ok(());
    }
    let problem = format!("these are up to {asked} log-probabilities; a request gets at most {MOST_LOGPROBS}");
    Err(ApiError::param("logprobs", problem))
}

/// Ends a choice with the token that is most probable after its prompt.
fn take_next(choice: &mut Choice, next: TokenLogprob, codec: &Codec, prompt: &[u32], used: &Used) {
    let stops = codec.stop_tokens().contains(&next.id);
    if !stops {
        let mut answer = Answer::after(codec, &[][..], prompt);
        answer.push(next.id);
        choice.text.push_str(answer.text());
        used.answers.fetch_add(1, Ordering::Relaxed);
    }
    choice.tokens.push(next.into());
    choice.end = Some(if stops { End::Stop } else { End::Length });
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let Chat { model, messages, logprobs, common } = Chat::read(&app.body(request).await?)?;
    let side = app.model(&model)?;
    let place = app.place()?;
    if app.codec.chat_template().is_none() {
        let message = "the model has no chat template; /v1/completions continues a text";
        return Err(ApiError::param("messages", message).with(StatusCode::BAD_REQUEST, "no_chat_template"));
    }
    let codec = app.codec.clone();
    let prompt = aside(move || codec.chat(&messages).map_err(|error: DataError| of_text("messages", &error)));
    let ids = prompt.await??.ids;
    app.in_vocabulary(&ids, "messages")?;
    let all = app.settings.context.saturating_sub(ids.len()).clamp(1, app.settings.max_tokens);
    let wanted = common.max_tokens.unwrap_or(all.min(told(logprobs, common.n)));
    if wanted == 0 {
        return Err(ApiError::param("max_tokens", "an answer has at least one token"));
    }
    app.room("messages", ids.len(), wanted)?;
    few_logprobs(logprobs, 0, common.n, wanted)?;
    let used = Arc::new(Used { model, prompt: ids.len(), ..Used::default() });
    let answers =
        (0..common.n as u64).map(|sample| asked(&app, &ids, wanted, &common, sample, logprobs, false)).collect();
    let choices = vec![Choice::default(); common.n];
    let head = Head::new(Kind::Chat, used, app.codec.clone(), logprobs.is_some(), common.include_usage);
    reply(&app, side, answers, choices, head, common.stream, place).await
}

fn asked(
    app: &App,
    ids: &[u32],
    max_new_tokens: usize,
    common: &Common,
    sample: u64,
    logprobs: Option<usize>,
    continues: bool,
) -> Asked {
    let seed = Continuation::seed(common.seed.unwrap_or_else(any_seed), sample, ids);
    let request = Continuation {
        prompt: ids.to_vec(),
        stop_tokens: app.codec.stop_tokens().to_vec(),
        max_new_tokens,
        sampling: common.sampling,
        seed,
    };
    Asked { request, stops: common.stop.clone(), continues, logprobs }
}

/// Has answers made, and sends them whole or as they come.
async fn reply(
    app: &App,
    side: Adapter,
    answers: Vec<Asked>,
    mut choices: Vec<Choice>,
    head: Head,
    stream: bool,
    place: OwnedSemaphorePermit,
) -> Result<Response, ApiError> {
    let mut left = answers.len();
    let mut events = app.send(side, Work::Answers(answers));
    let used = head.used.clone();
    let mut response = if stream {
        Stream::new(head, events, &choices, place).response()
    } else {
        while left > 0 {
            let event = events.recv().await.unwrap_or(Event::Stopped);
            left -= usize::from(matches!(event, Event::End { .. }));
            let answer = match &event {
                Event::Part { answer, .. } | Event::End { answer, .. } => *answer,
                _ => 0,
            };
            choices[answer].take(event, &used)?;
        }
        if head.logprobs { aside(move || head.whole(&choices)).await? } else { head.whole(&choices) }
    };
    app.ended.fetch_add(1, Ordering::Relaxed);
    response.extensions_mut().insert(used);
    Ok(response)
}

/// A line of the log, written when the answer was sent or the client is gone. Nothing of what was asked or answered is in
/// it.
struct Line {
    app: Arc<App>,
    method: Method,
    path: String,
    begun: Instant,
    status: Option<StatusCode>,
    used: Option<Arc<Used>>,
    sent: bool,
}

impl Line {
    fn new(app: &Arc<App>, request: &Request) -> Self {
        /// A path that is none of ours may have anything in it.
        const LONGEST: usize = 48;
        let path: String = request.uri().path().chars().take(LONGEST).flat_map(char::escape_default).collect();
        let (app, method) = (app.clone(), request.method().clone());
        Self { app, method, path, begun: Instant::now(), status: None, used: None, sent: false }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let ms = self.begun.elapsed().as_millis();
        let (method, path) = (&self.method, &self.path);
        let status = match self.status {
            Some(status) if self.sent => status.as_u16().to_string(),
            _ => "gone".to_owned(),
        };
        let tokens = self
            .used
            .as_ref()
            .map(|used| format!("  {}  {}+{} tokens", used.model, used.prompt, used.answers.load(Ordering::Relaxed)));
        self.app.console.line(format_args!("{status:>4}  {method} {path}{}  {ms} ms", tokens.unwrap_or_default()));
    }
}

/// A body whose end is logged.
struct Logged {
    body: Body,
    line: Line,
}

impl hyper::body::Body for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(None)) || self.body.is_end_stream() {
            self.line.sent = true;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_no_given_length_have_as_many_log_probabilities_as_there_may_be() {
        assert_eq!(told(None, MOST_ANSWERS), usize::MAX);
        for (top, answers) in [(0, 1), (20, 1), (3, 7), (20, MOST_ANSWERS)] {
            let tokens = told(Some(top), answers);
            assert!(tokens > 100 && few_logprobs(Some(top), 0, answers, tokens).is_ok(), "{top} {answers}");
            assert!(few_logprobs(Some(top), 0, answers, tokens + 1).is_err(), "{top} {answers}");
        }
    }
}
