//! 4-bit floating-point models in [Candle](candle_core).

#![deny(missing_docs)]

pub mod cpu;
mod error;
pub mod fp4;

pub use error::{Error, Result};
