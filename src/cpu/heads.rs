//! Products with a part of a weight a head: MLA's `kv_b`, whose rows hold keys and values of all heads.

use super::simd::{COLUMNS, Selection, sized};
use super::tile::{self, Activations, SharedSlice};
use super::{Arithmetic, Executor};
use crate::fp4::Weight;

/// Which rows of a weight belong to a head: head `h` owns `h · stride + start .. + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRows {
    /// Heads.
    pub heads: usize,
    /// Rows from one head to the next.
    pub stride: usize,
    /// The first row within a head's.
    pub start: usize,
    /// Rows a head.
    pub len: usize,
}

impl HeadRows {
    /// The first row of head `h`.
    #[inline]
    pub fn first(&self, h: usize) -> usize {
        h * self.stride + self.start
    }

    /// Whether all rows exist in a weight of `n` rows.
    pub(crate) fn fit(&self, n: usize) -> bool {
        self.heads > 0
            && self.len > 0
            && self
                .start
                .checked_add(self.len)
                .is_some_and(|end| end <= self.stride)
            && self.heads.checked_mul(self.stride).is_some_and(|rows| rows <= n)
    }
}

/// `y[i, h, r] = Σ_k x[i, h, k] · w[first(h) + r, k]`: `x` is `[m, heads, K]`, `y` `[m, heads, len]`.
///
/// # Panics
/// If the rows do not fit the weight, or `x` or `y` has another length.
pub fn per_head(
    executor: &Executor,
    weight: &Weight,
    rows: HeadRows,
    x: &[f32],
    arithmetic: Arithmetic,
    y: &mut [f32],
) {
    let (n, k) = weight.shape();
    let HeadRows { heads, len, .. } = rows;
    let m = x.len() / (heads * k);
    assert!(
        rows.fit(n) && x.len() == m * heads * k && y.len() == m * heads * len,
        "per_head"
    );
    if m == 0 {
        return;
    }
    let mut memory = tile::take_blocks(0);
    let x = Activations {
        values: x,
        rounded: tile::rounds(weight, arithmetic).then(|| tile::round(executor, x, k, &mut memory)),
    };
    let y = SharedSlice::new(y);
    let tiles = tile::count(len);
    executor.run(heads * tiles, |index| {
        let (h, tile) = (index / tiles, tile::range(len, index % tiles));
        let weight_rows = rows.first(h) + tile.start..rows.first(h) + tile.end;
        let selection = head(h, heads, m);
        tile::with_scratch(|scratch| {
            tile::placed(
                executor,
                weight,
                weight_rows,
                x,
                selection,
                scratch,
                |i, values| {
                    let start = (i * heads + h) * len + tile.start;
                    // SAFETY: row i, head h, this tile's columns: no other task's.
                    unsafe { y.part(start..start + values.len()) }.copy_from_slice(values);
                },
            );
        });
    });
    tile::give_blocks(0, memory);
}

/// `y[i, h, k] = Σ_r x[i, h, r] · w[first(h) + r, k]`, the sum over output features, with scales along K:
/// `x` is `[m, heads, len]`, `y` `[m, heads, K]`. With one head this is `x · W`. Activations are f32 in any
/// arithmetic: what could be rounded together here does not share a scale.
///
/// # Panics
/// If the rows do not fit the weight, or `x` or `y` has another length.
pub fn per_head_transposed(executor: &Executor, weight: &Weight, rows: HeadRows, x: &[f32], y: &mut [f32]) {
    let (n, k) = weight.shape();
    let HeadRows { heads, len, .. } = rows;
    let m = x.len() / (heads * len);
    assert!(
        rows.fit(n) && x.len() == m * heads * len && y.len() == m * heads * k,
        "per_head_transposed"
    );
    if m == 0 {
        return;
    }
    let y = SharedSlice::new(y);
    let columns = executor.kernels().columns;
    let tiles = k.div_ceil(COLUMNS);
    executor.run(heads * tiles, |index| {
        let (h, start) = (index / tiles, index % tiles * COLUMNS);
        let range = start..(start + COLUMNS).min(k);
        let weight_rows = rows.first(h)..rows.first(h) + len;
        tile::with_scratch(|scratch| {
            let mut tile = std::mem::take(&mut scratch.tile);
            let out = sized(&mut tile, m * range.len());
            // SAFETY: the executor has checked the instructions.
            unsafe {
                columns(
                    weight,
                    weight_rows,
                    range.clone(),
                    x,
                    head(h, heads, m),
                    out,
                    scratch,
                )
            };
            for (i, values) in out.chunks_exact(range.len()).enumerate() {
                let start = (i * heads + h) * k + range.start;
                // SAFETY: row i, head h, these columns: no other task's.
                let place = unsafe { y.part(start..start + range.len()) };
                place.copy_from_slice(values);
            }
            scratch.tile = tile;
        });
    });
}

/// The rows of head `h` among `[m, heads]` of them.
fn head(h: usize, heads: usize, m: usize) -> Selection<'static> {
    Selection::Every {
        first: h,
        step: heads,
        count: m,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{reference, testing::*};

    const LAYOUTS: [HeadRows; 4] = [
        HeadRows {
            heads: 4,
            stride: 48,
            start: 0,
            len: 32,
        },
        HeadRows {
            heads: 4,
            stride: 48,
            start: 32,
            len: 16,
        },
        HeadRows {
            heads: 1,
            stride: 192,
            start: 0,
            len: 192,
        },
        HeadRows {
            heads: 3,
            stride: 64,
            start: 1,
            len: 63,
        },
    ];

    fn ordinary(
        executor: &Executor,
        weight: &Weight,
        rows: HeadRows,
        x: &[f32],
        arithmetic: Arithmetic,
    ) -> Vec<f32> {
        let m = x.len() / (rows.heads * weight.shape().1);
        let mut y = vec![f32::NAN; m * rows.heads * rows.len];
        per_head(executor, weight, rows, x, arithmetic, &mut y);
        y
    }

    fn transposed(executor: &Executor, weight: &Weight, rows: HeadRows, x: &[f32]) -> Vec<f32> {
        let m = x.len() / (rows.heads * rows.len);
        let mut y = vec![f32::NAN; m * rows.heads * weight.shape().1];
        per_head_transposed(executor, weight, rows, x, &mut y);
        y
    }

    #[test]
    fn both_orientations_agree_with_the_reference() {
        for weight in weights(&[192], &[128, 336]) {
            let k = weight.shape().1;
            for rows in LAYOUTS {
                for m in ROWS {
                    let what = format!("{weight:?}, {rows:?}, m = {m}");
                    let x = noise(m * rows.heads * k, m as u64);
                    for arithmetic in ARITHMETICS {
                        let expected = reference::per_head(&weight, rows, &x, m, arithmetic);
                        for executor in executors() {
                            assert_close(
                                &ordinary(executor, &weight, rows, &x, arithmetic),
                                &expected,
                                &what,
                            );
                        }
                    }
                    let x = noise(m * rows.heads * rows.len, m as u64);
                    let expected = reference::per_head_transposed(&weight, rows, &x, m);
                    for executor in executors() {
                        assert_close(&transposed(executor, &weight, rows, &x), &expected, &what);
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_gives_the_same_bits_alone_and_among_many() {
        for weight in weights(&[192], &[128, 336, 512]) {
            let k = weight.shape().1;
            for rows in LAYOUTS {
                for executor in executors().iter().map(|executor| executor.uniform()) {
                    let what = |cut: usize| format!("{weight:?}, {rows:?}, {:?}: {cut} rows", executor.isa());
                    let cut = |x: &[f32], width: usize, f: &dyn Fn(&[f32]) -> Vec<f32>| {
                        let whole = f(x);
                        for ranges in cuts(19) {
                            let part =
                                |rows: &std::ops::Range<usize>| &x[rows.start * width..rows.end * width];
                            let cut: Vec<_> = ranges.iter().flat_map(|rows| f(part(rows))).collect();
                            assert_same_bits(&cut, &whole, &what(ranges[0].len()));
                        }
                    };
                    let x = noise(19 * rows.heads * k, 5);
                    for arithmetic in ARITHMETICS {
                        cut(&x, rows.heads * k, &|x| {
                            ordinary(&executor, &weight, rows, x, arithmetic)
                        });
                    }
                    let x = noise(19 * rows.heads * rows.len, 6);
                    cut(&x, rows.heads * rows.len, &|x| {
                        transposed(&executor, &weight, rows, x)
                    });
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for weight in weights(&[192], &[384]) {
            for m in [1, 9] {
                let x = noise(m * 4 * 384, 2);
                for arithmetic in ARITHMETICS {
                    assert_same_bits_for_any_threads(|e| ordinary(e, &weight, LAYOUTS[0], &x, arithmetic));
                }
                let x = noise(m * 192, 2);
                assert_same_bits_for_any_threads(|e| transposed(e, &weight, LAYOUTS[2], &x));
            }
        }
    }

    #[test]
    fn rows_outside_the_weight_do_not_fit() {
        assert!(LAYOUTS.iter().all(|rows| rows.fit(192)));
        assert!(
            !HeadRows {
                heads: 5,
                ..LAYOUTS[0]
            }
            .fit(192)
        );
        assert!(
            !HeadRows {
                start: 17,
                ..LAYOUTS[0]
            }
            .fit(192)
        );
        assert!(
            !HeadRows {
                start: usize::MAX,
                ..LAYOUTS[0]
            }
            .fit(192)
        );
    }
}
