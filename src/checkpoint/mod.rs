//! Reading and writing checkpoints.

#[cfg(feature = "hub")]
pub mod hub;
