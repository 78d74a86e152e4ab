//! A GGUF file's metadata under the names of `config.json`, so that the families' own files read it; and the other way
//! round, as llama.cpp's `convert_hf_to_gguf.py` writes it.

use serde_json::{Map, Number, Value, json};

use super::{ConfigJson, DecoderConfig};
use crate::gguf::{self, GgufFile};
use crate::model::{ModelError, Rope};

/// GGUF architectures with their `model_type`.
const ARCHITECTURES: [(&str, &str); 7] = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3_text"),
    ("phi3", "phi3"),
    ("smollm3", "smollm3"),
];

/// Whether llama.cpp has q and k of an architecture with the two halves of each head's rows between each other. See
/// [`paired_row`](crate::quant::paired_row).
#[must_use]
pub fn is_paired(architecture: &str) -> bool {
    ["llama", "smollm3"].contains(&architecture)
}

/// Fields of `config.json` with what follows the architecture in GGUF's keys.
pub(super) const KEYS: [(&str, &str); 18] = [
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("vocab_size", "vocab_size"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("max_position_embeddings", "context_length"),
    ("rope_theta", "rope.freq_base"),
    ("sliding_window", "attention.sliding_window"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("num_local_experts", "expert_count"),
    ("original_max_position_embeddings", "rope.scaling.original_context_length"),
    ("rope_local_base_freq", "rope.freq_base_swa"),
    ("rope_factor", "rope.scaling.factor"),
    ("attention_factor", "rope.scaling.attn_factor"),
];

/// Reads the decoder that a GGUF file holds. No weight is read.
///
/// # Errors
/// The file describes a model that the decoder is not.
pub fn read_gguf(file: &GgufFile) -> Result<DecoderConfig, ModelError> {
    let wrong =
        |problem: String, help: Option<String>| ModelError::File { file: file.path().to_owned(), problem, help };
    let architecture = file.metadata("general.architecture").and_then(gguf::Value::as_str);
    let architecture =
        architecture.ok_or_else(|| wrong("metadata `general.architecture` is missing".into(), None))?;
    let Some((_, model_type)) = ARCHITECTURES.iter().find(|(name, _)| *name == architecture) else {
        let known = ARCHITECTURES.map(|(name, _)| name).join(", ");
        let why = super::refusal(architecture).unwrap_or("is not supported");
        return Err(wrong(
            format!("its architecture is `{architecture}`: it {why}"),
            Some(format!("supported: {known}")),
        ));
    };
    if file.metadata("split.count").and_then(gguf::Value::as_u64).is_some_and(|n| n > 1) {
        let help = "llama.cpp joins them: llama-gguf-split --merge FIRST-PART WHOLE.gguf";
        return Err(wrong("is one part of a model in several files".into(), Some(help.into())));
    }
    let mut value = Map::new();
    value.insert("model_type".into(), json!(model_type));
    let mut put = |key: &str, given: Value| drop(value.insert(key.into(), given));
    for (key, suffix) in KEYS {
        // Phi 3's converter writes no window as 0
        let none = |given: &gguf::Value| key == "sliding_window" && given.as_u64() == Some(0);
        if let Some(given) = file.metadata(&format!("{architecture}.{suffix}")).filter(|given| !none(given)) {
            put(key, plain(given));
        }
    }
    let tokens = file.metadata("tokenizer.ggml.tokens").and_then(gguf::Value::as_array).map(<[_]>::len);
    let embedding = file.tensor("token_embd.weight").and_then(|tensor| tensor.shape.first().copied());
    if let Some(size) = embedding.or(tokens) {
        put("vocab_size", json!(size));
    }
    put("tie_word_embeddings", json!(file.tensor("output.weight").is_none()));
    for (key, tensor) in [("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")] {
        put(key, json!(file.tensor(tensor).is_some()));
    }
    let scaling = scaling(file, architecture, &wrong)?;
    if let Some(scaling) = scaling {
        put("rope_scaling", scaling);
    }
    // the one size of which the files say nothing: llama.cpp knows the largest of each by its number of layers
    let layers = file.metadata(&format!("{architecture}.block_count")).and_then(gguf::Value::as_u64);
    let scalar = match (architecture, layers) {
        ("gemma2", Some(46)) => Some(json!(144)),
        ("gemma3", Some(62)) => Some(json!(168)),
        ("gemma2" | "gemma3", _) => value.get("head_dim").cloned(),
        _ => None,
    };
    if let Some(scalar) = scalar {
        value.insert("query_pre_attn_scalar".into(), scalar);
    }
    let decoder =
        ConfigJson { file: file.path().to_owned(), value: Value::Object(value), gguf: Some(architecture.into()) }
            .read()?;
    let decoder = divided(file, decoder)?;
    let linears = file.tensors().filter(|(_, tensor)| tensor.shape.len() == 2);
    let quantized_bytes = Some(linears.map(|(_, tensor)| tensor.num_bytes()).sum());
    Ok(DecoderConfig { quantized_bytes, ..decoder })
}

/// Rope's scaling as `config.json` has it.
fn scaling(
    file: &GgufFile,
    architecture: &str,
    wrong: &impl Fn(String, Option<String>) -> ModelError,
) -> Result<Option<Value>, ModelError> {
    let key = |suffix: &str| file.metadata(&format!("{architecture}.rope.scaling.{suffix}"));
    let vector = |name: &str| -> Result<Option<Vec<f32>>, ModelError> {
        let Some(tensor) = file.tensor(name) else { return Ok(None) };
        let len = tensor.shape.first().copied().unwrap_or(0);
        Ok(Some(file.vector(name, len)?))
    };
    if let (Some(long), Some(short)) = (vector("rope_factors_long.weight")?, vector("rope_factors_short.weight")?) {
        let mut scaling = json!({"rope_type": "longrope", "long_factor": long, "short_factor": short});
        if let Some(factor) = key("attn_factor").and_then(gguf::Value::as_f64) {
            scaling["attention_factor"] = json!(factor);
        }
        return Ok(Some(scaling));
    }
    match key("type").and_then(gguf::Value::as_str) {
        None | Some("none") => Ok(None),
        Some("linear") => {
            Ok(Some(json!({"rope_type": "linear", "factor": key("factor").map_or(Value::Null, plain)})))
        }
        Some(other) => {
            let help = "supported: none, linear, and factors in tensors of the file".to_owned();
            Err(wrong(
                format!("metadata `{architecture}.rope.scaling.type` is `{other}`, which is not supported"),
                Some(help),
            ))
        }
    }
}

/// Llama 3.1's scaling comes as what each frequency is divided by.
fn divided(file: &GgufFile, mut decoder: DecoderConfig) -> Result<DecoderConfig, ModelError> {
    const NAME: &str = "rope_freqs.weight";
    if file.tensor(NAME).is_some() {
        for rope in &mut decoder.ropes {
            let factors = file.vector(NAME, rope.inverse_frequencies.len())?;
            rope.inverse_frequencies.iter_mut().zip(factors).for_each(|(f, factor)| *f /= factor);
        }
    }
    Ok(decoder)
}

/// What a decoder is in a GGUF file, but for its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// `general.architecture`
    pub architecture: &'static str,
    /// Everything under the architecture's name.
    pub metadata: Vec<(String, gguf::Value)>,
    /// Vectors that rope's scaling is given by.
    pub tensors: Vec<(&'static str, Vec<f32>)>,
}

/// Describes a decoder as llama.cpp's converter does.
#[must_use]
pub fn describe(config: &DecoderConfig) -> Description {
    let turns_everywhere = config.layers.iter().all(|layer| layer.rope.is_some());
    let architecture = match () {
        () if config.fused => "phi3",
        () if config.post_norms && config.qk_norm => "gemma3",
        () if config.post_norms => "gemma2",
        () if config.qk_norm => "qwen3",
        () if !turns_everywhere => "smollm3",
        () if config.biases.query_key_value && !config.biases.output => "qwen2",
        () => "llama",
    };
    let mut metadata: Vec<(String, gguf::Value)> = Vec::new();
    let mut put = |key: &str, value: gguf::Value| metadata.push((format!("{architecture}.{key}"), value));
    for (key, value) in [
        ("block_count", config.num_layers()),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab_size),
    ] {
        put(key, value.into());
    }
    put("attention.layer_norm_rms_epsilon", config.rms_norm_eps.into());
    let window = config.layers.iter().find_map(|layer| layer.window);
    // of Phi 3 llama.cpp asks for it, 0 where there is none
    if let Some(window) = window.or((architecture == "phi3").then_some(0)).filter(|_| architecture != "llama") {
        put("attention.sliding_window", window.into());
    }
    for (key, cap) in
        [("attn_logit_softcapping", config.attention_softcap), ("final_logit_softcapping", config.logit_softcap)]
    {
        if let Some(cap) = cap {
            put(key, cap.into());
        }
    }
    let mut tensors = Vec::new();
    if let Some(rope) = config.ropes.first() {
        put("rope.freq_base", rope.theta.into());
        let factors = |scaled: &[f32]| divisors(rope, config.head_dim, scaled);
        let divided = factors(&rope.inverse_frequencies);
        match (&rope.long, divided.first()) {
            (Some((original, long)), _) => {
                put("rope.scaling.original_context_length", (*original).into());
                put("rope.scaling.attn_factor", f64::from(rope.factor).into());
                tensors.push(("rope_factors_long.weight", factors(long)));
                tensors.push(("rope_factors_short.weight", divided));
            }
            (None, Some(&first)) if divided.iter().all(|factor| (factor / first - 1.0).abs() < 1e-6) => {
                if (first - 1.0).abs() > 1e-6 {
                    put("rope.scaling.type", "linear".into());
                    put("rope.scaling.factor", short(f64::from(first)).into());
                }
            }
            (None, _) => tensors.push(("rope_freqs.weight", divided)),
        }
    }
    // Gemma 3's layers with a window
    if let Some(local) = config.ropes.get(1) {
        put("rope.freq_base_swa", local.theta.into());
    }
    Description { architecture, metadata, tensors }
}

/// What each frequency was divided by.
fn divisors(rope: &Rope, head_dim: usize, scaled: &[f32]) -> Vec<f32> {
    let plain = |j: usize| f64::from(rope.theta.powf(-((2 * j) as f64) / head_dim as f64) as f32);
    scaled.iter().enumerate().map(|(j, &f)| (plain(j) / f64::from(f)) as f32).collect()
}

/// What a reader of the file would take for another model, of which it is `config` that is written: nothing, where the
/// file says it all.
#[must_use]
pub fn difference(config: &DecoderConfig, read: &DecoderConfig) -> Option<&'static str> {
    let near = |one: &[f32], two: &[f32]| {
        one.len() == two.len() && one.iter().zip(two).all(|(one, two)| (one / two - 1.0).abs() < 1e-6)
    };
    let same_rope = |one: &Rope, two: &Rope| {
        let long = match (&one.long, &two.long) {
            (Some((a, one)), Some((b, two))) => a == b && near(one, two),
            (one, two) => one.is_none() && two.is_none(),
        };
        long && near(&one.inverse_frequencies, &two.inverse_frequencies) && (one.factor - two.factor).abs() < 1e-6
    };
    let ropes =
        config.ropes.len() == read.ropes.len() && config.ropes.iter().zip(&read.ropes).all(|(a, b)| same_rope(a, b));
    let of_layers = |what: fn(&crate::model::LayerConfig) -> Option<usize>| {
        config.layers.iter().map(what).eq(read.layers.iter().map(what))
    };
    let close = |one: f64, two: f64| (one - two).abs() <= 1e-6 * one.abs();
    let checks = [
        ("its sizes", {
            let sizes = |c: &DecoderConfig| {
                (
                    [c.hidden_size, c.intermediate_size, c.num_layers(), c.vocab_size, c.max_position_embeddings],
                    [c.num_attention_heads, c.num_key_value_heads, c.head_dim],
                )
            };
            sizes(config) == sizes(read)
        }),
        (
            "its norms",
            (config.qk_norm, config.post_norms) == (read.qk_norm, read.post_norms)
                && close(config.rms_norm_eps, read.rms_norm_eps),
        ),
        ("its biases", config.biases == read.biases),
        ("its modules", config.fused == read.fused && config.tie_word_embeddings == read.tie_word_embeddings),
        ("its activation", config.activation == read.activation),
        (
            "the scale of its attention",
            close(config.attention_scale, read.attention_scale)
                && close(config.embedding_scale, read.embedding_scale),
        ),
        (
            "its soft caps",
            (config.attention_softcap, config.logit_softcap) == (read.attention_softcap, read.logit_softcap),
        ),
        ("the frequencies of its positions", ropes),
        ("which layers have positions", of_layers(|layer| layer.rope)),
    ];
    checks.into_iter().find(|(_, same)| !same).map(|(what, _)| what)
}

fn plain(value: &gguf::Value) -> Value {
    match value {
        gguf::Value::Unsigned(n) => json!(n),
        gguf::Value::Signed(n) => json!(n),
        // eps was a decimal number before it became an f32
        gguf::Value::Float(x) => Number::from_f64(short(*x)).map_or(Value::Null, Value::Number),
        gguf::Value::Bool(flag) => json!(flag),
        gguf::Value::Text(text) => json!(text),
        gguf::Value::Array(values) => {
            // one number for all layers, where they are all the same
            let same = values.windows(2).all(|two| two[0] == two[1]);
            match values.first() {
                Some(first) if same => plain(first),
                _ => Value::Array(values.iter().map(plain).collect()),
            }
        }
    }
}

/// The shortest decimal number that is the same f32.
fn short(x: f64) -> f64 {
    (x as f32).to_string().parse().unwrap_or(x)
}
