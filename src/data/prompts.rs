//! Prompts to answer: preference rows without their answers, conversations, instructions, plain texts.

use std::borrow::Cow;
use std::path::PathBuf;

use serde_json::Value;

use super::codec::Codec;
use super::format::{Bad, Columns, Message, Record, Shape};
use super::source::{self, Row, Rows};
use super::{DataError, Sources};
use crate::progress::Console;

/// Something to answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Its ids, up to where the answer begins.
    pub ids: Vec<u32>,
    /// What a reader is shown: the text, or the user's only message, or the turns of a conversation.
    pub text: String,
    /// `(role, content)` of a conversation; none where a text is continued as it stands.
    pub turns: Vec<(String, String)>,
    /// The row's `id`, if it has one.
    pub id: Option<String>,
    /// What its result is counted under.
    pub category: Option<String>,
    /// Prompts of one group are not independent: one topic, or one conversation.
    pub group: Option<String>,
    /// A good answer.
    pub reference: Option<String>,
}

impl Prompt {
    /// A prompt and nothing that a row would say of it.
    pub(crate) fn new(ids: Vec<u32>, text: String, turns: Vec<(String, String)>) -> Self {
        Self { ids, text, turns, id: None, category: None, group: None, reference: None }
    }
}

/// Columns that are read besides those of preferences.
const COLUMNS: [&str; 12] = [
    "instruction",
    "question",
    "text",
    "id",
    "uid",
    "prompt_id",
    "category",
    "dataset",
    "domain",
    "group",
    "subject",
    "reference",
];
/// Columns that hold a single text to answer, the first that is there.
const TEXTS: [&str; 4] = ["prompt", "instruction", "question", "text"];
const UNDERSTOOD: &str = "a prompt is a text or a message list in `prompt`, `instruction`, `question`, `text` or `messages`, \
                          or what a preference row has";

/// Reads the prompts of files. A row of preferences has the prompt that is trained on; of a conversation that ends with an
/// answer, the answer is left out; a text by itself is the user's message where the model has a chat template, unless
/// `plain`. `columns` are those that a recipe has other names for. Rows of preferences that cannot be trained on have no
/// prompt here either: they are left out, and counted on the console.
///
/// # Errors
/// A file is missing or broken, another row has no prompt, or no row is left.
pub fn load_prompts(
    sources: &Sources,
    columns: &super::Columns,
    codec: &Codec,
    plain: bool,
    console: &Console,
) -> Result<Vec<Prompt>, DataError> {
    struct Reading<'a> {
        prompts: Vec<Prompt>,
        codec: &'a Codec,
        plain: bool,
        file: PathBuf,
        /// How many rows were left out, and what is wrong with the first of them.
        left_out: (usize, Option<DataError>),
    }
    impl Rows for Reading<'_> {
        fn columns(&mut self, _: Vec<String>) -> Result<(), DataError> {
            Ok(())
        }

        fn row(&mut self, Row { place, values, .. }: Row) -> Result<(), DataError> {
            let has_answers = has_answers(&values);
            match of_row(values, self.codec, self.plain) {
                Ok(prompt) => self.prompts.push(prompt),
                Err(bad) => {
                    let error = DataError::row(&self.file, place, bad.detail).help(UNDERSTOOD);
                    if !has_answers {
                        return Err(error);
                    }
                    let (count, first) = &mut self.left_out;
                    *count += 1;
                    first.get_or_insert(error);
                }
            }
            Ok(())
        }
    }
    let files = source::resolve(sources, console)?;
    let bar = console.bytes_bar("reading prompts", files.iter().map(|file| file.bytes).sum());
    let mut reading = Reading { prompts: Vec::new(), codec, plain, file: PathBuf::new(), left_out: (0, None) };
    for file in &files {
        reading.file.clone_from(&file.name);
        let own = |name: &str| columns.own_name(name).or_else(|| COLUMNS.iter().find(|own| **own == name).copied());
        file.read(&own, &bar, &mut reading)?;
    }
    drop(bar);
    let Reading { prompts, left_out: (count, first), .. } = reading;
    match (files.first(), first) {
        (_, Some(first)) if prompts.is_empty() => return Err(first),
        (Some(file), None) if prompts.is_empty() => return Err(DataError::file(&file.name, "has no rows")),
        (_, Some(first)) => console.fact("", format_args!("{count} rows are left out; the first is {first}")),
        _ => {}
    }
    Ok(prompts)
}

/// Whether it is a row of preferences.
fn has_answers(row: &Columns) -> bool {
    ["chosen", "rejected", "completion"].iter().any(|key| row.contains_key(*key))
}

fn of_row(mut row: Columns, codec: &Codec, plain: bool) -> Result<Prompt, Bad> {
    let text = |keys: &[&str]| {
        keys.iter().find_map(|key| match row.get(*key)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        })
    };
    let (id, category) = (text(&["id", "uid", "prompt_id"]), text(&["category", "dataset", "domain"]));
    let (group, reference) = (text(&["group", "subject"]), text(&["reference"]));
    let prompt = if has_answers(&row) {
        let shape = Shape::recognise(&row).map_err(|problem| Bad::new(super::DropReason::Malformed, problem))?;
        match shape.record(row, codec.chat_template().is_some())? {
            Record::Plain(sides) => codec.prompt(&sides.prompt, true)?,
            Record::Chat(sides) => codec.conversation(&sides.prompt)?,
        }
    } else if let Some(key) = ["messages", "conversations", "prompt"].into_iter().find(|key| is_messages(&row, key)) {
        let mut messages = super::format::take_messages(&mut row, key)?;
        while messages.last().is_some_and(Message::is_models) {
            messages.pop();
        }
        codec.conversation(&messages)?
    } else {
        let text = text(&TEXTS).ok_or_else(|| Bad::new(super::DropReason::Malformed, "has no prompt"))?;
        codec.prompt(&text, plain)?
    };
    Ok(Prompt { id, category, group, reference, ..prompt })
}

fn is_messages(row: &Columns, key: &str) -> bool {
    row.get(key).is_some_and(Value::is_array)
}

impl Codec {
    /// A text to answer: as the user's message, or to be continued as it stands where it is `plain` or the model has no
    /// chat template.
    pub(super) fn prompt(&self, text: &str, plain: bool) -> Result<Prompt, Bad> {
        if !plain && self.chat_template().is_some() {
            return self.conversation(&[Message::new("user", text)]);
        }
        let ids = self.encode(text)?;
        if ids.is_empty() {
            return Err(Bad::new(super::DropReason::EmptyPrompt, "the prompt is empty"));
        }
        Ok(Prompt::new(ids, text.to_owned(), Vec::new()))
    }

    /// A conversation whose next turn is the model's.
    pub(super) fn conversation(&self, messages: &[Message]) -> Result<Prompt, Bad> {
        let ids = self.encode_chat(&messages.iter().collect::<Vec<_>>(), true)?;
        let text = match messages {
            [only] => only.content.clone(),
            turns => turns.iter().map(|turn| format!("{}: {}\n\n", turn.role, turn.content)).collect::<String>(),
        };
        let text = text.trim_end().to_owned();
        let turns = messages.iter().map(|turn| (turn.role.clone(), turn.content.clone())).collect();
        Ok(Prompt::new(ids, text, turns))
    }

    /// The prompt that a single text is; see [`load_prompts`].
    ///
    /// # Errors
    /// It is empty, or the template refuses it.
    pub fn ask(&self, text: &str, plain: bool) -> Result<Prompt, DataError> {
        self.prompt(text, plain).map_err(|bad| DataError::Prompt(bad.detail))
    }

    /// The prompt that `(role, content)` turns are.
    ///
    /// # Errors
    /// The model has no chat template, or it refuses them.
    pub fn chat(&self, turns: &[(String, String)]) -> Result<Prompt, DataError> {
        let messages: Vec<Message> =
            turns.iter().map(|(role, content)| Message::new(role, content.as_str())).collect();
        self.conversation(&messages).map_err(|bad| DataError::Prompt(bad.detail))
    }
}

/// An answer while its tokens come: its text as far as it is certain, and whether a stop text is in it.
#[derive(Debug)]
pub struct Answer<'c> {
    codec: &'c Codec,
    stops: Cow<'c, [String]>,
    /// What it continues, and its own.
    ids: Vec<u32>,
    /// How many of them it continues.
    context: usize,
    /// Ids from here on are decoded together; the text of those before `read` is certain.
    window: usize,
    read: usize,
    text: String,
    /// Bytes of the text that no later token changes.
    certain: usize,
    /// Bytes of the text that were given out.
    shown: usize,
    stopped: bool,
}

impl<'c> Answer<'c> {
    /// Nothing yet. It ends before the first of `stops` that appears in it.
    #[must_use]
    pub fn new(codec: &'c Codec, stops: impl Into<Cow<'c, [String]>>) -> Self {
        Self::after(codec, stops, &[])
    }

    /// Nothing yet, of a text that goes on where `context` ends: a tokenizer that leaves out the space before the first
    /// word of a text keeps it here.
    #[must_use]
    pub fn after(codec: &'c Codec, stops: impl Into<Cow<'c, [String]>>, context: &[u32]) -> Self {
        /// No tokenizer looks further back.
        const ENOUGH: usize = 6;
        let context = &context[context.len().saturating_sub(ENOUGH)..];
        // which may not begin within a character: some decoders then make signs of all that are spelled in bytes
        let is_whole = |at: &usize| !codec.decode(&context[*at..]).contains(char::REPLACEMENT_CHARACTER);
        let context = &context[(0..context.len()).find(is_whole).unwrap_or(context.len())..];
        Self {
            codec,
            stops: stops.into(),
            ids: context.to_vec(),
            context: context.len(),
            window: 0,
            read: context.len(),
            text: String::new(),
            certain: 0,
            shown: 0,
            stopped: false,
        }
    }

    /// Takes a token.
    pub fn push(&mut self, token: u32) {
        self.ids.push(token);
        // what a token adds depends on those just before it, and on no others: so an answer's text takes time by its
        // length, and not by the square of it
        let before = self.codec.decode(&self.ids[self.window..self.read]);
        let now = self.codec.decode(&self.ids[self.window..]);
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let searched = self.certain.saturating_sub(longest);
        let searched = (0..=searched).rev().find(|&at| self.text.is_char_boundary(at)).unwrap_or(0);
        self.text.truncate(self.certain);
        self.text.push_str(now.get(before.len()..).unwrap_or_default());
        if now.len() > before.len() && !now.ends_with(char::REPLACEMENT_CHARACTER) {
            (self.window, self.read, self.certain) = (self.read, self.ids.len(), self.text.len());
        }
        let rest = &self.text[searched..];
        let found = self.stops.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| rest.find(stop.as_str()));
        if let Some(at) = found.min() {
            self.text.truncate(searched + at);
            self.stopped = true;
        }
    }

    /// Takes a token where there is one, and says whether one of the stop texts has come.
    pub fn take(&mut self, token: Option<u32>) -> bool {
        token.into_iter().for_each(|token| self.push(token));
        self.stopped
    }

    /// Whether one of the stop texts has come.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What can be shown since the last time: nothing of a character that is not whole, or of what may become a stop text.
    /// `last` gives the rest.
    pub fn news(&mut self, last: bool) -> String {
        let mut end = self.text.len();
        if !last && !self.stopped {
            let held = |stop: &String| {
                (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && self.text.ends_with(&stop[..n]))
            };
            let held = self.stops.iter().filter_map(held).max().unwrap_or(0);
            end = self.text.len() - held;
            end = self.text[..end].trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        }
        // what was shown may have to be taken back where a tokenizer joins words later; nothing more is shown then
        match self.text.get(self.shown..end) {
            Some(news) => {
                self.shown = end;
                news.to_owned()
            }
            None => String::new(),
        }
    }

    /// All of it.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its tokens, those of a stop text too.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids[self.context..]
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn codec() -> Codec {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart/model");
        Codec::open(&model, None).expect("a tokenizer with a chat template")
    }

    fn read(codec: &Codec, name: &str, text: &str, plain: bool) -> Result<Vec<Prompt>, DataError> {
        read_columns(&crate::data::Columns::default(), codec, name, text, plain)
    }

    fn read_columns(
        columns: &crate::data::Columns,
        codec: &Codec,
        name: &str,
        text: &str,
        plain: bool,
    ) -> Result<Vec<Prompt>, DataError> {
        let place = tempfile::tempdir().expect("a folder");
        let file = place.path().join(name);
        std::fs::write(&file, text).expect("written");
        load_prompts(&Sources::one(&file), columns, codec, plain, &Console::silent())
    }

    #[test]
    fn one_question_in_all_its_shapes_is_one_prompt() {
        let codec = codec();
        let question = "What is hail?";
        let asked = codec.ask(question, false).expect("a prompt");
        let shapes = [
            r#"{"prompt": "What is hail?"}"#,
            r#"{"instruction": "What is hail?", "output": "Ice."}"#,
            r#"{"question": "What is hail?"}"#,
            r#"{"text": "What is hail?"}"#,
            r#"{"messages": [{"role": "user", "content": "What is hail?"}, {"role": "assistant", "content": "Ice."}]}"#,
            r#"{"prompt": [{"role": "user", "content": "What is hail?"}]}"#,
            r#"{"conversations": [{"from": "human", "value": "What is hail?"}, {"from": "gpt", "value": "Ice."}]}"#,
            r#"{"prompt": [{"role": "user", "content": "What is hail?"}], "chosen": [{"role": "assistant", "content": "Ice."}],
                "rejected": [{"role": "assistant", "content": "Rain."}]}"#,
            r#"{"chosen": [{"role": "user", "content": "What is hail?"}, {"role": "assistant", "content": "Ice."}],
                "rejected": [{"role": "user", "content": "What is hail?"}, {"role": "assistant", "content": "Rain."}]}"#,
        ];
        for shape in shapes {
            let prompts = read(&codec, "rows.jsonl", &shape.replace('\n', " "), false);
            let prompts = prompts.unwrap_or_else(|error| panic!("{shape}: {error}"));
            assert_eq!(prompts, std::slice::from_ref(&asked), "{shape}");
        }
        // rows of an array, with what belongs to them
        let rows =
            r#"[{"id": 7, "prompt": "What is hail?", "category": "weather", "group": "ice", "reference": "Ice."}]"#;
        let [prompt] = &read(&codec, "rows.json", rows, false).expect("read")[..] else { panic!("one row") };
        let all =
            (prompt.id.as_deref(), prompt.category.as_deref(), prompt.group.as_deref(), prompt.reference.as_deref());
        assert_eq!(all, (Some("7"), Some("weather"), Some("ice"), Some("Ice.")));
        assert_eq!((&prompt.ids, &prompt.text), (&asked.ids, &asked.text));
        // pairs that are none are left out, unless none is left
        let pairs = r#"{"prompt": "What is hail?", "chosen": "Ice.", "rejected": "Rain."}
            {"prompt": "What is rain?", "chosen": "Water.", "rejected": 3}"#;
        assert_eq!(read(&codec, "rows.jsonl", &pairs.replace("\n            ", "\n"), false).expect("read").len(), 1);
        let broken = r#"{"prompt": "What is rain?", "chosen": "Water.", "rejected": 3}"#;
        assert!(read(&codec, "rows.jsonl", broken, false).is_err());
        // under the names that a recipe gives its columns
        let columns = crate::data::Columns { prompt: Some("asked".into()), ..Default::default() };
        let [named] =
            &read_columns(&columns, &codec, "rows.jsonl", r#"{"asked": "What is hail?"}"#, false).expect("read")[..]
        else {
            panic!("one row")
        };
        assert_eq!(named, &asked);
        // as it stands, it is no user's message
        let [plain] = &read(&codec, "rows.jsonl", shapes[0], true).expect("read")[..] else { panic!("one row") };
        assert_eq!(codec.decode(&plain.ids), question);
        assert_ne!(plain.ids, asked.ids);
    }

    #[test]
    fn an_answer_is_shown_as_far_as_it_is_certain() {
        let codec = codec();
        let text = "Lumps of ice fall — and then they melt.";
        let ids = codec.encode(text).unwrap_or_else(|bad| panic!("{}", bad.detail));
        let ids = &ids[codec.prefix.len()..];
        let shown = |stops: &[String]| {
            let (mut answer, mut shown) = (Answer::new(&codec, stops), String::new());
            for (i, &id) in ids.iter().enumerate() {
                answer.push(id);
                shown.push_str(&answer.news(i + 1 == ids.len()));
                assert!(answer.stopped() || text.starts_with(&shown), "{shown:?}");
                assert!(!shown.contains(char::REPLACEMENT_CHARACTER));
                if answer.stopped() {
                    break;
                }
            }
            assert_eq!(shown, answer.text());
            shown
        };
        assert_eq!(shown(&[]), text);
        assert_eq!(shown(&["never".into(), String::new()]), text);
        assert_eq!(shown(&[" and then they".into()]), "Lumps of ice fall —");
        assert_eq!(shown(&["melt".into(), "ice fall".into()]), "Lumps of ");
        // the beginning of a stop text that does not come is shown in the end
        assert_eq!(shown(&["melt. Then".into()]), text);
    }
}
