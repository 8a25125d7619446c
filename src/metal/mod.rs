//! The Metal side: kernels, launch plans and what runs them.
//!
//! | module | what for | where |
//! |---|---|---|
//! | [`source`] | the text of the kernels in `metal/` | everywhere |
//! | [`plan`] | launch plans, as data | everywhere |
//! | [`linear`] | plans of products with FP4 weights | everywhere |
//! | [`memory`] | whether a model fits | everywhere |
//! | `host` | runs plans on Linux against the compiled kernels | feature `msl-host` |
//! | `device` | runs plans on Apple GPUs, through Candle's Metal backend | macOS |
//!
//! Nothing in here has run on an Apple GPU yet.

mod args;
#[cfg(target_os = "macos")]
pub mod device;
#[cfg(msl_host)]
pub mod host;
pub mod linear;
pub mod memory;
pub mod plan;
pub mod source;
#[cfg(any(target_os = "macos", test))]
mod windows;

use crate::Result;
use crate::fp4::Format;
use candle_core::DType;

/// Plans that between them launch every kernel on weights of a format and activations of a dtype: what can be compiled
/// ahead of the first token.
///
/// # Errors
/// As [`linear::every_kernel`].
pub fn every_kernel(format: Format, dtype: DType) -> Result<Vec<plan::Plan>> {
    linear::every_kernel(format, dtype)
}
