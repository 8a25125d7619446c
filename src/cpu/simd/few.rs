//! FP4 weights times a few rounded rows of activations: each row of weights along its codes, at the memory's speed.
//!
//! Products within a group are whole numbers, whose sum no order changes. Groups are added in f32 one after the other, as
//! [`blocks::tile`](super::blocks::tile) adds them: a row of activations gives the same bits here and there.

use super::{BLOCK_BYTES, BLOCK_LANES, DISTANCE, Fp4Rows, Scratch, Selection, Simd, TILE, scales, sized};
use crate::cpu::activations::{BLOCK, Block, Rounded};

/// Each row of weights along its codes, the one stream that memory serves best, with `M` rows of activations.
///
/// A register of rows at a time: first the whole numbers of each row, eight products a number, then, for all rows in the
/// lanes of a register, groups by their scales.
#[inline(always)]
pub(super) unsafe fn along_rows<S: Simd, const M: usize>(
    weights: Fp4Rows<'_>,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (tensor, k) = (weights.tensor, weights.tensor.shape().1);
    let (row_bytes, group) = (k / 2, tensor.group());
    let codes = &tensor.codes()[weights.first * row_bytes..][..weights.rows * row_bytes];
    let by_group = sized(&mut scratch.weights, k / group * TILE);
    // SAFETY: the instructions are the caller's promise.
    unsafe { scales::by_group::<S>(weights, by_group, &mut scratch.floats) };
    // Those of the tile to come: a stream too thin for the processor to follow by itself.
    let row = k / group * tensor.scale_kind().size();
    let next = (weights.first + weights.rows) * row;
    for line in (next..tensor.scales().len().min(next + weights.rows * row)).step_by(64) {
        // SAFETY: the instructions are the caller's promise.
        unsafe { S::prefetch(tensor.scales()[line..].as_ptr()) };
    }
    let blocks = k.div_ceil(BLOCK);
    let mut first = [x.blocks.as_ptr(); M];
    for i in 0..M {
        first[i] = x.blocks[selection.row(i)..].as_ptr();
    }
    // Of each block, and each row of activations, a line of numbers for each row of weights.
    let numbers = sized(&mut scratch.numbers, blocks * M * S::LANES);
    for (set, codes) in codes.chunks(S::LANES * row_bytes).enumerate() {
        for (lane, codes) in codes.chunks_exact(row_bytes).enumerate() {
            let whole = row_bytes / BLOCK_BYTES;
            for b in 0..blocks {
                let mut padded = [0u8; BLOCK_BYTES];
                let codes = match b < whole {
                    true => codes[b * BLOCK_BYTES..].as_ptr(),
                    false => {
                        let rest = &codes[whole * BLOCK_BYTES..];
                        padded[..rest.len()].copy_from_slice(rest);
                        padded.as_ptr()
                    }
                };
                let numbers = &mut numbers[b * M * S::LANES..][..M * S::LANES];
                // SAFETY: the instructions are the caller's promise; 64 bytes of codes are there, and block b of a row of
                // activations lies b · x.rows after its first.
                unsafe {
                    S::prefetch(codes.wrapping_add(DISTANCE));
                    block::<S, M>(codes, &first, b * x.rows, lane, numbers);
                }
            }
        }
        let place = set * S::LANES;
        // SAFETY: the instructions are the caller's promise; there are as many blocks of activations, of numbers, and of
        // groups by their scales.
        unsafe {
            match group {
                BLOCK => add_groups::<S, M, BLOCK_LANES>(numbers, by_group, &first, x.rows, place, out),
                64 => add_groups::<S, M, 8>(numbers, by_group, &first, x.rows, place, out),
                32 => add_groups::<S, M, 4>(numbers, by_group, &first, x.rows, place, out),
                _ => add_groups::<S, M, 2>(numbers, by_group, &first, x.rows, place, out),
            }
        }
    }
}

/// The products of a row's block of 128 with the blocks `offset` after `x`: sixteen numbers, each the sum of eight, for
/// each of `M` in line `lane` of its `LANES`.
///
/// # Safety
/// 64 bytes of codes, and the blocks of activations.
#[inline(always)]
unsafe fn block<S: Simd, const M: usize>(
    codes: *const u8,
    x: &[*const Block; M],
    offset: usize,
    lane: usize,
    numbers: &mut [Line],
) {
    assert!(numbers.len() == M * S::LANES && lane < S::LANES);
    // SAFETY: the instructions, the codes and the blocks are the caller's promise; line `lane` of each `LANES` is there.
    unsafe {
        for part in 0..BLOCK_LANES / S::LANES {
            let (bytes, words) = (part * 4 * S::LANES, part * S::LANES);
            let (low, high) = S::lookup(S::load_bytes(codes.add(bytes)));
            for i in 0..M {
                let x = &*x[i].add(offset);
                let even = S::load_bytes(x.even.as_ptr().add(bytes).cast());
                let odd = S::load_bytes(x.odd.as_ptr().add(bytes).cast());
                let start = match S::BIASED {
                    true => S::load_int(x.corrections.as_ptr().add(words)),
                    false => S::splat_int(0),
                };
                let sums = S::dot(S::dot(start, low, even), high, odd);
                let to: *mut i32 = numbers.as_mut_ptr().add(i * S::LANES + lane).cast();
                S::store_int(to.add(words), sums);
            }
        }
    }
}

/// Adds up a register of rows: groups of `SHARE` numbers, in whole numbers, then these times their scales.
///
/// # Safety
/// The blocks of activations, `stride` apart.
#[inline(always)]
unsafe fn add_groups<S: Simd, const M: usize, const SHARE: usize>(
    numbers: &[Line],
    by_group: &[f32],
    x: &[*const Block; M],
    stride: usize,
    place: usize,
    out: &mut [f32],
) {
    let per_block = BLOCK_LANES / SHARE;
    let mut words = [Line::ZERO; 16];
    for i in 0..M {
        // SAFETY: the instructions are the caller's promise; `LANES` lines are there for each of `M`, and become sixteen
        // registers; slices of scales and of `out` are a register long.
        unsafe {
            let mut sums = S::splat(0.0);
            let scales = by_group.chunks(per_block * TILE);
            for (b, (numbers, scales)) in numbers.chunks_exact(M * S::LANES).zip(scales).enumerate() {
                let mut lines = [std::ptr::null(); 16];
                for lane in 0..S::LANES {
                    lines[lane] = numbers[i * S::LANES + lane].0.as_ptr().cast();
                }
                S::transpose(&lines[..S::LANES], words.as_mut_ptr().cast());
                let words: *const i32 = words.as_ptr().cast();
                let step = S::splat((*x[i].add(b * stride)).scale);
                for (g, scales) in scales.chunks_exact(TILE).enumerate() {
                    let mut whole = S::load_int(words.add(g * SHARE * S::LANES));
                    for word in 1..SHARE {
                        whole = S::add_int(whole, S::load_int(words.add((g * SHARE + word) * S::LANES)));
                    }
                    let scale = S::mul(S::load(scales[place..][..S::LANES].as_ptr()), step);
                    sums = S::fma(S::to_float(whole), scale, sums);
                }
            }
            S::store(out[i * TILE + place..][..S::LANES].as_mut_ptr(), sums);
        }
    }
}

/// Sixteen whole numbers, a line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::cpu) struct Line([i32; BLOCK_LANES]);

impl Line {
    const ZERO: Self = Self([0; BLOCK_LANES]);
}

impl Default for Line {
    fn default() -> Self {
        Self::ZERO
    }
}
