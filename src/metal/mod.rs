//! The Metal side: kernels, launch plans and what runs them.
//!
//! | module | what for | where |
//! |---|---|---|
//! | [`source`] | the text of the kernels in `metal/` | everywhere |
//! | [`plan`] | launch plans, as data | everywhere |
//! | [`linear`] | plans of products with FP4 weights | everywhere |
//! | [`dense`] | plans of products with weights in floating point | everywhere |
//! | [`norm_rope`] | plans of norms, rotary position embedding and sums | everywhere |
//! | [`memory`] | whether a model fits | everywhere |
//! | `host` | runs plans on Linux against the compiled kernels | feature `msl-host` |
//! | `device` | runs plans on Apple GPUs, through Candle's Metal backend | macOS |
//!
//! Nothing in here has run on an Apple GPU yet.

mod activations;
mod args;
pub mod dense;
#[cfg(target_os = "macos")]
pub mod device;
#[cfg(msl_host)]
pub mod host;
pub mod linear;
pub mod memory;
pub mod norm_rope;
pub mod plan;
pub mod source;
#[cfg(any(target_os = "macos", test))]
mod windows;
