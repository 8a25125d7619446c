//! CPU kernels on plain slices: they know weights and f32 rows, nothing of Candle or of models.
//!
//! Every kernel reads each weight once a call, as it lies, and spreads its work over the threads of an
//! [`Executor`] in tiles whose size does not depend on their number: any number gives the same bits. So does any number
//! of rows on an executor made [uniform](Executor::uniform); on others, products and attention sum in another order for a
//! few rows, at the speed of memory, than for many. Inner loops are written for several instruction sets ([`Isa`]).
//! [`mod@reference`] is the plain implementation that each is compared with.
//!
//! # Two arithmetics
//!
//! [`Arithmetic::W4A8`] rounds activations to eight bits, 128 consecutive elements of a row sharing a scale, and adds up
//! whole numbers within a block: codes doubled are whole (0, 1, 2, 3, 4, 6, 8, 12), so that the only rounding beside
//! f32's is the activations'. So it does with weights of eight bits ([`Int8Tensor`](crate::fp4::Int8Tensor)), whole numbers
//! already. [`Arithmetic::Exact`] multiplies decoded weights with the activations as they are, in f32.

mod activations;
mod add;
mod append;
mod attention;
mod executor;
mod heads;
mod linear;
mod moe;
mod norm;
mod paged;
mod pool;
pub mod reference;
pub mod roofline;
mod rope;
mod router;
mod simd;
mod tile;

pub use add::add;
pub use append::{Floats, NewHeads, NewLatents, append_heads, append_latents};
pub use attention::{Attention, HeadView, attend};
pub use executor::{Executor, Isa};
pub use heads::{HeadRows, per_head, per_head_transposed};
pub use linear::linear;
pub use moe::{Expert, fused_moe};
pub use norm::rms_norm;
pub use paged::{PagedAttention, PagedSequence, attend_paged, gather, key_width, value_width};
pub use pool::ThreadPool;
pub use rope::{Pairing, rope};
pub use router::{Routing, route};

/// How activations meet FP4 weights, and weights of eight bits. Floating-point weights meet them exactly in either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Arithmetic {
    /// Activations rounded to eight bits, blocks of 128; integer dot products.
    #[default]
    W4A8,
    /// Activations in f32.
    Exact,
}

#[cfg(test)]
pub(crate) mod testing;
