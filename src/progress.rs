//! What a person sees while the program works: lines and bars on stderr.
//!
//! Bars are drawn only where stderr is a terminal. Elsewhere (a log file, `nohup`) the same progress appears as a
//! plain line now and then, so that neither is silent and no log fills with control characters. stdout is left to
//! results.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How long nothing may be written where there is no terminal.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// How often a bar is drawn again by itself.
const REDRAW_EVERY: Duration = Duration::from_millis(250);

/// stderr.
#[derive(Debug)]
pub struct Console {
    bars: MultiProgress,
    terminal: bool,
    quiet: bool,
}

impl Console {
    /// Bars if stderr is a terminal, plain lines if not, nothing but errors if `quiet`.
    #[must_use]
    pub fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal && !quiet { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { bars: MultiProgress::with_draw_target(target), terminal, quiet }
    }

    /// A console that says nothing but errors.
    #[must_use]
    pub fn silent() -> Self {
        Self::new(true)
    }

    /// Whether stderr is a terminal.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Writes a line, above any bar.
    pub fn line(&self, text: impl Display) {
        if !self.quiet {
            self.error(text);
        }
    }

    /// Writes a line, above any bar, even if all else is to be quiet.
    pub fn error(&self, text: impl Display) {
        // a reader who has gone away is no reason to end a run
        self.bars.suspend(|| _ = writeln!(std::io::stderr(), "{text}"));
    }

    /// Writes a line with a subject in front, in a column: `model    2.8M parameters`.
    pub fn fact(&self, subject: &str, text: impl Display) {
        let text = text.to_string().replace('\n', "\n           ");
        self.line(format_args!("{subject:<10} {text}"));
    }

    /// Writes a warning.
    pub fn warning(&self, text: impl Display) {
        self.line(format_args!("warning: {text}"));
    }

    /// A bar over `total` bytes.
    #[must_use]
    pub fn bytes_bar(&self, what: &'static str, total: u64) -> Bar<'_> {
        self.bar(what, total, "{msg} {wide_bar} {bytes}/{total_bytes}, {eta} left")
    }

    /// A bar over `total` things.
    #[must_use]
    pub fn count_bar(&self, what: &'static str, total: u64) -> Bar<'_> {
        self.bar(what, total, "{msg} {wide_bar} {pos}/{len}, {eta} left")
    }

    /// A bar over the steps of a run, whose message is the current state.
    #[must_use]
    pub fn step_bar(&self, total: u64, done: u64) -> Bar<'_> {
        let bar = self.bar("", total, "{bar:24} {pos}/{len}  {msg}");
        bar.bar.set_position(done);
        bar
    }

    fn bar(&self, what: &'static str, total: u64, template: &str) -> Bar<'_> {
        let style = ProgressStyle::with_template(template).expect("the templates in this file are valid");
        let bar = self.bars.add(ProgressBar::new(total).with_style(style));
        bar.set_message(what);
        // drawn at once and kept alive while one step takes long
        bar.enable_steady_tick(REDRAW_EVERY);
        Bar { bar, what, console: self, last_line: Mutex::new(Instant::now()) }
    }
}

/// Progress through something that may take more than a second.
#[derive(Debug)]
pub struct Bar<'c> {
    bar: ProgressBar,
    what: &'static str,
    console: &'c Console,
    last_line: Mutex<Instant>,
}

impl Bar<'_> {
    /// Moves on by `by`.
    pub fn advance(&self, by: u64) {
        self.bar.inc(by);
        if !self.what.is_empty() && self.due() {
            let (at, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            self.console.line(format_args!("{}: {:.0} %", self.what, 100.0 * at as f64 / total.max(1) as f64));
        }
    }

    /// Shows the state of a run beside the bar; where there is no bar, as a line when `force`d or when the last one is
    /// some time ago.
    pub fn state(&self, text: &str, force: bool) {
        self.bar.set_message(text.to_owned());
        if !self.console.terminal && (force || self.due()) {
            if let Ok(mut last) = self.last_line.lock() {
                *last = Instant::now();
            }
            let (at, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            self.console.line(format_args!("step {at}/{total}  {text}"));
        }
    }

    fn due(&self) -> bool {
        if self.console.terminal {
            return false;
        }
        let Ok(mut last) = self.last_line.lock() else { return false };
        let due = last.elapsed() >= PLAIN_EVERY;
        if due {
            *last = Instant::now();
        }
        due
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A number with thousands separated: 1234567 → `1,234,567`.
#[must_use]
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count for a glance: `1.55M`, `8.03B`, `412`.
#[must_use]
pub fn short(number: usize) -> String {
    let n = number as f64;
    match number {
        0..=9_999 => number.to_string(),
        10_000..=999_999 => format!("{:.0}k", n / 1e3),
        1_000_000..=999_999_999 => format!("{:.2}M", n / 1e6),
        _ => format!("{:.2}B", n / 1e9),
    }
}

/// As much of a text as a message has room for, in characters.
#[must_use]
pub fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The same in one line, without what a terminal would obey.
#[must_use]
pub fn one_line(text: &str, most: usize) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    shortened(&words.collect::<Vec<_>>().join(" "), most)
}

/// A duration for a glance: `7.2 s`, `3 min 05 s`, `2 h 10 min`.
#[must_use]
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..=59 => format!("{seconds:.1} s"),
        60..=3599 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_a_glance() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(short(1_548_000), "1.55M");
        assert_eq!(shortened("grün", 4), "grün");
        assert_eq!(shortened("grüner", 3), "grü...");
        assert_eq!(one_line(" a\n\u{1b}[31m b", 9), "a [31m b");
        assert_eq!(duration(7.23), "7.2 s");
        assert_eq!(duration(185.4), "3 min 05 s");
        assert_eq!(duration(7800.0), "2 h 10 min");
    }
}
