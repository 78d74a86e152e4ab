//! `exp` for whole slices.
//!
//! The C library's is called a number at a time. This one is made of additions, multiplications and shifts only, so
//! that the compiler turns a loop over it into vector instructions, as wide as the machine has them. No operation is
//! fused and none reordered: every machine gives the same bits.

/// `exp(x)` to 2 units in the last place; 0 below −87.33, infinity above 88.72, NaN for NaN.
#[inline(always)]
pub(crate) fn exp_f32(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first with so few bits that its product with a whole number is exact (Cody & Waite)
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // adding this rounds to a whole number: beyond 2²³ an f32 has no fraction
    const ROUND: f32 = 12_582_912.0;
    let inside = x.clamp(-87.336_54, 88.722_83);
    let shifted = inside * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = inside - n * LN_2_HIGH - n * LN_2_LOW;
    // Cephes' expf polynomial for |r| ≤ ln 2 / 2
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let e = p * r * r + r + 1.0;
    // the whole number stands in the lowest bits of `shifted`; 2ⁿ in two factors, as n may be 128
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let result = e * power(half) * power(n - half);
    let result = if x < -87.336_54 { 0.0 } else { result };
    let result = if x > 88.722_83 { f32::INFINITY } else { result };
    if x.is_nan() { x } else { result }
}

#[cfg(test)]
mod tests {
    use super::exp_f32;

    #[test]
    fn it_is_exp_to_two_units_in_the_last_place() {
        let mut x = -87.3f32;
        while x < 88.7 {
            let (found, exact) = (f64::from(exp_f32(x)), f64::from(x).exp());
            // 2 units of 2⁻²³ relative to a mantissa of at least one
            assert!((found / exact - 1.0).abs() < 2.4e-7, "{x}: {found} {exact}");
            x += 0.000_71;
        }
    }

    #[test]
    fn ends_are_those_of_exp() {
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(-0.0), 1.0);
        assert_eq!(exp_f32(-90.0), 0.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(89.0), f32::INFINITY);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
        assert!(exp_f32(88.72) < f32::INFINITY && exp_f32(-87.33) > 0.0);
    }
}
