//! `y = norm(x) · Wᵀ + b`.

use super::linear::Linear;
use super::norm::RmsNorm;
use super::planned::{self, Planned};
use super::products::Products;
use crate::fp4::Weight;
use crate::metal::linear::FEW;
use crate::{Error, Result};
use candle_core::{DType, Layout, Tensor};

const OP: &str = "mmfp4-normed-linear";

/// A linear op of the RMS norm of its input: `x` is `[…, K]`, the result `[…, N]`.
///
/// On a device with kernels, up to eight rows are normalised where they are multiplied, in one dispatch; the norm is then not
/// rounded to the activations' dtype. More rows, a weight that is not in FP4, and the CPU: [`RmsNorm`], then [`Linear`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_mmfp4::fp4::{Format, ScaleRule, Weight, quantize};
/// use candle_mmfp4::ops::{Linear, NormedLinear, RmsNorm};
///
/// let weight = quantize("w", &[6.0; 32], (2, 16), Format::nvfp4(), ScaleRule::Maximum)?;
/// let op = NormedLinear::new(RmsNorm::new(vec![1.0; 16], 0.0)?, Linear::new(Weight::from(weight), None)?)?;
/// let y = op.forward(&Tensor::new(&[[3f32; 16]], &Device::Cpu)?)?;
/// assert!((y.to_vec2::<f32>()?[0][1] - 96.0).abs() < 0.1);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct NormedLinear {
    norm: RmsNorm,
    linear: Linear,
}

impl NormedLinear {
    /// Joins a norm and a product of its output.
    ///
    /// # Errors
    /// [`Error::Argument`] where the norm's weight has another length than the weight's rows.
    pub fn new(norm: RmsNorm, linear: Linear) -> Result<Self> {
        let (k, d) = (linear.weight().shape().1, norm.weight().len());
        if d != k {
            return Err(Error::argument(OP, "norm", format!("{k} values"), d.to_string()));
        }
        Ok(Self { norm, linear })
    }

    /// The norm.
    pub fn norm(&self) -> &RmsNorm {
        &self.norm
    }

    /// The product.
    pub fn linear(&self) -> &Linear {
        &self.linear
    }

    /// Applies the op to `x` `[…, K]` in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if self.is_fused(x) {
            let x = planned::prepared(x, 1)?;
            if let Some([y]) = planned::over(OP, &[&x], || self.planned(x.layout(), x.dtype()))? {
                return Ok(y);
            }
        }
        self.linear.forward(&self.norm.forward(x)?)
    }

    /// Whether one launch does both for such an `x`: there is then nothing between norm and product to be seen.
    pub fn is_fused(&self, x: &Tensor) -> bool {
        let k = self.norm.weight().len();
        let folds = matches!(self.linear.weight(), Weight::Fp4(_)) && x.elem_count() <= FEW * k;
        planned::runs_on(x.device()) && folds
    }

    /// What a device runs.
    fn planned(&self, layout: &Layout, dtype: DType) -> Result<Option<Planned<'_, 1>>> {
        let products = Products::with(OP, std::iter::once(self.linear.part()));
        products
            .map(|all| {
                all.of_norm(self.norm.bytes(), self.norm.eps())
                    .planned(layout, dtype)
            })
            .transpose()
    }
}
