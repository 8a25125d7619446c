//! Ops over the pools of a paged cache.

mod append;
mod attend;

pub use append::{AppendHeads, AppendLatents};
pub use attend::{PagedAttention, gather_paged};
