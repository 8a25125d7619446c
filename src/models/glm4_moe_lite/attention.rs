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

use crate::checkpoint::Loader;
use crate::fp4::Weight;
use crate::models::glm4_moe_lite::Config;
use crate::models::glm4_moe_lite::latent_heads::LatentHeads;
use crate::models::observe::Trace;
use crate::nn::{Angles, MmfP4Linear, RmsNorm};
use crate::ops::{self, JoinedLinear, LatentRows, NormedLinear};
use crate::{Error, Result};
use candle_core::{D, Module, Tensor};

/// The epsilon of the norms inside attention: transformers' default, whatever `rms_norm_eps` says.
const INNER_EPS: f64 = 1e-6;

/// Bytes that expanded keys and values of a layer may take where the way is chosen by cost.
const EXPANDED: usize = 512 << 20;

/// Which way attention is computed; results agree up to rounding.
///
/// Where one is forced, the CPU computes on [uniform](crate::cpu::Executor::uniform) kernels: a sequence gives the same bits
/// whole and in chunks, alone and in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttentionPath {
    /// Whichever costs less: for a prompt that a paged cache knows
    /// ([announced](crate::nn::PagedKvCache::announce)) decided for all of it, and for other tokens pass by pass.
    #[default]
    Auto,
    /// Over the cached latents.
    Absorbed,
    /// Over expanded keys and values.
    Materialised,
}

impl AttentionPath {
    /// Decides [`Auto`](Self::Auto) for `n` new tokens over `total` keys.
    /// Expanded keys and values never take more than 512 MiB in F32: of a long context latents are attended to.
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
        let expanded = heads * (nope + value) * size_of::<f32>();
        if total.saturating_mul(expanded) > EXPANDED {
            return Self::Absorbed;
        }
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

/// What scores are multiplied by.
pub(super) fn scale(config: &Config) -> f32 {
    1.0 / ((config.qk_nope_head_dim + config.qk_rope_head_dim) as f32).sqrt()
}

/// Bytes of a norm's weight.
pub(super) fn norm_bytes(norm: &RmsNorm) -> usize {
    size_of_val(norm.weight())
}

/// One sequence's share of a pass, as attention sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    /// Its rows in the pass's tensors.
    pub start: usize,
    /// New tokens.
    pub n: usize,
    /// The position of the first of them.
    pub position: usize,
    /// The way to compute it.
    pub path: AttentionPath,
}

/// What attention makes of its input before it looks at what is cached.
pub(super) struct Projected {
    /// `[N, H, nope + rope]`, not rotated.
    pub query: Tensor,
    /// `[N, latent + rope]`, neither normalised nor rotated.
    pub kv: Tensor,
}

/// What `q_b_proj`, where there is one, and `kv_b_proj` read.
pub(super) struct LowRankInputs {
    /// `[N, q_lora]`.
    pub query: Option<Tensor>,
    /// `[N, latent]`.
    pub latent: Tensor,
}

#[derive(Debug)]
pub(super) struct Attention {
    /// `q_a_proj` (or, without a low rank, `q_proj`) and `kv_a_proj_with_mqa`, which read the same input.
    input: JoinedLinear,
    /// `q_a_layernorm` and `q_b_proj`.
    low_rank: Option<NormedLinear>,
    pub(super) rows: LatentRows,
    /// `kv_b_proj`.
    pub(super) kv_b: LatentHeads,
    attend: ops::Attention,
    output: MmfP4Linear,
    pub(super) heads: usize,
    pub(super) nope: usize,
    pub(super) rope: usize,
    latent: usize,
    pub(super) value: usize,
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
        let (query, low_rank) = match config.q_lora_rank {
            None => (loader.linear(&name("q_proj"), queries, hidden, false)?, None),
            Some(rank) => {
                let a = loader.linear(&name("q_a_proj"), rank, hidden, bias)?;
                let norm = loader.rms_norm(&name("q_a_layernorm"), rank, INNER_EPS)?;
                let b = loader.linear(&name("q_b_proj"), queries, rank, false)?;
                (a, Some(NormedLinear::new(norm, b.op().clone())?))
            }
        };
        let kv_a = loader.linear(&name("kv_a_proj_with_mqa"), latent + rope, hidden, bias)?;
        Ok(Self {
            input: JoinedLinear::new(vec![query.op().clone(), kv_a.op().clone()])?,
            low_rank,
            rows: LatentRows::new(
                loader.rms_norm(&name("kv_a_layernorm"), latent, INNER_EPS)?,
                config.rope_pairing,
            ),
            kv_b: LatentHeads::load(loader, prefix, config)?,
            attend: ops::Attention::new(heads, scale(config), None)?,
            output: loader.linear(&name("o_proj"), hidden, heads * value, bias)?,
            heads,
            nope,
            rope,
            latent,
            value,
        })
    }

    /// Refuses what a device that runs launch plans has no kernel for: at the first token that would be late.
    pub fn check_kernels(&self, prefix: &str) -> Result<()> {
        let mut weights = self.weights().into_iter();
        if weights.any(|weight| matches!(weight, Weight::Blocks(_))) {
            let problem = "Metal kernels take weights in FP4 or floating point, not in integer blocks: quantise them while \
                           loading (--quantize mmfp4), or compute on the CPU (--device cpu)";
            return Err(Error::tensor(prefix, None, problem));
        }
        Ok(())
    }

    pub fn weights(&self) -> Vec<&Weight> {
        let input = self.input.parts().iter().map(ops::Linear::weight);
        let all = input.chain(self.linears().map(ops::Linear::weight));
        all.chain(self.kv_b.weights()).collect()
    }

    /// Bytes of weights that a pass reads, each once: both ways to attend need all of them.
    pub fn bytes_read(&self) -> usize {
        let input = self.input.parts().iter().map(ops::Linear::size_in_bytes);
        let linears = input.chain(self.linears().map(ops::Linear::size_in_bytes));
        let query_norm = self.low_rank.as_ref().map_or(0, |query| norm_bytes(query.norm()));
        let kv_b = self.kv_b.weights().into_iter().map(Weight::size_in_bytes);
        linears.chain(kv_b).sum::<usize>() + query_norm + norm_bytes(self.rows.norm())
    }

    /// All linear layers but those of the input, and `kv_b_proj`.
    fn linears(&self) -> impl Iterator<Item = &ops::Linear> {
        let query = self.low_rank.iter().map(NormedLinear::linear);
        query.chain([self.output.op()])
    }

    /// `x` is `[N, hidden]`, the tokens of all segments; `cached` takes a segment's index and new rows
    /// `[n, latent + rope]` and gives all of the sequence's rows `[T, latent + rope]`.
    pub fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        segments: &[Segment],
        mut cached: impl FnMut(usize, &Tensor) -> Result<Tensor>,
        trace: &mut Trace<'_, '_>,
    ) -> Result<Tensor> {
        let Projected { query, kv } = self.project(x, trace)?;
        let query_nope = query.narrow(D::Minus1, 0, self.nope)?;
        let query_rope = query.narrow(D::Minus1, self.nope, self.rope)?;
        let (rows, query_rope) =
            self.rows
                .forward_with_queries(&kv, &query_rope, angles.cos(), angles.sin())?;
        trace.see(
            "kv_a_layernorm",
            &kv.narrow(1, 0, self.latent)?,
            rows.narrow(1, 0, self.latent)?,
        )?;

        let mut outputs = Vec::with_capacity(segments.len());
        for (index, segment) in segments.iter().enumerate() {
            let all = cached(index, &rows.narrow(0, segment.start, segment.n)?)?;
            let nope = query_nope.narrow(0, segment.start, segment.n)?;
            let rope = query_rope.narrow(0, segment.start, segment.n)?;
            outputs.push(match segment.path {
                AttentionPath::Materialised => self.materialised(&nope, &rope, &all, segment.position)?,
                AttentionPath::Auto | AttentionPath::Absorbed => {
                    self.absorbed(&nope, &rope, &all, segment.position)?
                }
            });
        }
        self.project_out(&query, Tensor::cat(&outputs, 0)?, trace)
    }

    /// From `[N, hidden]` to queries, and to what is cached of the tokens, before its norm and rotation.
    pub(super) fn project(&self, x: &Tensor, trace: &mut Trace<'_, '_>) -> Result<Projected> {
        let both = self.input.forward(x)?;
        let kv_width = self.latent + self.rope;
        let query_width = both.dim(1)? - kv_width;
        let query = both.narrow(1, 0, query_width)?;
        let query = match &self.low_rank {
            None => trace.see("q_proj", x, query)?,
            Some(normed) => {
                let low = trace.see("q_a_proj", x, query)?;
                if normed.is_fused(&low) {
                    // What is observed is what runs: the norm is a part of the product.
                    trace.see("q_b_proj", &low, normed.forward(&low)?)?
                } else {
                    let low = trace.see("q_a_layernorm", &low, normed.norm().forward(&low)?)?;
                    trace.see("q_b_proj", &low, normed.linear().forward(&low)?)?
                }
            }
        };
        let kv = trace.see("kv_a_proj_with_mqa", x, both.narrow(1, query_width, kv_width)?)?;
        Ok(Projected {
            query: query.reshape((x.dim(0)?, self.heads, self.nope + self.rope))?,
            kv,
        })
    }

    /// What the second linear layers of queries, and of keys and values, read of inputs `[N, hidden]`.
    pub fn low_rank_inputs(&self, x: &Tensor) -> Result<LowRankInputs> {
        let both = self.input.forward(x)?;
        let query_width = both.dim(1)? - self.latent - self.rope;
        let query = |normed: &NormedLinear| normed.norm().forward(&both.narrow(1, 0, query_width)?);
        Ok(LowRankInputs {
            query: self.low_rank.as_ref().map(query).transpose()?,
            latent: self
                .rows
                .norm()
                .forward(&both.narrow(1, query_width, self.latent)?)?,
        })
    }

    /// From the heads' values `[N, H · value]` to `[N, hidden]`.
    pub(super) fn project_out(
        &self,
        query: &Tensor,
        attended: Tensor,
        trace: &mut Trace<'_, '_>,
    ) -> Result<Tensor> {
        let attended = trace.see("attention", query, attended)?;
        trace.see("o_proj", &attended, self.output.forward(&attended)?)
    }

    /// Attends over the latents: queries `[n, H, nope]`, rotary parts `[n, H, rope]` and cached rows
    /// `[T, latent + rope]` to `[n, H · value]`.
    fn absorbed(&self, nope: &Tensor, rope: &Tensor, all: &Tensor, position: usize) -> Result<Tensor> {
        let query = self.kv_b.absorb_query.forward(nope)?;
        let latents = all.narrow(1, 0, self.latent)?;
        let mixed = self.attend.forward(&[&query, rope], &[all], &latents, position)?;
        let values = self.kv_b.expand_value.forward(&mixed)?;
        Ok(values.reshape((nope.dim(0)?, self.heads * self.value))?)
    }

    /// Attends over expanded keys and values; shapes as in [`absorbed`](Self::absorbed).
    pub(super) fn materialised(
        &self,
        nope: &Tensor,
        rope: &Tensor,
        all: &Tensor,
        position: usize,
    ) -> Result<Tensor> {
        let (keys, values) = self.kv_b.expand(&all.narrow(1, 0, self.latent)?)?;
        let key_rope = all.narrow(1, self.latent, self.rope)?;
        let mixed = self
            .attend
            .forward(&[nope, rope], &[&keys, &key_rope], &values, position)?;
        Ok(mixed.reshape((nope.dim(0)?, self.heads * self.value))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, LoadOptions, ModelFiles};
    use crate::models::glm4_moe_lite::config::tests_support::flash;

    #[test]
    fn integers_are_refused_where_kernels_run() {
        for (name, refused) in [("mxfp4", false), ("q4_k_m", true)] {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gguf");
            let files = ModelFiles::folder(format!("{folder}/{name}.gguf"));
            let config = Config::from_files(&files).unwrap();
            let checkpoint = Checkpoint::from_files(&files).unwrap();
            let options = LoadOptions::default();
            let loader = Loader::new(&checkpoint, &options, config.layers.len()).unwrap();
            let attention = Attention::load(&loader, "model.layers.0.self_attn", &config).unwrap();
            let checked = attention.check_kernels("model.layers.0.self_attn");
            assert_eq!(checked.is_err(), refused, "{name}");
        }
    }

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
        assert_eq!(auto(300, 14_000), AttentionPath::Absorbed);
        assert_eq!(auto(500, 14_000), AttentionPath::Materialised);
        // Expanded, that would be 4.7 GB in a layer.
        assert_eq!(auto(500, 1 << 17), AttentionPath::Absorbed);
        assert_eq!(
            AttentionPath::Absorbed.decide(&config, 512, 512),
            AttentionPath::Absorbed
        );
    }
}
