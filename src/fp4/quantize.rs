//! From floating point to FP4.

use super::{Bytes, Factor, Fp4Tensor, GROUPS, Parts, ScaleKind, code};
use crate::{Error, Result};
use rayon::prelude::*;

/// What to quantise to: group and scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    /// Elements along K that share a scale: 16, 32, 64 or 128.
    pub group: usize,
    /// How scales are stored. E4M3 scales come with a factor, a power of two, for the whole tensor.
    pub kind: ScaleKind,
}

impl Format {
    /// Marlin MMFP4: groups of 128, F16 scales; 4.125 bits a weight.
    pub const fn mmfp4() -> Self {
        Self {
            group: 128,
            kind: ScaleKind::F16,
        }
    }

    /// OCP MXFP4: groups of 32, power-of-two scales; 4.25 bits a weight.
    pub const fn mxfp4() -> Self {
        Self {
            group: 32,
            kind: ScaleKind::E8M0,
        }
    }

    /// NVFP4: groups of 16, E4M3 scales and a tensor factor; 4.5 bits a weight.
    pub const fn nvfp4() -> Self {
        Self {
            group: 16,
            kind: ScaleKind::E4M3,
        }
    }

    /// Refuses a group that no tensor can have; `op` appears in the error.
    pub(crate) fn check(self, op: &'static str) -> Result<()> {
        match GROUPS.contains(&self.group) {
            true => Ok(()),
            false => Err(Error::argument(
                op,
                "format",
                "a group of 16, 32, 64 or 128",
                self.group.to_string(),
            )),
        }
    }

    /// Bits a weight takes, scales included.
    pub fn bits_per_weight(self) -> f64 {
        4.0 + 8.0 * self.kind.size() as f64 / self.group as f64
    }
}

impl std::str::FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "mmfp4" => Ok(Self::mmfp4()),
            "mxfp4" => Ok(Self::mxfp4()),
            "nvfp4" => Ok(Self::nvfp4()),
            other => Err(Error::argument(
                "quantize",
                "format",
                "mmfp4, mxfp4 or nvfp4",
                format!("`{other}`"),
            )),
        }
    }
}

/// How a block's scale is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ScaleRule {
    /// The scale, out of a small search around the block's maximum / 6, with the least squared error, refined
    /// by fitting it to the codes it chose.
    #[default]
    SquaredError,
    /// The block's maximum becomes the largest code (for E8M0: the OCP rule, the power of two below it, / 4).
    Maximum,
}

/// Multiples of maximum / 6 that the search tries: below 1 it clips the block's outlier, above 1 it moves
/// the rest of the block onto better codes.
const SEARCH: [f32; 11] = [1.0, 0.7, 0.76, 0.82, 0.88, 0.94, 1.06, 1.12, 1.18, 1.24, 1.3];

/// How often a scale is fitted to its codes at most; most blocks settle after one or two.
const REFINEMENTS: usize = 4;

/// Quantises a row-major matrix `[N, K]`; `name` appears in errors.
///
/// Deterministic: the result does not depend on the number of threads. BF16 and F16 values are quantised
/// after an exact conversion to f32.
///
/// # Errors
/// [`Error::NonFinite`] names the first NaN or infinity. [`Error::Tensor`] where the shape does not fit the
/// format, or a block is too large for its scale's type (F16 holds blocks up to 393,024).
pub fn quantize(
    name: &str,
    values: &[f32],
    shape: (usize, usize),
    format: Format,
    rule: ScaleRule,
) -> Result<Fp4Tensor> {
    let (n, k) = shape;
    let Format { group, kind } = format;
    let refuse = |problem: String| Err(Error::tensor(name, None, problem));
    if !GROUPS.contains(&group) || n == 0 || k == 0 || k % group != 0 {
        return refuse(format!(
            "shape [{n}, {k}] cannot be quantised in groups of {group}: K must be a multiple"
        ));
    }
    if n.checked_mul(k) != Some(values.len()) {
        return refuse(format!("{} values for shape [{n}, {k}]", values.len()));
    }
    if let Some(index) = values.par_iter().position_first(|v| !v.is_finite()) {
        return Err(Error::NonFinite {
            name: name.into(),
            index,
            value: values[index],
        });
    }
    let largest = values.par_iter().map(|v| v.abs()).reduce(|| 0.0, f32::max);
    let factor = if kind == ScaleKind::E4M3 {
        power_of_two_factor(largest)
    } else {
        1.0
    };
    if largest / code::MAX / factor > kind.max() {
        return refuse(format!(
            "its largest magnitude {largest} does not fit {kind:?} scales; use nvfp4 or mxfp4"
        ));
    }

    let mut codes = vec![0u8; values.len() / 2];
    let mut scales = vec![0u8; values.len() / group * kind.size()];
    values
        .par_chunks_exact(group)
        .zip(codes.par_chunks_exact_mut(group / 2))
        .zip(scales.par_chunks_exact_mut(kind.size()))
        .with_min_len(256)
        .for_each(|((block, codes), stored)| {
            let bits = choose_scale(block, kind, factor, rule);
            stored.copy_from_slice(&bits.to_le_bytes()[..kind.size()]);
            let divisor = Divisor::of(kind.value(bits) * factor);
            for (byte, pair) in codes.iter_mut().zip(block.chunks_exact(2)) {
                *byte = divisor.encode(pair[0]) | divisor.encode(pair[1]) << 4;
            }
        });
    let parts = Parts {
        shape,
        group,
        codes: Bytes::copy_from(&codes)?,
        scales: Bytes::copy_from(&scales)?,
        kind,
        factor: if kind == ScaleKind::E4M3 {
            Factor::Mul(factor)
        } else {
            Factor::None
        },
    };
    Fp4Tensor::new(name, parts)
}

/// The smallest power of two with which the largest block's scale fits E4M3.
///
/// Scales of the search may lie 1.3 times higher; they saturate at 448, which the search takes into account.
fn power_of_two_factor(largest: f32) -> f32 {
    let needed = f64::from(largest) / f64::from(code::MAX) / f64::from(ScaleKind::E4M3.max());
    if needed == 0.0 {
        1.0
    } else {
        needed.log2().ceil().clamp(-126.0, 127.0).exp2() as f32
    }
}

/// A scale to divide by. A block whose scale underflows to zero has only zero codes.
#[derive(Clone, Copy)]
struct Divisor {
    scale: f32,
}

impl Divisor {
    fn of(scale: f32) -> Self {
        Self { scale }
    }

    /// Division, not a product with the reciprocal: a tie must stay a tie.
    #[inline]
    fn encode(self, value: f32) -> u8 {
        if self.scale == 0.0 {
            0
        } else {
            code::encode(value / self.scale)
        }
    }
}

fn choose_scale(block: &[f32], kind: ScaleKind, factor: f32, rule: ScaleRule) -> u16 {
    let max = block.iter().fold(0f32, |m, v| m.max(v.abs()));
    if max == 0.0 {
        return 0;
    }
    let ideal = max / code::MAX / factor;
    let by_maximum = match kind {
        // OCP MX 1.0, 6.3: the largest power of two not above the maximum, over that of E2M1, 4.
        ScaleKind::E8M0 => u16::from(e8m0_floor(max)).saturating_sub(2),
        _ => match kind.encode(ideal) {
            // Rounded up, the scale of the largest floats makes the largest code infinite.
            bits if (code::MAX * (kind.value(bits) * factor)).is_infinite() => bits - 1,
            bits => bits,
        },
    };
    if rule == ScaleRule::Maximum {
        return by_maximum;
    }
    let mut best = (f64::INFINITY, by_maximum);
    let mut consider = |bits: u16| {
        if best.0.is_finite() && bits == best.1 {
            return;
        }
        let error = squared_error(block, kind.value(bits) * factor);
        if error < best.0 {
            best = (error, bits);
        }
    };
    if kind == ScaleKind::E8M0 {
        // The whole neighbourhood of a power of two is its two neighbours.
        for bits in by_maximum.saturating_sub(1)..=(by_maximum + 2).min(254) {
            consider(bits);
        }
    } else {
        for multiple in SEARCH {
            consider(kind.encode(ideal * multiple));
        }
        refine(block, kind, factor, &mut best);
    }
    best.1
}

/// Fits the scale to its codes, `Σ v·q / Σ q²`, and chooses codes anew, while that lowers the error.
fn refine(block: &[f32], kind: ScaleKind, factor: f32, best: &mut (f64, u16)) {
    for _ in 0..REFINEMENTS {
        let divisor = Divisor::of(kind.value(best.1) * factor);
        let (mut products, mut squares) = (0f64, 0f64);
        for &value in block {
            let q = f64::from(code::VALUES[usize::from(divisor.encode(value))]);
            products += f64::from(value) * q;
            squares += q * q;
        }
        if squares == 0.0 {
            return;
        }
        let bits = kind.encode((products / squares / f64::from(factor)) as f32);
        let error = squared_error(block, kind.value(bits) * factor);
        if error >= best.0 {
            return;
        }
        *best = (error, bits);
    }
}

/// The exponent field of the power of two not above `x`, a positive finite number.
fn e8m0_floor(x: f32) -> u8 {
    (x.to_bits() >> 23) as u8
}

fn squared_error(block: &[f32], scale: f32) -> f64 {
    let divisor = Divisor::of(scale);
    block
        .iter()
        .map(|&v| {
            let rounded = code::VALUES[usize::from(divisor.encode(v))] * scale;
            f64::from(v - rounded).powi(2)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FORMATS: [Format; 7] = [
        Format::mmfp4(),
        Format::mxfp4(),
        Format::nvfp4(),
        Format {
            group: 64,
            kind: ScaleKind::F16,
        },
        Format {
            group: 32,
            kind: ScaleKind::BF16,
        },
        Format {
            group: 128,
            kind: ScaleKind::E8M0,
        },
        Format {
            group: 128,
            kind: ScaleKind::E4M3,
        },
    ];

    fn noise(len: usize) -> Vec<f32> {
        let mut state = 1u64;
        (0..len)
            .map(|_| {
                let mut sum = 0.0;
                for _ in 0..4 {
                    state = state
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    sum += (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
                }
                sum
            })
            .collect()
    }

    fn relative_error(values: &[f32], packed: &Fp4Tensor) -> f64 {
        let back = packed.dequantize();
        let error: f64 = values
            .iter()
            .zip(&back)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum();
        error / values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()
    }

    #[test]
    fn the_search_is_never_worse_than_the_maximum() {
        let values = noise(8 * 256);
        for format in FORMATS {
            let run =
                |rule| relative_error(&values, &quantize("w", &values, (8, 256), format, rule).unwrap());
            let (searched, maximum) = (run(ScaleRule::SquaredError), run(ScaleRule::Maximum));
            assert!(searched <= maximum, "{format:?}: {searched} against {maximum}");
            assert!(searched < 0.02, "{format:?}: {searched}");
        }
    }

    #[test]
    fn no_scale_of_the_search_is_better_and_the_codes_fit_the_scale() {
        let values = noise(16 * 128);
        let packed = quantize("w", &values, (16, 128), Format::mmfp4(), ScaleRule::SquaredError).unwrap();
        let mut refined = 0;
        for (i, block) in values.chunks(128).enumerate() {
            let max = block.iter().fold(0f32, |m, v| m.max(v.abs()));
            let searched = SEARCH.map(|m| squared_error(block, half::f16::from_f32(max / 6.0 * m).to_f32()));
            let (best, chosen) = (
                searched.into_iter().fold(f64::INFINITY, f64::min),
                squared_error(block, packed.scale(i)),
            );
            assert!(chosen <= best, "block {i}: {chosen} against {best}");
            refined += (chosen < best) as usize;
        }
        assert!(refined > 8, "{refined} of 16 blocks refined");
    }

    #[test]
    fn the_maximum_rule_makes_the_largest_value_the_largest_code() {
        let values = noise(256);
        let packed = quantize("w", &values, (1, 256), Format::mmfp4(), ScaleRule::Maximum).unwrap();
        for block in packed.codes().chunks(64) {
            assert!(block.iter().any(|b| b & 7 == 7 || b >> 4 & 7 == 7));
        }
        let mx = quantize("w", &[5.0; 32], (1, 32), Format::mxfp4(), ScaleRule::Maximum).unwrap();
        assert_eq!((mx.scales()[0], mx.dequantize()[0]), (127, 4.0));
    }

    #[test]
    fn what_fp4_can_hold_comes_back_exactly() {
        for format in FORMATS {
            let values: Vec<f32> = (0..256).map(|i| code::VALUES[i % 16] * 0.125).collect();
            let packed = quantize("w", &values, (2, 128), format, ScaleRule::SquaredError).unwrap();
            assert_eq!(packed.dequantize(), values, "{format:?}");
        }
    }

    #[test]
    fn zeros_tiny_and_huge_blocks() {
        for format in FORMATS {
            let mut values = vec![0.0f32; 512];
            values[128..256].fill(1e-38);
            values[256..384].copy_from_slice(&noise(128));
            let packed = quantize("w", &values, (4, 128), format, ScaleRule::SquaredError).unwrap();
            let back = packed.dequantize();
            assert!(back[..128].iter().all(|v| *v == 0.0), "{format:?}");
            assert!(back[128..256].iter().all(|v| v.abs() <= 1e-37), "{format:?}");
            values[300] = 1e6;
            let huge = quantize("w", &values, (4, 128), format, ScaleRule::SquaredError);
            match format.kind {
                ScaleKind::F16 => assert!(huge.unwrap_err().to_string().contains("does not fit F16")),
                _ => assert!(
                    (huge.unwrap().dequantize()[300] - 1e6).abs() < 3.5e5,
                    "{format:?}"
                ),
            }
        }
        for extreme in [f32::MAX, f32::MIN_POSITIVE, 1e-45] {
            for format in [
                Format::mxfp4(),
                Format::nvfp4(),
                Format {
                    group: 16,
                    kind: ScaleKind::BF16,
                },
            ] {
                let packed = quantize("w", &[extreme; 32], (1, 32), format, ScaleRule::SquaredError).unwrap();
                assert!(
                    packed.dequantize().iter().all(|v| v.is_finite()),
                    "{format:?} {extreme}"
                );
            }
        }
    }

    #[test]
    fn nan_and_infinity_are_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = noise(256);
            values[200] = bad;
            values[201] = bad;
            let error =
                quantize("up_proj", &values, (2, 128), Format::mmfp4(), ScaleRule::Maximum).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("up_proj") && text.contains("200"), "{text}");
        }
        assert!(quantize("w", &noise(100), (1, 100), Format::mmfp4(), ScaleRule::Maximum).is_err());
        assert!(quantize("w", &noise(100), (1, 128), Format::mmfp4(), ScaleRule::Maximum).is_err());
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let values = noise(64 * 512);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                quantize("w", &values, (64, 512), Format::nvfp4(), ScaleRule::SquaredError).unwrap()
            })
        };
        let (one, three) = (run(1), run(3));
        assert_eq!(&one.codes()[..], &three.codes()[..]);
        assert_eq!(&one.scales()[..], &three.scales()[..]);
    }

    proptest! {
        #[test]
        fn no_code_has_a_nearer_neighbour(values in proptest::collection::vec(-1e4f32..1e4, 32)) {
            let packed = quantize("w", &values, (1, 32), Format::mxfp4(), ScaleRule::SquaredError).unwrap();
            let back = packed.dequantize();
            for (value, rounded) in values.iter().zip(&back) {
                let distance = (value - rounded).abs();
                for code in code::VALUES {
                    prop_assert!(distance <= (value - code * packed.scale(0)).abs());
                }
            }
        }
    }
}
