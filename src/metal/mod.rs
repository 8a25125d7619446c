//! The Metal side: kernels, launch plans and what runs them.
//!
//! | module | what for | where |
//! |---|---|---|
//! | [`source`] | the text of the kernels in `metal/` | everywhere |
//! | [`plan`] | launch plans, as data | everywhere |
//! | [`linear`] | plans of products with FP4 weights | everywhere |
//! | [`dense`] | plans of products with weights in floating point | everywhere |
//! | [`merged`] | plans of products with what attention's parts come to | everywhere |
//! | [`norm_rope`] | plans of norms, rotary position embedding and sums | everywhere |
//! | [`append`] | plans of what stores new tokens in a paged cache | everywhere |
//! | [`router`], [`moe`] | plans of a mixture of experts | everywhere |
//! | [`paged_attention`] | plans of attention over a paged cache | everywhere |
//! | [`memory`] | whether a model fits | everywhere |
//! | `host` | runs plans on Linux against the compiled kernels | feature `msl-host` |
//! | `device` | runs plans on Apple GPUs, through Candle's Metal backend | macOS |
//!
//! Nothing in here has run on an Apple GPU yet.

pub mod append;
mod args;
mod cache;
mod checked;
pub mod dense;
#[cfg(target_os = "macos")]
pub mod device;
#[cfg(msl_host)]
pub mod host;
pub mod linear;
pub mod memory;
pub mod merged;
pub mod moe;
pub mod norm_rope;
pub mod paged_attention;
pub mod plan;
pub mod router;
mod rows;
pub mod source;
#[cfg(any(target_os = "macos", test))]
mod windows;

use crate::Result;
use crate::cpu::Pairing;
use crate::fp4::{FloatKind, Format};
use candle_core::DType;
use plan::Plan;

/// Plans that between them launch every kernel on weights of a format, or in floating point of any kind, and activations
/// of a dtype, for both ways to pair and every format of a cache: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has; [`Error::Tensor`](crate::Error::Tensor) for a
/// format that cannot be.
pub fn every_kernel(format: Format, dtype: DType) -> Result<Vec<Plan>> {
    let mut plans = linear::every_kernel(format, dtype)?;
    for kind in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
        plans.extend(dense::every_kernel(kind, dtype)?);
    }
    plans.extend(merged::every_kernel(format, dtype)?);
    for pairing in [Pairing::Interleaved, Pairing::Halves] {
        plans.extend(norm_rope::every_kernel(dtype, pairing)?);
        plans.extend(append::every_kernel(dtype, pairing)?);
    }
    plans.extend(router::every_kernel(dtype)?);
    plans.extend(moe::every_kernel(format, dtype)?);
    plans.extend(paged_attention::every_kernel(dtype)?);
    Ok(plans)
}
