//! Weights of any kind to f32: what exact products and the transposed ones are made of.

use super::{Simd, scales, sized};
use crate::fp4::{FloatKind, INT8_BLOCK, Int8Tensor, Weight};

/// Writes the elements `start..start + row.len()` of row `n`, whole groups, in f32.
#[inline(always)]
pub(super) unsafe fn decode_row<S: Simd>(
    weight: &Weight,
    n: usize,
    start: usize,
    row: &mut [f32],
    scales: &mut Vec<f32>,
) {
    let (k, span) = (weight.shape().1, 2 * S::LANES);
    let whole = row.len() / span;
    match weight {
        Weight::Fp4(tensor) => {
            let (group, log_group) = (tensor.group(), tensor.group().ilog2());
            let codes = &tensor.codes()[(n * k + start) / 2..][..row.len() / 2];
            let scales = sized(scales, row.len() / group);
            scales::decode(tensor, (n * k + start) / group, scales);
            for (i, row) in row.chunks_exact_mut(span).enumerate() {
                // SAFETY: the instructions are the caller's promise; codes are sliced, `row` is two
                // registers long.
                unsafe {
                    let scale = span_scale::<S>(scales, log_group, i);
                    let (even, odd) = S::values(codes[i * S::LANES..][..S::LANES].as_ptr());
                    S::store_interleaved(row.as_mut_ptr(), S::mul(even, scale), S::mul(odd, scale));
                }
            }
        }
        Weight::Dense(tensor) if tensor.kind() == FloatKind::BF16 => {
            let bytes = &tensor.bytes()[2 * (n * k + start)..][..2 * row.len()];
            for (bytes, row) in bytes.chunks_exact(2 * span).zip(row.chunks_exact_mut(span)) {
                // SAFETY: the instructions are the caller's promise; `bytes` and `row` are two
                // registers long.
                unsafe {
                    let (even, odd) = S::bf16(bytes.as_ptr());
                    S::store_interleaved(row.as_mut_ptr(), even, odd);
                }
            }
        }
        Weight::Dense(_) | Weight::Blocks(_) => return weight.decode_row_part(n, start, row),
        Weight::Int8(tensor) => {
            for (i, row) in row.chunks_exact_mut(span).enumerate() {
                // SAFETY: the instructions are the caller's promise; `row` is two registers long.
                unsafe {
                    let (even, odd) = int8_span::<S>(tensor, n, start + i * span);
                    S::store_interleaved(row.as_mut_ptr(), even, odd);
                }
            }
        }
    }
    if !row.len().is_multiple_of(span) {
        weight.decode_row_part(n, start + whole * span, &mut row[whole * span..]);
    }
}

/// The even and the odd ones of `2 · LANES` elements of row `n` from `start` on, which is a multiple of that.
#[inline(always)]
pub(super) unsafe fn int8_span<S: Simd>(tensor: &Int8Tensor, n: usize, start: usize) -> (S::Float, S::Float) {
    debug_assert!(start.is_multiple_of(2 * S::LANES));
    let index = n * tensor.blocks() + start / INT8_BLOCK;
    let (even, odd) = tensor.block(index).split_at(INT8_BLOCK / 2);
    let at = start % INT8_BLOCK / 2;
    // SAFETY: the instructions are the caller's promise; a block's half is a whole number of registers.
    unsafe {
        let scale = S::splat(tensor.scale(index));
        (
            S::mul(S::signed(even[at..].as_ptr()), scale),
            S::mul(S::signed(odd[at..].as_ptr()), scale),
        )
    }
}

/// The scales of the `2 · LANES` elements from `index · 2 · LANES` on, those of a register of even or odd ones. Groups are
/// powers of two, given by their logarithm: a division here takes longer than all the rest.
#[inline(always)]
pub(super) unsafe fn span_scale<S: Simd>(scales: &[f32], log_group: u32, index: usize) -> S::Float {
    let span = 2 * S::LANES;
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        if 1 << log_group < span {
            S::splat_halves(scales[2 * index], scales[2 * index + 1])
        } else {
            S::splat(scales[(index * span) >> log_group])
        }
    }
}
