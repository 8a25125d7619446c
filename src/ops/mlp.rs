//! A gated MLP: a mixture of experts with one expert.

use super::activations::{from_f32, to_f32};
use super::moe::mixture;
use super::planned::{self, Planned};
use crate::cpu::{self, Arithmetic, Executor, Expert};
use crate::fp4::gather;
use crate::metal::moe::Stack;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, MetalStorage, Module, Shape, Tensor};

const OP: &str = "mmfp4-gated-mlp";

/// `down(silu(gate x) · up x)` in one call, which reads `x` once and keeps what is between to itself: `gate` and `up`
/// are `[I, D]`, `down` `[D, I]`, without biases.
#[derive(Debug, Clone)]
pub struct GatedMlp {
    mlp: Expert,
    copied: usize,
    /// The weights as a device's kernels find them; `None` where no kernel takes them.
    stack: Option<Stack>,
    arithmetic: Arithmetic,
}

impl GatedMlp {
    /// Takes the three weights, used where they lie; where that is not one map, they are copied into one, once.
    ///
    /// # Errors
    /// [`Error::Argument`] where their shapes disagree; [`Error::Io`] without memory.
    pub fn new(mut mlp: Expert) -> Result<Self> {
        let (width, d) = mlp.gate.shape();
        for (argument, weight, shape) in [("up", &mlp.up, (width, d)), ("down", &mlp.down, (d, width))] {
            if weight.shape() != shape {
                let (expected, found) = (format!("{shape:?}"), format!("{:?}", weight.shape()));
                return Err(Error::argument(OP, argument, expected, found));
            }
        }
        let copied = gather(&mut [&mut mlp.gate, &mut mlp.up, &mut mlp.down])?;
        Ok(Self {
            stack: Stack::of(&[], std::slice::from_ref(&mlp))?,
            mlp,
            copied,
            arithmetic: Arithmetic::default(),
        })
    }

    /// The same op in this arithmetic, on the CPU; the default is [`Arithmetic::W4A8`].
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// The three weights.
    pub fn weights(&self) -> &Expert {
        &self.mlp
    }

    /// Bytes that had to be copied to bring all weights into one map; 0 where they lay so already.
    pub fn copied_bytes(&self) -> usize {
        self.copied
    }

    /// Whether a device that runs launch plans has kernels for these weights.
    pub fn has_kernel(&self) -> bool {
        self.stack.is_some()
    }

    /// Applies the op to `x` `[…, D]` in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        planned::prepared(x, 1)?.apply_op1_no_bwd(self)
    }

    /// What a device runs; `None` for weights that no kernel takes.
    fn planned(&self, x: &Layout, dtype: DType) -> Result<Option<Planned<'_, 1>>> {
        let Some(stack) = &self.stack else { return Ok(None) };
        let leading = self.check_shape(x)?;
        mixture(OP, stack, None, (x, dtype), leading).map(Some)
    }

    /// The leading dimensions.
    fn check_shape<'a>(&self, x: &'a Layout) -> Result<&'a [usize]> {
        let d = self.mlp.gate.shape().1;
        let Some((_, leading)) = x.dims().split_last().filter(|(last, _)| **last == d) else {
            let (expected, found) = (
                format!("a last dimension of {d}"),
                format!("shape {:?}", x.dims()),
            );
            return Err(Error::argument(OP, "x", expected, found));
        };
        Ok(leading)
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
        if let Some([done]) =
            planned::in_place_of_cpu(OP, &[storage], || self.planned(layout, storage.dtype()))?
        {
            return Ok(done);
        }
        self.check_shape(layout)?;
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

    fn metal_fwd(
        &self,
        storage: &MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let [done] = planned::on_metal(OP, &[storage], || self.planned(layout, storage.dtype()))?;
        Ok(done)
    }
}
