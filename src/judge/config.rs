//! Which judge, and how it is called.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use miette::Diagnostic;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::prompt::{JudgePrompt, PromptError};
use super::readability;
use super::verdict::Form;
use crate::statistics::Scale;
use crate::suggest::did_you_mean;
use crate::tensor_file::describe_io;

/// Where models of OpenAI are; the only endpoint that gets a key without being told which.
pub const OPENAI: &str = "https://api.openai.com/v1";
/// The name of the judge that needs no endpoint.
pub const READABILITY: &str = "readability";
/// The judge prompt where none is named.
const DEFAULT_PROMPT: &str = "helpful";

/// Dollars for a million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Read.
    pub input: f64,
    /// Read, and cached by the endpoint [default: as `input`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_input: Option<f64>,
    /// Written.
    pub output: f64,
}

impl Price {
    /// What so many tokens cost; `cached` are some of those read.
    #[must_use]
    pub fn of(&self, read: u64, cached: u64, written: u64) -> f64 {
        let cached = cached.min(read);
        let dear = (read - cached) as f64 * self.input + written as f64 * self.output;
        (dear + cached as f64 * self.cached_input.unwrap_or(self.input)) / 1e6
    }
}

impl FromStr for Price {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<f64>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[input, output]) if input >= 0.0 && output >= 0.0 => Ok(Self { input, cached_input: None, output }),
            _ => Err("it is two numbers, dollars for a million tokens read and written: 0.40,1.60".into()),
        }
    }
}

/// A judge as a TOML file has it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgeConfig {
    /// The endpoint, up to where `/chat/completions` begins.
    pub base_url: Option<String>,
    /// The model that judges.
    pub model: Option<String>,
    /// The environment variable with the key.
    pub api_key_env: Option<String>,
    /// A prompt that is built in, or a MiniJinja file, relative to this one.
    pub prompt: Option<String>,
    /// A MiniJinja template of the system message, in place of the prompt's own.
    pub system: Option<String>,
    /// How the verdict is said.
    pub verdict: Option<Form>,
    /// Of the judge.
    pub temperature: Option<f64>,
    /// The most tokens that it may write.
    pub max_tokens: Option<u32>,
    /// Of the judge.
    pub seed: Option<u64>,
    /// Sent with every call as it stands.
    #[serde(default)]
    pub extra_body: Map<String, Value>,
    /// What calls cost.
    pub price: Option<Price>,
    /// Calls at the same time.
    pub concurrency: Option<u32>,
    /// The most calls a minute.
    pub rpm: Option<u32>,
    /// The most tokens a minute.
    pub tpm: Option<u32>,
    /// Seconds that a call may take.
    pub timeout: Option<f64>,
}

/// What is wrong with a judge.
#[derive(Debug, Error, Diagnostic)]
pub enum JudgeError {
    /// Nobody is named.
    #[error("no judge is named")]
    #[diagnostic(help(
        "--judge readability needs no network and measures which answer is easier to read; --judge-model NAME asks a model \
         at --judge-url; --judge FILE.toml describes one"
    ))]
    None,
    /// Neither built in nor a file.
    #[error("--judge {name}: there is no such judge, and no such file")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        #[help]
        help: String,
    },
    /// A file that is none.
    #[error("{}: {problem}", file.display())]
    #[diagnostic(help("a judge's file has at least `model`, and mostly `base_url` and `api_key_env`"))]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// An address that is none, or holds a secret.
    #[error("{what} is not the address of an endpoint")]
    #[diagnostic(help(
        "it begins with https:// or http:// and has no name, password, `?` or `#` in it: the key is read from the environment"
    ))]
    Address {
        /// Which one; not the address, which may hold a password.
        what: &'static str,
    },
    /// A value that cannot be.
    #[error("{what} is {value}")]
    #[diagnostic(help("{help}"))]
    Value {
        /// Which one.
        what: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        help: &'static str,
    },
    /// An endpoint without a model.
    #[error("it is not said which model judges")]
    #[diagnostic(help("--judge-model NAME, or `model` in the judge's file"))]
    NoModel,
    /// Arguments that mean nothing to the judge.
    #[error("{0} means nothing to --judge readability")]
    #[diagnostic(help("it calls nobody and costs nothing; leave {0} out"))]
    NoEndpoint(&'static str),
    /// The prompt.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Prompt(#[from] PromptError),
    /// Nothing is set there.
    #[error("the environment variable {0} holds no key")]
    #[diagnostic(help(
        "set it to the key, or name another with --judge-key-env; an endpoint that needs none needs no name"
    ))]
    NoKey(String),
    /// No limit can be held.
    #[error("what has no price cannot have a limit in dollars")]
    #[diagnostic(help("--price INPUT,OUTPUT says what a million tokens cost"))]
    NoPrice,
}

/// Who judges: all that verdicts depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Judge {
    /// See [`readability`].
    Readability,
    /// A model behind an endpoint.
    Endpoint(Box<EndpointJudge>),
}

/// A model that judges.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointJudge {
    /// Up to where `/chat/completions` begins.
    pub base_url: String,
    /// Its name there.
    pub model: String,
    /// What it is asked.
    pub prompt: JudgePrompt,
    /// How it says what it prefers.
    pub form: Form,
    /// Of the judge.
    pub temperature: f64,
    /// The most tokens that it may write.
    pub max_tokens: u32,
    /// Of the judge.
    pub seed: u64,
    /// Sent with every call as it stands.
    pub extra_body: Map<String, Value>,
    /// What calls cost.
    pub price: Option<Price>,
}

/// How an endpoint is called; verdicts do not depend on it.
#[derive(Debug, Clone)]
pub struct Calls {
    /// The environment variable with the key.
    pub key_env: Option<String>,
    /// At the same time.
    pub concurrency: usize,
    /// The most a minute.
    pub rpm: Option<u32>,
    /// The most tokens a minute.
    pub tpm: Option<u32>,
    /// Seconds that one may take.
    pub timeout: f64,
}

impl Calls {
    /// How `base_url` is called where nothing else is said.
    #[must_use]
    pub fn of(base_url: &str, key_env: Option<String>) -> Self {
        // a key goes to whom it belongs, and to others only where that was asked for
        let own = (base_url == OPENAI).then(|| "OPENAI_API_KEY".to_owned());
        Self { key_env: key_env.or(own), concurrency: 8, rpm: None, tpm: None, timeout: 120.0 }
    }
}

impl JudgeConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// It is not there, or is no judge.
    pub fn read(file: &Path) -> Result<Self, JudgeError> {
        let error = |problem: String| JudgeError::File { file: file.to_owned(), problem };
        let text = std::fs::read_to_string(file).map_err(|e| error(describe_io(&e)))?;
        let mut config: Self = toml::from_str(&text).map_err(|e| error(e.to_string().trim_end().to_owned()))?;
        if let Some(prompt) = &mut config.prompt
            && JudgePrompt::built_in(prompt).is_none()
        {
            let beside = file.parent().unwrap_or(Path::new(".")).join(&prompt);
            *prompt = beside.to_string_lossy().into_owned();
        }
        Ok(config)
    }

    /// The judge `name`: none for what is built in, or a file's.
    ///
    /// # Errors
    /// There is no such file.
    pub fn find(name: &str) -> Result<Option<Self>, JudgeError> {
        if name == READABILITY {
            return Ok(None);
        }
        if Path::new(name).is_file() {
            return Self::read(Path::new(name)).map(Some);
        }
        let near = did_you_mean(name, [READABILITY]).map(|near| format!("did you mean `{near}`? "));
        let help = format!(
            "{}`{READABILITY}` needs no network; a TOML file describes an endpoint; --judge-model names a model",
            near.unwrap_or_default()
        );
        Err(JudgeError::Unknown { name: name.to_owned(), help })
    }

    /// The judge that it describes, and how it is called.
    ///
    /// # Errors
    /// A value that cannot be.
    pub fn resolve(self) -> Result<(EndpointJudge, Calls), JudgeError> {
        let base_url = match &self.base_url {
            Some(url) => address(url).ok_or(JudgeError::Address { what: "the judge's base_url" })?,
            None => OPENAI.to_owned(),
        };
        let model = self.model.filter(|model| !model.trim().is_empty()).ok_or(JudgeError::NoModel)?;
        let mut prompt = JudgePrompt::find(self.prompt.as_deref().unwrap_or(DEFAULT_PROMPT))?;
        if let Some(system) = self.system {
            prompt.system = system;
        }
        let form = self.verdict.unwrap_or(prompt.form);
        let logprob = form == Form::Logprob;
        // some endpoints apply the temperature to the log-probs they give: at 0 they would all be 0 or −∞
        let temperature = self.temperature.unwrap_or(if logprob { 1.0 } else { 0.0 });
        let range = |what, value: f64, ok: bool, help| match ok && value.is_finite() {
            true => Ok(()),
            false => Err(JudgeError::Value { what, value: value.to_string(), help }),
        };
        range("temperature", temperature, temperature >= 0.0, "it is a number from 0 on")?;
        let timeout = self.timeout.unwrap_or(120.0);
        range("timeout", timeout, (0.1..=86_400.0).contains(&timeout), "it is in seconds, from 0.1 to 86400")?;
        let concurrency = self.concurrency.unwrap_or(8);
        range("concurrency", concurrency.into(), (1..=256).contains(&concurrency), "it is a number from 1 to 256")?;
        for (what, limit) in [("rpm", self.rpm), ("tpm", self.tpm)] {
            range(what, limit.unwrap_or(1).into(), limit != Some(0), "it is a number above 0")?;
        }
        let max_tokens = self.max_tokens.unwrap_or(if logprob { 1 } else { 2048 });
        range("max_tokens", max_tokens.into(), max_tokens > 0, "it is a number above 0")?;
        if let Some(Price { input, cached_input, output }) = self.price {
            for price in [input, cached_input.unwrap_or(0.0), output] {
                range("a price", price, price >= 0.0, "it is in dollars for a million tokens, from 0 on")?;
            }
        }
        let calls = Calls {
            concurrency: concurrency as usize,
            rpm: self.rpm,
            tpm: self.tpm,
            timeout,
            ..Calls::of(&base_url, self.api_key_env)
        };
        let judge = EndpointJudge {
            base_url,
            model,
            prompt,
            form,
            temperature,
            max_tokens,
            seed: self.seed.unwrap_or(0),
            extra_body: self.extra_body,
            price: self.price,
        };
        Ok((judge, calls))
    }
}

/// The address of an endpoint without a slash at its end; none where it is no address, or one with a secret in it.
#[must_use]
pub fn address(text: &str) -> Option<String> {
    let text = text.trim().trim_end_matches('/');
    let text = text.strip_suffix("/chat/completions").unwrap_or(text);
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"))?;
    let fits =
        !rest.is_empty() && !rest.contains(['@', '?', '#', ' ', '\\']) && rest.chars().all(|c| c.is_ascii_graphic());
    fits.then(|| text.to_owned())
}

impl Judge {
    /// In the headline.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Readability => format!("{READABILITY} (Flesch Reading Ease)"),
            Self::Endpoint(judge) => judge.model.clone(),
        }
    }

    /// In a folder's name.
    #[must_use]
    pub fn short_name(&self) -> String {
        match self {
            Self::Readability => READABILITY.to_owned(),
            Self::Endpoint(judge) if judge.prompt.name == DEFAULT_PROMPT => judge.model.clone(),
            Self::Endpoint(judge) => format!("{}-{}", judge.model, judge.prompt.name.trim_end_matches(".jinja")),
        }
    }

    /// Its price, where it has none itself, from what was kept of the same judge.
    #[must_use]
    pub fn with_price_of(self, kept: Option<Self>) -> Self {
        match (self, kept) {
            (Self::Endpoint(judge), Some(Self::Endpoint(kept)))
                if judge.price.is_none() && (&judge.base_url, &judge.model) == (&kept.base_url, &kept.model) =>
            {
                Self::Endpoint(Box::new(EndpointJudge { price: kept.price, ..*judge }))
            }
            (judge, _) => judge,
        }
    }

    /// Whether it is a model.
    #[must_use]
    pub fn is_model(&self) -> bool {
        matches!(self, Self::Endpoint(_))
    }

    /// For `win_rate.json`.
    #[must_use]
    pub fn json(&self) -> Value {
        match self {
            Self::Readability => json!({
                "kind": READABILITY, "name": READABILITY, "prompt": READABILITY, "measures": readability::MEASURES,
            }),
            Self::Endpoint(judge) => json!({
                "kind": "endpoint",
                "name": judge.model,
                "base_url": judge.base_url,
                "prompt": judge.prompt.name,
                "system": judge.prompt.system,
                "template": judge.prompt.user,
                "verdict": judge.form,
                "temperature": judge.temperature,
                "max_tokens": judge.max_tokens,
                "seed": judge.seed,
                "extra_body": judge.extra_body,
                "price": judge.price,
                "measures": format!("which answer {} prefers, asked by the prompt `{}`", judge.model, judge.prompt.name),
            }),
        }
    }
}

impl EndpointJudge {
    /// What its verdicts count.
    #[must_use]
    pub fn scale(&self) -> Scale {
        if self.prompt.five_levels && self.form == Form::Tag { Scale::Five } else { Scale::Three }
    }
}

impl fmt::Display for Judge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Readability => write!(f, "{}", self.name()),
            Self::Endpoint(judge) => write!(
                f,
                "{} at {}, prompt `{}`, verdicts by {}",
                judge.model,
                judge.base_url,
                judge.prompt.name,
                judge.form.name()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<(EndpointJudge, Calls), String> {
        let place = tempfile::tempdir().expect("a folder");
        let file = place.path().join("judge.toml");
        std::fs::write(&file, text).expect("written");
        JudgeConfig::read(&file).and_then(JudgeConfig::resolve).map_err(|error| error.to_string())
    }

    #[test]
    fn a_key_goes_only_where_it_belongs_or_where_that_was_said() {
        let key = |text: &str| config(text).expect("a judge").1.key_env;
        assert_eq!(key("model = \"m\"").as_deref(), Some("OPENAI_API_KEY"));
        assert_eq!(
            key("model = \"m\"\nbase_url = \"https://api.openai.com/v1/\"").as_deref(),
            Some("OPENAI_API_KEY")
        );
        assert_eq!(key("model = \"m\"\nbase_url = \"http://localhost:8000/v1\""), None);
        assert_eq!(key("model = \"m\"\nbase_url = \"https://api.openai.com.evil/v1\""), None);
        assert_eq!(key("model = \"m\"\nbase_url = \"http://a/v1\"\napi_key_env = \"K\"").as_deref(), Some("K"));
    }

    #[test]
    fn what_a_prompt_needs_is_the_default() {
        let (judge, calls) = config("model = \"m\"\nprompt = \"alpaca-clf\"").expect("a judge");
        assert_eq!((judge.form, judge.max_tokens, judge.temperature), (Form::Logprob, 1, 1.0));
        assert_eq!((calls.concurrency, calls.timeout), (8, 120.0));
        let (judge, _) = config("model = \"m\"\nprompt = \"arena\"").expect("a judge");
        assert_eq!((judge.form, judge.scale()), (Form::Tag, Scale::Five));
    }

    #[test]
    fn what_cannot_be_is_said() {
        for (text, problem) in [
            ("", "which model"),
            ("model = \"m\"\nbase_url = \"https://user:secret@host/v1\"", "not the address"),
            ("model = \"m\"\nbase_url = \"https://host/v1?key=secret\"", "not the address"),
            ("model = \"m\"\nbase_url = \"host\"", "not the address"),
            ("modle = \"m\"", "unknown field `modle`"),
            ("model = \"m\"\nconcurrency = 0", "concurrency is 0"),
            ("model = \"m\"\ntemperature = -1.0", "temperature is -1"),
            ("model = \"m\"\nprice = { input = -1.0, output = 1.0 }", "a price is -1"),
            ("model = \"m\"\nprompt = \"nonsense\"", "no judge prompt"),
        ] {
            let error = config(text).expect_err(text);
            assert!(error.contains(problem) && !error.contains("secret"), "{text}: {error}");
        }
    }

    #[test]
    fn prices() {
        let price: Price = "0.4, 1.6".parse().expect("a price");
        assert!((price.of(1_000_000, 0, 500_000) - 1.2).abs() < 1e-12);
        let price = Price { cached_input: Some(0.1), ..price };
        assert!((price.of(1_000_000, 500_000, 0) - 0.25).abs() < 1e-12);
        for wrong in ["1", "1,2,3", "a,b", "-1,2"] {
            assert!(wrong.parse::<Price>().is_err(), "{wrong}");
        }
    }
}
