//! What a Candle user swaps in: layers over FP4 weights, masks from positions, a cache that grows by blocks.

mod cache;
mod embedding;
mod linear;
pub mod mask;
mod memory;
mod moe;
mod paged;
mod rope;
mod router;
mod separate;

pub use crate::cpu::Pairing;
pub use crate::ops::{FusedMoe, GatedMlp, RmsNorm};
pub use cache::TokenCache;
pub use embedding::Embedding;
pub use linear::{MmfP4Linear, linear, linear_no_bias};
pub use mask::Mask;
pub(crate) use paged::check_memory as check_cache_memory;
pub use paged::{CacheSize, PagedKvCache, PassSequence};
pub use rope::{Angles, RotaryEmbedding};
pub use router::{Routed, Router};
pub use separate::SeparateMoe;
