//! Pools as operands.

use crate::metal::paged_attention::At;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Tensor};

/// Where a tensor that lies together begins, as this operand.
pub(super) fn at(tensor: &Tensor, operand: usize) -> At {
    At {
        operand,
        offset: tensor.layout().start_offset() * tensor.dtype().size_in_bytes(),
    }
}

/// Checks that a pool is bytes that lie together.
pub(super) fn check_pool(op: &'static str, pool: &Tensor) -> Result<()> {
    if pool.dtype() == DType::U8 && pool.is_contiguous() {
        return Ok(());
    }
    let found = format!("{:?} with strides {:?}", pool.dtype(), pool.stride());
    Err(Error::argument(op, "pool", "contiguous U8 bytes", found))
}

/// The bytes of a pool.
pub(super) fn bytes_of<'a>(op: &'static str, pool: &'a CpuStorage, layout: &Layout) -> Result<&'a [u8]> {
    let found = match (pool, layout.contiguous_offsets()) {
        (CpuStorage::U8(bytes), Some((start, end))) => return Ok(&bytes[start..end]),
        (CpuStorage::U8(_), None) => format!("strides {:?}", layout.stride()),
        (other, _) => format!("{:?}", other.dtype()),
    };
    Err(Error::argument(op, "pool", "contiguous U8 bytes", found))
}
