//! Root mean square normalisation.

use super::Executor;
use super::tile::SharedSlice;

/// From so many elements on, norms are work for all threads.
const TOGETHER: usize = 1 << 15;
/// Rows of a task.
const A_TASK: usize = 16;

/// `y[i] = x[i] / √(mean(x[i]²) + eps) · weight`: row `i` of `x` begins at `i · stride` and is as long as `weight`, as
/// are those of `y`, which lie one after the other.
///
/// # Panics
/// If `weight` is empty, `y` has no whole number of rows or `x` is shorter than they are.
pub fn rms_norm(executor: &Executor, x: &[f32], stride: usize, weight: &[f32], eps: f32, y: &mut [f32]) {
    let d = weight.len();
    assert!(d > 0 && y.len().is_multiple_of(d), "rms_norm: y");
    let rows = y.len() / d;
    if rows == 0 {
        return;
    }
    assert!(x.len() >= (rows - 1) * stride + d, "rms_norm: x");
    let len = y.len();
    let y = SharedSlice::new(y);
    let row = |i: usize| {
        // SAFETY: row i: no other task's.
        let y = unsafe { y.part(i * d..(i + 1) * d) };
        norm_row(&x[i * stride..][..d], weight, eps, y);
    };
    match len < TOGETHER {
        true => (0..rows).for_each(row),
        false => executor.run(rows.div_ceil(A_TASK), |task| {
            (task * A_TASK..((task + 1) * A_TASK).min(rows)).for_each(row);
        }),
    }
}

/// One row: the same bits wherever it is computed.
pub(super) fn norm_row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let factor = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = x * factor * weight;
    }
}

/// In sixteen lanes, an order that a compiler turns into vector instructions.
fn sum_of_squares(x: &[f32]) -> f32 {
    let (parts, rest) = x.as_chunks::<16>();
    let mut lanes = [0f32; 16];
    for part in parts {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane += x * x;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{reference, testing::*};

    fn run(executor: &Executor, x: &[f32], stride: usize, weight: &[f32], rows: usize) -> Vec<f32> {
        let mut y = vec![f32::NAN; rows * weight.len()];
        rms_norm(executor, x, stride, weight, 1e-5, &mut y);
        y
    }

    #[test]
    fn agrees_with_the_reference() {
        for d in [1, 15, 16, 17, 128, 2048] {
            for rows in ROWS {
                for stride in [d, d + 3] {
                    for factor in [1.0, 1e-4, 1e15] {
                        let x: Vec<f32> = noise(rows * stride, 1).iter().map(|v| v * factor).collect();
                        let weight = noise(d, 2);
                        let together: Vec<f32> =
                            x.chunks(stride).flat_map(|row| &row[..d]).copied().collect();
                        let expected = reference::rms_norm(&together, &weight, 1e-5);
                        for executor in executors() {
                            let what = format!("{rows} rows of {d}, {stride} apart, times {factor}");
                            assert_close(&run(executor, &x, stride, &weight, rows), &expected, &what);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nan_stays_visible_in_its_row() {
        let mut x = noise(3 * 40, 1);
        x[50] = f32::NAN;
        for executor in executors() {
            let y = run(executor, &x, 40, &noise(40, 2), 3);
            assert!(y[40..80].iter().all(|v| v.is_nan()));
            assert!(y[..40].iter().chain(&y[80..]).all(|v| v.is_finite()));
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (x, weight) = (noise(1000 * 70, 1), noise(64, 2));
        assert_same_bits_for_any_threads(|executor| run(executor, &x, 70, &weight, 1000));
    }
}
