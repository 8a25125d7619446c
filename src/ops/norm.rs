//! Root mean square normalisation.

use super::activations::{from_f32, to_f32, view};
use super::add::{self, Add};
use super::linear::bytes_of;
use super::planned::{self, Planned};
use super::rows::rows;
use crate::cpu::{self, Executor};
use crate::fp4::Bytes;
use crate::metal::norm_rope;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, MetalStorage, Module, Shape, Tensor};
use std::sync::Arc;

const OP: &str = "mmfp4-rms-norm";
const ADDED: &str = "mmfp4-add-norm";

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
    /// Shared by clones, which ops made for a pass hold.
    weight: Arc<[f32]>,
    /// The weight as a device's kernels read it.
    bytes: Bytes,
    eps: f32,
}

impl RmsNorm {
    /// Takes the weight, one value an element.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty weight, or an `eps` that is negative or not finite; [`Error::Io`] without memory.
    pub fn new(weight: Vec<f32>, eps: f64) -> Result<Self> {
        if weight.is_empty() {
            return Err(Error::argument(OP, "weight", "at least one value", "none"));
        }
        if !(eps.is_finite() && eps >= 0.0) {
            return Err(Error::argument(OP, "eps", "0 or more", eps.to_string()));
        }
        Ok(Self {
            bytes: bytes_of(&weight)?,
            weight: weight.into(),
            eps: eps as f32,
        })
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
        planned::prepared(x, 1)?.apply_op1_no_bwd(self)
    }

    /// What is added to the mean of the squares.
    pub fn eps(&self) -> f32 {
        self.eps
    }

    /// The weight as a device's kernels read it.
    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Refuses what has another last dimension.
    fn check(&self, op: &'static str, layout: &Layout) -> Result<()> {
        let (dims, d) = (layout.dims(), self.weight.len());
        if dims.last() == Some(&d) {
            return Ok(());
        }
        let expected = format!("a last dimension of {d}");
        Err(Error::argument(op, "x", expected, format!("shape {dims:?}")))
    }

    /// What a device runs.
    fn planned(&self, layout: &Layout, dtype: DType) -> Result<Option<Planned<'_, 1>>> {
        self.check(OP, layout)?;
        let (x, d) = (rows(OP, "x", layout, dtype, 1)?, self.weight.len());
        let norm = norm_rope::RmsNorm {
            dtype,
            rows: layout.shape().elem_count() / d,
            d,
            eps: self.eps,
            x,
            added: None,
            weight: 0,
            y: 2,
        };
        Ok(Some(Planned {
            launches: launches(norm)?,
            bytes: vec![&self.bytes],
            outputs: [(layout.shape().clone(), dtype)],
            scratch: Vec::new(),
        }))
    }

    /// What a device runs for a sum and its norm.
    fn planned_added(&self, x: &Tensor, delta: &Tensor) -> Result<Option<Planned<'_, 2>>> {
        let (dtype, shape) = (x.dtype(), x.shape().clone());
        let d = self.weight.len();
        let norm = norm_rope::RmsNorm {
            dtype,
            rows: shape.elem_count() / d,
            d,
            eps: self.eps,
            x: rows(ADDED, "x", x.layout(), dtype, 1)?,
            added: Some((rows(ADDED, "delta", delta.layout(), dtype, 2)?, 3)),
            weight: 0,
            y: 4,
        };
        Ok(Some(Planned {
            launches: launches(norm)?,
            bytes: vec![&self.bytes],
            outputs: [(shape.clone(), dtype), (shape, dtype)],
            scratch: Vec::new(),
        }))
    }
}

/// None for no rows.
fn launches(norm: norm_rope::RmsNorm) -> Result<Vec<crate::metal::plan::Launch>> {
    match norm.rows {
        0 => Ok(Vec::new()),
        _ => Ok(vec![norm.launch()?]),
    }
}

/// `x + delta`, and its norm: a residual connection and what follows it, in one dispatch where kernels run. The sum is
/// rounded to the activations' dtype before it is normalised, as [`Add`] and [`RmsNorm`] in turn do.
///
/// # Errors
/// Names the argument at fault where shape, dtype or device do not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_mmfp4::{nn::RmsNorm, ops::add_norm};
///
/// let (x, delta) = (Tensor::new(&[[1f32, 1.]], &Device::Cpu)?, Tensor::new(&[[2f32, 3.]], &Device::Cpu)?);
/// let (sum, normed) = add_norm(&x, &delta, &RmsNorm::new(vec![1., 1.], 0.0)?)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[3., 4.]]);
/// assert!((normed.to_vec2::<f32>()?[0][0] - 3. / 12.5f32.sqrt()).abs() < 1e-6);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
pub fn add_norm(x: &Tensor, delta: &Tensor, norm: &RmsNorm) -> candle_core::Result<(Tensor, Tensor)> {
    norm.check(ADDED, x.layout())?;
    add::check(
        ADDED,
        ("delta", "x"),
        (x.layout(), x.dtype()),
        (delta.layout(), delta.dtype()),
    )?;
    let (x, delta) = (planned::prepared(x, 1)?, planned::prepared(delta, 1)?);
    if let Some([sum, normed]) = planned::over(ADDED, &[&x, &delta], || norm.planned_added(&x, &delta))? {
        return Ok((sum, normed));
    }
    let sum = Add.forward(&x, &delta)?;
    let normed = norm.forward(&sum)?;
    Ok((sum, normed))
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
        if let Some([done]) =
            planned::in_place_of_cpu(OP, &[storage], || self.planned(layout, storage.dtype()))?
        {
            return Ok(done);
        }
        self.check(OP, layout)?;
        let (dims, d) = (layout.dims(), self.weight.len());
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

    fn metal_fwd(
        &self,
        storage: &MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let [done] = planned::on_metal(OP, &[storage], || self.planned(layout, storage.dtype()))?;
        Ok(done)
    }
}
