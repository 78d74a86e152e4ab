//! An endpoint that speaks OpenAI's chat completions: one call, and what its answer means.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};
use ureq::{Agent, http};

use super::config::{Calls, JudgeError};
use super::prompt::Message;
use super::verdict::Form;
use crate::machine::is_this_machine;
use crate::progress::one_line;

/// The most that an answer may have.
const MAX_ANSWER: u64 = 16 << 20;
/// A server may ask for no longer wait than this.
const LONGEST_WAIT: f64 = 60.0;
/// Nothing shorter is a secret. What is sent to endpoints that want any key, such as `x` or `token`, stands in texts that have
/// nothing to do with it.
const SECRET: usize = 8;
/// How many likely tokens are asked for where their probabilities are the verdict.
const TOP_LOGPROBS: u32 = 20;

/// A key. It is sent to its endpoint and shown to nobody.
#[derive(Clone)]
pub struct Key(String);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// The key in an environment variable.
    ///
    /// # Errors
    /// There is none.
    pub fn from_env(name: &str) -> Result<Self, JudgeError> {
        let key = std::env::var(name).unwrap_or_default().trim().to_owned();
        let fits = !key.is_empty() && key.chars().all(|c| c.is_ascii_graphic());
        if fits { Ok(Self(key)) } else { Err(JudgeError::NoKey(name.to_owned())) }
    }

    /// Takes the key out of what a server says: some repeat it.
    fn scrub(&self, value: &mut Value) {
        match value {
            _ if self.0.len() < SECRET => {}
            Value::String(text) if text.contains(&self.0) => *text = self.scrubbed(text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.scrub(item)),
            Value::Object(object) => {
                if object.keys().any(|name| name.contains(&self.0)) {
                    *object = std::mem::take(object).into_iter().map(|(k, v)| (self.scrubbed(&k), v)).collect();
                }
                object.values_mut().for_each(|value| self.scrub(value));
            }
            _ => {}
        }
    }

    fn scrubbed(&self, text: &str) -> String {
        if self.0.len() < SECRET { text.to_owned() } else { text.replace(&self.0, "[key]") }
    }
}

/// A call to make.
#[derive(Debug, Clone, Copy)]
pub struct Chat<'c> {
    /// The model's name.
    pub model: &'c str,
    /// What it is told.
    pub messages: &'c [Message],
    /// None for the endpoint's own.
    pub temperature: Option<f64>,
    /// The most tokens that it may write.
    pub max_tokens: u32,
    /// None for the endpoint's own.
    pub seed: Option<u64>,
    /// How a verdict is said; none where no verdict is asked for.
    pub form: Option<Form>,
    /// Sent as it stands.
    pub extra_body: &'c Map<String, Value>,
}

/// What an endpoint does not take, found out by asking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Adapted {
    completion_tokens: bool,
    no_temperature: bool,
    no_seed: bool,
    /// 0: a JSON schema, 1: any JSON object, 2: only the prompt says so.
    json: u8,
    no_system: bool,
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Trouble {
    /// It may have one later: after this many seconds, where the server says so.
    Later {
        /// What is wrong.
        problem: String,
        /// Seconds.
        wait: Option<f64>,
        /// Whether the server asks for fewer calls.
        limited: bool,
        /// What it sent with a success that is no answer, null where that is no JSON: it was computed, and is charged for.
        charged: Option<Value>,
    },
    /// It will have one when it is sent again as the endpoint takes it; this is what was changed.
    Changed(&'static str),
    /// This one will never have one.
    Refused(String),
    /// None will have one.
    Fatal {
        /// What is wrong.
        problem: String,
        /// What to do.
        help: String,
    },
}

/// An answer, and what its headers say about further calls.
#[derive(Debug)]
pub struct Reply {
    /// The object, without the key.
    pub response: Value,
    /// Seconds until calls are allowed again, where none is left.
    pub hold: Option<f64>,
}

/// An endpoint.
#[derive(Debug)]
pub struct Endpoint {
    agent: Agent,
    url: String,
    key: Option<Key>,
    adapted: Mutex<Adapted>,
}

impl Endpoint {
    /// The endpoint at `base_url`. Nothing is sent yet.
    ///
    /// # Errors
    /// Its key is not there.
    pub fn new(base_url: &str, calls: &Calls) -> Result<Self, JudgeError> {
        let key = calls.key_env.as_deref().map(Key::from_env).transpose()?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // a redirect would take the key elsewhere
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("dpo-lora/", env!("CARGO_PKG_VERSION")))
            .timeout_global(Some(Duration::from_secs_f64(calls.timeout)))
            .max_idle_connections_per_host(calls.concurrency);
        let url = format!("{base_url}/chat/completions");
        Ok(Self { agent: config.build().new_agent(), url, key, adapted: Mutex::default() })
    }

    /// Whether a key would go over the network for all to read.
    #[must_use]
    pub fn sends_key_openly(&self) -> bool {
        let host = self.url.strip_prefix("http://").and_then(|rest| rest.split('/').next());
        self.key.is_some() && host.is_some_and(|host| !is_this_machine(host))
    }

    /// What was left out or changed, since the endpoint does not take it.
    #[must_use]
    pub fn changes(&self) -> Vec<&'static str> {
        let adapted = *self.adapted();
        [
            (adapted.completion_tokens, "max_tokens is called max_completion_tokens"),
            (adapted.no_temperature, "without temperature"),
            (adapted.no_seed, "without seed"),
            (adapted.json == 1, "JSON without a schema"),
            (adapted.json == 2, "JSON by the prompt alone"),
            (adapted.no_system, "the system message stands in the user's"),
        ]
        .into_iter()
        .filter_map(|(is, change)| is.then_some(change))
        .collect()
    }

    fn adapted(&self) -> MutexGuard<'_, Adapted> {
        // it is copied in and out whole, so a panic elsewhere leaves nothing half done
        self.adapted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One call.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub fn call(&self, chat: &Chat<'_>) -> Result<Reply, Trouble> {
        let adapted = *self.adapted();
        let body = body(chat, adapted).to_string();
        let mut request = self.agent.post(&self.url).header("content-type", "application/json");
        if let Some(Key(key)) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let later = |problem, charged| Trouble::Later { problem, wait: None, limited: false, charged };
        let response = request.send(body.as_str()).map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => Trouble::Fatal {
                problem: "the address of the endpoint is none".into(),
                help: "it is something like http://localhost:8000/v1".into(),
            },
            ureq::Error::Timeout(_) => later("there is no answer in time".into(), None),
            other => later(self.told(&other.to_string()), None),
        })?;
        let (parts, body) = response.into_parts();
        let text = body.into_with_config().limit(MAX_ANSWER).read_to_string();
        // who answered so has judged, or refused: without a body it is only known by its status
        let text = match text {
            Err(error) if parts.status.is_success() => {
                let problem = format!("the answer breaks off: {}", self.told(&error.to_string()));
                return Err(later(problem, Some(Value::Null)));
            }
            text => text.unwrap_or_default(),
        };
        let mut value: Option<Value> = serde_json::from_str(&text).ok();
        if let (Some(key), Some(value)) = (&self.key, &mut value) {
            key.scrub(value);
        }
        if !parts.status.is_success() {
            return Err(self.refusal(&parts, value.as_ref(), &text, chat, adapted));
        }
        let is_answer = |value: &Value| value.pointer("/choices/0/message").is_some_and(Value::is_object);
        match value {
            Some(response) if is_answer(&response) => Ok(Reply { response, hold: hold(&parts.headers) }),
            other => {
                let problem = format!("the answer is no chat completion: {}", self.told(&text));
                Err(later(problem, Some(other.unwrap_or_default())))
            }
        }
    }

    /// What an answer other than a success means, by the policy of OpenAI's own client.
    fn refusal(
        &self,
        parts: &http::response::Parts,
        value: Option<&Value>,
        text: &str,
        chat: &Chat<'_>,
        before: Adapted,
    ) -> Trouble {
        let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let error = value.and_then(|value| value.get("error"));
        let field = |name: &str| error.and_then(|error| error.get(name)).and_then(Value::as_str).unwrap_or("");
        let message = match (field("message"), error.and_then(Value::as_str)) {
            ("", Some(error)) => self.told(error),
            ("", None) => self.told(text),
            (message, _) => self.told(message),
        };
        let status = parts.status.as_u16();
        let problem = match message.is_empty() {
            true => format!("the endpoint answers {}", parts.status),
            false => format!("the endpoint answers {}: {message}", parts.status),
        };
        let fatal = |help: &str| Trouble::Fatal { problem: problem.clone(), help: help.to_owned() };
        match status {
            401 | 403 => {
                return fatal(match self.key {
                    Some(_) => "the key that was sent is not accepted there",
                    None => {
                        "it wants a key: --judge-key-env, and for --against --against-key-env, names the environment variable \
                         with it"
                    }
                });
            }
            402 => return fatal("the account has nothing to pay with"),
            404 => return fatal("either the model has another name, or the endpoint another address"),
            429 if [field("code"), field("type")].contains(&"insufficient_quota") => {
                return fatal("the account has nothing to pay with; what was answered is kept");
            }
            300..=399 => return fatal("name the address that it leads to: a key is not sent along"),
            400 | 422 => {
                if let Some(change) = self.change(field("param"), &message, chat, before) {
                    return Trouble::Changed(change);
                }
            }
            _ => {}
        }
        let again = match header("x-should-retry") {
            Some("true") => true,
            Some("false") => false,
            _ => matches!(status, 408 | 409 | 429 | 500..),
        };
        match again {
            true => {
                Trouble::Later { problem, wait: asked_to_wait(&parts.headers), limited: status == 429, charged: None }
            }
            false => Trouble::Refused(problem),
        }
    }

    /// Leaves out or renames what a message says is not taken, once each.
    fn change(&self, param: &str, message: &str, chat: &Chat<'_>, before: Adapted) -> Option<&'static str> {
        let text = message.to_lowercase();
        if ["context length", "too long", "maximum context", "too large"].iter().any(|about| text.contains(about)) {
            return None;
        }
        let named = |name: &str| param.starts_with(name) || text.contains(name);
        let mut adapted = before;
        let change = if named("max_tokens") && text.contains("max_completion_tokens") && !before.completion_tokens {
            adapted.completion_tokens = true;
            "max_tokens is called max_completion_tokens there"
        } else if (named("response_format") || named("json_schema"))
            && chat.form == Some(Form::Json)
            && before.json < 2
        {
            adapted.json += 1;
            if adapted.json == 1 { "it takes no JSON schema" } else { "it takes no response_format" }
        } else if named("logprobs") && chat.form == Some(Form::Logprob) {
            // without them there would be no verdict
            return None;
        } else if named("temperature") && chat.temperature.is_some() && !before.no_temperature {
            adapted.no_temperature = true;
            "it takes no temperature"
        } else if named("seed") && chat.seed.is_some() && !before.no_seed {
            adapted.no_seed = true;
            "it takes no seed"
        } else if text.contains("system") && text.contains("role") && !before.no_system {
            adapted.no_system = true;
            "it takes no system message"
        } else {
            return None;
        };
        let mut now = self.adapted();
        // another call may have found out the same meanwhile
        if *now == before {
            *now = adapted;
        }
        Some(change)
    }

    /// What a server says, for a message: without the key, in one line, short, and without what a terminal would obey.
    fn told(&self, text: &str) -> String {
        let text = self.key.as_ref().map_or_else(|| text.to_owned(), |key| key.scrubbed(text));
        one_line(&text, 300)
    }
}

fn body(chat: &Chat<'_>, adapted: Adapted) -> Value {
    let mut messages = chat.messages.to_vec();
    if adapted.no_system
        && let [first, second, ..] = &mut messages[..]
        && first.role == "system"
    {
        second.content = format!("{}\n\n{}", first.content, second.content);
        messages.remove(0);
    }
    let mut body = json!({ "model": chat.model, "messages": messages });
    let limit = if adapted.completion_tokens { "max_completion_tokens" } else { "max_tokens" };
    body[limit] = json!(chat.max_tokens);
    if let (Some(temperature), false) = (chat.temperature, adapted.no_temperature) {
        body["temperature"] = json!(temperature);
    }
    if let (Some(seed), false) = (chat.seed, adapted.no_seed) {
        body["seed"] = json!(seed);
    }
    match (chat.form, adapted.json) {
        (Some(Form::Json), 0) => body["response_format"] = schema(),
        (Some(Form::Json), 1) => body["response_format"] = json!({ "type": "json_object" }),
        (Some(Form::Logprob), _) => {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(TOP_LOGPROBS);
        }
        _ => {}
    }
    if let Some(body) = body.as_object_mut() {
        body.extend(chat.extra_body.clone());
    }
    body
}

/// The verdict behind its reasoning, so that it is reasoned about first.
fn schema() -> Value {
    json!({
        "type": "json_schema",
        "json_schema": {
            "name": "verdict",
            "strict": true,
            "schema": {
                "type": "object",
                "properties": {
                    "reasoning": { "type": "string" },
                    "verdict": { "type": "string", "enum": ["A", "B", "tie"] },
                },
                "required": ["reasoning", "verdict"],
                "additionalProperties": false,
            },
        },
    })
}

/// What the server asks to wait, in seconds, where that is above 0 and up to a minute.
fn asked_to_wait(headers: &http::HeaderMap) -> Option<f64> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let milliseconds = || header("retry-after-ms")?.parse::<f64>().ok().map(|ms| ms / 1000.0);
    let seconds = || header("retry-after")?.parse::<f64>().ok();
    let date = || {
        let at = jiff::fmt::rfc2822::parse(header("retry-after")?).ok()?.timestamp();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(at.as_second() as f64 - now.as_secs_f64())
    };
    milliseconds().or_else(seconds).or_else(date).filter(|wait| *wait > 0.0 && *wait <= LONGEST_WAIT)
}

/// Until calls are allowed again, where the headers say that none is left.
fn hold(headers: &http::HeaderMap) -> Option<f64> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let of = |kind: &str| {
        let left: u64 = header(&format!("x-ratelimit-remaining-{kind}"))?.parse().ok()?;
        let reset = span(header(&format!("x-ratelimit-reset-{kind}"))?)?;
        (left == 0).then_some(reset.min(LONGEST_WAIT))
    };
    [of("requests"), of("tokens")].into_iter().flatten().reduce(f64::max)
}

/// Seconds of `1s`, `6m0s`, `120ms` and the like.
fn span(text: &str) -> Option<f64> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        seconds += number
            * match &rest[..letters] {
                "ms" => 1e-3,
                "s" | "" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                "d" => 86_400.0,
                _ => return None,
            };
        rest = &rest[letters..];
    }
    (!text.is_empty()).then_some(seconds)
}

/// How long to wait before the next try, in seconds: as the server asks, or `min(0.5 · 2ⁿ, 8)` after `n` tries more, less
/// up to a quarter of it, `jitter` in `[0, 1)`, so that many callers do not come back at once.
#[must_use]
pub fn pause(wait: Option<f64>, tries: u32, jitter: f64) -> f64 {
    wait.unwrap_or_else(|| (0.5 * 2f64.powi(tries.min(10) as i32)).min(8.0) * (1.0 - 0.25 * jitter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(key: Option<&str>) -> Endpoint {
        let calls = Calls::of("http://127.0.0.1:1", None);
        let endpoint = Endpoint::new("http://127.0.0.1:1", &calls).expect("an endpoint");
        Endpoint { key: key.map(|key| Key(key.to_owned())), ..endpoint }
    }

    fn chat(form: Option<Form>) -> Chat<'static> {
        static EXTRA: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
        static MESSAGES: std::sync::LazyLock<Vec<Message>> = std::sync::LazyLock::new(|| {
            ["system", "user"].map(|role| Message { role: role.into(), content: role.to_uppercase() }).to_vec()
        });
        Chat {
            model: "m",
            messages: &MESSAGES,
            temperature: Some(0.0),
            max_tokens: 7,
            seed: Some(0),
            form,
            extra_body: &EXTRA,
        }
    }

    fn refused(endpoint: &Endpoint, status: u16, headers: &[(&str, &str)], body: &str) -> Trouble {
        let mut response = http::Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        let (parts, ()) = response.body(()).expect("a response").into_parts();
        let value: Option<Value> = serde_json::from_str(body).ok();
        // copied out first: the lock would be held while it is asked for again
        let adapted = *endpoint.adapted();
        endpoint.refusal(&parts, value.as_ref(), body, &chat(Some(Form::Json)), adapted)
    }

    #[test]
    fn what_is_tried_again_and_when() {
        let endpoint = endpoint(None);
        for status in [408, 409, 429, 500, 502, 503, 504] {
            assert!(matches!(refused(&endpoint, status, &[], ""), Trouble::Later { .. }), "{status}");
        }
        for status in [401, 402, 403, 404, 301] {
            assert!(matches!(refused(&endpoint, status, &[], ""), Trouble::Fatal { .. }), "{status}");
        }
        for status in [400, 405, 413, 422] {
            assert!(matches!(refused(&endpoint, status, &[], ""), Trouble::Refused(_)), "{status}");
        }
        let quota = r#"{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}"#;
        assert!(matches!(refused(&endpoint, 429, &[], quota), Trouble::Fatal { .. }));
        assert!(matches!(refused(&endpoint, 500, &[("x-should-retry", "false")], ""), Trouble::Refused(_)));
        assert!(matches!(refused(&endpoint, 400, &[("x-should-retry", "true")], ""), Trouble::Later { .. }));

        let wait = |name, value| match refused(&endpoint, 429, &[(name, value)], "") {
            Trouble::Later { wait, limited: true, .. } => wait,
            other => panic!("{other:?}"),
        };
        assert_eq!(wait("retry-after", "2"), Some(2.0));
        assert_eq!(wait("retry-after-ms", "150"), Some(0.15));
        for not in ["0", "-1", "61", "soon", "Sun, 06 Nov 1994 08:49:37 GMT"] {
            assert_eq!(wait("retry-after", not), None, "{not}");
        }
        let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(20);
        let date = soon.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let seconds = wait("retry-after", &date).expect("a date");
        assert!((18.0..=20.0).contains(&seconds), "{seconds}");
    }

    #[test]
    fn pauses_double_up_to_eight_seconds_and_differ() {
        let pauses: Vec<f64> = (0..6).map(|n| pause(None, n, 0.0)).collect();
        assert_eq!(pauses, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]);
        assert_eq!(pause(None, 1, 1.0), 0.75);
        assert_eq!(pause(Some(3.0), 5, 0.5), 3.0);
    }

    #[test]
    fn what_an_endpoint_does_not_take_is_left_out_once() {
        let endpoint = endpoint(None);
        let message = |text: &str, param: &str| json!({"error": {"message": text, "param": param}}).to_string();
        let says = |text: &str, param: &str| refused(&endpoint, 400, &[], &message(text, param));
        assert_eq!(body(&chat(Some(Form::Json)), *endpoint.adapted())["max_tokens"], 7);
        let renamed = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.";
        assert!(matches!(says(renamed, "max_tokens"), Trouble::Changed(_)));
        assert!(matches!(
            says("Unsupported value: 'temperature' does not support 0.0", "temperature"),
            Trouble::Changed(_)
        ));
        assert!(matches!(says("Unknown parameter", "seed"), Trouble::Changed(_)));
        assert!(matches!(
            says("Invalid parameter: 'response_format' of type 'json_schema'", "response_format"),
            Trouble::Changed(_)
        ));
        assert!(matches!(says("response_format is not supported", ""), Trouble::Changed(_)));
        assert!(matches!(says("System role not supported", ""), Trouble::Changed(_)));
        let sent = body(&chat(Some(Form::Json)), *endpoint.adapted());
        assert_eq!(
            sent,
            json!({"model": "m", "messages": [{"role": "user", "content": "SYSTEM\n\nUSER"}], "max_completion_tokens": 7})
        );
        assert_eq!(endpoint.changes().len(), 5);
        // each only once: then it is this question's fault
        assert!(matches!(says(renamed, "max_tokens"), Trouble::Refused(_)));
        let long =
            "'max_tokens' is too large: this model's maximum context length is 4096 tokens, max_completion_tokens";
        assert!(matches!(says(long, "max_tokens"), Trouble::Refused(_)));
    }

    #[test]
    fn a_key_that_a_server_repeats_is_taken_out() {
        let endpoint = endpoint(Some("sk-secret"));
        let body = r#"{"error": {"message": "Incorrect API key: sk-secret\u001b[31m\nBearer sk-secret"}}"#;
        let Trouble::Fatal { problem, .. } = refused(&endpoint, 401, &[], body) else { panic!("fatal") };
        assert!(problem.contains("[key]") && !problem.contains("secret") && !problem.contains('\u{1b}'), "{problem}");
        let mut value = json!({"a": ["x sk-secret"], "sk-secret": {"b": "sk-secret"}});
        Key("sk-secret".into()).scrub(&mut value);
        assert_eq!(value, json!({"a": ["x [key]"], "[key]": {"b": "[key]"}}));
        assert!(!format!("{endpoint:?}").contains("secret"));
    }

    #[test]
    fn a_key_that_is_no_secret_leaves_texts_alone() {
        let key = Key("token".into());
        let mut value = json!({"completion_tokens": 1, "choices": ["a token is a word"]});
        let before = value.clone();
        key.scrub(&mut value);
        assert_eq!(value, before);
        assert_eq!(key.scrubbed("no token left"), "no token left");
    }

    #[test]
    fn a_key_stays_on_this_machine_or_is_warned_of() {
        let openly = |url: &str| Endpoint { url: url.to_owned(), ..endpoint(Some("sk-secret")) }.sends_key_openly();
        for local in
            ["http://localhost:8000/v1", "http://127.0.0.1/v1", "http://127.8.0.1:1/v1", "http://[::1]:80/v1"]
        {
            assert!(!openly(local), "{local}");
        }
        for other in
            ["http://127.evil.com/v1", "http://localhost.evil.com/v1", "http://10.0.0.1:8000/v1", "http://h/v1"]
        {
            assert!(openly(other), "{other}");
        }
        assert!(!openly("https://127.evil.com/v1"));
    }

    #[test]
    fn spans_of_time() {
        for (text, seconds) in [("1s", 1.0), ("6m0s", 360.0), ("120ms", 0.12), ("1h2m3.5s", 3723.5), ("2", 2.0)] {
            assert_eq!(span(text), Some(seconds), "{text}");
        }
        for none in ["", "s", "1x", "-1s"] {
            assert_eq!(span(none), None, "{none}");
        }
    }
}
