//! The router of a mixture of experts.

use crate::ops;
use candle_core::{DType, Tensor};

/// Scores experts with a linear layer and chooses among them, all in f32; see
/// [`cpu::route`](crate::cpu::route) for the formula.
#[derive(Debug, Clone)]
pub struct Router {
    gate: ops::Linear,
    route: ops::Route,
}

impl Router {
    /// Takes the scoring layer `[E, D]` and the choice.
    pub fn new(gate: ops::Linear, route: ops::Route) -> Self {
        Self { gate, route }
    }

    /// Bytes of the scoring layer and of the experts' correction biases.
    pub fn size_in_bytes(&self) -> usize {
        let weight = self.gate.weight();
        weight.size_in_bytes() + weight.shape().0 * size_of::<f32>()
    }

    /// Expert ids (U32) and weights (F32), both `[T, top_k]`, for `x` `[T, D]`, and the logits `[T, E]`.
    ///
    /// # Errors
    /// Where `x` does not fit the scoring layer.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Routed> {
        // Rounded scores would choose other experts: the router never works in half precision.
        let logits = self.gate.forward(&x.to_dtype(DType::F32)?)?;
        let (ids, weights) = self.route.forward(&logits)?;
        Ok(Routed { logits, ids, weights })
    }
}

/// What a [`Router`] decided.
#[derive(Debug, Clone)]
pub struct Routed {
    /// The scores before the sigmoid, `[T, E]`.
    pub logits: Tensor,
    /// The chosen experts, `[T, top_k]`, U32.
    pub ids: Tensor,
    /// Their weights, `[T, top_k]`, F32.
    pub weights: Tensor,
}
