//! What rounding a matrix to FP4 cost.

use super::Fp4Tensor;
use crate::{Error, Result};
use rayon::prelude::*;
use std::fmt;

/// How many of the worst blocks are kept.
const WORST: usize = 5;

/// What [`validate`] measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Validation {
    /// `(N, K)`.
    pub shape: (usize, usize),
    /// The root of the mean squared error.
    pub rmse: f64,
    /// `rmse` over the original's root mean square; 0 for zeros that stayed zeros.
    pub relative_rmse: f64,
    /// The largest absolute error.
    pub largest_error: f64,
    /// Its row and column.
    pub largest_error_at: (usize, usize),
    /// The cosine of the angle between the two matrices, taken as vectors; 1 where both are zero.
    pub cosine: f64,
    /// The share of codes that are zero, 0 to 1.
    pub zeros: f64,
    /// The share of codes with the largest magnitude, 0 to 1: values at the end of the range or beyond it.
    pub saturated: f64,
    /// The blocks with the largest relative errors, worst first, at most five; exact blocks are left out.
    pub worst_blocks: Vec<BlockError>,
}

/// The error of the elements that share a scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockError {
    /// The block's row.
    pub row: usize,
    /// Its number in that row.
    pub group: usize,
    /// The norm of its error over that of its values; infinite where values were zero and did not stay so.
    pub relative_error: f64,
}

/// Compares a packed matrix `[N, K]` with what it was made from, row-major. Sums are f64 and do not depend on
/// the number of threads.
///
/// ```
/// use candle_mmfp4::fp4::{Format, ScaleRule, quantize, validate};
///
/// let weights: Vec<f32> = (0..64 * 128).map(|i| (i as f32 * 0.7).sin() * 0.02).collect();
/// let packed = quantize("w", &weights, (64, 128), Format::mmfp4(), ScaleRule::SquaredError)?;
/// let cost = validate(&weights, &packed)?;
/// println!("{cost}");
/// assert!(cost.relative_rmse < 0.12 && cost.cosine > 0.99);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
///
/// # Errors
/// [`Error::Argument`] where the number of values differs, [`Error::NonFinite`] for NaN or infinity.
pub fn validate(original: &[f32], packed: &Fp4Tensor) -> Result<Validation> {
    let (n, k) = packed.shape();
    if original.len() != n * k {
        return Err(Error::argument(
            "validate",
            "original",
            format!("{} values, as packed, which is [{n}, {k}]", n * k),
            original.len().to_string(),
        ));
    }
    if let Some(index) = original.par_iter().position_first(|v| !v.is_finite()) {
        return Err(Error::NonFinite {
            name: "original".into(),
            file: None,
            index,
            value: original[index],
        });
    }
    // Rows are summed in parallel and added up in order: the same bits for any number of threads.
    let rows: Vec<Sums> = original
        .par_chunks_exact(k)
        .enumerate()
        .map(|(row, values)| Sums::of_row(row, values, packed))
        .collect();
    let total = rows.into_iter().reduce(Sums::add).unwrap_or_default();

    let count = original.len() as f64;
    let cosine = match (total.power, total.packed_power) {
        (0.0, 0.0) => 1.0,
        (a, b) => total.product / (a * b).sqrt().max(f64::MIN_POSITIVE),
    };
    Ok(Validation {
        shape: (n, k),
        rmse: (total.error / count).sqrt(),
        relative_rmse: ratio(total.error, total.power),
        largest_error: total.largest.0,
        largest_error_at: total.largest.1,
        cosine,
        zeros: total.zeros as f64 / count,
        saturated: total.saturated as f64 / count,
        worst_blocks: total.worst,
    })
}

/// The root of the quotient of two sums of squares.
fn ratio(error: f64, power: f64) -> f64 {
    match (error, power) {
        (0.0, _) => 0.0,
        (_, 0.0) => f64::INFINITY,
        _ => (error / power).sqrt(),
    }
}

#[derive(Default)]
struct Sums {
    error: f64,
    power: f64,
    packed_power: f64,
    product: f64,
    zeros: usize,
    saturated: usize,
    largest: (f64, (usize, usize)),
    worst: Vec<BlockError>,
}

impl Sums {
    fn of_row(row: usize, values: &[f32], packed: &Fp4Tensor) -> Self {
        let mut sums = Self::default();
        let k = values.len();
        let mut rounded = vec![0.0; k];
        packed.decode_row(row, &mut rounded);
        let blocks = values.chunks_exact(packed.group());
        for (group, (block, back)) in blocks.zip(rounded.chunks_exact(packed.group())).enumerate() {
            let (mut error, mut power) = (0.0, 0.0);
            for (i, (value, back)) in block.iter().zip(back).enumerate() {
                let (value, back) = (f64::from(*value), f64::from(*back));
                let difference = (value - back).abs();
                if difference > sums.largest.0 {
                    sums.largest = (difference, (row, group * packed.group() + i));
                }
                error += difference * difference;
                power += value * value;
                sums.packed_power += back * back;
                sums.product += value * back;
            }
            sums.error += error;
            sums.power += power;
            if error > 0.0 {
                sums.worst.push(BlockError {
                    row,
                    group,
                    relative_error: ratio(error, power),
                });
            }
        }
        for byte in &packed.codes()[row * k / 2..][..k / 2] {
            for magnitude in [byte & 7, byte >> 4 & 7] {
                sums.zeros += usize::from(magnitude == 0);
                sums.saturated += usize::from(magnitude == 7);
            }
        }
        sums.keep_worst();
        sums
    }

    fn add(mut self, next: Self) -> Self {
        self.error += next.error;
        self.power += next.power;
        self.packed_power += next.packed_power;
        self.product += next.product;
        self.zeros += next.zeros;
        self.saturated += next.saturated;
        if next.largest.0 > self.largest.0 {
            self.largest = next.largest;
        }
        self.worst.extend(next.worst);
        self.keep_worst();
        self
    }

    /// The sort is stable: of equal blocks the first stay.
    fn keep_worst(&mut self) {
        self.worst
            .sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
        self.worst.truncate(WORST);
    }
}

impl fmt::Display for Validation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((n, k), (row, column)) = (self.shape, self.largest_error_at);
        write!(
            f,
            "[{n}, {k}]: relative RMSE {:.2} % (RMSE {:.3e}), cosine {:.5}\n\
             largest error {:.3e} at [{row}, {column}]; {:.1} % of codes are zero, {:.1} % saturated",
            100.0 * self.relative_rmse,
            self.rmse,
            self.cosine,
            self.largest_error,
            100.0 * self.zeros,
            100.0 * self.saturated,
        )?;
        for (i, block) in self.worst_blocks.iter().enumerate() {
            f.write_str(if i == 0 { "\nworst blocks: " } else { ", " })?;
            let percent = 100.0 * block.relative_error;
            write!(f, "row {} group {} ({percent:.1} %)", block.row, block.group)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp4::{Bytes, Factor, Format, Parts, ScaleKind, ScaleRule, quantize};

    /// Two rows of two groups of 16, all scales 1: codes 0 except where told.
    fn packed(codes: &[(usize, u8)]) -> Fp4Tensor {
        let mut bytes = [0u8; 32];
        for (index, code) in codes {
            bytes[index / 2] |= code << (4 * (index % 2));
        }
        let parts = Parts {
            shape: (2, 32),
            group: 16,
            codes: Bytes::copy_from(&bytes).unwrap(),
            scales: Bytes::copy_from(&[0x38; 4]).unwrap(),
            kind: ScaleKind::E4M3,
            factor: Factor::None,
        };
        Fp4Tensor::new("w", parts).unwrap()
    }

    #[test]
    fn the_numbers_by_hand() {
        // 6 held as 6, -8 clipped to -6 (row 1, column 20), 0.25 rounded to 0 (row 0, column 17).
        let mut original = [0f32; 64];
        (original[3], original[32 + 20], original[17]) = (6.0, -8.0, 0.25);
        let cost = validate(&original, &packed(&[(3, 7), (52, 15)])).unwrap();
        assert_eq!(cost.shape, (2, 32));
        let error = 4.0 + 0.0625;
        let power = 36.0 + 64.0 + 0.0625;
        assert!((cost.rmse - f64::sqrt(error / 64.0)).abs() < 1e-12);
        assert!((cost.relative_rmse - f64::sqrt(error / power)).abs() < 1e-12);
        assert!((cost.cosine - (36.0 + 48.0) / f64::sqrt(power * 72.0)).abs() < 1e-12);
        assert_eq!((cost.largest_error, cost.largest_error_at), (2.0, (1, 20)));
        assert_eq!((cost.zeros, cost.saturated), (62.0 / 64.0, 2.0 / 64.0));
        let block = |row, group, relative_error| BlockError {
            row,
            group,
            relative_error,
        };
        assert_eq!(cost.worst_blocks, [block(0, 1, 1.0), block(1, 1, 0.25)]);
        let text = cost.to_string();
        assert!(
            text.contains("at [1, 20]") && text.contains("row 0 group 1 (100.0 %)"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 3);
    }

    #[test]
    fn zeros_are_exact_and_what_appears_from_nothing_is_infinitely_wrong() {
        let exact = validate(&[0.0; 64], &packed(&[])).unwrap();
        assert_eq!((exact.relative_rmse, exact.cosine, exact.zeros), (0.0, 1.0, 1.0));
        assert!(exact.worst_blocks.is_empty());
        let wrong = validate(&[0.0; 64], &packed(&[(0, 1)])).unwrap();
        assert_eq!(wrong.worst_blocks[0].relative_error, f64::INFINITY);
        assert_eq!((wrong.relative_rmse, wrong.cosine), (f64::INFINITY, 0.0));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error = validate(&[0.0; 63], &packed(&[])).unwrap_err().to_string();
        assert!(
            error.contains("64 values") && error.contains("found 63"),
            "{error}"
        );
        let mut bad = [0.0; 64];
        bad[40] = f32::NAN;
        let error = validate(&bad, &packed(&[])).unwrap_err().to_string();
        assert!(error.contains("element 40"), "{error}");
    }

    #[test]
    fn the_number_of_threads_changes_nothing_and_a_better_rule_shows() {
        let values = crate::cpu::testing::noise(96 * 256, 7);
        let measure = |rule| {
            let packed = quantize("w", &values, (96, 256), Format::mmfp4(), rule).unwrap();
            let with = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                pool.build()
                    .unwrap()
                    .install(|| validate(&values, &packed).unwrap())
            };
            let one = with(1);
            assert_eq!(one, with(3));
            assert_eq!(one.worst_blocks.len(), WORST);
            assert!(
                one.worst_blocks
                    .is_sorted_by(|a, b| a.relative_error >= b.relative_error)
            );
            one
        };
        let (best, maximum) = (measure(ScaleRule::SquaredError), measure(ScaleRule::Maximum));
        assert!(best.rmse < maximum.rmse && best.cosine > maximum.cosine);
    }
}
