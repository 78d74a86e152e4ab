//! Where an axis is marked, and how numbers are written.

/// Round values from `min` to `max`, about `target` of them: multiples of 1, 2 or 5 times a power of ten. Also how far
/// apart they are.
pub(super) fn linear(min: f64, max: f64, target: usize) -> (Vec<f64>, f64) {
    let rough = (max - min) / target.max(1) as f64;
    if !(rough.is_finite() && rough > 0.0) {
        return (vec![min], 1.0);
    }
    let exponent = rough.log10().floor() as i32;
    let fraction = rough / 10f64.powi(exponent);
    let (mantissa, exponent) = match fraction {
        f if f <= 1.0 => (1.0, exponent),
        f if f <= 2.0 => (2.0, exponent),
        f if f <= 5.0 => (5.0, exponent),
        _ => (1.0, exponent + 1),
    };
    // a multiple is one division or product away from a whole number, so that 0.3 is 0.3 and not 0.30000000000000004
    let multiple = |k: f64| match exponent < 0 {
        true => k * mantissa / 10f64.powi(-exponent),
        false => k * mantissa * 10f64.powi(exponent),
    };
    let step = multiple(1.0);
    let (first, last) = ((min / step - 1e-9).ceil(), (max / step + 1e-9).floor());
    // `k + 0.0` turns a negative zero into zero
    let ticks = (0..=(last - first).max(0.0) as usize).map(|i| multiple(first + i as f64) + 0.0).collect();
    (ticks, step)
}

/// Powers of ten from `min` to `max`, both above zero; with 2 and 5 between them where there would be fewer than three.
pub(super) fn logarithmic(min: f64, max: f64) -> Vec<f64> {
    let (first, last) = (min.log10().floor() as i32, max.log10().ceil() as i32);
    let power = |exponent: i32| match exponent < 0 {
        true => 1.0 / 10f64.powi(-exponent),
        false => 10f64.powi(exponent),
    };
    let within = |tick: &f64| (min * (1.0 - 1e-9)..=max * (1.0 + 1e-9)).contains(tick);
    let decades: Vec<f64> = (first..=last).map(power).filter(within).collect();
    match decades.len() {
        0..=2 => (first..=last).flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * power(e))).filter(within).collect(),
        // no more than about seven labels
        n => decades.into_iter().step_by(n.div_ceil(7)).collect(),
    }
}

/// The label of a tick of an axis whose ticks are `step` apart.
pub(super) fn label(value: f64, step: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let (size, decimals) = (value.abs(), (-step.log10().floor()).max(0.0) as usize);
    let text = match () {
        () if size >= 1e6 => trimmed(value / 1e6, 2) + "M",
        () if size >= 1e4 => trimmed(value / 1e3, 1) + "k",
        () if decimals > 3 => scientific(value, 2),
        () => format!("{value:.decimals$}"),
    };
    with_minus(text)
}

/// A number for a table or a sentence: about three digits that say something.
#[must_use]
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    let text = match () {
        () if !value.is_finite() => return "—".into(),
        () if value == 0.0 => "0".into(),
        () if size >= 1e6 => trimmed(value / 1e6, 2) + "M",
        () if size >= 1e4 => trimmed(value / 1e3, 1) + "k",
        () if size >= 100.0 => format!("{value:.0}"),
        () if size >= 10.0 => format!("{value:.1}"),
        () if size >= 1.0 => format!("{value:.2}"),
        () if size >= 1e-3 => format!("{value:.3}"),
        () => scientific(value, 2),
    };
    with_minus(text)
}

/// A share as a percentage.
pub(super) fn percent(share: f64) -> String {
    if !share.is_finite() {
        return "—".into();
    }
    let hundred = 100.0 * share;
    // 99.6 % of something is not all of it
    let digits = usize::from(hundred.fract() != 0.0 && !(1.0..=99.0).contains(&hundred));
    with_minus(format!("{hundred:.digits$} %"))
}

/// A share as a percentage to a tenth, as win rates are written.
pub(super) fn tenths(share: f64) -> String {
    if share.is_finite() { format!("{:.1} %", 100.0 * share) } else { "—".into() }
}

/// Where a share is, to a tenth.
pub(super) fn interval([low, high]: [f64; 2]) -> String {
    format!("{:.1} to {:.1} %", 100.0 * low, 100.0 * high)
}

/// At most so many decimals, without zeros at their end.
pub(crate) fn trimmed(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// `3e-4`
fn scientific(value: f64, digits: usize) -> String {
    let text = format!("{value:.precision$e}", precision = digits.saturating_sub(1));
    match text.split_once('e') {
        Some((mantissa, exponent)) if mantissa.contains('.') => {
            format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text,
    }
}

/// A hyphen is no minus.
fn with_minus(text: String) -> String {
    match text.strip_prefix('-') {
        Some(rest) => format!("−{rest}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(linear(0.0, 1.0, 5), (vec![0.0, 0.2, 0.4, 0.6, 0.8, 1.0], 0.2));
        assert_eq!(linear(-8.3, -1.0, 4).0, [-8.0, -6.0, -4.0, -2.0]);
        assert_eq!(linear(-0.3, 0.31, 7).0, [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]);
        assert_eq!(linear(0.0, 48.0, 5).0, [0.0, 10.0, 20.0, 30.0, 40.0]);
        assert_eq!(linear(2.0, 2.0, 5).0, [2.0]);
        assert_eq!(linear(f64::NAN, 2.0, 5).0.len(), 1);
    }

    #[test]
    fn decades_and_what_is_between_them() {
        assert_eq!(logarithmic(0.01, 100.0), [0.01, 0.1, 1.0, 10.0, 100.0]);
        assert_eq!(logarithmic(0.3, 4.0), [0.5, 1.0, 2.0]);
        assert!(logarithmic(1e-12, 1e12).len() <= 7);
    }

    #[test]
    fn numbers_as_people_write_them() {
        let labels = [label(0.2, 0.2), label(1.0, 0.2), label(-5.0, 5.0), label(25000.0, 5000.0), label(3e-4, 1e-4)];
        assert_eq!(labels, ["0.2", "1.0", "−5", "25k", "3e-4"]);
        let numbers = [0.0, 0.1179, 3.2308, -8.1274, 12.34, 109_436.0, 0.000_006_97, f64::NAN].map(number);
        assert_eq!(numbers, ["0", "0.118", "3.23", "−8.13", "12.3", "109.4k", "7e-6", "—"]);
        assert_eq!([0.5, 0.9722, 0.9967, 1.0, 0.0].map(percent), ["50 %", "97 %", "99.7 %", "100 %", "0 %"]);
    }
}
