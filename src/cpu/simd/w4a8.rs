//! FP4 weights times rounded activations.

use super::product::passes;
use super::{Fp4Rows, Order, Scratch, Selection, Simd, TILE, blocks, few};
use crate::cpu::activations::{BLOCK, Rounded};

/// Rows of activations that [`few::along_rows`] takes: what registers hold beside the weights'.
const ROWS: usize = 4;

/// Up to so many, the rows of weights are gone along, at the memory's speed.
const FEW: usize = 8;

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
    order: Order,
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
    // SAFETY: the instructions are the caller's promise;
    // the blocks of all selected rows are there, as just asserted.
    unsafe {
        if m > FEW || order == Order::Uniform {
            return blocks::many::<S, NR, MR>(weights, x, selection, out, scratch);
        }
        // Twice for more than four: the second time the weights are in the second-level cache.
        passes!(m, ROWS, |first, R| {
            let (out, selection) = (&mut out[first * TILE..], selection.part(first..first + R));
            few::along_rows::<S, R>(weights, x, selection, out, scratch)
        });
    }
}
