//! Model families: a file for each `model_type` of Hugging Face's `config.json`, which becomes a [`DecoderConfig`].
//!
//! A GGUF file says the same under other names, and is read by the same functions.
//!
//! | `model_type` | GGUF architecture | file |
//! |---|---|---|
//! | `llama` (Llama 2 and 3, TinyLlama, SmolLM2) | `llama` | `llama` |
//! | `mistral` | `llama` | `mistral` |
//! | `qwen2` (and 2.5), `qwen3` | `qwen2`, `qwen3` | `qwen` |
//! | `gemma2`, `gemma3_text`, the text part of `gemma3` | `gemma2`, `gemma3` | `gemma` |
//! | `phi3` (Phi 3 and 3.5, Phi 4) | `phi3` | `phi3` |
//! | `smollm3` | `smollm3` | `smollm3` |
//!
//! To add one: its file with `fn decoder(&ConfigJson) -> Result<DecoderConfig, ModelError>`, a variant of [`Family`],
//! and golden logits beside the others.

mod gemma;
mod gguf;
mod llama;
mod mistral;
mod phi3;
mod qwen;
mod rope;
mod smollm3;

use std::path::{Path, PathBuf};

pub use gguf::{Description, describe, difference, is_paired, read_gguf};
use serde_json::Value;

use super::config::{Biases, LayerConfig};
use super::{DecoderConfig, ModelError};
use crate::ops::glu::Activation;
use crate::quant::Quant;
use crate::tensor_file::read_text;

/// The families the decoder can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `llama`
    Llama,
    /// `mistral`
    Mistral,
    /// `qwen2`
    Qwen2,
    /// `qwen3`
    Qwen3,
    /// `gemma2`
    Gemma2,
    /// `gemma3_text`
    Gemma3,
    /// `gemma3`, of which the text part is used.
    Gemma3WithImages,
    /// `phi3`
    Phi3,
    /// `smollm3`
    SmolLm3,
}

impl Family {
    /// All of them, with their `model_type`.
    pub const ALL: [(&str, Self); 9] = [
        ("llama", Self::Llama),
        ("mistral", Self::Mistral),
        ("qwen2", Self::Qwen2),
        ("qwen3", Self::Qwen3),
        ("gemma2", Self::Gemma2),
        ("gemma3_text", Self::Gemma3),
        ("gemma3", Self::Gemma3WithImages),
        ("phi3", Self::Phi3),
        ("smollm3", Self::SmolLm3),
    ];
}

/// Reads `config.json` of a model folder.
///
/// # Errors
/// The file is missing or broken, or describes a model that the decoder is not.
pub fn read_config(folder: &Path) -> Result<DecoderConfig, ModelError> {
    let file = folder.join("config.json");
    let text = read_text(&file)?;
    let value = serde_json::from_str(&text).map_err(|e| ModelError::File {
        file: file.clone(),
        problem: format!("is no JSON: {e}"),
        help: None,
    })?;
    from_json(&file, value)
}

/// The decoder that a config describes; `file` is named in errors.
///
/// # Errors
/// See [`read_config`].
pub fn from_json(file: &Path, value: Value) -> Result<DecoderConfig, ModelError> {
    ConfigJson { file: file.to_owned(), value, gguf: None }.read()
}

/// A `config.json`, or a GGUF file's metadata under the same names, with errors that name the file and the field.
#[derive(Debug)]
pub struct ConfigJson {
    file: PathBuf,
    value: Value,
    /// The architecture, where it is a GGUF file's metadata.
    gguf: Option<String>,
}

/// What a family's files may leave out; `None` has to be there.
#[derive(Debug, Clone, Copy)]
struct Defaults {
    num_attention_heads: Option<usize>,
    /// None: as many as query heads.
    num_key_value_heads: Option<usize>,
    /// None: the hidden size over the query heads.
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    rms_norm_eps: Option<f64>,
    tie_word_embeddings: bool,
    rope_theta: f64,
    /// Whether there is one table for all layers.
    rope: bool,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            num_attention_heads: None,
            num_key_value_heads: None,
            head_dim: None,
            vocab_size: None,
            rms_norm_eps: None,
            tie_word_embeddings: false,
            rope_theta: 1e4,
            rope: true,
        }
    }
}

/// Why a model that is not supported is not, where its name says it.
fn refusal(model_type: &str) -> Option<&'static str> {
    const EXPERTS: [&str; 14] = [
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "olmoe",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "granitemoe",
        "phimoe",
        "dbrx",
        "jamba",
        "glm4_moe",
        "llama4_text",
    ];
    const SENSES: [&str; 16] = [
        "llava",
        "llava_next",
        "mllama",
        "llama4",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen2_audio",
        "idefics3",
        "smolvlm",
        "paligemma",
        "gemma3n",
        "mistral3",
        "phi4_multimodal",
        "internvl",
        "pixtral",
    ];
    if EXPERTS.contains(&model_type) {
        Some("is a mixture of experts; only dense models are trained")
    } else if SENSES.contains(&model_type) {
        Some("reads images or sound; only language models are trained")
    } else {
        None
    }
}

const UNQUANTIZED: &str =
    "read are bitsandbytes' nf4 and GGUF files; or take the original model, and `quant` in [model]";

impl ConfigJson {
    fn read(mut self) -> Result<DecoderConfig, ModelError> {
        if !self.value.is_object() {
            return Err(self.error("is no JSON object".into(), None));
        }
        let model_type = self.text("model_type")?.to_owned();
        let quant = self.quantization()?;
        let Some((_, family)) = Family::ALL.iter().find(|(name, _)| *name == model_type) else {
            let known = Family::ALL.map(|(name, _)| name).join(", ");
            let why = refusal(&model_type).unwrap_or("is not supported");
            return Err(
                self.error(format!("`model_type` is `{model_type}`: it {why}"), Some(format!("supported: {known}")))
            );
        };
        let decoder = match family {
            Family::Llama => llama::decoder(&self)?,
            Family::Mistral => mistral::decoder(&self)?,
            Family::Qwen2 => qwen::qwen2(&self)?,
            Family::Qwen3 => qwen::qwen3(&self)?,
            Family::Gemma2 => gemma::gemma2(&self)?,
            Family::Gemma3 => gemma::gemma3(&self)?,
            Family::Gemma3WithImages => {
                self.value = self.get("text_config").clone();
                if !self.value.is_object() {
                    return Err(self.error("`text_config` is missing".into(), None));
                }
                DecoderConfig { root: "model.language_model", ..gemma::gemma3(&self)? }
            }
            Family::Phi3 => phi3::decoder(&self)?,
            Family::SmolLm3 => smollm3::decoder(&self)?,
        };
        self.check(&decoder)?;
        Ok(DecoderConfig { quant, ..decoder })
    }

    /// How the file's matrices are quantized already.
    fn quantization(&self) -> Result<Quant, ModelError> {
        let config = self.get("quantization_config");
        if config.is_null() {
            return Ok(Quant::None);
        }
        let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or("unnamed");
        match (text("quant_method"), text("bnb_4bit_quant_type")) {
            ("bitsandbytes", "nf4") => Ok(Quant::Nf4),
            ("bitsandbytes", kind) if config.get("load_in_4bit") == Some(&Value::Bool(true)) => Err(self
                .error(format!("its weights are quantized by bitsandbytes as `{kind}`"), Some(UNQUANTIZED.into()))),
            (method, _) => {
                Err(self.error(format!("its weights are quantized by `{method}`"), Some(UNQUANTIZED.into())))
            }
        }
    }

    /// A decoder with nothing special, as Llama is.
    fn plain_decoder(&self) -> Result<DecoderConfig, ModelError> {
        self.decoder_of(Defaults::default())
    }

    fn decoder_of(&self, defaults: Defaults) -> Result<DecoderConfig, ModelError> {
        let size = |key, default: Option<usize>| match default {
            Some(default) => self.size_or(key, default),
            None => self.size(key),
        };
        let hidden_size = self.size("hidden_size")?;
        let num_attention_heads = size("num_attention_heads", defaults.num_attention_heads)?;
        let key_value_heads = defaults.num_key_value_heads.unwrap_or(num_attention_heads);
        let head_dim = self.head_dim(defaults.head_dim.unwrap_or((hidden_size / num_attention_heads).max(1)))?;
        let layers = self.size("num_hidden_layers")?;
        // the list of layers is made from it before any weight is there to contradict it
        if layers > 1 << 12 {
            return Err(self.error(format!("`{}` is {layers}, above 4096", self.name("num_hidden_layers")), None));
        }
        let experts = ["num_local_experts", "num_experts", "n_routed_experts"];
        if let Some(key) = experts.into_iter().find(|key| self.get(key).as_u64().is_some_and(|n| n > 0)) {
            let problem = format!(
                "`{}` is {}: it is a mixture of experts; only dense models are trained",
                self.name(key),
                self.get(key)
            );
            return Err(self.error(problem, None));
        }
        let ropes = if defaults.rope { vec![self.rope(head_dim, defaults.rope_theta)?] } else { Vec::new() };
        let epsilon = match defaults.rms_norm_eps {
            Some(default) => self.number_or("rms_norm_eps", default)?,
            None => self.number("rms_norm_eps")?,
        };
        Ok(DecoderConfig {
            hidden_size,
            intermediate_size: self.size("intermediate_size")?,
            layers: vec![LayerConfig { rope: Some(0), window: None }; layers],
            num_attention_heads,
            num_key_value_heads: self.size_or("num_key_value_heads", key_value_heads)?,
            head_dim,
            vocab_size: size("vocab_size", defaults.vocab_size)?,
            rms_norm_eps: epsilon,
            max_position_embeddings: self.size_or("max_position_embeddings", 2048)?,
            ropes,
            tie_word_embeddings: self.flag_or("tie_word_embeddings", defaults.tie_word_embeddings)?,
            biases: Biases::default(),
            qk_norm: false,
            post_norms: false,
            norm_offset: false,
            fused: false,
            activation: Activation::Silu,
            attention_scale: (head_dim as f64).powf(-0.5),
            attention_softcap: None,
            logit_softcap: None,
            embedding_scale: 1.0,
            quant: Quant::None,
            quantized_bytes: None,
            root: "model",
        })
    }

    fn head_dim(&self, default: usize) -> Result<usize, ModelError> {
        let head_dim = self.size_or("head_dim", default)?;
        // rope's table is made from it before any weight is there to contradict it
        if head_dim > 1 << 16 {
            return Err(self.error(format!("`{}` is {head_dim}, above 65536", self.name("head_dim")), None));
        }
        Ok(head_dim)
    }

    fn expect_activation(&self, name: &str) -> Result<(), ModelError> {
        let given = self.get("hidden_act");
        if given.is_null() || given == name { Ok(()) } else { Err(self.wrong("hidden_act", &format!("\"{name}\""))) }
    }

    /// The window that all layers have.
    fn window(&self) -> Result<Option<usize>, ModelError> {
        if self.get("sliding_window").is_null() { Ok(None) } else { self.size("sliding_window").map(Some) }
    }

    /// Gives those layers a window that `layer_types` names, or else `by_default`.
    fn set_windows(&self, decoder: &mut DecoderConfig, by_default: impl Fn(usize) -> bool) -> Result<(), ModelError> {
        let types = match self.get("layer_types") {
            Value::Null => None,
            Value::Array(types) if types.len() == decoder.num_layers() => Some(types),
            _ => return Err(self.wrong("layer_types", "a list with one for each layer")),
        };
        for i in 0..decoder.num_layers() {
            let windowed = match types.map(|types| &types[i]) {
                None => by_default(i),
                Some(kind) if kind == "sliding_attention" => true,
                Some(kind) if kind == "full_attention" => false,
                Some(kind) => {
                    let problem = format!("`layer_types` has {kind} for layer {i}");
                    return Err(self.error(problem, Some("supported: sliding_attention, full_attention".into())));
                }
            };
            if windowed {
                decoder.layers[i].window = Some(self.size_or("sliding_window", 4096)?);
            }
        }
        Ok(())
    }

    fn is_gguf(&self) -> bool {
        self.gguf.is_some()
    }

    /// What the file calls a field.
    fn name(&self, key: &str) -> String {
        let suffix = gguf::KEYS.iter().find(|(name, _)| *name == key).map(|(_, suffix)| suffix);
        match self.gguf.as_ref().zip(suffix) {
            Some((architecture, suffix)) => format!("{architecture}.{suffix}"),
            None => key.to_owned(),
        }
    }

    fn error(&self, problem: String, help: Option<String>) -> ModelError {
        ModelError::File { file: self.file.clone(), problem, help }
    }

    /// A field, null where it is missing.
    fn get(&self, key: &str) -> &Value {
        self.value.get(key).unwrap_or(&Value::Null)
    }

    fn has(&self, key: &str) -> bool {
        self.value.get(key).is_some()
    }

    fn wrong(&self, key: &str, expected: &str) -> ModelError {
        let name = self.name(key);
        match self.get(key) {
            Value::Null => self.error(format!("`{name}` is missing"), None),
            value => self.error(format!("`{name}` is {value}, not {expected}"), None),
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

    fn number_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        if self.get(key).is_null() { Ok(default) } else { self.number(key) }
    }

    fn flag(&self, key: &str) -> Result<bool, ModelError> {
        self.flag_or(key, false)
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            Value::Null => Ok(default),
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
        assert_eq!(text, "`model_type` is `mamba`: it is not supported");
        assert!(help.starts_with("supported: llama, mistral, "), "{help}");
        assert!(problem("model_type", json!("mixtral")).0.contains("is a mixture of experts"));
        assert!(problem("num_local_experts", json!(8)).0.contains("is a mixture of experts"));
        assert!(problem("model_type", json!("qwen2_vl")).0.contains("reads images"));
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
        let plain = read(|_| {}).expect("read").ropes[0].inverse_frequencies.clone();
        let scaled =
            read(|config| drop(config.insert("rope_scaling".into(), json!({"type": "linear", "factor": 4.0}))));
        let scaled = scaled.expect("read").ropes[0].inverse_frequencies.clone();
        assert_eq!(scaled, plain.iter().map(|f| f / 4.0).collect::<Vec<_>>());
    }
}
