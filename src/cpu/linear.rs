//! `y = x · Wᵀ`.

use super::tile;
use crate::fp4::Weight;
use rayon::prelude::*;

/// `y[i, n] = Σ_k x[i, k] · w[n, k]` for `x` of `m` rows; `y` is `[m, N]`, row-major.
///
/// # Panics
/// If `x` is not `m · K` long.
pub fn linear(weight: &Weight, x: &[f32], m: usize) -> Vec<f32> {
    let (n, k) = weight.shape();
    assert_eq!(x.len(), m * k, "activations");
    if m == 0 {
        return Vec::new();
    }
    let mut out = vec![0.0; n * m];
    out.par_chunks_mut(tile::ROWS * m)
        .enumerate()
        .for_each_init(Vec::new, |scratch, (index, out)| {
            let start = index * tile::ROWS;
            tile::rows(weight, start..start + out.len() / m, x, m, out, scratch);
        });
    tile::transpose(out, n, m)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{reference, testing::*};

    #[test]
    fn agrees_with_the_reference_over_the_grid() {
        for weight in weights(&[1, 7, 8, 9, 63, 65, 130], &[128, 384]) {
            for m in ROWS {
                let x = noise(m * weight.shape().1, m as u64);
                let expected = reference::linear(&weight, &x, m);
                assert_close(
                    &linear(&weight, &x, m),
                    &expected,
                    &format!("{weight:?}, m = {m}"),
                );
            }
        }
    }

    #[test]
    fn k_smaller_than_a_tile_and_one_outlier() {
        for weight in weights(&[576], &[16, 32, 64]) {
            let mut x = noise(3 * weight.shape().1, 5);
            x[7] = 3e5;
            assert_close(
                &linear(&weight, &x, 3),
                &reference::linear(&weight, &x, 3),
                &format!("{weight:?}"),
            );
        }
    }

    #[test]
    fn nan_and_infinity_stay_visible() {
        for weight in weights(&[9], &[128]) {
            for m in [1, 17] {
                let mut x = noise(m * 128, 3);
                x[5] = f32::NAN;
                if m > 1 {
                    x[130] = f32::INFINITY;
                }
                let y = linear(&weight, &x, m);
                assert!(y[..9].iter().all(|v| v.is_nan()));
                assert!(m == 1 || y[9..18].iter().all(|v| !v.is_finite()));
                assert!(m == 1 || y[18..].iter().all(|v| v.is_finite()));
            }
        }
        assert!(linear(&weights(&[9], &[128])[0], &[], 0).is_empty());
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for weight in weights(&[300], &[256]) {
            for m in [1, 5, 33] {
                let x = noise(m * 256, 9);
                assert_same_bits_for_any_threads(|| linear(&weight, &x, m));
            }
        }
    }
}
