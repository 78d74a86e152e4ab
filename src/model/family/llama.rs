//! `llama`: Llama 2 and 3, TinyLlama, SmolLM2 and everything else that calls itself `llama`.

use serde_json::Value;

use super::ConfigJson;
use crate::model::{DecoderConfig, ModelError};

pub(super) fn decoder(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    let hidden_act = config.get("hidden_act");
    if !(hidden_act.is_null() || hidden_act == "silu") {
        return Err(config.wrong("hidden_act", "\"silu\""));
    }
    let hidden_size = config.size("hidden_size")?;
    let num_attention_heads = config.size("num_attention_heads")?;
    let head_dim = config.size_or("head_dim", (hidden_size / num_attention_heads).max(1))?;
    // rope's table is made from it before any weight is there to contradict it
    if head_dim > 1 << 16 {
        return Err(config.error(format!("`head_dim` is {head_dim}, above 65536"), None));
    }
    Ok(DecoderConfig {
        hidden_size,
        intermediate_size: config.size("intermediate_size")?,
        num_hidden_layers: config.size("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: config.size_or("num_key_value_heads", num_attention_heads)?,
        head_dim,
        vocab_size: config.size("vocab_size")?,
        rms_norm_eps: config.number("rms_norm_eps")?,
        max_position_embeddings: config.size_or("max_position_embeddings", 2048)?,
        inverse_frequencies: inverse_frequencies(config, head_dim)?,
        tie_word_embeddings: config.flag("tie_word_embeddings")?,
        attention_bias: config.flag("attention_bias")?,
        mlp_bias: config.flag("mlp_bias")?,
    })
}

/// Rope's inverse frequencies `theta^(−2j/E)`, `j < E/2`, with the config's scaling.
///
/// transformers 5 writes `rope_parameters` with everything in it; before, `rope_theta` stood beside `rope_scaling`.
fn inverse_frequencies(config: &ConfigJson, head_dim: usize) -> Result<Vec<f32>, ModelError> {
    let scaling = match (config.get("rope_parameters"), config.get("rope_scaling")) {
        (Value::Null, scaling) => scaling,
        (parameters, _) => parameters,
    };
    let theta = match (scaling.get("rope_theta"), config.get("rope_theta")) {
        (Some(theta), _) => theta,
        (None, theta) => theta,
    };
    let theta = match theta {
        Value::Null => 10_000.0,
        theta => theta
            .as_f64()
            .filter(|t| t.is_finite() && *t > 0.0)
            .ok_or_else(|| config.error(format!("`rope_theta` is {theta}, not above zero"), None))?,
    };
    let plain = |j: usize| theta.powf(-((2 * j) as f64) / head_dim as f64);
    let frequencies = (0..head_dim / 2).map(|j| f64::from(plain(j) as f32));
    let rope_type = scaling.get("rope_type").or_else(|| scaling.get("type"));
    let parameter = |key: &str| {
        scaling
            .get(key)
            .and_then(Value::as_f64)
            .filter(|x| x.is_finite() && *x > 0.0)
            .ok_or_else(|| config.error(format!("rope scaling needs `{key}`, a number above zero"), None))
    };
    let scaled: Vec<f64> = match rope_type.and_then(Value::as_str) {
        None | Some("default") => frequencies.collect(),
        Some("linear") => {
            let factor = parameter("factor")?;
            frequencies.map(|f| f / factor).collect()
        }
        Some("llama3") => {
            let (factor, low, high) =
                (parameter("factor")?, parameter("low_freq_factor")?, parameter("high_freq_factor")?);
            let context = parameter("original_max_position_embeddings")?;
            frequencies.map(|f| llama3(f, factor, low, high, context)).collect()
        }
        Some(other) => {
            let help = "supported: default, linear, llama3".to_owned();
            return Err(config.error(format!("rope scaling `{other}` is not supported"), Some(help)));
        }
    };
    Ok(scaled.into_iter().map(|f| f as f32).collect())
}

/// Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between blended.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, context: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / frequency;
    if wavelength > context / low {
        frequency / factor
    } else if wavelength < context / high {
        frequency
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}
