//! What all matrix kernels share: tiles of a weight's rows, the activations they meet, where results go.

use super::activations::{self, Block, Rounded};
use super::simd::{Fp4Rows, Int8Rows, Scratch, Selection, TILE, sized};
use super::{Arithmetic, Executor};
use crate::fp4::Weight;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of activations for products with FP4 or floating-point weights.
#[derive(Clone, Copy)]
pub(super) struct Activations<'a> {
    /// Rows of K elements.
    pub values: &'a [f32],
    /// The same, rounded, where a product wants them so.
    pub rounded: Option<Rounded<'a>>,
}

thread_local! {
    /// What a thread needs for a tile.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// What the caller of a kernel keeps from one call to the next: rounded activations, two sets because a mixture of
    /// experts rounds twice.
    static ROUNDED: RefCell<[Vec<Block>; 2]> = RefCell::default();
}

/// Runs `f` with this thread's scratch memory.
pub(super) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(f)
}

/// From so many elements on, rounding is work for all threads.
pub(super) const ROUND_TOGETHER: usize = 1 << 15;

/// Takes memory for rounded activations from the thread, or new where it is in use.
pub(super) fn take_blocks(set: usize) -> Vec<Block> {
    ROUNDED.with_borrow_mut(|sets| std::mem::take(&mut sets[set]))
}

/// Gives memory back to the thread.
pub(super) fn give_blocks(set: usize, blocks: Vec<Block>) {
    ROUNDED.with_borrow_mut(|sets| sets[set] = blocks);
}

/// Rounds rows of `k` elements into `memory`.
pub(super) fn round<'a>(executor: &Executor, x: &[f32], k: usize, memory: &'a mut Vec<Block>) -> Rounded<'a> {
    let rows = x.len() / k;
    let len = rows * activations::blocks(k);
    if memory.len() < len {
        memory.resize(len, Block::ZERO);
    }
    let blocks = SharedSlice::new(&mut memory[..len]);
    let round = executor.kernels().round;
    let row = |row: usize| {
        // SAFETY: the executor has checked the instructions; block b of a row lies at b · rows + row, which no other
        // row writes, and is below rows · blocks.
        unsafe { round(&x[row * k..][..k], row, rows, blocks.as_ptr()) }
    };
    match x.len() < ROUND_TOGETHER {
        true => (0..rows).for_each(row),
        false => executor.run(rows, row),
    }
    Rounded {
        blocks: &memory[..len],
        rows,
    }
}

/// Whether a product of this weight takes rounded activations.
pub(super) fn rounds(weight: &Weight, arithmetic: Arithmetic) -> bool {
    arithmetic == Arithmetic::W4A8 && matches!(weight, Weight::Fp4(_) | Weight::Int8(_))
}

/// `out[i · 64 + r] = Σ_k x[i, k] · w[rows.start + r, k]` for the selected rows of `x`, at most 64 rows of the weight.
pub(super) fn rows(
    executor: &Executor,
    weight: &Weight,
    rows: Range<usize>,
    x: Activations<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let order = executor.order();
    let kernels = executor.kernels();
    match (weight, x.rounded) {
        (Weight::Fp4(tensor), Some(rounded)) => {
            let weights = Fp4Rows {
                tensor,
                first: rows.start,
                rows: rows.len(),
            };
            // SAFETY: the executor has checked the instructions.
            unsafe { (kernels.w4a8)(weights, rounded, selection, order, out, scratch) }
        }
        (Weight::Int8(tensor), Some(rounded)) => {
            let weights = Int8Rows {
                tensor,
                first: rows.start,
                rows: rows.len(),
            };
            // SAFETY: as above.
            unsafe { (kernels.int8)(weights, rounded, selection, out, scratch) }
        }
        // SAFETY: as above.
        _ => unsafe { (kernels.exact)(weight, rows, x.values, selection, order, out, scratch) },
    }
}

/// Tiles that `rows` rows of a weight have.
pub(super) fn count(rows: usize) -> usize {
    rows.div_ceil(TILE)
}

/// The rows of tile `index` of `rows`.
pub(super) fn range(rows: usize, index: usize) -> Range<usize> {
    index * TILE..((index + 1) * TILE).min(rows)
}

/// Computes a tile in the scratch memory and hands it to `place` row by row of activations: index and values.
pub(super) fn placed(
    executor: &Executor,
    weight: &Weight,
    tile: Range<usize>,
    x: Activations<'_>,
    selection: Selection<'_>,
    scratch: &mut Scratch,
    mut place: impl FnMut(usize, &[f32]),
) {
    let (m, n) = (selection.len(), tile.len());
    let mut out = std::mem::take(&mut scratch.tile);
    rows(
        executor,
        weight,
        tile,
        x,
        selection,
        sized(&mut out, m * TILE),
        scratch,
    );
    for i in 0..m {
        place(i, &out[i * TILE..][..n]);
    }
    scratch.tile = out;
}

/// A slice that several threads write to, each its own part.
pub(super) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out parts only through `part`, whose callers promise that no two overlap.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            _borrow: PhantomData,
        }
    }

    pub fn as_ptr(&self) -> *mut T {
        self.start
    }

    /// # Safety
    /// No part that overlaps this one may be in use.
    #[expect(
        clippy::mut_from_ref,
        reason = "that parts are disjoint is the caller's promise"
    )]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: within the slice, which this borrows mutably; disjoint from other parts by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
