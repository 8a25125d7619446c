//! The FP4 matrix: codes and scales where they lie.

use super::{Bytes, ScaleKind, code};
use crate::{Error, Result};

/// The group sizes that occur: elements along K that share a scale.
pub const GROUPS: [usize; 4] = [16, 32, 64, 128];

/// What a tensor's scales are multiplied or divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Factor {
    /// Nothing.
    None,
    /// Multiplied (ModelOpt's `weight_scale_2`, our own NVFP4).
    Mul(f32),
    /// Divided (compressed-tensors' `weight_global_scale`); multiplying by the reciprocal is an ulp off.
    Div(f32),
}

/// An FP4 weight matrix `[N, K]`: `N` output features, `K` input features.
///
/// Codes and scales are [`Bytes`], not Candle tensors: a mapped checkpoint is used without a copy.
///
/// ```
/// use candle_mmfp4::fp4::{Format, ScaleRule, quantize};
///
/// let weights: Vec<f32> = (0..2 * 128).map(|i| (i as f32 * 0.1).sin()).collect();
/// let packed = quantize("w", &weights, (2, 128), Format::mmfp4(), ScaleRule::SquaredError)?;
/// let mut row = vec![0.0; 128];
/// packed.decode_row(1, &mut row);
/// assert!(row.iter().zip(&weights[128..]).all(|(a, b)| (a - b).abs() < 0.17));
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Fp4Tensor {
    shape: (usize, usize),
    group: usize,
    codes: Bytes,
    scales: Bytes,
    kind: ScaleKind,
    factor: Factor,
}

/// What an [`Fp4Tensor`] is made of; see [`Fp4Tensor::new`].
#[derive(Debug, Clone)]
pub struct Parts {
    /// `(N, K)`.
    pub shape: (usize, usize),
    /// Elements along K that share a scale: 16, 32, 64 or 128.
    pub group: usize,
    /// `N · K / 2` bytes, row-major, the even k in the low nibble.
    pub codes: Bytes,
    /// `N · K / group` scales, row-major.
    pub scales: Bytes,
    /// How a scale is stored.
    pub kind: ScaleKind,
    /// What holds for the whole tensor.
    pub factor: Factor,
}

impl Fp4Tensor {
    /// Checks the parts and puts them together. `name` appears in errors.
    ///
    /// # Errors
    /// [`Error::Tensor`] for an unknown group, a K that is not a multiple of it, codes or scales of the
    /// wrong size, a NaN or infinite scale, or a factor that is not finite (or is a division by zero).
    pub fn new(name: &str, parts: Parts) -> Result<Self> {
        let tensor = Self::unread(name, parts)?;
        match tensor.bad_scale() {
            None => Ok(tensor),
            Some(index) => {
                let groups = tensor.shape.1 / tensor.group;
                let problem = format!(
                    "scale [{}, {}] is {}; expected finite scales",
                    index / groups,
                    index % groups,
                    tensor.scale(index)
                );
                Err(Error::tensor(name, None, problem))
            }
        }
    }

    /// As [`new`](Self::new), of scales that are not looked at: where only sizes are asked for.
    ///
    /// # Errors
    /// As [`new`](Self::new), but for the values of scales.
    pub(crate) fn unread(name: &str, parts: Parts) -> Result<Self> {
        let Parts {
            shape: (n, k),
            group,
            codes,
            scales,
            kind,
            factor,
        } = parts;
        let refuse = |problem: String| Err(Error::tensor(name, None, problem));
        if !GROUPS.contains(&group) {
            return refuse(format!("group of {group}; expected 16, 32, 64 or 128"));
        }
        if n == 0 || k == 0 || k % group != 0 {
            return refuse(format!(
                "shape [{n}, {k}]; K must be a multiple of the group of {group}, neither be 0"
            ));
        }
        let scale_bytes = n.checked_mul(k / group).and_then(|s| s.checked_mul(kind.size()));
        let sizes = n.checked_mul(k / 2).zip(scale_bytes);
        let Some((code_bytes, scale_bytes)) = sizes else {
            return refuse(format!("shape [{n}, {k}] is larger than memory"));
        };
        if codes.len() != code_bytes {
            return refuse(format!(
                "{} bytes of codes; [{n}, {k}] at two codes a byte needs {code_bytes}",
                codes.len()
            ));
        }
        if scales.len() != scale_bytes {
            return refuse(format!(
                "{} bytes of scales; [{n}, {}] {kind:?} scales need {scale_bytes}",
                scales.len(),
                k / group
            ));
        }
        match factor {
            Factor::Mul(f) | Factor::Div(f) if !f.is_finite() => {
                return refuse(format!("tensor factor {f}; expected a finite number"));
            }
            Factor::Div(0.0) => return refuse("tensor factor 0 to divide by".into()),
            _ => {}
        }
        Ok(Self {
            shape: (n, k),
            group,
            codes,
            scales,
            kind,
            factor,
        })
    }

    /// The index of the first scale that is NaN or infinite, or becomes so by the factor.
    fn bad_scale(&self) -> Option<usize> {
        // Where no scale can overflow by the factor, bits tell quickly.
        let quick = self.with_factor(self.kind.max()).is_finite();
        if quick && self.kind.all_finite(&self.scales) {
            return None;
        }
        let scales = self.shape.0 * (self.shape.1 / self.group);
        (0..scales).find(|&i| !self.scale(i).is_finite())
    }

    /// `(N, K)`.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Elements along K that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The codes, `N · K / 2` bytes.
    pub fn codes(&self) -> &Bytes {
        &self.codes
    }

    /// The scales as stored, `N · K / group` of them.
    pub fn scales(&self) -> &Bytes {
        &self.scales
    }

    /// How the scales are stored.
    pub fn scale_kind(&self) -> ScaleKind {
        self.kind
    }

    /// The tensor's factor.
    pub fn factor(&self) -> Factor {
        self.factor
    }

    /// Bytes of codes and scales together.
    pub fn size_in_bytes(&self) -> usize {
        self.codes.len() + self.scales.len()
    }

    /// The same tensor over other bytes: `codes` and `scales` must be copies of this tensor's.
    pub(crate) fn relocated(&self, codes: Bytes, scales: Bytes) -> Self {
        debug_assert!(codes.len() == self.codes.len() && scales.len() == self.scales.len());
        Self {
            codes,
            scales,
            ..self.clone()
        }
    }

    /// The scale with this flat index, factor included, in f32.
    #[inline]
    pub(crate) fn scale(&self, index: usize) -> f32 {
        self.with_factor(self.kind.decode(&self.scales, index))
    }

    fn with_factor(&self, scale: f32) -> f32 {
        match self.factor {
            Factor::None => scale,
            Factor::Mul(factor) => scale * factor,
            Factor::Div(factor) => scale / factor,
        }
    }

    /// Writes row `n` in f32 to `row`, exactly: each value is one code times its scale.
    ///
    /// # Panics
    /// If there is no such row or `row` is not `K` long.
    pub fn decode_row(&self, n: usize, row: &mut [f32]) {
        assert_eq!(row.len(), self.shape.1, "row length");
        self.decode_row_part(n, 0, row);
    }

    /// Writes the elements of row `n` that begin at `start`, a multiple of the group, to `row`, whole groups.
    #[inline]
    pub(crate) fn decode_row_part(&self, n: usize, start: usize, row: &mut [f32]) {
        let k = self.shape.1;
        debug_assert!(start.is_multiple_of(self.group) && row.len().is_multiple_of(self.group));
        let codes = &self.codes[(n * k + start) / 2..][..row.len() / 2];
        let first = (n * k + start) / self.group;
        let blocks = row
            .chunks_exact_mut(self.group)
            .zip(codes.chunks_exact(self.group / 2));
        for (i, (values, codes)) in blocks.enumerate() {
            let scale = self.scale(first + i);
            for (pair, byte) in values.chunks_exact_mut(2).zip(codes) {
                pair[0] = code::VALUES[usize::from(byte & 15)] * scale;
                pair[1] = code::VALUES[usize::from(byte >> 4)] * scale;
            }
        }
    }

    /// The whole matrix in f32, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let (n, k) = self.shape;
        let mut values = vec![0.0; n * k];
        for (i, row) in values.chunks_exact_mut(k).enumerate() {
            self.decode_row(i, row);
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Parts {
        Parts {
            shape: (2, 32),
            group: 16,
            codes: Bytes::copy_from(&(0..32).map(|i| i as u8 * 37).collect::<Vec<_>>()).unwrap(),
            scales: Bytes::copy_from(&[0x38, 0x40, 0x01, 0x7e]).unwrap(),
            kind: ScaleKind::E4M3,
            factor: Factor::Mul(0.25),
        }
    }

    #[test]
    fn each_value_is_code_times_scale() {
        let tensor = Fp4Tensor::new("w", parts()).unwrap();
        let values = tensor.dequantize();
        for (index, value) in values.iter().enumerate() {
            let byte = tensor.codes()[index / 2];
            let code = if index % 2 == 0 { byte & 15 } else { byte >> 4 };
            let scale = [1.0, 2.0, 2f32.powi(-9), 448.0][index / 16] * 0.25;
            assert_eq!(*value, code::VALUES[usize::from(code)] * scale, "element {index}");
        }
    }

    #[test]
    fn dividing_is_not_multiplying_by_the_reciprocal() {
        let tensor = |factor| Fp4Tensor::new("w", Parts { factor, ..parts() }).unwrap();
        let (divided, multiplied) = (tensor(Factor::Div(3.0)), tensor(Factor::Mul(1.0 / 3.0)));
        assert_eq!(divided.scale(3), 448.0 / 3.0);
        assert_ne!(divided.scale(3), multiplied.scale(3));
    }

    #[test]
    fn malformed_parts_are_refused_by_name() {
        let nan = Bytes::copy_from(&[0x38, 0x7f, 0x01, 0x7e]).unwrap();
        let short = Bytes::copy_from(&[0; 31]).unwrap();
        let cases = [
            (Parts { group: 8, ..parts() }, "group of 8"),
            (
                Parts {
                    shape: (2, 24),
                    ..parts()
                },
                "multiple of the group",
            ),
            (
                Parts {
                    shape: (0, 32),
                    ..parts()
                },
                "neither be 0",
            ),
            (
                Parts {
                    codes: short.clone(),
                    ..parts()
                },
                "needs 32",
            ),
            (
                Parts {
                    scales: short,
                    ..parts()
                },
                "E4M3 scales need 4",
            ),
            (
                Parts {
                    scales: nan,
                    ..parts()
                },
                "scale [0, 1] is NaN",
            ),
            (
                Parts {
                    factor: Factor::Div(0.0),
                    ..parts()
                },
                "factor 0",
            ),
            (
                Parts {
                    factor: Factor::Mul(f32::NAN),
                    ..parts()
                },
                "finite",
            ),
            (
                Parts {
                    shape: (usize::MAX / 32, 64),
                    ..parts()
                },
                "",
            ),
        ];
        for (parts, expected) in cases {
            let error = Fp4Tensor::new("layers.3.up", parts).unwrap_err().to_string();
            assert!(
                error.contains("layers.3.up") && error.contains(expected),
                "{error}"
            );
        }
    }

    #[test]
    fn e8m0_nan_is_refused_and_zero_is_tiny() {
        let scaled = |codes: [u8; 2]| {
            let parts = Parts {
                group: 32,
                kind: ScaleKind::E8M0,
                factor: Factor::None,
                scales: Bytes::copy_from(&codes).unwrap(),
                ..parts()
            };
            Fp4Tensor::new("w", parts)
        };
        assert!(scaled([127, 255]).is_err());
        assert_eq!(scaled([0, 127]).unwrap().scale(0), 2f32.powi(-127));
    }
}
