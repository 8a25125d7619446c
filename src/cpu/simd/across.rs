//! Weights times a few f32 rows, across the rows of weights: a lane is a row, and its sum runs along the row, as that of a
//! product over decoded rows does. Words of codes are transposed instead of numbers.

use super::{Fp4Rows, Selection, Simd, TILE, scales};
use crate::fp4::{FloatKind, Weight};
use std::ops::Range;

/// Registers of rows that a tile has.
const SETS: usize = 4;
/// Bytes of a row that are transposed at a time.
const LINE: usize = 64;
/// How many of these ahead the next ones are asked for: 64 rows are more streams than a processor follows by itself.
const AHEAD: usize = 3;

/// A line's words, those of a set's rows together.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Words([u8; 16 * LINE]);

/// Up to 64 rows of weights.
pub(super) struct Across<'a> {
    k: usize,
    bytes: &'a [u8],
    row_bytes: usize,
    /// Of FP4, the size of a group and [the scales by row](scales::by_row).
    scales: Option<(usize, &'a [f32])>,
}

impl<'a> Across<'a> {
    /// Whether it is for such weights: FP4, and BF16 in whole words.
    pub fn takes<S: Simd>(weight: &Weight) -> bool {
        S::HAS_NEXT
            && match weight {
                Weight::Fp4(_) => true,
                Weight::Dense(tensor) => {
                    tensor.kind() == FloatKind::BF16 && tensor.shape().1.is_multiple_of(2)
                }
                Weight::Int8(_) | Weight::Blocks(_) => false,
            }
    }

    /// These rows of a weight that it [takes](Self::takes).
    #[inline(always)]
    pub fn new(
        weight: &'a Weight,
        rows: Range<usize>,
        decoded: &mut Vec<f32>,
        by_row: &'a mut Vec<f32>,
    ) -> Self {
        let k = weight.shape().1;
        let (bytes, row_bytes, scales) = match weight {
            Weight::Fp4(tensor) => {
                let weights = Fp4Rows {
                    tensor,
                    first: rows.start,
                    rows: rows.len(),
                };
                let scales = scales::by_row(weights, decoded, by_row);
                (tensor.codes(), k / 2, Some((tensor.group(), scales)))
            }
            Weight::Dense(tensor) => (tensor.bytes(), 2 * k, None),
            Weight::Int8(_) | Weight::Blocks(_) => unreachable!("not taken"),
        };
        let bytes = &bytes[rows.start * row_bytes..rows.end * row_bytes];
        Self {
            k,
            bytes,
            row_bytes,
            scales,
        }
    }

    /// `out[i, r] = Σ_k x[i, k] · w[r, k]` for `M` selected rows of `x`; a row of `out` is 64 long.
    #[inline(always)]
    pub unsafe fn product<S: Simd, const M: usize>(
        &self,
        x: &[f32],
        selection: Selection<'_>,
        out: &mut [f32],
    ) {
        // SAFETY: the instructions are the caller's promise.
        unsafe {
            match self.scales {
                Some(_) => self.sums::<S, M, 8>(x, selection, out),
                None => self.sums::<S, M, 2>(x, selection, out),
            }
        }
    }

    /// As [`product`](Self::product), of words of `PER_WORD` elements.
    #[inline(always)]
    unsafe fn sums<S: Simd, const M: usize, const PER_WORD: usize>(
        &self,
        x: &[f32],
        selection: Selection<'_>,
        out: &mut [f32],
    ) {
        assert!(S::LANES * SETS == TILE && out.len() >= M * TILE);
        let mut rows = [&x[..0]; M];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &x[selection.row(i) * self.k..][..self.k];
        }
        let sets = (self.bytes.len() / self.row_bytes).div_ceil(S::LANES);
        // Only a row's last line may be shorter.
        let mut padded = [[0; LINE]; 16];
        let mut words = [Words([0; 16 * LINE]); SETS];
        // SAFETY: the instructions are the caller's promise.
        let mut sums = [[unsafe { S::splat(0.0) }; SETS]; M];
        for start in (0..self.row_bytes).step_by(LINE) {
            let there = (self.row_bytes - start).min(LINE);
            for (set, words) in words.iter_mut().enumerate().take(sets) {
                let mut pointers = [padded[0].as_ptr(); 16];
                let set = self.bytes.chunks_exact(self.row_bytes).skip(set * S::LANES);
                for ((row, pointer), padded) in set.zip(&mut pointers).zip(&mut padded) {
                    *pointer = match there {
                        LINE => row[start..][..LINE].as_ptr(),
                        _ => {
                            padded[..there].copy_from_slice(&row[start..]);
                            padded.as_ptr()
                        }
                    };
                    if let Some(ahead) = row.get(start + AHEAD * LINE) {
                        // SAFETY: the instructions are the caller's promise.
                        unsafe { S::prefetch(ahead) };
                    }
                }
                // SAFETY: the instructions are the caller's promise; each pointer names 64 bytes, `words` is as long as 16
                // of them.
                unsafe { S::transpose(&pointers[..S::LANES], words.0.as_mut_ptr()) };
            }
            for word in 0..there / 4 {
                let at = (start / 4 + word) * PER_WORD;
                let mut x = [[0.0; PER_WORD]; M];
                for (x, row) in x.iter_mut().zip(rows) {
                    x.copy_from_slice(&row[at..at + PER_WORD]);
                }
                // SAFETY: the instructions are the caller's promise; there are 16 words and as many scales of each set.
                unsafe {
                    let mut scale = [S::splat(1.0); SETS];
                    let mut left = [S::splat_int(0); SETS];
                    for v in 0..SETS {
                        if let Some((group, scales)) = self.scales {
                            let scales = &scales[at / group * TILE..][..TILE];
                            scale[v] = S::load(scales.as_ptr().add(v * S::LANES));
                        }
                        left[v] = S::load_int(words[v].0.as_ptr().add(word * 4 * S::LANES).cast());
                    }
                    for j in 0..PER_WORD {
                        let mut row = [S::splat(0.0); SETS];
                        for v in 0..SETS {
                            if PER_WORD == 8 {
                                (row[v], left[v]) = S::next_values(left[v]);
                                row[v] = S::mul(row[v], scale[v]);
                            } else {
                                (row[v], left[v]) = S::next_bf16(left[v]);
                            }
                        }
                        for i in 0..M {
                            let x = S::splat(x[i][j]);
                            for v in 0..SETS {
                                sums[i][v] = S::fma(x, row[v], sums[i][v]);
                            }
                        }
                    }
                }
            }
        }
        for (out, sums) in out.chunks_exact_mut(TILE).zip(sums) {
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: the instructions are the caller's promise; a row of `out` has as many places.
                unsafe { S::store(out[v * S::LANES..][..S::LANES].as_mut_ptr(), sum) };
            }
        }
    }
}
