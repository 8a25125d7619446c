//! Where a number went wrong: two tensors compared, an op against its plain reference, a tensor's range.

use super::{FusedMoe, Linear, Orientation, PerHead, Route};
use crate::cpu::reference;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::fmt;

/// When two tensors count as close.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// Every element on its own: `|result - reference| <= absolute + relative · |reference|`, the `allclose` of
    /// NumPy and PyTorch.
    Elements {
        /// What is allowed whatever the reference.
        absolute: f64,
        /// What is allowed in proportion to the reference.
        relative: f64,
    },
    /// All together: `Σ (result - reference)² <= nmse · Σ reference²`. The measure for products of long vectors,
    /// whose small elements are differences of large numbers.
    Nmse(f64),
}

impl Tolerance {
    /// What rounding explains for outputs of this dtype computed in f32: a normalised mean-square error of
    /// 3e-7 for F16, 1e-5 for BF16, and 1e-9, the order of summation, for everything else.
    pub fn of(dtype: DType) -> Self {
        Self::Nmse(match dtype {
            DType::F16 => 3e-7,
            DType::BF16 => 1e-5,
            _ => 1e-9,
        })
    }
}

/// A difference and the multi-index of its element; of equal ones the first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Difference {
    /// How large it is.
    pub value: f64,
    /// Where: one index a dimension; empty where nothing differs.
    pub at: Vec<usize>,
}

/// How a result differs from its reference.
///
/// A NaN or infinity that both have in the same place is no difference; one that only one of them has is an
/// infinite difference, and the two are not close under any tolerance.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Whether the tolerance holds.
    pub all_close: bool,
    /// The largest `|result - reference|`.
    pub largest_absolute: Difference,
    /// The largest `|result - reference| / |reference|` over elements whose reference is not 0.
    pub largest_relative: Difference,
    /// The normalised mean-square error, `Σ (result - reference)² / Σ reference²`.
    pub nmse: f64,
    /// The result's values.
    pub result: ValueRange,
    /// The reference's values.
    pub reference: ValueRange,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: NMSE {:.1e}, largest difference {:.2e} at {:?}, largest relative {:.2e} at {:?}; result {}, \
             reference {}",
            if self.all_close { "close" } else { "NOT close" },
            self.nmse,
            self.largest_absolute.value,
            self.largest_absolute.at,
            self.largest_relative.value,
            self.largest_relative.at,
            self.result,
            self.reference,
        )
    }
}

/// The range of a tensor's values, and what in it is no number.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ValueRange {
    /// The smallest and the largest finite value, if there is any.
    pub finite: Option<(f32, f32)>,
    /// How many are NaN.
    pub nan: usize,
    /// How many are infinite.
    pub infinite: usize,
}

impl ValueRange {
    /// The range of a tensor of any shape and number type.
    ///
    /// # Errors
    /// Those of the device.
    pub fn of(tensor: &Tensor) -> candle_core::Result<Self> {
        Ok(Self::of_values(&to_f32(tensor)?))
    }

    /// Whether there is neither NaN nor infinity.
    pub fn is_finite(&self) -> bool {
        self.nan == 0 && self.infinite == 0
    }

    fn of_values(values: &[f32]) -> Self {
        let mut range = Self::default();
        for &value in values {
            if value.is_nan() {
                range.nan += 1;
            } else if value.is_infinite() {
                range.infinite += 1;
            } else {
                let (min, max) = range.finite.unwrap_or((value, value));
                range.finite = Some((min.min(value), max.max(value)));
            }
        }
        range
    }
}

impl fmt::Display for ValueRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.finite {
            Some((min, max)) => write!(f, "{min:.4e} to {max:.4e}")?,
            None => f.write_str("no finite value")?,
        }
        if !self.is_finite() {
            write!(f, " with {} NaN and {} infinite", self.nan, self.infinite)?;
        }
        Ok(())
    }
}

/// Compares two tensors of one shape, whatever their dtypes and devices, in f64.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_mmfp4::ops::{Tolerance, compare_with_reference};
///
/// let reference = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let result = Tensor::new(&[[1f32, 2.], [3.5, 4.]], &Device::Cpu)?;
/// let tolerance = Tolerance::Elements { absolute: 1e-5, relative: 1e-3 };
/// let comparison = compare_with_reference(&result, &reference, tolerance)?;
/// assert!(!comparison.all_close);
/// assert_eq!((comparison.largest_absolute.value, comparison.largest_absolute.at), (0.5, vec![1, 0]));
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
///
/// # Errors
/// [`Error::Argument`] where the shapes differ; those of the devices.
pub fn compare_with_reference(
    result: &Tensor,
    reference: &Tensor,
    tolerance: Tolerance,
) -> Result<Comparison> {
    if result.dims() != reference.dims() {
        return Err(Error::argument(
            "compare_with_reference",
            "result",
            format!("shape {:?}, as the reference", reference.dims()),
            format!("shape {:?}", result.dims()),
        ));
    }
    let (values, references) = (to_f32(result)?, to_f32(reference)?);
    let (mut absolute, mut relative) = ((0.0, None), (0.0, None));
    let (mut error, mut power) = (0.0, 0.0);
    let mut every_element = true;
    for (index, (&value, &reference)) in values.iter().zip(&references).enumerate() {
        let same = value == reference || value.is_nan() && reference.is_nan();
        let comparable = value.is_finite() && reference.is_finite();
        let (value, reference) = (f64::from(value), f64::from(reference));
        let difference = match (same, comparable) {
            (true, _) => 0.0,
            (false, true) => (value - reference).abs(),
            (false, false) => f64::INFINITY,
        };
        if difference > absolute.0 {
            absolute = (difference, Some(index));
        }
        let proportion = if comparable {
            difference / reference.abs()
        } else {
            difference
        };
        if reference != 0.0 && proportion > relative.0 {
            relative = (proportion, Some(index));
        }
        error += difference * difference;
        if reference.is_finite() {
            power += reference * reference;
        }
        if let Tolerance::Elements { absolute, relative } = tolerance {
            // Not `difference > …`: an infinite reference allows nothing but itself.
            every_element &= same || comparable && difference <= absolute + relative * reference.abs();
        }
    }
    let nmse = if error == 0.0 { 0.0 } else { error / power };
    let located = |(value, index): (f64, Option<usize>)| Difference {
        value,
        at: index.map_or(Vec::new(), |index| multi_index(index, result.dims())),
    };
    Ok(Comparison {
        all_close: match tolerance {
            Tolerance::Elements { .. } => every_element,
            Tolerance::Nmse(limit) => nmse <= limit,
        },
        largest_absolute: located(absolute),
        largest_relative: located(relative),
        nmse,
        result: ValueRange::of_values(&values),
        reference: ValueRange::of_values(&references),
    })
}

/// An op of this crate that can be checked against its plain reference in [`cpu::reference`](mod@reference).
pub trait Kernel<Inputs> {
    /// Runs the op on its inputs' device and the reference, in f32, on the same numbers.
    ///
    /// # Errors
    /// Those of the op.
    fn validate(&self, inputs: Inputs) -> Result<Comparison>;
}

/// Runs an op on its inputs' device and compares what comes out with the plain reference on the CPU.
/// `inputs` is what the op's `forward` takes: a tensor, or a tuple of three for [`FusedMoe`].
///
/// Close means [`Tolerance::of`] the output's dtype; [`Route`] is compared as `[2, T, top_k]`, ids and weights,
/// each element within 1e-5: another expert is never close.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_mmfp4::{fp4::Format, nn::MmfP4Linear, ops::validate_kernel_output};
///
/// let weight = Tensor::randn(0f32, 1f32, (64, 128), &Device::Cpu)?;
/// let layer = MmfP4Linear::from_linear(&candle_nn::Linear::new(weight, None), Format::mmfp4())?;
/// let x = Tensor::randn(0f32, 1f32, (5, 128), &Device::Cpu)?;
/// let comparison = validate_kernel_output(&layer, &x)?;
/// assert!(comparison.all_close, "{comparison}");
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// Those of the op.
pub fn validate_kernel_output<Inputs>(op: &impl Kernel<Inputs>, inputs: Inputs) -> Result<Comparison> {
    op.validate(inputs)
}

impl Kernel<&Tensor> for Linear {
    fn validate(&self, x: &Tensor) -> Result<Comparison> {
        let result = self.forward(x)?;
        let (n, k) = self.weight().shape();
        let x = to_f32(x)?;
        let mut y = reference::linear(self.weight(), &x, x.len() / k, self.arithmetic());
        for row in y.chunks_exact_mut(n) {
            for (value, bias) in row.iter_mut().zip(self.bias().unwrap_or_default()) {
                *value += bias;
            }
        }
        compare(&result, y, Tolerance::of(result.dtype()))
    }
}

impl Kernel<&Tensor> for PerHead {
    fn validate(&self, x: &Tensor) -> Result<Comparison> {
        let result = self.forward(x)?;
        let (x, k) = (to_f32(x)?, self.weight.shape().1);
        let y = match self.orientation {
            Orientation::Ordinary => reference::per_head(
                &self.weight,
                self.rows,
                &x,
                x.len() / (self.rows.heads * k),
                self.arithmetic,
            ),
            Orientation::Transposed => {
                let m = x.len() / (self.rows.heads * self.rows.len);
                reference::per_head_transposed(&self.weight, self.rows, &x, m)
            }
        };
        compare(&result, y, Tolerance::of(result.dtype()))
    }
}

impl Kernel<(&Tensor, &Tensor, &Tensor)> for FusedMoe {
    fn validate(&self, (x, ids, weights): (&Tensor, &Tensor, &Tensor)) -> Result<Comparison> {
        let result = self.forward(x, ids, weights)?;
        let top_k = ids.dims().last().copied().unwrap_or(1);
        let ids = ids.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        let (x, weights) = (to_f32(x)?, to_f32(weights)?);
        let y = reference::fused_moe(
            self.experts(),
            self.shared(),
            &x,
            &ids,
            &weights,
            top_k,
            self.arithmetic(),
        );
        compare(&result, y, Tolerance::of(result.dtype()))
    }
}

impl Kernel<&Tensor> for Route {
    fn validate(&self, logits: &Tensor) -> Result<Comparison> {
        let result = logits.apply_op1_no_bwd(self)?;
        let (ids, weights) = reference::route(&to_f32(logits)?, &self.bias, &self.routing);
        let both = ids.into_iter().map(|id| id as f32).chain(weights).collect();
        let tolerance = Tolerance::Elements {
            absolute: 1e-5,
            relative: 1e-5,
        };
        compare(&result, both, tolerance)
    }
}

fn compare(result: &Tensor, reference: Vec<f32>, tolerance: Tolerance) -> Result<Comparison> {
    let reference = Tensor::from_vec(reference, result.shape(), &Device::Cpu)?;
    compare_with_reference(result, &reference, tolerance)
}

/// A tensor's elements on the CPU, row-major.
fn to_f32(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1()
}

fn multi_index(mut flat: usize, dims: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = dims
        .iter()
        .rev()
        .map(|dim| {
            let i = flat % dim;
            flat /= dim;
            i
        })
        .collect();
    index.reverse();
    index
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{noise, weights};
    use crate::cpu::{Expert, HeadRows, Routing};
    use crate::fp4::{Format, ScaleRule, quantize};

    fn tensor(values: &[f32], dims: &[usize]) -> Tensor {
        Tensor::from_slice(values, dims, &Device::Cpu).unwrap()
    }

    const ELEMENTS: Tolerance = Tolerance::Elements {
        absolute: 0.1,
        relative: 0.01,
    };

    #[test]
    fn the_largest_differences_are_found_and_placed() {
        let reference = tensor(&[1., 0., 100., -2., 5., 6., 7., 8.], &[2, 4]);
        let result = tensor(&[1.5, 0., 99., -2., 5., 6., 7., 8.], &[2, 4]);
        let comparison = compare_with_reference(&result, &reference, ELEMENTS).unwrap();
        let difference = |value, at: &[usize]| Difference {
            value,
            at: at.to_vec(),
        };
        assert_eq!(comparison.largest_absolute, difference(1.0, &[0, 2]));
        assert_eq!(comparison.largest_relative, difference(0.5, &[0, 0]));
        assert!((comparison.nmse - 1.25 / 10179.0).abs() < 1e-12);
        assert!(!comparison.all_close, "0.5 of 1 is beyond 0.11");
        let nearer = tensor(&[1.1, 0.09, 99., -2., 5., 6., 7., 8.], &[2, 4]);
        assert!(
            compare_with_reference(&nearer, &reference, ELEMENTS)
                .unwrap()
                .all_close
        );
        assert!(
            !compare_with_reference(&nearer, &reference, Tolerance::Nmse(1e-6))
                .unwrap()
                .all_close
        );
        let same = compare_with_reference(&reference, &reference, Tolerance::Nmse(0.0)).unwrap();
        assert!(same.all_close && same.largest_absolute.at.is_empty());
        let f16 = reference.to_dtype(DType::F16).unwrap();
        assert!(
            compare_with_reference(&f16, &reference, ELEMENTS)
                .unwrap()
                .all_close
        );
    }

    #[test]
    fn nan_and_infinity_are_equal_to_themselves_only() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let reference = tensor(&[nan, inf, 1., 2.], &[4]);
        for tolerance in [ELEMENTS, Tolerance::Nmse(1e-9)] {
            let same = compare_with_reference(&reference, &reference, tolerance).unwrap();
            assert!(same.all_close && same.nmse == 0.0, "{same}");
            assert_eq!((same.result.nan, same.result.infinite), (1, 1));
            assert_eq!(same.result.finite, Some((1.0, 2.0)));
            for (index, value) in [(0, 1.0), (1, -inf), (1, 3.0), (2, nan), (3, inf)] {
                let mut values = [nan, inf, 1., 2.];
                values[index] = value;
                let other = compare_with_reference(&tensor(&values, &[4]), &reference, tolerance).unwrap();
                assert!(!other.all_close, "{index}: {other}");
                assert_eq!(other.largest_absolute.value, f64::INFINITY);
                assert_eq!(other.largest_absolute.at, [index]);
            }
        }
        let text = ValueRange::of(&reference).unwrap().to_string();
        assert!(text.contains("with 1 NaN and 1 infinite"), "{text}");
    }

    #[test]
    fn shapes_must_agree() {
        let (a, b) = (tensor(&[0.; 6], &[2, 3]), tensor(&[0.; 6], &[3, 2]));
        let error = compare_with_reference(&a, &b, ELEMENTS).unwrap_err().to_string();
        assert!(error.contains("[2, 3]") && error.contains("[3, 2]"), "{error}");
    }

    #[test]
    fn every_op_passes_in_every_dtype() {
        let dtypes = [DType::F32, DType::F16, DType::BF16];
        let rows = HeadRows {
            heads: 3,
            stride: 11,
            start: 2,
            len: 9,
        };
        for weight in weights(&[33], &[128]) {
            for dtype in dtypes {
                let x = |dims: &[usize], seed| {
                    let values = noise(dims.iter().product(), seed);
                    tensor(&values, dims).to_dtype(dtype).unwrap()
                };
                let check = |comparison: Result<Comparison>| {
                    let comparison = comparison.unwrap();
                    assert!(comparison.all_close, "{dtype:?}: {comparison}");
                };
                let linear = Linear::new(weight.clone(), Some(noise(33, 5))).unwrap();
                check(validate_kernel_output(&linear, &x(&[2, 3, 128], 1)));
                for (orientation, width) in [(Orientation::Ordinary, 128), (Orientation::Transposed, 9)] {
                    let op = PerHead::new(weight.clone(), rows, orientation).unwrap();
                    check(validate_kernel_output(&op, &x(&[4, 3, width], 2)));
                }
            }
        }
        let pack = |n, k, seed| {
            let values = noise(n * k, seed);
            quantize("w", &values, (n, k), Format::mxfp4(), ScaleRule::Maximum)
                .unwrap()
                .into()
        };
        let expert = |seed| Expert {
            gate: pack(32, 64, seed),
            up: pack(32, 64, seed + 1),
            down: pack(64, 32, seed + 2),
        };
        let moe = FusedMoe::new((0..4).map(|e| expert(3 * e)).collect(), vec![expert(50)]).unwrap();
        let x = tensor(&noise(5 * 64, 9), &[5, 64]);
        let ids = Tensor::from_slice(&[0u32, 3, 1, 2, 2, 0, 3, 1, 0, 1], (5, 2), &Device::Cpu).unwrap();
        let shares = tensor(&noise(10, 4), &[5, 2]);
        for dtype in dtypes {
            let x = x.to_dtype(dtype).unwrap();
            let comparison = validate_kernel_output(&moe, (&x, &ids, &shares)).unwrap();
            assert!(comparison.all_close, "{dtype:?}: {comparison}");
        }
        let routing = Routing {
            top_k: 3,
            n_group: 2,
            topk_group: 1,
            normalize: true,
            scaling_factor: 1.8,
        };
        let route = Route::new(routing, noise(16, 3)).unwrap();
        let comparison = validate_kernel_output(&route, &tensor(&noise(160, 8), &[10, 16])).unwrap();
        assert!(comparison.all_close, "{comparison}");
        assert_eq!(
            comparison.result.finite.map(|(_, max)| max.fract()),
            Some(0.0),
            "ids"
        );
    }

    #[test]
    fn inputs_that_do_not_fit_are_errors() {
        let linear = Linear::new(weights(&[8], &[128]).remove(0), None).unwrap();
        assert!(validate_kernel_output(&linear, &tensor(&[0.; 64], &[1, 64])).is_err());
    }
}
