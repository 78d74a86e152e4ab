//! `phi3`: q, k and v in one matrix, gate and up in another, longrope in the models for long contexts.

use super::ConfigJson;
use crate::model::{DecoderConfig, ModelError};

pub(super) fn decoder(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    config.expect_activation("silu")?;
    let mut decoder = DecoderConfig { fused: true, ..config.plain_decoder()? };
    let window = config.window()?;
    decoder.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(decoder)
}
