//! The tokenizer in a GGUF file's metadata, as the `tokenizer.json` and `tokenizer_config.json` that Hugging Face would have
//! for it.
//!
//! | `tokenizer.ggml.model` | |
//! |---|---|
//! | `llama` | SentencePiece: pieces with scores, merges derived from them as transformers' converter does |
//! | `gpt2` | byte-level BPE: tokens and merges; `tokenizer.ggml.pre` names how text is split beforehand |

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use crate::gguf::{GgufFile, Value};
use crate::tensor_file::TensorFileError;

/// `tokenizer.json` and `tokenizer_config.json`.
pub(super) struct Files {
    pub(super) tokenizer: String,
    pub(super) config: Map<String, Json>,
    /// Ids that end an answer, besides the EOS.
    pub(super) stop: Vec<u64>,
}

/// Kinds of tokens, as llama.cpp numbers them.
pub(super) mod kind {
    pub(in crate::data) const NORMAL: u64 = 1;
    pub(in crate::data) const UNKNOWN: u64 = 2;
    pub(in crate::data) const CONTROL: u64 = 3;
    pub(in crate::data) const USER_DEFINED: u64 = 4;
    pub(in crate::data) const UNUSED: u64 = 5;
    pub(in crate::data) const BYTE: u64 = 6;
}

/// How GPT-4's tokenizer and those after it split text, with at most so many digits together.
fn split_pattern(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

/// Reads the tokenizer of a GGUF file.
pub(super) fn read(file: &GgufFile) -> Result<Files, TensorFileError> {
    let metadata = Metadata { file };
    let tokens = metadata.texts("tokens")?.ok_or_else(|| metadata.missing("tokens"))?;
    let kinds = metadata.numbers("token_type", tokens.len())?;
    let id = |name: &str| -> Result<Option<usize>, TensorFileError> {
        let key = format!("{name}_token_id");
        let Some(value) = metadata.get(&key) else { return Ok(None) };
        let id = value.as_u64().map(|id| id as usize).filter(|&id| id < tokens.len());
        id.map(Some).ok_or_else(|| metadata.wrong(&key, &format!("the number of one of {} tokens", tokens.len())))
    };
    let (bos, unknown) = (id("bos")?, id("unknown")?);
    let model = metadata.text("model")?.ok_or_else(|| metadata.missing("model"))?;
    let (mut tokenizer, adds_bos) = match model {
        "llama" => (sentence_piece(&metadata, &tokens, unknown)?, true),
        "gpt2" => byte_level(&metadata, &tokens)?,
        other => {
            let problem = format!("metadata `tokenizer.ggml.model` is `{other}`, which is not supported");
            return Err(TensorFileError {
                help: Some(
                    "supported: llama (SentencePiece), gpt2 (byte-level BPE); or name a folder with tokenizer.json"
                        .into(),
                ),
                ..file.error(problem)
            });
        }
    };
    // Gemma's; which of the two blanks they stand for is not told
    let blank = |token: &str| !token.is_empty() && token.chars().all(|c| matches!(c, ' ' | '▁'));
    let user_defined = |i: usize| kinds.as_ref().is_some_and(|kinds| kinds[i] == kind::USER_DEFINED);
    let doubtful = (0..tokens.len()).find(|&i| user_defined(i) && blank(tokens[i])).map(|i| {
        format!("metadata `tokenizer.ggml.tokens` has a user-defined token of blanks at {i}, which is not supported")
    });
    let charsmap = metadata.get("precompiled_charsmap").map(|_| {
        "metadata `tokenizer.ggml.precompiled_charsmap` is a way to normalise text that is not supported".to_owned()
    });
    if let Some(problem) = doubtful.or(charsmap) {
        let help = "convert the model to safetensors, or name the folder that the file was made of".to_owned();
        return Err(TensorFileError { help: Some(help), ..file.error(problem) });
    }
    let special = |i: usize| match &kinds {
        Some(kinds) => (kinds[i] == kind::CONTROL || kinds[i] == kind::UNKNOWN)
            .then_some(true)
            .or_else(|| (kinds[i] == kind::USER_DEFINED).then_some(false)),
        None => [bos, unknown].contains(&Some(i)).then_some(true),
    };
    let added = tokens.iter().enumerate().filter_map(|(i, token)| {
        let special = special(i)?;
        Some(json!({"id": i, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special}))
    });
    tokenizer["added_tokens"] = Json::Array(added.collect());
    let adds_bos = metadata.flag("add_bos_token")?.unwrap_or(adds_bos);
    if let Some(bos) = bos.filter(|_| adds_bos) {
        let token = tokens[bos];
        let (first, text) =
            (json!({"SpecialToken": {"id": token, "type_id": 0}}), json!({"Sequence": {"id": "A", "type_id": 0}}));
        tokenizer["post_processor"] = json!({"type": "TemplateProcessing", "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}}});
    }

    let mut config = Map::new();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    for (name, id) in
        [("bos_token", bos), ("eos_token", id("eos")?), ("unk_token", unknown), ("pad_token", id("padding")?)]
    {
        if let Some(id) = id {
            config.insert(name.into(), json!(tokens[id]));
        }
    }
    if let Some(template) = file.metadata("tokenizer.chat_template") {
        let template =
            template.as_str().ok_or_else(|| file.error("metadata `tokenizer.chat_template` is no text".into()))?;
        config.insert("chat_template".into(), json!(template));
    }
    let stop = [id("eot")?, id("eom")?].into_iter().flatten().map(|id| id as u64).collect();
    // spread over lines as transformers has it, which is what the memory of a tokenizer is reckoned by
    Ok(Files { tokenizer: format!("{tokenizer:#}"), config, stop })
}

/// What all have in common.
fn tokenizer(model: &Json) -> Json {
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": model})
}

/// Text to ids, the last of the same text winning, as in llama.cpp's table.
fn vocabulary(tokens: &[&str]) -> Map<String, Json> {
    tokens.iter().enumerate().map(|(i, token)| ((*token).to_owned(), json!(i))).collect()
}

fn sentence_piece(metadata: &Metadata<'_>, tokens: &[&str], unknown: Option<usize>) -> Result<Json, TensorFileError> {
    let scores = metadata.floats("scores", tokens.len())?.ok_or_else(|| metadata.missing("scores"))?;
    let mut made = tokenizer(&json!({"type": "BPE", "dropout": null, "unk_token": unknown.map(|id| tokens[id]),
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
        "ignore_merges": false, "vocab": vocabulary(tokens), "merges": merges(tokens, &scores)}));
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if metadata.flag("add_space_prefix")?.unwrap_or(true) {
        let prefix = json!({"type": "Prepend", "prepend": "▁"});
        made["normalizer"] = json!({"type": "Sequence", "normalizers": [prefix, spaces]});
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    } else {
        made["normalizer"] = spaces;
    }
    made["decoder"] = json!({"type": "Sequence", "decoders": decoders});
    Ok(made)
}

/// The merges of a SentencePiece vocabulary: every way to put a piece together out of two, the best piece first, then the
/// longer parts, then as transformers happens to leave them.
fn merges<'t>(tokens: &[&'t str], scores: &[f64]) -> Vec<[&'t str; 2]> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, token)| (*token, i)).collect();
    let mut merges = Vec::new();
    for (piece, &score) in tokens.iter().zip(scores) {
        // the longest pieces that models have are some hundreds of bytes: a hostile one could be the file
        if piece.len() > 1024 {
            continue;
        }
        let parts = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        let mut of_piece: Vec<_> = parts.filter_map(|(l, r)| Some((*ids.get(l)?, *ids.get(r)?, [l, r]))).collect();
        of_piece.sort_by_key(|(l, r, _)| (*l, *r));
        merges.extend(of_piece.into_iter().map(|(_, _, parts)| (score, parts)));
    }
    let lengths = |parts: &[&str; 2]| parts.map(|part| part.chars().count());
    merges.sort_by(|(a, x), (b, y)| b.total_cmp(a).then_with(|| lengths(y).cmp(&lengths(x))));
    merges.into_iter().map(|(_, parts)| parts).collect()
}

fn byte_level(metadata: &Metadata<'_>, tokens: &[&str]) -> Result<(Json, bool), TensorFileError> {
    let merges = metadata.texts("merges")?.ok_or_else(|| metadata.missing("merges"))?;
    let pairs: Option<Vec<[&str; 2]>> =
        merges.iter().map(|merge| merge.split_once(' ').map(|(a, b)| [a, b])).collect();
    let pairs = pairs.ok_or_else(|| metadata.wrong("merges", "a list of pairs"))?;
    let pre = metadata.text("pre")?.unwrap_or("default");
    // how text is split, whether it is normalised, whether a BOS comes first, whether whole words are looked up before merges
    let (pre_tokenizer, nfc, adds_bos, words_first) = match pre {
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => (pre_tokenizer("llama-bpe"), false, true, true),
        "qwen2" | "qwen35" | "deepseek-r1-qwen" => (pre_tokenizer("qwen2"), true, false, false),
        "gpt-2" | "smollm" => (pre_tokenizer(pre), false, false, false),
        other => {
            let problem =
                format!("metadata `tokenizer.ggml.pre` is `{other}`, a way to split text that is not supported");
            return Err(TensorFileError {
                help: Some("supported: llama-bpe, qwen2, gpt-2, smollm; or name a folder with tokenizer.json".into()),
                ..metadata.file.error(problem)
            });
        }
    };
    let mut made = tokenizer(&json!({"type": "BPE", "dropout": null, "unk_token": null,
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "ignore_merges": words_first, "vocab": vocabulary(tokens), "merges": pairs}));
    made["pre_tokenizer"] = pre_tokenizer;
    made["decoder"] = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    if nfc {
        made["normalizer"] = json!({"type": "NFC"});
    }
    Ok((made, adds_bos))
}

/// Ways to split text before merges, by the name that llama.cpp gives them.
fn pre_tokenizer(name: &str) -> Json {
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let alone = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let split = |digits: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": split_pattern(digits)}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes]})
    };
    match name {
        "llama-bpe" => split(r"\p{N}{1,3}"),
        "qwen2" => split(r"\p{N}"),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            json!({"type": "Sequence", "pretokenizers": [digits, alone]})
        }
        _ => alone,
    }
}

/// The name of the way that a `tokenizer.json` splits text, if it has one.
pub(super) fn name_of_pre_tokenizer(tokenizer: &Json) -> Option<&'static str> {
    // where a piece of text was does not change its ids
    fn essential(json: &Json) -> Json {
        match json {
            Json::Object(fields) => {
                let kept = fields.iter().filter(|(key, _)| *key != "trim_offsets");
                Json::Object(kept.map(|(key, value)| (key.clone(), essential(value))).collect())
            }
            Json::Array(items) => Json::Array(items.iter().map(essential).collect()),
            other => other.clone(),
        }
    }
    let given = essential(&tokenizer["pre_tokenizer"]);
    ["llama-bpe", "qwen2", "smollm", "gpt-2"].into_iter().find(|name| essential(&pre_tokenizer(name)) == given)
}

/// Values under `tokenizer.ggml`.
struct Metadata<'f> {
    file: &'f GgufFile,
}

impl<'f> Metadata<'f> {
    fn get(&self, key: &str) -> Option<&'f Value> {
        self.file.metadata(&format!("tokenizer.ggml.{key}"))
    }

    fn missing(&self, key: &str) -> TensorFileError {
        let problem = format!("metadata `tokenizer.ggml.{key}` is missing");
        TensorFileError {
            help: Some("the file was made without its tokenizer; convert the model again, or name its folder".into()),
            ..self.file.error(problem)
        }
    }

    fn wrong(&self, key: &str, expected: &str) -> TensorFileError {
        self.file.error(format!("metadata `tokenizer.ggml.{key}` is not {expected}"))
    }

    fn text(&self, key: &str) -> Result<Option<&'f str>, TensorFileError> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| self.wrong(key, "a text"))).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, TensorFileError> {
        self.get(key).map(|value| value.as_bool().ok_or_else(|| self.wrong(key, "true or false"))).transpose()
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<&'f str>>, TensorFileError> {
        self.list(key, "a list of texts", None, Value::as_str)
    }

    fn numbers(&self, key: &str, len: usize) -> Result<Option<Vec<u64>>, TensorFileError> {
        self.list(key, &format!("a list of {len} numbers"), Some(len), Value::as_u64)
    }

    fn floats(&self, key: &str, len: usize) -> Result<Option<Vec<f64>>, TensorFileError> {
        self.list(key, &format!("a list of {len} numbers"), Some(len), Value::as_f64)
    }

    fn list<T>(
        &self,
        key: &str,
        expected: &str,
        len: Option<usize>,
        item: impl Fn(&'f Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, TensorFileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let values = value.as_array().filter(|values| len.is_none_or(|len| values.len() == len));
        let values = values.and_then(|values| values.iter().map(item).collect());
        values.map(Some).ok_or_else(|| self.wrong(key, expected))
    }
}
