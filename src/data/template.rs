//! Chat templates, rendered as `transformers` renders them.

use std::borrow::Cow;
use std::fmt::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::{Captures, Regex};

use super::format::Message;

/// A budget of steps, about one an instruction or 64 bytes: some seconds, far above any real conversation.
const FUEL: u64 = 20_000_000;

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct Template {
    environment: Environment<'static>,
    source: String,
    /// `bos_token` and the like.
    special_tokens: Vec<(String, String)>,
}

impl Template {
    /// Compiles a template.
    ///
    /// # Errors
    /// What the parser says, with the line.
    pub(super) fn new(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| describe(&e))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", tojson);
        environment.add_filter("trim", trim);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| {
            jiff::fmt::strtime::format(format, &jiff::Zoned::now())
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        // Jinja knows one end of a line
        let compiled = without_generation_blocks(&source.replace("\r\n", "\n").replace('\r', "\n"));
        environment.add_template_owned(NAME, compiled).map_err(|e| describe(&e))?;
        Ok(Self { environment, source: source.to_owned(), special_tokens })
    }

    /// The template as it was written.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// What the template raises, or what is wrong with it.
    pub(super) fn render(&self, messages: &[&Message], add_generation_prompt: bool) -> Result<String, String> {
        let messages: Vec<Cow<'_, Message>> = messages.iter().map(|message| with_reasoning(message)).collect();
        let variables = [
            ("messages", Value::from(Serde(&messages))),
            ("add_generation_prompt", add_generation_prompt.into()),
            // defined, as in transformers
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let tokens = self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let template = self.environment.get_template(NAME).map_err(|e| describe(&e))?;
        template.render(Value::from_pairs(variables.into_iter().chain(tokens))).map_err(|e| describe(&e))
    }
}

/// What Python takes for white space; Unicode's property lacks the four separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// Methods of Python's values.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    // those that are about white space
    if let (Some(text), []) = (value.as_str(), args) {
        match method {
            "strip" => return Ok(text.trim_matches(is_space).into()),
            "lstrip" => return Ok(text.trim_start_matches(is_space).into()),
            "rstrip" => return Ok(text.trim_end_matches(is_space).into()),
            "split" => return Ok(text.split(is_space).filter(|word| !word.is_empty()).collect()),
            "splitlines" => return Ok(lines(text).into_iter().collect()),
            _ => (),
        }
    }
    unknown_method_callback(state, value, method, args)
}

/// Jinja's filter.
fn trim(value: &Value, chars: Option<Cow<'_, str>>) -> String {
    let text = value.to_string();
    match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        None => text.trim_matches(is_space).to_owned(),
    }
}

/// Lines as Python ends them, the last one where there is something in it.
fn lines(text: &str) -> Vec<&str> {
    let is_end = |c| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (line, end) = rest.split_at(rest.find(is_end).unwrap_or(rest.len()));
        lines.push(line);
        let end = end.strip_prefix("\r\n").unwrap_or_else(|| {
            let mut chars = end.chars();
            chars.next();
            chars.as_str()
        });
        rest = end;
    }
    lines
}

/// What a model thought before it answered goes by several names; transformers gives a template the two that are in use.
fn with_reasoning(message: &Message) -> Cow<'_, Message> {
    const NAMES: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let named = NAMES.iter().find_map(|name| message.rest.get(*name).filter(|value| !value.is_null()));
    let Some(reasoning) = named.cloned() else { return Cow::Borrowed(message) };
    let mut message = message.clone();
    if !message.rest.contains_key("thinking") {
        message.rest.insert("thinking".into(), reasoning.clone());
    }
    message.rest.insert("reasoning_content".into(), reasoning);
    Cow::Owned(message)
}

const NAME: &str = "chat template";

fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
    match (error.kind(), error.line()) {
        (ErrorKind::OutOfFuel, _) => "it runs without end".to_owned(),
        (_, Some(line)) => format!("{what} (line {line} of the template)"),
        (_, None) => what,
    }
}

/// `{% generation %}` marks the assistant's tokens for transformers and prints what is inside. A block with a scope
/// of its own and the same control of white space does the same.
fn without_generation_blocks(source: &str) -> String {
    let Ok(tag) = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}") else { return source.to_owned() };
    tag.replace_all(source, |tag: &Captures<'_>| {
        format!("{{%{} {}with {}%}}", &tag[1], tag.get(2).map_or("", |end| end.as_str()), &tag[3])
    })
    .into_owned()
}

/// Python's `json.dumps` with the defaults of transformers: `ensure_ascii=False`, separators with a space.
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<(String, String)> = match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([item, key]) => Some((item.clone(), key.clone())),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators are two")),
        None => None,
    };
    options.assert_all_used()?;
    let json =
        serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::InvalidOperation, "tojson").with_source(e))?;
    let (item, key) =
        separators.unwrap_or_else(|| (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()));
    let mut python = PythonJson {
        out: String::new(),
        item,
        key,
        indent,
        ascii: ascii.unwrap_or(false),
        sorted: sorted.unwrap_or(false),
    };
    python.write(&json, 1);
    Ok(python.out)
}

struct PythonJson {
    out: String,
    item: String,
    key: String,
    indent: Option<usize>,
    ascii: bool,
    sorted: bool,
}

impl PythonJson {
    fn write(&mut self, value: &serde_json::Value, depth: usize) {
        match value {
            serde_json::Value::Array(items) => {
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(i, depth);
                    self.write(item, depth + 1);
                }
                self.close(']', items.is_empty(), depth);
            }
            serde_json::Value::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sorted {
                    fields.sort_by_key(|(name, _)| *name);
                }
                self.out.push('{');
                for (i, (name, value)) in fields.iter().enumerate() {
                    self.separate(i, depth);
                    self.scalar(&serde_json::Value::from(name.as_str()));
                    self.out.push_str(&self.key);
                    self.write(value, depth + 1);
                }
                self.close('}', fields.is_empty(), depth);
            }
            scalar => self.scalar(scalar),
        }
    }

    fn scalar(&mut self, value: &serde_json::Value) {
        let text = value.to_string();
        if !self.ascii {
            self.out.push_str(&text);
            return;
        }
        for c in text.chars() {
            if c.is_ascii() {
                self.out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(self.out, "\\u{unit:04x}");
                }
            }
        }
    }

    fn separate(&mut self, i: usize, depth: usize) {
        if i > 0 {
            self.out.push_str(&self.item);
        }
        self.new_line(depth);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.new_line(depth - 1);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use serde_json::{Map, Value as Json};

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    fn read_json<T: serde::de::DeserializeOwned>(file: &Path) -> T {
        serde_json::from_str(&std::fs::read_to_string(file).expect("the fixture")).expect("valid JSON")
    }

    fn conversations() -> BTreeMap<String, Vec<Message>> {
        let conversations: BTreeMap<String, Vec<Map<String, Json>>> =
            read_json(&fixture("templates/conversations.json"));
        let message = |mut fields: Map<String, Json>| {
            let mut take = |name| fields.shift_remove(name).and_then(|v| v.as_str().map(ToOwned::to_owned));
            Message { role: take("role").expect("a role"), content: take("content").expect("content"), rest: fields }
        };
        conversations.into_iter().map(|(name, list)| (name, list.into_iter().map(message).collect())).collect()
    }

    fn tokens() -> Vec<(String, String)> {
        [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.to_owned(), token.to_owned())).into()
    }

    /// Renders every conversation as a prompt and whole.
    fn renders(template: &Template) -> BTreeMap<String, [Result<String, String>; 2]> {
        let render = |messages: &Vec<Message>| {
            [true, false].map(|prompt| template.render(&messages.iter().collect::<Vec<_>>(), prompt))
        };
        conversations().iter().map(|(name, messages)| (name.clone(), render(messages))).collect()
    }

    #[test]
    fn templates_render_as_in_transformers() {
        let expected: BTreeMap<String, BTreeMap<String, [Json; 2]>> = read_json(&fixture("templates/expected.json"));
        assert_eq!(expected.len(), 6);
        for (name, expected) in expected {
            let source = std::fs::read_to_string(fixture("templates").join(&name)).expect("the template");
            let template = Template::new(&source, tokens()).expect("it parses");
            for (conversation, rendered) in renders(&template) {
                for (rendered, expected) in rendered.iter().zip(&expected[&conversation]) {
                    match (rendered, expected) {
                        (Ok(text), Json::String(expected)) => assert_eq!(text, expected, "{name}, {conversation}"),
                        (Err(error), Json::Object(expected)) => {
                            let message = expected["error"].as_str().expect("a message");
                            assert!(error.starts_with(message), "{name}, {conversation}: {error}");
                        }
                        _ => panic!("{name}, {conversation}: {rendered:?}, not {expected}"),
                    }
                }
            }
        }
    }

    /// Outputs of templates that others wrote are known by their digests alone.
    #[test]
    fn real_templates_render_as_in_transformers() {
        let Some(real) = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from) else {
            eprintln!("real_templates_render_as_in_transformers: skipped, DPO_LORA_REAL is not set");
            return;
        };
        let expected: Json = read_json(&fixture("data/real.json"));
        let expected = expected["templates"].as_object().expect("templates by name");
        assert_eq!(expected.len(), 8);
        for (name, expected) in expected {
            let source = std::fs::read_to_string(real.join("chat_templates").join(name)).expect("the template");
            // the day on which the script says it is
            let source = source.replace("strftime_now(\"%d %b %Y\")", "\"23 Nov 2026\"");
            let template = Template::new(&source, tokens()).expect("it parses");
            for (conversation, rendered) in renders(&template) {
                for (rendered, expected) in rendered.iter().zip(expected[&conversation].as_array().expect("two")) {
                    let digest = |text: &str| crate::data::tests::digest(text.bytes().map(u64::from));
                    let found = match rendered {
                        Ok(text) => digest(text),
                        // the template's own words, with the line after them
                        Err(error) => {
                            format!("raises {}", digest(error.rsplit_once(" (line ").map_or(error.as_str(), |e| e.0)))
                        }
                    };
                    assert_eq!(found, *expected, "{name}, {conversation}: {rendered:?}");
                }
            }
        }
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let endless = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
        let error = Template::new(endless, tokens()).expect("it parses").render(&[], false).expect_err("it ends");
        assert_eq!(error, "it runs without end");
        let large = "{{ 'x' * 10000000000 }}";
        assert!(Template::new(large, tokens()).expect("it parses").render(&[], false).is_err());
    }

    #[test]
    fn a_broken_template_is_shown_with_its_line() {
        let error = Template::new("{{ bos_token }}\n{% for message in %}", tokens()).expect_err("it is broken");
        assert!(error.contains("(line 2 of the template)"), "{error}");
    }
}
