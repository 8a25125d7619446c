//! A mixture of experts without fusion: what the fused op is measured against.

use super::{FusedMoe, MmfP4Linear};
use crate::Result;
use crate::cpu::{Arithmetic, Expert};
use crate::fp4::Weight;
use candle_core::{DType, Module, Tensor};
use std::collections::BTreeMap;

/// The experts of a [`FusedMoe`], run one after the other as linear layers of their own: gate, up, SiLU, product,
/// down, and a weighted sum.
///
/// The weights are the same bytes, and results agree up to rounding. It is slower, and there to measure by how much.
#[derive(Debug, Clone)]
pub struct SeparateMoe {
    experts: Vec<Mlp>,
    shared: Vec<Mlp>,
}

#[derive(Debug, Clone)]
struct Mlp {
    gate: MmfP4Linear,
    up: MmfP4Linear,
    down: MmfP4Linear,
}

impl Mlp {
    fn new(expert: &Expert, arithmetic: Arithmetic) -> Result<Self> {
        let linear = |weight: &Weight| -> Result<_> {
            Ok(MmfP4Linear::new(weight.clone(), None)?.with_arithmetic(arithmetic))
        };
        Ok(Self {
            gate: linear(&expert.gate)?,
            up: linear(&expert.up)?,
            down: linear(&expert.down)?,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let gated = self.gate.forward(x)?.silu()?;
        self.down.forward(&(gated * self.up.forward(x)?)?)
    }
}

impl SeparateMoe {
    /// Takes the experts of `fused`, where they lie.
    ///
    /// # Errors
    /// None in practice: `fused` has checked the weights.
    pub fn new(fused: &FusedMoe) -> Result<Self> {
        let layer = |expert: &Expert| Mlp::new(expert, fused.arithmetic());
        let layers = |experts: &[Expert]| experts.iter().map(layer).collect::<Result<_>>();
        Ok(Self {
            experts: layers(fused.experts())?,
            shared: layers(fused.shared())?,
        })
    }

    /// As [`FusedMoe::forward`], of `x` `[T, D]`, `ids` and `weights` `[T, top_k]`.
    ///
    /// # Errors
    /// Where shapes do not fit, or an id names no expert.
    pub fn forward(&self, x: &Tensor, ids: &Tensor, weights: &Tensor) -> candle_core::Result<Tensor> {
        let (tokens, top_k) = ids.dims2()?;
        let ids = ids.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        let weights = weights.to_dtype(x.dtype())?.reshape((tokens * top_k, 1))?;
        let mut slots: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (slot, id) in ids.into_iter().enumerate() {
            slots.entry(id).or_default().push(slot as u32);
        }
        let mut sum = x.zeros_like()?;
        for (id, slots) in slots {
            let Some(expert) = self.experts.get(id as usize) else {
                candle_core::bail!("expert {id} of {}", self.experts.len());
            };
            let rows: Vec<u32> = slots.iter().map(|slot| slot / top_k as u32).collect();
            let rows = Tensor::new(rows, x.device())?;
            let slots = Tensor::new(slots, x.device())?;
            let mixed = expert.forward(&x.index_select(&rows, 0)?)?;
            let mixed = mixed.broadcast_mul(&weights.index_select(&slots, 0)?)?;
            sum = sum.index_add(&rows, &mixed, 0)?;
        }
        for expert in &self.shared {
            sum = (sum + expert.forward(x)?)?;
        }
        Ok(sum)
    }
}
