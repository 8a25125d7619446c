//! New tokens into a pool.

mod heads;
mod latents;
#[cfg(test)]
mod tests;

pub use heads::AppendHeads;
pub use latents::AppendLatents;

use super::PagedBatch;
use crate::cpu::Floats;
use crate::kv::RowLayout;
use crate::ops::planned;
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Layout, Tensor};

/// Checks that a pool has a batch's slots.
fn check_pool(op: &'static str, layout: &RowLayout, pool: &Tensor, batch: &PagedBatch) -> Result<()> {
    let (block, slots) = (layout.block_bytes(), batch.slots());
    batch.check_blocks(op, layout)?;
    let whole = matches!(pool.dims(), [bytes] if bytes % block == 0) && pool.is_contiguous();
    if !whole || pool.dtype() != DType::U8 {
        let expected = format!("[n · {block}] in U8, whole blocks");
        let found = format!("{:?} in {:?}", pool.dims(), pool.dtype());
        return Err(Error::argument(op, "pool", expected, found));
    }
    let held = pool.elem_count() / block * layout.block_tokens();
    if slots.end() > held {
        let expected = format!("slots below {held}, the pool's");
        return Err(Error::argument(
            op,
            "slots",
            expected,
            (slots.end() - 1).to_string(),
        ));
    }
    Ok(())
}

fn check_rows(op: &'static str, argument: &'static str, x: &Tensor, dims: &[usize]) -> Result<()> {
    let floats = matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16);
    if x.dims() != dims || !floats {
        let expected = format!("{dims:?}, a row a slot, in F32, F16 or BF16");
        let found = format!("{:?} in {:?}", x.dims(), x.dtype());
        return Err(Error::argument(op, argument, expected, found));
    }
    Ok(())
}

/// A tensor whose rows lie one stride apart.
fn prepared(x: &Tensor, inner: usize) -> candle_core::Result<Tensor> {
    match planned::row_stride(x.layout(), inner) {
        Some(_) => Ok(x.clone()),
        None => x.contiguous(),
    }
}

/// A tensor whose heads' elements lie together.
fn prepared_heads(x: &Tensor) -> candle_core::Result<Tensor> {
    match x.stride().last() {
        Some(1) => Ok(x.clone()),
        _ => x.contiguous(),
    }
}

fn row_stride(op: &'static str, argument: &'static str, layout: &Layout) -> Result<usize> {
    planned::row_stride(layout, 1).ok_or_else(|| {
        let found = format!("strides {:?}", layout.stride());
        Error::argument(op, argument, "rows one stride apart", found)
    })
}

/// The numbers of a storage from a tensor's first on.
fn floats<'a>(
    op: &'static str,
    argument: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Floats<'a>> {
    let start = layout.start_offset();
    match storage {
        CpuStorage::F32(values) => Ok(Floats::F32(&values[start..])),
        CpuStorage::F16(values) => Ok(Floats::F16(&values[start..])),
        CpuStorage::BF16(values) => Ok(Floats::BF16(&values[start..])),
        _ => Err(Error::argument(op, argument, "F32, F16 or BF16", "another dtype")),
    }
}

/// A pool's bytes.
fn bytes<'a>(op: &'static str, storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [u8]> {
    let range = layout.contiguous_offsets();
    match (storage, range) {
        (CpuStorage::U8(bytes), Some((start, end))) => Ok(&mut bytes[start..end]),
        _ => Err(Error::argument(op, "pool", "contiguous bytes in U8", "others")),
    }
}
