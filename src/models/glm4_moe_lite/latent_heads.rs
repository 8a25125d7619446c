//! The matrices between a latent and the keys and values of all heads.

use super::config::Config;
use crate::Result;
use crate::checkpoint::Loader;
use crate::cpu::HeadRows;
use crate::fp4::Weight;
use crate::nn::MmfP4Linear;
use crate::ops::{Orientation, PerHead};
use candle_core::{Module, Tensor};

/// `kv_b_proj`, or its two halves as MLX and llama.cpp store them: a head's keys transposed (`embed_q`, `[H, latent, nope]`),
/// its values as they are (`unembed_out`, `[H, value, latent]`). Each is used in its own orientation, never requantised.
#[derive(Debug)]
pub(super) struct LatentHeads {
    /// Queries `[n, H, nope]` into latent space, `[n, H, latent]`.
    pub absorb_query: PerHead,
    /// Latents `[n, H, latent]` out of it, `[n, H, value]`.
    pub expand_value: PerHead,
    expand: Expand,
    heads: usize,
    nope: usize,
    value: usize,
}

/// What expands latents to keys.
#[derive(Debug)]
enum Expand {
    /// Keys and values of all heads at once.
    Joint(MmfP4Linear),
    /// Keys, a head at a time; `expand_value` gives the values.
    Split(PerHead),
}

impl LatentHeads {
    pub fn load(loader: &Loader<'_>, prefix: &str, config: &Config) -> Result<Self> {
        let (heads, latent) = (config.num_attention_heads, config.kv_lora_rank);
        let (nope, value) = (config.qk_nope_head_dim, config.v_head_dim);
        let name = |part: &str| format!("{prefix}.{part}");
        let per_head = |weight: &Weight, rows, orientation| {
            PerHead::new(weight.clone(), rows, orientation).map(|op| op.with_arithmetic(loader.arithmetic()))
        };
        let rows = |stride, start, len| HeadRows {
            heads,
            stride,
            start,
            len,
        };
        let (absorb_query, expand_value, expand) = if loader.has_module(&name("embed_q")) {
            let keys = loader.stack(&name("embed_q"), heads, latent, nope)?;
            let values = loader.stack(&name("unembed_out"), heads, value, latent)?;
            let of_keys = rows(latent, 0, latent);
            (
                per_head(&keys, of_keys, Orientation::Ordinary)?,
                per_head(&values, rows(value, 0, value), Orientation::Ordinary)?,
                Expand::Split(per_head(&keys, of_keys, Orientation::Transposed)?),
            )
        } else {
            let kv_b = loader.linear(&name("kv_b_proj"), heads * (nope + value), latent, false)?;
            // A head's rows: first those of its keys, then those of its values.
            let (keys, values) = (rows(nope + value, 0, nope), rows(nope + value, nope, value));
            (
                per_head(kv_b.weight(), keys, Orientation::Transposed)?,
                per_head(kv_b.weight(), values, Orientation::Ordinary)?,
                Expand::Joint(kv_b),
            )
        };
        Ok(Self {
            absorb_query,
            expand_value,
            expand,
            heads,
            nope,
            value,
        })
    }

    /// From latents `[T, latent]` to keys `[T, H, nope]` and values `[T, H, value]`.
    pub fn expand(&self, latents: &Tensor) -> Result<(Tensor, Tensor)> {
        let tokens = latents.dim(0)?;
        match &self.expand {
            Expand::Joint(kv_b) => {
                let both = kv_b.forward(latents)?;
                let both = both.reshape((tokens, self.heads, self.nope + self.value))?;
                Ok((
                    both.narrow(2, 0, self.nope)?,
                    both.narrow(2, self.nope, self.value)?,
                ))
            }
            Expand::Split(keys) => {
                let of_heads = latents.unsqueeze(1)?;
                let of_heads = of_heads.broadcast_as((tokens, self.heads, latents.dim(1)?))?;
                Ok((keys.forward(&of_heads)?, self.expand_value.forward(&of_heads)?))
            }
        }
    }

    /// What either way of attending reads, each once.
    pub fn weights(&self) -> Vec<&Weight> {
        match &self.expand {
            Expand::Joint(kv_b) => vec![kv_b.weight()],
            Expand::Split(keys) => vec![keys.weight(), self.expand_value.weight()],
        }
    }
}
