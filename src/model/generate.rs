//! Greedy generation with a key/value cache.

use candle_core::{Result, Tensor};

use super::Model;
use super::decoder::Adapter;
use super::layer::LayerCache;

/// When an answer ends.
#[derive(Debug, Clone)]
pub struct Stop<'a> {
    /// Tokens that end it; they are not part of the answer.
    pub tokens: &'a [u32],
    /// The most tokens it may have.
    pub max_new_tokens: usize,
}

impl Model {
    /// Continues `prompt` with the most probable token each time (the first of equals).
    ///
    /// Ends at a stop token, after `max_new_tokens`, or at the model's longest position.
    ///
    /// # Errors
    /// A token outside the vocabulary, or what candle returns.
    pub fn generate(&self, prompt: &[u32], adapter: Adapter, stop: &Stop<'_>) -> Result<Vec<u32>> {
        let config = self.decoder.config();
        let longest = config.max_position_embeddings.saturating_sub(prompt.len());
        let budget = stop.max_new_tokens.min(longest);
        let mut answer = Vec::new();
        if budget == 0 || prompt.is_empty() {
            return Ok(answer);
        }
        let width = config.num_key_value_heads * config.head_dim;
        let (dtype, device) = (self.decoder.dtype(), self.decoder.device());
        let empty = || Tensor::zeros((prompt.len() + budget, width), dtype, device);
        let cache = (0..config.num_layers())
            .map(|_| Ok(LayerCache { keys: empty()?, values: empty()? }))
            .collect::<Result<Vec<_>>>()?;
        let adapters = self.switched(adapter);
        let mut filled = prompt.len();
        let mut logits = self.decoder.step(prompt, 0, &cache, adapters)?;
        loop {
            let token = logits.argmax(0)?.to_scalar::<u32>()?;
            if stop.tokens.contains(&token) {
                return Ok(answer);
            }
            answer.push(token);
            if answer.len() == budget {
                return Ok(answer);
            }
            filled += 1;
            logits =
                if config.ropes.iter().any(|rope| rope.long.as_ref().is_some_and(|(above, _)| filled == above + 1)) {
                    // from here on all positions turn by other frequencies, those of the keys in the cache too
                    self.decoder.step(&[prompt, &answer].concat(), 0, &cache, adapters)?
                } else {
                    self.decoder.step(&[token], filled - 1, &cache, adapters)?
                };
        }
    }
}
