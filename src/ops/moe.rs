//! The fused mixture of experts.

use super::activations::{from_f32, to_f32, to_u32};
use crate::cpu::{self, Arithmetic, Executor, Expert};
use crate::fp4::{Bytes, Weight};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp3, Layout, MetalStorage, Shape, Tensor};

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
        let copied = gather(&mut experts, &mut shared)?;
        Ok(Self {
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

    /// Applies the op: `x` is `[…, D]` in F32, F16 or BF16, `ids` `[…, top_k]` in U32, `weights` `[…, top_k]`
    /// in F32, F16 or BF16; the result has `x`'s shape and dtype.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit, or an id names no expert.
    pub fn forward(&self, x: &Tensor, ids: &Tensor, weights: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op3_no_bwd(ids, weights, self)
    }
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

/// Moves all weights into one map where they are not in one; gives the bytes copied.
fn gather(experts: &mut [Expert], shared: &mut [Expert]) -> Result<usize> {
    let mut all: Vec<&mut Weight> = experts
        .iter_mut()
        .chain(shared)
        .flat_map(|e| [&mut e.gate, &mut e.up, &mut e.down])
        .collect();
    let home = all[0].regions().next().cloned();
    let together =
        home.is_some_and(|home| all.iter().all(|w| w.regions().all(|bytes| bytes.same_map(&home))));
    if together {
        return Ok(0);
    }
    // Every region begins at a multiple of 16 bytes, for the kernels to come.
    let aligned = |len: usize| len.next_multiple_of(16);
    let total = all
        .iter()
        .flat_map(|w| w.regions())
        .map(|bytes| aligned(bytes.len()))
        .sum();
    let region = Bytes::build(total, |memory| {
        let mut rest = memory;
        for bytes in all.iter().flat_map(|w| w.regions()) {
            let (place, after) = rest.split_at_mut(aligned(bytes.len()));
            place[..bytes.len()].copy_from_slice(bytes);
            rest = after;
        }
        Ok(())
    })?;
    let mut start = 0;
    for weight in &mut all {
        **weight = weight.relocated(|old| {
            let place = region
                .slice(start..start + old.len())
                .expect("the region was sized for all weights");
            start += aligned(old.len());
            place
        });
    }
    Ok(total)
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
        super::without_kernel(OP);
        let d = self.experts[0].gate.shape().1;
        let Some((last, leading)) = x_layout.dims().split_last().filter(|(last, _)| **last == d) else {
            let found = format!("shape {:?}", x_layout.dims());
            return Err(Error::argument(OP, "x", format!("a last dimension of {d}"), found).into());
        };
        let top_k = match ids_layout.dims().split_last() {
            Some((top_k, tokens)) if tokens == leading && *top_k > 0 => *top_k,
            _ => {
                let found = format!("shape {:?}", ids_layout.dims());
                return Err(Error::argument(
                    OP,
                    "ids",
                    format!("{leading:?} and top_k of at least 1"),
                    found,
                )
                .into());
            }
        };
        if weights_layout.dims() != ids_layout.dims() {
            let found = format!("shape {:?}", weights_layout.dims());
            return Err(
                Error::argument(OP, "weights", format!("{:?}, as ids", ids_layout.dims()), found).into(),
            );
        }
        let ids = to_u32(OP, "ids", ids, ids_layout)?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.experts.len()) {
            let expected = format!("ids below {}, the number of experts", self.experts.len());
            return Err(Error::argument(OP, "ids", expected, id.to_string()).into());
        }
        let weights = to_f32(OP, "weights", weights, weights_layout)?;
        let activations = to_f32(OP, "x", x, x_layout)?;
        debug_assert_eq!(activations.len() % last, 0);
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
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        super::no_metal(OP)
    }
}
