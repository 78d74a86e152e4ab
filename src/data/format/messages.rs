//! Conversations: `role`/`content` messages, and ShareGPT's `from`/`value`.

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Bad, Columns};
use crate::data::DropReason;
use crate::data::source::kind;

/// One turn.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: String,
    /// What else a template may look at, such as tool calls.
    #[serde(flatten)]
    pub(crate) rest: Map<String, Value>,
}

impl Message {
    pub(crate) fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), rest: Map::new() }
    }

    /// Whether it is the model's turn.
    pub(crate) fn is_models(&self) -> bool {
        self.role == ASSISTANT
    }

    fn is_empty(&self) -> bool {
        self.content.trim().is_empty() && self.rest.is_empty()
    }
}

/// The model's role.
pub(super) const ASSISTANT: &str = "assistant";

/// Whether a value is a list of messages, or one.
pub(super) fn looks_like(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.first().is_some_and(Value::is_object) && items.iter().all(looks_like_one),
        other => looks_like_one(other),
    }
}

fn looks_like_one(value: &Value) -> bool {
    value.as_object().is_some_and(|m| m.contains_key("role") || m.contains_key("from"))
}

/// Takes a column's messages.
pub(crate) fn take(row: &mut Columns, column: &str) -> Result<Vec<Message>, Bad> {
    match row.remove(column) {
        Some(Value::Array(items)) => {
            items.into_iter().zip(1..).map(|(item, number)| message(item, number, column)).collect()
        }
        Some(one @ Value::Object(_)) => Ok(vec![message(one, 1, column)?]),
        Some(Value::Null) => Err(Bad::malformed(format!("`{column}` is null"))),
        Some(other) => Err(Bad::malformed(format!("`{column}` is {}, not a list of messages", kind(&other)))),
        None => Err(Bad::malformed(format!("`{column}` is missing"))),
    }
}

fn message(value: Value, number: usize, column: &str) -> Result<Message, Bad> {
    let bad = |what: &str| Bad::malformed(format!("message {number} of `{column}` {what}"));
    let Value::Object(mut fields) = value else { return Err(bad(&format!("is {}", kind(&value)))) };
    let (role, content) = match (fields.shift_remove("role"), fields.shift_remove("from")) {
        (Some(Value::String(role)), _) => (role, fields.shift_remove("content")),
        (None | Some(Value::Null), Some(Value::String(from))) => {
            let role = match from.as_str() {
                "human" => "user",
                "gpt" => ASSISTANT,
                "system" | "user" | ASSISTANT | "tool" => &from,
                other => return Err(bad(&format!("is from `{other}`; known are human, gpt, system"))),
            };
            (role.to_owned(), fields.shift_remove("value"))
        }
        _ => return Err(bad("has no role")),
    };
    // a table fills the fields that some messages lack with nulls
    fields.retain(|_, value| !value.is_null());
    let content = match content {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            parts.iter().map(part).collect::<Option<_>>().ok_or_else(|| bad("has content that is not text"))?
        }
        None | Some(Value::Null) if fields.contains_key("tool_calls") => String::new(),
        None | Some(Value::Null) => return Err(bad("has no content")),
        Some(other) => return Err(bad(&format!("has {} as content", kind(&other)))),
    };
    Ok(Message { role, content, rest: fields })
}

/// `{"type": "text", "text": "..."}`
fn part(value: &Value) -> Option<&str> {
    value.get("type").is_none_or(|kind| kind == "text").then(|| value.get("text")?.as_str())?
}

/// Takes the system message that stands in a column of its own.
pub(super) fn with_system(row: &mut Columns, mut prompt: Vec<Message>) -> Result<Vec<Message>, Bad> {
    match row.remove("system") {
        Some(Value::String(system)) if !system.is_empty() => {
            if prompt.iter().any(|message| message.role == "system") {
                return Err(Bad::malformed("there is a `system` column and a system message"));
            }
            prompt.insert(0, Message::new("system", system));
        }
        None | Some(Value::Null | Value::String(_)) => {}
        Some(other) => return Err(Bad::malformed(format!("`system` is {}, not text", kind(&other)))),
    }
    Ok(prompt)
}

/// Checks that a prompt ends before a turn of the model.
pub(super) fn check_prompt(prompt: &[Message]) -> Result<(), Bad> {
    match prompt.last() {
        None => Err(Bad::new(DropReason::EmptyPrompt, "the prompt has no messages")),
        Some(last) if last.is_models() => Err(Bad::malformed("the prompt ends in a turn of the assistant")),
        Some(_) => Ok(()),
    }
}

/// Checks that a completion is the model's, every turn of it: others are not the model's to learn.
pub(super) fn check_completion(completion: &[Message], column: &str) -> Result<(), Bad> {
    if completion.iter().all(Message::is_empty) {
        return Err(Bad::new(DropReason::EmptyCompletion, format!("`{column}` is empty")));
    }
    match completion.iter().find(|message| !message.is_models()) {
        None => Ok(()),
        Some(other) => {
            let detail = format!("`{column}` has a turn of `{}` after the prompt", other.role);
            Err(Bad::new(DropReason::NoCommonPrompt, detail))
        }
    }
}

/// A prompt and two completions, checked.
pub(super) fn pair(prompt: Vec<Message>, chosen: Vec<Message>, rejected: Vec<Message>) -> Result<super::Record, Bad> {
    check_prompt(&prompt)?;
    check_completion(&chosen, "chosen")?;
    check_completion(&rejected, "rejected")?;
    Ok(super::Record::Chat(super::Sides { prompt, chosen: Some(chosen), rejected: Some(rejected) }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(value: Value) -> Result<Vec<Message>, Bad> {
        let Value::Object(mut row) = json!({"prompt": value}) else { panic!("an object") };
        take(&mut row, "prompt")
    }

    #[test]
    fn both_namings_give_the_same_messages() {
        let expected =
            [Message::new("system", "Be brief."), Message::new("user", "Hi"), Message::new("assistant", "Yo")];
        let role = json!([{"role": "system", "content": "Be brief."}, {"content": "Hi", "role": "user", "name": null},
            {"role": "assistant", "content": [{"type": "text", "text": "Yo"}]}]);
        let from = json!([{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Yo"}]);
        assert_eq!(parsed(role).expect("messages"), expected);
        assert_eq!(parsed(from).expect("messages"), expected);
        assert_eq!(parsed(json!({"from": "human", "value": "Hi"})).expect("one message"), expected[1..2]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let detail = |value| parsed(value).expect_err("malformed").detail;
        assert_eq!(detail(json!([{"role": "user"}])), "message 1 of `prompt` has no content");
        assert_eq!(detail(json!([{"content": "x"}])), "message 1 of `prompt` has no role");
        assert_eq!(detail(json!(["x"])), "message 1 of `prompt` is text");
        let image = json!([{"role": "user", "content": [{"type": "image"}]}]);
        assert_eq!(detail(image), "message 1 of `prompt` has content that is not text");
        let from = json!([{"from": "human", "value": "x"}, {"from": "bing", "value": "y"}]);
        assert_eq!(detail(from), "message 2 of `prompt` is from `bing`; known are human, gpt, system");
    }
}
