//! Products with a part of a weight a head: MLA's `kv_b`, whose rows hold keys and values of all heads.

use super::tile;
use crate::fp4::Weight;
use rayon::prelude::*;

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
/// If the rows do not fit the weight or `x` is not `m · heads · K` long.
pub fn per_head(weight: &Weight, rows: HeadRows, x: &[f32], m: usize) -> Vec<f32> {
    let (n, k) = weight.shape();
    assert!(rows.fit(n) && x.len() == m * rows.heads * k, "per_head");
    if m == 0 {
        return Vec::new();
    }
    let x = by_head(x, m, rows.heads, k);
    let mut out = vec![0.0; rows.heads * rows.len * m];
    let tiles = rows.len.div_ceil(tile::ROWS);
    let mut chunks = Vec::with_capacity(rows.heads * tiles);
    for head in out.chunks_exact_mut(rows.len * m) {
        chunks.extend(head.chunks_mut(tile::ROWS * m));
    }
    chunks
        .into_par_iter()
        .enumerate()
        .for_each_init(Vec::new, |scratch, (index, out)| {
            let (h, start) = (
                index / tiles,
                rows.first(index / tiles) + index % tiles * tile::ROWS,
            );
            tile::rows(
                weight,
                start..start + out.len() / m,
                &x[h * m * k..][..m * k],
                m,
                out,
                scratch,
            );
        });
    tile::transpose(out, rows.heads * rows.len, m)
}

/// `y[i, h, k] = Σ_r x[i, h, r] · w[first(h) + r, k]`, the sum over output features, with scales along K:
/// `x` is `[m, heads, len]`, `y` `[m, heads, K]`. With one head this is `x · W`.
///
/// # Panics
/// If the rows do not fit the weight or `x` is not `m · heads · len` long.
pub fn per_head_transposed(weight: &Weight, rows: HeadRows, x: &[f32], m: usize) -> Vec<f32> {
    let (n, k) = weight.shape();
    assert!(
        rows.fit(n) && x.len() == m * rows.heads * rows.len,
        "per_head_transposed"
    );
    if m == 0 {
        return Vec::new();
    }
    let x = by_head(x, m, rows.heads, rows.len);
    let mut out = vec![0.0; rows.heads * k * m];
    let tiles = k.div_ceil(tile::COLUMNS);
    let mut chunks = Vec::with_capacity(rows.heads * tiles);
    for head in out.chunks_exact_mut(k * m) {
        chunks.extend(head.chunks_mut(tile::COLUMNS * m));
    }
    chunks
        .into_par_iter()
        .enumerate()
        .for_each_init(Vec::new, |scratch, (index, out)| {
            let (h, first) = (index / tiles, rows.first(index / tiles));
            let start = index % tiles * tile::COLUMNS;
            let columns = start..start + out.len() / m;
            let x = &x[h * m * rows.len..][..m * rows.len];
            tile::columns(weight, first..first + rows.len, columns, x, m, out, scratch);
        });
    tile::transpose(out, rows.heads * k, m)
}

/// `[m, heads, width]` to `[heads, m, width]`.
fn by_head(x: &[f32], m: usize, heads: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for h in 0..heads {
        for i in 0..m {
            out.extend_from_slice(&x[(i * heads + h) * width..][..width]);
        }
    }
    out
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

    #[test]
    fn both_orientations_agree_with_the_reference() {
        for weight in weights(&[192], &[128, 384]) {
            let k = weight.shape().1;
            for rows in LAYOUTS {
                for m in ROWS {
                    let what = format!("{weight:?}, {rows:?}, m = {m}");
                    let x = noise(m * rows.heads * k, m as u64);
                    assert_close(
                        &per_head(&weight, rows, &x, m),
                        &reference::per_head(&weight, rows, &x, m),
                        &what,
                    );
                    let x = noise(m * rows.heads * rows.len, m as u64);
                    assert_close(
                        &per_head_transposed(&weight, rows, &x, m),
                        &reference::per_head_transposed(&weight, rows, &x, m),
                        &what,
                    );
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for weight in weights(&[192], &[384]) {
            for m in [1, 9] {
                let x = noise(m * 4 * 384, 2);
                assert_same_bits_for_any_threads(|| per_head(&weight, LAYOUTS[0], &x, m));
                let x = noise(m * 192, 2);
                assert_same_bits_for_any_threads(|| per_head_transposed(&weight, LAYOUTS[2], &x, m));
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
