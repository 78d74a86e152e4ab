//! `qwen2` (biases on q, k and v) and `qwen3` (norms on the heads of q and k): Qwen 2, 2.5 and 3.

use super::{ConfigJson, Defaults};
use crate::model::config::Biases;
use crate::model::{DecoderConfig, ModelError};

pub(super) fn qwen2(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    let biases = Biases { query_key_value: true, ..Biases::default() };
    Ok(DecoderConfig { biases, ..windowed(config, Defaults::default())? })
}

pub(super) fn qwen3(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    let attention = config.flag("attention_bias")?;
    let biases = Biases { query_key_value: attention, output: attention, mlp: false };
    let defaults = Defaults { head_dim: Some(128), ..Defaults::default() };
    Ok(DecoderConfig { biases, qk_norm: true, ..windowed(config, defaults)? })
}

fn windowed(config: &ConfigJson, defaults: Defaults) -> Result<DecoderConfig, ModelError> {
    config.expect_activation("silu")?;
    let mut decoder = config.decoder_of(defaults)?;
    if config.flag("use_sliding_window")? {
        let full = config.size_or("max_window_layers", 28)?;
        config.set_windows(&mut decoder, |layer| layer >= full)?;
    }
    Ok(decoder)
}
