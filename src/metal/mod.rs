//! The Metal side: kernels, launch plans and what runs them.
//!
//! | module | what for | where |
//! |---|---|---|
//! | [`source`] | the text of the kernels in `metal/` | everywhere |
//! | [`plan`] | launch plans, as data | everywhere |
//! | [`linear`] | plans of products with FP4 weights | everywhere |
//! | [`router`], [`moe`] | plans of a mixture of experts | everywhere |
//! | [`memory`] | whether a model fits | everywhere |
//! | `host` | runs plans on Linux against the compiled kernels | feature `msl-host` |
//! | `device` | runs plans on Apple GPUs, through Candle's Metal backend | macOS |
//!
//! Nothing in here has run on an Apple GPU yet.

mod args;
mod checked;
#[cfg(target_os = "macos")]
pub mod device;
#[cfg(msl_host)]
pub mod host;
pub mod linear;
pub mod memory;
pub mod moe;
pub mod plan;
pub mod router;
pub mod source;
#[cfg(any(target_os = "macos", test))]
mod windows;
