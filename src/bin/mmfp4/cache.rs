//! Which cache, and how large.

use crate::output::Usage;
use candle_mmfp4::checkpoint::LoadOptions;
use candle_mmfp4::kv::CacheKind;
use candle_mmfp4::nn::CacheSize;
use clap::Args;

#[derive(Args)]
#[command(next_help_heading = "Cache of keys and values")]
pub struct Arguments {
    /// What it stores: f16, bf16, fp8 or fp4 (fp4-16, fp4-16-rotated, fp4-32, fp4-32-rotated), in blocks that sequences share,
    /// or contiguous, a reference in the activations' dtype.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    kv_cache: CacheKind,
    #[command(flatten)]
    memory: Memory,
    /// The same in tokens: 54 KB each for GLM-4.7-Flash in bf16, 20 KB in fp4.
    #[arg(long, value_name = "TOKENS", conflicts_with = "kv_memory")]
    context: Option<usize>,
}

#[derive(Args)]
#[command(next_help_heading = "Cache of keys and values")]
pub struct Memory {
    /// How large it is, of all layers and sequences: bytes, or with K, M, G or T as in 512M or 1.5G [default: on the CPU what
    /// is written of a quarter of the available memory, up to the model's context or 65536 tokens; on a GPU 8192 tokens].
    #[arg(long, value_name = "SIZE")]
    kv_memory: Option<CacheSize>,
}

impl Memory {
    /// The size for a cache of this kind.
    pub fn size(&self, kind: CacheKind) -> anyhow::Result<Option<CacheSize>> {
        if self.kv_memory.is_some() && kind == CacheKind::Contiguous {
            let problem = "--kv-memory sizes a cache in blocks; --kv-cache contiguous grows with its tokens";
            return Err(Usage(problem.into()).into());
        }
        Ok(self.kv_memory)
    }
}

impl Arguments {
    /// What cannot be is refused.
    pub fn check(&self) -> anyhow::Result<()> {
        self.memory.size(self.kv_cache).map(drop)
    }

    /// Adds the cache to what is known of a load.
    pub fn apply(&self, options: &mut LoadOptions) -> anyhow::Result<()> {
        options.kv_cache = self.kv_cache;
        let size = self.memory.size(self.kv_cache)?;
        options.kv_size = size.or(self.context.map(CacheSize::Tokens));
        Ok(())
    }
}
