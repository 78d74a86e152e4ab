//! Replies in OpenAI's form: whole, and as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use hyper::body::Frame;
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedReceiver;

use super::engine::{Event, TokenLogprob};
use super::error::ApiError;
use crate::data::Codec;
use crate::model::generate::End;

/// A JSON response.
pub(super) fn json(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Which of OpenAI's two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Completion,
    Chat,
}

/// Tokens that a request took and gave, for `usage` and the log.
#[derive(Debug, Default)]
pub(super) struct Used {
    pub(super) model: String,
    pub(super) prompt: usize,
    pub(super) answers: AtomicUsize,
}

impl Used {
    fn usage(&self) -> Value {
        let (prompt, answers) = (self.prompt, self.answers.load(Ordering::Relaxed));
        json!({"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers})
    }
}

/// What all parts of a reply have.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) kind: Kind,
    id: String,
    created: u64,
    pub(super) used: Arc<Used>,
    pub(super) codec: Arc<Codec>,
    pub(super) logprobs: bool,
    pub(super) include_usage: bool,
}

impl Head {
    pub(super) fn new(kind: Kind, used: Arc<Used>, codec: Arc<Codec>, logprobs: bool, include_usage: bool) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:016x}{:016x}", super::any_seed(), super::any_seed());
        Self { kind, id, created: now(), used, codec, logprobs, include_usage }
    }

    fn object(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let object = json!({"id": self.id, "object": object, "created": self.created, "model": self.used.model,
            "choices": choices});
        match object {
            Value::Object(object) => object,
            _ => Map::new(),
        }
    }

    /// The whole reply.
    pub(super) fn whole(&self, choices: &[Choice]) -> Response {
        let choices = choices.iter().enumerate().map(|(index, choice)| {
            let end = choice.end.map(finish_reason);
            let logprobs = self.logprobs(&choice.text, &choice.tokens, &mut 0);
            match self.kind {
                Kind::Completion => {
                    json!({"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": end})
                }
                Kind::Chat => json!({"index": index, "message": {"role": "assistant", "content": choice.text,
                    "refusal": null}, "logprobs": logprobs, "finish_reason": end}),
            }
        });
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        let mut body = self.object(object, choices.collect());
        body.insert("usage".into(), self.used.usage());
        json(StatusCode::OK, &Value::Object(body))
    }

    /// What an event of a stream has.
    fn part_object(&self, choices: Vec<Value>) -> Map<String, Value> {
        self.object(if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" }, choices)
    }

    fn chunk(&self, choice: Value) -> Bytes {
        let mut body = self.part_object(vec![choice]);
        if self.include_usage {
            body.insert("usage".into(), Value::Null);
        }
        event(&Value::Object(body))
    }

    /// `offset` counts the characters before.
    fn part(&self, index: usize, text: &str, tokens: &[Entry], offset: &mut usize) -> Bytes {
        let logprobs = self.logprobs(text, tokens, offset);
        self.chunk(match self.kind {
            Kind::Completion => json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": null}),
            Kind::Chat => {
                json!({"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": null})
            }
        })
    }

    fn end(&self, index: usize, end: End) -> Bytes {
        let end = finish_reason(end);
        self.chunk(match self.kind {
            Kind::Completion => json!({"index": index, "text": "", "logprobs": null, "finish_reason": end}),
            Kind::Chat => json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": end}),
        })
    }

    fn logprobs(&self, text: &str, tokens: &[Entry], offset: &mut usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        match self.kind {
            Kind::Chat => {
                let one = |id: u32, logp: f64| {
                    let bytes = self.codec.piece(id);
                    json!({"token": shown(&bytes), "logprob": finite(logp), "bytes": bytes})
                };
                let content = tokens.iter().map(|Entry { id, logp, top }| {
                    let mut token = one(*id, logp.unwrap_or_default());
                    token["top_logprobs"] = top.iter().map(|&(id, logp)| one(id, logp)).collect();
                    token
                });
                json!({"content": content.collect::<Vec<_>>(), "refusal": null})
            }
            Kind::Completion => {
                let (mut texts, mut logps) = (Vec::<Value>::new(), Vec::<Value>::new());
                let (mut tops, mut offsets) = (Vec::<Value>::new(), Vec::<Value>::new());
                for Entry { id, logp, top } in tokens {
                    let piece = self.codec.piece(*id);
                    texts.push(shown(&piece).into());
                    logps.push(logp.map_or(Value::Null, finite));
                    tops.push(logp.map_or(Value::Null, |logp| self.top(*id, logp, top)));
                    offsets.push((*offset).into());
                    let length = if self.codec.is_special(*id) { 0 } else { characters(&piece) };
                    // a text of SentencePiece begins with a space that is left out
                    let begins = *offset == 0 && length > 0 && !text.is_empty() && !text.starts_with(' ');
                    *offset += length - usize::from(begins && piece.starts_with(b" "));
                }
                json!({"tokens": texts, "token_logprobs": logps, "top_logprobs": tops, "text_offset": offsets})
            }
        }
    }

    /// The most probable tokens and the one that is there, which may not be among them.
    fn top(&self, id: u32, logp: f64, top: &[(u32, f64)]) -> Value {
        let mut map = Map::new();
        for (token, logp) in top.iter().copied().chain(top.iter().all(|(best, _)| *best != id).then_some((id, logp)))
        {
            let mut key = shown(&self.codec.piece(token));
            if map.contains_key(&key) {
                // two tokens of one text
                key = format!("token_id:{token}");
            }
            map.insert(key, finite(logp));
        }
        Value::Object(map)
    }
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// JSON has no infinity; as probable as one in 10^4000.
fn finite(logp: f64) -> Value {
    logp.max(-9999.0).into()
}

/// A token as a text, in OpenAI's way where it is part of a character.
fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

/// Characters that begin in a token.
fn characters(piece: &[u8]) -> usize {
    piece.iter().filter(|&byte| byte & 0xc0 != 0x80).count()
}

fn finish_reason(end: End) -> &'static str {
    match end {
        End::Stop => "stop",
        End::Length => "length",
    }
}

fn event(body: &Value) -> Bytes {
    format!("data: {body}\n\n").into()
}

/// A token with its log-probability, which the first one of a text has not.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) id: u32,
    pub(super) logp: Option<f64>,
    pub(super) top: Vec<(u32, f64)>,
}

impl From<TokenLogprob> for Entry {
    fn from(TokenLogprob { id, logp, top }: TokenLogprob) -> Self {
        Self { id, logp: Some(logp), top }
    }
}

/// An answer as far as it is there, after the prompt where that is echoed.
#[derive(Debug, Clone, Default)]
pub(super) struct Choice {
    pub(super) text: String,
    pub(super) tokens: Vec<Entry>,
    /// How many of them are the prompt's.
    pub(super) echoed: usize,
    pub(super) end: Option<End>,
}

impl Choice {
    /// Takes in what the engine tells of it.
    pub(super) fn take(&mut self, event: Event, used: &Used) -> Result<(), ApiError> {
        match event {
            Event::Part { text, tokens, .. } => {
                self.text.push_str(&text);
                self.tokens.extend(tokens.into_iter().map(Entry::from));
            }
            Event::End { end, tokens, cut, .. } => {
                self.end = Some(end);
                self.tokens.truncate(cut.map_or(usize::MAX, |kept| self.echoed + kept));
                used.answers.fetch_add(tokens, Ordering::Relaxed);
            }
            Event::Scored(_) => {}
            Event::Failed => return Err(ApiError::failed()),
            Event::Stopped => return Err(ApiError::stopping()),
        }
        Ok(())
    }
}

/// Server-sent events, as answers come.
pub(super) struct Stream {
    head: Head,
    events: UnboundedReceiver<Event>,
    /// Characters that each answer has so far.
    offsets: Vec<usize>,
    /// Answers that are not whole.
    left: usize,
    /// Written and not sent.
    ready: VecDeque<Bytes>,
    done: bool,
    /// Given back when the stream ends.
    _permit: OwnedSemaphorePermit,
}

impl Stream {
    /// Of answers that begin as `choices` do; those that are whole already get no event.
    pub(super) fn new(
        head: Head,
        events: UnboundedReceiver<Event>,
        choices: &[Choice],
        permit: OwnedSemaphorePermit,
    ) -> Self {
        let mut ready = VecDeque::new();
        let mut offsets = vec![0; choices.len()];
        for (index, choice) in choices.iter().enumerate() {
            if head.kind == Kind::Chat {
                let role = json!({"role": "assistant", "content": "", "refusal": null});
                ready.push_back(
                    head.chunk(json!({"index": index, "delta": role, "logprobs": null, "finish_reason": null})),
                );
            }
            if !choice.text.is_empty() || !choice.tokens.is_empty() {
                ready.push_back(head.part(index, &choice.text, &choice.tokens, &mut offsets[index]));
            }
            ready.extend(choice.end.map(|end| head.end(index, end)));
        }
        let left = choices.iter().filter(|choice| choice.end.is_none()).count();
        let mut stream = Self { head, events, offsets, left, ready, done: false, _permit: permit };
        stream.finish();
        stream
    }

    pub(super) fn response(self) -> Response {
        let mut response = Response::new(Body::new(self));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }

    fn finish(&mut self) {
        if self.left == 0 && !self.done {
            self.done = true;
            if self.head.include_usage {
                let mut body = self.head.part_object(Vec::new());
                body.insert("usage".into(), self.head.used.usage());
                self.ready.push_back(event(&Value::Object(body)));
            }
            self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        }
    }

    fn take(&mut self, happened: Option<Event>) {
        match happened {
            Some(Event::Part { answer, text, tokens }) => {
                let tokens: Vec<Entry> = tokens.into_iter().map(Entry::from).collect();
                self.ready.push_back(self.head.part(answer, &text, &tokens, &mut self.offsets[answer]));
            }
            Some(Event::End { answer, end, tokens, .. }) => {
                self.head.used.answers.fetch_add(tokens, Ordering::Relaxed);
                self.ready.push_back(self.head.end(answer, end));
                self.left -= 1;
                self.finish();
            }
            Some(Event::Scored(_)) => {}
            // an error in the place of an event, and no [DONE]: so a client can tell an answer that is not whole
            ended @ (Some(Event::Failed | Event::Stopped) | None) => {
                let error =
                    if matches!(ended, Some(Event::Failed)) { ApiError::failed() } else { ApiError::stopping() };
                self.ready.push_back(event(&error.body()));
                self.done = true;
            }
        }
    }
}

impl hyper::body::Body for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            if self.done {
                return Poll::Ready(None);
            }
            match self.events.poll_recv(context) {
                Poll::Ready(happened) => self.take(happened),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
