//! What a judge said, read strictly: what cannot be understood is no verdict, and never a tie.

use std::sync::LazyLock;

use clap::ValueEnum;
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::progress::shortened;
use crate::statistics::{Scale, Verdict, label_share};

/// How a judge says what it prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// An object with `reasoning` and `verdict`, asked for by a JSON schema where the endpoint knows such.
    Json,
    /// A mark in the text, `[[A]]` or what the prompt asks for; the last one counts.
    Tag,
    /// The probabilities of the two labels as the next token.
    Logprob,
}

impl Form {
    /// As files have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Tag => "tag",
            Self::Logprob => "logprob",
        }
    }
}

/// A verdict that was understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Understood {
    /// For what stood as A, in `[0, 1]`.
    pub vote: f64,
    /// `A>B` and the like, or the share of A.
    pub verdict: String,
    /// What was said besides.
    pub reason: Option<String>,
}

/// An answer of a judge.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The object of `/chat/completions`.
    pub response: &'a Value,
}

macro_rules! pattern {
    ($name:ident, $pattern:literal) => {
        static $name: LazyLock<Regex> =
            LazyLock::new(|| Regex::new($pattern).expect("a constant that a test compiles"));
    };
}

pattern!(DOUBLE, r"\[\[\s*(A>>B|A>B|A=B|B>A|B>>A|B=A|A<<B|A<B|B<A|B<<A|A|B|C|TIE)\s*\]\]");
pattern!(SINGLE, r"\[\s*(A>>B|A>B|A=B|B>A|B>>A|B=A)\s*\]");
pattern!(LINE, r#"(?im)^[\s*_#>]*(?:more helpful|preferred)[\s*_]*:[\s*_"'<]*([AB])\b[^\n]{0,3}$"#);
pattern!(FENCED, r"(?s)```(?:json)?\s*\n(.*?)```");

impl Answer<'_> {
    fn choice(&self) -> Option<&Value> {
        self.response.get("choices")?.get(0)
    }

    /// What was said, without thoughts.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        let text = self.choice()?.get("message")?.get("content")?.as_str()?;
        match (text.rfind("</think>"), text.find("<think>")) {
            (Some(end), _) => Some(&text[end + "</think>".len()..]),
            // it was cut off while it thought
            (None, Some(_)) => None,
            (None, None) => Some(text),
        }
    }

    fn refusal(&self) -> Option<&str> {
        self.choice()?.get("message")?.get("refusal")?.as_str()
    }

    fn was_cut(&self) -> bool {
        self.choice().and_then(|choice| choice.get("finish_reason")).and_then(Value::as_str) == Some("length")
    }

    /// What it means.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn understand(&self, form: Form, labels: [&str; 2], scale: Scale) -> Result<Understood, String> {
        if let Some(refusal) = self.refusal() {
            return Err(format!("the judge refuses: {refusal}"));
        }
        if form == Form::Logprob {
            return self.share(labels);
        }
        let text = self.text().map(str::trim).filter(|text| !text.is_empty());
        let text = text.ok_or_else(|| match self.was_cut() {
            true => "it was cut off before it said anything: raise max_tokens".to_owned(),
            false => "it says nothing".to_owned(),
        })?;
        let found = match form {
            Form::Json => object(text),
            _ => tag(text),
        };
        let (verdict, reason) = found.ok_or_else(|| {
            let cut = if self.was_cut() { "; it was cut off: raise max_tokens" } else { "" };
            format!("there is no verdict in it{cut}: {}", shortened(text, 300))
        })?;
        Ok(Understood {
            vote: verdict.vote(scale),
            verdict: verdict.name().to_owned(),
            reason: reason.map(|reason| shortened(&reason, 2000)).filter(|reason| !reason.is_empty()),
        })
    }

    /// The share of the label A in the first token that is not white space.
    fn share(&self, labels: [&str; 2]) -> Result<Understood, String> {
        let tokens = self.choice().and_then(|choice| choice.get("logprobs")?.get("content")?.as_array());
        let tokens = tokens.ok_or("it comes without log-probs")?;
        let is_text =
            |token: &&Value| token.get("token").and_then(Value::as_str).is_some_and(|token| !token.trim().is_empty());
        let first = tokens.iter().find(is_text).ok_or("it says nothing")?;
        let likely = first.get("top_logprobs").and_then(Value::as_array).filter(|list| !list.is_empty());
        let likely = likely.ok_or("it comes without top_logprobs")?;
        let pairs =
            likely.iter().filter_map(|entry| Some((entry.get("token")?.as_str()?, entry.get("logprob")?.as_f64()?)));
        let share = label_share(pairs, labels[0], labels[1]);
        let share = share.ok_or_else(|| {
            let token = first.get("token").and_then(Value::as_str).unwrap_or_default();
            format!("`{}` and `{}` are not what it wants to say: {token:?}", labels[0], labels[1])
        })?;
        Ok(Understood { vote: share, verdict: format!("A {share:.3}"), reason: None })
    }
}

/// The verdict of a JSON object, and its reasoning: of the whole text, else of the last fenced block, else of the last
/// object in the text.
fn object(text: &str) -> Option<(Verdict, Option<String>)> {
    let read = |text: &str| -> Option<(Verdict, Option<String>)> {
        let value: Value = serde_json::from_str(text.trim()).ok()?;
        let verdict = match value.get("verdict")?.as_str()?.trim().to_uppercase().as_str() {
            "A" => Verdict::A,
            "B" => Verdict::B,
            "TIE" | "C" => Verdict::Tie,
            _ => return None,
        };
        Some((verdict, value.get("reasoning").and_then(Value::as_str).map(ToOwned::to_owned)))
    };
    let fenced = || FENCED.captures_iter(text).last().and_then(|block| read(block.get(1)?.as_str()));
    let last = || {
        let end = text.rfind('}')?;
        text[..end].rmatch_indices('{').find_map(|(start, _)| read(&text[start..=end]))
    };
    read(text).or_else(fenced).or_else(last)
}

/// The last mark in a text, and what is said besides.
fn tag(text: &str) -> Option<(Verdict, Option<String>)> {
    let upper = text.to_ascii_uppercase();
    let last = |pattern: &Regex| {
        pattern.captures_iter(&upper).last().and_then(|found| Some(found.get(1)?.as_str().to_owned()))
    };
    let mark = last(&DOUBLE).or_else(|| last(&LINE)).or_else(|| last(&SINGLE))?;
    let verdict = match mark.as_str() {
        "A>>B" | "B<<A" => Verdict::MuchA,
        "A>B" | "B<A" | "A" => Verdict::A,
        "B>A" | "A<B" | "B" => Verdict::B,
        "B>>A" | "A<<B" => Verdict::MuchB,
        _ => Verdict::Tie,
    };
    Some((verdict, Some(text.to_owned())))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(content: &str) -> Value {
        json!({"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]})
    }

    fn verdict(form: Form, content: &str) -> Option<String> {
        let response = said(content);
        let understood = Answer { response: &response }.understand(form, ["A", "B"], Scale::Three);
        understood.ok().map(|understood| understood.verdict)
    }

    #[test]
    fn objects() {
        let of = |content| verdict(Form::Json, content);
        assert_eq!(of(r#"{"reasoning": "x", "verdict": "A"}"#).as_deref(), Some("A>B"));
        assert_eq!(of(" {\"verdict\": \" tie\"}\n").as_deref(), Some("A=B"));
        assert_eq!(of("Well.\n```json\n{\"verdict\": \"B\"}\n```\nSo.").as_deref(), Some("B>A"));
        assert_eq!(
            of("I say {\"verdict\": \"A\"}, no: {\"reasoning\": \"{}\", \"verdict\": \"b\"}").as_deref(),
            Some("B>A")
        );
        assert_eq!(of("<think>{\"verdict\": \"B\"}</think>{\"verdict\": \"A\"}").as_deref(), Some("A>B"));
        for none in
            ["", "A", "{\"verdict\": \"A or B\"}", "{\"verdict\": 1}", "{\"verdict\": \"A\"", "null", "[]", "}{"]
        {
            assert_eq!(of(none), None, "{none}");
        }
        assert_eq!(of("<think>{\"verdict\": \"B\"}"), None);
    }

    #[test]
    fn marks() {
        let of = |content| verdict(Form::Tag, content);
        assert_eq!(of("[[A]] at first, but [[B]]").as_deref(), Some("B>A"));
        assert_eq!(of("tie: [[c]]").as_deref(), Some("A=B"));
        assert_eq!(of("My final verdict is: [[A>>B]].").as_deref(), Some("A>>B"));
        assert_eq!(of("[B>A]").as_deref(), Some("B>A"));
        assert_eq!(of("Comparison: A is short.\nMore helpful: \"A\"").as_deref(), Some("A>B"));
        assert_eq!(of("Comparison: ...\n**Preferred:** B.").as_deref(), Some("B>A"));
        for none in ["", "A", "I prefer A.", "More helpful: A or B, who knows", "[[A or B]]", "[A]"] {
            assert_eq!(of(none), None, "{none}");
        }
    }

    #[test]
    fn shares_of_labels() {
        let response = |top: Value| {
            json!({"choices": [{"message": {"content": "m"}, "logprobs": {"content": [
                {"token": " ", "logprob": 0.0, "top_logprobs": [{"token": "M", "logprob": 0.0}]},
                {"token": "m", "logprob": -0.3, "top_logprobs": top},
            ]}}]})
        };
        let of = |response: &Value| Answer { response }.understand(Form::Logprob, ["m", "M"], Scale::Three);
        let (p, q) = (0.6f64, 0.2f64);
        let both = response(
            json!([{"token": " m", "logprob": p.ln()}, {"token": "M", "logprob": q.ln()}, {"token": "x", "logprob": -3.0}]),
        );
        assert!((of(&both).expect("a share").vote - 0.75).abs() < 1e-12);
        let other = response(json!([{"token": "The", "logprob": -0.01}, {"token": "M", "logprob": -5.0}]));
        assert!(of(&other).expect_err("neither").contains("not what it wants to say"));
        assert!(of(&said("m")).expect_err("none").contains("without log-probs"));
    }

    #[test]
    fn refusals_and_empty_answers_are_no_verdicts() {
        let refusal = json!({"choices": [{"message": {"content": null, "refusal": "I cannot."}}]});
        let null = json!({"choices": [{"message": {"content": null}, "finish_reason": "length"}]});
        for (response, problem) in [
            (refusal, "refuses"),
            (null, "cut off"),
            (json!({}), "says nothing"),
            (json!({"choices": []}), "says nothing"),
        ] {
            let error = Answer { response: &response }.understand(Form::Json, ["A", "B"], Scale::Three);
            let error = error.expect_err("no verdict");
            assert!(error.contains(problem), "{error}");
        }
    }
}
