//! Model families: a file for each `model_type` of Hugging Face's `config.json`, which becomes a [`DecoderConfig`].
//!
//! | `model_type` | file |
//! |---|---|
//! | `llama` (Llama 2 and 3, TinyLlama, SmolLM2) | `llama` |
//!
//! To add one: its file with `fn decoder(&ConfigJson) -> Result<DecoderConfig, ModelError>`, a variant of [`Family`],
//! and golden logits beside the others.

mod llama;

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{DecoderConfig, ModelError};
use crate::tensor_file::read_text;

/// The families the decoder can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `llama`
    Llama,
}

impl Family {
    /// All of them, with their `model_type`.
    pub const ALL: [(&str, Self); 1] = [("llama", Self::Llama)];
}

/// Reads `config.json` of a model folder.
///
/// # Errors
/// The file is missing or broken, or describes a model that the decoder is not.
pub fn read_config(folder: &Path) -> Result<DecoderConfig, ModelError> {
    let config = ConfigJson::read(&folder.join("config.json"))?;
    let model_type = config.text("model_type")?;
    let Some((_, family)) = Family::ALL.iter().find(|(name, _)| *name == model_type) else {
        let known = Family::ALL.map(|(name, _)| name).join(", ");
        return Err(config.error(
            format!("model_type is `{model_type}`, which is not supported"),
            Some(format!("supported: {known}")),
        ));
    };
    let decoder = match family {
        Family::Llama => llama::decoder(&config)?,
    };
    config.check(&decoder)?;
    Ok(decoder)
}

/// A `config.json`, with errors that name the file and the field.
#[derive(Debug)]
pub struct ConfigJson {
    file: PathBuf,
    value: Value,
}

impl ConfigJson {
    fn read(file: &Path) -> Result<Self, ModelError> {
        let text = read_text(file)?;
        let error = |problem: String| ModelError::File { file: file.to_owned(), problem, help: None };
        let value: Value = serde_json::from_str(&text).map_err(|e| error(format!("is no JSON: {e}")))?;
        if value.is_object() {
            Ok(Self { file: file.to_owned(), value })
        } else {
            Err(error("is no JSON object".into()))
        }
    }

    fn error(&self, problem: String, help: Option<String>) -> ModelError {
        ModelError::File { file: self.file.clone(), problem, help }
    }

    /// A field, null where it is missing.
    fn get(&self, key: &str) -> &Value {
        self.value.get(key).unwrap_or(&Value::Null)
    }

    fn wrong(&self, key: &str, expected: &str) -> ModelError {
        match self.get(key) {
            Value::Null => self.error(format!("`{key}` is missing"), None),
            value => self.error(format!("`{key}` is {value}, not {expected}"), None),
        }
    }

    fn text(&self, key: &str) -> Result<&str, ModelError> {
        self.get(key).as_str().ok_or_else(|| self.wrong(key, "a string"))
    }

    /// A size: a whole number from 1 to 2^31. Larger ones would overflow products before any memory runs out.
    fn size(&self, key: &str) -> Result<usize, ModelError> {
        let number = self.get(key).as_u64().filter(|n| (1..=1 << 31).contains(n));
        number.map(|n| n as usize).ok_or_else(|| self.wrong(key, "a whole number from 1 to 2^31"))
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        if self.get(key).is_null() { Ok(default) } else { self.size(key) }
    }

    fn number(&self, key: &str) -> Result<f64, ModelError> {
        self.get(key).as_f64().filter(|n| n.is_finite()).ok_or_else(|| self.wrong(key, "a number"))
    }

    fn flag(&self, key: &str) -> Result<bool, ModelError> {
        match self.get(key) {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(*flag),
            _ => Err(self.wrong(key, "true or false")),
        }
    }

    /// What holds for every decoder.
    fn check(&self, config: &DecoderConfig) -> Result<(), ModelError> {
        if config.num_attention_heads % config.num_key_value_heads != 0 {
            let problem = format!(
                "{} attention heads are no multiple of {} key/value heads",
                config.num_attention_heads, config.num_key_value_heads
            );
            return Err(self.error(problem, None));
        }
        if config.head_dim % 2 != 0 {
            return Err(self.error(format!("`head_dim` is {}, which is odd", config.head_dim), None));
        }
        Ok(())
    }
}
