//! `y = x · Wᵀ + b`.

use super::activations::{from_f32, to_f32};
use super::planned::{self, Planned};
use super::products::Products;
use crate::cpu::{self, Arithmetic, Executor};
use crate::fp4::Bytes;
use crate::fp4::Weight;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, MetalStorage, Shape, Tensor};

const OP: &str = "mmfp4-linear";
const JOINED: &str = "mmfp4-joined-linear";

/// The op behind [`MmfP4Linear`](crate::nn::MmfP4Linear): `x` is `[…, K]`, the result `[…, N]`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Vec<f32>>,
    /// The bias as a device's kernels read it.
    bias_bytes: Option<Bytes>,
    arithmetic: Arithmetic,
}

impl Linear {
    /// Takes a weight `[N, K]` and a bias of `N` values.
    ///
    /// # Errors
    /// [`Error::Argument`] where the bias has another length; [`Error::Io`] without memory.
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
        Ok(Self {
            bias_bytes: bias.as_deref().map(bytes_of).transpose()?,
            weight,
            bias,
            arithmetic: Arithmetic::default(),
        })
    }

    /// The same op in this arithmetic, on the CPU; the default is [`Arithmetic::W4A8`].
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// How activations meet FP4 weights on the CPU.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// The weight.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The bias.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Bytes of weight and bias.
    pub fn size_in_bytes(&self) -> usize {
        self.weight.size_in_bytes() + self.bias().map_or(0, size_of_val)
    }

    /// Whether a device that runs launch plans has kernels for this weight.
    pub fn has_kernel(&self) -> bool {
        !matches!(self.weight, Weight::Int8(_) | Weight::Blocks(_))
    }

    /// Applies the op to `x` `[…, K]` in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        planned::prepared(x, 1)?.apply_op1_no_bwd(self)
    }

    /// The weight, and the bias as a device's kernels read it.
    pub(super) fn part(&self) -> (&Weight, Option<&Bytes>) {
        (&self.weight, self.bias_bytes.as_ref())
    }

    /// What a device runs; `None` for weights that no kernel takes.
    fn planned(&self, layout: &Layout, dtype: DType) -> Result<Option<Planned<'_, 1>>> {
        let products = Products::with(OP, std::iter::once(self.part()));
        products.map(|all| all.planned(layout, dtype)).transpose()
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        if let Some([done]) =
            planned::in_place_of_cpu(OP, &[storage], || self.planned(layout, storage.dtype()))?
        {
            return Ok(done);
        }
        let (n, k) = self.weight.shape();
        let mut dims = layout.dims().to_vec();
        if dims.last() != Some(&k) {
            let expected = format!("a last dimension of {k}, the weight being [{n}, {k}]");
            return Err(Error::argument(OP, "x", expected, format!("shape {dims:?}")).into());
        }
        let x = to_f32(OP, "x", storage, layout)?;
        let mut y = vec![0.0; x.len() / k * n];
        cpu::linear(
            &*Executor::current()?,
            &[&self.weight],
            &x,
            self.arithmetic,
            &mut y,
        );
        add_bias(&mut y, n, 0, self.bias());
        if let Some(last) = dims.last_mut() {
            *last = n;
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

/// A bias, or a norm's weight, as kernels read it.
pub(super) fn bytes_of(bias: &[f32]) -> Result<Bytes> {
    let bytes: Vec<u8> = bias.iter().flat_map(|value| value.to_le_bytes()).collect();
    Bytes::copy_from(&bytes)
}

/// Adds a bias to its columns, `start..`, of rows of `n`.
fn add_bias(y: &mut [f32], n: usize, start: usize, bias: Option<&[f32]>) {
    let Some(bias) = bias else { return };
    for row in y.chunks_exact_mut(n) {
        for (value, bias) in row[start..].iter_mut().zip(bias) {
            *value += bias;
        }
    }
}

/// Several linear ops of one input as one: `x` is `[…, K]`, the result `[…, N₀ + N₁ + …]`, their outputs side by
/// side. They read `x` once and share a parallel region.
#[derive(Debug, Clone)]
pub struct JoinedLinear {
    parts: Vec<Linear>,
}

impl JoinedLinear {
    /// Joins ops of one K and one arithmetic.
    ///
    /// # Errors
    /// [`Error::Argument`] without parts, or where their K or arithmetics differ.
    pub fn new(parts: Vec<Linear>) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(Error::argument(JOINED, "parts", "at least one", "none"));
        };
        let (k, arithmetic) = (first.weight.shape().1, first.arithmetic);
        for part in &parts {
            if part.weight.shape().1 != k || part.arithmetic != arithmetic {
                let found = format!("K = {} in {:?}", part.weight.shape().1, part.arithmetic);
                return Err(Error::argument(
                    JOINED,
                    "parts",
                    format!("K = {k} in {arithmetic:?}"),
                    found,
                ));
            }
        }
        Ok(Self { parts })
    }

    /// The ops joined.
    pub fn parts(&self) -> &[Linear] {
        &self.parts
    }

    /// Applies the op to `x` `[…, K]` in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        planned::prepared(x, 1)?.apply_op1_no_bwd(self)
    }

    /// What a device runs; `None` where a weight is one that no kernel takes.
    fn planned(&self, layout: &Layout, dtype: DType) -> Result<Option<Planned<'_, 1>>> {
        let products = Products::with(JOINED, self.parts.iter().map(Linear::part));
        products.map(|all| all.planned(layout, dtype)).transpose()
    }
}

impl CustomOp1 for JoinedLinear {
    fn name(&self) -> &'static str {
        JOINED
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        if let Some([done]) =
            planned::in_place_of_cpu(JOINED, &[storage], || self.planned(layout, storage.dtype()))?
        {
            return Ok(done);
        }
        let k = self.parts[0].weight.shape().1;
        let mut dims = layout.dims().to_vec();
        if dims.last() != Some(&k) {
            let expected = format!("a last dimension of {k}");
            return Err(Error::argument(JOINED, "x", expected, format!("shape {dims:?}")).into());
        }
        let x = to_f32(JOINED, "x", storage, layout)?;
        let weights: Vec<_> = self.parts.iter().map(Linear::weight).collect();
        let n = weights.iter().map(|weight| weight.shape().0).sum();
        let mut y = vec![0.0; x.len() / k * n];
        let arithmetic = self.parts[0].arithmetic;
        cpu::linear(&*Executor::current()?, &weights, &x, arithmetic, &mut y);
        let mut start = 0;
        for part in &self.parts {
            add_bias(&mut y, n, start, part.bias());
            start += part.weight.shape().0;
        }
        if let Some(last) = dims.last_mut() {
            *last = n;
        }
        Ok((from_f32(y, storage), dims.into()))
    }

    fn metal_fwd(
        &self,
        storage: &MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let [done] = planned::on_metal(JOINED, &[storage], || self.planned(layout, storage.dtype()))?;
        Ok(done)
    }
}
