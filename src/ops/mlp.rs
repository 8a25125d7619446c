//! A gated MLP: a mixture of experts with one expert.

use super::activations::{from_f32, to_f32};
use crate::cpu::{self, Arithmetic, Executor, Expert};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, Layout, MetalStorage, Module, Shape, Tensor};

const OP: &str = "mmfp4-gated-mlp";

/// `down(silu(gate x) · up x)` in one call, which reads `x` once and keeps what is between to itself: `gate` and `up`
/// are `[I, D]`, `down` `[D, I]`, without biases.
#[derive(Debug, Clone)]
pub struct GatedMlp {
    mlp: Expert,
    arithmetic: Arithmetic,
}

impl GatedMlp {
    /// Takes the three weights, used where they lie.
    ///
    /// # Errors
    /// [`Error::Argument`] where their shapes disagree.
    pub fn new(mlp: Expert) -> Result<Self> {
        let (width, d) = mlp.gate.shape();
        for (argument, weight, shape) in [("up", &mlp.up, (width, d)), ("down", &mlp.down, (d, width))] {
            if weight.shape() != shape {
                let (expected, found) = (format!("{shape:?}"), format!("{:?}", weight.shape()));
                return Err(Error::argument(OP, argument, expected, found));
            }
        }
        let arithmetic = Arithmetic::default();
        Ok(Self { mlp, arithmetic })
    }

    /// The same op in this arithmetic, on the CPU; the default is [`Arithmetic::W4A8`].
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// The three weights.
    pub fn weights(&self) -> &Expert {
        &self.mlp
    }

    /// Applies the op to `x` `[…, D]` in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl Module for GatedMlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.forward(x)
    }
}

impl CustomOp1 for GatedMlp {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        super::without_kernel(OP);
        let (dims, d) = (layout.dims(), self.mlp.gate.shape().1);
        if dims.last() != Some(&d) {
            let expected = format!("a last dimension of {d}");
            return Err(Error::argument(OP, "x", expected, format!("shape {dims:?}")).into());
        }
        let x = to_f32(OP, "x", storage, layout)?;
        let mut y = vec![0.0; x.len()];
        cpu::fused_moe(
            &*Executor::current()?,
            &[],
            std::slice::from_ref(&self.mlp),
            &x,
            &[],
            &[],
            0,
            self.arithmetic,
            &mut y,
        );
        Ok((from_f32(y, storage), layout.shape().clone()))
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        super::no_metal(OP)
    }
}
