//! An exponential that vectorises.

/// eˣ to about 1.5e-7 relative, without a branch or a call, so that a loop over it becomes vector code.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2, then eˣ = 2ⁿ eʳ with eʳ by its Taylor series, whose remainder
/// r⁸ / 8! is below 6e-9. Results below the smallest normal number are 0.
#[inline(always)]
pub(super) fn exp_f32(x: f32) -> f32 {
    // Adding 1.5 · 2²³ leaves round(x / ln 2) in the low bits of the significand.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first short enough for n · LN2_HIGH to be exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const MIN: f32 = -87.336_54;
    const MAX: f32 = 88.722_83;

    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5] {
        series = series * r + coefficient;
    }
    let exp_r = 1.0 + (r + r * r * series);
    // Multiplies by 2ⁿ: n is added to the exponent bits.
    let ys = f32::from_bits(exp_r.to_bits().wrapping_add(shifted.to_bits() << 23));

    if x > MAX {
        f32::INFINITY
    } else if x >= MIN {
        ys
    } else if x < MIN {
        0.0
    } else {
        x // not a number
    }
}

#[cfg(test)]
mod tests {
    use super::exp_f32;

    #[test]
    fn exp_is_accurate_over_its_whole_range() {
        let mut worst = 0f64;
        for i in -873_000..887_000 {
            let x = i as f32 * 1e-4 + 3.7e-6;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_f32(x)) / exact - 1.0).abs());
        }
        assert!(worst < 1.6e-7, "{worst:e}");
    }

    #[test]
    fn exp_of_the_extremes_is_that_of_the_limits() {
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(-0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(-88.0), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(89.0), f32::INFINITY);
        assert!(exp_f32(88.7).is_finite());
        assert!(exp_f32(f32::NAN).is_nan());
        assert!(exp_f32(f32::from_bits(0x7fc0_0001)).is_nan());
    }
}
