//! Attention over a paged cache, in the format in which it is stored.

use super::PagedBatch;
use super::pool::{at, bytes_of, check_pool};
use crate::cpu::{self, Executor, PagedSequence};
use crate::kv::{RowKind, RowLayout};
use crate::metal::paged_attention as plans;
use crate::ops::PerHead;
use crate::ops::activations::{from_f32, view};
use crate::ops::merged::Merge;
use crate::ops::planned::{self, Planned};
use crate::ops::rows::{heads, prepared_heads};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, MetalStorage, Shape, Storage, Tensor};
use std::cell::Cell;

const OP: &str = "mmfp4-paged-attention";

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
        self.check_queries(queries, batch)?;
        let queries = self.parts(queries)?;
        let planned = match planned::runs_on(pool.device()) {
            true => self.planned(&queries, pool, batch)?,
            false => None,
        };
        self.apply(&queries, pool, batch, planned)
    }

    fn apply(
        &self,
        queries: &[Tensor],
        pool: &Tensor,
        batch: &PagedBatch,
        planned: Option<Planned<'_, 1>>,
    ) -> Result<Tensor> {
        let call = Call {
            op: self,
            batch,
            planned: Cell::new(planned),
        };
        Ok(match queries {
            [latent, rotary] => latent.apply_op3_no_bwd(rotary, pool, &call)?,
            queries => queries[0].apply_op2_no_bwd(pool, &call)?,
        })
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
        {
            self.check_queries(queries, batch)?;
            let queries = self.parts(queries)?;
            if let Some(planned) = self.planned_expanded(&queries, pool, batch, values)? {
                return self.apply(&queries, pool, batch, Some(planned));
            }
        }
        Ok(values.forward(&self.forward(queries, pool, batch)?)?)
    }

    /// What a device runs for few tokens; `None` where no kernel takes these operands, or parts are more than it has at a time.
    fn planned_expanded<'a>(
        &self,
        queries: &[Tensor],
        pool: &Tensor,
        batch: &PagedBatch,
        values: &'a PerHead,
    ) -> Result<Option<Planned<'a, 1>>> {
        let Some(operands) = self.operands(queries, pool, batch)? else {
            return Ok(None);
        };
        let bytes = values.regions();
        let attention = operands.attention(self, bytes.len())?;
        if attention.at_once() < batch.tokens() {
            return Ok(None);
        }
        let y = bytes.len() + operands.count();
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
            bytes,
            outputs: [(values.merged_shape(batch.tokens()), operands.dtype())],
            scratch: attention.scratch(batch.tokens()).to_vec(),
        }))
    }

    /// Checks that queries are parts of as many rows as a batch has tokens, of all heads, together as wide as a key.
    fn check_queries(&self, queries: &[&Tensor], batch: &PagedBatch) -> Result<()> {
        batch.check_blocks(OP, &self.layout)?;
        let (n, key) = (batch.tokens(), cpu::key_width(&self.layout));
        let fits = |part: &&Tensor| part.rank() == 3 && part.dims()[..2] == [n, self.heads];
        let rows = !queries.is_empty() && queries.iter().all(fits);
        if rows && queries.iter().map(|part| part.dims()[2]).sum::<usize>() == key {
            return Ok(());
        }
        let expected = format!("parts [{n}, {}, d], the keys' {key} wide together", self.heads);
        let found: Vec<_> = queries.iter().map(|part| part.dims()).collect();
        Err(Error::argument(OP, "queries", expected, format!("{found:?}")))
    }

    /// Queries as kernels take them: in one part, or of latents with rotary keys in two.
    fn parts(&self, queries: &[&Tensor]) -> Result<Vec<Tensor>> {
        let widths: &[usize] = match self.layout.kind() {
            RowKind::Latent { latent, rope: 0 } => &[latent],
            RowKind::Latent { latent, rope } => &[latent, rope],
            RowKind::Heads { key_dim, .. } => &[key_dim],
        };
        let given = queries.iter().map(|part| part.dims()[2]);
        if given.eq(widths.iter().copied()) {
            let prepared = queries.iter().map(|part| prepared_heads(part));
            return Ok(prepared.collect::<candle_core::Result<_>>()?);
        }
        let joined = match queries {
            [one] => prepared_heads(one)?,
            several => Tensor::cat(several, 2)?,
        };
        let (mut parts, mut start) = (Vec::with_capacity(widths.len()), 0);
        for width in widths {
            parts.push(joined.narrow(2, start, *width)?);
            start += width;
        }
        Ok(parts)
    }

    /// What a device runs; `None` where no kernel takes these operands, and the CPU is to compute.
    fn planned(
        &self,
        queries: &[Tensor],
        pool: &Tensor,
        batch: &PagedBatch,
    ) -> Result<Option<Planned<'static, 1>>> {
        let Some(operands) = self.operands(queries, pool, batch)? else {
            if pool.device().is_metal() {
                Self::check_kernels(&self.layout)?;
                crate::ops::no_metal(OP)?;
            }
            crate::ops::without_kernel(OP);
            return Ok(None);
        };
        let (y, value) = (operands.count(), cpu::value_width(&self.layout));
        let (launches, scratch) = operands.attention(self, 0)?.launches(y, y + 1)?;
        Ok(Some(Planned {
            launches,
            bytes: Vec::new(),
            outputs: [((batch.tokens(), self.heads, value).into(), operands.dtype())],
            scratch,
        }))
    }

    /// The operands of plans, checked; `None` for what no kernel takes.
    fn operands<'a>(
        &self,
        queries: &'a [Tensor],
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
        check_pool(OP, pool)?;
        let sequences: Vec<_> = batch.sequences().collect();
        let call = self.call(&[], &[], &sequences);
        call.check_tables(pool.elem_count())?;
        let mut all = Operands {
            queries,
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
    /// As [`PagedAttention::parts`] gives them.
    queries: &'a [Tensor],
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

    /// How many they are: queries, pool and index, in this order.
    fn count(&self) -> usize {
        self.queries.len() + 2
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

/// A call, as Candle runs it, once: of queries in one part or two, and the pool; the op holds the tables.
struct Call<'a> {
    op: &'a PagedAttention,
    batch: &'a PagedBatch,
    /// What a device runs, where kernels take the operands.
    planned: Cell<Option<Planned<'a, 1>>>,
}

impl Call<'_> {
    fn on_cpu(
        &self,
        queries: &[(&CpuStorage, &Layout)],
        (pool, pool_layout): (&CpuStorage, &Layout),
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        if let (Some(planned), Some(index)) = (self.planned.take(), self.batch.index())
            && let Storage::Cpu(index) = &*index.storage_and_layout().0
        {
            let inputs: Vec<_> = queries.iter().map(|part| part.0).chain([pool, index]).collect();
            if let Some([done]) = planned::in_place_of_cpu(OP, &inputs, || Ok(Some(planned)))? {
                return Ok(done);
            }
        }
        let parts = queries
            .iter()
            .map(|(storage, layout)| view(OP, "queries", storage, layout));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let views: Vec<_> = parts
            .iter()
            .zip(queries)
            .map(|(part, (_, layout))| cpu::HeadView {
                data: &part.data,
                row: part.strides[0],
                head: part.strides[1],
                width: layout.dims()[2],
            })
            .collect();
        let (op, sequences) = (self.op, self.batch.sequences().collect::<Vec<_>>());
        let shape = (self.batch.tokens(), op.heads, cpu::value_width(&op.layout));
        let mut y = vec![0.0; shape.0 * shape.1 * shape.2];
        let pool = bytes_of(OP, pool, pool_layout)?;
        cpu::attend_paged(&*Executor::current()?, op.call(pool, &views, &sequences), &mut y)?;
        Ok((from_f32(y, queries[0].0), shape.into()))
    }

    fn on_metal(
        &self,
        queries: &[&MetalStorage],
        pool: &MetalStorage,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let Some(index) = self.batch.index() else {
            return crate::ops::no_metal(OP);
        };
        let Storage::Metal(index) = &*index.storage_and_layout().0 else {
            return crate::ops::no_metal(OP);
        };
        let inputs: Vec<_> = queries.iter().copied().chain([pool, index]).collect();
        let [done] = planned::on_metal(OP, &inputs, || Ok(self.planned.take()))?;
        Ok(done)
    }
}

impl CustomOp2 for Call<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        query_layout: &Layout,
        pool: &CpuStorage,
        pool_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(query, query_layout)], (pool, pool_layout))
    }

    fn metal_fwd(
        &self,
        query: &MetalStorage,
        _: &Layout,
        pool: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        self.on_metal(&[query], pool)
    }
}

impl CustomOp3 for Call<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        latent: &CpuStorage,
        latent_layout: &Layout,
        rotary: &CpuStorage,
        rotary_layout: &Layout,
        pool: &CpuStorage,
        pool_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.on_cpu(
            &[(latent, latent_layout), (rotary, rotary_layout)],
            (pool, pool_layout),
        )
    }

    fn metal_fwd(
        &self,
        latent: &MetalStorage,
        _: &Layout,
        rotary: &MetalStorage,
        _: &Layout,
        pool: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        self.on_metal(&[latent, rotary], pool)
    }
}

/// What tests of ops over a pool share.
#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use crate::cpu::testing::noise;
    use crate::kv::{CacheFormat, codec};
    use candle_core::Device;

    /// Two sequences of 40 and 5 tokens with 3 and 1 queries, GLM's kind of rows.
    pub fn case() -> (RowLayout, Tensor, Vec<Vec<u32>>, Tensor) {
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

    pub fn batch(sequences: &[PagedSequence<'_>]) -> PagedBatch {
        PagedBatch::new(sequences, 16, &Device::Cpu).unwrap()
    }

    pub fn sequences(tables: &[Vec<u32>]) -> [PagedSequence<'_>; 2] {
        [(0, 40, 3), (1, 5, 1)].map(|(index, len, queries)| PagedSequence {
            table: &tables[index],
            len,
            queries,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{batch, case, sequences};
    use super::*;
    use crate::cpu::reference;
    use crate::cpu::testing::assert_within;
    use crate::kv::CacheFormat;
    use candle_core::Device;

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
