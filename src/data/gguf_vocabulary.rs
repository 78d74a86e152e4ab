//! A Hugging Face tokenizer as the metadata of a GGUF file: [`gguf_tokenizer`](super::gguf_tokenizer) the other way round.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::Value as Json;

use super::gguf_tokenizer::{self, kind};
use super::{Codec, DataError};
use crate::gguf::Value;

/// What a tokenizer that GGUF has no name for can be written with instead.
const HELP: &str = "merge to a Hugging Face folder and convert that with llama.cpp's convert_hf_to_gguf.py";

impl Codec {
    /// The tokenizer and chat template under GGUF's keys, for a model with `vocabulary` ids.
    ///
    /// # Errors
    /// llama.cpp has no such tokenizer; `file` is named.
    pub fn gguf_metadata(&self, vocabulary: usize, file: &Path) -> Result<Vec<(String, Value)>, DataError> {
        let error = |problem: &str| DataError::file(file, problem).help(HELP);
        let text = self.tokenizer.to_string(false).map_err(|e| error(&format!("cannot be written: {e}")))?;
        let json: Json = serde_json::from_str(&text).map_err(|e| error(&format!("cannot be read: {e}")))?;
        let added = self.tokenizer.get_added_tokens_decoder();
        let tokens: BTreeMap<u32, String> =
            self.tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        if tokens.keys().next_back().is_some_and(|&last| last as usize >= vocabulary) {
            return Err(error("has more tokens than the model"));
        }
        let model = &json["model"];
        if model["type"] != "BPE" {
            return Err(error(&format!("is a {} tokenizer, which GGUF files have no place for here", model["type"])));
        }
        let pieces = model["byte_fallback"] == true;
        let unknown = model["unk_token"].as_str();
        let kind_of = |id: u32, token: &str| match added.get(&id) {
            _ if Some(token) == unknown => kind::UNKNOWN,
            Some(token) if token.special => kind::CONTROL,
            Some(_) => kind::USER_DEFINED,
            None if pieces && is_byte(token) => kind::BYTE,
            None => kind::NORMAL,
        };
        let (mut texts, mut kinds) = (Vec::new(), Vec::new());
        for id in 0..vocabulary as u32 {
            match tokens.get(&id) {
                Some(token) => {
                    texts.push(Value::Text(token.clone()));
                    kinds.push(Value::Signed(kind_of(id, token) as i64));
                }
                // rows of the embedding that no token has
                None => {
                    texts.push(Value::Text(format!("[PAD{id}]")));
                    kinds.push(Value::Signed(kind::UNUSED as i64));
                }
            }
        }

        let mut metadata: Vec<(String, Value)> = Vec::new();
        let mut put = |key: &str, value: Value| metadata.push((format!("tokenizer.ggml.{key}"), value));
        let merges = merges(&model["merges"]).ok_or_else(|| error("has no merges"))?;
        if pieces {
            put("model", "llama".into());
            put("pre", "default".into());
            put("scores", Value::Array(scores(&tokens, &merges, vocabulary)));
            if !prepends(&json) {
                put("add_space_prefix", false.into());
            }
        } else {
            put("model", "gpt2".into());
            let pre = gguf_tokenizer::name_of_pre_tokenizer(&json);
            put(
                "pre",
                pre.ok_or_else(|| error("splits text in a way that GGUF files have no name for here"))?.into(),
            );
            let joined = |(left, right): &(&str, &str)| Value::Text(format!("{left} {right}"));
            put("merges", Value::Array(merges.iter().map(joined).collect()));
        }
        put("tokens", Value::Array(texts));
        put("token_type", Value::Array(kinds));
        let ids = self.special_ids();
        for (name, id) in
            [("bos", ids.bos), ("eos", Some(self.eos)), ("unknown", ids.unknown), ("padding", ids.padding)]
        {
            if let Some(id) = id {
                put(&format!("{name}_token_id"), Value::Unsigned(id.into()));
            }
        }
        if let Some(&other) = self.stop_tokens().iter().find(|&&id| id != self.eos) {
            put("eot_token_id", Value::Unsigned(other.into()));
        }
        put("add_bos_token", (!self.prefix.is_empty()).into());
        put("add_eos_token", false.into());
        if let Some(template) = self.chat_template() {
            metadata.push(("tokenizer.chat_template".into(), template.into()));
        }
        Ok(metadata)
    }

    /// The first text that `other` makes other ids of, or other text of the same ids.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<&'static str> {
        // words, numbers, spaces and lines in every order, several scripts, and what has no token of its own
        const TEXTS: [&str; 9] = [
            "Hello, world! It's 12345.67 o'clock; isn't it?",
            " leading and trailing  spaces   \n\n\n and\tlines\r\n  end ",
            "def f(x):\n    return x ** 2 + 1000000  # naïve café\n",
            "Größenwahn, déjà vu, señor, Übermut — “quoted” … ½ ™",
            "日本語のテキスト。 한국어 문장입니다. Русский текст. العربية עברית हिन्दी",
            "👩‍👩‍👧‍👦 🎉 \u{301}e e\u{301} é \u{200b}zero\u{feff}width",
            "",
            "a",
            "CamelCaseAndALLCAPS snake_case 3rd 1st 100% $5.00 a@b.c https://x.y/?q=1&r=2",
        ];
        TEXTS.into_iter().find(|text| {
            let ids = |codec: &Self| codec.tokenizer.encode(*text, true).map(|encoding| encoding.get_ids().to_vec());
            match (ids(self), ids(other)) {
                (Ok(one), Ok(two)) => one != two || self.decode(&one) != other.decode(&two),
                _ => true,
            }
        })
    }
}

/// `<0x0A>`
fn is_byte(token: &str) -> bool {
    token.len() == 6 && token.starts_with("<0x") && token.ends_with('>')
}

/// Pairs, in either of the forms that `tokenizer.json` has them in.
fn merges(json: &Json) -> Option<Vec<(&str, &str)>> {
    fn one(merge: &Json) -> Option<(&str, &str)> {
        match merge {
            Json::String(text) => text.split_once(' '),
            Json::Array(pair) => Some((pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
            _ => None,
        }
    }
    json.as_array()?.iter().map(one).collect()
}

/// The score of each piece, by which SentencePiece chooses what to join next: the sooner a merge makes it, the higher.
fn scores(tokens: &BTreeMap<u32, String>, merges: &[(&str, &str)], vocabulary: usize) -> Vec<Value> {
    let mut rank: HashMap<String, usize> = HashMap::new();
    for (left, right) in merges {
        let next = rank.len();
        rank.entry(format!("{left}{right}")).or_insert(next);
    }
    let last = rank.len();
    let score = |id: u32| {
        let rank = tokens.get(&id).and_then(|token| rank.get(token));
        // what no merge makes is made last, as far as anything is
        Value::Float(-(rank.copied().unwrap_or(last) as f64))
    };
    (0..vocabulary as u32).map(score).collect()
}

/// Whether a blank is put before a text.
fn prepends(json: &Json) -> bool {
    let listed = |of: &Json, key: &str| {
        let mut all = vec![of.clone()];
        all.extend(of[key].as_array().into_iter().flatten().cloned());
        all
    };
    listed(&json["normalizer"], "normalizers").iter().any(|one| one["type"] == "Prepend")
        || listed(&json["pre_tokenizer"], "pretokenizers").iter().any(|one| {
            one["type"] == "Metaspace" && one["prepend_scheme"] != "never" && one["add_prefix_space"] != false
        })
}
