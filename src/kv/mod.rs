//! A cache's bytes: the formats a token can be stored in, where each byte of it lies, and which blocks of the pool
//! are whose.
//!
//! Nothing here knows a device or a model. [`CacheKind`] and [`CacheFormat`] are the user's choice; a [`RowLayout`] says for one kind of
//! attention where the numbers of a token lie in a pool, for who writes and who reads alike; [`codec`] is the plain
//! way there and back that kernels are compared with, and [`hadamard`] the rotation that some formats store rows in.

mod blocks;
pub mod codec;
mod format;
pub mod hadamard;
mod kind;
mod layout;
mod slots;

pub use blocks::{BlockCopy, BlockStatistics, Blocks, SequenceId};
pub use format::{CacheFormat, ScaleGroup};
pub use kind::CacheKind;
pub use layout::{Encoding, Part, RowKind, RowLayout, TOKENS_PER_BLOCK};
pub use slots::Slots;
