//! Ops over the pools of a paged cache.

mod append;
mod attend;
mod batch;
mod gather;
mod pool;

pub use append::{AppendHeads, AppendLatents};
pub use attend::PagedAttention;
pub use batch::PagedBatch;
pub use gather::gather_paged;
