//! Matrices rounded to eight bits: what an output head in floating point may be stored as while a model runs.

use super::{Bytes, DenseTensor};
use crate::{Error, Result};
use rayon::prelude::*;

/// Elements of a row that share a scale: those that share one among rounded activations.
pub(crate) const INT8_BLOCK: usize = 128;

/// Bytes of a scale: f32, since a 16-bit one would over- or underflow where BF16 weights do not, and for 1.5 % of the
/// bytes would cost a conversion.
const SCALE: usize = size_of::<f32>();

/// A matrix `[N, K]` of whole numbers from -127 to 127 and a scale a row and block of 128 elements:
/// `w[n, k] ≈ scale[n, k / 128] · code[n, k]`, 8.25 bits a weight.
///
/// It is made in memory and never stored, so its layout is the kernels': a row's blocks follow each other, of each the
/// 64 even elements before the 64 odd ones, as in rounded activations; the last is filled with zeros.
///
/// ```
/// use candle_mmfp4::fp4::{Bytes, DenseTensor, FloatKind, Int8Tensor, Weight};
///
/// let values = [0.5f32, -2.0, 0.25, 1.0];
/// let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
/// let dense = DenseTensor::new("w", (1, 4), FloatKind::F32, Bytes::copy_from(&bytes)?)?;
/// let rounded = Weight::from(Int8Tensor::round("w", &dense)?);
/// let mut row = [0.0; 4];
/// rounded.decode_row(0, &mut row);
/// assert!(row.iter().zip(values).all(|(a, b)| (a - b).abs() <= 1.0 / 127.0));
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Int8Tensor {
    shape: (usize, usize),
    codes: Bytes,
    scales: Bytes,
}

impl Int8Tensor {
    /// Rounds a matrix to the nearest codes, ties to even, the largest magnitude of each block becoming ±127. Rows are
    /// shared among rayon's threads, whose number changes no bit. `name` appears in errors.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for NaN or infinity, [`Error::Io`] where there is no memory left.
    pub fn round(name: &str, dense: &DenseTensor) -> Result<Self> {
        let (n, k) = dense.shape();
        let blocks = k.div_ceil(INT8_BLOCK);
        let (code_bytes, scale_bytes) = (n * blocks * INT8_BLOCK, n * blocks * SCALE);
        let memory = Bytes::build(code_bytes + scale_bytes, |memory| {
            let (codes, scales) = memory.split_at_mut(code_bytes);
            let rows = codes
                .par_chunks_exact_mut(blocks * INT8_BLOCK)
                .zip(scales.par_chunks_exact_mut(blocks * SCALE));
            let round = |values: &mut Vec<f32>, (row, (codes, scales)): (usize, (&mut [u8], &mut [u8]))| {
                dense.decode_row_part(row, 0, &mut values[..k]);
                let parts = codes
                    .chunks_exact_mut(INT8_BLOCK)
                    .zip(scales.chunks_exact_mut(SCALE));
                for (values, (codes, scale)) in values.chunks_exact(INT8_BLOCK).zip(parts) {
                    scale.copy_from_slice(&round_block(values, codes).to_le_bytes());
                }
                let bad = values.iter().position(|v| !v.is_finite());
                bad.map(|column| (row * k + column, values[column]))
            };
            let bad = rows
                .enumerate()
                .map_init(|| vec![0.0; blocks * INT8_BLOCK], round)
                .flatten()
                .min_by_key(|(index, _)| *index);
            bad.map_or(Ok(()), |(index, value)| {
                Err(Error::NonFinite {
                    name: name.into(),
                    file: None,
                    index,
                    value,
                })
            })
        })?;
        let part = |range| {
            memory
                .slice(range)
                .ok_or_else(|| Error::tensor(name, None, "rounded to fewer bytes than it needs"))
        };
        Ok(Self {
            shape: (n, k),
            codes: part(0..code_bytes)?,
            scales: part(code_bytes..code_bytes + scale_bytes)?,
        })
    }

    /// A matrix of the size that [`round`](Self::round) gives, of zeros that take no memory.
    ///
    /// # Errors
    /// As [`Bytes::unwritten`].
    pub(crate) fn unwritten((n, k): (usize, usize)) -> Result<Self> {
        let blocks = n * k.div_ceil(INT8_BLOCK);
        Ok(Self {
            shape: (n, k),
            codes: Bytes::unwritten(blocks * INT8_BLOCK)?,
            scales: Bytes::unwritten(blocks * SCALE)?,
        })
    }

    /// `(N, K)`.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The codes: `N` rows of `K` bytes, rounded up to a multiple of 128, in the order of the kernels.
    pub fn codes(&self) -> &Bytes {
        &self.codes
    }

    /// The scales: `N · ⌈K / 128⌉` little-endian f32.
    pub fn scales(&self) -> &Bytes {
        &self.scales
    }

    /// Bytes of codes and scales together.
    pub fn size_in_bytes(&self) -> usize {
        self.codes.len() + self.scales.len()
    }

    /// The same tensor over other bytes: copies of this tensor's.
    pub(crate) fn relocated(&self, codes: Bytes, scales: Bytes) -> Self {
        debug_assert!(codes.len() == self.codes.len() && scales.len() == self.scales.len());
        Self {
            codes,
            scales,
            ..*self
        }
    }

    /// Blocks of a row.
    #[inline(always)]
    pub(crate) fn blocks(&self) -> usize {
        self.shape.1.div_ceil(INT8_BLOCK)
    }

    /// The scales of each of some rows.
    #[inline(always)]
    pub(crate) fn scales_of_rows(
        &self,
        first: usize,
        rows: usize,
    ) -> impl Iterator<Item = impl Iterator<Item = f32>> {
        let row = self.blocks() * SCALE;
        let scales = &self.scales[first * row..][..rows * row];
        scales.chunks_exact(row).map(|row| {
            row.chunks_exact(SCALE)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        })
    }

    /// The scale of block `index`, counted from the first row's first.
    #[inline(always)]
    pub(crate) fn scale(&self, index: usize) -> f32 {
        let bytes = &self.scales[index * SCALE..][..SCALE];
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    /// The 128 codes of block `index`, counted likewise.
    #[inline(always)]
    pub(crate) fn block(&self, index: usize) -> &[u8] {
        &self.codes[index * INT8_BLOCK..][..INT8_BLOCK]
    }

    /// Writes the elements of row `n` that begin at `start` to `row`, in f32.
    #[inline]
    pub(crate) fn decode_row_part(&self, n: usize, start: usize, row: &mut [f32]) {
        let first = n * self.blocks();
        for (k, value) in (start..).zip(row) {
            let (index, at) = (first + k / INT8_BLOCK, k % INT8_BLOCK);
            let code = self.block(index)[place(at)] as i8;
            *value = self.scale(index) * f32::from(code);
        }
    }
}

/// Where element `at` of a block lies in it.
#[inline(always)]
fn place(at: usize) -> usize {
    at % 2 * (INT8_BLOCK / 2) + at / 2
}

/// Rounds a block to `codes` and gives its scale; what is not finite becomes anything.
fn round_block(values: &[f32], codes: &mut [u8]) -> f32 {
    // 2^23 · 1.5: adding it to a number of at most 127 rounds that, ties to even, and leaves it in the low byte.
    const ROUND: f32 = 12_582_912.0;
    let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    let inverse = 127.0 / largest;
    if !inverse.is_finite() {
        // Zeros, or so near to them (below 4e-37) that no sum can tell.
        codes.fill(0);
        return 0.0;
    }
    for (at, value) in values.iter().enumerate() {
        codes[place(at)] = (value * inverse + ROUND).to_bits() as u8;
    }
    largest / 127.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{nmse, noise};
    use crate::fp4::{FloatKind, Weight};

    fn dense(values: &[f32], shape: (usize, usize), kind: FloatKind) -> DenseTensor {
        let bytes: Vec<u8> = match kind {
            FloatKind::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            FloatKind::F16 => values
                .iter()
                .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
                .collect(),
            FloatKind::BF16 => values
                .iter()
                .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
                .collect(),
        };
        DenseTensor::new("w", shape, kind, Bytes::copy_from(&bytes).unwrap()).unwrap()
    }

    fn decoded(tensor: Int8Tensor) -> Vec<f32> {
        let (n, k) = tensor.shape();
        let weight = Weight::from(tensor);
        let mut values = vec![f32::NAN; n * k];
        for (i, row) in values.chunks_exact_mut(k).enumerate() {
            weight.decode_row(i, row);
        }
        values
    }

    #[test]
    fn every_element_is_within_half_a_step() {
        for kind in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
            for k in [1, 2, 63, 127, 128, 129, 368] {
                let dense = dense(&noise(5 * k, k as u64), (5, k), kind);
                let original = dense.to_f32();
                let tensor = Int8Tensor::round("w", &dense).unwrap();
                assert_eq!(tensor.size_in_bytes(), 5 * k.div_ceil(128) * 132);
                let rounded = decoded(tensor);
                for (rounded, original) in rounded.chunks(k).zip(original.chunks(k)) {
                    for (rounded, original) in rounded.chunks(128).zip(original.chunks(128)) {
                        let largest = original.iter().fold(0f32, |largest, v| largest.max(v.abs()));
                        for (a, b) in rounded.iter().zip(original) {
                            assert!((a - b).abs() <= largest / 253.9, "{kind:?}, K = {k}: {a} for {b}");
                        }
                    }
                }
                assert!(nmse(&rounded, &original) < 5e-4);
            }
        }
    }

    #[test]
    fn values_of_any_size_and_ties() {
        // Halves of a step go to the even code.
        let ties = [127.0, 0.5, 1.5, -2.5, -127.0, 126.5];
        let tensor = Int8Tensor::round("w", &dense(&ties, (1, 6), FloatKind::F32)).unwrap();
        assert_eq!(decoded(tensor), [127.0, 0.0, 2.0, -2.0, -127.0, 126.0]);
        for size in [3e38, 1e-36, 3e-37, f32::MIN_POSITIVE, 0.0] {
            let values = [size, -size, size / 2.0];
            let tensor = Int8Tensor::round("w", &dense(&values, (1, 3), FloatKind::F32)).unwrap();
            for (a, b) in decoded(tensor).into_iter().zip(values) {
                assert!((a - b).abs() <= (size / 253.0).max(4e-37), "{a} for {b}");
            }
        }
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_named() {
        for (bad, kind) in [(f32::NAN, FloatKind::BF16), (f32::NEG_INFINITY, FloatKind::F16)] {
            let mut values = noise(70 * 130, 1);
            values[30 * 130 + 129] = bad;
            values[60 * 130] = bad;
            let error = Int8Tensor::round("lm_head.weight", &dense(&values, (70, 130), kind)).unwrap_err();
            match error {
                Error::NonFinite {
                    name, index, value, ..
                } => {
                    assert_eq!((&*name, index), ("lm_head.weight", 30 * 130 + 129));
                    assert!(!value.is_finite());
                }
                other => panic!("{other}"),
            }
        }
    }
}
