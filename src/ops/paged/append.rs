//! New tokens into a pool.

use super::PagedBatch;
use crate::cpu::{self, Executor, Floats, NewHeads, NewLatents, Pairing};
use crate::kv::{RowKind, RowLayout, Slots};
use crate::metal::append as metal;
use crate::metal::norm_rope::LatentRows;
use crate::ops::activations::to_f32;
use crate::ops::norm::RmsNorm;
use crate::ops::planned::{self, Planned};
use crate::ops::rope;
use crate::ops::rows::{heads as heads_of, rows};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, MetalStorage, Shape, Storage, Tensor};
use std::borrow::Cow;

const LATENTS: &str = "mmfp4-append-latents";
const HEADS: &str = "mmfp4-append-heads";

/// What MLA keeps of new tokens, into a pool: the latent after its norm, the rotary key after its rotation, both in the
/// pool's format, in one pass.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_mmfp4::cpu::PagedSequence;
/// use candle_mmfp4::kv::{CacheFormat, RowLayout, codec};
/// use candle_mmfp4::nn::{Pairing, RmsNorm};
/// use candle_mmfp4::ops::{AppendLatents, PagedBatch};
///
/// // A latent of two elements and a key of one pair, which a quarter of a turn takes from (1, 0) to (0, 1).
/// let layout = RowLayout::latent(CacheFormat::BF16, 2, 2)?;
/// let pool = Tensor::zeros(layout.pool_bytes(1)?, DType::U8, &Device::Cpu)?;
/// let append = AppendLatents::new(RmsNorm::new(vec![1., 1.], 0.0)?, Pairing::Interleaved, layout.clone())?;
/// let kv = Tensor::new(&[[5f32, 5., 1., 0.]], &Device::Cpu)?;
/// let (cos, sin) = (Tensor::new(&[[0f32]], &Device::Cpu)?, Tensor::new(&[[1f32]], &Device::Cpu)?);
/// // The fourth token of a sequence.
/// let batch = PagedBatch::new(&[PagedSequence { table: &[0], len: 4, queries: 1 }], layout.block_tokens(), &Device::Cpu)?;
/// append.forward(&pool, &kv, &cos, &sin, &batch)?;
///
/// let mut row = [0f32; 4];
/// codec::read(&layout, &pool.to_vec1::<u8>()?, 3, &mut row)?;
/// assert_eq!(row, [1., 1., 0., 1.]);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct AppendLatents {
    norm: RmsNorm,
    pairing: Pairing,
    layout: RowLayout,
    latent: usize,
    rope: usize,
}

impl AppendLatents {
    /// An op with this norm of the latents, these pairs of rotary keys and this layout of pools.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layout that is not of latents as long as the norm, with keys of whole pairs.
    pub fn new(norm: RmsNorm, pairing: Pairing, layout: RowLayout) -> Result<Self> {
        let width = norm.weight().len();
        match layout.kind() {
            RowKind::Latent { latent, rope } if latent == width && rope % 2 == 0 => Ok(Self {
                norm,
                pairing,
                layout,
                latent,
                rope,
            }),
            other => {
                let expected = format!("latents of {width}, as the norm, and keys of whole pairs");
                Err(Error::argument(LATENTS, "layout", expected, format!("{other:?}")))
            }
        }
    }

    /// The layout of its pools.
    pub fn layout(&self) -> &RowLayout {
        &self.layout
    }

    /// Stores rows `[tokens, latent + d]` of `kv`, F32, F16 or BF16, by cosines and sines `[tokens, d/2]`, in the batch's
    /// slots of `pool`, the U8 bytes of whole blocks.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit; a slot beyond the pool. The pool is then as
    /// it was.
    pub fn forward(
        &self,
        pool: &Tensor,
        kv: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        batch: &PagedBatch,
    ) -> candle_core::Result<()> {
        let slots = batch.slots();
        self.check(pool, kv, cos, sin, batch)?;
        if slots.is_empty() {
            return Ok(());
        }
        let kv = prepared(kv, 1)?;
        if let Some([]) = self.on_device(pool, &kv, None, (cos, sin), batch, [])? {
            return Ok(());
        }
        let call = LatentCall {
            op: self,
            cos,
            sin,
            slots,
        };
        pool.inplace_op2(&kv, &call)
    }

    /// The same, and the rotary parts of the tokens' queries `[tokens, heads, d]`, of kv's dtype, turned by the same angles;
    /// in one dispatch where kernels run.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with_queries(
        &self,
        pool: &Tensor,
        kv: &Tensor,
        queries: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        batch: &PagedBatch,
    ) -> candle_core::Result<Tensor> {
        self.check(pool, kv, cos, sin, batch)?;
        let fits =
            matches!(queries.dims(), &[tokens, _, d] if tokens == batch.tokens() && d == self.rope && d > 0);
        if !fits || queries.dtype() != kv.dtype() {
            let expected = format!(
                "[{}, heads, {}] in {:?}, of a layout with rotary keys",
                batch.tokens(),
                self.rope,
                kv.dtype()
            );
            let found = format!("{:?} in {:?}", queries.dims(), queries.dtype());
            return Err(Error::argument(LATENTS, "queries", expected, found).into());
        }
        if queries.elem_count() > 0 {
            let (kv, queries) = (prepared(kv, 1)?, prepared_heads(queries)?);
            let turned = [(queries.shape().clone(), queries.dtype())];
            if let Some([turned]) = self.on_device(pool, &kv, Some(&queries), (cos, sin), batch, turned)? {
                return Ok(turned);
            }
        }
        let turned = rope::Rope::new(self.pairing).forward(queries, cos, sin)?;
        self.forward(pool, kv, cos, sin, batch)?;
        Ok(turned)
    }

    /// Checks everything but the queries.
    fn check(
        &self,
        pool: &Tensor,
        kv: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        batch: &PagedBatch,
    ) -> Result<()> {
        let tokens = batch.tokens();
        check_pool(LATENTS, &self.layout, pool, batch)?;
        check_rows(LATENTS, "kv", kv, &[tokens, self.latent + self.rope])?;
        rope::check_angles(LATENTS, [tokens, self.rope / 2], cos.layout(), sin.layout())
    }

    /// Runs it by kernels, where those run; `None` where the CPU's are to. The output is the queries, if there are any.
    fn on_device<const N: usize>(
        &self,
        pool: &Tensor,
        kv: &Tensor,
        queries: Option<&Tensor>,
        (cos, sin): (&Tensor, &Tensor),
        batch: &PagedBatch,
        outputs: [(Shape, DType); N],
    ) -> candle_core::Result<Option<[Tensor; N]>> {
        let Some(index) = batch.index() else {
            crate::ops::without_kernel(LATENTS);
            return Ok(None);
        };
        let (cos, sin) = (planned::prepared(cos, 1)?, planned::prepared(sin, 1)?);
        let inputs = [kv, &cos, &sin, index];
        let inputs: Vec<_> = inputs.into_iter().chain(queries).collect();
        // Operands: the norm, the inputs, the pool, the queries turned.
        let rows_at = 1 + inputs.len();
        planned::into(LATENTS, &inputs, pool, || {
            let dtype = kv.dtype();
            let (of_cos, of_sin) = ((cos.layout(), cos.dtype()), (sin.layout(), sin.dtype()));
            let Some(mut angles) = rope::angles(LATENTS, self.pairing, self.rope / 2, of_cos, of_sin, 2)?
            else {
                return Ok(None);
            };
            if self.rope == 0 {
                // Nothing is turned, and there is no angle to bind: something that is there takes their place.
                (angles.cos.operand, angles.sin.operand) = (0, 0);
            }
            let queries = queries
                .map(|queries| heads_of(LATENTS, "queries", queries.layout(), dtype, 5))
                .transpose()?;
            let op = metal::AppendLatents {
                latents: LatentRows {
                    dtype,
                    tokens: batch.tokens(),
                    latent: self.latent,
                    eps: self.norm.eps(),
                    kv: rows(LATENTS, "kv", kv.layout(), dtype, 1)?,
                    weight: 0,
                    angles,
                    rows: rows_at,
                    queries: queries.map(|queries| (queries, rows_at + 1)),
                },
                pool: metal::Pool {
                    layout: &self.layout,
                    offset: pool.layout().start_offset(),
                    slots: 4,
                },
            };
            Ok(Some(Planned {
                launches: vec![op.launch()?],
                bytes: vec![self.norm.bytes()],
                outputs,
                scratch: Vec::new(),
            }))
        })
    }
}

/// A call of [`AppendLatents`], as Candle runs it.
struct LatentCall<'a> {
    op: &'a AppendLatents,
    cos: &'a Tensor,
    sin: &'a Tensor,
    slots: &'a Slots,
}

impl InplaceOp2 for LatentCall<'_> {
    fn name(&self) -> &'static str {
        LATENTS
    }

    fn cpu_fwd(
        &self,
        pool: &mut CpuStorage,
        at: &Layout,
        kv: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let (of_cos, cos_layout) = self.cos.storage_and_layout();
        let (of_sin, sin_layout) = self.sin.storage_and_layout();
        let cos = angles("cos", &of_cos, cos_layout)?;
        let sin = angles("sin", &of_sin, sin_layout)?;
        let new = NewLatents {
            rows: floats(LATENTS, "kv", kv, layout)?,
            stride: row_stride(LATENTS, "kv", layout)?,
            weight: self.op.norm.weight(),
            eps: self.op.norm.eps(),
            pairing: self.op.pairing,
            cos: &cos,
            sin: &sin,
        };
        let pool = bytes(LATENTS, pool, at)?;
        cpu::append_latents(&*Executor::current()?, &self.op.layout, new, self.slots, pool);
        Ok(())
    }

    fn metal_fwd(
        &self,
        _: &mut MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<()> {
        crate::ops::no_metal(LATENTS)
    }
}

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
        let call = HeadsCall { op: self, slots };
        pool.inplace_op3(&keys, &values, &call)
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

/// A call of [`AppendHeads`], as Candle runs it.
struct HeadsCall<'a> {
    op: &'a AppendHeads,
    slots: &'a Slots,
}

impl InplaceOp3 for HeadsCall<'_> {
    fn name(&self) -> &'static str {
        HEADS
    }

    fn cpu_fwd(
        &self,
        pool: &mut CpuStorage,
        at: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> candle_core::Result<()> {
        let both = (
            heads("keys", keys, keys_layout)?,
            heads("values", values, values_layout)?,
        );
        let pool = bytes(HEADS, pool, at)?;
        cpu::append_heads(&*Executor::current()?, &self.op.layout, both, self.slots, pool);
        Ok(())
    }

    fn metal_fwd(
        &self,
        _: &mut MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<()> {
        crate::ops::no_metal(HEADS)
    }
}

/// Checks that a pool has a batch's slots.
fn check_pool(op: &'static str, layout: &RowLayout, pool: &Tensor, batch: &PagedBatch) -> Result<()> {
    let (block, slots) = (layout.block_bytes(), batch.slots());
    if !slots.is_empty() && batch.block_tokens() != layout.block_tokens() {
        let expected = format!("blocks of {} tokens", layout.block_tokens());
        return Err(Error::argument(
            op,
            "batch",
            expected,
            format!("of {}", batch.block_tokens()),
        ));
    }
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

fn heads<'a>(argument: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<NewHeads<'a>> {
    Ok(NewHeads {
        rows: floats(HEADS, argument, storage, layout)?,
        row: layout.stride()[0],
        head: layout.stride()[1],
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

fn angles<'a>(argument: &'static str, storage: &'a Storage, layout: &Layout) -> Result<Cow<'a, [f32]>> {
    match storage {
        Storage::Cpu(storage) => to_f32(LATENTS, argument, storage, layout),
        _ => Err(Error::argument(LATENTS, argument, "the pool's device", "another")),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::PagedSequence;
    use crate::kv::{CacheFormat, codec};
    use candle_core::{Device, IndexOp};

    fn append(format: CacheFormat) -> AppendLatents {
        let norm = RmsNorm::new((0..32).map(|i| 1.0 + i as f32 / 32.0).collect(), 1e-6).unwrap();
        let layout = RowLayout::latent(format, 32, 4).unwrap();
        AppendLatents::new(norm, Pairing::Interleaved, layout).unwrap()
    }

    fn noise(shape: impl Into<candle_core::Shape>) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    fn pool(layout: &RowLayout, blocks: usize) -> Tensor {
        Tensor::zeros(layout.pool_bytes(blocks).unwrap(), DType::U8, &Device::Cpu).unwrap()
    }

    /// Tokens that are written to these slots.
    fn batch(range: std::ops::Range<u32>) -> PagedBatch {
        let table: Vec<u32> = (0..range.end.div_ceil(16)).collect();
        let sequence = PagedSequence {
            table: &table,
            len: range.end as usize,
            queries: range.len(),
        };
        PagedBatch::new(&[sequence], 16, &Device::Cpu).unwrap()
    }

    /// What the cache without formats keeps is what this keeps, in the formats that are its dtypes.
    #[test]
    fn kv_append_stores_what_latent_rows_gives() {
        for (format, dtype) in [(CacheFormat::BF16, DType::BF16), (CacheFormat::F16, DType::F16)] {
            let op = append(format);
            let rows = crate::ops::LatentRows::new(op.norm.clone(), Pairing::Interleaved);
            let kv = noise((5, 40)).to_dtype(dtype).unwrap().narrow(1, 3, 36).unwrap();
            let (cos, sin) = (noise((5, 2)), noise((5, 2)));
            let expected = rows.forward(&kv, &cos, &sin).unwrap();
            let pool = pool(op.layout(), 1);
            op.forward(&pool, &kv, &cos, &sin, &batch(4..9)).unwrap();
            let bytes = pool.to_vec1::<u8>().unwrap();
            for (i, expected) in expected
                .to_dtype(DType::F32)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap()
                .iter()
                .enumerate()
            {
                let mut row = vec![0.0; 36];
                codec::read(op.layout(), &bytes, 4 + i as u32, &mut row).unwrap();
                assert_eq!(row, *expected, "{format}");
            }
        }
    }

    #[test]
    fn kv_append_takes_rows_as_they_lie() {
        let op = append(CacheFormat::Fp8);
        let (wide, cos, sin) = (noise((36, 6)), noise((2, 6)), noise((6, 2)));
        let (kv, cos) = (wide.t().unwrap(), cos.t().unwrap());
        let run = |kv: &Tensor, cos: &Tensor| {
            let pool = pool(op.layout(), 2);
            op.forward(&pool, kv, cos, &sin, &batch(12..18)).unwrap();
            pool.to_vec1::<u8>().unwrap()
        };
        let expected = run(&kv.contiguous().unwrap(), &cos.contiguous().unwrap());
        assert!(run(&kv, &cos) == expected);

        let heads = AppendHeads::new(RowLayout::heads(CacheFormat::fp4(), 2, 32, 16).unwrap()).unwrap();
        let (keys, values) = (noise((6, 32, 2)), noise((2, 6, 20)));
        let keys = keys.transpose(1, 2).unwrap();
        let values = values.transpose(0, 1).unwrap().narrow(2, 4, 16).unwrap();
        let run = |keys: &Tensor, values: &Tensor| {
            let pool = pool(heads.layout(), 2);
            heads.forward(&pool, keys, values, &batch(12..18)).unwrap();
            pool.to_vec1::<u8>().unwrap()
        };
        let expected = run(&keys.contiguous().unwrap(), &values.contiguous().unwrap());
        assert!(run(&keys, &values) == expected && expected.iter().any(|byte| *byte != 0));
    }

    #[test]
    fn kv_append_names_what_does_not_fit() {
        let op = append(CacheFormat::fp4());
        let (good, kv, angles) = (pool(op.layout(), 2), noise((3, 36)), noise((3, 2)));
        fn last(table: &[u32]) -> PagedSequence<'_> {
            PagedSequence {
                table,
                len: 3,
                queries: 1,
            }
        }
        let of = |tables: &[&[u32]]| {
            let sequences: Vec<_> = tables.iter().map(|table| last(table)).collect();
            PagedBatch::new(&sequences, 16, &Device::Cpu)
        };
        let wrong = |argument: &str, pool: &Tensor, kv: &Tensor, cos: &Tensor, batch: &PagedBatch| {
            let before = pool.flatten_all().unwrap().to_dtype(DType::U8).unwrap();
            let before = before.to_vec1::<u8>().unwrap();
            let error = op.forward(pool, kv, cos, &angles, batch).unwrap_err().to_string();
            assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
            let after = pool.flatten_all().unwrap().to_dtype(DType::U8).unwrap();
            assert!(after.to_vec1::<u8>().unwrap() == before);
        };
        op.forward(&good, &kv, &angles, &angles, &batch(29..32)).unwrap();
        wrong("slots", &good, &kv, &angles, &batch(30..33));
        wrong("slots", &good, &kv, &angles, &of(&[&[u32::MAX / 16]]).unwrap());
        let wide = PagedBatch::new(&[last(&[0])], 32, &Device::Cpu).unwrap();
        wrong("batch", &good, &kv, &angles, &wide);
        wrong("kv", &good, &kv, &angles, &batch(0..2));
        wrong("kv", &good, &noise((3, 35)), &angles, &batch(0..3));
        wrong(
            "kv",
            &good,
            &kv.to_dtype(DType::F64).unwrap(),
            &angles,
            &batch(0..3),
        );
        wrong("cos", &good, &kv, &noise((3, 1)), &batch(0..3));
        let cut = good.narrow(0, 0, good.elem_count() - 1).unwrap();
        wrong("pool", &cut, &kv, &angles, &batch(0..3));
        wrong(
            "pool",
            &good.to_dtype(DType::U32).unwrap(),
            &kv,
            &angles,
            &batch(0..3),
        );
        wrong("pool", &good.unsqueeze(0).unwrap(), &kv, &angles, &batch(0..3));
        let error = |tables: &[&[u32]]| of(tables).unwrap_err().to_string();
        assert!(error(&[&[1], &[2], &[1]]).contains("slot 18 twice"));
        assert!(
            error(&[&[u32::MAX]]).contains("below 2³²") && error(&[&[]]).contains("blocks for the 3 tokens")
        );
        op.forward(
            &good,
            &kv.i(0..0).unwrap(),
            &angles.i(0..0).unwrap(),
            &angles.i(0..0).unwrap(),
            &batch(0..0),
        )
        .unwrap();

        let norm = RmsNorm::new(vec![1.0; 16], 1e-6).unwrap();
        let layout = op.layout().clone();
        assert!(AppendLatents::new(norm, Pairing::Halves, layout.clone()).is_err());
        assert!(AppendHeads::new(layout).is_err());
        let heads = AppendHeads::new(RowLayout::heads(CacheFormat::F16, 2, 4, 4).unwrap()).unwrap();
        let (pool, keys) = (pool(heads.layout(), 1), noise((3, 2, 4)));
        let wrong = |keys: &Tensor, values: &Tensor, batch: PagedBatch| {
            heads
                .forward(&pool, keys, values, &batch)
                .unwrap_err()
                .to_string()
        };
        assert!(wrong(&noise((3, 1, 4)), &keys, batch(0..3)).contains("`keys`"));
        assert!(wrong(&keys, &noise((3, 2, 5)), batch(0..3)).contains("`values`"));
        assert!(wrong(&keys, &keys, batch(14..17)).contains("`slots`"));
    }
}
