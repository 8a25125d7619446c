//! Weights of eight bits times rounded activations: an output head, with one row of activations a token.

use super::product::passes;
use super::{Int8Rows, Scratch, Selection, Simd, TILE};
use crate::cpu::activations::{BLOCK, Block, Rounded};
use crate::fp4::INT8_BLOCK;

const _: () = assert!(
    BLOCK == INT8_BLOCK,
    "a block of weights meets a block of activations"
);

/// Rows of activations that a pass over the weights takes: few enough that sixteen registers hold their sums, many
/// enough that the work on the weights does not count.
const TOGETHER: usize = 4;

/// `out[i, r] = Σ_k x[i, k] · w[first + r, k]` for up to 64 rows of weights and the selected rows of rounded
/// activations; a row of `out` is 64 long.
///
/// Each row of weights goes along its codes, the one stream that memory serves best, again for each four rows of
/// activations: the second-level cache holds a tile until then.
#[inline(always)]
pub(super) unsafe fn int8<S: Simd>(
    weights: Int8Rows<'_>,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (blocks, m) = (weights.tensor.blocks(), selection.len());
    assert!(
        x.blocks.len() == blocks * x.rows
            && (0..m).all(|i| selection.row(i) < x.rows)
            && weights.rows <= TILE
            && out.len() >= m * TILE,
        "int8"
    );
    passes!(m, TOGETHER, |first, R| {
        let mut rows = [x.blocks.as_ptr(); R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = x.blocks[selection.row(first + i)..].as_ptr();
        }
        let mut stride = x.rows;
        if x.rows > 2 * TOGETHER {
            // Many rows lie so far apart that their blocks take each other's place in the first-level cache.
            stride = R;
            scratch.blocks.clear();
            for b in 0..blocks {
                let chosen = (0..R).map(|i| x.blocks[b * x.rows + selection.row(first + i)]);
                scratch.blocks.extend(chosen);
            }
            for (i, row) in rows.iter_mut().enumerate() {
                *row = scratch.blocks[i..].as_ptr();
            }
        }
        // SAFETY: the instructions are the caller's promise; of each row all blocks are there,
        // `stride` apart.
        unsafe { along_rows::<S, R>(weights, rows, stride, &mut out[first * TILE..]) }
    });
}

/// Each row of weights with `R` rows of activations, whose blocks lie `stride` apart; sums in the lanes of a register
/// each.
///
/// # Safety
/// Each of `x` is the first of as many blocks, `stride` apart, as a row of weights has.
#[inline(always)]
unsafe fn along_rows<S: Simd, const R: usize>(
    weights: Int8Rows<'_>,
    x: [*const Block; R],
    stride: usize,
    out: &mut [f32],
) {
    let Int8Rows { tensor, first, rows } = weights;
    let row = tensor.blocks() * BLOCK;
    let codes = &tensor.codes()[first * row..][..rows * row];
    let (codes, scales) = (codes.chunks_exact(row), tensor.scales_of_rows(first, rows));
    for (r, (codes, scales)) in codes.zip(scales).enumerate() {
        // SAFETY: the instructions are the caller's promise; a row of activations has as many blocks as one of weights.
        unsafe {
            let mut sums = [S::splat(0.0); R];
            for (b, (codes, scale)) in codes.chunks_exact(BLOCK).zip(scales).enumerate() {
                let mut whole = [S::splat_int(0); R];
                for at in (0..BLOCK / 2).step_by(4 * S::LANES) {
                    let even = S::load_bytes(codes[at..].as_ptr());
                    let odd = S::load_bytes(codes[BLOCK / 2 + at..].as_ptr());
                    for i in 0..R {
                        let x = &*x[i].add(b * stride);
                        let sum = S::dot_int8(whole[i], even, S::load_bytes(x.even.as_ptr().add(at).cast()));
                        whole[i] = S::dot_int8(sum, odd, S::load_bytes(x.odd.as_ptr().add(at).cast()));
                    }
                }
                // A block of activations has half its step as its scale.
                let scale = S::splat(2.0 * scale);
                for i in 0..R {
                    let whole = S::mul(S::to_float(whole[i]), S::splat((*x[i].add(b * stride)).scale));
                    sums[i] = S::fma(whole, scale, sums[i]);
                }
            }
            for i in 0..R {
                out[i * TILE + r] = S::sum(sums[i]);
            }
        }
    }
}
