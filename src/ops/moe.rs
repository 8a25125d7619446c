//! The fused mixture of experts.

use super::activations::{from_f32, to_f32, to_u32};
use super::planned::{self, Planned, row_stride};
use crate::cpu::{self, Arithmetic, Executor, Expert};
use crate::fp4::gather;
use crate::metal::moe::{Mixture, Routed, Stack};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, MetalStorage, Shape, Tensor};

const OP: &str = "mmfp4-moe";

/// The op behind [`nn::FusedMoe`](crate::nn::FusedMoe): activations, expert ids and routing weights in,
/// the weighted sum of the experts' outputs out, in one call.
///
/// All experts' weights lie in one map, so that a GPU needs one buffer and a table of offsets; where they do
/// not (a layer that straddles two files, experts quantised in memory), they are copied into one, once.
#[derive(Debug, Clone)]
pub struct FusedMoe {
    experts: Vec<Expert>,
    shared: Vec<Expert>,
    copied: usize,
    /// The experts as a device's kernels find them; `None` where no kernel takes them.
    stack: Option<Stack>,
    arithmetic: Arithmetic,
}

impl FusedMoe {
    /// Takes the routed experts, all of one shape, and the shared ones, whose width may differ.
    ///
    /// # Errors
    /// [`Error::Argument`] without experts or where shapes disagree; the expert at fault is named.
    pub fn new(mut experts: Vec<Expert>, mut shared: Vec<Expert>) -> Result<Self> {
        let Some(first) = experts.first() else {
            return Err(Error::argument(OP, "experts", "at least one", "none"));
        };
        let (width, d) = first.gate.shape();
        for (index, expert) in experts.iter().enumerate() {
            check_shapes("experts", index, expert, width, d)?;
        }
        for (index, expert) in shared.iter().enumerate() {
            check_shapes("shared", index, expert, expert.gate.shape().0, d)?;
        }
        let all = experts.iter_mut().chain(&mut shared);
        let mut weights: Vec<_> = all.flat_map(|e| [&mut e.gate, &mut e.up, &mut e.down]).collect();
        let copied = gather(&mut weights)?;
        Ok(Self {
            stack: Stack::of(&experts, &shared)?,
            experts,
            shared,
            copied,
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

    /// The routed experts.
    pub fn experts(&self) -> &[Expert] {
        &self.experts
    }

    /// The shared experts.
    pub fn shared(&self) -> &[Expert] {
        &self.shared
    }

    /// Bytes that had to be copied to bring all weights into one map; 0 where they lay so already.
    pub fn copied_bytes(&self) -> usize {
        self.copied
    }

    /// Whether a device that runs launch plans has kernels for these weights.
    pub fn has_kernel(&self) -> bool {
        self.stack.is_some()
    }

    /// Applies the op: `x` is `[…, D]` in F32, F16 or BF16, `ids` `[…, top_k]` in U32, `weights` `[…, top_k]`
    /// in F32, F16 or BF16; the result has `x`'s shape and dtype.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit, or, on the CPU, an id names no expert. On other
    /// devices, which nobody waits for, such an id gives NaN.
    pub fn forward(&self, x: &Tensor, ids: &Tensor, weights: &Tensor) -> candle_core::Result<Tensor> {
        if planned::runs_on(x.device()) {
            let (ids, weights) = (ids.contiguous()?, weights.to_dtype(DType::F32)?.contiguous()?);
            return planned::prepared(x, 1)?.apply_op3_no_bwd(&ids, &weights, self);
        }
        x.apply_op3_no_bwd(ids, weights, self)
    }

    /// What a device runs; `None` for experts that no kernel takes.
    fn planned(
        &self,
        x: (&Layout, DType),
        (ids, of_ids): (&Layout, DType),
        (weights, of_weights): (&Layout, DType),
    ) -> Result<Option<Planned<'_, 1>>> {
        let Some(stack) = &self.stack else { return Ok(None) };
        let (leading, top_k) = self.check_shapes(x.0, ids, weights)?;
        for (argument, layout, dtype, expected) in [
            ("ids", ids, of_ids, DType::U32),
            ("weights", weights, of_weights, DType::F32),
        ] {
            if dtype != expected || !layout.is_contiguous() {
                let found = format!("{dtype:?}, strides {:?}", layout.stride());
                return Err(Error::argument(
                    OP,
                    argument,
                    format!("{expected:?} without gaps"),
                    found,
                ));
            }
        }
        let offset = |layout: &Layout| layout.start_offset() * size_of::<u32>();
        let routed = Routed {
            ids: (4, offset(ids)),
            weights: (5, offset(weights)),
            top_k,
        };
        mixture(OP, stack, Some(routed), x, leading).map(Some)
    }

    /// The leading dimensions, and top_k.
    fn check_shapes<'a>(
        &self,
        x: &'a Layout,
        ids: &Layout,
        weights: &Layout,
    ) -> Result<(&'a [usize], usize)> {
        let d = self.experts[0].gate.shape().1;
        let Some((_, leading)) = x.dims().split_last().filter(|(last, _)| **last == d) else {
            let found = format!("shape {:?}", x.dims());
            return Err(Error::argument(
                OP,
                "x",
                format!("a last dimension of {d}"),
                found,
            ));
        };
        let top_k = match ids.dims().split_last() {
            Some((top_k, tokens)) if tokens == leading && *top_k > 0 => *top_k,
            _ => {
                let found = format!("shape {:?}", ids.dims());
                let expected = format!("{leading:?} and top_k of at least 1");
                return Err(Error::argument(OP, "ids", expected, found));
            }
        };
        if weights.dims() != ids.dims() {
            let found = format!("shape {:?}", weights.dims());
            return Err(Error::argument(
                OP,
                "weights",
                format!("{:?}, as ids", ids.dims()),
                found,
            ));
        }
        Ok((leading, top_k))
    }
}

/// Experts' launches for activations that lie so: operands are the stack's bytes, the inputs, the output, memory between.
pub(super) fn mixture<'a>(
    op: &'static str,
    stack: &'a Stack,
    routed: Option<Routed>,
    (x, dtype): (&Layout, DType),
    leading: &[usize],
) -> Result<Planned<'a, 1>> {
    let Some(x_row) = row_stride(x, 1) else {
        let found = format!("strides {:?} of {:?}", x.stride(), x.dims());
        return Err(Error::argument(op, "x", "rows one stride apart", found));
    };
    let inputs = if routed.is_some() { 3 } else { 1 };
    let bytes = stack.bytes();
    let mixture = Mixture {
        stack,
        routed,
        x: bytes.len(),
        y: bytes.len() + inputs,
        scratch: bytes.len() + inputs + 1,
        dtype,
        tokens: leading.iter().product(),
        x_offset: x.start_offset() * dtype.size_in_bytes(),
        x_row,
    };
    Ok(Planned {
        launches: mixture.launches()?,
        bytes: bytes.to_vec(),
        outputs: [(x.shape().clone(), dtype)],
        scratch: mixture.scratch(),
    })
}

fn check_shapes(argument: &'static str, index: usize, expert: &Expert, width: usize, d: usize) -> Result<()> {
    let parts = [
        ("gate", &expert.gate, (width, d)),
        ("up", &expert.up, (width, d)),
        ("down", &expert.down, (d, width)),
    ];
    for (part, weight, shape) in parts {
        if weight.shape() != shape {
            let found = format!("{:?} for {part} of expert {index}", weight.shape());
            return Err(Error::argument(OP, argument, format!("{shape:?}"), found));
        }
    }
    Ok(())
}

impl CustomOp3 for FusedMoe {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        ids: &CpuStorage,
        ids_layout: &Layout,
        weights: &CpuStorage,
        weights_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        if let Some([done]) = planned::in_place_of_cpu(OP, &[x, ids, weights], || {
            self.planned(
                (x_layout, x.dtype()),
                (ids_layout, ids.dtype()),
                (weights_layout, weights.dtype()),
            )
        })? {
            return Ok(done);
        }
        let (_, top_k) = self.check_shapes(x_layout, ids_layout, weights_layout)?;
        let ids = to_u32(OP, "ids", ids, ids_layout)?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.experts.len()) {
            let expected = format!("ids below {}, the number of experts", self.experts.len());
            return Err(Error::argument(OP, "ids", expected, id.to_string()).into());
        }
        let weights = to_f32(OP, "weights", weights, weights_layout)?;
        let activations = to_f32(OP, "x", x, x_layout)?;
        let mut y = vec![0.0; activations.len()];
        cpu::fused_moe(
            &*Executor::current()?,
            &self.experts,
            &self.shared,
            &activations,
            &ids,
            &weights,
            top_k,
            self.arithmetic,
            &mut y,
        );
        Ok((from_f32(y, x), x_layout.shape().clone()))
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        x_layout: &Layout,
        ids: &MetalStorage,
        ids_layout: &Layout,
        weights: &MetalStorage,
        weights_layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let [done] = planned::on_metal(OP, &[x, ids, weights], || {
            self.planned(
                (x_layout, x.dtype()),
                (ids_layout, ids.dtype()),
                (weights_layout, weights.dtype()),
            )
        })?;
        Ok(done)
    }
}
