//! E2M1, the 4-bit float: a sign, two exponent bits, one mantissa bit (OCP Microscaling Formats 1.0).

/// The value of each of the sixteen codes. Bit 3 is the sign; code 8 is negative zero.
pub const VALUES: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// The largest magnitude a code can hold.
pub const MAX: f32 = 6.0;

/// The code nearest to `x`, which must not be NaN; ties go to the even code and magnitudes beyond 6 to 6.
///
/// What rounds to zero is code 0 whatever its sign: no encoder of a checkpoint emits negative zero.
#[inline]
pub fn encode(x: f32) -> u8 {
    let a = x.abs();
    let magnitude = (a > 0.25) as u8
        + (a >= 0.75) as u8
        + (a > 1.25) as u8
        + (a >= 1.75) as u8
        + (a > 2.5) as u8
        + (a >= 3.5) as u8
        + (a > 5.0) as u8;
    magnitude | (((x < 0.0 && magnitude > 0) as u8) << 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_a_round_trip() {
        for (code, value) in VALUES.iter().enumerate() {
            let back = encode(*value);
            let expected = if code == 8 { 0 } else { code as u8 };
            assert_eq!(back, expected, "code {code}, value {value}");
            let rebuilt = decode_by_fields(code as u8);
            assert_eq!(rebuilt.to_bits(), value.to_bits(), "code {code}");
        }
    }

    /// The definition, field by field: exponent bias 1, subnormal 0.5.
    fn decode_by_fields(code: u8) -> f32 {
        let (sign, exponent, mantissa) = (code >> 3, (code >> 1) & 3, (code & 1) as f32);
        let magnitude = match exponent {
            0 => 0.5 * mantissa,
            e => (1.0 + 0.5 * mantissa) * f32::powi(2.0, e as i32 - 1),
        };
        if sign == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn ties_go_to_the_even_code_and_their_neighbours_do_not() {
        let ties = [
            (0.25f32, 0.0f32, 0.5f32),
            (0.75, 1.0, 0.5),
            (1.25, 1.0, 1.5),
            (1.75, 2.0, 1.5),
            (2.5, 2.0, 3.0),
            (3.5, 4.0, 3.0),
            (5.0, 4.0, 6.0),
        ];
        for (tie, to, other) in ties {
            for sign in [1.0, -1.0] {
                assert_eq!(VALUES[encode(sign * tie) as usize], sign * to, "tie {tie}");
                let toward = if other > to {
                    tie.next_up()
                } else {
                    tie.next_down()
                };
                assert_eq!(
                    VALUES[encode(sign * toward) as usize],
                    sign * other,
                    "beside {tie}"
                );
                let away = if other > to {
                    tie.next_down()
                } else {
                    tie.next_up()
                };
                assert_eq!(VALUES[encode(sign * away) as usize], sign * to, "beside {tie}");
            }
        }
    }

    #[test]
    fn beyond_the_largest_it_saturates() {
        for x in [6.0, 7.0, 1e30, f32::INFINITY] {
            assert_eq!(encode(x), 7);
            assert_eq!(encode(-x), 15);
        }
        assert_eq!(encode(-1e-30), 0);
        assert_eq!(encode(-0.0), 0);
    }
}
