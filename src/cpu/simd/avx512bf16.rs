//! AVX-512 with BF16 products: AMD from Zen 4, Intel from Sapphire Rapids. Attention over a paged cache
//! has loops of its own here; all else is [`avx512`]'s.
//!
//! A product adds to each lane two products of neighbours. For scores neighbours are two elements of a key, as they lie:
//! keys that are stored in BF16 are read where they are, others are decoded to BF16 once a chunk. For outputs they are two
//! tokens, at positions 2i and 2i + 1: rows of values are interleaved on their way into registers. Products flush numbers
//! below 2^-126 to zero.

use super::paged::{FP8_GROUP, PagedKernels, e4m3};
use super::product::aligned;
use super::{Kernels, Scratch, avx512};
use crate::cpu::paged::{CHUNK, Chunk, Lines, Vector, out_stride};
use crate::fp4::code;
use crate::kv::Encoding;
use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

pub(super) fn available() -> bool {
    avx512::available() && is_x86_feature_detected!("avx512bf16")
}

pub(super) static KERNELS: Kernels = Kernels {
    paged: PagedKernels {
        query_stride,
        prepare,
        chunk,
        products,
        ..avx512::TABLE.paged
    },
    ..avx512::TABLE
};

/// Numbers in a register of BF16.
const LANES: usize = 32;
/// Keys that queries meet at a time: two in a register.
const KEYS: usize = 8;
/// Rows that are so few that a pass takes all.
const FEW: usize = 6;
/// Rows whose queries stay in the first-level cache while a chunk's keys pass by.
const BLOCK: usize = 24;

/// Calls `$work` for passes of `$R` rows, from 1 to `$limit`, of nearly equal size.
macro_rules! passes {
    ($rows:expr, $limit:literal: $($count:literal)*, |$first:ident, $R:ident| $work:expr) => {{
        let rows: Range<usize> = $rows;
        let passes = rows.len().div_ceil($limit);
        for pass in 0..passes {
            let $first = rows.start + pass * rows.len() / passes;
            match rows.start + (pass + 1) * rows.len() / passes - $first {
                $($count => {
                    const $R: usize = $count;
                    $work
                })*
                _ => unreachable!("a pass has 1 to {} rows", $limit),
            }
        }
    }};
}

fn query_stride(width: usize) -> usize {
    width.next_multiple_of(LANES) / 2
}

/// Rounds a query, and fills up its last register with zeros.
///
/// # Safety
/// The instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")]
unsafe fn prepare(query: &[f32], to: &mut [f32]) {
    assert_eq!(to.len(), query_stride(query.len()));
    for (query, to) in query.chunks(LANES).zip(to.as_chunks_mut::<16>().0) {
        let mut all = [0f32; LANES];
        all[..query.len()].copy_from_slice(query);
        // SAFETY: the instructions are the caller's promise; both are whole registers.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), round(&all)) };
    }
}

/// Sixteen numbers of each half, rounded to nearest, ties to even.
///
/// # Safety
/// The instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn round(numbers: &[f32; LANES]) -> __m512i {
    // SAFETY: two registers are there; the types have the same bits.
    unsafe {
        let [low, high] = [0, 16].map(|i| _mm512_loadu_ps(numbers.as_ptr().add(i)));
        std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// See [`paged::chunk`](super::paged::chunk).
///
/// # Safety
/// The instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")]
unsafe fn chunk(chunk: &Chunk<'_>, out: &mut [f32], totals: &mut [[f32; 2]], scratch: &mut Scratch) {
    let (rows, seen) = (chunk.rows(), chunk.seen());
    let (width, value) = (chunk.key_width(), chunk.value_width());
    let out_stride = out_stride(value);
    assert!(totals.len() == rows && out.len() == rows * out_stride && !seen.is_empty());
    assert!(chunk.stride == query_stride(width) && chunk.queries.len() == rows * chunk.stride);

    // Tiles of decoded keys and values. A vector is stored in whole registers, which reach into what is written
    // after it, or past the end of the row before that begins.
    let stride = |width: usize| width.next_multiple_of(LANES) + LANES;
    let keys_lie = lie(chunk.keys(), width);
    let values_lie = chunk.values.is_some_and(|vector| lie(&[vector], value));
    let of_keys = if keys_lie { 0 } else { CHUNK * stride(width) };
    let of_values = match chunk.values {
        Some(_) if !values_lie => CHUNK * stride(value),
        _ => 0,
    };
    let tile = aligned(&mut scratch.weights, (of_keys + of_values + stride(value)) / 2);
    let tile: *mut u16 = tile.as_mut_ptr().cast();
    // SAFETY: the tile has room for what was just counted; tokens seen have their vectors.
    let (keys, values, zero) = unsafe {
        let value_tile = tile.add(of_keys);
        let zero = value_tile.add(of_values);
        zero.write_bytes(0, stride(value));
        // What nobody sees is no number of anybody: keys of others stand in, whose scores are not looked at, and zeros
        // for values.
        let mut keys = [std::ptr::null(); CHUNK];
        let mut values = [zero.cast_const(); CHUNK];
        for t in seen.clone() {
            keys[t] = match keys_lie {
                true => chunk.vector(&chunk.keys()[0], t).0.as_ptr().cast(),
                false => tile.add(t * stride(width)).cast_const(),
            };
            values[t] = match chunk.values {
                None => keys[t],
                Some(vector) if values_lie => chunk.vector(&vector, t).0.as_ptr().cast(),
                Some(_) => value_tile.add(t * stride(value)).cast_const(),
            };
        }
        let one = keys[seen.start];
        keys[..seen.start].fill(one);
        keys[seen.end..].fill(one);
        (keys, values, zero.cast_const())
    };

    let scores = aligned(&mut scratch.tile, rows * CHUNK);
    let registers = width.div_ceil(LANES);
    let queries: *const u16 = chunk.queries.as_ptr().cast();
    let blocks = rows.div_ceil(BLOCK);
    let block = |index: usize| index * rows / blocks..(index + 1) * rows / blocks;
    let mut asking = chunk.ahead.asking();
    let sets = seen.end.div_ceil(KEYS) - seen.start / KEYS;
    let passes: usize = (0..blocks).map(|index| block(index).len().div_ceil(6)).sum();
    asking.scores(sets * passes);
    // Decoded keys meet the queries while the first-level cache holds them: those of few rows beside all queries.
    let step = if rows <= BLOCK { 2 * KEYS } else { 8 * KEYS };
    for start in (seen.start / step * step..seen.end).step_by(step) {
        let these = start.max(seen.start)..(start + step).min(seen.end);
        if !keys_lie {
            // SAFETY: the tile has room for these tokens' keys.
            unsafe { decode_keys(chunk, these.clone(), tile, width, stride(width)) };
        }
        for some in (0..blocks).map(block) {
            for first in (these.start / KEYS * KEYS..these.end).step_by(KEYS) {
                if keys_lie && rows <= FEW {
                    ask_for_keys(&keys[first..], registers);
                }
                let some_keys = keys[first..].first_chunk().expect("a chunk is whole eights");
                // SAFETY: the instructions are the caller's promise; queries and keys have `registers` registers, each row
                // of scores eight more.
                passes!(some.clone(), 6: 1 2 3 4 5 6, |row, R| unsafe {
                    let queries = queries.add(row * 2 * chunk.stride);
                    let scores = scores[row * CHUNK + first..].as_mut_ptr();
                    let lines = asking.next(2 * registers, ask);
                    dots::<R>((queries, 2 * chunk.stride), some_keys, registers, scores, lines);
                });
            }
        }
    }

    if let Some(vector) = chunk.values.filter(|_| !values_lie) {
        // SAFETY: the tile has room for the values of a chunk.
        unsafe { decode(chunk, &vector, seen.clone(), tile.add(of_keys), stride(value)) };
    }
    let rounded = aligned(&mut scratch.gathered, rows * CHUNK / 2);
    let scores = scores.as_chunks::<CHUNK>().0.iter();
    for (row, (scores, to)) in scores.zip(rounded.chunks_exact_mut(CHUNK / 2)).enumerate() {
        // SAFETY: the instructions are the caller's promise; `to` has half as many elements of twice the size.
        totals[row] = unsafe { weights(scores, chunk.visible(row), to.as_mut_ptr().cast()) };
    }
    let rounded: *const i32 = rounded.as_ptr().cast();
    let is_wide = |run: &Range<usize>| run.len() <= FEW;
    let mut calls = 0;
    chunk.runs(|run, _| {
        calls += match is_wide(&run) {
            true => out_stride.div_ceil(2 * LANES),
            false => out_stride / LANES * run.len().div_ceil(12),
        };
    });
    asking.outputs(calls);
    chunk.runs(|run, visible| {
        let mut values = values;
        values[..visible.start].fill(zero);
        values[visible.end..].fill(zero);
        let pairs = visible.start / 2..visible.end.div_ceil(2);
        let mut column = 0;
        while column < out_stride {
            let wide = is_wide(&run) && column + 2 * LANES <= out_stride;
            let out = out.as_mut_ptr();
            // SAFETY: the instructions are the caller's promise; there are weights and values of all pairs, values as
            // outputs in whole pairs of registers.
            unsafe {
                if wide {
                    passes!(run.clone(), 6: 1 2 3 4 5 6, |row, R| {
                        let out = out.add(row * out_stride + column);
                        let (weights, lines) = (rounded.add(row * CHUNK / 2), asking.next(pairs.len(), ask));
                        mix::<2, R>(weights, &values, pairs.clone(), column, (out, out_stride), lines);
                    });
                } else {
                    passes!(run.clone(), 12: 1 2 3 4 5 6 7 8 9 10 11 12, |row, R| {
                        let out = out.add(row * out_stride + column);
                        let (weights, lines) = (rounded.add(row * CHUNK / 2), asking.next(pairs.len(), ask));
                        mix::<1, R>(weights, &values, pairs.clone(), column, (out, out_stride), lines);
                    });
                }
            }
            column += if wide { 2 * LANES } else { LANES };
        }
    });
}

/// Whether vectors lie in the pool as products read them: BF16, one after the other, whole registers together.
fn lie(vectors: &[Vector], width: usize) -> bool {
    let first = &vectors[0].part;
    let mut end = first.codes;
    let mut follows = |vector: &Vector| {
        let part = &vector.part;
        let start = std::mem::replace(&mut end, part.codes + part.code_bytes());
        part.encoding == Encoding::BF16 && part.codes == start && part.code_stride == first.code_stride
    };
    width.is_multiple_of(LANES) && vectors.iter().all(&mut follows)
}

/// Asks for a line to be brought into the second-level cache.
#[inline(always)]
fn ask(line: *const u8) {
    // SAFETY: a hint, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
}

/// Asks for the next eight keys, `registers` registers each, to be brought into the first-level cache: few rows' products
/// wait for memory.
#[inline(always)]
fn ask_for_keys(keys: &[*const u16], registers: usize) {
    for key in keys.iter().skip(KEYS).take(KEYS) {
        for register in 0..registers {
            // SAFETY: a hint, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(key.wrapping_add(register * LANES).cast()) };
        }
    }
}

/// Decodes the keys of some tokens into their rows of a tile.
///
/// # Safety
/// The instructions, and room for `stride` elements of each token of the chunk.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
unsafe fn decode_keys(chunk: &Chunk<'_>, tokens: Range<usize>, tile: *mut u16, width: usize, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let last = width / LANES * LANES;
        if last < width {
            // Vectors side by side need not reach as far as their registers do together.
            for t in tokens.clone() {
                tile.add(t * stride + last).write_bytes(0, LANES);
            }
        }
        let mut place = 0;
        for vector in chunk.keys() {
            decode(chunk, vector, tokens.clone(), tile.add(place), stride);
            place += vector.part.width;
        }
    }
}

/// Scores of `R` queries (the first one, elements from one to the next) and eight keys, `registers` registers each; rows of
/// scores are [`CHUNK`] apart. Asks for two lines a register.
///
/// A register takes sixteen elements of two keys, so that half as many are to be summed up in the end.
///
/// # Safety
/// The instructions, and all of that is there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
unsafe fn dots<const R: usize>(
    (queries, stride): (*const u16, usize),
    keys: &[*const u16; KEYS],
    registers: usize,
    scores: *mut f32,
    mut lines: Lines,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let half = |from: *const u16| _mm256_loadu_si256(from.cast());
        let mut sums = [[_mm512_setzero_ps(); KEYS / 2]; R];
        for k in (0..registers * LANES).step_by(LANES / 2) {
            ask(lines.step());
            let mut b = [_mm512_setzero_si512(); KEYS / 2];
            for v in 0..KEYS / 2 {
                let low = _mm512_castsi256_si512(half(keys[v].add(k)));
                b[v] = _mm512_inserti64x4(low, half(keys[v + KEYS / 2].add(k)), 1);
            }
            for i in 0..R {
                let a = _mm512_broadcast_i64x4(half(queries.add(i * stride + k)));
                for v in 0..KEYS / 2 {
                    sums[i][v] = dot(sums[i][v], a, b[v]);
                }
            }
        }
        for i in 0..R {
            _mm256_storeu_ps(scores.add(i * CHUNK), sum(sums[i]));
        }
    }
}

/// The sums of the lower and of the upper lanes of four registers.
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
#[inline]
fn sum(of: [__m512; 4]) -> __m256 {
    let pairs = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    // In each 128 bits: sums of lanes 0 and 2, and of lanes 1 and 3, of the first and the second of two.
    let (ab, cd) = (
        _mm512_castps_pd(pairs(of[0], of[1])),
        _mm512_castps_pd(pairs(of[2], of[3])),
    );
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    let four = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    // Of the four parts of 128 bits the first two, and the last two.
    let two = _mm512_add_ps(four, _mm512_shuffle_f32x4(four, four, 0b10_11_00_01));
    _mm512_castps512_ps256(_mm512_shuffle_f32x4(two, two, 0b10_00))
}

/// Turns the scores of a row into the softmax's numerators, rounded to BF16, zero for what is not visible. Gives the
/// largest score and the sum of what they become: then rounding moves weight among tokens, and the weights' sum
/// is still one.
///
/// # Safety
/// The instructions, and room for a row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
#[inline]
unsafe fn weights(scores: &[f32; CHUNK], visible: Range<usize>, to: *mut u16) -> [f32; 2] {
    let mask = |first: usize| {
        let bits = |count: usize| (1u32 << count.clamp(first, first + 16).wrapping_sub(first)) - 1;
        (bits(visible.end) & !bits(visible.start)) as __mmask16
    };
    // SAFETY: the caller's promise; a row is whole registers.
    unsafe {
        let load = |first: usize| _mm512_loadu_ps(scores.as_ptr().add(first));
        let mut largest = _mm512_set1_ps(f32::NEG_INFINITY);
        for first in (0..CHUNK).step_by(16) {
            // What is NaN on the left is passed over, and shows in the sum.
            largest = _mm512_mask_max_ps(largest, mask(first), load(first), largest);
        }
        let largest = _mm512_reduce_max_ps(largest);
        let exponents = |first: usize| {
            let below = _mm512_sub_ps(load(first), _mm512_set1_ps(largest));
            // On the left what is NaN stays.
            _mm512_max_ps(
                _mm512_set1_ps(-150.0),
                _mm512_mul_ps(below, _mm512_set1_ps(LOG2_E)),
            )
        };
        let mut sums = [_mm512_setzero_ps(); 2];
        for first in (0..CHUNK).step_by(LANES) {
            let low = exp2(exponents(first));
            let low = _mm512_maskz_mov_ps(mask(first), low);
            let high = exp2(exponents(first + 16));
            let high = _mm512_maskz_mov_ps(mask(first + 16), high);
            let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(to.add(first).cast(), rounded);
            let odd = _mm512_and_si512(rounded, _mm512_set1_epi32(UPPER));
            sums[0] = _mm512_add_ps(sums[0], _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16)));
            sums[1] = _mm512_add_ps(sums[1], _mm512_castsi512_ps(odd));
        }
        [largest, _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))]
    }
}

/// 2^x to within 3e-6 of it, which BF16 does not see.
#[target_feature(enable = "avx512f,fma")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    let whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    let r = _mm512_sub_ps(x, whole);
    let mut p = _mm512_set1_ps(0.001_333_356);
    for coefficient in [0.009_618_13, 0.055_504_11, 0.240_226_5, LN_2, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    }
    _mm512_scalef_ps(p, whole)
}

/// `B` times 32 columns of the outputs of `R` rows: for each pair of tokens the two weights of a row times the two rows of
/// values, interleaved. Outputs are the first row's and the elements from one row to the next. Asks for a line a pair.
///
/// # Safety
/// The instructions; weights and values of all pairs, values and outputs from `column` on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
unsafe fn mix<const B: usize, const R: usize>(
    weights: *const i32,
    values: &[*const u16; CHUNK],
    pairs: Range<usize>,
    column: usize,
    (out, stride): (*mut f32, usize),
    mut lines: Lines,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[[_mm512_setzero_ps(); 2]; B]; R];
        for pair in pairs {
            ask(lines.step());
            let mut both = [[_mm512_setzero_si512(); 2]; B];
            for b in 0..B {
                let [even, odd] = [0, 1].map(|i| load(values[2 * pair + i].add(column + b * LANES)));
                both[b] = [_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)];
            }
            for i in 0..R {
                let weight = _mm512_set1_epi32(*weights.add(i * CHUNK / 2 + pair));
                for b in 0..B {
                    for half in 0..2 {
                        sums[i][b][half] = dot(sums[i][b][half], both[b][half], weight);
                    }
                }
            }
        }
        // Interleaving has put columns 0 to 3 of each eight into the first register, the rest into the second.
        let first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        let second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for i in 0..R {
            for b in 0..B {
                let [low, high] = sums[i][b].map(|sums| _mm512_castps_pd(sums));
                let out: *mut f64 = out.add(i * stride + b * LANES).cast();
                _mm512_storeu_pd(out, _mm512_permutex2var_pd(low, first, high));
                _mm512_storeu_pd(out.add(8), _mm512_permutex2var_pd(low, second, high));
            }
        }
    }
}

/// `sums + Σ a · b` over the two numbers of each lane.
///
/// # Safety
/// The instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn dot(sums: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: the types have the same bits.
    let [a, b] = [a, b].map(|numbers| unsafe { std::mem::transmute::<__m512i, __m512bh>(numbers) });
    _mm512_dpbf16_ps(sums, a, b)
}

/// A register, from anywhere.
///
/// # Safety
/// The instructions; a register of numbers there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load(from: *const u16) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(from.cast()) }
}

/// The upper half of a lane.
const UPPER: i32 = 0xffff_0000_u32 as i32;

/// Decodes a vector of the tokens seen to BF16, in whole registers, zeros behind its end.
///
/// # Safety
/// The instructions, and room for whole registers of each token, the first one's at `to`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn decode(chunk: &Chunk<'_>, vector: &Vector, seen: Range<usize>, to: *mut u16, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match vector.part.encoding {
            Encoding::BF16 => {
                for t in seen {
                    let (codes, _) = chunk.vector(vector, t);
                    for (i, codes) in codes.chunks(2 * LANES).enumerate() {
                        _mm512_storeu_si512(to.add(t * stride + i * LANES).cast(), load_bytes(codes));
                    }
                }
            }
            Encoding::F16 => {
                for t in seen {
                    let (codes, _) = chunk.vector(vector, t);
                    for (i, codes) in codes.chunks(2 * LANES).enumerate() {
                        let halves = load_bytes(codes);
                        let low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
                        let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
                        let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                        _mm512_storeu_si512(to.add(t * stride + i * LANES).cast(), rounded);
                    }
                }
            }
            Encoding::Fp8 => {
                for t in seen {
                    let (codes, scales) = chunk.vector(vector, t);
                    let groups = codes.chunks(FP8_GROUP).zip(scales.as_chunks().0);
                    for (i, (codes, scale)) in groups.enumerate() {
                        let to = to.add(t * stride + i * FP8_GROUP);
                        decode_fp8(codes, f32::from_le_bytes(*scale), to);
                    }
                }
            }
            Encoding::Fp4 { group: 16 } => {
                for t in seen {
                    let (codes, scales) = chunk.vector(vector, t);
                    decode_fp4::<16>(codes, scales, to.add(t * stride));
                }
            }
            Encoding::Fp4 { .. } => {
                for t in seen {
                    let (codes, scales) = chunk.vector(vector, t);
                    decode_fp4::<32>(codes, scales, to.add(t * stride));
                }
            }
        }
    }
}

/// Up to 64 bytes, zeros behind them.
///
/// # Safety
/// The instructions.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn load_bytes(bytes: &[u8]) -> __m512i {
    // SAFETY: the instructions are the caller's promise; the mask names the bytes that are there.
    unsafe {
        match bytes.len() {
            64 => _mm512_loadu_si512(bytes.as_ptr().cast()),
            len => _mm512_maskz_loadu_epi8((1 << len) - 1, bytes.as_ptr().cast()),
        }
    }
}

/// A group of FP8 codes, which share a scale.
///
/// Where the scale is a power of two, as this crate's writer has it, a number is its code with another exponent: whole
/// numbers are added to exponents, and the eight magnitudes without one of their own come from a table.
///
/// # Safety
/// As [`decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
unsafe fn decode_fp8(codes: &[u8], scale: f32, to: *mut u16) {
    // SAFETY: the caller's promise.
    unsafe {
        let exponent = scale.to_bits() >> 23;
        let power_of_two = scale.to_bits() & 0x007f_ffff == 0 && (10..=246).contains(&exponent);
        if codes.len() < FP8_GROUP || !power_of_two || has_nan(codes) {
            return decode_any_fp8(codes, scale, to);
        }
        let exponent = exponent as i16;
        let add = _mm512_set1_epi16((exponent - 7) << 7);
        // 1 to 7 times 2^-9, relative to 2^-9.
        let table = _mm512_zextsi128_si512(_mm_setr_epi16(0, 0, 0x80, 0xc0, 0x100, 0x120, 0x140, 0x160));
        let table = _mm512_maskz_add_epi16(0xfe, table, _mm512_set1_epi16((exponent - 9) << 7));
        for i in 0..FP8_GROUP / LANES {
            let bytes = _mm256_loadu_si256(codes.as_ptr().add(i * LANES).cast());
            let words = _mm512_cvtepi8_epi16(bytes);
            let magnitudes =
                _mm512_and_si512(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(0x87f0_u16 as i16));
            let without = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
            let values = _mm512_add_epi16(magnitudes, add);
            // A permutation takes the low five bits of each index.
            let values = _mm512_mask_permutexvar_epi16(values, without, words, table);
            let sign = _mm512_set1_epi16(i16::MIN);
            // values | magnitudes & sign
            let values = _mm512_ternarylogic_epi32(magnitudes, sign, values, 0xea);
            _mm512_storeu_si512(to.add(i * LANES).cast(), values);
        }
    }
}

/// Whether a code is not a number.
///
/// # Safety
/// The instructions.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn has_nan(codes: &[u8]) -> bool {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        let all = _mm512_set1_epi8(0x7f);
        codes.chunks(64).any(|codes| {
            let magnitudes = _mm512_and_si512(load_bytes(codes), all);
            _mm512_cmpeq_epi8_mask(magnitudes, all) != 0
        })
    }
}

/// Any FP8 codes with any scale.
///
/// # Safety
/// As [`decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn decode_any_fp8(codes: &[u8], scale: f32, to: *mut u16) {
    for (i, codes) in codes.chunks(LANES).enumerate() {
        let mut numbers = [0f32; LANES];
        for (number, code) in numbers.iter_mut().zip(codes) {
            *number = e4m3(*code) * scale;
        }
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(to.add(i * LANES).cast(), round(&numbers)) };
    }
}

/// FP4 codes: products of codes and scales have six significant bits, so that the upper half of an f32 is all of it.
///
/// # Safety
/// As [`decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
unsafe fn decode_fp4<const GROUP: usize>(codes: &[u8], scales: &[u8], to: *mut u16) {
    let per_scales = 16 * GROUP / LANES;
    let sets = codes.chunks(16 * per_scales).zip(scales.chunks(16));
    for (set, (codes, scales)) in sets.enumerate() {
        // SAFETY: the caller's promise; masks name the bytes that are there.
        unsafe {
            let to = to.add(set * per_scales * LANES);
            let bytes = match scales.len() {
                16 => _mm_loadu_si128(scales.as_ptr().cast()),
                len => _mm_maskz_loadu_epi8((1 << len) - 1, scales.as_ptr().cast()),
            };
            let scales = _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 7));
            let (whole, rest) = (codes.len() / 16, codes.len() % 16);
            for i in 0..whole {
                let bytes = _mm_loadu_si128(codes.as_ptr().add(16 * i).cast());
                let values = fp4_register::<GROUP>(bytes, scales, i);
                _mm512_storeu_si512(to.add(i * LANES).cast(), values);
            }
            if rest > 0 {
                let bytes = _mm_maskz_loadu_epi8((1 << rest) - 1, codes.as_ptr().add(16 * whole).cast());
                let values = fp4_register::<GROUP>(bytes, scales, whole);
                _mm512_storeu_si512(to.add(whole * LANES).cast(), values);
            }
        }
    }
}

/// 32 codes, those of register `i` of sixteen scales.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn fp4_register<const GROUP: usize>(codes: __m128i, scales: __m512, i: usize) -> __m512i {
    // SAFETY: sixteen values are there.
    let table = unsafe { _mm512_loadu_ps(code::VALUES.as_ptr()) };
    // Of sixteen lanes, two codes each, eight share a scale or all do.
    let group = match GROUP {
        16 => _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1),
        _ => _mm512_setzero_si512(),
    };
    let group = _mm512_add_epi32(group, _mm512_set1_epi32((i * LANES / GROUP) as i32));
    let scale = _mm512_permutexvar_ps(group, scales);
    let lanes = _mm512_cvtepu8_epi32(codes);
    // A permutation takes the low four bits of each index.
    let even = _mm512_mul_ps(_mm512_permutexvar_ps(lanes, table), scale);
    let odd = _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 4), table);
    let odd = _mm512_castps_si512(_mm512_mul_ps(odd, scale));
    let even = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    // odd & UPPER | even
    _mm512_ternarylogic_epi32(odd, _mm512_set1_epi32(UPPER), even, 0xea)
}

/// `rounds` times sixteen independent products; gives the operations in them.
///
/// # Safety
/// The instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn products(rounds: u32) -> u64 {
    let (a, b) = std::hint::black_box(([[0x3f80u16; LANES]; 2], [[0x3f80u16; LANES]; 16]));
    // SAFETY: the instructions are the caller's promise; all are whole registers.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); 16];
        for round in 0..rounds {
            let a = load(a[round as usize % 2].as_ptr());
            for i in 0..16 {
                sums[i] = dot(sums[i], a, load(b[i].as_ptr()));
            }
        }
        std::hint::black_box(sums);
    }
    u64::from(rounds) * 16 * 2 * LANES as u64
}
