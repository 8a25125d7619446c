//! Attention over a paged cache, in the format in which it is stored.

use super::PagedBatch;
use crate::cpu::{self, Executor, PagedSequence};
use crate::kv::{RowKind, RowLayout};
use crate::metal::paged_attention::{self as plans, At};
use crate::ops::PerHead;
use crate::ops::attention::{Input, Part, open};
use crate::ops::merged::Merge;
use crate::ops::planned::{self, Planned};
use crate::ops::rows::{heads, prepared_heads};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use std::ops::Range;

const OP: &str = "mmfp4-paged-attention";
const GATHER: &str = "mmfp4-gather-paged";

/// Attention of one sequence or many over the blocks of a pool, without a mask, a score matrix or a decoded copy of the cache.
///
/// A query's own token is in the cache already, and it sees the tokens up to its own. For MLA queries are absorbed: a
/// part as wide as the latent, and the rotary part. What is computed is [`cpu::attend_paged`]'s: a query's output depends on its
/// position and the stored bytes alone, so that a prompt gives the same bits however it is cut.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_mmfp4::cpu::PagedSequence;
/// use candle_mmfp4::kv::{CacheFormat, RowLayout, codec};
/// use candle_mmfp4::ops::{PagedAttention, PagedBatch};
///
/// // One head of keys and values of one element, for two heads of queries; two tokens in block 1.
/// let layout = RowLayout::heads(CacheFormat::BF16, 1, 1, 1)?;
/// let mut pool = vec![0; layout.pool_bytes(2)?];
/// codec::write(&layout, &[7., 1.], &mut pool, 16)?;
/// codec::write(&layout, &[8., 2.], &mut pool, 17)?;
/// let pool = Tensor::new(pool, &Device::Cpu)?;
///
/// let query = Tensor::ones((1, 2, 1), DType::F32, &Device::Cpu)?;
/// let sequence = PagedSequence { table: &[1], len: 2, queries: 1 };
/// let batch = PagedBatch::new(&[sequence], layout.block_tokens(), &Device::Cpu)?;
/// let y = PagedAttention::new(layout, 2, 0.0, None)?.forward(&[&query], &pool, &batch)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[1.5], [1.5]]]);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PagedAttention {
    layout: RowLayout,
    heads: usize,
    scale: f32,
    window: Option<usize>,
}

impl PagedAttention {
    /// Attention of so many heads over pools of this layout; scores are multiplied by `scale`; a query sees the last
    /// `window` positions, its own included, or (`None`) all before it.
    ///
    /// # Errors
    /// [`Error::Argument`] for heads that are no multiple of the cache's, or a window of 0.
    pub fn new(layout: RowLayout, heads: usize, scale: f32, window: Option<usize>) -> Result<Self> {
        let op = Self {
            layout,
            heads,
            scale,
            window,
        };
        // Without queries nothing but these is looked at.
        let nothing = cpu::HeadView {
            data: &[],
            row: 0,
            head: 0,
            width: cpu::key_width(&op.layout),
        };
        op.call(&[], &[nothing], &[]).check()?;
        Ok(op)
    }

    /// Refuses pools of a layout that no kernel of a GPU attends to, as [`forward`](Self::forward) on one would.
    ///
    /// # Errors
    /// [`Error::Argument`] says how wide vectors may be.
    pub fn check_kernels(layout: &RowLayout) -> Result<()> {
        plans::check(layout)
    }

    /// The layout of its pools.
    pub fn layout(&self) -> &RowLayout {
        &self.layout
    }

    /// `queries` of the batch's tokens are parts `[n, heads, d]`, side by side as wide as a key; F32, F16 or BF16. `pool` is the U8 bytes of whole blocks. Gives `[n, heads, value width]` in the queries' dtype.
    ///
    /// # Errors
    /// [`Error::Argument`] names the argument at fault where shape, dtype or device do not fit, or a table names a block
    /// beyond the pool.
    pub fn forward(&self, queries: &[&Tensor], pool: &Tensor, batch: &PagedBatch) -> Result<Tensor> {
        let (n, sequences) = (batch.tokens(), batch.sequences().collect::<Vec<_>>());
        self.check_queries(queries, batch)?;
        let value = cpu::value_width(&self.layout);
        if planned::runs_on(pool.device())
            && let Some(y) = self.on_device(queries, pool, batch)?
        {
            return Ok(y);
        }
        let inputs: Vec<_> = queries.iter().map(|part| open("queries", part)).collect();
        let parts = inputs
            .iter()
            .map(Input::part)
            .collect::<candle_core::Result<Vec<_>>>()?;
        let views: Vec<_> = parts.iter().map(Part::heads).collect();
        let mut y = vec![0.0; n * self.heads * value];
        with_bytes(pool, |pool| {
            cpu::attend_paged(
                &*Executor::current()?,
                self.call(pool, &views, &sequences),
                &mut y,
            )
        })?;
        let y = Tensor::from_vec(y, (n, self.heads, value), &Device::Cpu)?;
        Ok(y.to_dtype(queries[0].dtype())?)
    }

    /// MLA's attention with its values expanded from the latents: the output of [`forward`](Self::forward) by
    /// `values`, `[n, heads, value width]`; where kernels run, parts of the output are merged as the product reads them.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward) and of [`PerHead::forward`].
    pub fn forward_expanded(
        &self,
        queries: &[&Tensor],
        pool: &Tensor,
        batch: &PagedBatch,
        values: &PerHead,
    ) -> Result<Tensor> {
        if planned::runs_on(pool.device())
            && values.takes_parts(batch.tokens(), self.heads, cpu::value_width(&self.layout))
            && let Some(y) = self.expanded_on_device(queries, pool, batch, values)?
        {
            return Ok(y);
        }
        Ok(values.forward(&self.forward(queries, pool, batch)?)?)
    }

    /// What a device gives of few tokens; `None` where no kernel takes these operands, or parts are more than it has at a time.
    fn expanded_on_device(
        &self,
        queries: &[&Tensor],
        pool: &Tensor,
        batch: &PagedBatch,
        values: &PerHead,
    ) -> Result<Option<Tensor>> {
        self.check_queries(queries, batch)?;
        let Some(operands) = self.operands(queries, pool, batch)? else {
            return Ok(None);
        };
        let inputs = operands.inputs();
        let (bytes, shape) = (values.regions(), values.merged_shape(batch.tokens()));
        let attention = operands.attention(self, bytes.len())?;
        if attention.at_once() < batch.tokens() {
            return Ok(None);
        }
        let plan = || {
            let y = bytes.len() + inputs.len();
            let merge = Merge {
                weight: 0,
                parts: y + 1,
                stats: y + 2,
                y,
            };
            let sizes = (batch.tokens(), attention.splits);
            let Some(merged) = values.merged_launch(merge, sizes, operands.dtype())? else {
                return Ok(None);
            };
            Ok(Some(Planned {
                launches: vec![attention.parts(merge.parts, merge.stats)?, merged],
                bytes: bytes.clone(),
                outputs: [(shape.clone(), operands.dtype())],
                scratch: attention.scratch(batch.tokens()).to_vec(),
            }))
        };
        Ok(planned::over(OP, &inputs, plan)?.map(|[y]| y))
    }

    /// Checks that queries are parts of as many rows as a batch has tokens, of all heads.
    fn check_queries(&self, queries: &[&Tensor], batch: &PagedBatch) -> Result<()> {
        batch.check_blocks(OP, &self.layout)?;
        let n = batch.tokens();
        let fits = |part: &&Tensor| part.rank() == 3 && part.dims()[..2] == [n, self.heads];
        if !queries.is_empty() && queries.iter().all(fits) {
            return Ok(());
        }
        let expected = format!("parts [{n}, {}, d]", self.heads);
        let found: Vec<_> = queries.iter().map(|part| part.dims()).collect();
        Err(Error::argument(OP, "queries", expected, format!("{found:?}")))
    }

    /// What a device gives; `None` where nothing stands in for the CPU's kernels, or no kernel takes these operands.
    fn on_device(&self, queries: &[&Tensor], pool: &Tensor, batch: &PagedBatch) -> Result<Option<Tensor>> {
        let Some(operands) = self.operands(queries, pool, batch)? else {
            if pool.device().is_metal() {
                Self::check_kernels(&self.layout)?;
                crate::ops::no_metal(OP)?;
            }
            crate::ops::without_kernel(OP);
            return Ok(None);
        };
        let inputs = operands.inputs();
        let plan = || {
            let (y, value) = (inputs.len(), cpu::value_width(&self.layout));
            let (launches, scratch) = operands.attention(self, 0)?.launches(y, y + 1)?;
            Ok(Some(Planned {
                launches,
                bytes: Vec::new(),
                outputs: [((batch.tokens(), self.heads, value).into(), operands.dtype())],
                scratch,
            }))
        };
        Ok(planned::over(OP, &inputs, plan)?.map(|[y]| y))
    }

    /// The operands of plans, checked; `None` for what no kernel takes.
    fn operands<'a>(
        &self,
        queries: &[&Tensor],
        pool: &'a Tensor,
        batch: &'a PagedBatch,
    ) -> Result<Option<Operands<'a>>> {
        let dtype = queries[0].dtype();
        let same = queries.iter().all(|part| part.dtype() == dtype);
        let Some(index) = batch.index() else {
            return Ok(None);
        };
        if !same || Self::check_kernels(&self.layout).is_err() {
            return Ok(None);
        }
        let width: usize = queries.iter().map(|part| part.dims()[2]).sum();
        let key = cpu::key_width(&self.layout);
        if width != key {
            let expected = format!("a width of {key}, as the keys, in all parts");
            return Err(Error::argument(OP, "queries", expected, width.to_string()));
        }
        check_pool(OP, pool)?;
        let sequences: Vec<_> = batch.sequences().collect();
        let call = self.call(&[], &[], &sequences);
        call.check_tables(pool.elem_count())?;
        let mut all = Operands {
            queries: Vec::new(),
            pool,
            index,
            tokens: batch.tokens(),
            longest: 0,
            splits: 1,
            seen: 0,
            pairs: 0,
        };
        for sequence in sequences.iter().filter(|sequence| sequence.queries > 0) {
            let first = sequence.len - sequence.queries;
            all.longest = all.longest.max(sequence.len);
            all.seen += sequence.len - call.visible(first).start;
            for at in first..sequence.len {
                let visible = call.visible(at);
                all.splits = all.splits.max(plans::splits_seen(&self.layout, &visible));
                all.pairs += visible.len();
            }
        }
        let widths: &[usize] = match self.layout.kind() {
            RowKind::Latent { latent, rope: 0 } => &[latent],
            RowKind::Latent { latent, rope } => &[latent, rope],
            RowKind::Heads { key_dim, .. } => &[key_dim],
        };
        if queries
            .iter()
            .map(|part| part.dims()[2])
            .eq(widths.iter().copied())
        {
            all.queries = queries
                .iter()
                .map(|part| prepared_heads(part))
                .collect::<candle_core::Result<_>>()?;
        } else {
            let joined = match queries {
                [one] => prepared_heads(one)?,
                several => Tensor::cat(several, 2)?,
            };
            let mut start = 0;
            for width in widths {
                all.queries.push(joined.narrow(2, start, *width)?);
                start += width;
            }
        }
        Ok(Some(all))
    }

    fn call<'a>(
        &'a self,
        pool: &'a [u8],
        queries: &'a [cpu::HeadView<'a>],
        sequences: &'a [PagedSequence<'a>],
    ) -> cpu::PagedAttention<'a> {
        cpu::PagedAttention {
            layout: &self.layout,
            pool,
            heads: self.heads,
            queries,
            sequences,
            window: self.window,
            scale: self.scale,
        }
    }
}

/// What plans of attention read.
struct Operands<'a> {
    /// As one part, or of MLA with rotary keys two.
    queries: Vec<Tensor>,
    pool: &'a Tensor,
    index: &'a Tensor,
    tokens: usize,
    longest: usize,
    splits: usize,
    seen: usize,
    pairs: usize,
}

impl Operands<'_> {
    fn dtype(&self) -> DType {
        self.queries[0].dtype()
    }

    /// The tensors, in their order among a plan's operands.
    fn inputs(&self) -> Vec<&Tensor> {
        self.queries.iter().chain([self.pool, self.index]).collect()
    }

    /// Their plan, where they stand among a plan's operands from `start` on.
    fn attention<'a>(&self, op: &'a PagedAttention, start: usize) -> Result<plans::Attention<'a>> {
        let (dtype, parts) = (self.dtype(), self.queries.len());
        let lie = |part: usize| heads(OP, "queries", self.queries[part].layout(), dtype, start + part);
        Ok(plans::Attention {
            layout: &op.layout,
            dtype,
            scale: op.scale,
            window: op.window,
            tokens: self.tokens,
            longest: self.longest,
            splits: self.splits,
            seen: self.seen,
            pairs: self.pairs,
            queries: lie(0)?,
            rotary: (parts > 1).then(|| lie(1)).transpose()?,
            pool: at(self.pool, start + parts),
            index: at(self.index, start + parts + 1),
        })
    }
}

/// Where a tensor that lies together begins, as this operand.
fn at(tensor: &Tensor, operand: usize) -> At {
    At {
        operand,
        offset: tensor.layout().start_offset() * tensor.dtype().size_in_bytes(),
    }
}

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
        return Err(Error::argument(
            GATHER,
            "sequence",
            expected,
            sequence.to_string(),
        ));
    };
    batch.check_blocks(GATHER, layout)?;
    let shape = (positions.len(), layout.width());
    // Before memory is asked for: as many positions as the table has.
    let held = table.len().saturating_mul(layout.block_tokens());
    if positions.end > held {
        let expected = format!("blocks for {} tokens", positions.end);
        return Err(Error::argument(GATHER, "table", expected, format!("for {held}")));
    }
    if planned::runs_on(pool.device()) {
        match batch.table_start(sequence).zip(batch.index()) {
            Some((start, index)) => {
                check_pool(GATHER, pool)?;
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
                if let Some([rows]) = planned::over(GATHER, &[pool, index], plan)? {
                    return Ok(rows);
                }
            }
            None if pool.device().is_metal() => return Ok(crate::ops::no_metal(GATHER)?),
            None => crate::ops::without_kernel(GATHER),
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
            Err(Error::argument(GATHER, "table", expected, block.to_string()))
        }
        None => Ok(()),
    }
}

/// Checks that a pool is bytes that lie together.
fn check_pool(op: &'static str, pool: &Tensor) -> Result<()> {
    if pool.dtype() == DType::U8 && pool.is_contiguous() {
        return Ok(());
    }
    let found = format!("{:?} with strides {:?}", pool.dtype(), pool.stride());
    Err(Error::argument(op, "pool", "contiguous U8 bytes", found))
}

/// Calls `f` with the bytes of a pool.
fn with_bytes<R>(pool: &Tensor, f: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
    let (storage, layout) = pool.storage_and_layout();
    let error = |found: String| Error::argument(OP, "pool", "contiguous U8 bytes on the CPU", found);
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::U8(bytes)), Some((start, end))) => f(&bytes[start..end]),
        (_, None) => Err(error(format!("strides {:?}", layout.stride()))),
        _ => Err(error(format!("{:?} on {:?}", pool.dtype(), pool.device()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::reference;
    use crate::cpu::testing::{assert_within, noise};
    use crate::kv::{CacheFormat, codec};
    /// Two sequences of 40 and 5 tokens with 3 and 1 queries, GLM's kind of rows.
    fn case() -> (RowLayout, Tensor, Vec<Vec<u32>>, Tensor) {
        let layout = RowLayout::latent(CacheFormat::Fp8, 64, 16).unwrap();
        let tables = vec![vec![3, 0, 2], vec![1]];
        let mut pool = vec![0; layout.pool_bytes(4).unwrap()];
        for (table, len) in tables.iter().zip([40, 5]) {
            for position in 0..len {
                let slot = table[position / 16] * 16 + (position % 16) as u32;
                let row = noise(80, slot.into());
                codec::write(&layout, &row, &mut pool, slot).unwrap();
            }
        }
        let pool = Tensor::new(pool, &Device::Cpu).unwrap();
        let queries = Tensor::from_vec(noise(4 * 2 * 80, 77), (4, 2, 80), &Device::Cpu).unwrap();
        (layout, pool, tables, queries)
    }

    fn batch(sequences: &[PagedSequence<'_>]) -> PagedBatch {
        PagedBatch::new(sequences, 16, &Device::Cpu).unwrap()
    }

    fn sequences(tables: &[Vec<u32>]) -> [PagedSequence<'_>; 2] {
        [(0, 40, 3), (1, 5, 1)].map(|(index, len, queries)| PagedSequence {
            table: &tables[index],
            len,
            queries,
        })
    }

    #[test]
    fn tensors_of_any_strides_and_dtypes_agree_with_the_reference() {
        let (layout, pool, tables, queries) = case();
        let op = PagedAttention::new(layout.clone(), 2, 0.2, Some(30)).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let queries = queries.to_dtype(dtype).unwrap();
            let parts = [(0, 64), (64, 16)].map(|(start, len)| queries.narrow(2, start, len).unwrap());
            let y = op
                .forward(&[&parts[0], &parts[1]], &pool, &batch(&sequences(&tables)))
                .unwrap();
            assert_eq!((y.dims(), y.dtype()), ([4, 2, 64].as_slice(), dtype));
            let flat = |t: &Tensor| {
                let t = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
                t.to_vec1::<f32>().unwrap()
            };
            let values = flat(&queries);
            let view = cpu::HeadView {
                data: &values,
                row: 160,
                head: 80,
                width: 80,
            };
            let bytes = pool.to_vec1::<u8>().unwrap();
            let expected = reference::paged_attention(op.call(&bytes, &[view], &sequences(&tables)));
            assert_within(&flat(&y), &expected, 2e-5, &format!("{dtype:?}"));
        }
    }

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
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (layout, pool, tables, queries) = case();
        let op = PagedAttention::new(layout.clone(), 2, 0.2, None).unwrap();
        let wrong = |argument: &str, queries: &[&Tensor], pool: &Tensor, batch: &PagedBatch| {
            let error = op.forward(queries, pool, batch).unwrap_err().to_string();
            assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
        };
        let all = batch(&sequences(&tables));
        assert!(op.forward(&[&queries], &pool, &all).is_ok());
        wrong("queries", &[], &pool, &all);
        wrong("queries", &[&queries.narrow(0, 0, 3).unwrap()], &pool, &all);
        wrong("queries", &[&queries.narrow(2, 0, 79).unwrap()], &pool, &all);
        wrong("queries", &[&queries.flatten_all().unwrap()], &pool, &all);
        wrong("queries", &[&queries.to_dtype(DType::U32).unwrap()], &pool, &all);
        wrong("pool", &[&queries], &pool.to_dtype(DType::U32).unwrap(), &all);
        let strided = pool.reshape((2, ())).unwrap().t().unwrap();
        wrong("pool", &[&queries], &strided, &all);
        let short = pool.narrow(0, 0, layout.pool_bytes(3).unwrap()).unwrap();
        wrong("tables", &[&queries], &short, &all);
        let refused = |len, argument: &str| {
            let [first, second] = sequences(&tables);
            let long = [PagedSequence { len, ..first }, second];
            let error = PagedBatch::new(&long, 16, &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains(&format!("`{argument}`")), "{error}");
        };
        refused(2, "queries");
        refused(49, "tables");
        let wide = PagedBatch::new(&sequences(&tables), 32, &Device::Cpu).unwrap();
        wrong("batch", &[&queries], &pool, &wide);
        let error = gather_paged(&layout, &pool, &wide, 0, 0..16, DType::F32).unwrap_err();
        assert!(error.to_string().contains("`batch`"), "{error}");
        // An empty batch is no error.
        let none = queries.narrow(0, 0, 0).unwrap();
        assert_eq!(
            op.forward(&[&none], &pool, &batch(&[])).unwrap().dims(),
            [0, 2, 64]
        );
        assert!(PagedAttention::new(layout.clone(), 0, 1.0, None).is_err());
        assert!(PagedAttention::new(layout, 2, 1.0, Some(0)).is_err());
        let layout = RowLayout::heads(CacheFormat::F16, 2, 8, 8).unwrap();
        assert!(PagedAttention::new(layout, 3, 1.0, None).is_err());
    }
}
