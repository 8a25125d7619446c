//! The router of a mixture of experts: scores and choice.

use super::planned::{self, Planned, row_stride};
use super::{Linear, Route};
use crate::fp4::Weight;
use crate::metal::router::{Choice, MOST_CHOSEN, MOST_EXPERTS, Operands};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

const OP: &str = "mmfp4-router";

/// Scores experts with a linear layer and chooses among them, all in f32; see [`cpu::route`](crate::cpu::route) for the
/// formula. On the CPU that is a [`Linear`] and a [`Route`]; elsewhere one launch.
#[derive(Debug, Clone)]
pub struct Router {
    gate: Linear,
    route: Route,
}

impl Router {
    /// Takes the scoring layer `[E, D]` and the choice.
    pub fn new(gate: Linear, route: Route) -> Self {
        Self { gate, route }
    }

    /// The scoring layer.
    pub fn gate(&self) -> &Linear {
        &self.gate
    }

    /// Whether a device that runs launch plans has kernels for these weights and this choice.
    pub fn has_kernel(&self) -> bool {
        let dense = matches!(self.gate.weight(), Weight::Dense(_)) && self.gate.bias().is_none();
        dense && self.route.bias.len() <= MOST_EXPERTS && self.route.routing.top_k <= MOST_CHOSEN
    }

    /// Logits `[T, E]` in F32, ids (U32) and weights (F32), both `[T, top_k]`, for `x` `[T, D]` in F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        let x = planned::prepared(x, 1)?;
        if let Some(outputs) = planned::over(OP, &[&x], || self.planned(&x))? {
            return Ok(outputs);
        }
        // Rounded scores would choose other experts: the router never works in half precision.
        let logits = self.gate.forward(&x.to_dtype(DType::F32)?)?;
        let (ids, weights) = self.route.forward(&logits)?;
        Ok([logits, ids, weights])
    }

    /// What a device runs; `None` for a scoring layer that no kernel takes.
    fn planned(&self, x: &Tensor) -> Result<Option<Planned<'_, 3>>> {
        let (Weight::Dense(gate), None) = (self.gate.weight(), self.gate.bias()) else {
            return Ok(None);
        };
        let (experts, d) = gate.shape();
        let layout = x.layout();
        let (Some(x_row), [tokens, width]) = (row_stride(layout, 1), layout.dims()) else {
            let found = format!("shape {:?}, strides {:?}", layout.dims(), layout.stride());
            return Err(Error::argument(
                OP,
                "x",
                "[tokens, D], rows one stride apart",
                found,
            ));
        };
        if (*width, experts) != (d, self.route.bias.len()) {
            let expected = format!("[tokens, {d}] for {} experts", self.route.bias.len());
            let found = format!("{:?}, the gate being [{experts}, {d}]", layout.dims());
            return Err(Error::argument(OP, "x", expected, found));
        }
        let choice = Choice {
            gate,
            routing: self.route.routing,
            operands: Operands {
                gate: 0,
                bias: 1,
                x: 2,
                logits: 3,
                ids: 4,
                weights: 5,
            },
            dtype: x.dtype(),
            tokens: *tokens,
            x_offset: layout.start_offset() * x.dtype().size_in_bytes(),
            x_row,
        };
        let slots = (*tokens, self.route.routing.top_k);
        Ok(choice.launch()?.map(|launch| Planned {
            launches: if *tokens == 0 { Vec::new() } else { vec![launch] },
            bytes: vec![gate.bytes(), &self.route.bias_bytes],
            outputs: [
                ((*tokens, experts).into(), DType::F32),
                (slots.into(), DType::U32),
                (slots.into(), DType::F32),
            ],
            scratch: Vec::new(),
        }))
    }
}
