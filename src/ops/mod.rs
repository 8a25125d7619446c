//! Candle custom ops: they check shapes, dtypes and values, name the argument at fault, and call a backend.
//!
//! Weights live in the op's struct as bytes where they lie; only activations are tensors. Inputs may be
//! strided, offset or of any leading shape; computation is in f32 whatever the activations' dtype, which is
//! the output's as well. On the CPU the kernels are [`cpu`](crate::cpu)'s; on Metal ops run launch plans of
//! [`metal`](crate::metal), attention Candle's own kernels, and operands that no kernel takes are answered with an error. There is no
//! backward pass: FP4 weights are not trained.

mod activations;
mod add;
mod attention;
#[cfg(msl_host)]
mod host;
mod latent;
mod linear;
mod merged;
mod mlp;
mod moe;
mod norm;
mod normed_linear;
#[cfg(target_os = "macos")]
mod on_metal;
mod paged;
mod per_head;
mod planned;
mod products;
mod rope;
mod route;
mod router;
mod rows;
mod validate;

pub(crate) use planned::runs_on as kernels_run_on;

pub use add::Add;
pub use attention::Attention;
pub use latent::LatentRows;
pub use linear::{JoinedLinear, Linear};
pub use mlp::GatedMlp;
pub use moe::FusedMoe;
pub use norm::{RmsNorm, add_norm};
pub use normed_linear::NormedLinear;
pub use paged::{AppendHeads, AppendLatents, PagedAttention, PagedBatch, gather_paged};
pub use per_head::{Orientation, PerHead};
pub use rope::Rope;
pub use route::Route;
pub use router::Router;
pub use validate::{
    Comparison, Difference, Kernel, Tolerance, ValueRange, compare_with_reference, validate_kernel_output,
};

/// The answer, on a Metal tensor, of an op without a kernel.
fn no_metal<T>(op: &str) -> candle_core::Result<T> {
    candle_core::bail!(
        "{op}: no Metal kernel for these operands; quantise the weights while loading (--quantize mmfp4), or compute on \
         the CPU (--device cpu; in a program, move the model and its inputs to Device::Cpu)"
    )
}

/// Says once, where Metal kernels run in place of the CPU's, that the CPU runs this op: it has no kernel.
fn without_kernel(_op: &'static str) {
    #[cfg(msl_host)]
    host::without_kernel(_op);
}
