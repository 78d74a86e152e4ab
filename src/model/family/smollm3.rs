//! `smollm3`: Llama with layers that know of no positions, every fourth where the file does not say otherwise.

use serde_json::Value;

use super::{ConfigJson, Defaults};
use crate::model::config::Biases;
use crate::model::{DecoderConfig, ModelError};

pub(super) fn decoder(config: &ConfigJson) -> Result<DecoderConfig, ModelError> {
    config.expect_activation("silu")?;
    let attention = config.flag("attention_bias")?;
    let biases = Biases { query_key_value: attention, output: attention, mlp: config.flag("mlp_bias")? };
    let defaults = Defaults { tie_word_embeddings: true, rope_theta: 2e6, ..Defaults::default() };
    let mut decoder = DecoderConfig { biases, ..config.decoder_of(defaults)? };
    let interval = config.size_or("no_rope_layer_interval", 4)?;
    let named: Option<Vec<bool>> = match config.get("no_rope_layers") {
        Value::Null => None,
        list => {
            let flags = list.as_array().and_then(|list| list.iter().map(|x| x.as_u64().map(|x| x != 0)).collect());
            let flags: Option<Vec<bool>> = flags;
            let flags = flags.filter(|flags| flags.len() == decoder.num_layers());
            Some(flags.ok_or_else(|| config.wrong("no_rope_layers", "a list of 0 and 1, one for each layer"))?)
        }
    };
    for (i, layer) in decoder.layers.iter_mut().enumerate() {
        let turns = named.as_ref().map_or((i + 1) % interval != 0, |named| named[i]);
        layer.rope = turns.then_some(0);
    }
    if config.flag("use_sliding_window")? {
        config.set_windows(&mut decoder, |_| false)?;
    }
    Ok(decoder)
}
