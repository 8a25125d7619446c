//! FP4 weights times many rounded rows of activations: blocks of 64 rows by 128 codes, decoded once into the first-level
//! cache.

use super::product::passes;
use super::{BLOCK_BYTES, CodeTile, Fp4Rows, Scratch, Selection, Simd, TILE, scales};
use crate::cpu::activations::{BLOCK, Block, Rounded};
use std::mem::MaybeUninit;

/// Rows of activations that meet a decoded block before the next one's turn: with their sums they fit the first-level
/// cache beside it.
const CHUNK: usize = 48;

/// How many blocks ahead codes are asked for: 64 rows are more streams than a processor follows by itself.
const AHEAD: usize = 3;

/// Blocks of 64 rows by 128 codes, decoded once each, times all selected rows of activations.
#[inline(always)]
pub(super) unsafe fn many<S: Simd, const NR: usize, const MR: usize>(
    weights: Fp4Rows<'_>,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (tensor, k, m) = (weights.tensor, weights.tensor.shape().1, selection.len());
    let (row_bytes, group) = (k / 2, tensor.group());
    let codes = &tensor.codes()[weights.first * row_bytes..][..weights.rows * row_bytes];
    let by_row = scales::by_row(weights, &mut scratch.floats, &mut scratch.weights);

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
                        // SAFETY: the instructions are the caller's promise.
                        unsafe { S::prefetch(row[ahead..].as_ptr()) };
                    }
                }
                // SAFETY: the instructions are the caller's promise.
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
                // SAFETY: the instructions are the caller's promise.
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
        // SAFETY: the instructions are the caller's promise. Each pointer names 64 bytes:
        // of codes, of a row's end with zeros after it, or of nothing. Sixteen words of LANES rows fit `words`, 32 registers
        // a set fit `to`.
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
