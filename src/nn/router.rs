//! The router of a mixture of experts.

use crate::ops;
use candle_core::Tensor;

/// Scores experts with a linear layer and chooses among them, all in f32; see
/// [`cpu::route`](crate::cpu::route) for the formula.
#[derive(Debug, Clone)]
pub struct Router {
    op: ops::Router,
}

impl Router {
    /// Takes the scoring layer `[E, D]` and the choice.
    pub fn new(gate: ops::Linear, route: ops::Route) -> Self {
        Self {
            op: ops::Router::new(gate, route),
        }
    }

    /// Bytes of the scoring layer and of the experts' correction biases.
    pub fn size_in_bytes(&self) -> usize {
        let weight = self.op.gate().weight();
        weight.size_in_bytes() + weight.shape().0 * size_of::<f32>()
    }

    /// Whether a device that runs launch plans has kernels for it.
    pub fn has_kernel(&self) -> bool {
        self.op.has_kernel()
    }

    /// Expert ids (U32) and weights (F32), both `[T, top_k]`, for `x` `[T, D]`, and the logits `[T, E]`.
    ///
    /// # Errors
    /// Where `x` does not fit the scoring layer.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Routed> {
        let [logits, ids, weights] = self.op.forward(x)?;
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
