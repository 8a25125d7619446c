//! Plans of the router of a mixture of experts: `metal/router.metal`.

use super::args::{Argument, RouterArgs};
use super::checked::{aligned, narrow, suffix};
use super::plan::{Binding, Constant, Launch, Plan, Work};
use super::rows::known;
use crate::Result;
use crate::cpu::Routing;
use crate::fp4::{Bytes, DenseTensor, FloatKind};
use candle_core::DType;

const OP: &str = "mmfp4-router";

/// The most experts that a kernel chooses among.
pub const MOST_EXPERTS: usize = 512;
/// The most experts that a kernel chooses.
pub const MOST_CHOSEN: usize = 16;
/// Tokens up to which each has a threadgroup of its own; above, four of them read the weight together.
const FEW: usize = 16;
const THREADS: usize = 512;

/// Where a router's operands stand among a plan's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// The weight's floats.
    pub gate: usize,
    /// Correction biases in F32.
    pub bias: usize,
    /// Activations.
    pub x: usize,
    /// Logits in F32, `[T, E]`.
    pub logits: usize,
    /// Ids in U32, `[T, top_k]`.
    pub ids: usize,
    /// Weights in F32, `[T, top_k]`.
    pub weights: usize,
}

/// A router's scores and choice.
#[derive(Debug, Clone, Copy)]
pub struct Choice<'a> {
    /// The weight, `[E, D]`.
    pub gate: &'a DenseTensor,
    /// The routing constants.
    pub routing: Routing,
    /// Its operands.
    pub operands: Operands,
    /// F32, F16 or BF16, of activations.
    pub dtype: DType,
    /// Rows of activations.
    pub tokens: usize,
    /// Bytes before the first activation in its buffer.
    pub x_offset: usize,
    /// Elements from one row of activations to the next.
    pub x_row: usize,
}

/// Plans that between them launch every kernel: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has.
pub fn every_kernel(dtype: DType) -> Result<Vec<Plan>> {
    let mut plans = Vec::new();
    for kind in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
        let bytes = Bytes::copy_from(&vec![0; 4 * kind.size()])?;
        let gate = DenseTensor::new("gate", (1, 4), kind, bytes)?;
        for tokens in [1, FEW + 1] {
            let choice = Choice {
                gate: &gate,
                routing: Routing {
                    top_k: 1,
                    n_group: 1,
                    topk_group: 1,
                    normalize: true,
                    scaling_factor: 1.0,
                },
                operands: Operands {
                    gate: 0,
                    bias: 1,
                    x: 2,
                    logits: 3,
                    ids: 4,
                    weights: 5,
                },
                dtype,
                tokens,
                x_offset: 0,
                x_row: 4,
            };
            plans.push(Plan {
                launches: choice.launch()?.into_iter().collect(),
            });
        }
    }
    Ok(plans)
}

impl Choice<'_> {
    /// Its launch; `None` for more experts than a kernel takes.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has, for sizes beyond 32 bits, and for a
    /// weight whose floats are not aligned.
    pub fn launch(&self) -> Result<Option<Launch>> {
        let ((experts, d), routing) = (self.gate.shape(), self.routing);
        if experts > MOST_EXPERTS || routing.top_k > MOST_CHOSEN {
            return Ok(None);
        }
        let kind = suffix(OP, self.dtype)?;
        let size = self.gate.kind().size();
        aligned(OP, "gate", self.gate.bytes().offset(), size)?;
        let eights = d.is_multiple_of(8)
            && self.gate.bytes().offset().is_multiple_of(16)
            && self.x_offset.is_multiple_of(16)
            && (self.x_row * self.dtype.size_in_bytes()).is_multiple_of(16);
        let of_gate = match self.gate.kind() {
            FloatKind::F16 => 0,
            FloatKind::BF16 => 1,
            FloatKind::F32 => 2,
        };
        let rows = if self.tokens <= FEW { 1 } else { 4 };
        let args = RouterArgs {
            tokens: narrow(OP, "x", self.tokens)?,
            experts: narrow(OP, "gate", experts)?,
            d: narrow(OP, "gate", d)?,
            x_row: narrow(OP, "x", self.x_row)?,
            top_k: narrow(OP, "top_k", routing.top_k)?,
            groups: narrow(OP, "n_group", routing.n_group)?,
            chosen_groups: narrow(OP, "topk_group", routing.topk_group)?,
            normalize: u32::from(routing.normalize),
            scaling: routing.scaling_factor,
        };
        let Operands {
            gate,
            bias,
            x,
            logits,
            ids,
            weights,
        } = self.operands;
        let read = |operand, offset| Binding::Read { operand, offset };
        let write = |operand| Binding::Write { operand, offset: 0 };
        Ok(Some(Launch {
            kernel: format!("router_{kind}_m{rows}"),
            constants: vec![
                (9, Constant::U16(of_gate)),
                (10, Constant::Bool(eights)),
                (11, known(d)),
            ],
            threadgroups: [self.tokens.div_ceil(rows), 1, 1],
            threads: [THREADS, 1, 1],
            bindings: vec![
                (0, read(gate, 0)),
                (1, read(bias, 0)),
                (2, read(x, self.x_offset)),
                (3, write(logits)),
                (4, write(ids)),
                (5, write(weights)),
                (6, Binding::Bytes(args.bytes())),
            ],
            work: Work {
                weights: (self.gate.bytes().len() + experts * size_of::<f32>()) as u64,
                read: (self.tokens * d * self.dtype.size_in_bytes()) as u64,
                written: (self.tokens * (experts + 2 * routing.top_k) * size_of::<f32>()) as u64,
                operations: (2 * self.tokens * experts * d) as u64,
            },
        }))
    }
}
