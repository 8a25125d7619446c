//! What plans check of their operands.

use crate::{Error, Result};
use candle_core::DType;

/// How kernels' names tell the dtype of activations.
pub(super) fn suffix(op: &'static str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => Err(Error::argument(op, "x", "F32, F16 or BF16", format!("{other:?}"))),
    }
}

/// A size as kernels take it.
pub(super) fn narrow(op: &'static str, argument: &'static str, value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::argument(op, argument, "a size below 2^32", value.to_string()))
}

/// Refuses bytes that do not begin at a multiple of `alignment`.
pub(super) fn aligned(
    op: &'static str,
    argument: &'static str,
    offset: usize,
    alignment: usize,
) -> Result<()> {
    if offset.is_multiple_of(alignment) {
        return Ok(());
    }
    let expected = format!("a multiple of {alignment} bytes from the start of the file");
    Err(Error::argument(op, argument, expected, offset.to_string()))
}
