//! Ollama's Modelfile.

use std::fmt::Write;
use std::path::Path;

use crate::data::Codec;

/// A Modelfile on the model `from`, with an `adapter` folder on top if there is one.
///
/// The chat template is left for Ollama to take from the model itself, as one that is written here would have to be
/// translated into Go's template language; what ends an answer is said.
#[must_use]
pub fn modelfile(from: &Path, adapter: Option<&Path>, codec: &Codec) -> String {
    let mut text = format!("FROM {}\n", from.display());
    if let Some(adapter) = adapter {
        let _ = writeln!(text, "ADAPTER {}", adapter.display());
    }
    for token in codec.stop_tokens().iter().filter_map(|&id| codec.token(id)) {
        // in quotes, whose own are escaped
        let _ = writeln!(text, "PARAMETER stop {}", serde_json::Value::from(token));
    }
    text
}
