//! A [`Drawing`] as pixels.

use miette::Diagnostic;
use thiserror::Error;
use tiny_skia::{Color, FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, Transform};

use super::drawing::{Anchor, Drawing, Ink, Item};
use super::font;

/// Why there are no pixels.
#[derive(Debug, Error, Diagnostic)]
pub enum PngError {
    /// The picture has no area, or far too much.
    #[error("a picture of {0} × {1} pixels cannot be made")]
    Size(f64, f64),
    /// From the encoder.
    #[error("the picture cannot be written as PNG: {0}")]
    Encode(String),
}

/// Pixels a unit of the drawing: text of 12 units is read well on any screen.
const SCALE: f32 = 2.0;

/// The PNG file of a drawing, on white.
///
/// # Errors
/// A drawing without an area or with far too much of it.
pub fn png(drawing: &Drawing) -> Result<Vec<u8>, PngError> {
    let pixels = |length: f64| (length.max(0.0) * f64::from(SCALE)).ceil().min(1e5) as u32;
    let (width, height) = (pixels(drawing.width), pixels(drawing.height));
    // a gigabyte of pixels is a mistake
    let fits = u64::from(width) * u64::from(height) < 1 << 28;
    let pixmap = if fits { Pixmap::new(width, height) } else { None };
    let mut pixmap = pixmap.ok_or(PngError::Size(drawing.width, drawing.height))?;
    pixmap.fill(Color::WHITE);
    for item in &drawing.items {
        draw(item, &mut pixmap);
    }
    pixmap.encode_png().map_err(|e| PngError::Encode(e.to_string()))
}

fn paint(ink: Ink, opacity: f64) -> Paint<'static> {
    let mut paint = Paint::default();
    let [r, g, b] = ink.rgb();
    paint.set_color_rgba8(r, g, b, (255.0 * opacity.clamp(0.0, 1.0)).round() as u8);
    paint
}

fn stroke(width: f64) -> tiny_skia::Stroke {
    tiny_skia::Stroke {
        width: width as f32,
        line_cap: LineCap::Round,
        line_join: LineJoin::Round,
        ..tiny_skia::Stroke::default()
    }
}

fn draw(item: &Item, pixmap: &mut Pixmap) {
    let scale = Transform::from_scale(SCALE, SCALE);
    match item {
        Item::Path { points, stroke: line, fill, opacity } => {
            let Some(path) = polygon(points, fill.is_some()) else { return };
            if let Some(ink) = fill {
                pixmap.fill_path(&path, &paint(*ink, *opacity), FillRule::Winding, scale, None);
            }
            if let Some((ink, width)) = line {
                pixmap.stroke_path(&path, &paint(*ink, *opacity), &stroke(*width), scale, None);
            }
        }
        Item::Circle { at, radius, stroke: line, fill, opacity, .. } => {
            let circle = PathBuilder::from_circle(at.0 as f32, at.1 as f32, *radius as f32);
            let Some(circle) = circle else { return };
            pixmap.fill_path(&circle, &paint(*fill, *opacity), FillRule::Winding, scale, None);
            pixmap.stroke_path(&circle, &paint(*line, *opacity), &stroke(1.75), scale, None);
        }
        Item::Text { at, anchor, text, size, ink, bold } => {
            let shift = match anchor {
                Anchor::Start => 0.0,
                Anchor::Middle => font::width(text, *size) / 2.0,
                Anchor::End => font::width(text, *size),
            };
            let Some(path) = letters(text, *size, (at.0 - shift, at.1)) else { return };
            let width = size * if *bold { 0.125 } else { 0.085 };
            pixmap.stroke_path(&path, &paint(*ink, 1.0), &stroke(width), scale, None);
        }
    }
}

fn polygon(points: &[(f64, f64)], closed: bool) -> Option<Path> {
    let mut path = PathBuilder::new();
    for (i, (x, y)) in points.iter().enumerate() {
        match i {
            0 => path.move_to(*x as f32, *y as f32),
            _ => path.line_to(*x as f32, *y as f32),
        }
    }
    if closed {
        path.close();
    }
    path.finish()
}

fn letters(text: &str, size: f64, (left, base): (f64, f64)) -> Option<Path> {
    let mut path = PathBuilder::new();
    let at = |x: f64, y: f64| ((left + x) as f32, (base - y) as f32);
    for stroke in font::strokes(text, size) {
        match stroke {
            font::Stroke::Move(x, y) => {
                let (x, y) = at(x, y);
                path.move_to(x, y);
            }
            font::Stroke::Line(x, y) => {
                let (x, y) = at(x, y);
                path.line_to(x, y);
            }
            font::Stroke::Quad(x, y, to_x, to_y) => {
                let ((x, y), (to_x, to_y)) = (at(x, y), at(to_x, to_y));
                path.quad_to(x, y, to_x, to_y);
            }
        }
    }
    path.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_is_where_it_was_drawn() {
        let mut drawing = Drawing::new(20.0, 10.0, "a half");
        drawing.rectangle((0.0, 0.0), (10.0, 10.0), Ink::Series(0), 1.0);
        drawing.text((12.0, 8.0), Anchor::Start, "I", 10.0, Ink::Text);
        let bytes = png(&drawing).expect("drawn");
        let pixmap = Pixmap::decode_png(&bytes).expect("a PNG");
        assert_eq!((pixmap.width(), pixmap.height()), (40, 20));
        let at = |x: u32, y: u32| {
            let pixel = pixmap.pixel(x, y).expect("within");
            [pixel.red(), pixel.green(), pixel.blue()]
        };
        assert_eq!(at(5, 5), Ink::Series(0).rgb());
        assert_eq!(at(35, 10), [255, 255, 255]);
        assert!(at(24, 8)[0] < 150, "the letter: {:?}", at(24, 8));
        assert_eq!(bytes, png(&drawing).expect("drawn"), "the same each time");
    }

    #[test]
    fn a_picture_without_area_is_an_error() {
        for (width, height) in [(0.0, 10.0), (f64::NAN, 10.0), (1e9, 1e9)] {
            assert!(matches!(png(&Drawing::new(width, height, "")), Err(PngError::Size(..))));
        }
    }
}
