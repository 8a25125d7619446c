//! Rows of a paged cache as numbers.

use super::PagedBatch;
use super::pool::{at, bytes_of, check_pool};
use crate::cpu::{self, Executor, PagedSequence};
use crate::kv::RowLayout;
use crate::metal::paged_attention as plans;
use crate::ops::planned::{self, Planned};
use crate::{Error, Result};
use candle_core::{DType, Device, Storage, Tensor};
use std::ops::Range;

const OP: &str = "mmfp4-gather-paged";

/// The tokens at these positions of a batch's sequence as numbers `[positions, layout.width()]` of a dtype, for attention
/// that expands keys and values; see [`cpu::gather`].
///
/// # Errors
/// [`Error::Argument`] where `pool` is no contiguous U8 tensor, the batch has no such sequence, or its table is too short or
/// names a block beyond the pool.
pub fn gather_paged(
    layout: &RowLayout,
    pool: &Tensor,
    batch: &PagedBatch,
    sequence: usize,
    positions: Range<usize>,
    dtype: DType,
) -> Result<Tensor> {
    let Some(PagedSequence { table, .. }) = batch.sequences().nth(sequence) else {
        let expected = format!("below {}, the batch's", batch.sequences().count());
        return Err(Error::argument(OP, "sequence", expected, sequence.to_string()));
    };
    batch.check_blocks(OP, layout)?;
    let shape = (positions.len(), layout.width());
    // Before memory is asked for: as many positions as the table has.
    let held = table.len().saturating_mul(layout.block_tokens());
    if positions.end > held {
        let expected = format!("blocks for {} tokens", positions.end);
        return Err(Error::argument(OP, "table", expected, format!("for {held}")));
    }
    if planned::runs_on(pool.device()) {
        match batch.table_start(sequence).zip(batch.index()) {
            Some((start, index)) => {
                check_pool(OP, pool)?;
                check_blocks(layout, pool, table, &positions)?;
                let plan = || {
                    let gather = plans::Gather {
                        layout,
                        dtype,
                        positions: positions.clone(),
                        table: start,
                        pool: at(pool, 0),
                        index: at(index, 1),
                        y: 2,
                    };
                    let launches = match positions.len() {
                        0 => Vec::new(),
                        _ => vec![gather.launch()?],
                    };
                    Ok(Some(Planned {
                        launches,
                        bytes: Vec::new(),
                        outputs: [(shape.into(), dtype)],
                        scratch: Vec::new(),
                    }))
                };
                if let Some([rows]) = planned::over(OP, &[pool, index], plan)? {
                    return Ok(rows);
                }
            }
            None if pool.device().is_metal() => return Ok(crate::ops::no_metal(OP)?),
            None => crate::ops::without_kernel(OP),
        }
    }
    let mut rows = vec![0.0; shape.0 * shape.1];
    with_bytes(pool, |pool| {
        cpu::gather(&*Executor::current()?, layout, pool, table, positions, &mut rows)
    })?;
    Ok(Tensor::from_vec(rows, shape, &Device::Cpu)?.to_dtype(dtype)?)
}

/// Checks that the blocks of these positions, which the table has, are the pool's.
fn check_blocks(layout: &RowLayout, pool: &Tensor, table: &[u32], positions: &Range<usize>) -> Result<()> {
    let (tokens, held) = (layout.block_tokens(), pool.elem_count() / layout.block_bytes());
    let blocks = &table[positions.start.min(positions.end) / tokens..positions.end.div_ceil(tokens)];
    match blocks.iter().find(|block| **block as usize >= held) {
        Some(block) => {
            let expected = format!("blocks below {held}, the pool's");
            Err(Error::argument(OP, "table", expected, block.to_string()))
        }
        None => Ok(()),
    }
}

/// Calls `f` with the bytes of a pool.
fn with_bytes<R>(pool: &Tensor, f: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
    let (storage, layout) = pool.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(bytes_of(OP, storage, layout)?),
        _ => Err(Error::argument(
            OP,
            "pool",
            "on the CPU",
            format!("{:?}", pool.device()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::codec;
    use crate::ops::paged::attend::testing::{batch, case, sequences};

    #[test]
    fn gathered_rows_are_the_codecs() {
        let (layout, pool, tables, _) = case();
        let batch = batch(&sequences(&tables));
        let gather =
            |pool: &Tensor, sequence, range| gather_paged(&layout, pool, &batch, sequence, range, DType::F32);
        let rows = gather(&pool, 0, 10..37).unwrap();
        let rows = rows.to_vec2::<f32>().unwrap();
        let bytes = pool.to_vec1::<u8>().unwrap();
        for (position, row) in (10..).zip(&rows) {
            let mut expected = [0.0; 80];
            let slot = tables[0][position / 16] * 16 + (position % 16) as u32;
            codec::read(&layout, &bytes, slot, &mut expected).unwrap();
            assert_eq!(row, &expected);
        }
        assert_eq!(rows.len(), 27);
        assert!(gather(&pool, 0, 0..49).is_err() && gather(&pool, 0, 0..usize::MAX).is_err());
        assert!(gather(&pool, 2, 0..1).is_err());
        let short = pool.narrow(0, 0, layout.pool_bytes(1).unwrap()).unwrap();
        assert!(gather(&short, 0, 0..16).is_err());
        let wide = PagedBatch::new(&sequences(&tables), 32, &Device::Cpu).unwrap();
        let error = gather_paged(&layout, &pool, &wide, 0, 0..16, DType::F32).unwrap_err();
        assert!(error.to_string().contains("`batch`"), "{error}");
    }
}
