//! Rounding that makes up for its own errors.

use super::quantize::Source;
use super::search::{Divisor, choose_scale};
use super::{DenseTensor, Feedback, Format, Fp4Tensor, ScaleRule};
use crate::{Error, Result};
use rayon::prelude::*;

/// Rows quantised together: as many lanes run through each step alike.
const ROWS: usize = 16;

/// One column of [`ROWS`] rows.
type Column = [f32; ROWS];

/// As [`quantize_dense`](super::quantize_dense), but each column of the matrix also makes up, as well as it can, for what
/// rounding the columns before it does to the layer's outputs (see [`Feedback`]).
///
/// Behind quantised layers, what is rounded also makes up for what they have changed in this one's inputs, as far as `feedback`
/// tells it.
///
/// Columns keep their order. Scales are those of [`quantize_dense`](super::quantize_dense): GPTQ calls that static groups.
///
/// Deterministic: the result does not depend on the number of threads. Beside the result and `feedback`, 140 bytes an input
/// are held in memory by each thread.
///
/// # Errors
/// As [`quantize_dense`](super::quantize_dense); [`Error::Tensor`] also where `feedback` is of another number of inputs.
pub fn quantize_compensated(
    name: &str,
    matrix: &DenseTensor,
    format: Format,
    rule: ScaleRule,
    factor: Option<f32>,
    feedback: &Feedback,
) -> Result<Fp4Tensor> {
    let (n, k) = matrix.shape();
    if feedback.inputs() != k {
        let problem = format!(
            "shape [{n}, {k}], but its calibration is of {} inputs",
            feedback.inputs()
        );
        return Err(Error::tensor(name, None, problem));
    }
    let encode = |codes: &mut [u8], scales: &mut [u8], factor: f32| {
        let rows = codes
            .par_chunks_mut(ROWS * k / 2)
            .zip(scales.par_chunks_mut(ROWS * k / format.group * format.kind.size()));
        rows.enumerate().for_each_init(
            || Rows::new(k, format.group),
            |rows, (index, (codes, scales))| {
                rows.decode(matrix, index * ROWS);
                rows.encode(feedback, format, rule, factor, codes, scales);
            },
        );
    };
    Source::of(name, matrix).quantize_by((n, k), format, factor, encode)
}

/// [`ROWS`] rows of a matrix while they are quantised; rows that are not there are zero.
struct Rows {
    /// Of each column its values; once it is rounded, what they differ by from what they became.
    columns: Vec<Column>,
    /// Of each column of a block, what is to be rounded: its values and their share of the errors before.
    targets: Vec<Column>,
    /// Room for columns.
    corrected: Vec<Column>,
    row: Vec<f32>,
}

impl Rows {
    fn new(k: usize, group: usize) -> Self {
        Self {
            columns: vec![[0.0; ROWS]; k],
            targets: vec![[0.0; ROWS]; group],
            corrected: Vec::with_capacity(k),
            row: vec![0.0; k],
        }
    }

    fn decode(&mut self, matrix: &DenseTensor, first: usize) {
        for lane in 0..ROWS {
            match first + lane < matrix.shape().0 {
                true => matrix.decode_row_part(first + lane, 0, &mut self.row),
                false => self.row.fill(0.0),
            }
            for (column, value) in self.columns.iter_mut().zip(&self.row) {
                column[lane] = *value;
            }
        }
    }

    /// The scales that values have before anything is made up for; gives what each of a block's codes is multiplied by, block by
    /// block.
    fn choose_scales(
        &mut self,
        format: Format,
        rule: ScaleRule,
        factor: f32,
        scales: &mut [u8],
    ) -> Vec<[Divisor; ROWS]> {
        let Format { group, kind } = format;
        let k = self.columns.len();
        let mut divisors = vec![[Divisor::of(0.0); ROWS]; k / group];
        for (lane, scales) in scales.chunks_exact_mut(k / group * kind.size()).enumerate() {
            for (value, column) in self.row.iter_mut().zip(&self.columns) {
                *value = column[lane];
            }
            let stored = scales.chunks_exact_mut(kind.size());
            for ((block, stored), divisors) in self.row.chunks(group).zip(stored).zip(&mut divisors) {
                let bits = choose_scale(block, kind, factor, rule);
                stored.copy_from_slice(&bits.to_le_bytes()[..kind.size()]);
                divisors[lane] = Divisor::of(kind.value(bits) * factor);
            }
        }
        divisors
    }

    /// Replaces values by those that come nearest to what they give in the original model.
    fn correct(&mut self, feedback: &Feedback) {
        self.corrected.clear();
        for (index, column) in self.columns.iter().enumerate() {
            let Some(shares) = feedback.corrected(index) else {
                return;
            };
            let mut target = *column;
            carry(&mut target, &self.columns, shares);
            self.corrected.push(target);
        }
        std::mem::swap(&mut self.columns, &mut self.corrected);
    }

    fn encode(
        &mut self,
        feedback: &Feedback,
        format: Format,
        rule: ScaleRule,
        factor: f32,
        codes: &mut [u8],
        scales: &mut [u8],
    ) {
        let group = format.group;
        let k = self.columns.len();
        let divisors = self.choose_scales(format, rule, factor, scales);
        self.correct(feedback);
        for (start, divisors) in (0..k).step_by(group).zip(divisors) {
            let (errors, block) = self.columns.split_at_mut(start);
            let block = &mut block[..group];
            for (index, target) in self.targets.iter_mut().enumerate() {
                *target = block[index];
                carry(target, errors, feedback.carried(start + index));
            }
            for index in 0..group {
                let (errors, rest) = block.split_at_mut(index);
                let (target, column) = (&mut self.targets[index], start + index);
                carry(target, errors, &feedback.carried(column)[start..]);
                for (lane, codes) in codes.chunks_exact_mut(k / 2).enumerate() {
                    let code = divisors[lane].encode(target[lane]);
                    match column % 2 {
                        0 => codes[column / 2] = code,
                        _ => codes[column / 2] |= code << 4,
                    }
                    // Of the value itself, not of the target: what was carried to it is an error of others.
                    rest[0][lane] -= divisors[lane].value(code);
                }
            }
        }
    }
}

/// Adds to `target` the share of each error that it is to make up for.
fn carry(target: &mut Column, errors: &[Column], shares: &[f32]) {
    for (error, share) in errors.iter().zip(shares) {
        for (target, error) in target.iter_mut().zip(error) {
            *target += share * error;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp4::{Bytes, FloatKind, ScaleKind, quantize_dense};
    use crate::random::Random;

    const FORMATS: [Format; 4] = [
        Format::mmfp4(),
        Format::mxfp4(),
        Format::nvfp4(),
        Format {
            group: 64,
            kind: ScaleKind::BF16,
        },
    ];

    fn noise(random: &mut Random) -> f32 {
        (0..4).map(|_| random.uniform() as f32 - 0.5).sum()
    }

    fn dense(values: &[f32], shape: (usize, usize)) -> DenseTensor {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        DenseTensor::new("w", shape, FloatKind::F32, Bytes::copy_from(&bytes).unwrap()).unwrap()
    }

    /// Inputs `[rows, k]` that are mixtures of a quarter as many, and a little of their own.
    fn inputs(rows: usize, k: usize) -> Vec<f32> {
        let mut random = Random::new(2);
        let hidden = k / 4;
        let mixture: Vec<f32> = (0..k * hidden).map(|_| noise(&mut random)).collect();
        let mut row = || {
            let causes: Vec<f32> = (0..hidden).map(|_| noise(&mut random)).collect();
            let mixed = mixture.chunks(hidden).map(|shares| {
                let sum: f32 = shares.iter().zip(&causes).map(|(a, b)| a * b).sum();
                sum + 0.3 * noise(&mut random)
            });
            mixed.collect::<Vec<_>>()
        };
        (0..rows).flat_map(|_| row()).collect()
    }

    /// `AᵀB`.
    fn products(a: &[f32], b: &[f32], k: usize) -> Vec<f64> {
        let mut products = vec![0f64; k * k];
        for (a, b) in a.chunks(k).zip(b.chunks(k)) {
            for (i, a) in a.iter().enumerate() {
                for (j, b) in b.iter().enumerate() {
                    products[i * k + j] += f64::from(a * b);
                }
            }
        }
        products
    }

    fn feedback(inputs: &[f32], k: usize) -> Feedback {
        Feedback::new("w", k, products(inputs, inputs, k), 0.01).unwrap()
    }

    /// What a layer's outputs lose, beside their squares.
    fn output_error(inputs: &[f32], values: &[f32], packed: &Fp4Tensor) -> f64 {
        let k = packed.shape().1;
        let back = packed.dequantize();
        let square = |row: &[f32], weights: &dyn Fn(usize) -> f32| {
            let sum: f32 = row.iter().enumerate().map(|(i, x)| x * weights(i)).sum();
            f64::from(sum).powi(2)
        };
        let (mut lost, mut all) = (0.0, 0.0);
        for row in inputs.chunks(k) {
            for start in (0..values.len()).step_by(k) {
                lost += square(row, &|i| values[start + i] - back[start + i]);
                all += square(row, &|i| values[start + i]);
            }
        }
        lost / all
    }

    #[test]
    fn outputs_for_inputs_of_the_same_kind_lose_less_than_half() {
        // Rows that do not fill the lanes.
        let shape = (21, 256);
        let mut random = Random::new(1);
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| noise(&mut random)).collect();
        let matrix = dense(&values, shape);
        let all = inputs(600, shape.1);
        // Not those that the error is then measured with.
        let (seen, unseen) = all.split_at(500 * shape.1);
        let feedback = feedback(seen, shape.1);
        for format in FORMATS {
            let rule = ScaleRule::SquaredError;
            let plain = quantize_dense("w", &matrix, format, rule, None).unwrap();
            let made_up = quantize_compensated("w", &matrix, format, rule, None, &feedback).unwrap();
            assert_eq!((made_up.shape(), made_up.group()), (shape, format.group));
            assert_eq!(made_up.factor(), plain.factor(), "{format:?}");
            assert_eq!(&made_up.scales()[..], &plain.scales()[..], "{format:?}");
            let error = |packed| output_error(unseen, &values, packed);
            let (before, after) = (error(&plain), error(&made_up));
            assert!(after < 0.5 * before, "{format:?}: {after} for {before}");
        }
    }

    #[test]
    fn outputs_for_changed_inputs_come_nearer_to_what_they_were() {
        let (n, k) = (21, 256);
        let mut random = Random::new(5);
        let values: Vec<f32> = (0..n * k).map(|_| noise(&mut random)).collect();
        let matrix = dense(&values, (n, k));
        let before = inputs(600, k);
        // What each input is, a part of its neighbour has become.
        let after: Vec<f32> = (0..before.len())
            .map(|i| before[i] + 0.2 * before[i / k * k + (i + 1) % k] + 0.05 * noise(&mut random))
            .collect();
        let seen = 500 * k;
        let differences: Vec<f32> = before.iter().zip(&after).map(|(x, z)| x - z).collect();
        let moments = products(&after[..seen], &after[..seen], k);
        let drift = products(&differences[..seen], &after[..seen], k);
        let blind = Feedback::new("w", k, moments.clone(), 0.01).unwrap();
        let told = Feedback::drifted("w", k, moments, drift, 0.01).unwrap();
        // Of outputs for inputs that were not seen, from those that the original gives for the inputs of before.
        let error = |packed: &Fp4Tensor| {
            let back = packed.dequantize();
            let output =
                |row: &[f32], weights: &[f32]| -> f32 { row.iter().zip(weights).map(|(x, w)| x * w).sum() };
            let (mut lost, mut all) = (0.0, 0.0);
            for (x, z) in before[seen..].chunks(k).zip(after[seen..].chunks(k)) {
                for (w, q) in values.chunks(k).zip(back.chunks(k)) {
                    let wanted = output(x, w);
                    lost += f64::from(output(z, q) - wanted).powi(2);
                    all += f64::from(wanted).powi(2);
                }
            }
            lost / all
        };
        for format in FORMATS {
            let rule = ScaleRule::SquaredError;
            let plain = quantize_dense("w", &matrix, format, rule, None).unwrap();
            let run = |feedback| quantize_compensated("w", &matrix, format, rule, None, feedback).unwrap();
            let (blind, told) = (run(&blind), run(&told));
            assert_eq!(&told.scales()[..], &plain.scales()[..], "{format:?}");
            let (blind, told) = (error(&blind), error(&told));
            assert!(told < 0.5 * blind, "{format:?}: {told} for {blind}");
        }
    }

    #[test]
    fn inputs_that_have_nothing_in_common_change_nothing() {
        let shape = (5, 128);
        let mut random = Random::new(3);
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| noise(&mut random)).collect();
        let matrix = dense(&values, shape);
        let feedback = Feedback::new("w", shape.1, vec![0.0; shape.1 * shape.1], 0.01).unwrap();
        for format in FORMATS {
            let rule = ScaleRule::SquaredError;
            let plain = quantize_dense("w", &matrix, format, rule, None).unwrap();
            let same = quantize_compensated("w", &matrix, format, rule, None, &feedback).unwrap();
            assert_eq!(&plain.codes()[..], &same.codes()[..], "{format:?}");
            assert_eq!(&plain.scales()[..], &same.scales()[..], "{format:?}");
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let shape = (70, 128);
        let mut random = Random::new(4);
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| noise(&mut random)).collect();
        let (matrix, inputs) = (dense(&values, shape), inputs(200, shape.1));
        let moments = products(&inputs, &inputs, shape.1);
        let feedback = Feedback::drifted("w", shape.1, moments.clone(), moments, 0.01).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let rule = ScaleRule::SquaredError;
            pool.install(|| {
                quantize_compensated("w", &matrix, Format::nvfp4(), rule, None, &feedback).unwrap()
            })
        };
        let (one, three) = (run(1), run(3));
        assert_eq!(&one.codes()[..], &three.codes()[..]);
        assert_eq!(&one.scales()[..], &three.scales()[..]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let feedback = Feedback::new("w", 256, vec![0.0; 256 * 256], 0.01).unwrap();
        let run = |values: &[f32], k| {
            let matrix = dense(values, (1, k));
            let rule = ScaleRule::SquaredError;
            let error = quantize_compensated("down", &matrix, Format::mmfp4(), rule, None, &feedback);
            error.unwrap_err().to_string()
        };
        let error = run(&[1.0; 128], 128);
        assert!(error.contains("down") && error.contains("256 inputs"), "{error}");
        let mut values = [1.0; 256];
        values[200] = f32::NAN;
        let error = run(&values, 256);
        assert!(error.contains("down") && error.contains("200"), "{error}");
    }
}
