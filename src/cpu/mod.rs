//! CPU kernels on plain slices: they know weights and f32 rows, nothing of Candle or of models.
//!
//! Activations and accumulators are f32. Every kernel reads each weight once a call, spreads its work over
//! rayon's threads in tiles whose size does not depend on the number of threads, and therefore gives the
//! same bits for any number of them. [`mod@reference`] is the plain implementation that each is compared with.

mod heads;
mod linear;
mod moe;
pub mod reference;
mod router;
mod tile;

pub use heads::{HeadRows, per_head, per_head_transposed};
pub use linear::linear;
pub use moe::{Expert, fused_moe};
pub use router::{Routing, route};

#[cfg(test)]
pub(crate) mod testing;
