//! New tokens into a pool.

mod heads;
mod latents;
#[cfg(test)]
mod tests;

pub use heads::AppendHeads;
pub use latents::AppendLatents;

use super::PagedBatch;
use crate::cpu::{Executor, Floats};
use crate::kv::RowLayout;
use crate::ops::planned;
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, MetalStorage, Storage, Tensor};

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

/// What a tensor beside a pool of the CPU's holds.
fn of_cpu<'a>(op: &'static str, argument: &'static str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(Error::argument(op, argument, "the pool's device", "another")),
    }
}

/// Has the CPU write into a pool. What it writes may be held meanwhile: floats share no memory with a pool.
fn on_cpu(op: &'static str, pool: &Tensor, write: impl Fn(&Executor, &mut [u8])) -> candle_core::Result<()> {
    pool.inplace_op1(&OnCpu { op, write })
}

/// A call of [`on_cpu`], as Candle runs it.
struct OnCpu<F> {
    op: &'static str,
    write: F,
}

impl<F: Fn(&Executor, &mut [u8])> InplaceOp1 for OnCpu<F> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, pool: &mut CpuStorage, at: &Layout) -> candle_core::Result<()> {
        let pool = bytes(self.op, pool, at)?;
        (self.write)(&*Executor::current()?, pool);
        Ok(())
    }

    fn metal_fwd(&self, _: &mut MetalStorage, _: &Layout) -> candle_core::Result<()> {
        crate::ops::no_metal(self.op)
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
