//! The inner loops of attention, once for all instruction sets.
//!
//! A row's sums run in one order however many rows a task has and whichever they are: blocks of keys begin at multiples of
//! 64 positions, scores are added up in the lanes of a register, outputs key by key. So a query gives the same bits alone
//! and among many.

use super::elementwise::exp;
use super::product::{Columns, Rows, aligned, passes, product};
use super::{Scratch, Simd, sized};
use crate::cpu::attention::{HeadView, Task};

/// Keys that are taken at a time.
const KEYS: usize = 64;
/// From so many rows on, copying keys and values together costs less than reading them where they lie: rows of a head
/// may be so far apart that they push each other out of the first-level cache.
const MANY: usize = 17;

/// The rows of a task, `[rows, values.width]`.
///
/// For each block of keys: scores of all rows, then the softmax's numerators with the running maximum, then their
/// product with the values, added to what the blocks before gave, rescaled to the same maximum.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, const NR: usize, const MR: usize>(
    task: &Task<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let attention = &task.attention;
    let (rows, width, value) = (task.len(), attention.width(), attention.values.width);
    let stride = out_stride(value);
    assert!(rows > 0 && out.len() == rows * stride);
    // What is read where it lies is whole registers.
    let whole = |width: usize| width.is_multiple_of(S::LANES);
    let copied = rows >= MANY || !whole(value) || attention.keys.iter().any(|part| !whole(part.width));
    let padded = width.next_multiple_of(S::LANES);
    let queries = aligned(&mut scratch.floats, rows * padded);
    gather(task, padded, queries);
    let scores = aligned(&mut scratch.tile, rows * KEYS);
    let copies = aligned(
        &mut scratch.weights,
        if copied { KEYS * (padded + stride) } else { 0 },
    );
    let (keys, values) = copies.split_at_mut(if copied { KEYS * padded } else { 0 });
    let (maxima, sums) = sized(&mut scratch.gathered, 2 * rows).split_at_mut(rows);
    maxima.fill(f32::NEG_INFINITY);
    sums.fill(0.0);

    // Later rows see later keys.
    let seen = attention.visible(task.row(0).0).start..attention.visible(task.row(rows - 1).0).end;
    for base in (seen.start / KEYS * KEYS..seen.end).step_by(KEYS) {
        let first = base.max(seen.start);
        let (count, add) = ((seen.end - first).min(base + KEYS - first), base > seen.start);
        // SAFETY: the instructions are the caller's promise; there are `rows` queries, as wide as a key in whole registers.
        unsafe {
            let (queries, scores) = (Rows::of(queries, padded), &mut scores[first - base..]);
            if copied {
                copy_keys(task, first, count, padded, keys);
                let together = HeadView {
                    data: keys,
                    row: padded,
                    head: 0,
                    width: padded,
                };
                dots::<S, NR, MR>(&[together], (0, 0), rows, queries, count, scores);
            } else {
                let at = (first, task.head());
                dots::<S, NR, MR>(attention.keys, at, rows, queries, count, scores);
            }
        }
        for (index, scores) in scores.as_chunks_mut::<KEYS>().0.iter_mut().enumerate() {
            let visible = attention.visible(task.row(index).0);
            let end = visible.end.min(first + count);
            let visible = visible.start.max(base) - base..end.max(base) - base;
            if visible.is_empty() {
                scores.fill(0.0);
                continue;
            }
            scores[..visible.start].fill(f32::NEG_INFINITY);
            scores[visible.end..].fill(f32::NEG_INFINITY);
            let maximum = lanes(scores, f32::NEG_INFINITY, larger).max(maxima[index]);
            scores.iter_mut().for_each(|score| *score = exp(*score - maximum));
            // `exp` gives a tiny number, not zero, for what is hidden.
            scores[..visible.start].fill(0.0);
            scores[visible.end..].fill(0.0);
            let before = exp(maxima[index] - maximum);
            if add && maximum != maxima[index] {
                out[index * stride..][..value]
                    .iter_mut()
                    .for_each(|v| *v *= before);
            }
            sums[index] = sums[index] * before + lanes(scores, 0.0, |a, b| a + b);
            maxima[index] = maximum;
        }
        // SAFETY: the instructions are the caller's promise; there are `rows` rows of 64 scores, and
        // `count` rows of values, as they lie or packed to whole registers.
        unsafe {
            let (b, columns) = if copied {
                pack_values::<S>(task, first, count, values);
                (Columns::packed::<S>(values, KEYS), stride)
            } else {
                (values_of::<S>(task, first, count), value)
            };
            product::<S, NR, MR>(
                Rows::of(scores, KEYS).skip(0, first - base),
                b,
                (rows, count, columns),
                (out, stride),
                add,
            );
        }
    }
    for (out, sum) in out.chunks_exact_mut(stride).zip(sums) {
        let factor = 1.0 / *sum;
        out[..value].iter_mut().for_each(|v| *v *= factor);
    }
}

/// Elements from one row of a task's output to the next: whole registers of any instruction set.
pub(in crate::cpu) fn out_stride(width: usize) -> usize {
    width.next_multiple_of(16)
}

/// The task's queries, their parts side by side, times the scale; zeros after them, to `width`.
#[inline(always)]
fn gather(task: &Task<'_>, width: usize, queries: &mut [f32]) {
    for (index, mut query) in queries.chunks_exact_mut(width).enumerate() {
        let (i, h) = task.row(index);
        for part in task.attention.queries {
            let (place, rest) = query.split_at_mut(part.width);
            for (place, value) in place.iter_mut().zip(part.get(i, h)) {
                *place = value * task.attention.scale;
            }
            query = rest;
        }
        query.fill(0.0);
    }
}

/// Copies keys one after the other, their parts side by side; zeros after them, to `width`.
#[inline(always)]
fn copy_keys(task: &Task<'_>, first: usize, count: usize, width: usize, to: &mut [f32]) {
    for (t, mut key) in to.chunks_exact_mut(width).take(count).enumerate() {
        for part in task.attention.keys {
            let (place, rest) = key.split_at_mut(part.width);
            place.copy_from_slice(part.get(first + t, task.head()));
            key = rest;
        }
        key.fill(0.0);
    }
}

/// Values as they lie.
fn values_of<S: Simd>(task: &Task<'_>, first: usize, count: usize) -> Columns {
    let (values, h) = (task.attention.values, task.head());
    // The last row is there too: `get` would panic.
    values.get(first + count - 1, h);
    Columns::rows::<S>(values.get(first, h), values.row)
}

/// Copies values: sets of `LANES` columns, in a set a key's after the other's. As they lie, a head's rows may be so far
/// apart that they push each other out of the first-level cache. What is missing to a whole set is zero.
#[inline(always)]
unsafe fn pack_values<S: Simd>(task: &Task<'_>, first: usize, count: usize, to: &mut [f32]) {
    let width = task.attention.values.width;
    for (set, to) in to.chunks_exact_mut(KEYS * S::LANES).enumerate() {
        let columns = (set * S::LANES).min(width)..((set + 1) * S::LANES).min(width);
        for (t, to) in to.chunks_exact_mut(S::LANES).take(count).enumerate() {
            let from = &task.attention.values.get(first + t, task.head())[columns.clone()];
            if from.len() == S::LANES {
                // SAFETY: the instructions are the caller's promise; both are a register long.
                unsafe { S::store(to.as_mut_ptr(), S::load(from.as_ptr())) };
            } else {
                to.fill(0.0);
                to[..from.len()].copy_from_slice(from);
            }
        }
    }
}

/// Scores of all rows with `count` keys, from the row and of the head that `at` says: each query along each key, sums in
/// the lanes of a register.
///
/// # Safety
/// `queries` has `rows` rows, as wide as all parts of a key; these are whole registers.
#[inline(always)]
unsafe fn dots<S: Simd, const NR: usize, const MR: usize>(
    keys: &[HeadView<'_>],
    (first, head): (usize, usize),
    rows: usize,
    queries: Rows,
    count: usize,
    scores: &mut [f32],
) {
    for key in (0..count).step_by(NR) {
        let at = (first + key, head, (count - key).min(NR));
        // SAFETY: as the caller promises.
        passes!(rows, MR, |row, R| unsafe {
            let scores = &mut scores[row * KEYS + key..];
            dots_of::<S, NR, R>(keys, at, queries.skip(row, 0), scores);
        });
    }
}

/// Of `MR` queries with up to `NR` keys, given by the first one, the head and their number.
///
/// # Safety
/// `queries` has `MR` rows, as wide as all parts of a key; these are whole registers.
#[inline(always)]
unsafe fn dots_of<S: Simd, const NR: usize, const MR: usize>(
    keys: &[HeadView<'_>],
    (first, head, count): (usize, usize, usize),
    queries: Rows,
    scores: &mut [f32],
) {
    // SAFETY: the instructions are the caller's promise; `MR` queries are there, as wide as all
    // parts of a key; a part's key is a slice of its width, whole registers.
    unsafe {
        let mut sums = [[S::splat(0.0); NR]; MR];
        let mut query = queries.start;
        for part in keys {
            let mut keys = [part.get(first, head); NR];
            for v in 1..count {
                keys[v] = part.get(first + v, head);
            }
            for k in (0..part.width).step_by(S::LANES) {
                let mut b = [S::splat(0.0); NR];
                for v in 0..NR {
                    b[v] = S::load(keys[v].as_ptr().add(k));
                }
                for i in 0..MR {
                    let a = S::load(query.add(i * queries.stride + k));
                    for v in 0..NR {
                        sums[i][v] = S::fma(a, b[v], sums[i][v]);
                    }
                }
            }
            query = query.add(part.width);
        }
        for (i, sums) in sums.into_iter().enumerate() {
            let sums = S::sums(sums);
            scores[i * KEYS..][..count].copy_from_slice(&sums[..count]);
        }
    }
}

/// The larger one; what is NaN on the left is passed over, and shows in the sum.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Folds a row of scores in sixteen lanes, in an order that a compiler turns into vector instructions.
#[inline(always)]
fn lanes(row: &[f32; KEYS], start: f32, fold: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; 16];
    for part in row.as_chunks::<16>().0 {
        for (lane, value) in lanes.iter_mut().zip(part) {
            *lane = fold(*value, *lane);
        }
    }
    lanes.into_iter().fold(start, |all, lane| fold(lane, all))
}
