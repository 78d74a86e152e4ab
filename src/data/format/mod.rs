//! What the columns of a file mean.
//!
//! A file has one [`Shape`], recognised by the names of its columns and the types in its first row, and every row is
//! held to it. To add one: a file here with a `record` function, a variant, and its lines in the matches below.

mod completion;
mod conversation;
mod implicit;
mod messages;
mod pair;
mod question;
mod transcript;

use std::fmt;

use serde_json::{Map, Value};

use super::DropReason;
use super::source::kind;
use crate::loss::Examples;
pub(super) use messages::{Message, take as take_messages};

/// Columns that a shape reads, or that change what the others mean.
pub(super) const COLUMNS: [&str; 12] = [
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "messages",
    "conversations",
    "system",
    "tools",
    "chat_template_kwargs",
    "image",
    "images",
];

/// Help where nothing is recognised.
pub(super) const UNDERSTOOD: &str = "what is understood: prompt, chosen, rejected as texts or as message lists; \
     prompt as text beside conversations in chosen and rejected; chosen and rejected alone, with the prompt inside; \
     prompt, completion, label; prompt, completion; messages. Columns of other names are mapped so: \
     [data.columns] prompt = \"question\", chosen = \"good\", rejected = \"bad\"";

/// Columns of a row, by name.
pub(super) type Columns = Map<String, Value>;

/// A row with its meaning.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Record {
    /// Trained on as it stands.
    Plain(Sides<String>),
    /// Rendered by the chat template.
    Chat(Sides<Vec<Message>>),
}

/// A prompt and what follows it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sides<T> {
    pub(super) prompt: T,
    pub(super) chosen: Option<T>,
    pub(super) rejected: Option<T>,
}

/// Why a row cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bad {
    pub(super) reason: DropReason,
    pub(super) detail: String,
}

impl Bad {
    pub(super) fn new(reason: DropReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    fn malformed(detail: impl Into<String>) -> Self {
        Self::new(DropReason::Malformed, detail)
    }
}

/// Whether a shape holds texts or conversations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Trained on as they stand.
    Strings,
    /// Rendered by the chat template.
    Messages,
}

/// What the columns of a file mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// `prompt`, `chosen`, `rejected`.
    Pair(Form),
    /// `prompt` as text, `chosen` and `rejected` as conversations (UltraFeedback-binarized).
    Question,
    /// `chosen` and `rejected` that begin with the same prompt.
    Implicit(Form),
    /// The same as texts with turns marked by `\n\nHuman:` and `\n\nAssistant:` (HH).
    Transcript,
    /// `prompt`, `completion` and, if so labelled, whether it is desirable.
    Completion { form: Form, labelled: bool },
    /// `messages`, of which the last is to be imitated.
    Conversation,
}

impl Shape {
    /// The shape of a file, from a row of it.
    pub(super) fn recognise(row: &Columns) -> Result<Self, String> {
        let form = |column: &str| match row.get(column) {
            None => Ok(None),
            Some(Value::String(_)) => Ok(Some(Form::Strings)),
            Some(value) if messages::looks_like(value) => Ok(Some(Form::Messages)),
            Some(value) => Err(format!("column `{column}` holds {}", kind(value))),
        };
        let prompt = if row.contains_key("prompt") { "prompt" } else { "conversations" };
        if row.contains_key("chosen") || row.contains_key("rejected") {
            let (prompt_form, chosen, rejected) = (form(prompt)?, form("chosen")?, form("rejected")?);
            return match (prompt_form, chosen, rejected) {
                (_, None, _) => Err("has no column `chosen`".into()),
                (_, _, None) => Err("has no column `rejected`".into()),
                (None, Some(Form::Strings), Some(Form::Strings)) => {
                    let both = ["chosen", "rejected"]
                        .iter()
                        .all(|side| row.get(*side).and_then(Value::as_str).is_some_and(transcript::looks_like));
                    Ok(if both { Self::Transcript } else { Self::Implicit(Form::Strings) })
                }
                (None, Some(Form::Messages), Some(Form::Messages)) => Ok(Self::Implicit(Form::Messages)),
                (Some(Form::Strings), Some(Form::Strings), Some(Form::Strings)) => Ok(Self::Pair(Form::Strings)),
                (Some(Form::Messages), Some(Form::Messages), Some(Form::Messages)) => Ok(Self::Pair(Form::Messages)),
                (Some(Form::Strings), Some(Form::Messages), Some(Form::Messages)) => Ok(Self::Question),
                _ => Err(format!("`{prompt}`, `chosen` and `rejected` are partly texts, partly messages")),
            };
        }
        if row.contains_key("completion") {
            let labelled = row.contains_key("label");
            return match (form(prompt)?, form("completion")?) {
                (Some(prompt), Some(completion)) if prompt == completion => {
                    Ok(Self::Completion { form: prompt, labelled })
                }
                (None, _) => Err("has no column `prompt`".into()),
                _ => Err("of `prompt` and `completion`, one is text and one is messages".into()),
            };
        }
        let conversation = if row.contains_key("messages") { "messages" } else { "conversations" };
        match form(conversation)? {
            Some(Form::Messages) => Ok(Self::Conversation),
            _ => Err("has no columns that are recognised".into()),
        }
    }

    /// What a row of this shape says, to a model with or without a chat template.
    pub(super) fn record(self, row: Columns, template: bool) -> Result<Record, Bad> {
        match self {
            Self::Pair(form) => pair::record(row, form),
            Self::Question => question::record(row),
            Self::Implicit(form) => implicit::record(row, form),
            Self::Transcript if template => transcript::record(row),
            Self::Transcript => transcript::plain(row),
            Self::Completion { form, labelled } => completion::record(row, form, labelled),
            Self::Conversation => conversation::record(row),
        }
    }

    /// Whether its rows need a chat template.
    pub(super) fn form(self) -> Form {
        match self {
            Self::Pair(form) | Self::Implicit(form) | Self::Completion { form, .. } => form,
            Self::Question | Self::Conversation => Form::Messages,
            // trained on as it stands where there is no template
            Self::Transcript => Form::Strings,
        }
    }

    /// Refuses a file that has not what the loss reads, with what is wrong and what to do.
    pub(super) fn check_wanted(self, wanted: Examples) -> Result<(), (String, &'static str)> {
        let help = match (self, wanted) {
            (Self::Pair(_) | Self::Question | Self::Implicit(_) | Self::Transcript, _)
            | (Self::Completion { labelled: true, .. }, Examples::Labelled | Examples::Demonstrations)
            | (Self::Completion { labelled: false, .. } | Self::Conversation, Examples::Demonstrations) => {
                return Ok(());
            }
            (Self::Completion { labelled: true, .. }, Examples::Pairs) => {
                "this loss compares a chosen with a rejected completion; [loss.kto] reads single labelled ones"
            }
            (Self::Completion { labelled: false, .. } | Self::Conversation, _) => {
                "there is nothing to prefer in them; [loss.sft] imitates single completions"
            }
        };
        Err((format!("holds {self}"), help))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let as_form = |form: &Form| match form {
            Form::Strings => "texts",
            Form::Messages => "message lists",
        };
        match self {
            Self::Pair(form) => write!(f, "prompt/chosen/rejected as {}", as_form(form)),
            Self::Question => f.write_str("a prompt as text beside chosen/rejected as conversations"),
            Self::Implicit(form) => write!(f, "chosen/rejected as {} with the prompt inside", as_form(form)),
            Self::Transcript => f.write_str("chosen/rejected as Human/Assistant transcripts"),
            Self::Completion { form, labelled: true } => write!(f, "prompt/completion/label as {}", as_form(form)),
            Self::Completion { form, labelled: false } => write!(f, "prompt/completion as {}", as_form(form)),
            Self::Conversation => f.write_str("conversations"),
        }
    }
}

/// Columns that change what a model sees and are not read: better an error than to train on something else.
/// Returns what is wrong and what to do.
pub(super) fn refused(row: &Columns, shape: Shape) -> Option<(String, &'static str)> {
    let filled = |column: &str| row.get(column).is_some_and(|value| !is_nothing(value));
    for column in ["tools", "chat_template_kwargs", "image", "images"] {
        if filled(column) {
            let problem = format!("column `{column}` is part of what the model sees, and is not read");
            return Some((problem, "render it into the prompt, or remove the column"));
        }
    }
    if filled("system") && (shape.form() == Form::Strings || shape == Shape::Transcript) {
        let problem = "column `system` stands beside texts, and nothing says how they are joined".to_owned();
        return Some((problem, "write it into the prompt or use message lists; or remove the column"));
    }
    None
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty() || text == "[]" || text == "{}",
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.values().all(Value::is_null),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Takes a column's text.
fn text(row: &mut Columns, column: &str) -> Result<String, Bad> {
    match row.remove(column) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Null) => Err(Bad::malformed(format!("`{column}` is null"))),
        Some(other) => Err(Bad::malformed(format!("`{column}` is {}, not text", kind(&other)))),
        None => Err(Bad::malformed(format!("`{column}` is missing"))),
    }
}
