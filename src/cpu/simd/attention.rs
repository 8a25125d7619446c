//! The inner loops of attention, once for all instruction sets.

use super::elementwise::exp;
use super::product::{Columns, Rows, aligned, passes, product, transpose};
use super::{Order, Scratch, Simd, sized};
use crate::cpu::attention::Task;

/// Keys that are taken at a time.
const KEYS: usize = 64;
/// Up to so many rows, transposing keys costs more than adding up the lanes of dot products.
const FEW: usize = 16;

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
    let few = rows <= FEW && task.order == Order::Fastest;
    let queries = aligned(&mut scratch.floats, rows * width);
    gather(task, width, queries);
    // The last register of a row that begins within a block may reach into the next one's hidden places.
    let scores = aligned(&mut scratch.tile, rows * KEYS + 16);
    let packed = aligned(
        &mut scratch.weights,
        if few { 0 } else { KEYS * (width + stride) },
    );
    let (keys, values) = packed.split_at_mut(if few { 0 } else { KEYS * width });
    let (maxima, sums) = sized(&mut scratch.gathered, 2 * rows).split_at_mut(rows);
    maxima.fill(f32::NEG_INFINITY);
    sums.fill(0.0);

    // Later rows see later keys.
    let seen = attention.visible(task.row(0).0).start..attention.visible(task.row(rows - 1).0).end;
    // Blocks begin at multiples of their size, whichever rows the task has.
    for base in (seen.start / KEYS * KEYS..seen.end).step_by(KEYS) {
        let first = base.max(seen.start);
        let (count, add) = ((seen.end - first).min(base + KEYS - first), base > seen.start);
        // SAFETY: the instructions are the caller's promise; there are `rows` queries of
        // `width`, and that many keys have been packed, to whole registers.
        unsafe {
            let (a, scores) = (Rows::of(queries, width), &mut scores[first - base..]);
            if few {
                dots::<S, NR, MR>(task, a, first, count, scores);
            } else {
                pack_keys::<S>(task, first, count, width, keys);
                let b = Columns::packed::<S>(keys, width);
                let columns = count.div_ceil(S::LANES) * S::LANES;
                product::<S, NR, MR>(a, b, (rows, width, columns), (scores, KEYS), false);
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
            let (b, columns) = if few {
                (values_of::<S>(task, first, count), value)
            } else {
                pack_values::<S>(task, first, count, values);
                (Columns::packed::<S>(values, KEYS), stride)
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

/// The task's queries, their parts side by side, times the scale.
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
    }
}

/// Transposes keys: sets of `LANES` of them, in a set an element of all keys after the other. What is missing to a whole
/// set is the last key again.
#[inline(always)]
unsafe fn pack_keys<S: Simd>(task: &Task<'_>, first: usize, count: usize, width: usize, to: &mut [f32]) {
    let h = task.head();
    let sets = to
        .chunks_exact_mut(width * S::LANES)
        .take(count.div_ceil(S::LANES));
    for (set, mut to) in sets.enumerate() {
        for part in task.attention.keys {
            let mut keys = [part.get(first, h); 16];
            for (lane, key) in keys[..S::LANES].iter_mut().enumerate() {
                *key = part.get(first + (set * S::LANES + lane).min(count - 1), h);
            }
            let (place, rest) = to.split_at_mut(part.width * S::LANES);
            // SAFETY: the instructions are the caller's promise.
            unsafe { transpose::<S>(keys, place) };
            to = rest;
        }
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

/// Scores of few rows: each query along each key as it lies, sums in the lanes of a register.
///
/// # Safety
/// `queries` has a row for each of the task.
#[inline(always)]
unsafe fn dots<S: Simd, const NR: usize, const MR: usize>(
    task: &Task<'_>,
    queries: Rows,
    first: usize,
    count: usize,
    scores: &mut [f32],
) {
    for key in (0..count).step_by(NR) {
        let keys = (first + key, (count - key).min(NR));
        // SAFETY: the instructions are the caller's promise; `queries` has a row for each of
        // the task.
        passes!(task.len(), MR, |row, R| unsafe {
            let scores = &mut scores[row * KEYS + key..];
            dots_of::<S, NR, R>(task, queries.skip(row, 0), keys, scores);
        });
    }
}

/// Of `MR` queries with up to `NR` keys, given by the first one and their number.
///
/// # Safety
/// `queries` has `MR` rows, as wide as all parts of a key.
#[inline(always)]
unsafe fn dots_of<S: Simd, const NR: usize, const MR: usize>(
    task: &Task<'_>,
    queries: Rows,
    (first, count): (usize, usize),
    scores: &mut [f32],
) {
    // SAFETY: the instructions are the caller's promise; `MR` queries are there, as wide as all
    // parts of a key; a part's key is a slice of its width.
    unsafe {
        let mut sums = [[S::splat(0.0); NR]; MR];
        let mut rests = [[0f32; NR]; MR];
        let mut query = queries.start;
        for part in task.attention.keys {
            let mut keys = [part.get(first, task.head()); NR];
            for v in 1..count.min(NR) {
                keys[v] = part.get(first + v, task.head());
            }
            let whole = part.width / S::LANES * S::LANES;
            for k in (0..whole).step_by(S::LANES) {
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
            for k in whole..part.width {
                for (i, rests) in rests.iter_mut().enumerate() {
                    for (rest, key) in rests.iter_mut().zip(keys) {
                        *rest += *query.add(i * queries.stride + k) * key[k];
                    }
                }
            }
            query = query.add(part.width);
        }
        for (i, (sums, rests)) in sums.into_iter().zip(rests).enumerate() {
            let scores = &mut scores[i * KEYS..][..count];
            for (score, (sum, rest)) in scores.iter_mut().zip(sums.into_iter().zip(rests)) {
                *score = S::sum(sum) + rest;
            }
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
