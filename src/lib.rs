//! 4-bit floating-point models in [Candle](candle_core).

#![deny(missing_docs)]

pub mod checkpoint;
mod error;

pub use error::{Error, Result};
