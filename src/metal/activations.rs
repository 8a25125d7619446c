//! What plans say of activations.

use crate::{Error, Result};
use candle_core::DType;

/// The end of a kernel's name, by the dtype of its activations.
///
/// # Errors
/// [`Error::Argument`] for a dtype that no kernel has.
pub(super) fn suffix(op: &'static str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => {
            let found = format!("{other:?}");
            Err(Error::argument(op, "x", "F32, F16 or BF16", found))
        }
    }
}

/// A size as kernels take it.
///
/// # Errors
/// [`Error::Argument`] beyond 32 bits.
pub(super) fn narrow(op: &'static str, argument: &'static str, size: usize) -> Result<u32> {
    u32::try_from(size).map_err(|_| Error::argument(op, argument, "a size below 2^32", size.to_string()))
}
