//! A paged cache: what is read from it.

mod attend;

pub use attend::{PagedAttention, gather_paged};
