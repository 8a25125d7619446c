//! What MLA keeps of a token: its latent, normalised, and its rotary key, turned.

use super::norm::RmsNorm;
use super::planned::{self, Planned};
use super::rope::{self, Rope};
use super::rows::{heads, prepared_heads, rows};
use crate::cpu::Pairing;
use crate::metal::norm_rope;
use crate::{Error, Result};
use candle_core::{Shape, Tensor};

const OP: &str = "mmfp4-latent-rows";

/// From rows of latents and rotary keys those that a cache keeps: the latent after its norm, the key after its rotation;
/// in one dispatch where kernels run, with the rotation of the queries.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_mmfp4::nn::{Pairing, RmsNorm};
/// use candle_mmfp4::ops::LatentRows;
///
/// // A latent of two elements and a key of one pair, which a quarter of a turn takes from (1, 0) to (0, 1).
/// let op = LatentRows::new(RmsNorm::new(vec![1., 1.], 0.0)?, Pairing::Interleaved);
/// let kv = Tensor::new(&[[5f32, 5., 1., 0.]], &Device::Cpu)?;
/// let (cos, sin) = (Tensor::new(&[[0f32]], &Device::Cpu)?, Tensor::new(&[[1f32]], &Device::Cpu)?);
/// assert_eq!(op.forward(&kv, &cos, &sin)?.to_vec2::<f32>()?, [[1., 1., 0., 1.]]);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LatentRows {
    norm: RmsNorm,
    rope: Rope,
}

impl LatentRows {
    /// An op with this norm, as long as a latent, and pairs.
    pub const fn new(norm: RmsNorm, pairing: Pairing) -> Self {
        Self {
            norm,
            rope: Rope::new(pairing),
        }
    }

    /// The norm of the latents.
    pub fn norm(&self) -> &RmsNorm {
        &self.norm
    }

    /// Rows `[tokens, latent + d]` of `kv`, which is the same in F32, F16 or BF16, by cosines and sines
    /// `[tokens, d/2]`.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, kv: &Tensor, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
        self.check(kv, cos, sin)?;
        let kv = planned::prepared(kv, 1)?;
        let (cos, sin) = (planned::prepared(cos, 1)?, planned::prepared(sin, 1)?);
        let plan = || {
            self.planned(&kv, &cos, &sin, None)
                .map(|plan| plan.map(rows_only))
        };
        if let Some([rows]) = planned::over(OP, &[&kv, &cos, &sin], plan)? {
            return Ok(rows);
        }
        self.in_steps(&kv, &cos, &sin)
    }

    /// The same, and the rotary parts of queries `[tokens, heads, d]`, of kv's dtype, turned.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward_with_queries(
        &self,
        kv: &Tensor,
        queries: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let pairs = self.check(kv, cos, sin)?;
        let expected = |found: String| {
            let expected = format!("[{}, heads, {}] in {:?}", kv.dims()[0], 2 * pairs, kv.dtype());
            Error::argument(OP, "queries", expected, found)
        };
        if !matches!(queries.dims(), [tokens, _, d] if *tokens == kv.dims()[0] && *d == 2 * pairs)
            || queries.dtype() != kv.dtype()
        {
            return Err(expected(format!("shape {:?} in {:?}", queries.dims(), queries.dtype())).into());
        }
        let (kv, queries) = (planned::prepared(kv, 1)?, prepared_heads(queries)?);
        let (cos, sin) = (planned::prepared(cos, 1)?, planned::prepared(sin, 1)?);
        let plan = || self.planned(&kv, &cos, &sin, Some(&queries));
        if let Some([rows, turned]) = planned::over(OP, &[&kv, &cos, &sin, &queries], plan)? {
            return Ok((rows, turned));
        }
        let turned = self.rope.forward(&queries, &cos, &sin)?;
        Ok((self.in_steps(&kv, &cos, &sin)?, turned))
    }

    /// Checks everything but the queries; gives the pairs of a key.
    fn check(&self, kv: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<usize> {
        let latent = self.norm.weight().len();
        let pairs = match cos.dims() {
            [_, pairs] if *pairs > 0 => *pairs,
            dims => {
                let found = format!("shape {dims:?}");
                return Err(Error::argument(OP, "cos", "[tokens, d/2]", found));
            }
        };
        let &[tokens, width] = kv.dims() else {
            let found = format!("shape {:?}", kv.dims());
            return Err(Error::argument(OP, "kv", "[tokens, latent + d]", found));
        };
        if width != latent + 2 * pairs {
            let expected = format!("[tokens, {latent} + {}]", 2 * pairs);
            return Err(Error::argument(OP, "kv", expected, format!("{:?}", kv.dims())));
        }
        rope::check_angles(OP, [tokens, pairs], cos.layout(), sin.layout())?;
        Ok(pairs)
    }

    /// As several ops.
    fn in_steps(&self, kv: &Tensor, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
        let (latent, width) = (self.norm.weight().len(), kv.dims()[1]);
        let normed = self.norm.forward(&kv.narrow(1, 0, latent)?)?;
        let key = kv.narrow(1, latent, width - latent)?.unsqueeze(1)?;
        let key = self.rope.forward(&key, cos, sin)?.squeeze(1)?;
        Tensor::cat(&[&normed, &key], 1)
    }

    /// What a device runs; `None` for angles that are not in F32. The second output is empty without queries.
    fn planned(
        &self,
        kv: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        queries: Option<&Tensor>,
    ) -> Result<Option<Planned<'_, 2>>> {
        let (dtype, &[tokens, width]) = (kv.dtype(), kv.dims()) else {
            return Ok(None);
        };
        let latent = self.norm.weight().len();
        let (cos, sin) = ((cos.layout(), cos.dtype()), (sin.layout(), sin.dtype()));
        let Some(angles) = rope::angles(OP, self.rope.pairing(), (width - latent) / 2, cos, sin, 2)? else {
            return Ok(None);
        };
        let first = if queries.is_some() { 5 } else { 4 };
        let queries_lie = queries
            .map(|queries| heads(OP, "queries", queries.layout(), dtype, 4))
            .transpose()?;
        let launches = match tokens {
            0 => Vec::new(),
            _ => {
                let op = norm_rope::LatentRows {
                    dtype,
                    tokens,
                    latent,
                    eps: self.norm.eps(),
                    kv: rows(OP, "kv", kv.layout(), dtype, 1)?,
                    weight: 0,
                    angles,
                    rows: first,
                    queries: queries_lie.map(|queries| (queries, first + 1)),
                };
                vec![op.launch()?]
            }
        };
        let turned = queries.map_or(Shape::from(0), |queries| queries.shape().clone());
        Ok(Some(Planned {
            launches,
            bytes: vec![self.norm.bytes()],
            outputs: [(kv.shape().clone(), dtype), (turned, dtype)],
            scratch: Vec::new(),
        }))
    }
}

/// A plan without its second output.
fn rows_only(planned: Planned<'_, 2>) -> Planned<'_, 1> {
    let [rows, _] = planned.outputs;
    Planned {
        launches: planned.launches,
        bytes: planned.bytes,
        outputs: [rows],
        scratch: planned.scratch,
    }
}
