//! Candle custom ops: they check shapes, dtypes and values, name the argument at fault, and call a backend.
//!
//! Weights live in the op's struct as bytes where they lie; only activations are tensors. Inputs may be
//! strided, offset or of any leading shape; computation is in f32 whatever the activations' dtype, which is
//! the output's as well. On the CPU the kernels are [`cpu`](crate::cpu)'s; on Metal every op answers with an
//! error for now: its kernels come next. There is no backward pass: FP4 weights are not trained.

mod activations;
mod add;
mod attention;
mod linear;
mod mlp;
mod moe;
mod norm;
mod per_head;
mod rope;
mod route;
mod validate;

pub use add::Add;
pub use attention::Attention;
pub use linear::{JoinedLinear, Linear};
pub use mlp::GatedMlp;
pub use moe::FusedMoe;
pub use norm::RmsNorm;
pub use per_head::{Orientation, PerHead};
pub use rope::Rope;
pub use route::Route;
pub use validate::{
    Comparison, Difference, Kernel, Tolerance, ValueRange, compare_with_reference, validate_kernel_output,
};

/// The answer of every op on a Metal tensor, for now.
fn no_metal<T>(op: &str) -> candle_core::Result<T> {
    candle_core::bail!(
        "{op}: not on Metal yet, its kernels come next; move the model and its inputs to Device::Cpu"
    )
}
