//! Ops over the pools of a paged cache.

mod append;
mod attend;
mod batch;

pub use append::{AppendHeads, AppendLatents};
pub use attend::{PagedAttention, gather_paged};
pub use batch::PagedBatch;
