//! Latents and rotary keys of new tokens.

use super::super::PagedBatch;
use super::{check_pool, check_rows, floats, of_cpu, on_cpu, prepared, prepared_heads, row_stride};
use crate::cpu::{self, NewLatents, Pairing};
use crate::kv::{RowKind, RowLayout};
use crate::metal::append as metal;
use crate::metal::norm_rope::LatentRows;
use crate::ops::activations::to_f32;
use crate::ops::norm::RmsNorm;
use crate::ops::planned::{self, Planned};
use crate::ops::rope;
use crate::ops::rows::{heads, rows};
use crate::{Error, Result};
use candle_core::{DType, Shape, Tensor};

const LATENTS: &str = "mmfp4-append-latents";

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
        let (of_kv, kv_lie) = kv.storage_and_layout();
        let (of_cos, cos_lie) = cos.storage_and_layout();
        let (of_sin, sin_lie) = sin.storage_and_layout();
        let cos = to_f32(LATENTS, "cos", of_cpu(LATENTS, "cos", &of_cos)?, cos_lie)?;
        let sin = to_f32(LATENTS, "sin", of_cpu(LATENTS, "sin", &of_sin)?, sin_lie)?;
        let new = NewLatents {
            rows: floats(LATENTS, "kv", of_cpu(LATENTS, "kv", &of_kv)?, kv_lie)?,
            stride: row_stride(LATENTS, "kv", kv_lie)?,
            weight: self.norm.weight(),
            eps: self.norm.eps(),
            pairing: self.pairing,
            cos: &cos,
            sin: &sin,
        };
        on_cpu(LATENTS, pool, |executor, pool| {
            cpu::append_latents(executor, &self.layout, new, slots, pool);
        })
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
                for rows in [&mut angles.cos, &mut angles.sin] {
                    (rows.operand, rows.offset) = (0, 0);
                }
            }
            let queries = queries
                .map(|queries| heads(LATENTS, "queries", queries.layout(), dtype, 5))
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
