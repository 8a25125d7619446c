//! The two tile products that all kernels are made of.
//!
//! A tile's rows are decoded into f32 scratch once, then used for every row of activations: with few of
//! them by dot products while the decoded row is in the first-level cache, with many by a matrix product
//! over the decoded tile. Results are written transposed, `[output feature, activation row]`, so that the
//! tiles of a parallel call write to disjoint, contiguous memory; [`transpose`] turns them round.

use crate::fp4::Weight;
use gemm::Parallelism;
use rayon::prelude::*;
use std::ops::Range;

/// Weight rows a tile has: decoded, 64 rows of K = 2048 take 512 KiB, which the second-level cache holds.
pub(super) const ROWS: usize = 64;
/// Columns a tile of a transposed product has: a multiple of every group.
pub(super) const COLUMNS: usize = 128;
/// From this many rows of activations on, a matrix product over the decoded tile is faster.
const MANY: usize = 6;

/// `out[r, i] = Σ_k x[i, k] · w[rows.start + r, k]` for the `m` rows of `x`.
pub(super) fn rows(
    weight: &Weight,
    rows: Range<usize>,
    x: &[f32],
    m: usize,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let k = weight.shape().1;
    debug_assert!(x.len() == m * k && out.len() == rows.len() * m);
    if m < MANY {
        scratch.resize(k, 0.0);
        for (n, sums) in rows.zip(out.chunks_exact_mut(m)) {
            weight.decode_row_part(n, 0, scratch);
            for (sum, x) in sums.iter_mut().zip(x.chunks_exact(k)) {
                *sum = dot(scratch, x);
            }
        }
        return;
    }
    let count = rows.len();
    scratch.resize(count * k, 0.0);
    for (n, row) in rows.zip(scratch.chunks_exact_mut(k)) {
        weight.decode_row_part(n, 0, row);
    }
    product(
        Matrix::rows(scratch, count, k),
        Matrix::rows(x, m, k).transposed(),
        out,
    );
}

/// `out[c, i] = Σ_r x[i, r] · w[rows.start + r, columns.start + c]`: the sum runs over output features.
pub(super) fn columns(
    weight: &Weight,
    rows: Range<usize>,
    columns: Range<usize>,
    x: &[f32],
    m: usize,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let (count, width) = (rows.len(), columns.len());
    debug_assert!(x.len() == m * count && out.len() == width * m);
    scratch.resize(count * width, 0.0);
    for (n, row) in rows.zip(scratch.chunks_exact_mut(width)) {
        weight.decode_row_part(n, columns.start, row);
    }
    product(
        Matrix::rows(scratch, count, width).transposed(),
        Matrix::rows(x, m, count).transposed(),
        out,
    );
}

/// The sum over k of `a[k] · b[k]`, in sixteen partial sums that a compiler keeps in vector registers.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_blocks
        .remainder()
        .iter()
        .zip(b_blocks.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0] + rest
}

/// A view of a matrix; `transposed` swaps the strides.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    shape: (usize, usize),
    strides: (isize, isize),
}

impl<'a> Matrix<'a> {
    fn rows(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns);
        Self {
            data,
            shape: (rows, columns),
            strides: (columns as isize, 1),
        }
    }

    fn transposed(self) -> Self {
        Self {
            data: self.data,
            shape: (self.shape.1, self.shape.0),
            strides: (self.strides.1, self.strides.0),
        }
    }
}

/// `out = a · b`, row-major, on this thread.
fn product(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32]) {
    let ((m, k), (inner, n)) = (a.shape, b.shape);
    assert!(k == inner && out.len() == m * n);
    // SAFETY: `Matrix` is built over a slice of exactly rows · columns elements with the strides that reach
    // each of them once, in either orientation; `out` was checked to hold m · n elements and is borrowed
    // mutably, so that it overlaps neither operand. With `read_dst` false `out` is only written.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.data.as_ptr(),
            a.strides.1,
            a.strides.0,
            b.data.as_ptr(),
            b.strides.1,
            b.strides.0,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `[rows, columns]` to `[columns, rows]`.
pub(super) fn transpose(values: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    if rows == 1 || columns == 1 {
        return values;
    }
    let mut out = vec![0.0; values.len()];
    out.par_chunks_exact_mut(rows)
        .enumerate()
        .for_each(|(column, line)| {
            for (value, row) in line.iter_mut().zip(values.chunks_exact(columns)) {
                *value = row[column];
            }
        });
    out
}
