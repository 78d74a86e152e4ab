//! A model's tokenizer, special tokens and chat template: all that turns text into ids and back.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::dataset::DropReason;
use super::format::{Bad, Message};
use super::template::Template;
use super::{DataError, gguf_tokenizer};
use crate::files::{self, WriteError};
use crate::gguf::GgufFile;
use crate::hostile::unpanicked;
use crate::tensor_file::read_text;

/// Files that belong to a tokenizer, where they exist.
const FILES: [&str; 8] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    TEMPLATE,
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";

/// A model's tokenizer, special tokens and chat template.
#[derive(Debug)]
pub struct Codec {
    pub(super) tokenizer: Tokenizer,
    /// What the tokenizer puts before a text: the BOS, or nothing.
    pub(super) prefix: Vec<u32>,
    pub(super) eos: u32,
    special_ids: SpecialIds,
    stop_tokens: Vec<u32>,
    /// Texts of the tokens that may end a turn.
    special: Vec<String>,
    template: Option<Template>,
    /// The template was given, and takes the place of the model's own.
    overridden: bool,
    files: Vec<TokenizerFile>,
    /// Length of tokenizer.json.
    length: usize,
}

/// Tokens with a name, besides the EOS.
#[derive(Debug, Clone, Copy)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u32>,
    pub(super) unknown: Option<u32>,
    pub(super) padding: Option<u32>,
}

/// A file that belongs beside an adapter.
#[derive(Debug)]
enum TokenizerFile {
    Copied(PathBuf),
    /// Name and text.
    Made(&'static str, String),
}

/// What a tokenizer is made of.
struct Parts {
    /// What errors name.
    file: PathBuf,
    /// `tokenizer.json`
    text: String,
    config_file: PathBuf,
    /// `tokenizer_config.json`
    config: Map<String, Value>,
    /// `special_tokens_map.json`
    special: Map<String, Value>,
    template: Option<(PathBuf, String)>,
    /// Ids that end an answer, besides the EOS.
    stop: Vec<u64>,
    files: Vec<TokenizerFile>,
}

impl Parts {
    /// `with_template`: its own template is wanted.
    fn of_folder(folder: &Path, with_template: bool) -> Result<Self, DataError> {
        let path = |name: &str| folder.join(name);
        let file = path(TOKENIZER);
        if !file.exists() && path("tokenizer.model").exists() {
            let help = "transformers writes one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)";
            return Err(DataError::file(&file, "does not exist beside tokenizer.model").help(help));
        }
        let text = read_text(&file)?;
        let config = read_object(&path(TOKENIZER_CONFIG))?;
        let mut generation = read_object(&path("generation_config.json"))?;
        if !generation.contains_key("eos_token_id") {
            generation = read_object(&path("config.json"))?;
        }
        let stop = match generation.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
            None => &[],
        };
        let files = FILES.iter().map(|name| path(name)).filter(|path| path.is_file());
        Ok(Self {
            file,
            text,
            config_file: path(TOKENIZER_CONFIG),
            special: read_object(&path(SPECIAL_TOKENS))?,
            template: if with_template { own_template(folder, &config)? } else { None },
            config,
            stop: stop.iter().filter_map(Value::as_u64).collect(),
            files: files.map(TokenizerFile::Copied).collect(),
        })
    }

    fn of_gguf(path: &Path) -> Result<Self, DataError> {
        let gguf_tokenizer::Files { tokenizer, config, stop } = gguf_tokenizer::read(&GgufFile::open(path)?)?;
        let made = serde_json::to_string_pretty(&config).unwrap_or_default();
        let template = config.get("chat_template").and_then(Value::as_str);
        Ok(Self {
            file: path.to_owned(),
            config_file: path.to_owned(),
            special: Map::new(),
            template: template.map(|source| (path.to_owned(), source.to_owned())),
            config,
            stop,
            files: vec![
                TokenizerFile::Made(TOKENIZER, tokenizer.clone()),
                TokenizerFile::Made(TOKENIZER_CONFIG, made),
            ],
            text: tokenizer,
        })
    }
}

impl Codec {
    /// Opens the tokenizer of a model folder or a GGUF file. `chat_template` is a Jinja file that takes the place of the
    /// model's own.
    ///
    /// # Errors
    /// A file is missing or broken, no EOS is named, or the template does not parse.
    pub fn open(model: &Path, chat_template: Option<&Path>) -> Result<Self, DataError> {
        let given = chat_template.map(|file| Ok::<_, DataError>((file.to_owned(), read_text(file)?))).transpose()?;
        let overridden = given.is_some();
        let parts = if model.is_dir() { Parts::of_folder(model, !overridden)? } else { Parts::of_gguf(model)? };
        let Parts { file, text, config_file, config, special, template, stop, files } = parts;
        let length = text.len();
        let mut tokenizer = unpanicked(|| Tokenizer::from_bytes(text)).map_err(|e| {
            DataError::file(&file, format!("is no valid tokenizer: {e}")).help("fetch the file again")
        })?;
        // a limit that was saved by accident would silently cut every text
        let _ = tokenizer.with_padding(None).with_truncation(None);

        let special_tokens = special_tokens(&config, &special);
        let named = |name: &str| special_tokens.iter().find(|(n, _)| n == name).map(|(_, token)| token.as_str());
        let eos_token = named("eos_token").ok_or_else(|| {
            DataError::file(&config_file, "names no eos_token, so no completion could ever end")
                .help("add \"eos_token\": \"...\" with the token that ends an answer")
        })?;
        let eos = tokenizer.token_to_id(eos_token).ok_or_else(|| {
            let problem = format!("names {eos_token:?} as eos_token, which the tokenizer does not have");
            DataError::file(&config_file, problem)
        })?;
        let id = |name: &str| named(name).and_then(|token| tokenizer.token_to_id(token));
        let special_ids = SpecialIds { bos: id("bos_token"), unknown: id("unk_token"), padding: id("pad_token") };
        // transformers makes every named token special, whatever tokenizer.json says
        let known = special_tokens.iter().filter(|(_, token)| tokenizer.token_to_id(token).is_some());
        let known: Vec<AddedToken> = known.map(|(_, token)| AddedToken::from(token.as_str(), true)).collect();
        tokenizer
            .add_special_tokens(known)
            .map_err(|e| DataError::file(&file, format!("does not take its special tokens: {e}")))?;
        let added = tokenizer.get_added_tokens_decoder();
        let texts = added.values().map(|token| token.content.clone());
        // some tokenizers add runs of spaces, which end no turn
        let mut special: Vec<String> = texts.filter(|text| !text.trim().is_empty()).collect();
        special.sort_unstable();

        let prefix = prefix(&tokenizer).map_err(|e| DataError::file(&file, e))?;
        let template = given
            .or(template)
            .map(|(file, source)| {
                Template::new(&source, special_tokens.clone())
                    .map_err(|e| DataError::file(&file, format!("the chat template does not parse: {e}")))
            })
            .transpose()?;

        let mut stop_tokens = vec![eos];
        for id in stop.into_iter().filter_map(|id| u32::try_from(id).ok()) {
            if !stop_tokens.contains(&id) {
                stop_tokens.push(id);
            }
        }
        Ok(Self { length, tokenizer, prefix, eos, special_ids, stop_tokens, special, template, overridden, files })
    }

    /// Text of `ids`, special tokens left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        unpanicked(|| self.tokenizer.decode(ids, true)).unwrap_or_default()
    }

    pub(super) fn special_ids(&self) -> SpecialIds {
        self.special_ids
    }

    /// A token as the vocabulary has it.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Tokens that end an answer: the tokenizer's EOS and those of the model's generation settings.
    #[must_use]
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Number of ids, added tokens included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The chat template as it was written, if there is one.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_ref().map(Template::source)
    }

    /// Whether what the template renders depends on today's date, so that tomorrow's ids may differ.
    #[must_use]
    pub fn depends_on_date(&self) -> bool {
        self.chat_template().is_some_and(|source| source.contains("strftime_now"))
    }

    /// Writes the tokenizer's files to a folder, with the template that was used.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn save(&self, folder: &Path) -> Result<(), WriteError> {
        for file in &self.files {
            match file {
                TokenizerFile::Copied(file) => {
                    let target = folder.join(file.file_name().unwrap_or_default());
                    files::write(&target, &std::fs::read(file).map_err(files::cannot_write(&target))?)?;
                }
                TokenizerFile::Made(name, text) => files::write(&folder.join(name), text.as_bytes())?,
            }
        }
        match &self.template {
            // it is read before the one in tokenizer_config.json
            Some(template) if self.overridden => files::write(&folder.join(TEMPLATE), template.source().as_bytes()),
            _ => Ok(()),
        }
    }

    /// About the memory that the tokenizer takes: its tables are so many times as large as its file, by measurement.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        const TABLES: usize = 6;
        TABLES * self.length
    }

    /// The token that ends an answer.
    pub(super) fn eos(&self) -> u32 {
        self.eos
    }

    /// Ids of a text, with one BOS at the start where the tokenizer puts one and the text has none.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, Bad> {
        let mut ids = self.encode_bare(text)?;
        if !ids.starts_with(&self.prefix) {
            ids.splice(..0, self.prefix.iter().copied());
        }
        Ok(ids)
    }

    /// Ids of a text as it stands.
    pub(super) fn encode_bare(&self, text: &str) -> Result<Vec<u32>, Bad> {
        let encoding = unpanicked(|| self.tokenizer.encode_fast(text, false))
            .map_err(|e| Bad::new(DropReason::Malformed, format!("the tokenizer fails: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of a conversation: with `add_generation_prompt` up to where the assistant begins, without it to the end,
    /// with an EOS where the template ends the turn in no special token.
    pub(super) fn encode_chat(&self, messages: &[&Message], add_generation_prompt: bool) -> Result<Vec<u32>, Bad> {
        let refused = |e: String| Bad::new(DropReason::Template, format!("the chat template: {e}"));
        let template = self.template.as_ref().ok_or_else(|| refused("there is none".into()))?;
        let text = template.render(messages, add_generation_prompt).map_err(refused)?;
        let mut ids = self.encode(&text)?;
        let end = text.trim_end();
        if !add_generation_prompt && !self.special.iter().any(|token| end.ends_with(token.as_str())) {
            ids.push(self.eos);
        }
        Ok(ids)
    }
}

/// Ids that the post-processor puts before a text. What it may put after is left to us.
fn prefix(tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
    const TEXT: &str = "a";
    let ids = |special| {
        let encoding =
            unpanicked(|| tokenizer.encode(TEXT, special)).map_err(|e| format!("does not tokenise a letter: {e}"))?;
        Ok::<_, String>(encoding.get_ids().to_vec())
    };
    let (plain, processed) = (ids(false)?, ids(true)?);
    let at = processed.windows(plain.len().max(1)).position(|window| window == plain).unwrap_or(0);
    Ok(processed[..at].to_vec())
}

/// Named special tokens, by name.
fn special_tokens(config: &Map<String, Value>, map: &Map<String, Value>) -> Vec<(String, String)> {
    let text = |value: &Value| match value {
        Value::String(token) => Some(token.clone()),
        Value::Object(token) => Some(token.get("content")?.as_str()?.to_owned()),
        _ => None,
    };
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
        .into_iter()
        .filter_map(|name| {
            let token = config.get(name).and_then(text).or_else(|| map.get(name).and_then(text))?;
            (!token.is_empty()).then(|| (name.to_owned(), token))
        })
        .collect()
}

/// The model's own template, and the file it stands in.
fn own_template(folder: &Path, config: &Map<String, Value>) -> Result<Option<(PathBuf, String)>, DataError> {
    let file = folder.join(TEMPLATE);
    if file.exists() {
        return Ok(Some((file.clone(), read_text(&file)?)));
    }
    let file = folder.join(TOKENIZER_CONFIG);
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some((file, source.clone()))),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
            match default.and_then(|entry| entry.get("template")?.as_str()) {
                Some(source) => Ok(Some((file, source.to_owned()))),
                None => Err(DataError::file(&file, "has several chat templates and none is called `default`")
                    .help("name one as [data] chat_template")),
            }
        }
        Some(_) => Err(DataError::file(&file, "chat_template is neither a template nor a list of them")
            .help("name a Jinja file as [data] chat_template")),
    }
}

/// A JSON object in a file that may be missing.
fn read_object(file: &Path) -> Result<Map<String, Value>, DataError> {
    if !file.exists() {
        return Ok(Map::new());
    }
    match serde_json::from_str(&read_text(file)?) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(DataError::file(file, "is not a JSON object")),
        Err(e) => Err(DataError::file(file, format!("is no valid JSON: {e}")).help("fetch the file again")),
    }
}
