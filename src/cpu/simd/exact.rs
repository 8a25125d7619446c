//! Weights of any kind times f32 activations.
//!
//! However many rows of activations there are, a product is summed alike: elements of K whose place is the same modulo two
//! registers, one after the other; then these sums, lane by lane; then what does not fill two registers. A row gives the
//! same bits alone and among many.

use super::decode::{decode_row, int8_span, span_scale};
use super::product::{Rows, aligned, gather, passes};
use super::{DISTANCE, Scratch, Selection, Simd, TILE, scales, sized};
use crate::fp4::{FloatKind, Weight};
use std::ops::Range;

/// Rows of activations that [`few`] takes: two registers of sums each.
const ROWS: usize = 3;

/// From this many rows of activations on, decoding rows of weights to memory pays.
const MANY: usize = 6;

/// Rows of activations that meet the same weights before the next ones' turn: the second-level cache holds them beside a
/// tile of weights.
const CHUNK: usize = 48;

/// `out[i, r] = Σ_k x[i, k] · w[rows.start + r, k]` in f32 for up to 64 rows of weights of any kind; `x` has rows
/// of K, a row of `out` is 64 long.
#[inline(always)]
pub(super) unsafe fn exact<S: Simd, const NR: usize, const MR: usize>(
    weight: &Weight,
    rows: Range<usize>,
    x: &[f32],
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let m = selection.len();
    let in_registers = match weight {
        Weight::Fp4(_) | Weight::Int8(_) => true,
        // The others are rare among large weights: not worth loops of their own.
        Weight::Dense(tensor) => tensor.kind() == FloatKind::BF16,
        // Candle's block types decode a row.
        Weight::Blocks(_) => false,
    };
    if in_registers && m < MANY {
        passes!(m, ROWS, |first, R| {
            let (out, selection) = (&mut out[first * TILE..], selection.part(first..first + R));
            // SAFETY: the instructions are the caller's promise.
            unsafe { few::<S, R>(weight, rows.clone(), x, selection, out, scratch) }
        });
    } else {
        // SAFETY: the instructions are the caller's promise.
        unsafe { many::<S, NR, MR>(weight, rows, x, selection, out, scratch) }
    }
}

/// Rows of weights decoded to memory, `NR` of them at a time with rows of activations.
#[inline(always)]
unsafe fn many<S: Simd, const NR: usize, const MR: usize>(
    weight: &Weight,
    rows: Range<usize>,
    x: &[f32],
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (k, m, count) = (weight.shape().1, selection.len(), rows.len());
    let decoded = aligned(&mut scratch.packed, count * k);
    for (n, row) in rows.zip(decoded.chunks_exact_mut(k)) {
        // SAFETY: the instructions are the caller's promise.
        unsafe { decode_row::<S>(weight, n, 0, row, &mut scratch.floats) };
    }
    let x = gather(x, k, selection, &mut scratch.gathered);
    // Two registers of sums for each product of two rows.
    let most = MR.div_ceil(2);
    for start in (0..m).step_by(CHUNK) {
        let chunk = (m - start).min(CHUNK);
        for first in (0..count).step_by(NR) {
            let mut weights = [decoded[first * k..].as_ptr(); NR];
            let there = (count - first).min(NR);
            for v in 1..there {
                weights[v] = decoded[(first + v) * k..].as_ptr();
            }
            passes!(chunk, most, |row, R| {
                let x = Rows::of(&x[(start + row) * k..][..R * k], k);
                // SAFETY: the instructions are the caller's promise; all rows are `k` long.
                let sums = unsafe { dots::<S, NR, R>(weights, x, k) };
                for i in 0..R {
                    let out = &mut out[(start + row + i) * TILE + first..];
                    out[..there].copy_from_slice(&sums[i][..there]);
                }
            });
        }
    }
}

/// `MR` rows of activations with `NR` rows of weights, both `k` long.
///
/// # Safety
/// They are.
#[inline(always)]
unsafe fn dots<S: Simd, const NR: usize, const MR: usize>(
    weights: [*const f32; NR],
    x: Rows,
    k: usize,
) -> [[f32; NR]; MR] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[[S::splat(0.0); 2]; NR]; MR];
        let whole = k - k % (2 * S::LANES);
        for start in (0..whole).step_by(2 * S::LANES) {
            for half in 0..2 {
                let at = start + half * S::LANES;
                let mut w = [S::splat(0.0); NR];
                for v in 0..NR {
                    w[v] = S::load(weights[v].add(at));
                }
                for i in 0..MR {
                    let x = S::load(x.start.add(i * x.stride + at));
                    for v in 0..NR {
                        sums[i][v][half] = S::fma(w[v], x, sums[i][v][half]);
                    }
                }
            }
        }
        let mut all = [[0f32; NR]; MR];
        for i in 0..MR {
            let mut both = [S::splat(0.0); NR];
            for v in 0..NR {
                both[v] = S::add(sums[i][v][0], sums[i][v][1]);
            }
            all[i] = S::sums(both);
            if whole < k {
                for v in 0..NR {
                    let w = std::slice::from_raw_parts(weights[v].add(whole), k - whole);
                    let x = std::slice::from_raw_parts(x.start.add(i * x.stride + whole), k - whole);
                    all[i][v] += rest(w, x);
                }
            }
        }
        all
    }
}

/// The sum of what does not fill two registers.
#[inline(always)]
fn rest(w: &[f32], x: &[f32]) -> f32 {
    w.iter().zip(x).map(|(w, x)| w * x).sum()
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
    // Even and odd elements apart, as decoding gives the weights'; what does not fill two registers stays behind.
    let whole = k / span;
    let split = sized(&mut scratch.gathered, M * k);
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
    let split = &scratch.gathered[..M * k];
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
            Weight::Blocks(_) => unreachable!("decoded to memory"),
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
        let mut end = [0f32; 32];
        let end = &mut end[..k - whole * span];
        if !end.is_empty() {
            weight.decode_row_part(n, whole * span, end);
        }
        for i in 0..M {
            let mut turns = [0f32; 32];
            // SAFETY: the instructions are the caller's promise; there is room for two registers.
            let sum = unsafe {
                S::store_interleaved(turns.as_mut_ptr(), sums[i][0], sums[i][1]);
                let (low, high) = (S::load(turns.as_ptr()), S::load(turns.as_ptr().add(S::LANES)));
                S::sum(S::add(low, high))
            };
            out[i * TILE + r] = sum;
            if !end.is_empty() {
                out[i * TILE + r] += rest(end, &split[i * k + whole * span..(i + 1) * k]);
            }
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
