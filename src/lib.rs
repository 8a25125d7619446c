//! 4-bit floating-point models in [Candle](candle_core).

#![deny(missing_docs)]

pub mod checkpoint;
pub mod cpu;
mod error;
pub mod fp4;
pub mod generation;
pub mod memory;
pub mod models;
pub mod nn;
pub mod ops;

pub use error::{Error, Result};
