//! Rotary position embedding.

use super::activations::{from_f32, to_f32, view};
use super::planned::{self, Planned};
use super::rows::{heads, prepared_heads, rows};
use crate::cpu::{self, Executor, HeadView, Pairing};
use crate::metal::norm_rope::{self, Angles};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, MetalStorage, Shape, Tensor};

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
        let (cos, sin) = (planned::prepared(cos, 1)?, planned::prepared(sin, 1)?);
        prepared_heads(x)?.apply_op3_no_bwd(&cos, &sin, self)
    }

    /// Which elements are pairs.
    pub(super) fn pairing(self) -> Pairing {
        self.pairing
    }

    /// What a device runs; `None` for angles that are not in F32.
    fn planned(
        self,
        (x, dtype): (&Layout, DType),
        cos: (&Layout, DType),
        sin: (&Layout, DType),
    ) -> Result<Option<Planned<'static, 1>>> {
        let [tokens, count, width] = check(OP, x, cos.0, sin.0)?;
        let Some(angles) = angles(OP, self.pairing, width / 2, cos, sin, 1)? else {
            return Ok(None);
        };
        let launches = match tokens * count {
            0 => Vec::new(),
            _ => {
                let rope = norm_rope::Rope {
                    dtype,
                    tokens,
                    x: heads(OP, "x", x, dtype, 0)?,
                    angles,
                    y: 3,
                };
                vec![rope.launch()?]
            }
        };
        Ok(Some(Planned {
            launches,
            bytes: Vec::new(),
            outputs: [(x.shape().clone(), dtype)],
            scratch: Vec::new(),
        }))
    }
}

/// Checks heads and their angles; gives `[tokens, heads, d]`.
pub(super) fn check(op: &'static str, x: &Layout, cos: &Layout, sin: &Layout) -> Result<[usize; 3]> {
    let &[tokens, heads, width] = x.dims() else {
        let found = format!("shape {:?}", x.dims());
        return Err(Error::argument(op, "x", "[tokens, heads, d]", found));
    };
    if width == 0 || width % 2 != 0 {
        return Err(Error::argument(
            op,
            "x",
            "an even last dimension",
            width.to_string(),
        ));
    }
    check_angles(op, [tokens, width / 2], cos, sin)?;
    Ok([tokens, heads, width])
}

/// Checks cosines and sines, a row a token and a column a pair.
pub(super) fn check_angles(op: &'static str, shape: [usize; 2], cos: &Layout, sin: &Layout) -> Result<()> {
    for (argument, layout) in [("cos", cos), ("sin", sin)] {
        if layout.dims() != shape {
            let expected = format!("{shape:?}, an angle a token and pair");
            let found = format!("shape {:?}", layout.dims());
            return Err(Error::argument(op, argument, expected, found));
        }
    }
    Ok(())
}

/// Cosines and sines for a plan, of which they are operands from `first` on; `None` where they are not in F32.
pub(super) fn angles(
    op: &'static str,
    pairing: Pairing,
    pairs: usize,
    (cos, of_cos): (&Layout, DType),
    (sin, of_sin): (&Layout, DType),
    first: usize,
) -> Result<Option<Angles>> {
    if of_cos != DType::F32 || of_sin != DType::F32 {
        return Ok(None);
    }
    Ok(Some(Angles {
        pairing,
        pairs,
        cos: rows(op, "cos", cos, of_cos, first)?,
        sin: rows(op, "sin", sin, of_sin, first + 1)?,
    }))
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
        let plan = || {
            self.planned(
                (layout, storage.dtype()),
                (cos_layout, cos.dtype()),
                (sin_layout, sin.dtype()),
            )
        };
        if let Some([done]) = planned::in_place_of_cpu(OP, &[storage, cos, sin], plan)? {
            return Ok(done);
        }
        let [tokens, heads, width] = check(OP, layout, cos_layout, sin_layout)?;
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
        storage: &MetalStorage,
        layout: &Layout,
        cos: &MetalStorage,
        cos_layout: &Layout,
        sin: &MetalStorage,
        sin_layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let plan = || {
            self.planned(
                (layout, storage.dtype()),
                (cos_layout, cos.dtype()),
                (sin_layout, sin.dtype()),
            )
        };
        let [done] = planned::on_metal(OP, &[storage, cos, sin], plan)?;
        Ok(done)
    }
}
