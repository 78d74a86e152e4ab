//! `llama`: Llama 2 and 3, TinyLlama, SmolLM2 and everything else that calls itself `llama`.

use super::ConfigJson;
use crate::model::config::Biases;
use crate::model::{DecoderConfig, ModelError};

pub(super) fn decoder(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    config.expect_activation("silu")?;
    let attention = config.flag("attention_bias")?;
    let biases = Biases { query_key_value: attention, output: attention, mlp: config.flag("mlp_bias")? };
    Ok(DecoderConfig { biases, ..config.plain_decoder()? })
}
