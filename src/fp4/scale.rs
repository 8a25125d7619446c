//! Block scales as they lie on disk: F16, BF16, E8M0 and E4M3.

use half::{bf16, f16};

/// How a block scale is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// IEEE half precision, two bytes little-endian (MMFP4).
    F16,
    /// bfloat16, two bytes little-endian.
    BF16,
    /// An 8-bit power of two, `2^(code - 127)`: 0 is 2^-127 and 255 is NaN (OCP MX, MXFP4).
    E8M0,
    /// FP8 E4M3 without infinities, largest 448, subnormals down to 2^-9; 0x7F and 0xFF are NaN (NVFP4).
    E4M3,
}

impl ScaleKind {
    /// Bytes a scale takes.
    pub const fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::E8M0 | Self::E4M3 => 1,
        }
    }

    /// The value of the scale with this index in `bytes`.
    ///
    /// # Panics
    /// If `bytes` is shorter than `(index + 1) · size()`.
    #[inline]
    pub fn decode(self, bytes: &[u8], index: usize) -> f32 {
        let half = || u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]);
        match self {
            Self::F16 => f16::from_bits(half()).to_f32(),
            Self::BF16 => bf16::from_bits(half()).to_f32(),
            Self::E8M0 => e8m0_to_f32(bytes[index]),
            Self::E4M3 => e4m3_to_f32(bytes[index]),
        }
    }

    /// Whether no scale in `bytes` is NaN or infinite. A checkpoint has some hundred million of them, so this looks at
    /// bits, in a loop that a compiler turns into vector instructions.
    pub(super) fn all_finite(self, bytes: &[u8]) -> bool {
        let halves = |exponent: u16| {
            // A part at a time: an early end within would keep the loop from being one over vectors.
            bytes.chunks(1 << 12).all(|part| {
                let bad = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]) & exponent == exponent;
                !part.chunks_exact(2).fold(false, |any, b| any | bad(b))
            })
        };
        let octets = |mask: u8, nan: u8| {
            let mut parts = bytes.chunks(1 << 12);
            parts.all(|part| !part.iter().fold(false, |any, b| any | (b & mask == nan)))
        };
        match self {
            Self::F16 => halves(0x7c00),
            Self::BF16 => halves(0x7f80),
            Self::E8M0 => octets(0xff, 0xff),
            Self::E4M3 => octets(0x7f, 0x7f),
        }
    }

    /// The largest finite scale.
    pub(crate) fn max(self) -> f32 {
        match self {
            Self::F16 => f16::MAX.to_f32(),
            Self::BF16 => bf16::MAX.to_f32(),
            Self::E8M0 => e8m0_to_f32(254),
            Self::E4M3 => 448.0,
        }
    }

    /// The stored scale nearest to `x`, a finite number that is not negative (ties to even), saturating.
    /// Powers of two round in the logarithm's sense: up from √2 on.
    pub(crate) fn encode(self, x: f32) -> u16 {
        let x = x.min(self.max());
        match self {
            Self::F16 => f16::from_f32(x).to_bits(),
            Self::BF16 => bf16::from_f32(x).to_bits(),
            Self::E8M0 => f32_to_e8m0(x).into(),
            Self::E4M3 => f32_to_e4m3(x).into(),
        }
    }

    /// The value of a stored scale.
    pub(crate) fn value(self, bits: u16) -> f32 {
        self.decode(&bits.to_le_bytes(), 0)
    }
}

fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

fn f32_to_e8m0(x: f32) -> u8 {
    if x <= 0.0 {
        return 0;
    }
    let exponent = (x.to_bits() >> 23) as i32;
    if exponent == 0 {
        // Below 2^-126 there is only 2^-127; √2 · 2^-127 is the border.
        return (x >= 2f32.sqrt() * e8m0_to_f32(0)) as u8;
    }
    let fraction = f32::from_bits((x.to_bits() & 0x007f_ffff) | (127 << 23));
    (exponent + (fraction >= std::f32::consts::SQRT_2) as i32).min(254) as u8
}

fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3) & 15, f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * f32::from_bits((127 - 9) << 23),
        _ => (1.0 + mantissa / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

fn f32_to_e4m3(x: f32) -> u8 {
    // The step between neighbours: 2^-9 up to 2^-6, then an eighth of the power of two below x.
    let exponent = ((x.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    let mantissa = (x / step).round_ties_even() as i32;
    // A mantissa that rounds up to 16 (or, among subnormals, to 8) carries into the exponent by itself.
    let code = if exponent == -6 && mantissa < 8 {
        mantissa
    } else {
        ((exponent + 7) << 3) + mantissa - 8
    };
    code.min(0x7e) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_e8m0_code() {
        for code in 0..=254u8 {
            let expected = 2f64.powi(i32::from(code) - 127) as f32;
            assert_eq!(e8m0_to_f32(code).to_bits(), expected.to_bits(), "code {code}");
            assert_eq!(f32_to_e8m0(expected), code, "round trip of {code}");
            if code > 0 && code < 254 {
                assert_eq!(f32_to_e8m0(expected * 1.42), code + 1);
                assert_eq!(f32_to_e8m0(expected * 1.41), code);
            }
        }
        assert!(e8m0_to_f32(255).is_nan());
        assert_eq!(f32_to_e8m0(0.0), 0);
        assert_eq!(f32_to_e8m0(f32::MAX), 254);
    }

    #[test]
    fn every_e4m3_code() {
        for code in 0..=255u8 {
            let value = e4m3_to_f32(code);
            if code & 0x7f == 0x7f {
                assert!(value.is_nan(), "code {code:#x}");
                continue;
            }
            let (exponent, mantissa) = (i32::from(code >> 3) & 15, f64::from(code & 7));
            let magnitude = if exponent == 0 {
                mantissa / 8.0 * 2f64.powi(-6)
            } else {
                (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7)
            };
            let expected = if code >= 128 { -magnitude } else { magnitude } as f32;
            assert_eq!(value.to_bits(), expected.to_bits(), "code {code:#x}");
            if code < 0x7f {
                assert_eq!(f32_to_e4m3(value), code, "round trip of {code:#x}");
            }
        }
    }

    #[test]
    fn e4m3_rounds_to_nearest_ties_to_even() {
        for code in 0..0x7eu8 {
            let (low, high) = (e4m3_to_f32(code), e4m3_to_f32(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(f32_to_e4m3(middle), even, "between {low} and {high}");
            assert_eq!(f32_to_e4m3(middle.next_down()), code);
            assert_eq!(f32_to_e4m3(middle.next_up()), code + 1);
        }
        assert_eq!(ScaleKind::E4M3.encode(1e9), 0x7e);
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_it_is() {
        for kind in [ScaleKind::F16, ScaleKind::BF16, ScaleKind::E8M0, ScaleKind::E4M3] {
            for code in 0..1u32 << (8 * kind.size()) {
                let bits = code as u16;
                let mut bytes = 0x0100u16.to_le_bytes()[..kind.size()].repeat(3);
                bytes[kind.size()..2 * kind.size()].copy_from_slice(&bits.to_le_bytes()[..kind.size()]);
                assert_eq!(
                    kind.all_finite(&bytes),
                    kind.value(bits).is_finite(),
                    "{kind:?} {bits:#x}"
                );
            }
            let mut long = vec![0; 3 << 12];
            assert!(kind.all_finite(&long));
            let last = long.len() - kind.size();
            long[last..].fill(0xff);
            assert!(!kind.all_finite(&long));
        }
    }

    #[test]
    fn halves_are_little_endian() {
        let bytes = [0x00, 0x3c, 0x00, 0xc0];
        assert_eq!(ScaleKind::F16.decode(&bytes, 0), 1.0);
        assert_eq!(ScaleKind::F16.decode(&bytes, 1), -2.0);
        let bytes = [0x80, 0x3f, 0x00, 0xc0];
        assert_eq!(ScaleKind::BF16.decode(&bytes, 0), 1.0);
        assert_eq!(ScaleKind::BF16.decode(&bytes, 1), -2.0);
        assert_eq!(ScaleKind::F16.encode(1e9), f16::MAX.to_bits());
    }
}
