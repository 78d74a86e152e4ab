//! Chat templates, rendered as `transformers` renders them.

use std::fmt::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};
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
        environment.set_formatter(format_as_python);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| {
            jiff::fmt::strtime::format(format, &jiff::Zoned::now())
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        let compiled = without_generation_blocks(source);
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
        let variables = [
            ("messages", Value::from(Serde(messages))),
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

/// Prints None, True and False as Python does.
fn format_as_python(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.write_str("None").map_err(Error::from),
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Error::from),
        _ => escape_formatter(out, state, value),
    }
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
