//! The router's choice of experts.

use super::activations::to_f32;
use crate::cpu::{self, Routing};
use crate::fp4::Bytes;
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, MetalStorage, Shape, Tensor};

const OP: &str = "mmfp4-route";

/// From router logits to expert ids and weights, in f32; see [`cpu::route`] for the formula.
#[derive(Debug, Clone)]
pub struct Route {
    pub(super) routing: Routing,
    pub(super) bias: Vec<f32>,
    /// The bias as a device's kernels read it.
    pub(super) bias_bytes: Bytes,
}

impl Route {
    /// Takes the routing constants and the correction bias, one value an expert.
    ///
    /// # Errors
    /// [`Error::Argument`] where the experts do not divide into the groups, or the groups that may be chosen
    /// hold fewer experts than a token needs; [`Error::Io`] without memory.
    pub fn new(routing: Routing, bias: Vec<f32>) -> Result<Self> {
        let (
            experts,
            Routing {
                top_k,
                n_group,
                topk_group,
                ..
            },
        ) = (bias.len(), routing);
        let expect = |argument, expected: String, found: usize| {
            Err(Error::argument(OP, argument, expected, found.to_string()))
        };
        if n_group == 0 || experts == 0 || experts % n_group != 0 {
            return expect("n_group", format!("a divisor of {experts} experts"), n_group);
        }
        if topk_group == 0 || topk_group > n_group {
            return expect("topk_group", format!("1 to {n_group}"), topk_group);
        }
        let allowed = topk_group * (experts / n_group);
        if top_k == 0 || top_k > allowed {
            return expect(
                "top_k",
                format!("1 to {allowed}, the experts in the groups that may be chosen"),
                top_k,
            );
        }
        let bytes: Vec<u8> = bias.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(Self {
            routing,
            bias,
            bias_bytes: Bytes::copy_from(&bytes)?,
        })
    }

    /// Chooses experts for `logits` `[T, E]`; gives ids (U32) and weights (F32), both `[T, top_k]`.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, logits: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let both = logits.apply_op1_no_bwd(self)?;
        Ok((both.get(0)?.to_dtype(DType::U32)?, both.get(1)?))
    }
}

/// One output only: ids, which f32 holds exactly, and weights as `[2, T, top_k]`.
impl CustomOp1 for Route {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        super::without_kernel(OP);
        let [tokens, experts] = layout.dims() else {
            return Err(
                Error::argument(OP, "logits", "two dimensions", format!("{:?}", layout.dims())).into(),
            );
        };
        if *experts != self.bias.len() {
            let expected = format!("[tokens, {}]", self.bias.len());
            return Err(Error::argument(OP, "logits", expected, format!("{:?}", layout.dims())).into());
        }
        let slots = tokens * self.routing.top_k;
        let (mut ids, mut both) = (vec![0; slots], vec![0.0; 2 * slots]);
        let logits = to_f32(OP, "logits", storage, layout)?;
        let (first, weights) = both.split_at_mut(slots);
        cpu::route(&logits, &self.bias, &self.routing, &mut ids, weights);
        for (place, id) in first.iter_mut().zip(ids) {
            *place = id as f32;
        }
        Ok((CpuStorage::F32(both), (2, *tokens, self.routing.top_k).into()))
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        super::no_metal(OP)
    }
}
