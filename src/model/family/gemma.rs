//! `gemma2` and `gemma3`: norms of `1 + w` before and behind attention and MLP, scaled embeddings, GeGLU, layers with a
//! window between layers that see everything. Gemma 2 caps scores and logits, Gemma 3 has norms on the heads of q and k and
//! a second rope for its windows.

use super::ConfigJson;
use crate::model::config::Biases;
use crate::model::{DecoderConfig, ModelError};
use crate::ops::glu::Activation;

/// The sizes that Google's own files leave out are those of transformers' configs.
const HEADS: usize = 8;
const KEY_VALUE_HEADS: usize = 4;
const HEAD_DIM: usize = 256;
const SCALAR: f64 = 256.0;

pub(super) fn gemma2(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    let decoder = common(config, 256_000)?;
    let mut decoder = DecoderConfig {
        attention_softcap: cap(config, "attn_logit_softcapping", 50.0)?,
        logit_softcap: cap(config, "final_logit_softcapping", 30.0)?,
        ropes: vec![config.rope(decoder.head_dim, 1e4)?],
        ..decoder
    };
    config.set_windows(&mut decoder, |layer| layer % 2 == 0)?;
    Ok(decoder)
}

pub(super) fn gemma3(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    let decoder = common(config, 262_208)?;
    let mut decoder = DecoderConfig {
        qk_norm: true,
        attention_softcap: cap(config, "attn_logit_softcapping", 0.0)?,
        logit_softcap: cap(config, "final_logit_softcapping", 0.0)?,
        ropes: config.global_and_local_rope(decoder.head_dim)?.into(),
        ..decoder
    };
    let pattern = config.size_or("sliding_window_pattern", 6)?;
    config.set_windows(&mut decoder, |layer| !(layer + 1).is_multiple_of(pattern))?;
    decoder.layers.iter_mut().filter(|layer| layer.window.is_some()).for_each(|layer| layer.rope = Some(1));
    Ok(decoder)
}

fn common(config: &ConfigJson, vocabulary: usize) -> Result<DecoderConfig, ModelError> {
    if !config.get("hidden_activation").is_null() || !config.get("hidden_act").is_null() {
        let key = if config.get("hidden_activation").is_null() { "hidden_act" } else { "hidden_activation" };
        if config.get(key) != "gelu_pytorch_tanh" {
            return Err(config.wrong(key, "\"gelu_pytorch_tanh\""));
        }
    }
    if config.flag("use_bidirectional_attention")? {
        return Err(config.error("`use_bidirectional_attention` is true: this is no causal model".into(), None));
    }
    let attention = config.flag("attention_bias")?;
    let scalar = config.number_or("query_pre_attn_scalar", SCALAR)?;
    let head_dim = config.head_dim(HEAD_DIM)?;
    let decoder = config.decoder_of(super::Defaults {
        num_attention_heads: Some(HEADS),
        num_key_value_heads: Some(KEY_VALUE_HEADS),
        head_dim: Some(HEAD_DIM),
        vocab_size: Some(vocabulary),
        rms_norm_eps: Some(1e-6),
        tie_word_embeddings: true,
        // both files' own tables are set by the caller
        rope_theta: 1e4,
        rope: false,
    })?;
    Ok(DecoderConfig {
        head_dim,
        biases: Biases { query_key_value: attention, output: attention, mlp: false },
        post_norms: true,
        norm_offset: !config.is_gguf(),
        activation: Activation::GeluTanh,
        attention_scale: scalar.powf(-0.5),
        embedding_scale: (decoder.hidden_size as f64).sqrt(),
        ..decoder
    })
}

/// A cap, of which zero and null are none.
fn cap(config: &ConfigJson, key: &str, default: f64) -> Result<Option<f64>, ModelError> {
    let given = config.has(key) && config.get(key).is_null();
    let cap = if given { 0.0 } else { config.number_or(key, default)? };
    Ok((cap > 0.0).then_some(cap))
}
