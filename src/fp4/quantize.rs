//! From floating point to FP4.

use super::search::{Divisor, ScaleRule, choose_scale, power_of_two_factor};
use super::{Bytes, DenseTensor, Factor, Format, Fp4Tensor, GROUPS, Parts, ScaleKind, code};
use crate::{Error, Result};
use rayon::prelude::*;

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
    if shape.0.checked_mul(shape.1) != Some(values.len()) {
        let problem = format!("{} values for shape [{}, {}]", values.len(), shape.0, shape.1);
        return Err(Error::tensor(name, None, problem));
    }
    let slice = Source {
        name,
        len: values.len(),
        fetch: |start: usize, to: &mut [f32]| to.copy_from_slice(&values[start..start + to.len()]),
    };
    slice.quantize(shape, format, rule, None)
}

/// As [`quantize`], of a matrix where it lies: no copy of it in f32 is made, and beside the result no more than
/// 64 KiB a thread are held in memory.
///
/// E4M3 scales are chosen for the tensor factor `factor`, where one is given ([`shared_factor`]).
///
/// # Errors
/// As [`quantize`]; [`Error::Tensor`] also for a factor that the largest block's scale does not fit.
pub fn quantize_dense(
    name: &str,
    matrix: &DenseTensor,
    format: Format,
    rule: ScaleRule,
    factor: Option<f32>,
) -> Result<Fp4Tensor> {
    Source::of(name, matrix).quantize(matrix.shape(), format, rule, factor)
}

/// The smallest power of two that can be the factor of all these matrices, each with its name, where their scales are
/// E4M3: matrices that a GPU's kernel multiplies as one need the same factor.
///
/// # Errors
/// [`Error::NonFinite`] names the first NaN or infinity of the first matrix that has one.
pub fn shared_factor(matrices: &[(&str, &DenseTensor)]) -> Result<f32> {
    let mut largest = 0f32;
    for (name, matrix) in matrices {
        largest = largest.max(Source::of(name, matrix).largest()?);
    }
    Ok(power_of_two_factor(largest))
}

/// Values decoded at a time by a thread: in its second-level cache, and a multiple of every group.
const PIECE: usize = 1 << 14;

/// A matrix's values in row-major order: `fetch` writes those from an index on.
pub(super) struct Source<'a, F> {
    name: &'a str,
    len: usize,
    fetch: F,
}

impl<'a> Source<'a, ()> {
    pub(super) fn of(
        name: &'a str,
        matrix: &'a DenseTensor,
    ) -> Source<'a, impl Fn(usize, &mut [f32]) + Sync + 'a> {
        let (n, k) = matrix.shape();
        Source {
            name,
            len: n * k,
            fetch: |start: usize, to: &mut [f32]| matrix.decode_row_part(0, start, to),
        }
    }
}

impl<F: Fn(usize, &mut [f32]) + Sync> Source<'_, F> {
    /// The largest magnitude.
    fn largest(&self) -> Result<f32> {
        let pieces = (0..self.len.div_ceil(PIECE)).into_par_iter();
        let found = pieces.map_init(
            || vec![0f32; PIECE],
            |buffer, piece| {
                let start = piece * PIECE;
                let values = &mut buffer[..PIECE.min(self.len - start)];
                (self.fetch)(start, values);
                match values.iter().position(|v| !v.is_finite()) {
                    Some(index) => Err((start + index, values[index])),
                    None => Ok(values.iter().fold(0f32, |largest, v| largest.max(v.abs()))),
                }
            },
        );
        let largest = found.reduce(
            || Ok(0.0),
            |a, b| match (a, b) {
                (Ok(a), Ok(b)) => Ok(a.max(b)),
                (Err(a), Err(b)) => Err(if a.0 <= b.0 { a } else { b }),
                (Err(e), _) | (_, Err(e)) => Err(e),
            },
        );
        largest.map_err(|(index, value): (usize, f32)| Error::NonFinite {
            name: self.name.into(),
            file: None,
            index,
            value,
        })
    }

    fn quantize(
        &self,
        shape: (usize, usize),
        format: Format,
        rule: ScaleRule,
        factor: Option<f32>,
    ) -> Result<Fp4Tensor> {
        self.quantize_by(shape, format, factor, |codes, scales, factor| {
            self.encode(codes, scales, format, factor, rule);
        })
    }

    /// Checks, finds a factor where none is given, and lets `encode` write codes and scales for it.
    pub(super) fn quantize_by(
        &self,
        shape: (usize, usize),
        format: Format,
        factor: Option<f32>,
        encode: impl FnOnce(&mut [u8], &mut [u8], f32),
    ) -> Result<Fp4Tensor> {
        let (n, k) = shape;
        let Format { group, kind } = format;
        let refuse = |problem: String| Err(Error::tensor(self.name, None, problem));
        if !GROUPS.contains(&group) || n == 0 || k == 0 || k % group != 0 {
            return refuse(format!(
                "shape [{n}, {k}] cannot be quantised in groups of {group}: K must be a multiple"
            ));
        }
        let largest = self.largest()?;
        let factor = match (kind, factor) {
            (ScaleKind::E4M3, Some(factor)) => factor,
            (ScaleKind::E4M3, None) => power_of_two_factor(largest),
            _ => 1.0,
        };
        if largest / code::MAX / factor > kind.max() {
            return refuse(match kind {
                ScaleKind::E4M3 => {
                    format!("its largest magnitude {largest} does not fit a factor of {factor}")
                }
                _ => format!(
                    "its largest magnitude {largest} does not fit {kind:?} scales; use nvfp4 or mxfp4"
                ),
            });
        }
        let mut scales = vec![0; self.len / group * kind.size()];
        let codes = Bytes::build(self.len / 2, |codes| {
            encode(codes, &mut scales, factor);
            Ok(())
        })?;
        let parts = Parts {
            shape,
            group,
            codes,
            scales: Bytes::copy_from(&scales)?,
            kind,
            factor: match kind {
                ScaleKind::E4M3 => Factor::Mul(factor),
                _ => Factor::None,
            },
        };
        Fp4Tensor::new(self.name, parts)
    }

    fn encode(&self, codes: &mut [u8], scales: &mut [u8], format: Format, factor: f32, rule: ScaleRule) {
        let Format { group, kind } = format;
        let pieces = codes
            .par_chunks_mut(PIECE / 2)
            .zip(scales.par_chunks_mut(PIECE / group * kind.size()));
        pieces.enumerate().for_each_init(
            || vec![0f32; PIECE],
            |buffer, (piece, (codes, scales))| {
                let values = &mut buffer[..2 * codes.len()];
                (self.fetch)(piece * PIECE, values);
                let blocks = values
                    .chunks_exact(group)
                    .zip(codes.chunks_exact_mut(group / 2))
                    .zip(scales.chunks_exact_mut(kind.size()));
                for ((block, codes), stored) in blocks {
                    let bits = choose_scale(block, kind, factor, rule);
                    stored.copy_from_slice(&bits.to_le_bytes()[..kind.size()]);
                    let divisor = Divisor::of(kind.value(bits) * factor);
                    for (byte, pair) in codes.iter_mut().zip(block.chunks_exact(2)) {
                        *byte = divisor.encode(pair[0]) | divisor.encode(pair[1]) << 4;
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::search::{SEARCH, squared_error};
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
    fn a_dense_matrix_gives_the_same_as_its_values() {
        // Longer than a piece, and no multiple of one.
        let shape = (5, 4096);
        let values: Vec<f32> = noise(shape.0 * shape.1)
            .iter()
            .map(|v| half::bf16::from_f32(*v).to_f32())
            .collect();
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
            .collect();
        let dense = |bytes: &[u8]| {
            DenseTensor::new(
                "w",
                shape,
                crate::fp4::FloatKind::BF16,
                Bytes::copy_from(bytes).unwrap(),
            )
            .unwrap()
        };
        for format in FORMATS {
            let rule = ScaleRule::SquaredError;
            let plain = quantize("w", &values, shape, format, rule).unwrap();
            let direct = quantize_dense("w", &dense(&bytes), format, rule, None).unwrap();
            assert_eq!(&plain.codes()[..], &direct.codes()[..], "{format:?}");
            assert_eq!(&plain.scales()[..], &direct.scales()[..], "{format:?}");
        }
        let mut bad = bytes.clone();
        for index in [20_000, 18_000] {
            bad[2 * index..2 * index + 2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
        }
        let error = quantize_dense("w", &dense(&bad), Format::nvfp4(), ScaleRule::Maximum, None).unwrap_err();
        assert!(matches!(error, Error::NonFinite { index: 18_000, .. }), "{error}");
    }

    #[test]
    fn a_shared_factor_is_that_of_the_larger_matrix() {
        let dense = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let bytes = Bytes::copy_from(&bytes).unwrap();
            DenseTensor::new("w", (1, 256), crate::fp4::FloatKind::F32, bytes).unwrap()
        };
        let small = dense(&noise(256));
        let large = dense(&noise(256).iter().map(|v| v * 100.0).collect::<Vec<_>>());
        let alone = |matrix| {
            let packed = quantize_dense("w", matrix, Format::nvfp4(), ScaleRule::default(), None).unwrap();
            packed.factor()
        };
        let factor = shared_factor(&[("a", &small), ("b", &large)]).unwrap();
        assert_eq!(Factor::Mul(factor), alone(&large));
        assert_ne!(Factor::Mul(factor), alone(&small));
        assert_eq!(factor.to_bits() & 0x007f_ffff, 0, "{factor} is no power of two");
        let run =
            |matrix, factor| quantize_dense("w", matrix, Format::nvfp4(), ScaleRule::default(), Some(factor));
        let packed = run(&small, factor).unwrap();
        assert_eq!(packed.factor(), Factor::Mul(factor));
        let error: f32 = small
            .to_f32()
            .iter()
            .zip(packed.dequantize())
            .map(|(a, b)| (a - b).powi(2))
            .sum();
        assert!(
            error < 0.02 * small.to_f32().iter().map(|v| v * v).sum::<f32>(),
            "{error}"
        );
        let error = run(&large, factor / 2.0).unwrap_err().to_string();
        assert!(error.contains("does not fit a factor"), "{error}");
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
