//! Data and axes to a [`Drawing`]: lines, points, bars and rules over one pair of axes.

use super::drawing::{Anchor, Drawing, Ink, Item, text_width};
use super::ticks;

/// A point, in the units of the axes.
pub type Point = (f64, f64);

/// How a value becomes a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Evenly.
    #[default]
    Linear,
    /// Its logarithm evenly; values have to be above zero, others are left out.
    Log,
}

/// One of the two axes.
#[derive(Debug, Clone, Default)]
pub struct Axis {
    /// What is on it, with its unit.
    pub label: String,
    /// How a value becomes a place.
    pub scale: Scale,
    /// Values that have to be on it, whatever the data is.
    pub include: Vec<f64>,
}

/// What is drawn over the axes.
#[derive(Debug, Clone)]
pub enum Mark {
    /// A line through points.
    Line {
        /// From left to right; one that is not finite interrupts it.
        points: Vec<Point>,
        /// Its colour.
        ink: Ink,
        /// Its width in pixels.
        width: f64,
        /// From 0 to 1.
        opacity: f64,
        /// What is written at its end.
        label: String,
    },
    /// Points by themselves.
    Points {
        /// Where.
        points: Vec<Point>,
        /// Their colour.
        ink: Ink,
        /// In pixels.
        radius: f64,
        /// Whether their inside is coloured.
        filled: bool,
        /// From 0 to 1.
        opacity: f64,
        /// What is written at the last of them.
        label: String,
    },
    /// Bars that stand on zero.
    Bars {
        /// `(from, to, height)` of each.
        bars: Vec<(f64, f64, f64)>,
        /// Their colour.
        ink: Ink,
        /// From 0 to 1.
        opacity: f64,
        /// What is written at the highest.
        label: String,
    },
    /// A vertical line.
    RuleX(f64),
    /// A horizontal line.
    RuleY(f64),
}

/// A plot.
#[derive(Debug, Clone)]
pub struct Chart {
    /// What it shows; drawn where it stands alone.
    pub title: String,
    /// The horizontal axis.
    pub x: Axis,
    /// The vertical one.
    pub y: Axis,
    /// What is drawn, the hindmost first.
    pub marks: Vec<Mark>,
    /// Width and height in pixels.
    pub size: (f64, f64),
    /// Whether the title is drawn.
    pub titled: bool,
    /// Free pixels around it.
    pub margin: f64,
}

const FONT: f64 = 12.0;
/// A path has at most so many points: more are not seen.
const MOST_POINTS: usize = 600;

impl Chart {
    /// Empty axes of the size that the report uses.
    #[must_use]
    pub fn new(title: impl Into<String>, x: impl Into<String>, y: impl Into<String>) -> Self {
        let axis = |label: String| Axis { label, ..Axis::default() };
        Self {
            title: title.into(),
            x: axis(x.into()),
            y: axis(y.into()),
            marks: Vec::new(),
            size: (480.0, 250.0),
            titled: false,
            margin: 0.0,
        }
    }

    /// The same to stand alone: larger, with its title.
    #[must_use]
    pub fn alone(self) -> Self {
        Self { size: (720.0, 405.0), titled: true, margin: 24.0, ..self }
    }

    /// Draws it.
    #[must_use]
    pub fn draw(&self) -> Drawing {
        let inner = self.draw_inner();
        if self.margin == 0.0 {
            return inner;
        }
        let around = |length: f64| length + 2.0 * self.margin;
        let mut drawing = Drawing::new(around(inner.width), around(inner.height), inner.description.clone());
        drawing.place(inner, (self.margin, self.margin));
        drawing
    }

    fn draw_inner(&self) -> Drawing {
        let (width, height) = self.size;
        let mut drawing = Drawing::new(width, height, self.description());
        let top = if self.titled { 48.0 } else { 26.0 };
        if self.titled {
            drawing.heading((0.0, 16.0), &self.title, 15.0);
        }
        // the unit stands above the axis, where it can be read without turning one's head
        drawing.text((0.0, top - 12.0), Anchor::Start, &self.y.label, FONT - 0.5, Ink::Muted);
        let bottom = height - 40.0;
        let y = Placed::new(&self.y, self.values_y(), (bottom, top), 5);
        let labels_y = y.ticks.iter().map(|(_, label)| text_width(label, FONT)).fold(0.0, f64::max);
        let labels_end = self.end_labels().map(|(_, label, _)| text_width(label, FONT) + 14.0).fold(14.0, f64::max);
        let (left, right) = (labels_y + 10.0, width - labels_end.min(width / 3.0));
        let x = Placed::new(&self.x, self.values_x(), (left, right), if width > 600.0 { 8 } else { 5 });

        for (at, label) in &y.ticks {
            drawing.line(vec![(left, *at), (right, *at)], Ink::Grid, 1.0);
            drawing.text((left - 7.0, at + 4.0), Anchor::End, label, FONT, Ink::Muted);
        }
        for (at, label) in &x.ticks {
            drawing.line(vec![(*at, bottom), (*at, bottom + 4.0)], Ink::Muted, 1.0);
            drawing.text((*at, bottom + 17.0), Anchor::Middle, label, FONT, Ink::Muted);
        }
        drawing.line(vec![(left, bottom), (right, bottom)], Ink::Muted, 1.0);
        drawing.text((right, bottom + 34.0), Anchor::End, &self.x.label, FONT - 0.5, Ink::Muted);
        let place = |(px, py): Point| Some((x.at(px)?, y.at(py)?));
        for mark in &self.marks {
            mark.draw(&mut drawing, &place, (left, right), (top, bottom), &x, &y);
        }
        self.draw_end_labels(&mut drawing, &place, right, (top, bottom));
        drawing
    }

    fn description(&self) -> String {
        let series: Vec<&str> = self.marks.iter().filter_map(Mark::label).filter(|label| !label.is_empty()).collect();
        let of = if series.is_empty() { String::new() } else { format!(": {}", series.join(", ")) };
        format!("{}, against {}{of}", self.title, self.x.label)
    }

    fn values_x(&self) -> Vec<f64> {
        self.marks.iter().flat_map(Mark::values).map(|(x, _)| x).collect()
    }

    fn values_y(&self) -> Vec<f64> {
        self.marks.iter().flat_map(Mark::values).map(|(_, y)| y).collect()
    }

    /// What is written beside the ends: point, text, colour.
    fn end_labels(&self) -> impl Iterator<Item = (Point, &str, Ink)> {
        self.marks.iter().filter_map(|mark| match mark {
            Mark::Line { points, label, ink, .. } | Mark::Points { points, label, ink, .. } if !label.is_empty() => {
                let last = points.iter().rev().find(|(x, y)| x.is_finite() && y.is_finite())?;
                Some((*last, label.as_str(), *ink))
            }
            _ => None,
        })
    }

    /// Labels at the height of what they name, moved apart where they would cover each other.
    fn draw_end_labels(
        &self,
        drawing: &mut Drawing,
        place: &dyn Fn(Point) -> Option<(f64, f64)>,
        right: f64,
        (top, bottom): (f64, f64),
    ) {
        const LINE: f64 = 14.0;
        let placed = self.end_labels().filter_map(|(point, label, ink)| Some((place(point)?, label, ink)));
        // those of curves that end elsewhere have room beside their end
        let (mut late, mut early): (Vec<_>, Vec<_>) = placed.partition(|((x, _), ..)| *x > right - 40.0);
        for ((x, _), ..) in &mut late {
            *x = right;
        }
        for labels in [&mut late, &mut early] {
            labels.sort_by(|a, b| a.0.1.total_cmp(&b.0.1));
            let mut lowest = top - LINE + 4.0;
            for ((_, y), ..) in &mut *labels {
                *y = y.max(lowest + LINE);
                lowest = *y;
            }
            let mut highest = bottom + LINE;
            for ((_, y), ..) in labels.iter_mut().rev() {
                *y = y.min(highest - LINE);
                highest = *y;
            }
            for ((x, y), label, ink) in &*labels {
                drawing.text((x + 8.0, y + 4.0), Anchor::Start, label, FONT, *ink);
            }
        }
    }
}

impl Mark {
    fn label(&self) -> Option<&str> {
        match self {
            Self::Line { label, .. } | Self::Points { label, .. } | Self::Bars { label, .. } => Some(label),
            Self::RuleX(_) | Self::RuleY(_) => None,
        }
    }

    /// Every value that has to be within the axes.
    fn values(&self) -> Vec<Point> {
        match self {
            Self::Line { points, .. } | Self::Points { points, .. } => points.clone(),
            Self::Bars { bars, .. } => {
                bars.iter().flat_map(|&(from, to, height)| [(from, height), (to, 0.0)]).collect()
            }
            Self::RuleX(_) | Self::RuleY(_) => Vec::new(),
        }
    }

    fn draw(
        &self,
        drawing: &mut Drawing,
        place: &dyn Fn(Point) -> Option<(f64, f64)>,
        (left, right): (f64, f64),
        (top, bottom): (f64, f64),
        x: &Placed,
        y: &Placed,
    ) {
        match self {
            Self::Line { points, ink, width, opacity, .. } => {
                for points in points.split(|(x, y)| !(x.is_finite() && y.is_finite())) {
                    let points: Vec<_> = thinned(points).into_iter().filter_map(place).collect();
                    if points.len() > 1 {
                        let (stroke, opacity) = (Some((*ink, *width)), *opacity);
                        drawing.items.push(Item::Path { points, stroke, fill: None, opacity });
                    }
                }
            }
            Self::Points { points, ink, radius, filled, opacity, .. } => {
                for &point in points {
                    let Some(at) = place(point) else { continue };
                    let fill = if *filled { *ink } else { Ink::Ground };
                    let note = format!("{}: {}", ticks::number(point.0), ticks::number(point.1));
                    let (radius, stroke, opacity) = (*radius, *ink, *opacity);
                    drawing.items.push(Item::Circle { at, radius, stroke, fill, opacity, note });
                }
            }
            Self::Bars { bars, ink, opacity, label } => {
                for &(from, to, height) in bars.iter().filter(|bar| bar.2 > 0.0) {
                    if let (Some(a), Some(b)) = (place((from, height)), place((to, 0.0))) {
                        drawing.rectangle(a, (b.0 - 1.0, b.1), *ink, *opacity);
                    }
                }
                let highest = bars.iter().max_by(|a, b| a.2.total_cmp(&b.2));
                if let Some(at) = highest.and_then(|bar| place(((bar.0 + bar.1) / 2.0, bar.2))) {
                    drawing.text((at.0, at.1 - 5.0), Anchor::Middle, label, FONT, *ink);
                }
            }
            Self::RuleX(value) => {
                if let Some(at) = x.at(*value).filter(|at| (left..=right).contains(at)) {
                    drawing.line(vec![(at, top), (at, bottom)], Ink::Muted, 1.0);
                }
            }
            Self::RuleY(value) => {
                if let Some(at) = y.at(*value).filter(|at| (top..=bottom).contains(at)) {
                    drawing.line(vec![(left, at), (right, at)], Ink::Muted, 1.0);
                }
            }
        }
    }
}

/// At most [`MOST_POINTS`] points of a line: of each stretch the lowest and the highest, in their order.
fn thinned(points: &[Point]) -> Vec<Point> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let mut kept = Vec::with_capacity(MOST_POINTS);
    for stretch in points.chunks(points.len().div_ceil(MOST_POINTS / 2)) {
        let low = stretch.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1)).map_or(0, |(i, _)| i);
        let high = stretch.iter().enumerate().max_by(|a, b| a.1.1.total_cmp(&b.1.1)).map_or(0, |(i, _)| i);
        kept.push(stretch[low.min(high)]);
        if low != high {
            kept.push(stretch[low.max(high)]);
        }
    }
    // the curve has to end where it ends
    if let (Some(last), Some(end)) = (kept.last_mut(), points.last()) {
        *last = *end;
    }
    kept
}

/// An axis with its range and ticks.
struct Placed {
    scale: Scale,
    range: (f64, f64),
    pixels: (f64, f64),
    /// Place and label of each.
    ticks: Vec<(f64, String)>,
}

impl Placed {
    fn new(axis: &Axis, values: Vec<f64>, pixels: (f64, f64), target: usize) -> Self {
        let usable = |value: &f64| value.is_finite() && (axis.scale == Scale::Linear || *value > 0.0);
        let used = || values.iter().chain(&axis.include).copied().filter(usable);
        let (mut min, mut max) = (used().fold(f64::INFINITY, f64::min), used().fold(f64::NEG_INFINITY, f64::max));
        // an axis that would begin a little above zero begins at zero
        if axis.scale == Scale::Linear && min > 0.0 && min < 0.4 * max {
            min = 0.0;
        }
        if min > max {
            (min, max) = if axis.scale == Scale::Log { (0.1, 1.0) } else { (0.0, 1.0) };
        }
        let mut placed = Self { scale: axis.scale, range: (min, max), pixels, ticks: Vec::new() };
        if axis.scale == Scale::Log {
            if max / min < 1.0 + 1e-9 {
                placed.range = (min / 2.0, max * 2.0);
            }
            let ticks = ticks::logarithmic(placed.range.0, placed.range.1);
            placed.ticks =
                ticks.into_iter().filter_map(|tick| Some((placed.at(tick)?, ticks::label(tick, tick)))).collect();
            return placed;
        }
        if (max - min).abs() < 1e-12 * max.abs().max(1e-12) {
            let by = if max == 0.0 { 1.0 } else { max.abs() / 2.0 };
            placed.range = (min - by, max + by);
        }
        let (ticks, step) = ticks::linear(placed.range.0, placed.range.1, target);
        placed.ticks =
            ticks.into_iter().filter_map(|tick| Some((placed.at(tick)?, ticks::label(tick, step)))).collect();
        placed
    }

    /// The pixel of a value, if it has one.
    fn at(&self, value: f64) -> Option<f64> {
        let of = |value: f64| match self.scale {
            Scale::Linear => value,
            Scale::Log => value.log10(),
        };
        let (from, to) = (of(self.range.0), of(self.range.1));
        let at = self.pixels.0 + (of(value) - from) / (to - from) * (self.pixels.1 - self.pixels.0);
        at.is_finite().then_some(at)
    }
}

/// `values` counted in bins of one round width that all of the sets share: `(from, to, count)` of each.
#[must_use]
pub fn histogram(sets: &[&[f64]], target: usize) -> Vec<Vec<(f64, f64, f64)>> {
    let finite = |set: &[f64]| set.iter().copied().filter(|value| value.is_finite()).collect::<Vec<f64>>();
    let sets: Vec<Vec<f64>> = sets.iter().map(|set| finite(set)).collect();
    let all = || sets.iter().flatten().copied();
    let (min, max) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
    if min > max {
        return vec![Vec::new(); sets.len()];
    }
    let (_, width) = if max > min { ticks::linear(min, max, target) } else { (Vec::new(), 1.0) };
    let first = (min / width).floor();
    let bins = ((max / width).floor() - first) as usize + 1;
    let count = |set: &Vec<f64>| {
        let mut counts = vec![0.0; bins];
        for value in set {
            counts[((value / width).floor() - first) as usize] += 1.0;
        }
        let edge = |i: usize| (first + i as f64) * width;
        counts.into_iter().enumerate().map(|(i, count)| (edge(i), edge(i + 1), count)).collect()
    };
    sets.iter().map(count).collect()
}

/// A mean over about `window` values around each, the near ones counting more (a triangle). Unlike an exponential mean it
/// does not lag behind.
#[must_use]
pub fn smoothed(points: &[Point], window: f64) -> Vec<Point> {
    let points: Vec<Point> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let reach = (window / 2.0).max(1.0);
    let around = reach.ceil() as usize;
    let mean = |i: usize| {
        let near = i.saturating_sub(around)..(i + around + 1).min(points.len());
        let (mut sum, mut weights) = (0.0, 0.0);
        for j in near {
            let weight = (1.0 - i.abs_diff(j) as f64 / reach).max(0.0);
            sum += weight * points[j].1;
            weights += weight;
        }
        (points[i].0, sum / weights)
    };
    (0..points.len()).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::drawing::Theme;

    fn line(points: Vec<Point>, label: &str) -> Mark {
        let label = label.to_owned();
        Mark::Line { points, ink: Ink::Series(0), width: 2.0, opacity: 1.0, label }
    }

    #[test]
    fn a_line_goes_from_corner_to_corner() {
        let mut chart = Chart::new("t", "x", "y");
        chart.marks = vec![line(vec![(0.0, 0.0), (1.0, 1.0), (2.0, f64::NAN), (3.0, 1.0), (4.0, 0.0)], "")];
        let drawing = chart.draw();
        let drawn: Vec<_> = drawing
            .items
            .iter()
            .filter_map(|item| match item {
                Item::Path { points, stroke: Some((Ink::Series(0), _)), .. } => Some(points.clone()),
                _ => None,
            })
            .collect();
        assert_eq!(drawn.len(), 2, "what is not finite interrupts it");
        let (bottom, top) = (chart.size.1 - 40.0, 26.0);
        assert_eq!((drawn[0][0].1, drawn[0][1].1), (bottom, top));
        assert_eq!(drawn[1][1].1, bottom);
        assert!(drawn[1][1].0 > drawn[1][0].0);
    }

    #[test]
    fn labels_do_not_cover_each_other_and_stay_within() {
        let mut chart = Chart::new("t", "x", "y");
        chart.marks = (0..5).map(|i| line(vec![(0.0, 0.0), (1.0, 1.0 + 1e-3 * f64::from(i))], "name")).collect();
        let heights: Vec<f64> = chart
            .draw()
            .items
            .iter()
            .filter_map(|item| match item {
                Item::Text { at, text, .. } if text == "name" => Some(at.1),
                _ => None,
            })
            .collect();
        assert!(heights.windows(2).all(|pair| pair[1] - pair[0] >= 13.9), "{heights:?}");
    }

    #[test]
    fn nothing_to_draw_and_one_value_are_no_error() {
        for points in [vec![], vec![(1.0, 0.0)], vec![(1.0, 5.0)], vec![(f64::NAN, f64::INFINITY)]] {
            for scale in [Scale::Linear, Scale::Log] {
                let mut chart = Chart::new("t", "x", "y");
                chart.y.scale = scale;
                chart.marks = vec![line(points.clone(), "end")];
                let svg = chart.draw().svg(Theme::Page);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            }
        }
    }

    #[test]
    fn a_logarithmic_axis_has_equal_factors_at_equal_distances() {
        let axis = Axis { scale: Scale::Log, ..Axis::default() };
        let placed = Placed::new(&axis, vec![1.0, 10.0, 100.0, -3.0], (0.0, 200.0), 5);
        assert_eq!(placed.at(10.0), Some(100.0));
        assert_eq!(placed.at(-1.0), None);
    }

    #[test]
    fn bins_hold_every_value_once() {
        let (before, after) = ([0.0; 7], [-0.5, 1.0, 2.5, 3.5, 9.99, f64::NAN]);
        let bins = histogram(&[&before, &after], 20);
        let total = |bins: &[(f64, f64, f64)]| bins.iter().map(|bin| bin.2).sum::<f64>();
        assert_eq!((total(&bins[0]), total(&bins[1])), (7.0, 5.0));
        assert_eq!(bins[0].len(), bins[1].len());
        assert!(bins[1].iter().any(|&(from, to, count)| from <= 2.5 && 2.5 < to && count == 1.0));
        assert!(histogram(&[&[]], 20)[0].is_empty());
        assert_eq!(histogram(&[&[2.0, 2.0]], 20)[0], [(2.0, 3.0, 2.0)]);
    }

    #[test]
    fn a_smooth_line_keeps_a_trend_and_loses_noise() {
        let slope: Vec<Point> = (0..50).map(|x| (f64::from(x), 3.0 * f64::from(x))).collect();
        let smooth = smoothed(&slope, 10.0);
        assert!(smooth[10..40].iter().all(|(x, y)| (y - 3.0 * x).abs() < 1e-9), "no lag");
        let noisy: Vec<Point> = (0..200).map(|x| (f64::from(x), if x % 2 == 0 { 0.0 } else { 2.0 })).collect();
        assert!(smoothed(&noisy, 40.0).iter().all(|(_, y)| (y - 1.0).abs() < 0.1));
        assert_eq!(smoothed(&[(1.0, 2.0), (2.0, f64::NAN)], 10.0), [(1.0, 2.0)]);
    }

    #[test]
    fn long_lines_are_thinned_without_losing_a_spike() {
        let points: Vec<Point> = (0..100_000).map(|x| (f64::from(x), if x == 777 { 50.0 } else { 0.0 })).collect();
        let thin = thinned(&points);
        assert!(thin.len() <= MOST_POINTS && thin.contains(&(777.0, 50.0)));
        assert_eq!(thin.last(), points.last());
    }
}
