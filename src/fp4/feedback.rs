//! How errors of a matrix's columns are made up for by the columns after them.

use crate::{Error, Result};
use rayon::prelude::*;

/// Columns factorised at a time: rows of so many columns, of a wide layer, stay in the second-level cache.
const PANEL: usize = 64;

/// Equations solved together: each number of the triangle that is read serves so many.
const TOGETHER: usize = 16;

/// What quantising a matrix column by column has to know of the layer's inputs.
///
/// Where inputs `X [T, K]` are at hand, what the layer loses by `Q [N, K]` instead of `W` is the square sum of
/// `X (W - Q)ᵀ`, that is `Σ (W - Q) H (W - Q)ᵀ` over rows with `H = XᵀX`. Factorised, `H = U D Uᵀ` with ones on the diagonal
/// of the upper triangle U, it is `Σ_k D_k · ((W - Q) U)_k²`: if column k is rounded from
/// `W_k + Σ_{i<k} (W_i - Q_i) U_ik` instead of from `W_k`, each column adds nothing but its own rounding error. That is
/// GPTQ (arXiv 2210.17323) in natural order, written as LDLQ (arXiv 2307.13304), which needs no inverse.
///
/// Behind layers that are quantised already, a layer reads `Z [T, K]` where the original model's reads `X`. What it then is
/// to give is still `X Wᵀ`; the weights that come nearest to that, `V = W + W (X - Z)ᵀZ (ZᵀZ)⁻¹`, are rounded in the place of
/// W, with `H = ZᵀZ` (asymmetric calibration, GPTAQ, arXiv 2504.02692).
#[derive(Debug, Clone, PartialEq)]
pub struct Feedback {
    k: usize,
    /// Row k: U_ik of all i, zero from k on.
    carried: Vec<f32>,
    /// Transposed, `(X - Z)ᵀZ H⁻¹`: row k is by how much of each column of W column k of V is more. `None` where X is Z.
    corrected: Option<Vec<f32>>,
}

impl Feedback {
    /// From the second moments `XᵀX` of a layer's inputs, `[K, K]` row-major, of which the upper triangle counts; `name`
    /// appears in errors.
    ///
    /// `damping` times their mean is added to the squares: so much of an unrelated error is assumed in each input, which
    /// keeps few inputs from being trusted too much. Inputs that were always zero carry nothing.
    ///
    /// # Errors
    /// [`Error::Tensor`] where there are not `K·K` numbers, one is not finite, or they are no moments; [`Error::Argument`] for a
    /// damping that is not positive.
    pub fn new(name: &str, k: usize, moments: Vec<f64>, damping: f64) -> Result<Self> {
        Self::behind(name, k, moments, None, damping)
    }

    /// As [`new`](Self::new), of a layer behind quantised ones: `moments` are `ZᵀZ` of the inputs that it has there, and
    /// `drift` is `(X - Z)ᵀZ`, `[K, K]` row-major, with those that it has in the original model. The damping draws the weights
    /// to be rounded towards the original ones.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Tensor`] also for a `drift` of another size, with numbers that are not finite or so large
    /// that what follows from them does not fit F32.
    pub fn drifted(name: &str, k: usize, moments: Vec<f64>, drift: Vec<f64>, damping: f64) -> Result<Self> {
        Self::behind(name, k, moments, Some(drift), damping)
    }

    fn behind(
        name: &str,
        k: usize,
        mut moments: Vec<f64>,
        drift: Option<Vec<f64>>,
        damping: f64,
    ) -> Result<Self> {
        if !(damping > 0.0 && damping.is_finite()) {
            let expected = "a positive number";
            return Err(Error::argument(
                "quantize",
                "damping",
                expected,
                damping.to_string(),
            ));
        }
        if k == 0 || k.checked_mul(k) != Some(moments.len()) {
            let problem = format!("{} moments of {k} inputs: expected their square", moments.len());
            return Err(Error::tensor(name, None, problem));
        }
        if let Some(drift) = &drift
            && (drift.len() != moments.len() || !drift.iter().all(|value| value.is_finite()))
        {
            let problem = format!(
                "{} numbers for the drift of {k} inputs: expected their square, all finite",
                drift.len()
            );
            return Err(Error::tensor(name, None, problem));
        }
        let mean = (0..k).map(|i| moments[i * k + i]).sum::<f64>() / k as f64;
        if !mean.is_finite() || mean < 0.0 {
            let problem =
                format!("the mean square of its calibration inputs is {mean}: expected a number from 0 on");
            return Err(Error::tensor(name, None, problem));
        }
        // Without inputs any error is as bad as another.
        let added = if mean == 0.0 { 1.0 } else { damping * mean };
        for i in 0..k {
            moments[i * k + i] += added;
        }
        let Some(()) = factorise(&mut moments, k) else {
            let problem = "the moments of its calibration inputs cannot be factorised: expected a symmetric matrix of finite \
                           numbers without negative eigenvalues";
            return Err(Error::tensor(name, None, problem));
        };
        let corrected = drift.map(|mut drift| {
            solve(&moments, &mut drift, k);
            let mut transposed = vec![0f32; k * k];
            transposed
                .par_chunks_mut(k)
                .enumerate()
                .for_each(|(column, row)| {
                    for (i, corrected) in row.iter_mut().enumerate() {
                        *corrected = drift[i * k + column] as f32;
                    }
                });
            transposed
        });
        if corrected.iter().flatten().any(|value| !value.is_finite()) {
            let problem = "what its calibration inputs have become tells nothing of what they were: expected corrections that fit F32";
            return Err(Error::tensor(name, None, problem));
        }
        let diagonal: Vec<f64> = (0..k).map(|i| moments[i * k + i]).collect();
        let mut carried = vec![0f32; k * k];
        carried.par_chunks_mut(k).enumerate().for_each(|(column, row)| {
            for (i, carried) in row[..column].iter_mut().enumerate() {
                *carried = (moments[i * k + column] / diagonal[column]) as f32;
            }
        });
        Ok(Self {
            k,
            carried,
            corrected,
        })
    }

    /// The layer's inputs.
    pub fn inputs(&self) -> usize {
        self.k
    }

    /// How much of the error of each of the columns before it column `k` is to make up for.
    pub(super) fn carried(&self, k: usize) -> &[f32] {
        &self.carried[k * self.k..][..k]
    }

    /// How much of each column column `k` is to be more than it is, before anything is rounded.
    pub(super) fn corrected(&self, k: usize) -> Option<&[f32]> {
        Some(&self.corrected.as_ref()?[k * self.k..][..self.k])
    }
}

/// Replaces the upper triangle of a symmetric matrix `[K, K]` by the upper triangle R with `R Rᵀ` = the matrix; `None` where
/// there is none. What is below the diagonal is neither read nor of use afterwards.
///
/// Cholesky's method from the last column to the first, so that all sums run along rows. The number of threads changes
/// nothing: each element is one thread's.
fn factorise(matrix: &mut [f64], k: usize) -> Option<()> {
    let mut end = k;
    while end > 0 {
        let start = end.saturating_sub(PANEL);
        let tails: Vec<f64> = (start..end)
            .flat_map(|row| matrix[row * k + end..(row + 1) * k].iter().copied())
            .collect();
        let tail = |column: usize| &tails[(column - start) * (k - end)..][..k - end];
        matrix[..end * k]
            .par_chunks_mut(k)
            .enumerate()
            .for_each(|(row, values)| {
                for column in start.max(row)..end {
                    values[column] -= dot(&values[end..], tail(column));
                }
            });
        for column in (start..end).rev() {
            let own = matrix[column * k..][..end].to_vec();
            let own = &own[column + 1..];
            let left = matrix[column * k + column] - dot(own, own);
            // Not `left <= 0.0`: NaN is to be found as well.
            if !(left > 0.0 && left.is_finite()) {
                return None;
            }
            let root = left.sqrt();
            matrix[column * k + column] = root;
            for row in start..column {
                let values = &mut matrix[row * k..][..end];
                values[column] = (values[column] - dot(&values[column + 1..], own)) / root;
            }
        }
        let (above, panel) = matrix.split_at_mut(start * k);
        above.par_chunks_mut(k).for_each(|values| {
            for column in (start..end).rev() {
                let own = &panel[(column - start) * k..][..end];
                values[column] =
                    (values[column] - dot(&values[column + 1..end], &own[column + 1..])) / own[column];
            }
        });
        end = start;
    }
    Some(())
}

/// Replaces each row b of a matrix `[K, K]` by the x with `x R Rᵀ = b`, where R is an upper triangle as [`factorise`] leaves it.
fn solve(triangle: &[f64], rows: &mut [f64], k: usize) {
    let row = |i: usize| &triangle[i * k..][..k];
    rows.par_chunks_mut(TOGETHER * k).for_each(|rows| {
        let mut lanes = vec![[0f64; TOGETHER]; k];
        for (lane, values) in rows.chunks_exact(k).enumerate() {
            for (lanes, value) in lanes.iter_mut().zip(values) {
                lanes[lane] = *value;
            }
        }
        // y Rᵀ = b: y_j is what the y after it leave of b_j.
        for j in (0..k).rev() {
            let mut left = lanes[j];
            for (y, &r) in lanes[j + 1..].iter().zip(&row(j)[j + 1..]) {
                for (left, y) in left.iter_mut().zip(y) {
                    *left -= r * y;
                }
            }
            lanes[j] = left.map(|left| left / row(j)[j]);
        }
        // x R = y: each x is taken out of the y after it.
        for j in 0..k {
            let x = lanes[j].map(|y| y / row(j)[j]);
            lanes[j] = x;
            for (y, &r) in lanes[j + 1..].iter_mut().zip(&row(j)[j + 1..]) {
                for (y, x) in y.iter_mut().zip(&x) {
                    *y -= r * x;
                }
            }
        }
        for (lane, values) in rows.chunks_exact_mut(k).enumerate() {
            for (lanes, value) in lanes.iter().zip(values) {
                *value = lanes[lane];
            }
        }
    });
}

/// Eight sums, so that a compiler makes vectors of them.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0f64; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// Moments of inputs that have much in common, `[K, K]`.
    fn moments(k: usize, rows: usize) -> Vec<f64> {
        let mut random = Random::new(1);
        let mut moments = vec![0f64; k * k];
        for _ in 0..rows {
            let common = random.uniform() - 0.5;
            let row: Vec<f64> = (0..k).map(|_| common + random.uniform() - 0.5).collect();
            for (i, a) in row.iter().enumerate() {
                for (j, b) in row.iter().enumerate() {
                    moments[i * k + j] += a * b;
                }
            }
        }
        moments
    }

    #[test]
    fn what_is_carried_leaves_errors_that_have_nothing_to_do_with_each_other() {
        // Less than a panel, one, and some with a rest; the largest with fewer rows than inputs.
        for (k, rows) in [(1, 4), (16, 40), (64, 100), (200, 90)] {
            let before = moments(k, rows);
            let feedback = Feedback::new("w", k, before.clone(), 0.01).unwrap();
            let mean = (0..k).map(|i| before[i * k + i]).sum::<f64>() / k as f64;
            let damped = |i: usize, j: usize| before[i * k + j] + if i == j { 0.01 * mean } else { 0.0 };
            // H = U D Uᵀ: row by row, H U⁻ᵀ = U D has nothing below its diagonal. Solved from the last column on.
            let carried = |i: usize, column: usize| f64::from(feedback.carried(column)[i]);
            for row in (0..k).step_by(1 + k / 8) {
                let mut solved = vec![0f64; k];
                for column in (0..k).rev() {
                    let later: f64 = (column + 1..k).map(|c| solved[c] * carried(column, c)).sum();
                    solved[column] = damped(row, column) - later;
                }
                for (column, value) in solved.iter().enumerate().take(row) {
                    assert!(value.abs() < 1e-4 * mean, "{k}, {row}, {column}: {value}");
                }
                assert!(solved[row] > 0.0, "{k}, {row}: {}", solved[row]);
            }
        }
    }

    #[test]
    fn what_is_corrected_solves_the_normal_equations() {
        // Fewer equations than are solved together, as many, and more with a rest.
        for k in [1, 5, 16, 70] {
            let before = moments(k, 2 * k);
            let mut random = Random::new(3);
            let drift: Vec<f64> = (0..k * k).map(|_| random.uniform() - 0.5).collect();
            let feedback = Feedback::drifted("w", k, before.clone(), drift.clone(), 0.1).unwrap();
            let mean = (0..k).map(|i| before[i * k + i]).sum::<f64>() / k as f64;
            for i in 0..k {
                for j in 0..k {
                    let terms = (0..k).map(|m| {
                        let moment = before[m * k + j] + if m == j { 0.1 * mean } else { 0.0 };
                        f64::from(feedback.corrected(m).unwrap()[i]) * moment
                    });
                    let (found, expected) = (terms.sum::<f64>(), drift[i * k + j]);
                    assert!(
                        (found - expected).abs() < 1e-5,
                        "{k}, {i}, {j}: {found}, {expected}"
                    );
                }
            }
            let plain = Feedback::new("w", k, before, 0.1).unwrap();
            assert!((0..k).all(|column| plain.carried(column) == feedback.carried(column)));
            assert_eq!(plain.corrected(0), None);
        }
    }

    #[test]
    fn inputs_that_have_nothing_in_common_carry_nothing() {
        let diagonal = |values: [f64; 4]| {
            let mut moments = vec![0.0; 16];
            values
                .iter()
                .enumerate()
                .for_each(|(i, value)| moments[5 * i] = *value);
            Feedback::new("w", 4, moments, 0.01).unwrap()
        };
        for values in [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 0.0], [0.0; 4]] {
            let feedback = diagonal(values);
            for k in 0..4 {
                assert!(
                    feedback.carried(k).iter().all(|carried| *carried == 0.0),
                    "{values:?}"
                );
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let before = moments(200, 300);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let drift: Vec<f64> = before.iter().map(|moment| moment.sin()).collect();
            pool.install(|| Feedback::drifted("w", 200, before.clone(), drift, 0.01).unwrap())
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn what_are_no_moments_is_refused() {
        let refused = |k, moments, damping, part: &str| {
            let error = Feedback::new("up_proj", k, moments, damping)
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{error}");
        };
        refused(2, vec![1.0; 3], 0.01, "3 moments of 2 inputs");
        refused(0, Vec::new(), 0.01, "up_proj");
        refused(1, vec![f64::NAN], 0.01, "up_proj");
        refused(1, vec![-1.0], 0.01, "up_proj");
        refused(
            2,
            vec![1.0, f64::INFINITY, f64::INFINITY, 1.0],
            0.01,
            "factorised",
        );
        refused(2, vec![1.0, 5.0, 5.0, 1.0], 0.01, "factorised");
        for drift in [vec![1.0; 3], vec![1.0, f64::NAN, 1.0, 1.0]] {
            let error = Feedback::drifted("up_proj", 2, vec![1.0, 0.0, 0.0, 1.0], drift, 0.01);
            let error = error.unwrap_err().to_string();
            assert!(error.contains("drift of 2 inputs"), "{error}");
        }
        let error = Feedback::drifted("up_proj", 1, vec![1.0], vec![1e300], 0.01)
            .unwrap_err()
            .to_string();
        assert!(error.contains("up_proj") && error.contains("F32"), "{error}");
        for damping in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            refused(1, vec![1.0], damping, "damping");
        }
    }
}
