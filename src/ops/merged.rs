//! A product a head with what parts of attention come to.

use super::per_head::{Orientation, PerHead};
use super::planned::{self, Planned};
use crate::cpu::{self, Executor, reference};
use crate::fp4::Bytes;
use crate::metal::merged::{Operand, Product, takes};
use crate::metal::plan::Launch;
use crate::{Error, Result};
use candle_core::{DType, Shape, Tensor};

const OP: &str = "mmfp4-merged-per-head";

/// Operands of a plan: attention's parts and the output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Merge {
    /// The weight's first region.
    pub weight: usize,
    /// `[tokens, heads, splits, K]` in F32.
    pub parts: usize,
    /// `[tokens, heads, splits, 2]` in F32.
    pub stats: usize,
    /// `[tokens, heads, len]`.
    pub y: usize,
}

impl PerHead {
    /// The product with what attention's parts come to, which is computed where it is multiplied: long contexts are attended
    /// to in splits, and each leaves of a token's head a part `Σ 2^(score - m) · value`, undivided, in `parts`
    /// `[n, heads, splits, K]`, and in `stats` `[n, heads, splits, 2]` its largest score in base 2, `m`, and
    /// `Σ 2^(score - m)`; all in F32. Gives `[n, heads, len]` in `dtype`, F32, F16 or BF16.
    ///
    /// What is merged is not rounded to `dtype` in between. On a device up to eight tokens and 512 columns are one dispatch; more
    /// have no kernel.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_mmfp4::cpu::HeadRows;
    /// use candle_mmfp4::fp4::{Format, ScaleRule, Weight, quantize};
    /// use candle_mmfp4::ops::{Orientation, PerHead};
    ///
    /// let weight = quantize("w", &[6.0; 32], (2, 16), Format::nvfp4(), ScaleRule::Maximum)?;
    /// let rows = HeadRows { heads: 1, stride: 2, start: 0, len: 2 };
    /// let op = PerHead::new(Weight::from(weight), rows, Orientation::Ordinary)?;
    /// // Two splits with two tokens each, scored alike: sums of their values.
    /// let parts = Tensor::new(&[[[[1f32; 16], [3.0; 16]]]], &Device::Cpu)?;
    /// let stats = Tensor::new(&[[[[0f32, 2.0], [0.0, 2.0]]]], &Device::Cpu)?;
    /// let y = op.forward_merged(&parts, &stats, DType::F32)?;
    /// assert!((y.to_vec3::<f32>()?[0][0][1] - 96.0).abs() < 0.1);
    /// # Ok::<(), candle_mmfp4::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`] for an op that is not [`Orientation::Ordinary`], and where shapes, dtypes or devices do not fit.
    pub fn forward_merged(&self, parts: &Tensor, stats: &Tensor, dtype: DType) -> Result<Tensor> {
        let (n, splits) = self.checked(parts, stats)?;
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            let found = format!("{dtype:?}");
            return Err(Error::argument(OP, "dtype", "F32, F16 or BF16", found));
        }
        let [parts, stats] = [parts, stats].map(whole);
        let (parts, stats) = (parts?, stats?);
        let plan = || self.planned_merged((n, splits), dtype);
        if n > 0
            && let Some([y]) = planned::over(OP, &[&parts, &stats], plan)?
        {
            return Ok(y);
        }
        let k = self.weight.shape().1;
        let device = parts.device();
        let [parts, stats] = [&parts, &stats].map(|tensor| tensor.flatten_all()?.to_vec1::<f32>());
        let x = reference::merge_parts(&parts?, &stats?, splits, k);
        let mut y = vec![0.0; n * self.rows.heads * self.rows.len];
        let executor = Executor::current()?;
        cpu::per_head(&executor, &self.weight, self.rows, &x, self.arithmetic, &mut y);
        Ok(Tensor::from_vec(y, self.merged_shape(n), device)?.to_dtype(dtype)?)
    }

    /// Tokens and splits.
    fn checked(&self, parts: &Tensor, stats: &Tensor) -> Result<(usize, usize)> {
        if self.orientation != Orientation::Ordinary {
            let found = format!("{:?}", self.orientation);
            return Err(Error::argument(OP, "orientation", "Ordinary", found));
        }
        let (heads, k) = (self.rows.heads, self.weight.shape().1);
        let fits = |tensor: &Tensor, last: usize| match *tensor.dims() {
            [n, of_heads, splits, width] if of_heads == heads && width == last && splits > 0 => {
                (tensor.dtype() == DType::F32).then_some((n, splits))
            }
            _ => None,
        };
        let refused = |argument, expected: String, tensor: &Tensor| {
            let found = format!("{:?} {:?}", tensor.dtype(), tensor.dims());
            Err(Error::argument(OP, argument, expected, found))
        };
        let Some((n, splits)) = fits(parts, k) else {
            return refused("parts", format!("F32 [n, {heads}, splits, {k}]"), parts);
        };
        if fits(stats, 2) != Some((n, splits)) {
            return refused("stats", format!("F32 [{n}, {heads}, {splits}, 2]"), stats);
        }
        Ok((n, splits))
    }

    /// Whether a device merges parts of so many tokens and heads, so wide, where it multiplies them.
    pub(super) fn takes_parts(&self, n: usize, heads: usize, width: usize) -> bool {
        self.orientation == Orientation::Ordinary
            && (self.rows.heads, self.weight.shape().1) == (heads, width)
            && takes(&self.weight, n)
    }

    /// The launch that merges parts of `n` tokens, `splits` of each head, and multiplies them; `None` where no kernel takes so
    /// many, or the weight.
    ///
    /// # Errors
    /// Those of [`Product::launch`].
    pub(super) fn merged_launch(
        &self,
        operands: Merge,
        (n, splits): (usize, usize),
        dtype: DType,
    ) -> Result<Option<Launch>> {
        let Some(weight) = Operand::from(&self.weight, operands.weight).filter(|_| takes(&self.weight, n))
        else {
            return Ok(None);
        };
        let product = Product {
            weight,
            rows: self.rows,
            parts: operands.parts,
            stats: operands.stats,
            y: operands.y,
            dtype,
            m: n,
            splits,
        };
        product.launch().map(Some)
    }

    /// The weight's bytes, as a plan's operands.
    pub(super) fn regions(&self) -> Vec<&Bytes> {
        self.weight.regions().collect()
    }

    /// `[n, heads, len]`.
    pub(super) fn merged_shape(&self, n: usize) -> Shape {
        (n, self.rows.heads, self.rows.len).into()
    }

    /// What a device runs of [`forward_merged`](Self::forward_merged).
    fn planned_merged(&self, (n, splits): (usize, usize), dtype: DType) -> Result<Option<Planned<'_, 1>>> {
        let bytes = self.regions();
        let inputs = bytes.len();
        let operands = Merge {
            weight: 0,
            parts: inputs,
            stats: inputs + 1,
            y: inputs + 2,
        };
        let launch = self.merged_launch(operands, (n, splits), dtype)?;
        Ok(launch.map(|launch| Planned {
            launches: vec![launch],
            bytes,
            outputs: [(self.merged_shape(n), dtype)],
            scratch: Vec::new(),
        }))
    }
}

/// A tensor from the start of its memory on, without gaps: its pairs are aligned.
fn whole(tensor: &Tensor) -> candle_core::Result<Tensor> {
    if tensor.is_contiguous() && tensor.layout().start_offset() == 0 {
        return Ok(tensor.clone());
    }
    tensor.force_contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::noise;
    use crate::cpu::{Arithmetic, HeadRows};
    use crate::fp4::{Format, ScaleRule, Weight, quantize};
    use candle_core::Device;

    fn op(orientation: Orientation) -> PerHead {
        let weight = quantize(
            "w",
            &noise(10 * 32, 1),
            (10, 32),
            Format::mxfp4(),
            ScaleRule::Maximum,
        )
        .unwrap();
        let rows = HeadRows {
            heads: 2,
            stride: 5,
            start: 2,
            len: 3,
        };
        PerHead::new(Weight::from(weight), rows, orientation)
            .unwrap()
            .with_arithmetic(Arithmetic::Exact)
    }

    fn tensor(shape: &[usize], seed: u64) -> Tensor {
        let values = noise(shape.iter().product(), seed);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn parts_are_merged_and_then_multiplied() {
        let op = op(Orientation::Ordinary);
        // Columns of a larger tensor, and pairs that begin anywhere.
        let parts = tensor(&[3, 2, 4, 40], 2).narrow(3, 5, 32).unwrap();
        let stats = tensor(&[3 * 2 * 4 * 2 + 1], 3).narrow(0, 1, 48).unwrap();
        let stats = stats.abs().unwrap().reshape((3, 2, 4, 2)).unwrap();
        let y = op.forward_merged(&parts, &stats, DType::F16).unwrap();
        assert_eq!((y.dims(), y.dtype()), ([3, 2, 3].as_slice(), DType::F16));
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let x = reference::merge_parts(&flat(&parts), &flat(&stats), 4, 32);
        let x = Tensor::from_vec(x, (3, 2, 32), &Device::Cpu).unwrap();
        let expected = op.forward(&x).unwrap();
        for (y, expected) in flat(&y.to_dtype(DType::F32).unwrap()).iter().zip(flat(&expected)) {
            assert!(
                (y - expected).abs() <= expected.abs() / 1024.0,
                "{y} for {expected}"
            );
        }
        let none = op.forward_merged(
            &parts.narrow(0, 0, 0).unwrap(),
            &stats.narrow(0, 0, 0).unwrap(),
            DType::F32,
        );
        assert_eq!(none.unwrap().dims(), [0, 2, 3]);
    }

    #[test]
    fn what_cannot_be_merged_is_named() {
        let (parts, stats) = (tensor(&[1, 2, 4, 32], 2), tensor(&[1, 2, 4, 2], 3));
        let refused = |op: PerHead, parts: &Tensor, stats: &Tensor, dtype, argument: &str| {
            let error = op.forward_merged(parts, stats, dtype).unwrap_err().to_string();
            assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
        };
        let ordinary = || op(Orientation::Ordinary);
        refused(
            op(Orientation::Transposed),
            &parts,
            &stats,
            DType::F32,
            "orientation",
        );
        refused(ordinary(), &parts, &stats, DType::U32, "dtype");
        for wrong in [
            parts.narrow(3, 0, 16).unwrap(),
            parts.narrow(1, 0, 1).unwrap(),
            parts.narrow(2, 0, 0).unwrap(),
            parts.squeeze(0).unwrap(),
            parts.to_dtype(DType::F16).unwrap(),
        ] {
            refused(ordinary(), &wrong, &stats, DType::F32, "parts");
        }
        for wrong in [
            stats.narrow(2, 0, 3).unwrap(),
            stats.narrow(3, 0, 1).unwrap(),
            stats.to_dtype(DType::F16).unwrap(),
        ] {
            refused(ordinary(), &parts, &wrong, DType::F32, "stats");
        }
    }
}
