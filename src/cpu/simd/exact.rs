//! Weights of any kind times f32 activations.

use super::across::Across;
use super::decode::{decode_row, int8_span, span_scale};
use super::product::{Columns, Rows, aligned, gather, passes, product, transpose};
use super::{DISTANCE, Order, Scratch, Selection, Simd, TILE, scales, sized};
use crate::fp4::{FloatKind, Weight};
use std::ops::Range;

/// Rows of activations that [`few`] takes: two registers of sums each.
const ROWS: usize = 3;

/// From this many rows of activations on, a matrix product over decoded rows is faster than dot products.
const PRODUCT: usize = 6;

/// Rows of activations that [`Across`] takes: four registers of sums each.
const FEW_ACROSS: usize = 5;

/// `out[i, r] = Σ_k x[i, k] · w[rows.start + r, k]` in f32 for up to 64 rows of weights of any kind; `x` has rows
/// of K, a row of `out` is 64 long.
#[inline(always)]
pub(super) unsafe fn exact<S: Simd, const NR: usize, const MR: usize>(
    weight: &Weight,
    rows: Range<usize>,
    x: &[f32],
    selection: Selection<'_>,
    order: Order,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (k, m, count) = (weight.shape().1, selection.len(), rows.len());
    if m < PRODUCT && order == Order::Fastest {
        passes!(m, ROWS, |first, R| {
            let (out, selection) = (&mut out[first * TILE..], selection.part(first..first + R));
            // SAFETY: the instructions are the caller's promise.
            unsafe { few::<S, R>(weight, rows.clone(), x, selection, out, scratch) }
        });
        return;
    }
    if m < PRODUCT && Across::takes::<S>(weight) {
        let weights = Across::new(weight, rows, &mut scratch.floats, &mut scratch.weights);
        passes!(m, FEW_ACROSS, |first, R| {
            let (out, selection) = (&mut out[first * TILE..], selection.part(first..first + R));
            // SAFETY: the instructions are the caller's promise.
            unsafe { weights.product::<S, R>(x, selection, out) }
        });
        return;
    }
    let packed = aligned(&mut scratch.packed, TILE * k);
    let set = sized(&mut scratch.weights, S::LANES * k);
    let sets = packed
        .chunks_exact_mut(S::LANES * k)
        .take(count.div_ceil(S::LANES));
    for (first, packed) in rows.clone().step_by(S::LANES).zip(sets) {
        for (n, row) in (first..rows.end).zip(set.chunks_exact_mut(k)) {
            // SAFETY: the instructions are the caller's promise.
            unsafe { decode_row::<S>(weight, n, 0, row, &mut scratch.floats) };
        }
        let mut decoded = [&set[..k]; 16];
        for (decoded, row) in decoded.iter_mut().zip(set.chunks_exact(k)) {
            *decoded = row;
        }
        // SAFETY: the instructions are the caller's promise.
        unsafe { transpose::<S>(decoded, packed) };
    }
    let (a, b) = (
        Rows::of(gather(x, k, selection, &mut scratch.gathered), k),
        Columns::packed::<S>(packed, k),
    );
    // Columns beyond the rows there are have room, and nobody reads them.
    let columns = count.next_multiple_of(S::LANES);
    // SAFETY: the instructions are the caller's promise; `a` has `m` rows of K, `b` room for
    // 64 columns of K.
    unsafe { product::<S, NR, MR>(a, b, (m, k, columns), (out, TILE), false) };
}

/// Each row of weights, decoded in registers, with `M` rows of activations.
#[inline(always)]
unsafe fn few<S: Simd, const M: usize>(
    weight: &Weight,
    rows: Range<usize>,
    x: &[f32],
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (k, span) = (weight.shape().1, 2 * S::LANES);
    let by_rows = match weight {
        // Rare among large weights: not worth loops of its own.
        Weight::Dense(tensor) => tensor.kind() != FloatKind::BF16,
        // Candle's block types decode a row.
        Weight::Blocks(_) => true,
        Weight::Fp4(_) | Weight::Int8(_) => false,
    };
    if by_rows {
        let row = sized(&mut scratch.weights, k);
        for (r, n) in rows.enumerate() {
            weight.decode_row_part(n, 0, row);
            for i in 0..M {
                // SAFETY: the instructions are the caller's promise.
                out[i * TILE + r] = unsafe { dot::<S>(row, &x[selection.row(i) * k..][..k]) };
            }
        }
        return;
    }
    // Even and odd elements apart, as decoding gives the weights'; what does not fill two registers stays behind.
    let whole = k / span;
    let split = aligned(&mut scratch.gathered, M * k);
    for i in 0..M {
        let (x, split) = (&x[selection.row(i) * k..][..k], &mut split[i * k..][..k]);
        for (x, split) in x.chunks_exact(span).zip(split.chunks_exact_mut(span)) {
            let (even, odd) = split.split_at_mut(S::LANES);
            for lane in 0..S::LANES {
                (even[lane], odd[lane]) = (x[2 * lane], x[2 * lane + 1]);
            }
        }
        split[whole * span..].copy_from_slice(&x[whole * span..]);
    }
    let split = &*split;
    for (r, n) in rows.enumerate() {
        // SAFETY: the instructions are the caller's promise.
        let mut sums = [[unsafe { S::splat(0.0) }; 2]; M];
        match weight {
            Weight::Fp4(tensor) => {
                let (group, log_group) = (tensor.group(), tensor.group().ilog2());
                let scales = sized(&mut scratch.floats, k / group);
                scales::decode(tensor, n * k / group, scales);
                let codes = &tensor.codes()[n * k / 2..][..k / 2];
                for i in 0..whole {
                    // SAFETY: the instructions are the caller's promise; a row has `whole` registers
                    // of codes.
                    unsafe {
                        S::prefetch(codes.as_ptr().wrapping_add(i * S::LANES + DISTANCE));
                        let scale = span_scale::<S>(scales, log_group, i);
                        let (even, odd) = S::values(codes.as_ptr().add(i * S::LANES));
                        add::<S, M>(
                            &mut sums,
                            S::mul(even, scale),
                            S::mul(odd, scale),
                            &split[i * span..],
                            k,
                        );
                    }
                }
            }
            Weight::Dense(tensor) => {
                let bytes = &tensor.bytes()[2 * n * k..][..2 * k];
                for i in 0..whole {
                    // SAFETY: the instructions are the caller's promise; a row has twice `whole`
                    // registers.
                    unsafe {
                        S::prefetch(bytes.as_ptr().wrapping_add(2 * i * span + DISTANCE));
                        let (even, odd) = S::bf16(bytes.as_ptr().add(2 * i * span));
                        add::<S, M>(&mut sums, even, odd, &split[i * span..], k);
                    }
                }
            }
            Weight::Blocks(_) => unreachable!("decoded by rows above"),
            Weight::Int8(tensor) => {
                for i in 0..whole {
                    // SAFETY: the instructions are the caller's promise.
                    unsafe {
                        let (even, odd) = int8_span::<S>(tensor, n, i * span);
                        add::<S, M>(&mut sums, even, odd, &split[i * span..], k);
                    }
                }
            }
        }
        let mut rest = [0f32; 32];
        let rest = &mut rest[..k - whole * span];
        if !rest.is_empty() {
            weight.decode_row_part(n, whole * span, rest);
        }
        for i in 0..M {
            let x = &split[i * k + whole * span..(i + 1) * k];
            let rest: f32 = rest.iter().zip(x).map(|(w, x)| w * x).sum();
            // SAFETY: the instructions are the caller's promise.
            out[i * TILE + r] = unsafe { S::sum(S::add(sums[i][0], sums[i][1])) } + rest;
        }
    }
}

/// Adds the products of two registers of weights with the split activations at the same place in each row of `k`.
#[inline(always)]
unsafe fn add<S: Simd, const M: usize>(
    sums: &mut [[S::Float; 2]; M],
    even: S::Float,
    odd: S::Float,
    x: &[f32],
    k: usize,
) {
    assert!(x.len() >= (M - 1) * k + 2 * S::LANES);
    for i in 0..M {
        // SAFETY: the instructions are the caller's promise; `x` reaches two registers
        // beyond the start of its last row, as asserted.
        unsafe {
            let x = x.as_ptr().add(i * k);
            sums[i][0] = S::fma(even, S::load(x), sums[i][0]);
            sums[i][1] = S::fma(odd, S::load(x.add(S::LANES)), sums[i][1]);
        }
    }
}

/// The sum of `a[k] · b[k]`, in four registers of partial sums.
#[inline(always)]
unsafe fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let step = 4 * S::LANES;
    let whole = a.len() - a.len() % step;
    // SAFETY: the instructions are the caller's promise; four registers begin at each of the starts.
    unsafe {
        let mut sums = [S::splat(0.0); 4];
        for start in (0..whole).step_by(step) {
            for (i, sum) in sums.iter_mut().enumerate() {
                let at = start + i * S::LANES;
                *sum = S::fma(S::load(a.as_ptr().add(at)), S::load(b.as_ptr().add(at)), *sum);
            }
        }
        let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
        S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]))) + rest
    }
}
