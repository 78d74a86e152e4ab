//! `mistral`: Llama with a window over all layers, in those versions that name one.

use super::ConfigJson;
use crate::model::{DecoderConfig, ModelError};

pub(super) fn decoder(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    config.expect_activation("silu")?;
    let mut decoder = config.plain_decoder()?;
    let window = config.window()?;
    decoder.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(decoder)
}
