//! Keys and values of new tokens.

use super::super::PagedBatch;
use super::{check_pool, check_rows, floats, of_cpu, on_cpu, prepared_heads};
use crate::cpu::{self, NewHeads};
use crate::kv::{RowKind, RowLayout};
use crate::metal::append as metal;
use crate::ops::planned::{self, Planned};
use crate::ops::rows::heads as heads_of;
use crate::{Error, Result};
use candle_core::{DType, Layout, Storage, Tensor};

const HEADS: &str = "mmfp4-append-heads";

/// Keys and values of new tokens, into a pool in its format, for multi-head and grouped-query attention. Rotary embedding
/// is the caller's.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_mmfp4::cpu::PagedSequence;
/// use candle_mmfp4::kv::{CacheFormat, RowLayout, codec};
/// use candle_mmfp4::ops::{AppendHeads, PagedBatch};
///
/// let layout = RowLayout::heads(CacheFormat::F16, 2, 1, 1)?;
/// let pool = Tensor::zeros(layout.pool_bytes(1)?, DType::U8, &Device::Cpu)?;
/// let (keys, values) = (Tensor::new(&[[[1f32], [2.]]], &Device::Cpu)?, Tensor::new(&[[[3f32], [4.]]], &Device::Cpu)?);
/// // The eighth token of a sequence.
/// let batch = PagedBatch::new(&[PagedSequence { table: &[0], len: 8, queries: 1 }], layout.block_tokens(), &Device::Cpu)?;
/// AppendHeads::new(layout.clone())?.forward(&pool, &keys, &values, &batch)?;
///
/// let mut row = [0f32; 4];
/// codec::read(&layout, &pool.to_vec1::<u8>()?, 7, &mut row)?;
/// assert_eq!(row, [1., 2., 3., 4.]);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct AppendHeads {
    layout: RowLayout,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
}

impl AppendHeads {
    /// An op for pools of this layout.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layout that is not of heads.
    pub fn new(layout: RowLayout) -> Result<Self> {
        match layout.kind() {
            RowKind::Heads {
                kv_heads,
                key_dim,
                value_dim,
            } => Ok(Self {
                layout,
                kv_heads,
                key_dim,
                value_dim,
            }),
            other => Err(Error::argument(
                HEADS,
                "layout",
                "keys and values of heads",
                format!("{other:?}"),
            )),
        }
    }

    /// The layout of its pools.
    pub fn layout(&self) -> &RowLayout {
        &self.layout
    }

    /// Stores keys `[tokens, heads, key_dim]` and values `[tokens, heads, value_dim]`, each F32, F16 or BF16, in the
    /// batch's slots of `pool`, the U8 bytes of whole blocks.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit; a slot beyond the pool. The pool is then as
    /// it was.
    pub fn forward(
        &self,
        pool: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        batch: &PagedBatch,
    ) -> candle_core::Result<()> {
        let slots = batch.slots();
        check_pool(HEADS, &self.layout, pool, batch)?;
        check_rows(HEADS, "keys", keys, &[slots.len(), self.kv_heads, self.key_dim])?;
        check_rows(
            HEADS,
            "values",
            values,
            &[slots.len(), self.kv_heads, self.value_dim],
        )?;
        if slots.is_empty() {
            return Ok(());
        }
        let (keys, values) = (prepared_heads(keys)?, prepared_heads(values)?);
        if self.on_device(pool, &keys, &values, batch)? {
            return Ok(());
        }
        let (of_keys, keys_lie) = keys.storage_and_layout();
        let (of_values, values_lie) = values.storage_and_layout();
        let both = (
            heads("keys", &of_keys, keys_lie)?,
            heads("values", &of_values, values_lie)?,
        );
        on_cpu(HEADS, pool, |executor, pool| {
            cpu::append_heads(executor, &self.layout, both, slots, pool);
        })
    }

    /// Runs it by kernels, where those run; whether they did.
    fn on_device(
        &self,
        pool: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        batch: &PagedBatch,
    ) -> candle_core::Result<bool> {
        let Some(index) = batch.index() else {
            crate::ops::without_kernel(HEADS);
            return Ok(false);
        };
        if keys.dtype() != values.dtype() {
            // A kernel takes both in one dtype. This one holds what they are.
            let (keys, values) = (keys.to_dtype(DType::F32)?, values.to_dtype(DType::F32)?);
            return self.on_device(pool, &keys, &values, batch);
        }
        let dtype = keys.dtype();
        let done = planned::into(HEADS, &[keys, values, index], pool, || {
            let op = metal::AppendHeads {
                dtype,
                tokens: batch.tokens(),
                keys: heads_of(HEADS, "keys", keys.layout(), dtype, 0)?,
                values: heads_of(HEADS, "values", values.layout(), dtype, 1)?,
                rows: 3,
                pool: metal::Pool {
                    layout: &self.layout,
                    offset: pool.layout().start_offset(),
                    slots: 2,
                },
            };
            Ok(Some(Planned {
                launches: vec![op.launch()?],
                bytes: Vec::new(),
                outputs: [],
                scratch: Vec::new(),
            }))
        })?;
        Ok(done.is_some())
    }
}

fn heads<'a>(argument: &'static str, storage: &'a Storage, layout: &Layout) -> Result<NewHeads<'a>> {
    Ok(NewHeads {
        rows: floats(HEADS, argument, of_cpu(HEADS, argument, storage)?, layout)?,
        row: layout.stride()[0],
        head: layout.stride()[1],
    })
}
