//! Requests, read parameter by parameter: what is wrong is said with the parameter's name, and nothing that would change
//! an answer is silently left out.

use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::model::generate::Sampling;
use crate::suggest::did_you_mean;

/// The most answers of one request, and the most prompts whose tokens are only scored.
pub(super) const MOST_ANSWERS: usize = 256;
pub(super) const MOST_PROMPTS: usize = 2048;
/// The most texts that end an answer, and bytes of each.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;
/// The most probable tokens that are told in each place.
const MOST_LOGPROBS: u64 = 20;

/// Parameters that mean something only to OpenAI's own service.
const WITHOUT_EFFECT: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
];

/// `/v1/completions`
#[derive(Debug)]
pub(super) struct Completions {
    pub(super) model: String,
    pub(super) prompts: Vec<Text>,
    pub(super) echo: bool,
    /// Of answers, and with `echo` of prompts.
    pub(super) logprobs: Option<usize>,
    pub(super) common: Common,
}

/// `/v1/chat/completions`
#[derive(Debug)]
pub(super) struct Chat {
    pub(super) model: String,
    /// Role and text of each turn.
    pub(super) messages: Vec<(String, String)>,
    pub(super) logprobs: Option<usize>,
    pub(super) common: Common,
}

/// `/tokenize`
#[derive(Debug)]
pub(super) struct Tokenize {
    pub(super) text: Result<String, Vec<(String, String)>>,
    /// Whether the BOS comes first.
    pub(super) special: bool,
}

/// A prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Text {
    Words(String),
    Ids(Vec<u32>),
}

/// What both kinds of completion have.
#[derive(Debug, Clone)]
pub(super) struct Common {
    pub(super) n: usize,
    pub(super) max_tokens: Option<usize>,
    pub(super) sampling: Sampling,
    pub(super) seed: Option<u64>,
    pub(super) stop: Vec<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

/// What is left to read of a request.
struct Parameters(Map<String, Value>);

impl Parameters {
    fn of(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(parameters)) => Ok(Self(parameters)),
            Ok(_) => Err(ApiError::request("the body is no JSON object")),
            Err(error) => Err(ApiError::request(format!("the body is no valid JSON: {error}"))),
        }
    }

    /// A parameter that may be left out or null.
    fn take<T: DeserializeOwned>(&mut self, name: &str, what: &str) -> Result<Option<T>, ApiError> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(ApiError::param(name, format!("{name} is {what}"))),
            },
        }
    }

    fn number(&mut self, name: &str, default: f64, least: f64, most: f64) -> Result<f64, ApiError> {
        let what = if most.is_finite() {
            format!("a number from {least} to {most}")
        } else {
            format!("a number from {least} on")
        };
        let number: f64 = self.take(name, &what)?.unwrap_or(default);
        if (least..=most).contains(&number) {
            Ok(number)
        } else {
            Err(ApiError::param(name, format!("{name} is {what}")))
        }
    }

    fn count(&mut self, name: &str, least: u64, most: u64) -> Result<Option<usize>, ApiError> {
        let what = if most == u64::MAX {
            format!("a whole number from {least} on")
        } else {
            format!("a whole number from {least} to {most}")
        };
        match self.take::<u64>(name, &what)? {
            Some(count) if !(least..=most).contains(&count) => {
                Err(ApiError::param(name, format!("{name} is {what}")))
            }
            count => Ok(count.map(|count| usize::try_from(count).unwrap_or(usize::MAX))),
        }
    }

    fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        Ok(self.take(name, "true or false")?.unwrap_or(false))
    }

    fn model(&mut self) -> Result<String, ApiError> {
        self.take("model", "the name of a model")?.ok_or_else(|| ApiError::param("model", "model is missing"))
    }

    /// A parameter that is known, and understood only where it changes nothing.
    fn only(&mut self, name: &str, neutral: &[Value]) -> Result<(), ApiError> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if neutral.contains(&value) => Ok(()),
            Some(_) => Err(ApiError::unsupported(name, format!("this server does not know how to follow {name}"))),
        }
    }

    fn common(&mut self, longest: &[&str]) -> Result<Common, ApiError> {
        let mut max_tokens = None;
        for name in longest {
            max_tokens = self.count(name, 0, u64::MAX)?.or(max_tokens);
        }
        let sampling = Sampling {
            temperature: self.number("temperature", 1.0, 0.0, 2.0)?,
            top_p: self.number("top_p", 1.0, 0.0, 1.0)?,
            // -1 is how some clients say all
            top_k: match self.take::<i64>("top_k", "a whole number from 0 on, where 0 is all tokens")? {
                None | Some(-1) => 0,
                Some(k) => usize::try_from(k).map_err(|_| {
                    ApiError::param("top_k", "top_k is a whole number from 0 on, where 0 is all tokens")
                })?,
            },
            min_p: self.number("min_p", 0.0, 0.0, 1.0)?,
            repetition_penalty: self.number("repetition_penalty", 1.0, 0.01, 100.0)?,
        };
        let zero = [Value::from(0), Value::from(0.0)];
        self.only("presence_penalty", &zero)?;
        self.only("frequency_penalty", &zero)?;
        self.only("logit_bias", &[Value::Object(Map::new())])?;
        let stream = self.flag("stream")?;
        let include_usage = match self.take::<Map<String, Value>>("stream_options", "an object")? {
            Some(mut options) => {
                let usage = options.shift_remove("include_usage");
                options.shift_remove("include_obfuscation");
                if let Some(name) = options.keys().next() {
                    return Err(unknown(&format!("stream_options.{name}"), name, ["include_usage"]));
                }
                match usage {
                    None | Some(Value::Null) => false,
                    Some(Value::Bool(usage)) => usage,
                    Some(_) => {
                        let param = "stream_options.include_usage";
                        return Err(ApiError::param(param, format!("{param} is true or false")));
                    }
                }
            }
            None => false,
        };
        // a negative seed is as good as another
        let seed = self.take::<Value>("seed", "a whole number")?;
        let seed = match seed {
            None => None,
            Some(seed) => Some(
                seed.as_u64()
                    .or_else(|| seed.as_i64().map(i64::cast_unsigned))
                    .ok_or_else(|| ApiError::param("seed", "seed is a whole number of at most 64 bits"))?,
            ),
        };
        let n = self.count("n", 1, MOST_ANSWERS as u64)?.unwrap_or(1);
        Ok(Common { n, max_tokens, sampling, seed, stop: self.stop()?, stream, include_usage })
    }

    fn stop(&mut self) -> Result<Vec<String>, ApiError> {
        const WHAT: &str = "a text or a list of texts";
        let stop = match self.take::<Value>("stop", WHAT)? {
            None => Vec::new(),
            Some(Value::String(text)) => vec![text],
            Some(list) => {
                serde_json::from_value(list).map_err(|_| ApiError::param("stop", format!("stop is {WHAT}")))?
            }
        };
        let stop: Vec<String> = stop.into_iter().filter(|text: &String| !text.is_empty()).collect();
        if stop.len() > MOST_STOPS || stop.iter().any(|text| text.len() > LONGEST_STOP) {
            let problem = format!("stop has at most {MOST_STOPS} texts of at most {LONGEST_STOP} bytes");
            return Err(ApiError::param("stop", problem));
        }
        Ok(stop)
    }

    fn messages(&mut self) -> Result<Vec<(String, String)>, ApiError> {
        let messages: Vec<Value> = self
            .take("messages", "a list of objects with role and content")?
            .ok_or_else(|| ApiError::param("messages", "messages is missing"))?;
        if messages.is_empty() {
            return Err(ApiError::param("messages", "messages is empty"));
        }
        messages.into_iter().enumerate().map(|(number, message)| turn(number, message)).collect()
    }

    /// What is left is not known.
    fn end(mut self, known: &[&str]) -> Result<(), ApiError> {
        WITHOUT_EFFECT.iter().for_each(|name| _ = self.0.shift_remove(*name));
        match self.0.keys().next() {
            Some(name) => Err(unknown(name, name, known.iter().copied())),
            None => Ok(()),
        }
    }
}

fn unknown<'k>(param: &str, name: &str, known: impl IntoIterator<Item = &'k str>) -> ApiError {
    let hint = did_you_mean(name, known).map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
    let shown: String = param.chars().take(80).collect();
    let error = ApiError::param(&shown, format!("there is no parameter {shown}{hint}"));
    error.with(StatusCode::BAD_REQUEST, "unknown_parameter")
}

/// Role and text of a message.
fn turn(number: usize, message: Value) -> Result<(String, String), ApiError> {
    let wrong = |field: &str, problem: &str| {
        let param =
            if field.is_empty() { format!("messages[{number}]") } else { format!("messages[{number}].{field}") };
        ApiError::param(&param, format!("{param} {problem}"))
    };
    let Value::Object(mut message) = message else { return Err(wrong("", "is no object")) };
    let role = match message.shift_remove("role") {
        Some(Value::String(role)) => role,
        _ => return Err(wrong("role", "is missing or no text")),
    };
    // OpenAI's newer name for it, which templates do not know
    let role = if role == "developer" { "system".to_owned() } else { role };
    if !["system", "user", "assistant"].contains(&role.as_str()) {
        return Err(wrong("role", "is system, developer, user or assistant"));
    }
    let content = match message.shift_remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let text = |part: &Value| Some(part.get("text").filter(|_| part["type"] == "text")?.as_str()?.to_owned());
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            texts.ok_or_else(|| wrong("content", "has a part that is no text"))?.concat()
        }
        _ => return Err(wrong("content", "is missing, or neither a text nor a list of text parts")),
    };
    message.shift_remove("name");
    message.retain(|_, value| !value.is_null());
    match message.keys().next() {
        Some(field) => Err(wrong(&field.chars().take(80).collect::<String>(), "is not supported")),
        None => Ok((role, content)),
    }
}

/// One prompt or several: a text, a list of texts, a list of ids, or a list of lists of ids.
fn prompts(prompt: Value) -> Result<Vec<Text>, ApiError> {
    let wrong = || {
        let problem = "prompt is a text, a list of texts, a list of token ids, or a list of lists of token ids";
        ApiError::param("prompt", problem)
    };
    let ids = |ids: &Value| {
        let ids = ids.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok());
        ids.collect::<Option<Vec<u32>>>().map(Text::Ids)
    };
    let prompts = match &prompt {
        Value::String(text) => Some(vec![Text::Words(text.clone())]),
        Value::Array(list) => match list.first() {
            Some(Value::String(_)) => {
                list.iter().map(|text| text.as_str().map(|text| Text::Words(text.into()))).collect()
            }
            Some(Value::Array(_)) => list.iter().map(ids).collect(),
            Some(Value::Number(_)) => ids(&prompt).map(|ids| vec![ids]),
            _ => None,
        },
        _ => None,
    };
    prompts.ok_or_else(wrong)
}

const SAMPLING: [&str; 14] = [
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "n",
    "logprobs",
    "presence_penalty",
];

impl Completions {
    pub(super) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut parameters = Parameters::of(body)?;
        let model = parameters.model()?;
        let prompt: Value =
            parameters.take("prompt", "")?.ok_or_else(|| ApiError::param("prompt", "prompt is missing"))?;
        let prompts = prompts(prompt)?;
        let echo = parameters.flag("echo")?;
        let logprobs = parameters.count("logprobs", 0, MOST_LOGPROBS)?;
        let common = parameters.common(&["max_tokens"])?;
        parameters.only("best_of", &[Value::from(1), Value::from(common.n)])?;
        parameters.only("suffix", &[Value::from("")])?;
        parameters.end(&[&SAMPLING[..], &["prompt", "echo"]].concat())?;
        Ok(Self { model, prompts, echo, logprobs, common })
    }
}

impl Chat {
    pub(super) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut parameters = Parameters::of(body)?;
        let model = parameters.model()?;
        let messages = parameters.messages()?;
        let wanted = parameters.flag("logprobs")?;
        let top = parameters.count("top_logprobs", 0, MOST_LOGPROBS)?;
        if top.is_some_and(|top| top > 0) && !wanted {
            return Err(ApiError::param("top_logprobs", "top_logprobs needs logprobs to be true"));
        }
        let common = parameters.common(&["max_tokens", "max_completion_tokens"])?;
        let text = serde_json::json!({"type": "text"});
        parameters.only("response_format", &[text])?;
        parameters.only("tools", &[Value::Array(Vec::new())])?;
        parameters.only("tool_choice", &["none".into(), "auto".into()])?;
        parameters.only("modalities", &[serde_json::json!(["text"])])?;
        for name in ["functions", "function_call", "audio", "prediction", "reasoning_effort", "verbosity"] {
            parameters.only(name, &[])?;
        }
        parameters.end(&[&SAMPLING[..], &["messages", "max_completion_tokens", "top_logprobs"]].concat())?;
        Ok(Self { model, messages, logprobs: wanted.then_some(top.unwrap_or(0)), common })
    }
}

impl Tokenize {
    pub(super) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut parameters = Parameters::of(body)?;
        let has_messages = parameters.0.get("messages").is_some_and(|messages| !messages.is_null());
        let text = match parameters.take::<String>("prompt", "a text")? {
            Some(_) if has_messages => {
                return Err(ApiError::param("messages", "there are prompt and messages; one of them is tokenized"));
            }
            Some(text) => Ok(text),
            None if has_messages => Err(parameters.messages()?),
            None => return Err(ApiError::param("prompt", "prompt or messages is missing")),
        };
        parameters.0.shift_remove("messages");
        // of messages the chat template says it
        let special = parameters.take("add_special_tokens", "true or false")?.unwrap_or(true);
        // one tokenizer serves both models
        parameters.only("add_generation_prompt", &[Value::Bool(true)])?;
        parameters.0.shift_remove("model");
        parameters.end(&["prompt", "messages", "add_special_tokens", "model"])?;
        Ok(Self { text, special })
    }
}

/// `/detokenize`: the ids.
pub(super) fn detokenize(body: &[u8]) -> Result<Vec<u32>, ApiError> {
    let mut parameters = Parameters::of(body)?;
    let tokens = parameters
        .take("tokens", "a list of token ids")?
        .ok_or_else(|| ApiError::param("tokens", "tokens is missing"))?;
    parameters.0.shift_remove("model");
    parameters.end(&["tokens", "model"])?;
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completions(text: &str) -> Result<Completions, String> {
        Completions::read(text.as_bytes()).map_err(|error| error.body().to_string())
    }

    fn problem(text: &str) -> String {
        completions(text).expect_err(text)
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let read = |prompt: &str| completions(&format!(r#"{{"model": "m", "prompt": {prompt}}}"#)).map(|c| c.prompts);
        assert_eq!(read(r#""a""#), Ok(vec![Text::Words("a".into())]));
        assert_eq!(read(r#"["a", "b"]"#), Ok(vec![Text::Words("a".into()), Text::Words("b".into())]));
        assert_eq!(read("[1, 2]"), Ok(vec![Text::Ids(vec![1, 2])]));
        assert_eq!(read("[[1], [2, 3]]"), Ok(vec![Text::Ids(vec![1]), Text::Ids(vec![2, 3])]));
        for prompt in ["[]", "[1, \"a\"]", "[[1], 2]", "[-1]", "[1.5]", "[4294967296]", "7", "{}"] {
            assert!(read(prompt).is_err(), "{prompt}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |more: &str| problem(&format!(r#"{{"model": "m", "prompt": "a", {more}}}"#));
        assert!(problem("{").contains("line 1 column 1"));
        assert!(problem(r#"{"prompt": "a"}"#).contains(r#""param":"model""#));
        assert!(with(r#""temprature": 1"#).contains("did you mean temperature?"));
        assert!(with(r#""temperature": "hot""#).contains(r#""param":"temperature""#));
        assert!(with(r#""temperature": -0.5"#).contains("from 0 to 2"));
        assert!(with(r#""n": 0"#).contains("from 1 to 256"));
        assert!(with(r#""presence_penalty": 0.5"#).contains("unsupported_parameter"));
        assert!(with(r#""logit_bias": {"5": 100}"#).contains("unsupported_parameter"));
        assert!(with(r#""best_of": 3"#).contains("best_of"));
        assert!(with(r#""stop": [1]"#).contains("a list of texts"));
        assert!(with(r#""stream_options": {"include_usages": true}"#).contains("did you mean include_usage?"));
        assert!(with(r#""stream_options": {"include_usage": "yes"}"#).contains("include_usage is true or false"));
        // a name as long as a request may be is shown in part, and compared with nothing
        let long = with(&format!(r#""{}": 1"#, "temperature".repeat(700_000)));
        assert!(long.contains("unknown_parameter") && !long.contains("did you mean") && long.len() < 500);
        // what changes nothing is taken
        let taken = r#"{"model": "m", "prompt": "a", "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "user": "u",
            "suffix": null, "seed": -3, "stop": "x", "max_tokens": null}"#;
        let taken = completions(taken).expect("understood");
        assert_eq!((taken.common.seed, taken.common.stop), (Some(u64::MAX - 2), vec!["x".to_owned()]));
    }

    #[test]
    fn a_text_or_messages_are_tokenized() {
        let read = |text: &str| Tokenize::read(text.as_bytes()).map_err(|error| error.body().to_string());
        let messages = r#""messages": [{"role": "user", "content": "a"}]"#;
        assert!(
            read(&format!(r#"{{"prompt": "a", {messages}}}"#)).expect_err("both").contains("prompt and messages")
        );
        assert!(read(&format!(r#"{{"prompt": null, {messages}}}"#)).is_ok_and(|read| read.text.is_err()));
        assert!(read(r#"{"prompt": "a", "messages": null}"#).is_ok_and(|read| read.text.is_ok()));
        assert!(read(r#"{"messages": null}"#).expect_err("none").contains("prompt or messages is missing"));
        let wrong = read(&format!(r#"{{{messages}, "add_special_tokens": "no"}}"#));
        assert!(wrong.expect_err("no flag").contains("add_special_tokens is true or false"));
    }

    #[test]
    fn messages_are_texts() {
        let read = |messages: &str| {
            Chat::read(format!(r#"{{"model": "m", "messages": {messages}}}"#).as_bytes())
                .map(|chat| chat.messages)
                .map_err(|error| error.body().to_string())
        };
        let parts =
            r#"[{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]"#;
        assert_eq!(read(parts), Ok(vec![("system".into(), "ab".into())]));
        for (messages, problem) in [
            ("[]", "empty"),
            (r#"[{"role": "user"}]"#, "messages[0].content"),
            (r#"[{"role": "tool", "content": "x"}]"#, "messages[0].role"),
            (r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]"#, "no text"),
            (r#"[{"role": "assistant", "content": "x", "tool_calls": [1]}]"#, "tool_calls is not supported"),
        ] {
            assert!(read(messages).expect_err(messages).contains(problem), "{messages}");
        }
    }
}
