//! What a plot is drawn of, and its SVG.
//!
//! A [`Drawing`] is a list of paths, circles and texts. It becomes SVG here and pixels in [`super::png`], so that both
//! show the same.

use std::fmt::Write;

use super::font;

/// A colour by its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ink {
    /// One of six that tell series apart, also for eyes that see fewer colours.
    Series(usize),
    /// Text.
    Text,
    /// Text that is read second.
    Muted,
    /// Grid lines.
    Grid,
    /// What is behind everything.
    Ground,
    /// What went well.
    Good,
    /// What did not.
    Bad,
}

/// Where an SVG will stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    /// In a page, whose CSS variables say the colours.
    Page,
    /// Alone in a file, with colours of its own on white.
    File,
}

/// Okabe and Ito's palette, <https://jfly.uni-koeln.de/color/>, which people with any colour vision tell apart; the
/// yellow, which does not show on white, left out.
const SERIES: [(&str, [u8; 3]); 6] = [
    ("var(--s0)", [0x00, 0x72, 0xb2]),
    ("var(--s1)", [0x00, 0x9e, 0x73]),
    ("var(--s2)", [0xd5, 0x5e, 0x00]),
    ("var(--s3)", [0xcc, 0x79, 0xa7]),
    ("var(--s4)", [0xe6, 0x9f, 0x00]),
    ("var(--s5)", [0x56, 0xb4, 0xe9]),
];

impl Ink {
    fn variable_and_rgb(self) -> (&'static str, [u8; 3]) {
        match self {
            Self::Series(i) => SERIES[i % SERIES.len()],
            Self::Text => ("var(--text)", [0x1f, 0x1f, 0x1d]),
            Self::Muted => ("var(--muted)", [0x6a, 0x6a, 0x66]),
            Self::Grid => ("var(--grid)", [0xe3, 0xe2, 0xde]),
            Self::Ground => ("var(--card)", [0xff, 0xff, 0xff]),
            Self::Good => ("var(--good)", [0x1a, 0x7f, 0x4b]),
            Self::Bad => ("var(--bad)", [0xb4, 0x2a, 0x1f]),
        }
    }

    /// Red, green and blue where there is no page.
    #[must_use]
    pub fn rgb(self) -> [u8; 3] {
        self.variable_and_rgb().1
    }

    fn css(self, theme: Theme) -> String {
        let (variable, [r, g, b]) = self.variable_and_rgb();
        match theme {
            Theme::Page => variable.to_owned(),
            Theme::File => format!("#{r:02x}{g:02x}{b:02x}"),
        }
    }
}

/// Which point of a text stands at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// Its beginning.
    Start,
    /// Its middle.
    Middle,
    /// Its end.
    End,
}

/// One thing drawn. Places are in pixels from the top left corner.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// Straight lines from point to point.
    Path {
        /// The points.
        points: Vec<(f64, f64)>,
        /// Colour and width of the line.
        stroke: Option<(Ink, f64)>,
        /// Colour of the inside.
        fill: Option<Ink>,
        /// From 0 to 1.
        opacity: f64,
    },
    /// A circle.
    Circle {
        /// Its centre.
        at: (f64, f64),
        /// Its radius.
        radius: f64,
        /// Colour of its line.
        stroke: Ink,
        /// Colour of the inside.
        fill: Ink,
        /// From 0 to 1.
        opacity: f64,
        /// What a pointer over it shows.
        note: String,
    },
    /// A line of text.
    Text {
        /// Where its base line begins, has its middle or ends.
        at: (f64, f64),
        /// Which of the three.
        anchor: Anchor,
        /// The text.
        text: String,
        /// Height of the font.
        size: f64,
        /// Its colour.
        ink: Ink,
        /// Whether it is heavier.
        bold: bool,
    },
}

/// A picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawing {
    /// In pixels.
    pub width: f64,
    /// In pixels.
    pub height: f64,
    /// What somebody hears who does not see it.
    pub description: String,
    /// What is drawn, the hindmost first.
    pub items: Vec<Item>,
}

impl Drawing {
    /// An empty picture.
    #[must_use]
    pub fn new(width: f64, height: f64, description: impl Into<String>) -> Self {
        Self { width, height, description: description.into(), items: Vec::new() }
    }

    pub(super) fn line(&mut self, points: Vec<(f64, f64)>, ink: Ink, width: f64) {
        self.items.push(Item::Path { points, stroke: Some((ink, width)), fill: None, opacity: 1.0 });
    }

    pub(super) fn rectangle(&mut self, (x0, y0): (f64, f64), (x1, y1): (f64, f64), fill: Ink, opacity: f64) {
        let points = vec![(x0, y0), (x1, y0), (x1, y1), (x0, y1)];
        self.items.push(Item::Path { points, stroke: None, fill: Some(fill), opacity });
    }

    pub(super) fn text(&mut self, at: (f64, f64), anchor: Anchor, text: &str, size: f64, ink: Ink) {
        self.items.push(Item::Text { at, anchor, text: text.to_owned(), size, ink, bold: false });
    }

    pub(super) fn heading(&mut self, at: (f64, f64), text: &str, size: f64) {
        let text = text.to_owned();
        self.items.push(Item::Text { at, anchor: Anchor::Start, text, size, ink: Ink::Text, bold: true });
    }

    /// Puts another picture into this one, its corner at `corner`.
    pub(super) fn place(&mut self, other: Self, corner: (f64, f64)) {
        let moved = |(x, y): (f64, f64)| (x + corner.0, y + corner.1);
        self.items.extend(other.items.into_iter().map(|mut item| {
            match &mut item {
                Item::Path { points, .. } => points.iter_mut().for_each(|point| *point = moved(*point)),
                Item::Circle { at, .. } | Item::Text { at, .. } => *at = moved(*at),
            }
            item
        }));
    }

    /// Pictures in rows of `columns`, under a title.
    #[must_use]
    pub fn grid(title: &str, pictures: Vec<Self>, columns: usize) -> Self {
        const GAP: f64 = 28.0;
        let top = 52.0;
        let (width, height) = pictures.iter().fold((0f64, 0f64), |(w, h), p| (w.max(p.width), h.max(p.height)));
        let rows = pictures.len().div_ceil(columns);
        let descriptions: Vec<&str> = pictures.iter().map(|picture| picture.description.as_str()).collect();
        let mut whole = Self::new(
            GAP + (width + GAP) * columns.min(pictures.len()) as f64,
            top + (height + GAP) * rows as f64,
            format!("{title}: {}", descriptions.join("; ")),
        );
        whole.heading((GAP, 34.0), title, 18.0);
        for (i, picture) in pictures.into_iter().enumerate() {
            let (row, column) = (i / columns, i % columns);
            whole.place(picture, (GAP + (width + GAP) * column as f64, top + (height + GAP) * row as f64));
        }
        whole
    }

    /// As SVG.
    #[must_use]
    pub fn svg(&self, theme: Theme) -> String {
        let (width, height) = (coordinate(self.width), coordinate(self.height));
        let mut svg = format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\"");
        match theme {
            Theme::Page => svg.push_str(" class=\"chart\""),
            Theme::File => {
                let _ = write!(
                    svg,
                    " xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
                     font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif\""
                );
            }
        }
        let _ = write!(svg, "><title>{}</title>", escaped(&self.description));
        if theme == Theme::File {
            let _ = write!(svg, "<rect width=\"100%\" height=\"100%\" fill=\"{}\"/>", Ink::Ground.css(theme));
        }
        for item in &self.items {
            item.write(&mut svg, theme);
        }
        svg.push_str("</svg>\n");
        svg
    }
}

impl Item {
    fn write(&self, svg: &mut String, theme: Theme) {
        // writing into a String cannot fail
        match self {
            Self::Path { points, stroke, fill, opacity } => {
                svg.push_str("<path d=\"");
                for (i, (x, y)) in points.iter().enumerate() {
                    let _ = write!(svg, "{}{} {}", if i == 0 { 'M' } else { 'L' }, coordinate(*x), coordinate(*y));
                }
                if fill.is_some() {
                    svg.push('Z');
                }
                let _ = write!(svg, "\" fill=\"{}\"", fill.map_or("none".into(), |ink| ink.css(theme)));
                if let Some((ink, width)) = stroke {
                    let (ink, width) = (ink.css(theme), coordinate(*width));
                    let _ = write!(svg, " stroke=\"{ink}\" stroke-width=\"{width}\"");
                    svg.push_str(" stroke-linejoin=\"round\" stroke-linecap=\"round\"");
                }
                write_opacity(svg, *opacity);
                svg.push_str("/>");
            }
            Self::Circle { at: (x, y), radius, stroke, fill, opacity, note } => {
                let (stroke, fill) = (stroke.css(theme), fill.css(theme));
                let _ = write!(
                    svg,
                    "<circle cx=\"{}\" cy=\"{}\" r=\"{}\" fill=\"{fill}\" stroke=\"{stroke}\" stroke-width=\"1.75\"",
                    coordinate(*x),
                    coordinate(*y),
                    coordinate(*radius)
                );
                write_opacity(svg, *opacity);
                match note.is_empty() {
                    true => svg.push_str("/>"),
                    false => {
                        let _ = write!(svg, "><title>{}</title></circle>", escaped(note));
                    }
                }
            }
            Self::Text { at: (x, y), anchor, text, size, ink, bold } => {
                let anchor = match anchor {
                    Anchor::Start => "",
                    Anchor::Middle => " text-anchor=\"middle\"",
                    Anchor::End => " text-anchor=\"end\"",
                };
                let weight = if *bold { " font-weight=\"600\"" } else { "" };
                let _ = write!(
                    svg,
                    "<text x=\"{}\" y=\"{}\" font-size=\"{}\" fill=\"{}\"{anchor}{weight}>{}</text>",
                    coordinate(*x),
                    coordinate(*y),
                    coordinate(*size),
                    ink.css(theme),
                    escaped(text)
                );
            }
        }
    }
}

fn write_opacity(svg: &mut String, opacity: f64) {
    if opacity < 1.0 {
        let _ = write!(svg, " opacity=\"{}\"", coordinate(opacity));
    }
}

/// Hundredths of a pixel are enough.
fn coordinate(value: f64) -> f64 {
    // `+ 0.0`: no negative zero
    if value.is_finite() { (value * 100.0).round() / 100.0 + 0.0 } else { 0.0 }
}

/// Text that stays text. What XML has no place for, such as a control character, becomes U+FFFD.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\t' | '\n' | '\r' => safe.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// About how wide a text is: as wide as in the letters that pictures of pixels have, which are those of a common sans-serif
/// font or a little wider.
pub(super) fn text_width(text: &str, size: f64) -> f64 {
    font::width(text, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_strangers_wrote_stays_text() {
        let mut drawing = Drawing::new(10.0, 10.0, "</title><script>alert(1)</script>");
        drawing.text((1.0, f64::NAN), Anchor::Start, "\" onload=\"x <b> & \u{0}\u{1b}", 12.0, Ink::Text);
        let at = (1.0, 1.0);
        let note = "<img src=x>".into();
        drawing.items.push(Item::Circle {
            at,
            radius: 1.0,
            stroke: Ink::Text,
            fill: Ink::Ground,
            opacity: 1.0,
            note,
        });
        let svg = drawing.svg(Theme::Page);
        for bad in ["<script", "<b>", "<img", "onload=\"", "NaN", "\u{0}", "\u{1b}"] {
            assert!(!svg.contains(bad), "{bad}: {svg}");
        }
        assert!(svg.contains("&lt;script&gt;"));
    }

    #[test]
    fn a_file_stands_alone_and_a_page_says_the_colours() {
        let mut drawing = Drawing::new(10.0, 10.0, "a line");
        drawing.line(vec![(0.0, -0.001), (10.0, 10.0 / 3.0)], Ink::Series(0), 2.0);
        let (page, file) = (drawing.svg(Theme::Page), drawing.svg(Theme::File));
        assert!(page.contains("stroke=\"var(--s0)\"") && !page.contains("xmlns"), "{page}");
        assert!(file.contains("stroke=\"#0072b2\"") && file.contains("xmlns") && !file.contains("var("), "{file}");
        assert!(file.contains("M0 0L10 3.33\""), "{file}");
    }
}
