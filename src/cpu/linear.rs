//! `y = x · Wᵀ`.

use super::simd::Selection;
use super::tile::{self, Activations, SharedSlice};
use super::{Arithmetic, Executor};
use crate::fp4::Weight;

/// `y[i, n] = Σ_k x[i, k] · w[n, k]` for `x` of `m` rows and the rows of all `weights`, one weight's after the
/// other's: `out` is `[m, ΣN]`, row-major. Projections of the same input run in one parallel region this way.
///
/// # Panics
/// If the weights' K differ, `x` is not `m · K` long, or `out` not `m · ΣN`.
pub fn linear(executor: &Executor, weights: &[&Weight], x: &[f32], arithmetic: Arithmetic, out: &mut [f32]) {
    let k = weights[0].shape().1;
    let n: usize = weights.iter().map(|weight| weight.shape().0).sum();
    let m = x.len() / k;
    assert!(weights.iter().all(|weight| weight.shape().1 == k), "weights");
    assert!(x.len() == m * k && out.len() == m * n, "activations");
    if m == 0 {
        return;
    }
    let mut memory = tile::take_blocks(0);
    let rounded = weights.iter().any(|weight| tile::rounds(weight, arithmetic));
    let x = Activations {
        values: x,
        rounded: rounded.then(|| tile::round(executor, x, k, &mut memory)),
    };
    let all = Selection::Every {
        first: 0,
        step: 1,
        count: m,
    };
    let tiles: usize = weights.iter().map(|weight| tile::count(weight.shape().0)).sum();
    let out = SharedSlice::new(out);
    executor.run(tiles, |mut index| {
        let mut first = 0;
        for weight in weights {
            let rows = weight.shape().0;
            if index < tile::count(rows) {
                let tile = tile::range(rows, index);
                return tile::with_scratch(|scratch| {
                    tile::placed(executor, weight, tile.clone(), x, all, scratch, |i, values| {
                        let start = i * n + first + tile.start;
                        // SAFETY: row i, this tile's columns: no other tile's.
                        let place = unsafe { out.part(start..start + values.len()) };
                        place.copy_from_slice(values);
                    });
                });
            }
            index -= tile::count(rows);
            first += rows;
        }
    });
    tile::give_blocks(0, memory);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{reference, testing::*};
    use crate::fp4::{Bytes, DenseTensor, FloatKind, Int8Tensor};

    fn run(executor: &Executor, weight: &Weight, x: &[f32], arithmetic: Arithmetic) -> Vec<f32> {
        let (n, k) = weight.shape();
        let mut y = vec![f32::NAN; x.len() / k * n];
        linear(executor, &[weight], x, arithmetic, &mut y);
        y
    }

    fn check(weight: &Weight, x: &[f32], what: &str) {
        let m = x.len() / weight.shape().1;
        for arithmetic in ARITHMETICS {
            let expected = reference::linear(weight, x, m, arithmetic);
            for executor in executors() {
                let what = format!("{weight:?}, m = {m}, {arithmetic:?}, {:?}{what}", executor.isa());
                assert_close(&run(executor, weight, x, arithmetic), &expected, &what);
            }
        }
    }

    #[test]
    fn agrees_with_the_reference_over_the_grid() {
        for weight in weights(&[1, 7, 8, 9, 63, 65, 130], &[128, 384]) {
            for m in ROWS {
                check(&weight, &noise(m * weight.shape().1, m as u64), "");
            }
        }
    }

    #[test]
    fn k_that_ends_within_a_block() {
        for weight in weights(&[5, 66], &[16, 32, 48, 64, 144, 160, 192, 368]) {
            for m in [1, 2, 7, 17] {
                check(&weight, &noise(m * weight.shape().1, m as u64), "");
            }
        }
    }

    #[test]
    fn large_tiny_and_single_values() {
        for weight in weights(&[65], &[256]) {
            for m in [1, 3] {
                let plain = noise(m * 256, 5);
                for factor in [1e30, 1e-30, 1e-36] {
                    let x: Vec<f32> = plain.iter().map(|v| v * factor).collect();
                    check(&weight, &x, &format!(", times {factor}"));
                }
                let mut outlier = plain.clone();
                outlier[7] = 3e5;
                check(&weight, &outlier, ", one outlier");
                check(&weight, &vec![0.0; m * 256], ", zeros");
            }
        }
    }

    #[test]
    fn rounding_activations_costs_little() {
        for weight in weights(&[130], &[512]) {
            let x = noise(9 * 512, 4);
            let exact = reference::linear(&weight, &x, 9, Arithmetic::Exact);
            for executor in executors() {
                let error = nmse(&run(executor, &weight, &x, Arithmetic::W4A8), &exact);
                assert!(error < 5e-4, "{weight:?}: {error}");
            }
        }
    }

    /// Where sixteen bits took two products of an unsigned and a signed byte, they would overflow.
    #[test]
    fn the_largest_products_fit() {
        let one = |n, k| {
            let bytes = Bytes::copy_from(&1f32.to_le_bytes().repeat(n * k)).unwrap();
            DenseTensor::new("w", (n, k), FloatKind::F32, bytes).unwrap()
        };
        let weight = Weight::from(Int8Tensor::round("w", &one(3, 256)).unwrap());
        for sign in [1.0, -1.0] {
            for m in [1, 5] {
                for executor in executors() {
                    let y = run(executor, &weight, &vec![sign; m * 256], Arithmetic::W4A8);
                    let isa = executor.isa();
                    assert!(
                        y.iter().all(|y| (y - sign * 256.0).abs() < 1e-3),
                        "{isa:?}: {y:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn several_weights_stand_side_by_side() {
        let all = weights(&[65, 9], &[128]);
        for arithmetic in ARITHMETICS {
            for executor in executors() {
                for m in [1, 4] {
                    let x = noise(m * 128, 3);
                    let n: usize = all.iter().map(|w| w.shape().0).sum();
                    let mut y = vec![f32::NAN; m * n];
                    linear(executor, &all.iter().collect::<Vec<_>>(), &x, arithmetic, &mut y);
                    for (i, row) in y.chunks_exact(n).enumerate() {
                        let alone = all
                            .iter()
                            .flat_map(|w| run(executor, w, &x[i * 128..][..128], arithmetic));
                        assert_close(row, &alone.collect::<Vec<_>>(), "side by side");
                    }
                }
            }
        }
    }

    #[test]
    fn nan_and_infinity_stay_visible() {
        for weight in weights(&[9], &[128]) {
            for arithmetic in ARITHMETICS {
                for executor in executors() {
                    for m in [1, 17] {
                        let mut x = noise(m * 128, 3);
                        x[5] = f32::NAN;
                        if m > 1 {
                            x[130] = f32::INFINITY;
                        }
                        let y = run(executor, &weight, &x, arithmetic);
                        assert!(y[..9].iter().all(|v| v.is_nan()));
                        assert!(m == 1 || y[9..18].iter().all(|v| !v.is_finite()));
                        assert!(m == 1 || y[18..].iter().all(|v| v.is_finite()));
                    }
                    assert!(run(executor, &weight, &[], arithmetic).is_empty());
                }
            }
        }
    }

    #[test]
    fn a_row_gives_the_same_bits_alone_and_among_many() {
        for weight in weights(&[5, 70], &[128, 144, 368, 1280]) {
            let k = weight.shape().1;
            let x = noise(66 * k, 3);
            for arithmetic in ARITHMETICS {
                for executor in executors().iter().map(|executor| executor.uniform()) {
                    let whole = run(&executor, &weight, &x, arithmetic);
                    for ranges in cuts(66) {
                        let part = |rows: &std::ops::Range<usize>| &x[rows.start * k..rows.end * k];
                        let cut: Vec<_> = ranges
                            .iter()
                            .flat_map(|rows| run(&executor, &weight, part(rows), arithmetic))
                            .collect();
                        let what = format!(
                            "{weight:?}, {arithmetic:?}, {:?}: {:?}",
                            executor.isa(),
                            ranges[0]
                        );
                        assert_same_bits(&cut, &whole, &what);
                    }
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for weight in weights(&[300], &[256]) {
            for arithmetic in ARITHMETICS {
                for m in [1, 5, 33] {
                    let x = noise(m * 256, 9);
                    assert_same_bits_for_any_threads(|executor| run(executor, &weight, &x, arithmetic));
                }
            }
        }
    }
}
