//! The transposed product, whose sums run over output features: `kv_b`'s first half, absorbed into the query.

use super::decode::{decode_row, span_scale};
use super::product::{Columns, Rows, gather, product};
use super::{DISTANCE, Scratch, Selection, Simd, scales, sized};
use crate::fp4::{Fp4Tensor, Weight};
use std::ops::Range;

/// Columns that a tile of a transposed product has at most: a multiple of every group.
pub(in crate::cpu) const COLUMNS: usize = 512;

/// `out[i, c] = Σ_r x[i, r] · w[rows.start + r, columns.start + c]`: the sum runs over output features. `columns` are
/// whole groups, 512 at most; `x` has rows of `rows.len()`, a row of `out` is `columns.len()` long.
#[inline(always)]
pub(super) unsafe fn columns<S: Simd, const NR: usize, const MR: usize>(
    weight: &Weight,
    rows: Range<usize>,
    columns: Range<usize>,
    x: &[f32],
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (count, width, m) = (rows.len(), columns.len(), selection.len());
    match weight {
        Weight::Fp4(tensor) if m == 1 && width.is_multiple_of(8 * S::LANES) => {
            let x = &x[selection.row(0) * count..][..count];
            // SAFETY: the instructions are the caller's promise.
            unsafe { one_transposed::<S>(tensor, rows.start, columns.start, x, &mut out[..width], scratch) }
        }
        _ => {
            let decoded = sized(&mut scratch.weights, count * width);
            for (n, row) in rows.zip(decoded.chunks_exact_mut(width)) {
                // SAFETY: the instructions are the caller's promise.
                unsafe { decode_row::<S>(weight, n, columns.start, row, &mut scratch.floats) };
            }
            let x = gather(x, count, selection, &mut scratch.gathered);
            let (a, b) = (Rows::of(x, count), Columns::rows::<S>(decoded, width));
            // SAFETY: the instructions are the caller's promise; `a` has `m` rows of `count`, `b` `count` rows of
            // `width`.
            unsafe { product::<S, NR, MR>(a, b, (m, count, width), (out, width), false) };
        }
    }
}

/// Rows of weights that are added to one set of columns before the next set's turn: what a line of the cache brings
/// is used while it is there.
const TOGETHER: usize = 16;

/// `out[c] = Σ_r x[r] · w[first + r, start + c]` for FP4 weights and whole sets of eight registers: the sums of [`product`]
/// over decoded rows, bit for bit.
#[inline(always)]
unsafe fn one_transposed<S: Simd>(
    tensor: &Fp4Tensor,
    first: usize,
    start: usize,
    x: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (k, group, width) = (tensor.shape().1, tensor.group(), out.len());
    let (log_group, all_codes): (_, &[u8]) = (group.ilog2(), tensor.codes());
    let (groups, span) = (width / group, 2 * S::LANES);
    let set = 4 * span;
    // A register of even columns and one of odd ones in turn.
    let sums = sized(&mut scratch.weights, width);
    sums.fill(0.0);
    let scales = sized(&mut scratch.floats, TOGETHER * groups);
    for (index, x) in x.chunks(TOGETHER).enumerate() {
        let first = first + index * TOGETHER;
        let scales = &mut scales[..x.len() * groups];
        if width == k {
            // One after the other, as whole rows lie.
            scales::decode(tensor, first * groups, scales);
        } else {
            for (r, scales) in scales.chunks_exact_mut(groups).enumerate() {
                scales::decode(tensor, ((first + r) * k + start) / group, scales);
            }
        }
        for column in (0..width).step_by(set) {
            // SAFETY: the instructions are the caller's promise; `sums` has `width` elements, a
            // multiple of `set`; codes and scales are sliced.
            unsafe {
                let place = sums.as_mut_ptr().add(column);
                let mut sums = [S::splat(0.0); 8];
                for i in 0..8 {
                    sums[i] = S::load(place.add(i * S::LANES));
                }
                for r in 0..x.len() {
                    let codes = &all_codes[((first + r) * k + start + column) / 2..][..set / 2];
                    S::prefetch(codes.as_ptr().wrapping_add(DISTANCE));
                    let (scales, x) = (&scales[r * groups..][..groups], S::splat(x[r]));
                    for i in 0..4 {
                        let scale = span_scale::<S>(scales, log_group, column / span + i);
                        let (even, odd) = S::values(codes.as_ptr().add(i * S::LANES));
                        sums[2 * i] = S::fma(x, S::mul(even, scale), sums[2 * i]);
                        sums[2 * i + 1] = S::fma(x, S::mul(odd, scale), sums[2 * i + 1]);
                    }
                }
                for i in 0..8 {
                    S::store(place.add(i * S::LANES), sums[i]);
                }
            }
        }
    }
    for (sums, out) in sums.chunks_exact(span).zip(out.chunks_exact_mut(span)) {
        // SAFETY: the instructions are the caller's promise; both slices are two registers long.
        unsafe {
            let (even, odd) = (S::load(sums.as_ptr()), S::load(sums.as_ptr().add(S::LANES)));
            S::store_interleaved(out.as_mut_ptr(), even, odd);
        }
    }
}
