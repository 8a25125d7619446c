//! Rotary position embedding.

use super::activations::{from_f32, to_f32, view};
use crate::Error;
use crate::cpu::{self, Executor, HeadView, Pairing};
use candle_core::{CpuStorage, CustomOp3, Layout, MetalStorage, Shape, Tensor};

const OP: &str = "mmfp4-rope";

/// The op behind [`RotaryEmbedding`](crate::nn::RotaryEmbedding): rotates pairs of elements by given angles, in f32. A
/// part of each head, narrowed out of a wider tensor, is read where it lies.
#[derive(Debug, Clone, Copy)]
pub struct Rope {
    pairing: Pairing,
}

impl Rope {
    /// An op for this pairing.
    pub const fn new(pairing: Pairing) -> Self {
        Self { pairing }
    }

    /// Rotates `x` `[tokens, heads, d]`, F32, F16 or BF16, by the angles of these cosines and sines, both
    /// `[tokens, d/2]`.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op3_no_bwd(cos, sin, self)
    }
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        super::without_kernel(OP);
        let &[tokens, heads, width] = layout.dims() else {
            let found = format!("shape {:?}", layout.dims());
            return Err(Error::argument(OP, "x", "[tokens, heads, d]", found).into());
        };
        if width == 0 || width % 2 != 0 {
            return Err(Error::argument(OP, "x", "an even last dimension", width.to_string()).into());
        }
        for (argument, layout) in [("cos", cos_layout), ("sin", sin_layout)] {
            if layout.dims() != [tokens, width / 2] {
                let expected = format!("[{tokens}, {}], an angle a token and pair", width / 2);
                let found = format!("shape {:?}", layout.dims());
                return Err(Error::argument(OP, argument, expected, found).into());
            }
        }
        let x = view(OP, "x", storage, layout)?;
        let mut y = vec![0.0; tokens * heads * width];
        if !y.is_empty() {
            let x = HeadView {
                data: &x.data,
                row: x.strides[0],
                head: x.strides[1],
                width,
            };
            let (cos, sin) = (
                to_f32(OP, "cos", cos, cos_layout)?,
                to_f32(OP, "sin", sin, sin_layout)?,
            );
            cpu::rope(
                &*Executor::current()?,
                self.pairing,
                x,
                heads,
                (&cos, &sin),
                &mut y,
            );
        }
        Ok((from_f32(y, storage), layout.shape().clone()))
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        super::no_metal(OP)
    }
}
