//! Sums of exponentials over a vocabulary, fast and the same on every machine.

use std::f32::consts::LOG2_E;

/// e to the power of `x`, for `x` of 0 or less; 0 below -87, where f32 loses digits.
///
/// The relative error is below 2e-7. Plain arithmetic, unlike the system's `expf`: the compiler turns
/// it into SIMD, and a seed chooses the same tokens under every operating system.
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to an integer and leaves it in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first so short that its product with an exponent is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Cephes' polynomial for (eʳ - 1 - r) / r² on |r| ≤ ln 2 / 2.
    const TERMS: [f32; 6] = [
        1.987_569_1e-4,
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let rounded = x * LOG2_E + ROUND;
    let exponent = rounded - ROUND;
    let r = x - exponent * LN_2_HIGH - exponent * LN_2_LOW;
    let series = TERMS.iter().fold(0.0, |sum, term| sum * r + term);
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1f32.to_bits()));
    if x < -87.0 {
        0.0
    } else {
        (series * r * r + r + 1.0) * scale
    }
}

/// The sum of a function over values, in f64 and in a fixed order.
pub(super) fn sum_of(values: &[f32], function: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0.0; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(function(value));
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(function(value));
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_right_to_the_last_digits() {
        let mut worst: f64 = 0.0;
        for step in 0..=870_000 {
            let x = -(step as f32) / 10_000.0;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - expected).abs() / expected);
        }
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(-3e38), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn sums_take_every_value_once() {
        for count in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (1..=count).map(|i| i as f32).collect();
            assert_eq!(sum_of(&values, |v| 2.0 * v), f64::from(count * (count + 1)));
        }
    }
}
