//! FP4 weights times a few rounded rows of activations: each row of weights along its codes, at the memory's speed.

use super::{BLOCK_BYTES, BLOCK_LANES, DISTANCE, Fp4Rows, Scratch, Selection, Simd, TILE, scales, sized};
use crate::cpu::activations::{BLOCK, Block, Rounded};

/// Each row of weights along its codes, the one stream that memory serves best, with `M` rows of activations; sums
/// in the lanes of a register each.
#[inline(always)]
pub(super) unsafe fn along_rows<S: Simd, const M: usize>(
    weights: Fp4Rows<'_>,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (tensor, k) = (weights.tensor, weights.tensor.shape().1);
    let codes = &tensor.codes()[weights.first * k / 2..][..weights.rows * k / 2];
    let groups = k / tensor.group();
    // A register of scales may begin at the last one; what follows meets zeros.
    let scales = sized(&mut scratch.floats, weights.rows * groups + 8);
    let (decoded, after) = scales.split_at_mut(weights.rows * groups);
    scales::decode(tensor, weights.first * groups, decoded);
    after.fill(0.0);
    // Those of the tile to come: a stream too thin for the processor to follow by itself.
    let row = groups * tensor.scale_kind().size();
    let next = (weights.first + weights.rows) * row;
    for line in (next..tensor.scales().len().min(next + weights.rows * row)).step_by(64) {
        // SAFETY: the instructions are the caller's promise.
        unsafe { S::prefetch(tensor.scales()[line..].as_ptr()) };
    }
    // SAFETY: the instructions are the caller's promise;
    // `scales` holds those of all rows, and eight more.
    unsafe {
        match tensor.group() {
            BLOCK => each_row::<S, M, BLOCK_LANES>(codes, scales, k, x, selection, out),
            64 => each_row::<S, M, 8>(codes, scales, k, x, selection, out),
            32 => each_row::<S, M, 4>(codes, scales, k, x, selection, out),
            _ => each_row::<S, M, 2>(codes, scales, k, x, selection, out),
        }
    }
}

/// `SHARE` lanes, of eight codes each, have one scale.
#[inline(always)]
unsafe fn each_row<S: Simd, const M: usize, const SHARE: usize>(
    codes: &[u8],
    scales: &[f32],
    k: usize,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
) {
    let (per_row, per_block) = (k / (8 * SHARE), BLOCK_LANES / SHARE);
    let (whole, rest) = (k / BLOCK, k % BLOCK / 2);
    let mut first = [x.blocks.as_ptr(); M];
    for i in 0..M {
        first[i] = x.blocks[selection.row(i)..].as_ptr();
    }
    assert!(scales.len() >= codes.len() / (k / 2) * per_row + 8);
    for (r, codes) in codes.chunks_exact(k / 2).enumerate() {
        // SAFETY: a row has `whole` blocks of codes and a rest, and scales for all of them, with eight behind the last
        // row's; block b of a row of activations lies b · x.rows after its first.
        unsafe {
            let scales = scales.as_ptr().add(r * per_row);
            let mut sums = [S::splat(0.0); M];
            for b in 0..whole {
                S::prefetch(codes.as_ptr().wrapping_add(b * BLOCK_BYTES + DISTANCE));
                let scales = scales.add(b * per_block);
                block::<S, M, SHARE>(
                    &mut sums,
                    codes.as_ptr().add(b * BLOCK_BYTES),
                    scales,
                    &first,
                    b * x.rows,
                );
            }
            if rest > 0 {
                let mut padded = [0u8; BLOCK_BYTES];
                padded[..rest].copy_from_slice(&codes[whole * BLOCK_BYTES..]);
                let scales = scales.add(whole * per_block);
                block::<S, M, SHARE>(&mut sums, padded.as_ptr(), scales, &first, whole * x.rows);
            }
            for i in 0..M {
                out[i * TILE + r] = S::sum(sums[i]);
            }
        }
    }
}

/// Adds the products of a row's block of 128 with the blocks `offset` after `x`.
///
/// # Safety
/// 64 bytes of codes, a scale for each `SHARE` lanes with eight numbers to read from each, and the blocks of activations.
#[inline(always)]
unsafe fn block<S: Simd, const M: usize, const SHARE: usize>(
    sums: &mut [S::Float; M],
    codes: *const u8,
    scales: *const f32,
    x: &[*const Block; M],
    offset: usize,
) {
    // SAFETY: the instructions are the caller's promise; so are 64 bytes of codes, a scale for each `SHARE`
    // lanes with eight numbers to read from each, and the blocks of activations.
    unsafe {
        if SHARE == BLOCK_LANES {
            return wide_block::<S, M>(sums, codes, *scales, x, offset);
        }
        for part in 0..BLOCK_LANES / S::LANES {
            let (bytes, lanes) = (part * 4 * S::LANES, part * S::LANES);
            let (low, high) = S::lookup(S::load_bytes(codes.add(bytes)));
            let scale = S::spread::<SHARE>(scales.add(lanes / SHARE));
            for i in 0..M {
                let x = &*x[i].add(offset);
                let even = S::load_bytes(x.even.as_ptr().add(bytes).cast());
                let odd = S::load_bytes(x.odd.as_ptr().add(bytes).cast());
                let start = match S::BIASED {
                    true => S::load_int(x.corrections.as_ptr().add(lanes)),
                    false => S::splat_int(0),
                };
                let whole = S::to_float(S::dot(S::dot(start, low, even), high, odd));
                sums[i] = S::fma(whole, S::mul(scale, S::splat(x.scale)), sums[i]);
            }
        }
    }
}

/// As [`block`] with one scale: its sums stay whole numbers to the block's end.
///
/// # Safety
/// 64 bytes of codes, and the blocks of activations.
#[inline(always)]
unsafe fn wide_block<S: Simd, const M: usize>(
    sums: &mut [S::Float; M],
    codes: *const u8,
    scale: f32,
    x: &[*const Block; M],
    offset: usize,
) {
    // SAFETY: the instructions are the caller's promise; so are 64 bytes of codes and the blocks of activations.
    unsafe {
        let parts = BLOCK_LANES / S::LANES;
        let mut decoded = [(S::splat_bytes(0), S::splat_bytes(0)); 4];
        for part in 0..parts {
            decoded[part] = S::lookup(S::load_bytes(codes.add(part * 4 * S::LANES)));
        }
        let scale = S::splat(scale);
        for i in 0..M {
            let x = &*x[i].add(offset);
            let mut whole = S::splat_int(0);
            if S::BIASED {
                for part in 0..parts {
                    let corrections = S::load_int(x.corrections.as_ptr().add(part * S::LANES));
                    whole = S::add_int(whole, corrections);
                }
            }
            for part in 0..parts {
                let even = S::load_bytes(x.even.as_ptr().add(part * 4 * S::LANES).cast());
                let odd = S::load_bytes(x.odd.as_ptr().add(part * 4 * S::LANES).cast());
                whole = S::dot(S::dot(whole, decoded[part].0, even), decoded[part].1, odd);
            }
            sums[i] = S::fma(S::to_float(whole), S::mul(scale, S::splat(x.scale)), sums[i]);
        }
    }
}
