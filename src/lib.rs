//! 4-bit floating-point models in [Candle](candle_core).

#![deny(missing_docs)]

mod error;
pub mod generation;

pub use error::{Error, Result};
