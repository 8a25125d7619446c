//! Products with a head's part of a weight, in both orientations.

use super::activations::{from_f32, to_f32};
use super::planned::{self, Planned};
use super::products::Products;
use crate::cpu::{self, Arithmetic, Executor, HeadRows};
use crate::fp4::Weight;
use crate::metal::linear::Direction;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, MetalStorage, Shape, Tensor};

const OP: &str = "mmfp4-per-head";

/// Over which axis of the weight `[N, K]` the sum runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orientation {
    /// Over K: `[…, heads, K]` to `[…, heads, len]`.
    Ordinary,
    /// Over the head's rows of N, while scales run along K: `[…, heads, len]` to `[…, heads, K]`.
    Transposed,
}

/// A product a head. MLA absorbs `kv_b` with it: queries meet the key rows transposed, latents the value
/// rows as they are; a checkpoint that stores the key rows transposed already (MLX's `embed_q`) uses
/// [`Orientation::Ordinary`] for both. With one head and all rows, [`Orientation::Transposed`] is `x · W`.
#[derive(Debug, Clone)]
pub struct PerHead {
    pub(super) weight: Weight,
    pub(super) rows: HeadRows,
    pub(super) orientation: Orientation,
    pub(super) arithmetic: Arithmetic,
}

impl PerHead {
    /// Takes a weight `[N, K]` and the rows of it that belong to each head.
    ///
    /// # Errors
    /// [`Error::Argument`] where the rows leave the weight or a head's rows its stride.
    pub fn new(weight: Weight, rows: HeadRows, orientation: Orientation) -> Result<Self> {
        let (n, k) = weight.shape();
        if !rows.fit(n) {
            let expected = format!("rows within a weight of [{n}, {k}], start + len <= stride");
            return Err(Error::argument(OP, "rows", expected, format!("{rows:?}")));
        }
        Ok(Self {
            weight,
            rows,
            orientation,
            arithmetic: Arithmetic::default(),
        })
    }

    /// The same op in this arithmetic, on the CPU; the default is [`Arithmetic::W4A8`]. Transposed products are
    /// exact in either.
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// The whole weight, of which heads have parts.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Applies the op to `x` `[…, heads, K]` ([`Orientation::Ordinary`]) or `[…, heads, len]`
    /// ([`Orientation::Transposed`]) in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        planned::prepared(x, 2)?.apply_op1_no_bwd(self)
    }

    /// What a device runs; `None` for weights that no kernel takes.
    fn planned(&self, layout: &Layout, dtype: DType) -> Result<Option<Planned<'_, 1>>> {
        let direction = match self.orientation {
            Orientation::Ordinary => Direction::Rows,
            Orientation::Transposed => Direction::Columns,
        };
        let products = Products::per_head(OP, &self.weight, self.rows, direction);
        products.map(|all| all.planned(layout, dtype)).transpose()
    }
}

impl CustomOp1 for PerHead {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        if let Some([done]) =
            planned::in_place_of_cpu(OP, &[storage], || self.planned(layout, storage.dtype()))?
        {
            return Ok(done);
        }
        let (k, HeadRows { heads, len, .. }) = (self.weight.shape().1, self.rows);
        let (from, to) = match self.orientation {
            Orientation::Ordinary => (k, len),
            Orientation::Transposed => (len, k),
        };
        let mut dims = layout.dims().to_vec();
        if !dims.ends_with(&[heads, from]) {
            let expected = format!("last dimensions of [{heads}, {from}]");
            return Err(Error::argument(OP, "x", expected, format!("shape {dims:?}")).into());
        }
        let x = to_f32(OP, "x", storage, layout)?;
        let m = x.len() / (heads * from);
        let (executor, mut y) = (Executor::current()?, vec![0.0; m * heads * to]);
        match self.orientation {
            Orientation::Ordinary => {
                cpu::per_head(&executor, &self.weight, self.rows, &x, self.arithmetic, &mut y)
            }
            Orientation::Transposed => {
                cpu::per_head_transposed(&executor, &self.weight, self.rows, &x, &mut y)
            }
        }
        if let Some(last) = dims.last_mut() {
            *last = to;
        }
        Ok((from_f32(y, storage), dims.into()))
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
