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
        if !config.num_attention_heads.is_multiple_of(config.num_key_value_heads) {
            let problem = format!(
                "{} attention heads are no multiple of {} key/value heads",
                config.num_attention_heads, config.num_key_value_heads
            );
            return Err(self.error(problem, None));
        }
        if !config.head_dim.is_multiple_of(2) {
            return Err(self.error(format!("`head_dim` is {}, which is odd", config.head_dim), None));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::tests::GROUPED;

    /// What `config.json` becomes after `change`.
    fn read(change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> Result<DecoderConfig, ModelError> {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = GROUPED.config_json();
        change(config.as_object_mut().expect("an object"));
        std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
        read_config(folder.path())
    }

    fn problem(key: &str, value: Value) -> (String, String) {
        match read(|config| drop(config.insert(key.into(), value))) {
            Err(ModelError::File { file, problem, help }) => {
                assert!(file.ends_with("config.json"));
                (problem, help.unwrap_or_default())
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_unsupported_model_type_is_named_with_those_that_are() {
        let (text, help) = problem("model_type", json!("mamba"));
        assert_eq!(text, "model_type is `mamba`, which is not supported");
        assert_eq!(help, "supported: llama");
        assert_eq!(problem("model_type", Value::Null).0, "`model_type` is missing");
    }

    #[test]
    fn a_broken_field_is_named() {
        for (key, value, expected) in [
            ("hidden_size", Value::Null, "`hidden_size` is missing"),
            ("hidden_size", json!(0), "`hidden_size` is 0, not a whole number from 1 to 2^31"),
            ("vocab_size", json!(1u64 << 40), "`vocab_size` is 1099511627776, not a whole number from 1 to 2^31"),
            ("num_hidden_layers", json!("two"), "`num_hidden_layers` is \"two\", not a whole number from 1 to 2^31"),
            ("num_key_value_heads", json!(3), "4 attention heads are no multiple of 3 key/value heads"),
            ("head_dim", json!(5), "`head_dim` is 5, which is odd"),
            ("head_dim", json!(1 << 30), "`head_dim` is 1073741824, above 65536"),
            ("attention_bias", json!(1), "`attention_bias` is 1, not true or false"),
            ("hidden_act", json!("gelu"), "`hidden_act` is \"gelu\", not \"silu\""),
            ("rms_norm_eps", json!("small"), "`rms_norm_eps` is \"small\", not a number"),
            ("rope_theta", json!(-1.0), "`rope_theta` is -1.0, not above zero"),
            ("rope_scaling", json!({"rope_type": "yarn"}), "rope scaling `yarn` is not supported"),
            ("rope_scaling", json!({"type": "linear"}), "rope scaling needs `factor`, a number above zero"),
        ] {
            assert_eq!(problem(key, value).0, expected);
        }
    }

    /// Before transformers 5 `rope_theta` stood beside `rope_scaling`; most models on the hub are written so.
    #[test]
    fn both_spellings_of_rope_scaling_are_one() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64});
        let before = read(|config| {
            config.insert("rope_theta".into(), json!(5000.0));
            config.insert("rope_scaling".into(), scaling.clone());
        });
        let since = read(|config| {
            config.remove("rope_theta");
            let mut parameters = scaling.clone();
            parameters["rope_theta"] = json!(5000.0);
            config.insert("rope_parameters".into(), parameters);
        });
        let plain = read(|config| drop(config.insert("rope_theta".into(), json!(5000.0)))).expect("read");
        let before = before.expect("read");
        assert_ne!(before, plain);
        assert_eq!(before, since.expect("read"));
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = read(|_| {}).expect("read").inverse_frequencies;
        let scaled =
            read(|config| drop(config.insert("rope_scaling".into(), json!({"type": "linear", "factor": 4.0}))));
        let scaled = scaled.expect("read").inverse_frequencies;
        assert_eq!(scaled, plain.iter().map(|f| f / 4.0).collect::<Vec<_>>());
    }
}
