//! `y = x · Wᵀ + b`.

use super::activations::{from_f32, to_f32};
use crate::fp4::Weight;
use crate::{Error, Result, cpu};
use candle_core::{CpuStorage, CustomOp1, Layout, MetalStorage, Shape, Tensor};

const OP: &str = "mmfp4-linear";

/// The op behind [`MmfP4Linear`](crate::nn::MmfP4Linear): `x` is `[…, K]`, the result `[…, N]`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// Takes a weight `[N, K]` and a bias of `N` values.
    ///
    /// # Errors
    /// [`Error::Argument`] where the bias has another length.
    pub fn new(weight: Weight, bias: Option<Vec<f32>>) -> Result<Self> {
        let n = weight.shape().0;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != n) {
            return Err(Error::argument(
                OP,
                "bias",
                format!("{n} values"),
                bias.len().to_string(),
            ));
        }
        Ok(Self { weight, bias })
    }

    /// The weight.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The bias.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Applies the op to `x` `[…, K]` in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (n, k) = self.weight.shape();
        let mut dims = layout.dims().to_vec();
        if dims.last() != Some(&k) {
            let expected = format!("a last dimension of {k}, the weight being [{n}, {k}]");
            return Err(Error::argument(OP, "x", expected, format!("shape {dims:?}")).into());
        }
        let x = to_f32(OP, "x", storage, layout)?;
        let mut y = cpu::linear(&self.weight, &x, x.len() / k);
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(n) {
                for (value, bias) in row.iter_mut().zip(bias) {
                    *value += bias;
                }
            }
        }
        if let Some(last) = dims.last_mut() {
            *last = n;
        }
        Ok((from_f32(y, storage), dims.into()))
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        super::no_metal(OP)
    }
}
