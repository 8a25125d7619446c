//! Matrix products in f32 on one thread, without memory of their own.
//!
//! The left side is broadcast element by element, the right side read in registers of columns; a tile of sums stays in
//! registers. Sums run in an order that depends on nothing but the shapes.

use super::{Selection, Simd, sized};

/// `len` elements that begin at a multiple of 64 bytes, so that no register is loaded from two cache lines.
#[inline(always)]
pub(in crate::cpu) fn aligned(memory: &mut Vec<f32>, len: usize) -> &mut [f32] {
    let all = sized(memory, len + 15);
    let skip = all.as_ptr().align_offset(64).min(15);
    &mut all[skip..][..len]
}

/// Calls `$work::<.., R>` for passes of `R` rows, from 1 to `MR`, which together are all rows, with the first row of each.
/// Passes are of nearly equal size: one row left over would leave most of the processor idle.
macro_rules! passes {
    ($rows:expr, $limit:ident, |$first:ident, $R:ident| $work:expr) => {{
        let rows = $rows;
        let passes = rows.div_ceil($limit);
        for pass in 0..passes {
            let ($first, to) = (pass * rows / passes, (pass + 1) * rows / passes);
            passes!(@match to - $first, $limit, $R, $work, 1 2 3 4 5 6);
        }
    }};
    (@match $count:expr, $limit:ident, $R:ident, $work:expr, $($rows:literal)*) => {
        match $count {
            $($rows if $rows <= $limit => {
                const $R: usize = $rows;
                $work
            })*
            _ => unreachable!("a pass has 1 to {} rows", $limit),
        }
    };
}
pub(super) use passes;

/// The selected rows of `width` elements, one after the other; copied where they do not lie so.
#[inline(always)]
pub(super) fn gather<'a>(
    x: &'a [f32],
    width: usize,
    selection: Selection<'_>,
    memory: &'a mut Vec<f32>,
) -> &'a [f32] {
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

/// The left side of a product: rows `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub start: *const f32,
    pub stride: usize,
}

impl Rows {
    pub fn of(rows: &[f32], stride: usize) -> Self {
        Self {
            start: rows.as_ptr(),
            stride,
        }
    }

    /// From this element on.
    ///
    /// # Safety
    /// It is there.
    pub unsafe fn skip(self, rows: usize, columns: usize) -> Self {
        Self {
            // SAFETY: the caller's promise: an element of this row and column is there.
            start: unsafe { self.start.add(rows * self.stride + columns) },
            ..self
        }
    }
}

/// The right side: rows of registers.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    start: *const f32,
    /// Elements from one row to the next.
    row: usize,
    /// Elements from one register of columns to the next.
    register: usize,
}

impl Columns {
    /// Rows as they lie, `row` elements from one to the next.
    pub fn rows<S: Simd>(rows: &[f32], row: usize) -> Self {
        Self {
            start: rows.as_ptr(),
            row,
            register: S::LANES,
        }
    }

    /// Sets of `rows` registers.
    pub fn packed<S: Simd>(sets: &[f32], rows: usize) -> Self {
        Self {
            start: sets.as_ptr(),
            row: S::LANES,
            register: rows * S::LANES,
        }
    }

    /// From this row of this register on.
    ///
    /// # Safety
    /// It is there.
    pub unsafe fn skip(self, rows: usize, registers: usize) -> Self {
        Self {
            // SAFETY: the caller's promise: this row of this register is there.
            start: unsafe { self.start.add(rows * self.row + registers * self.register) },
            ..self
        }
    }
}

/// Rows of the right side that are taken at a time: 64 columns of them stay in the first-level cache.
const INNER: usize = 128;

/// `out[i, c] = Σ_k a[i, k] · b[k, c]`, or that added to `out`, for a shape of `(rows, inner, columns)`; rows of `out` lie
/// a stride apart.
///
/// # Safety
/// The instructions, and what the shape names of `a` and `b`.
#[inline(always)]
pub(super) unsafe fn product<S: Simd, const NR: usize, const MR: usize>(
    a: Rows,
    b: Columns,
    (rows, inner, columns): (usize, usize, usize),
    (out, stride): (&mut [f32], usize),
    add: bool,
) {
    assert!(columns <= stride && out.len() >= (rows - 1) * stride + columns);
    let registers = columns / S::LANES;
    let whole = registers / NR * NR;
    for start in (0..inner).step_by(INNER) {
        let (inner, add) = ((inner - start).min(INNER), add || start > 0);
        // SAFETY: the instructions are the caller's promise; elements that the shape names are there: on
        // the left and the right by the caller's promise, of `out` as just asserted.
        passes!(rows, MR, |row, R| unsafe {
            let (a, b) = (a.skip(row, start), b.skip(start, 0));
            let out = &mut out[row * stride..];
            for first in (0..whole).step_by(NR) {
                let out = (out[first * S::LANES..].as_mut_ptr(), stride);
                micro::<S, NR, R>(a, b.skip(0, first), inner, out, add);
            }
            for first in whole..registers {
                let out = (out[first * S::LANES..].as_mut_ptr(), stride);
                micro::<S, 1, R>(a, b.skip(0, first), inner, out, add);
            }
        });
    }
    // Columns short of a register, of heads of odd widths.
    for (i, out) in out.chunks_mut(stride).take(rows).enumerate() {
        for (c, out) in (registers * S::LANES..columns).zip(&mut out[registers * S::LANES..columns]) {
            // SAFETY: elements that the shape names are there, as the caller promises.
            let product = |k| unsafe { *a.start.add(i * a.stride + k) * *b.start.add(k * b.row + c) };
            *out = if add { *out } else { 0.0 } + (0..inner).map(product).sum::<f32>();
        }
    }
}

/// `MR` rows of `a` by `NR` registers of `b`, sums in registers.
///
/// # Safety
/// `inner` columns of the rows of `a`, `inner` rows of the registers of `b`, and both of `out`.
#[inline(always)]
unsafe fn micro<S: Simd, const NR: usize, const MR: usize>(
    a: Rows,
    b: Columns,
    inner: usize,
    (out, stride): (*mut f32, usize),
    add: bool,
) {
    // SAFETY: the instructions are the caller's promise; so are `inner` columns of the rows of `a`,
    // `inner` rows of the registers of `b`, and both of `out`.
    unsafe {
        let mut sums = [[S::splat(0.0); NR]; MR];
        if add {
            for i in 0..MR {
                for v in 0..NR {
                    sums[i][v] = S::load(out.add(i * stride + v * S::LANES));
                }
            }
        }
        for k in 0..inner {
            let mut row = [S::splat(0.0); NR];
            for v in 0..NR {
                row[v] = S::load(b.start.add(k * b.row + v * b.register));
            }
            for i in 0..MR {
                let a = S::splat(*a.start.add(i * a.stride + k));
                for v in 0..NR {
                    sums[i][v] = S::fma(a, row[v], sums[i][v]);
                }
            }
        }
        for i in 0..MR {
            for v in 0..NR {
                S::store(out.add(i * stride + v * S::LANES), sums[i][v]);
            }
        }
    }
}

/// `to[k · LANES + lane] = rows[lane][k]` for the first `LANES` of the rows.
#[inline(always)]
pub(super) unsafe fn transpose<S: Simd>(rows: [&[f32]; 16], to: &mut [f32]) {
    let whole = rows[0].len() / 16 * 16;
    assert_eq!(to.len(), rows[0].len() * S::LANES);
    let (wholes, tail) = to.split_at_mut(whole * S::LANES);
    for (step, to) in wholes.chunks_exact_mut(16 * S::LANES).enumerate() {
        let mut pointers = [std::ptr::null(); 16];
        for (pointer, row) in pointers.iter_mut().zip(rows) {
            *pointer = row[step * 16..][..16].as_ptr().cast();
        }
        // SAFETY: the instructions are the caller's promise; each pointer names sixteen elements, `to` is
        // LANES times as long.
        unsafe { S::transpose(&pointers[..S::LANES], to.as_mut_ptr().cast()) };
    }
    for (k, to) in (whole..).zip(tail.chunks_exact_mut(S::LANES)) {
        for (to, row) in to.iter_mut().zip(rows) {
            *to = row[k];
        }
    }
}
