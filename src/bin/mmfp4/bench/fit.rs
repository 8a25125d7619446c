//! Whether a test fits in memory: better refused with the numbers than ended by the system, or measured while it swaps.

use super::test::Test;
use candle_mmfp4::checkpoint::LoadOptions;
use candle_mmfp4::generation::Options;
use candle_mmfp4::models::glm4_moe_lite::Config;
use candle_mmfp4::nn::CacheSize;

/// Bytes of a number in activations and in a contiguous cache.
const FLOAT: u64 = 4;

/// What a test takes.
#[derive(Debug, PartialEq, Eq)]
pub struct Needs {
    weights: u64,
    cache: u64,
    activations: u64,
}

impl Needs {
    /// With a cache of this size. `stored` is the bytes of the checkpoint's tensors; those of weights quantised or rounded
    /// while loading come on top.
    ///
    /// # Errors
    /// Those of a cache whose format does not take the model's widths.
    pub fn of(
        config: &Config,
        stored: u64,
        load: &LoadOptions,
        test: &Test,
        cache: CacheSize,
    ) -> candle_mmfp4::Result<Self> {
        let total = test.longest() as u64;
        let pass = test.longest().min(Options::default().prefill_chunk) as u64;
        let of = |size: usize| size as u64;
        let heads = of(config.num_attention_heads);
        let head = of(config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim);
        // Keys and values, as expanded and as laid out for the product; scores exist a block at a time.
        let attention = total.saturating_mul(2 * heads * head);
        let width = of(config.intermediate_size)
            .max(of(config.moe_intermediate_size) * of(config.num_experts_per_tok + config.n_shared_experts));
        let layer = pass * (3 * width + of(config.num_experts_per_tok + 8) * of(config.hidden_size));
        // E2M1 with a scale for 16 elements, the largest of the formats, in place of 16 bits.
        let quantized = if load.quantize.is_some() {
            stored / 16 * 9 / 2
        } else {
            0
        };
        // Blocks of 128 bytes and a scale.
        let head = of(config.vocab_size) * of(config.hidden_size).div_ceil(128) * (128 + FLOAT);
        let head = if load.int8_head { head } else { 0 };
        let (latent, rope) = (config.kv_lora_rank, config.qk_rope_head_dim);
        let row = of(config.layers.len()) * of(test.cache.latent_bytes(latent, rope, FLOAT as usize)?);
        Ok(Self {
            weights: stored.saturating_add(quantized).saturating_add(head),
            cache: match cache {
                CacheSize::Bytes(bytes) => bytes,
                CacheSize::Tokens(tokens) => row.saturating_mul(of(tokens)),
            },
            activations: attention
                .saturating_add(layer)
                .saturating_add(of(config.vocab_size))
                .saturating_mul(FLOAT),
        })
    }

    /// Refuses a test that takes more than is `available`.
    pub fn check(&self, test: &Test, available: Option<u64>) -> anyhow::Result<()> {
        let needed = self
            .weights
            .saturating_add(self.cache)
            .saturating_add(self.activations);
        match available {
            Some(available) if available < needed => anyhow::bail!(
                "{test} does not fit in memory: it takes {needed} bytes ({} of weights, {} of cache, about {} of \
                 activations), {available} are available; choose fewer tokens or a smaller model, or end other programs",
                self.weights,
                self.cache,
                self.activations
            ),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::test::Kind;
    use candle_mmfp4::checkpoint::Synthetic;
    use candle_mmfp4::fp4::Format;

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let full: Synthetic = "glm-4.7-flash".parse().unwrap();
        let stored = full.size_in_bytes();
        let test = |kind, tokens, depth, cache: &str| Test {
            kind,
            tokens,
            depths: vec![depth],
            cache: cache.parse().unwrap(),
        };
        let as_it_is = LoadOptions::default();
        let of = |options: &LoadOptions, test: &Test, size| {
            Needs::of(full.config(), stored, options, test, size).unwrap()
        };
        let needs = |test: &Test| of(&as_it_is, test, CacheSize::Tokens(test.room()));
        let decode = test(Kind::Decode, 24, 1000, "contiguous");
        let Needs {
            cache, activations, ..
        } = needs(&decode);
        // 106 KiB a token, as docs/troubleshooting.md says.
        assert_eq!(cache, 1024 * 47 * 576 * 4);
        let paged = test(Kind::Decode, 24, 1000, "fp4");
        assert_eq!(needs(&paged).cache, (1024 + 24 + 48) * 47 * 416);
        assert_eq!(of(&as_it_is, &paged, CacheSize::Bytes(7)).cache, 7);
        assert!((16 << 20..1 << 30).contains(&activations), "{activations}");
        assert!(
            needs(&decode)
                .check(&decode, Some(stored + cache + activations))
                .is_ok()
        );
        assert!(needs(&decode).check(&decode, None).is_ok());
        let error = needs(&decode)
            .check(&decode, Some(8_000_000_000))
            .unwrap_err()
            .to_string();
        for part in [
            "tg 24 at depth 1000",
            &stored.to_string(),
            &cache.to_string(),
            "8000000000 are available",
        ] {
            assert!(error.contains(part), "{error}");
        }
        let quantizing = LoadOptions {
            quantize: Some(Format::mmfp4()),
            ..LoadOptions::default()
        };
        let rounding = LoadOptions {
            int8_head: true,
            ..LoadOptions::default()
        };
        for options in [quantizing, rounding] {
            let more = of(&options, &decode, CacheSize::Tokens(decode.room()));
            assert!(more.check(&decode, Some(stored + cache + activations)).is_err());
        }
        // Beyond any machine, and no overflow.
        let absurd = test(Kind::Prompt, usize::MAX, usize::MAX, "fp8");
        assert!(needs(&absurd).check(&absurd, Some(1 << 50)).is_err());
    }
}
