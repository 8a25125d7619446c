//! The loops, once for all instruction sets.
//!
//! Everything here is inlined into the functions that [`kernels!`] makes for an instruction set, and compiled
//! for it there. Sums run in an order that depends on nothing but the shapes.

// SAFETY, for the whole file: the functions are unsafe because the operations of `Simd` are; their callers promise
// the instructions. Memory is checked where pointers are made from slices.
#![allow(clippy::undocumented_unsafe_blocks)]
// Loops over registers are written with indices: closures would have to be inlined to be compiled for the instruction
// set, which nothing guarantees.
#![allow(clippy::needless_range_loop)]

use super::product::{Columns, Rows, aligned, passes, product, transpose};
use super::{CodeTile, Fp4Rows, Scratch, Selection, Simd, TILE, scales, sized};
use crate::cpu::activations::{BLOCK, Block, Rounded};
use crate::fp4::{FloatKind, Fp4Tensor, INT8_BLOCK, Int8Tensor, Weight};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes of codes a block of 128 elements has.
const BLOCK_BYTES: usize = BLOCK / 2;
/// Lanes of 32 bits that these bytes fill.
const BLOCK_LANES: usize = BLOCK_BYTES / 4;

/// Makes a [`Kernels`](super::Kernels) table for an implementation of [`Simd`]: tile products keep `registers`
/// registers of weights' rows times `rows` rows of activations in registers.
macro_rules! kernels {
    ($simd:ident, registers: $registers:literal, rows: $rows:literal $(, features: $features:literal)?) => {
        mod kernels {
            use super::super::{Fp4Rows, Int8Rows, Kernels, Scratch, Selection, attention, generic, int8};
            use crate::cpu::activations::{Block, Rounded};
            use crate::cpu::attention::Task;
            use crate::fp4::Weight;
            use std::ops::Range;

            $(#[target_feature(enable = $features)])?
            unsafe fn round(x: &[f32], row: usize, rows: usize, blocks: *mut Block) {
                // SAFETY: as the caller promises.
                unsafe { generic::round(x, row, rows, blocks) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn w4a8(
                weights: Fp4Rows<'_>,
                x: Rounded<'_>,
                selection: Selection<'_>,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { generic::w4a8::<super::$simd, $registers, $rows>(weights, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn int8(
                weights: Int8Rows<'_>,
                x: Rounded<'_>,
                selection: Selection<'_>,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { int8::int8::<super::$simd>(weights, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn exact(
                weight: &Weight,
                rows: Range<usize>,
                x: &[f32],
                selection: Selection<'_>,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { generic::exact::<super::$simd, $registers, $rows>(weight, rows, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn columns(
                weight: &Weight,
                rows: Range<usize>,
                columns: Range<usize>,
                x: &[f32],
                selection: Selection<'_>,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { generic::columns::<super::$simd, $registers, $rows>(weight, rows, columns, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn swiglu(gate: &mut [f32], up: &[f32]) {
                generic::swiglu(gate, up)
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn attend(task: &Task<'_>, out: &mut [f32], scratch: &mut Scratch) {
                // SAFETY: as the caller promises.
                unsafe { attention::attend::<super::$simd, $registers, $rows>(task, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn read(bytes: &[u8]) -> u8 {
                // SAFETY: as the caller promises.
                unsafe { generic::read::<super::$simd>(bytes) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn dots(rounds: u32) -> u64 {
                // SAFETY: as the caller promises.
                unsafe { generic::dots::<super::$simd>(rounds) }
            }

            pub static KERNELS: Kernels = Kernels { round, w4a8, int8, exact, columns, swiglu, attend, read, dots };
        }
        pub(super) use kernels::KERNELS;
    };
}
pub(super) use kernels;

/// Rounds row `row` of `rows` to blocks that lie `rows` apart, the first at `blocks + row`.
#[inline(always)]
pub(super) unsafe fn round(x: &[f32], row: usize, rows: usize, blocks: *mut Block) {
    for (b, x) in x.chunks(BLOCK).enumerate() {
        unsafe { blocks.add(b * rows + row).write(Block::round(x)) };
    }
}

/// `out[i, r] = Σ_k x[i, k] · w[first + r, k]` for up to 64 rows of weights and the selected rows of rounded
/// activations; a row of `out` is 64 long.
///
/// Up to eight rows of activations go along the rows of weights as they lie, at the memory's speed. More run over
/// blocks of 64 rows by 128 codes, decoded once into the first-level cache.
#[inline(always)]
pub(super) unsafe fn w4a8<S: Simd, const NR: usize, const MR: usize>(
    weights: Fp4Rows<'_>,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let k = weights.tensor.shape().1;
    let m = selection.len();
    assert!(
        x.blocks.len() == k.div_ceil(BLOCK) * x.rows
            && (0..m).all(|i| selection.row(i) < x.rows)
            && weights.rows <= TILE
            && out.len() >= m * TILE,
        "w4a8"
    );
    unsafe {
        if m > 8 {
            return many::<S, NR, MR>(weights, x, selection, out, scratch);
        }
        // Twice for more than four: the second time the weights are in the second-level cache.
        halved(m, 4, |part| {
            let (out, selection) = (&mut out[part.start * TILE..], selection.part(part));
            match selection.len() {
                1 => along_rows::<S, 1>(weights, x, selection, out, scratch),
                2 => along_rows::<S, 2>(weights, x, selection, out, scratch),
                3 => along_rows::<S, 3>(weights, x, selection, out, scratch),
                _ => along_rows::<S, 4>(weights, x, selection, out, scratch),
            }
        });
    }
}

/// All of `rows` where they are no more than `limit`, else both halves: fewer sizes to compile loops for.
#[inline(always)]
fn halved(rows: usize, limit: usize, mut work: impl FnMut(Range<usize>)) {
    if rows <= limit {
        return work(0..rows);
    }
    work(0..rows.div_ceil(2));
    work(rows.div_ceil(2)..rows);
}

/// Each row of weights along its codes, the one stream that memory serves best, with `M` rows of activations; sums
/// in the lanes of a register each.
#[inline(always)]
unsafe fn along_rows<S: Simd, const M: usize>(
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
        unsafe { S::prefetch(tensor.scales()[line..].as_ptr()) };
    }
    unsafe {
        match tensor.group() {
            BLOCK => each_row::<S, M, BLOCK_LANES>(codes, scales, k, x, selection, out),
            64 => each_row::<S, M, 8>(codes, scales, k, x, selection, out),
            32 => each_row::<S, M, 4>(codes, scales, k, x, selection, out),
            _ => each_row::<S, M, 2>(codes, scales, k, x, selection, out),
        }
    }
}

/// How many bytes ahead codes are asked for, in the rows to come too: what memory takes to answer, at its speed. (Found by
/// trial: 2 KiB gave four fifths of the speed of plain reading, 4 to 8 KiB all of it.)
const DISTANCE: usize = 6144;

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

/// As [`block`] with one scale: its sums stay whole numbers to the block's end.
#[inline(always)]
unsafe fn wide_block<S: Simd, const M: usize>(
    sums: &mut [S::Float; M],
    codes: *const u8,
    scale: f32,
    x: &[*const Block; M],
    offset: usize,
) {
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

/// Adds the products of a row's block of 128 with the blocks `offset` after `x`.
#[inline(always)]
unsafe fn block<S: Simd, const M: usize, const SHARE: usize>(
    sums: &mut [S::Float; M],
    codes: *const u8,
    scales: *const f32,
    x: &[*const Block; M],
    offset: usize,
) {
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

/// Rows of activations that meet a decoded block before the next one's turn: with their sums they fit the first-level
/// cache beside it.
const CHUNK: usize = 48;

/// How many blocks ahead codes are asked for: 64 rows are more streams than a processor follows by itself.
const AHEAD: usize = 3;

/// Blocks of 64 rows by 128 codes, decoded once each, times all selected rows of activations.
#[inline(always)]
unsafe fn many<S: Simd, const NR: usize, const MR: usize>(
    weights: Fp4Rows<'_>,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (tensor, k, m) = (weights.tensor, weights.tensor.shape().1, selection.len());
    let (row_bytes, group) = (k / 2, tensor.group());
    let codes = &tensor.codes()[weights.first * row_bytes..][..weights.rows * row_bytes];
    let groups = k / group;
    let scales = sized(&mut scratch.floats, weights.rows * groups);
    scales::decode(tensor, weights.first * groups, scales);
    let by_row = sized(&mut scratch.weights, groups * TILE);
    for (g, by_row) in by_row.chunks_exact_mut(TILE).enumerate() {
        for (by_row, scales) in by_row.iter_mut().zip(scales.chunks_exact(groups)) {
            *by_row = scales[g];
        }
    }

    let blocks = k.div_ceil(BLOCK);
    // With one chunk no block is needed twice.
    let kept = if m <= CHUNK { 1 } else { blocks };
    if scratch.codes.len() < kept {
        scratch.codes.resize_with(kept, CodeTile::default);
    }
    let out = &mut out[..m * TILE];
    out.fill(0.0);
    for (chunk, out) in out.chunks_mut(CHUNK * TILE).enumerate() {
        let (start, rows) = (chunk * CHUNK, out.len() / TILE);
        for b in 0..blocks {
            let codes_of_block = &mut scratch.codes[b % kept].0;
            if chunk == 0 {
                for row in codes.chunks_exact(row_bytes) {
                    let ahead = (b + AHEAD) * BLOCK_BYTES;
                    if ahead < row_bytes {
                        unsafe { S::prefetch(row[ahead..].as_ptr()) };
                    }
                }
                unsafe { decode_block::<S>(codes, row_bytes, weights.rows, b, codes_of_block) };
            }
            let scales = &by_row[b * BLOCK / group * TILE..];
            let scales = &scales[..scales.len().min(BLOCK / group * TILE)];
            let x = &x.blocks[b * x.rows..][..x.rows];
            passes!(rows, MR, |from, R| {
                let mut chosen = [&x[selection.row(start + from)]; R];
                for (i, chosen) in chosen.iter_mut().enumerate() {
                    *chosen = &x[selection.row(start + from + i)];
                }
                let out = &mut out[from * TILE..(from + R) * TILE];
                unsafe { S::tile::<NR, R>(codes_of_block, scales, group, chosen, out) }
            });
        }
    }
}

/// Decodes 128 codes of up to 64 rows, from block `b` on; missing rows and codes are zero. Sets of `LANES` rows
/// follow each other; in a set, for each eight codes a word a row with the even ones and a word a row with the odd,
/// [arranged](Simd::arrange).
#[inline(always)]
unsafe fn decode_block<S: Simd>(
    codes: &[u8],
    row_bytes: usize,
    rows: usize,
    b: usize,
    to: &mut [u8; TILE * BLOCK],
) {
    static NOTHING: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    let start = b * BLOCK_BYTES;
    let there = (row_bytes - start).min(BLOCK_BYTES);
    // Written before they are read: the end of rows that end within the block, and words on their way.
    let mut ends = [[MaybeUninit::<u8>::uninit(); BLOCK_BYTES]; 16];
    let mut words = [MaybeUninit::<u8>::uninit(); BLOCK_BYTES * 16];
    for set in 0..TILE / S::LANES {
        let first = set * S::LANES;
        let mut pointers = [NOTHING.as_ptr(); 16];
        for (lane, pointer) in pointers[..S::LANES.min(rows.saturating_sub(first))]
            .iter_mut()
            .enumerate()
        {
            let codes = &codes[(first + lane) * row_bytes + start..][..there];
            *pointer = codes.as_ptr();
            if there < BLOCK_BYTES {
                ends[lane] = [MaybeUninit::new(0); BLOCK_BYTES];
                ends[lane][..there].write_copy_of_slice(codes);
                *pointer = ends[lane].as_ptr().cast();
            }
        }
        unsafe {
            let words: *mut u8 = words.as_mut_ptr().cast();
            S::transpose(&pointers[..S::LANES], words);
            let to = to.as_mut_ptr().add(set * S::LANES * BLOCK);
            for word in 0..16 {
                let (low, high) = S::lookup(S::load_bytes(words.add(word * 4 * S::LANES)));
                let (first, second) = S::arrange(low, high);
                S::store_bytes(to.add(2 * word * 4 * S::LANES), first);
                S::store_bytes(to.add((2 * word + 1) * 4 * S::LANES), second);
            }
        }
    }
}

/// `MR` rows of activations times a decoded block: sums of whole numbers in `NR · MR` registers, added to `out` in
/// f32 after each group.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const NR: usize, const MR: usize>(
    codes: &[u8; TILE * BLOCK],
    scales: &[f32],
    group: usize,
    x: [&Block; MR],
    out: &mut [f32],
) {
    let out = out[..MR * TILE].as_mut_ptr();
    let words = group / 8;
    let register = 4 * S::LANES;
    for first in (0..TILE).step_by(NR * S::LANES) {
        for (g, scales) in scales.chunks_exact(TILE).enumerate() {
            // SAFETY: `codes` holds sets of LANES rows, 32 registers each, of which NR sets begin at row `first`; a block
            // of activations has 16 words an orientation; `out` has MR rows of 64.
            unsafe {
                let codes = codes.as_ptr().add(first * BLOCK);
                let mut sums = [[S::splat_int(0); NR]; MR];
                if S::BIASED {
                    for i in 0..MR {
                        let correction = match group == BLOCK {
                            true => x[i].correction,
                            false => x[i].corrections[g * words..(g + 1) * words].iter().sum(),
                        };
                        sums[i] = [S::splat_int(correction); NR];
                    }
                }
                for word in g * words..(g + 1) * words {
                    for parity in 0..2 {
                        let mut weights = [S::load_bytes(codes.add((2 * word + parity) * register)); NR];
                        for v in 1..NR {
                            weights[v] = S::load_bytes(
                                codes.add(v * S::LANES * BLOCK + (2 * word + parity) * register),
                            );
                        }
                        for i in 0..MR {
                            let x = if parity == 0 {
                                x[i].even.as_ptr()
                            } else {
                                x[i].odd.as_ptr()
                            };
                            let x = S::splat_bytes(x.add(4 * word).cast::<i32>().read_unaligned());
                            for v in 0..NR {
                                sums[i][v] = S::dot(sums[i][v], weights[v], x);
                            }
                        }
                    }
                }
                for i in 0..MR {
                    let step = S::splat(x[i].scale);
                    for v in 0..NR {
                        let column = first + v * S::LANES;
                        let scale = S::mul(S::load(scales.as_ptr().add(column)), step);
                        let out = out.add(i * TILE + column);
                        S::store(out, S::fma(S::to_float(sums[i][v]), scale, S::load(out)));
                    }
                }
            }
        }
    }
}

/// Writes the elements `start..start + row.len()` of row `n`, whole groups, in f32.
#[inline(always)]
unsafe fn decode_row<S: Simd>(
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
            let group = tensor.group();
            let codes = &tensor.codes()[(n * k + start) / 2..][..row.len() / 2];
            let scales = sized(scales, row.len() / group);
            scales::decode(tensor, (n * k + start) / group, scales);
            for (i, row) in row.chunks_exact_mut(span).enumerate() {
                unsafe {
                    let scale = span_scale::<S>(scales, group, i);
                    let (even, odd) = S::values(codes[i * S::LANES..][..S::LANES].as_ptr());
                    S::store_interleaved(row.as_mut_ptr(), S::mul(even, scale), S::mul(odd, scale));
                }
            }
        }
        Weight::Dense(tensor) if tensor.kind() == FloatKind::BF16 => {
            let bytes = &tensor.bytes()[2 * (n * k + start)..][..2 * row.len()];
            for (bytes, row) in bytes.chunks_exact(2 * span).zip(row.chunks_exact_mut(span)) {
                unsafe {
                    let (even, odd) = S::bf16(bytes.as_ptr());
                    S::store_interleaved(row.as_mut_ptr(), even, odd);
                }
            }
        }
        Weight::Dense(_) => return weight.decode_row_part(n, start, row),
        Weight::Int8(tensor) => {
            for (i, row) in row.chunks_exact_mut(span).enumerate() {
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
unsafe fn int8_span<S: Simd>(tensor: &Int8Tensor, n: usize, start: usize) -> (S::Float, S::Float) {
    debug_assert!(start.is_multiple_of(2 * S::LANES));
    let index = n * tensor.blocks() + start / INT8_BLOCK;
    let (even, odd) = tensor.block(index).split_at(INT8_BLOCK / 2);
    let at = start % INT8_BLOCK / 2;
    // SAFETY: a block's half is a whole number of registers.
    unsafe {
        let scale = S::splat(tensor.scale(index));
        (
            S::mul(S::signed(even[at..].as_ptr()), scale),
            S::mul(S::signed(odd[at..].as_ptr()), scale),
        )
    }
}

/// The scales of the `2 · LANES` elements from `index · 2 · LANES` on, those of a register of even or odd ones.
#[inline(always)]
unsafe fn span_scale<S: Simd>(scales: &[f32], group: usize, index: usize) -> S::Float {
    let span = 2 * S::LANES;
    unsafe {
        if group < span {
            S::splat_halves(scales[2 * index], scales[2 * index + 1])
        } else {
            S::splat(scales[index * span / group])
        }
    }
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
    if let Weight::Dense(tensor) = weight
        && tensor.kind() != FloatKind::BF16
    {
        // Rare among large weights: not worth loops of its own.
        let row = sized(&mut scratch.weights, k);
        for (r, n) in rows.enumerate() {
            weight.decode_row_part(n, 0, row);
            for i in 0..M {
                out[i * TILE + r] = unsafe { dot::<S>(row, &x[selection.row(i) * k..][..k]) };
            }
        }
        return;
    }
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
        let mut sums = [[unsafe { S::splat(0.0) }; 2]; M];
        match weight {
            Weight::Fp4(tensor) => {
                let group = tensor.group();
                let scales = sized(&mut scratch.floats, k / group);
                scales::decode(tensor, n * k / group, scales);
                let codes = &tensor.codes()[n * k / 2..][..k / 2];
                for i in 0..whole {
                    unsafe {
                        S::prefetch(codes.as_ptr().wrapping_add(i * S::LANES + DISTANCE));
                        let scale = span_scale::<S>(scales, group, i);
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
                    unsafe {
                        S::prefetch(bytes.as_ptr().wrapping_add(2 * i * span + DISTANCE));
                        let (even, odd) = S::bf16(bytes.as_ptr().add(2 * i * span));
                        add::<S, M>(&mut sums, even, odd, &split[i * span..], k);
                    }
                }
            }
            Weight::Int8(tensor) => {
                for i in 0..whole {
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
    debug_assert!(x.len() >= (M - 1) * k + 2 * S::LANES);
    for i in 0..M {
        unsafe {
            let x = x.as_ptr().add(i * k);
            sums[i][0] = S::fma(even, S::load(x), sums[i][0]);
            sums[i][1] = S::fma(odd, S::load(x.add(S::LANES)), sums[i][1]);
        }
    }
}

/// From this many rows of activations on, a matrix product over decoded rows is faster than dot products.
const MANY: usize = 6;

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
    let (k, m, count) = (weight.shape().1, selection.len(), rows.len());
    if m < MANY {
        return halved(m, 3, |part| {
            let (out, selection) = (&mut out[part.start * TILE..], selection.part(part));
            let rows = rows.clone();
            unsafe {
                match selection.len() {
                    1 => few::<S, 1>(weight, rows, x, selection, out, scratch),
                    2 => few::<S, 2>(weight, rows, x, selection, out, scratch),
                    _ => few::<S, 3>(weight, rows, x, selection, out, scratch),
                }
            }
        });
    }
    let packed = aligned(&mut scratch.packed, TILE * k);
    let set = sized(&mut scratch.weights, S::LANES * k);
    let sets = packed
        .chunks_exact_mut(S::LANES * k)
        .take(count.div_ceil(S::LANES));
    for (first, packed) in rows.clone().step_by(S::LANES).zip(sets) {
        for (n, row) in (first..rows.end).zip(set.chunks_exact_mut(k)) {
            unsafe { decode_row::<S>(weight, n, 0, row, &mut scratch.floats) };
        }
        let mut decoded = [&set[..k]; 16];
        for (decoded, row) in decoded.iter_mut().zip(set.chunks_exact(k)) {
            *decoded = row;
        }
        unsafe { transpose::<S>(decoded, packed) };
    }
    let (a, b) = (
        Rows::of(gather(x, k, selection, &mut scratch.gathered), k),
        Columns::packed::<S>(packed, k),
    );
    // Columns beyond the rows there are have room, and nobody reads them.
    let columns = count.next_multiple_of(S::LANES);
    unsafe { product::<S, NR, MR>(a, b, (m, k, columns), (out, TILE), false) };
}

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
            unsafe { one_transposed::<S>(tensor, rows.start, columns.start, x, &mut out[..width], scratch) }
        }
        _ => {
            let decoded = sized(&mut scratch.weights, count * width);
            for (n, row) in rows.zip(decoded.chunks_exact_mut(width)) {
                unsafe { decode_row::<S>(weight, n, columns.start, row, &mut scratch.floats) };
            }
            let x = gather(x, count, selection, &mut scratch.gathered);
            let (a, b) = (Rows::of(x, count), Columns::rows::<S>(decoded, width));
            unsafe { product::<S, NR, MR>(a, b, (m, count, width), (out, width), false) };
        }
    }
}

/// Rows of weights that are added to one set of columns before the next set's turn: what a line of the cache brings
/// is used while it is there.
const TOGETHER: usize = 16;

/// `out[c] = Σ_r x[r] · w[first + r, start + c]` for FP4 weights and whole sets of eight registers.
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
    let (groups, span) = (width / group, 2 * S::LANES);
    let set = 4 * span;
    // A register of even columns and one of odd ones in turn.
    let sums = sized(&mut scratch.weights, width);
    sums.fill(0.0);
    let scales = sized(&mut scratch.floats, TOGETHER * groups);
    for (index, x) in x.chunks(TOGETHER).enumerate() {
        let first = first + index * TOGETHER;
        for (r, (x, scales)) in x.iter().zip(scales.chunks_exact_mut(groups)).enumerate() {
            scales::decode(tensor, ((first + r) * k + start) / group, scales);
            scales.iter_mut().for_each(|scale| *scale *= x);
        }
        for column in (0..width).step_by(set) {
            // SAFETY: `sums` has `width` elements, a multiple of `set`; codes and scales are sliced.
            unsafe {
                let place = sums.as_mut_ptr().add(column);
                let mut sums = [S::splat(0.0); 8];
                for i in 0..8 {
                    sums[i] = S::load(place.add(i * S::LANES));
                }
                for r in 0..x.len() {
                    let codes = &tensor.codes()[((first + r) * k + start + column) / 2..][..set / 2];
                    S::prefetch(codes.as_ptr().wrapping_add(DISTANCE));
                    let scales = &scales[r * groups..][..groups];
                    for i in 0..4 {
                        let scale = span_scale::<S>(scales, group, column / span + i);
                        let (even, odd) = S::values(codes.as_ptr().add(i * S::LANES));
                        sums[2 * i] = S::fma(even, scale, sums[2 * i]);
                        sums[2 * i + 1] = S::fma(odd, scale, sums[2 * i + 1]);
                    }
                }
                for i in 0..8 {
                    S::store(place.add(i * S::LANES), sums[i]);
                }
            }
        }
    }
    for (sums, out) in sums.chunks_exact(span).zip(out.chunks_exact_mut(span)) {
        unsafe {
            let (even, odd) = (S::load(sums.as_ptr()), S::load(sums.as_ptr().add(S::LANES)));
            S::store_interleaved(out.as_mut_ptr(), even, odd);
        }
    }
}

/// The selected rows of `width` elements, one after the other; copied where they do not lie so.
#[inline(always)]
fn gather<'a>(x: &'a [f32], width: usize, selection: Selection<'_>, memory: &'a mut Vec<f32>) -> &'a [f32] {
    if let Selection::Every {
        first,
        step: 1,
        count,
    } = selection
    {
        return &x[first * width..][..count * width];
    }
    let gathered = sized(memory, selection.len() * width);
    for (i, row) in gathered.chunks_exact_mut(width).enumerate() {
        row.copy_from_slice(&x[selection.row(i) * width..][..width]);
    }
    gathered
}

/// The sum of `a[k] · b[k]`, in four registers of partial sums.
#[inline(always)]
unsafe fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let step = 4 * S::LANES;
    let whole = a.len() - a.len() % step;
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

/// `gate[i] = silu(gate[i]) · up[i]`.
#[inline(always)]
pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// e^x to within two units in the last place, in arithmetic that a compiler turns into vector instructions; x above
/// 88 counts as 88, below -87 as -87.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // 2^23 · 1.5: adding it leaves a whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first short enough that n times it is exact.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// Loads all whole lines of 256 bytes, and does next to nothing with them: what reading costs.
#[inline(always)]
pub(super) unsafe fn read<S: Simd>(bytes: &[u8]) -> u8 {
    let step = 4 * S::LANES;
    unsafe {
        let mut all = [S::load_bytes([0; 64].as_ptr()); 4];
        for line in bytes.chunks_exact(256) {
            for start in (0..256).step_by(4 * step) {
                for (i, all) in all.iter_mut().enumerate() {
                    *all = S::xor(*all, S::load_bytes(line.as_ptr().add(start + i * step)));
                }
            }
        }
        let mut last = [0; 64];
        S::store_bytes(
            last.as_mut_ptr(),
            S::xor(S::xor(all[0], all[1]), S::xor(all[2], all[3])),
        );
        last.into_iter().fold(0, |all, byte| all ^ byte)
    }
}

/// `rounds` times twelve independent products, sums in registers; gives the operations in them.
#[inline(always)]
pub(super) unsafe fn dots<S: Simd>(rounds: u32) -> u64 {
    unsafe {
        let mut sums = [S::splat_int(1); 12];
        let (codes, x) = std::hint::black_box(([[3u8; 64]; 2], [[5u8; 64]; 12]));
        for round in 0..rounds {
            // Twelve different factors, and one that is new each round: where a product and its sum are two
            // instructions, no product may be taken once for all.
            let codes = S::load_bytes(codes[round as usize % 2].as_ptr());
            for i in 0..12 {
                sums[i] = S::widest(sums[i], codes, S::load_bytes(x[i].as_ptr()));
            }
        }
        std::hint::black_box(sums);
    }
    u64::from(rounds) * 12 * S::LANE_OPERATIONS * S::LANES as u64
}
