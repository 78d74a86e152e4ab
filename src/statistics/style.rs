//! What an answer looks like, as Arena-Hard counts it.

use std::sync::LazyLock;

use regex::Regex;
use serde::Serialize;

/// Length and markdown of an answer; Arena-Hard's `add_markdown_info.py`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Style {
    /// Tokens of the whole answer.
    pub tokens: usize,
    /// Headings, outside of code.
    pub headers: usize,
    /// Items of lists, numbered or not, outside of code.
    pub lists: usize,
    /// Bold spans, outside of code.
    pub bold: usize,
}

macro_rules! pattern {
    ($name:ident, $pattern:literal) => {
        static $name: LazyLock<Regex> =
            LazyLock::new(|| Regex::new($pattern).expect("a constant that a test compiles"));
    };
}

pattern!(CODE, "```([^`]*)```");
pattern!(HEADER, r"(?m)^#{1,6}\s");
pattern!(NUMBERED, r"(?m)^\s*\d+\.\s");
pattern!(BULLET, r"(?m)^\s*[-*+]\s");
pattern!(STARS, r"\*\*[^*\n]+\*\*");
pattern!(LINES, r"__[^_\n]+__");

impl Style {
    /// Of an answer of so many tokens.
    #[must_use]
    pub fn of(text: &str, tokens: usize) -> Self {
        let text = CODE.replace_all(text, "");
        let count = |pattern: &Regex| pattern.find_iter(&text).count();
        Self {
            tokens,
            headers: count(&HEADER),
            lists: count(&NUMBERED) + count(&BULLET),
            bold: count(&STARS) + count(&LINES),
        }
    }

    /// Names of what [`contrast`](Self::contrast) returns.
    pub(super) const FEATURES: [&str; 4] = ["length", "headers", "lists", "bold"];

    /// How this answer differs from another, each in `(−1, 1)`. With `L` the tokens and `ρ = count / (L + 1)`:
    ///
    /// ```text
    /// length (L − L') / (L + L'),   others (ρ − ρ') / (ρ + ρ' + 1)
    /// ```
    pub(super) fn contrast(&self, other: &Self) -> [f64; 4] {
        let (here, there) = (self.tokens as f64, other.tokens as f64);
        let density = |count: usize, other: usize| {
            let (here, there) = (count as f64 / (here + 1.0), other as f64 / (there + 1.0));
            (here - there) / (here + there + 1.0)
        };
        [
            if here + there > 0.0 { (here - there) / (here + there) } else { 0.0 },
            density(self.headers, other.headers),
            density(self.lists, other.lists),
            density(self.bold, other.bold),
        ]
    }
}
