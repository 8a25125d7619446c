//! The inner loops of attention over a paged cache, in f32, once for all instruction sets.
//!
//! A chunk's tokens are decoded once for all rows. [`avx512bf16`](super::avx512bf16) has loops of its own for what is
//! done to a chunk.

use super::elementwise::exp;
use super::product::{Columns, Rows, aligned, passes, product};
use super::{Scratch, Simd};
use crate::cpu::paged::{CHUNK, Chunk, out_stride};
use crate::fp4::code;
use crate::kv::Encoding;
use std::ops::Range;

/// The loops of an instruction set; all `unsafe` because the processor must have the instructions.
#[derive(Debug)]
pub(in crate::cpu) struct PagedKernels {
    /// Elements of f32 that a prepared query takes, by its width.
    pub query_stride: fn(usize) -> usize,
    /// Makes of a query, scaled, what `chunk` reads: all of the second slice, `query_stride` long.
    pub prepare: unsafe fn(&[f32], &mut [f32]),
    /// The rows of a chunk; see [`chunk`].
    pub chunk: unsafe fn(&Chunk<'_>, &mut [f32], &mut [[f32; 2]], &mut Scratch),
    /// See [`fold`].
    #[expect(clippy::type_complexity, reason = "used once")]
    pub fold: unsafe fn(&mut [f32], &mut [f32; 2], &[f32], [f32; 2]),
    /// Decodes a vector of a token: codes, scales, numbers. See [`decode`].
    pub decode: unsafe fn(Encoding, &[u8], &[u8], &mut [f32]),
    /// The products that `chunk` is made of, for the sake of it; see [`limits`](super::limits).
    pub products: unsafe fn(rounds: u32) -> u64,
}

/// Elements that a query of so many takes in f32: whole registers of any instruction set.
pub(super) fn query_stride(width: usize) -> usize {
    width.next_multiple_of(16)
}

/// A query as it is, filled up with zeros.
#[inline(always)]
pub(super) fn prepare(query: &[f32], to: &mut [f32]) {
    let (place, rest) = to.split_at_mut(query.len());
    place.copy_from_slice(query);
    rest.fill(0.0);
}

/// A chunk's part of the rows' outputs, not divided by the sum of the weights yet, and of each row the largest score and
/// the sum of the weights, which are relative to that score. A row that sees no token of the chunk has minus infinity and 0, and an
/// output that says nothing.
#[inline(always)]
pub(super) unsafe fn chunk<S: Simd, const NR: usize, const MR: usize>(
    chunk: &Chunk<'_>,
    out: &mut [f32],
    totals: &mut [[f32; 2]],
    scratch: &mut Scratch,
) {
    let (rows, seen) = (chunk.rows(), chunk.seen());
    let (width, value) = (chunk.key_width(), chunk.value_width());
    let out_stride = out_stride(value);
    assert!(totals.len() == rows && out.len() == rows * out_stride && !seen.is_empty());
    let count = seen.len();
    // Values may be the first of the keys' numbers, and are read in whole registers.
    let stride = width.next_multiple_of(32);
    let value_stride = if chunk.values.is_some() { out_stride } else { 0 };
    let tile = aligned(&mut scratch.weights, count * (stride + value_stride));
    let (keys, values) = tile.split_at_mut(count * stride);
    for (t, key) in seen.clone().zip(keys.chunks_exact_mut(stride)) {
        let mut rest = key;
        for vector in chunk.keys() {
            let (numbers, tail) = rest.split_at_mut(vector.part.width);
            let (codes, scales) = chunk.vector(vector, t);
            // SAFETY: the instructions are the caller's promise.
            unsafe { decode::<S>(vector.part.encoding, codes, scales, numbers) };
            rest = tail;
        }
        rest.fill(0.0);
    }
    let (values, value_stride) = match chunk.values {
        None => (&*keys, stride),
        Some(vector) => {
            for (t, value) in seen.clone().zip(values.chunks_exact_mut(value_stride)) {
                let (numbers, rest) = value.split_at_mut(vector.part.width);
                let (codes, scales) = chunk.vector(&vector, t);
                // SAFETY: as above.
                unsafe { decode::<S>(vector.part.encoding, codes, scales, numbers) };
                rest.fill(0.0);
            }
            (&*values, value_stride)
        }
    };

    let scores = aligned(&mut scratch.tile, rows * CHUNK);
    for first in (0..count).step_by(NR) {
        let mut some = [keys.as_ptr(); NR];
        for v in 0..NR {
            some[v] = keys[(first + v).min(count - 1) * stride..][..stride].as_ptr();
        }
        let (place, wanted) = (seen.start + first, (count - first).min(NR));
        // SAFETY: the instructions are the caller's promise; queries and keys are whole registers.
        passes!(rows, MR, |row, R| unsafe {
            let queries = Rows::of(
                &chunk.queries[row * chunk.stride..][..R * chunk.stride],
                chunk.stride,
            );
            let scores = &mut scores[row * CHUNK + place..];
            dots::<S, NR, R>(queries, some, query_stride(width), scores, wanted);
        });
    }
    for (row, scores) in scores.as_chunks_mut::<CHUNK>().0.iter_mut().enumerate() {
        let largest = weights(scores, chunk.visible(row));
        totals[row] = [largest, lanes(scores, 0.0, |a, b| a + b)];
    }
    chunk.runs(|rows, visible| {
        let first = visible.start - seen.start;
        // SAFETY: the instructions are the caller's promise; weights and values of the tokens seen are there, the latter
        // to whole registers.
        unsafe {
            let a = Rows::of(&scores[rows.start * CHUNK..], CHUNK).skip(0, visible.start);
            let b = Columns::rows::<S>(&values[first * value_stride..], value_stride);
            let shape = (rows.len(), visible.len(), out_stride);
            let out = &mut out[rows.start * out_stride..rows.end * out_stride];
            product::<S, NR, MR>(a, b, shape, (out, out_stride), false);
        }
    });
}

/// `MR` queries with `NR` keys, of which the first `count` are wanted.
///
/// # Safety
/// `queries` has `MR` rows, and these and the keys have `width` elements, a multiple of 16.
#[inline(always)]
unsafe fn dots<S: Simd, const NR: usize, const MR: usize>(
    queries: Rows,
    keys: [*const f32; NR],
    width: usize,
    scores: &mut [f32],
    count: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::splat(0.0); NR]; MR];
        for k in (0..width).step_by(S::LANES) {
            let mut b = [S::splat(0.0); NR];
            for v in 0..NR {
                b[v] = S::load(keys[v].add(k));
            }
            for i in 0..MR {
                let a = S::load(queries.start.add(i * queries.stride + k));
                for v in 0..NR {
                    sums[i][v] = S::fma(a, b[v], sums[i][v]);
                }
            }
        }
        for i in 0..MR {
            for v in 0..count {
                scores[i * CHUNK + v] = S::sum(sums[i][v]);
            }
        }
    }
}

/// Turns the scores of a row into the softmax's numerators, zero for what is not visible, and gives the largest score.
#[inline(always)]
fn weights(scores: &mut [f32; CHUNK], visible: Range<usize>) -> f32 {
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    let largest = lanes(scores, f32::NEG_INFINITY, larger);
    scores.iter_mut().for_each(|score| *score = exp(*score - largest));
    // `exp` gives a tiny number, not zero, for what is hidden.
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    largest
}

/// Adds a later chunk's part of a row to what the chunks before gave, both brought to the larger one of their scores.
///
/// Chunks are folded in the order of their positions, so that who computed which of them changes no bit.
#[inline(always)]
pub(super) fn fold(out: &mut [f32], total: &mut [f32; 2], part: &[f32], part_total: [f32; 2]) {
    // Nothing was visible, here or before. NaN is neither.
    if part_total == [f32::NEG_INFINITY, 0.0] {
        return;
    }
    if *total == [f32::NEG_INFINITY, 0.0] {
        out.copy_from_slice(part);
        *total = part_total;
        return;
    }
    let largest = larger(part_total[0], total[0]);
    let (before, now) = (exp(total[0] - largest), exp(part_total[0] - largest));
    for (out, part) in out.iter_mut().zip(part) {
        *out = *out * before + *part * now;
    }
    *total = [largest, total[1] * before + part_total[1] * now];
}

/// The larger one; what is NaN on the left is passed over, and shows in the sum.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Folds a row in sixteen lanes, in an order that a compiler turns into vector instructions.
#[inline(always)]
fn lanes(row: &[f32; CHUNK], start: f32, fold: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; 16];
    for part in row.as_chunks::<16>().0 {
        for (lane, value) in lanes.iter_mut().zip(part) {
            *lane = fold(*value, *lane);
        }
    }
    lanes.into_iter().fold(start, |all, lane| fold(lane, all))
}

/// Decodes a vector, bit for bit as [`kv::codec`](crate::kv::codec) does.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd>(encoding: Encoding, codes: &[u8], scales: &[u8], numbers: &mut [f32]) {
    match encoding {
        Encoding::F16 => {
            for (number, bytes) in numbers.iter_mut().zip(codes.as_chunks().0) {
                *number = f16(u16::from_le_bytes(*bytes));
            }
        }
        Encoding::BF16 => {
            for (number, bytes) in numbers.iter_mut().zip(codes.as_chunks().0) {
                *number = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Encoding::Fp8 => {
            let groups = numbers.chunks_mut(FP8_GROUP).zip(codes.chunks(FP8_GROUP));
            for ((numbers, codes), scale) in groups.zip(scales.as_chunks().0) {
                let scale = f32::from_le_bytes(*scale);
                for (number, code) in numbers.iter_mut().zip(codes) {
                    *number = e4m3(*code) * scale;
                }
            }
        }
        // SAFETY: the caller's promise.
        Encoding::Fp4 { group } => unsafe { decode_fp4::<S>(group, codes, scales, numbers) },
    }
}

/// Elements of FP8 that share a scale.
pub(super) const FP8_GROUP: usize = 128;

/// An IEEE half, by arithmetic that a compiler turns into vector instructions.
#[inline(always)]
fn f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // A half's exponent counts from another zero; so do its subnormal numbers.
    let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let value = match magnitude >= 0x1f << 23 {
        true => 0x7f80_0000 | magnitude,
        false => finite.to_bits(),
    };
    f32::from_bits(value | u32::from(bits & 0x8000) << 16)
}

/// An E4M3, likewise.
#[inline(always)]
pub(super) fn e4m3(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f) << 20;
    let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 120) << 23);
    let value = match code & 0x7f == 0x7f {
        true => 0x7fc0_0000,
        false => finite.to_bits(),
    };
    f32::from_bits(value | u32::from(code & 0x80) << 24)
}

/// Scales that are decoded at a time.
const SCALES: usize = 32;

#[inline(always)]
unsafe fn decode_fp4<S: Simd>(group: usize, codes: &[u8], scales: &[u8], numbers: &mut [f32]) {
    let parts = numbers
        .chunks_mut(SCALES * group)
        .zip(codes.chunks(SCALES * group / 2));
    for ((numbers, codes), scales) in parts.zip(scales.chunks(SCALES)) {
        // As many more are there as `spread` may read.
        let mut decoded = [0f32; SCALES + 8];
        for (decoded, scale) in decoded.iter_mut().zip(scales) {
            *decoded = f16(u16::from(*scale) << 7);
        }
        let whole = codes.len() / S::LANES * S::LANES;
        for (step, codes) in codes[..whole].chunks_exact(S::LANES).enumerate() {
            let first = step * 2 * S::LANES;
            let numbers = &mut numbers[first..][..2 * S::LANES];
            // SAFETY: the instructions are the caller's promise; a register of codes is there, two of numbers, and eight
            // scales from the first one's on.
            unsafe {
                let scale = decoded.as_ptr().add(first / group);
                // Of sixteen lanes two groups may have a share each.
                let scale = match S::LANES == 16 && group == 16 {
                    true => S::spread::<8>(scale),
                    false => S::splat(*scale),
                };
                let (even, odd) = S::values(codes.as_ptr());
                S::store_interleaved(numbers.as_mut_ptr(), S::mul(even, scale), S::mul(odd, scale));
            }
        }
        for (pair, codes) in (whole..).zip(&codes[whole..]) {
            let scale = decoded[2 * pair / group];
            numbers[2 * pair] = code::VALUES[usize::from(codes & 15)] * scale;
            numbers[2 * pair + 1] = code::VALUES[usize::from(codes >> 4)] * scale;
        }
    }
}
