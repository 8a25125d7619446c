//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
//!
//! A token's keys and values of all heads come from one latent `c` of `kv_lora_rank` numbers by `kv_b`; only
//! `c`, after its norm, and one rotary key for all heads, after its rotation, are cached. From there two ways
//! lead to the same output, and [`AttentionPath::Auto`] takes the one with less arithmetic:
//!
//! - *materialised*: expand `c` of all T cached tokens to keys and values, `W·T` operations, then attend with
//!   `2·H·n·T·(nope + rope + v)`;
//! - *absorbed*: carry the n new queries into latent space and the results out of it, `W·n`, and attend there
//!   with `2·H·n·T·(2·kv_lora + rope)`;
//!
//! where `W = 2·H·(nope + v)·kv_lora`.

use crate::Result;
use crate::checkpoint::Loader;
use crate::cpu::HeadRows;
use crate::fp4::Weight;
use crate::models::glm4_moe_lite::Config;
use crate::models::observe::Trace;
use crate::nn::{Angles, MmfP4Linear, RotaryEmbedding};
use crate::ops::{Orientation, PerHead};
use candle_core::{D, Module, Tensor};
use candle_nn::RmsNorm;

/// The epsilon of the norms inside attention: transformers' default, whatever `rms_norm_eps` says.
const INNER_EPS: f64 = 1e-6;

/// Which way attention is computed; results agree up to rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttentionPath {
    /// Whichever costs less.
    #[default]
    Auto,
    /// Over the cached latents.
    Absorbed,
    /// Over expanded keys and values.
    Materialised,
}

impl AttentionPath {
    /// Decides [`Auto`](Self::Auto) for `n` new tokens over `total` keys.
    pub fn decide(self, config: &Config, n: usize, total: usize) -> Self {
        if self != Self::Auto {
            return self;
        }
        let (heads, latent) = (config.num_attention_heads, config.kv_lora_rank);
        let (nope, rope, value) = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        );
        let expand = 2 * heads * (nope + value) * latent;
        let attend = 2 * heads * n * total;
        let absorbed = expand * n + attend * (2 * latent + rope);
        let materialised = expand * total + attend * (nope + rope + value);
        if absorbed <= materialised {
            Self::Absorbed
        } else {
            Self::Materialised
        }
    }
}

/// Bytes of a norm's weight.
pub(super) fn norm_bytes(norm: &RmsNorm) -> usize {
    norm.weight().elem_count() * norm.weight().dtype().size_in_bytes()
}

/// One sequence's share of a pass, as attention sees it.
pub(super) struct Segment<'a> {
    /// Its rows in the pass's tensors.
    pub start: usize,
    /// New tokens.
    pub n: usize,
    /// What hides later tokens from earlier ones, `[n, T]`; none for a single new token, which sees all.
    pub mask: Option<&'a Tensor>,
    /// The way to compute it.
    pub path: AttentionPath,
}

#[derive(Debug)]
enum Query {
    Direct(MmfP4Linear),
    LowRank {
        a: MmfP4Linear,
        norm: RmsNorm,
        b: MmfP4Linear,
    },
}

#[derive(Debug)]
pub(super) struct Attention {
    query: Query,
    kv_a: MmfP4Linear,
    kv_norm: RmsNorm,
    kv_b: MmfP4Linear,
    absorb_query: PerHead,
    expand_value: PerHead,
    output: MmfP4Linear,
    heads: usize,
    nope: usize,
    rope: usize,
    latent: usize,
    value: usize,
}

impl Attention {
    pub fn load(loader: &Loader<'_>, prefix: &str, config: &Config) -> Result<Self> {
        let Config {
            hidden_size: hidden,
            num_attention_heads: heads,
            kv_lora_rank: latent,
            ..
        } = *config;
        let (nope, rope, value) = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        );
        let (bias, name) = (config.attention_bias, |part: &str| format!("{prefix}.{part}"));
        let queries = heads * (nope + rope);
        let query = match config.q_lora_rank {
            None => Query::Direct(loader.linear(&name("q_proj"), queries, hidden, false)?),
            Some(rank) => Query::LowRank {
                a: loader.linear(&name("q_a_proj"), rank, hidden, bias)?,
                norm: loader.rms_norm(&name("q_a_layernorm"), rank, INNER_EPS)?,
                b: loader.linear(&name("q_b_proj"), queries, rank, false)?,
            },
        };
        let kv_b = loader.linear(&name("kv_b_proj"), heads * (nope + value), latent, false)?;
        // A head's rows of kv_b: first those of its keys, then those of its values.
        let keys = HeadRows {
            heads,
            stride: nope + value,
            start: 0,
            len: nope,
        };
        let values = HeadRows {
            start: nope,
            len: value,
            ..keys
        };
        Ok(Self {
            query,
            kv_a: loader.linear(&name("kv_a_proj_with_mqa"), latent + rope, hidden, bias)?,
            kv_norm: loader.rms_norm(&name("kv_a_layernorm"), latent, INNER_EPS)?,
            absorb_query: PerHead::new(kv_b.weight().clone(), keys, Orientation::Transposed)?,
            expand_value: PerHead::new(kv_b.weight().clone(), values, Orientation::Ordinary)?,
            kv_b,
            output: loader.linear(&name("o_proj"), hidden, heads * value, bias)?,
            heads,
            nope,
            rope,
            latent,
            value,
        })
    }

    pub fn weights(&self) -> Vec<&Weight> {
        let query = match &self.query {
            Query::Direct(projection) => vec![projection],
            Query::LowRank { a, b, .. } => vec![a, b],
        };
        let others = [&self.kv_a, &self.kv_b, &self.output];
        query.into_iter().chain(others).map(MmfP4Linear::weight).collect()
    }

    /// Bytes of weights that a pass reads, each once: both ways to attend need all of them.
    pub fn bytes_read(&self) -> usize {
        let query = match &self.query {
            Query::Direct(projection) => projection.size_in_bytes(),
            Query::LowRank { a, norm, b } => a.size_in_bytes() + norm_bytes(norm) + b.size_in_bytes(),
        };
        let linear = [&self.kv_a, &self.kv_b, &self.output].map(MmfP4Linear::size_in_bytes);
        query + linear.iter().sum::<usize>() + norm_bytes(&self.kv_norm)
    }

    /// `x` is `[N, hidden]`, the tokens of all segments; `cached` takes a segment's index and new rows
    /// `[n, latent + rope]` and gives all of the sequence's rows `[T, latent + rope]`.
    pub fn forward(
        &self,
        x: &Tensor,
        rotary: &RotaryEmbedding,
        angles: &Angles,
        segments: &[Segment<'_>],
        mut cached: impl FnMut(usize, &Tensor) -> Result<Tensor>,
        trace: &mut Trace<'_, '_>,
    ) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let query = match &self.query {
            Query::Direct(projection) => trace.see("q_proj", x, projection.forward(x)?)?,
            Query::LowRank { a, norm, b } => {
                let low = trace.see("q_a_proj", x, a.forward(x)?)?;
                let low = trace.see("q_a_layernorm", &low, norm.forward(&low)?)?;
                trace.see("q_b_proj", &low, b.forward(&low)?)?
            }
        };
        let query = query.reshape((tokens, self.heads, self.nope + self.rope))?;
        let query_nope = query.narrow(D::Minus1, 0, self.nope)?;
        let query_rope = rotary.forward(&query.narrow(D::Minus1, self.nope, self.rope)?, angles)?;

        let kv = trace.see("kv_a_proj_with_mqa", x, self.kv_a.forward(x)?)?;
        let latent = kv.narrow(1, 0, self.latent)?.contiguous()?;
        let latent = trace.see("kv_a_layernorm", &latent, self.kv_norm.forward(&latent)?)?;
        let key_rope = kv.narrow(1, self.latent, self.rope)?.unsqueeze(1)?;
        let key_rope = rotary.forward(&key_rope, angles)?.squeeze(1)?;
        let rows = Tensor::cat(&[&latent, &key_rope], 1)?;

        let mut outputs = Vec::with_capacity(segments.len());
        for (index, segment) in segments.iter().enumerate() {
            let all = cached(index, &rows.narrow(0, segment.start, segment.n)?)?;
            let nope = query_nope.narrow(0, segment.start, segment.n)?;
            let rope = query_rope.narrow(0, segment.start, segment.n)?;
            outputs.push(match segment.path {
                AttentionPath::Materialised => self.materialised(&nope, &rope, &all, segment.mask)?,
                AttentionPath::Auto | AttentionPath::Absorbed => {
                    self.absorbed(&nope, &rope, &all, segment.mask)?
                }
            });
        }
        let attended = Tensor::cat(&outputs, 0)?;
        let attended = trace.see("attention", &query, attended)?;
        trace.see("o_proj", &attended, self.output.forward(&attended)?)
    }

    /// Attends over the latents: `[n, H, nope]`, `[n, H, rope]` and `[T, latent + rope]` to `[n, H · value]`.
    fn absorbed(
        &self,
        nope: &Tensor,
        rope: &Tensor,
        all: &Tensor,
        mask: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let n = nope.dim(0)?;
        let query = Tensor::cat(&[&self.absorb_query.forward(nope)?, rope], 2)?;
        let query = query.reshape((n * self.heads, self.latent + self.rope))?;
        let scores = query.matmul(&all.t()?)?.reshape((n, self.heads, ()))?;
        let mask = mask.map(|mask| mask.unsqueeze(1)).transpose()?;
        let weights = self.softmax(scores, mask)?.reshape((n * self.heads, ()))?;
        let mixed = weights.matmul(&all.narrow(1, 0, self.latent)?.contiguous()?)?;
        let mixed = mixed.reshape((n, self.heads, self.latent))?;
        self.expand_value
            .forward(&mixed)?
            .reshape((n, self.heads * self.value))
    }

    /// Attends over expanded keys and values; shapes as in [`absorbed`](Self::absorbed).
    fn materialised(
        &self,
        nope: &Tensor,
        rope: &Tensor,
        all: &Tensor,
        mask: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let (n, total) = (nope.dim(0)?, all.dim(0)?);
        let expanded = self.kv_b.forward(&all.narrow(1, 0, self.latent)?)?;
        let expanded = expanded
            .reshape((total, self.heads, self.nope + self.value))?
            .transpose(0, 1)?;
        let keys = expanded.narrow(2, 0, self.nope)?.contiguous()?;
        let values = expanded.narrow(2, self.nope, self.value)?.contiguous()?;
        let by_head = |x: &Tensor| x.transpose(0, 1)?.contiguous();
        let rope = by_head(rope)?.reshape((self.heads * n, self.rope))?;
        let rope_scores = rope.matmul(&all.narrow(1, self.latent, self.rope)?.contiguous()?.t()?)?;
        let scores = by_head(nope)?.matmul(&keys.t()?)? + rope_scores.reshape((self.heads, n, total))?;
        let weights = self.softmax(scores?, mask.cloned())?;
        weights
            .matmul(&values)?
            .transpose(0, 1)?
            .reshape((n, self.heads * self.value))
    }

    fn softmax(&self, scores: Tensor, mask: Option<Tensor>) -> candle_core::Result<Tensor> {
        let scores = (scores * (1.0 / ((self.nope + self.rope) as f64).sqrt()))?;
        let scores = match mask {
            Some(mask) => scores.broadcast_add(&mask)?,
            None => scores,
        };
        candle_nn::ops::softmax_last_dim(&scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::glm4_moe_lite::config::tests_support::flash;

    #[test]
    fn decode_absorbs_and_long_prefill_materialises() {
        let config = flash();
        let auto = |n, total| AttentionPath::Auto.decide(&config, n, total);
        assert_eq!(auto(1, 8192), AttentionPath::Absorbed);
        assert_eq!(auto(1, 2), AttentionPath::Absorbed);
        // A lone token is expanded either way, and then the shorter dot products win.
        assert_eq!(auto(1, 1), AttentionPath::Materialised);
        assert_eq!(auto(8, 8192), AttentionPath::Absorbed);
        assert_eq!(auto(512, 512), AttentionPath::Materialised);
        // With a long prefix the two meet near n = 400.
        assert_eq!(auto(300, 1 << 17), AttentionPath::Absorbed);
        assert_eq!(auto(500, 1 << 17), AttentionPath::Materialised);
        assert_eq!(
            AttentionPath::Absorbed.decide(&config, 512, 512),
            AttentionPath::Absorbed
        );
    }
}
