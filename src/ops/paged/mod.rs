//! Ops over the pools of a paged cache.

mod append;

pub use append::{AppendHeads, AppendLatents};
