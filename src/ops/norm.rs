//! Root mean square normalisation.

use super::activations::{from_f32, to_f32, view};
use crate::cpu::{self, Executor};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, Layout, MetalStorage, Module, Shape, Tensor};

const OP: &str = "mmfp4-rms-norm";

/// `x / √(mean(x²) + eps) · weight` over the last dimension, in f32. Rows of a narrowed tensor are read where they
/// lie.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_mmfp4::nn::RmsNorm;
///
/// let both = Tensor::new(&[[3f32, 4., 9.], [0., 2., 9.]], &Device::Cpu)?;
/// let norm = RmsNorm::new(vec![1., 2.], 0.0)?;
/// let y = norm.forward(&both.narrow(1, 0, 2)?)?.to_vec2::<f32>()?;
/// assert!((y[0][0] - 3. / 12.5f32.sqrt()).abs() < 1e-6 && (y[1][1] - 2. * 2f32.sqrt()).abs() < 1e-6);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    /// Takes the weight, one value an element.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty weight, or an `eps` that is negative or not finite.
    pub fn new(weight: Vec<f32>, eps: f64) -> Result<Self> {
        if weight.is_empty() {
            return Err(Error::argument(OP, "weight", "at least one value", "none"));
        }
        if !(eps.is_finite() && eps >= 0.0) {
            return Err(Error::argument(OP, "eps", "0 or more", eps.to_string()));
        }
        let eps = eps as f32;
        Ok(Self { weight, eps })
    }

    /// The weight.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// Applies the op to `x` `[…, d]` in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.forward(x)
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        super::without_kernel(OP);
        let (dims, d) = (layout.dims(), self.weight.len());
        if dims.last() != Some(&d) {
            let expected = format!("a last dimension of {d}");
            return Err(Error::argument(OP, "x", expected, format!("shape {dims:?}")).into());
        }
        let rows = layout.shape().elem_count() / d;
        let (x, stride) = match dims {
            [_, _] => {
                let view = view(OP, "x", storage, layout)?;
                (view.data, view.strides[0])
            }
            _ => (to_f32(OP, "x", storage, layout)?, d),
        };
        let mut y = vec![0.0; rows * d];
        cpu::rms_norm(&*Executor::current()?, &x, stride, &self.weight, self.eps, &mut y);
        Ok((from_f32(y, storage), layout.shape().clone()))
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        super::no_metal(OP)
    }
}
