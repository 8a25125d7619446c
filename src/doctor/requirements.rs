//! What this crate requires of a machine: one place for `mmfp4 doctor` and for the README's table.

use crate::Result;
use crate::checkpoint::{Checkpoint, ModelFiles, Synthetic};
use crate::kv::{CacheFormat, CacheKind};
use crate::models::glm4_moe_lite::{Config, weights_stored};
use candle_core::DType;

/// The oldest macOS: Candle uses residency sets, the kernels a math mode, that came with it.
pub const MACOS: u32 = 15;

/// The oldest family of Apple's GPUs, that of M1.
pub const APPLE_FAMILY: u32 = 7;

/// The version of Candle that this crate is written for; which one a program was built with, Cargo decides.
pub const CANDLE: &str = "0.11.1";

/// What a Mac's system and other programs are left, in bytes.
pub const SYSTEM: u64 = 4 << 30;

/// Activations, compiled kernels and the like, in bytes.
pub const ACTIVATIONS: u64 = 1 << 30;

/// Contexts that the table is for.
pub const CONTEXTS: [usize; 3] = [8_192, 32_768, 131_072];

/// Memory that Macs come with, in GiB.
pub const MACS: [u64; 12] = [8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 256, 512];

/// The caches that the table is for: the one that a pipeline makes unless it is told otherwise, the smaller ones, and the
/// reference.
pub const CACHES: [CacheKind; 4] = [
    CacheKind::Paged(CacheFormat::BF16),
    CacheKind::Paged(CacheFormat::Fp8),
    CacheKind::Paged(CacheFormat::fp4()),
    CacheKind::Contiguous,
];

/// What a model takes of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// What it is called.
    pub name: String,
    /// Bytes of its tensors.
    pub weights: u64,
    /// Its layers.
    pub layers: usize,
    /// Numbers of the latent that a layer keeps of a token.
    pub latent: usize,
    /// Numbers of the rotary key beside it.
    pub rope: usize,
    /// Tokens that it holds at most.
    pub most_tokens: usize,
}

impl Needs {
    /// Of a model of this configuration whose tensors take so many bytes.
    pub fn new(name: impl Into<String>, config: &Config, weights: u64) -> Self {
        Self {
            name: name.into(),
            weights,
            layers: config.layers.len(),
            latent: config.kv_lora_rank,
            rope: config.qk_rope_head_dim,
            most_tokens: config.max_position_embeddings,
        }
    }

    /// Of a model as its files are; nothing is loaded.
    ///
    /// # Errors
    /// Those of [`Config::from_files`] and [`Checkpoint::from_files`].
    pub fn of_files(name: impl Into<String>, files: &ModelFiles) -> Result<Self> {
        let (config, checkpoint) = (Config::from_files(files)?, Checkpoint::from_files(files)?);
        Ok(Self::new(name, &config, weights_stored(&config, &checkpoint)))
    }

    /// Of GLM-4.7-Flash in MMFP4, its embeddings, routers and output head in BF16.
    ///
    /// # Errors
    /// None that its fixed dimensions could cause.
    pub fn flash() -> Result<Self> {
        let model: Synthetic = "glm-4.7-flash-bf16-head".parse()?;
        let name = "GLM-4.7-Flash in MMFP4";
        Ok(Self::new(name, model.config(), model.size_in_bytes()))
    }

    /// Bytes of the cache a token; a contiguous one is of the activations' dtype.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a latent whose width the format does not take.
    pub fn cache_per_token(&self, kind: CacheKind, activations: DType) -> Result<u64> {
        let row = kind.latent_bytes(self.latent, self.rope, activations.size_in_bytes())?;
        Ok((row * self.layers) as u64)
    }

    /// Of so many tokens those that a sequence can have.
    pub fn held(&self, tokens: usize) -> usize {
        tokens.min(self.most_tokens)
    }

    /// Bytes of weights and of a cache for so many tokens: what
    /// [`Model::load`](crate::models::glm4_moe_lite::Model::load) asks of a GPU.
    ///
    /// # Errors
    /// As [`cache_per_token`](Self::cache_per_token).
    pub fn bytes(&self, tokens: usize, kind: CacheKind, activations: DType) -> Result<u64> {
        let held = self.held(tokens) as u64;
        let cache = self.cache_per_token(kind, activations)?.saturating_mul(held);
        Ok(self.weights.saturating_add(cache))
    }

    /// Bytes that a machine should have for the model beside its weights and cache, the system's and other programs' included.
    pub const BESIDE: u64 = ACTIVATIONS + SYSTEM;

    /// The smallest of [`MACS`] that has so many bytes and those [beside](Self::BESIDE) them, in GiB.
    pub fn smallest_mac(bytes: u64) -> Option<u64> {
        let needed = bytes.saturating_add(Self::BESIDE);
        MACS.into_iter().find(|gib| gib << 30 >= needed)
    }
}

/// Bytes as people read them: GB of 10⁹ bytes, or MB where they are few.
pub fn gb(bytes: u64) -> String {
    match bytes < 100_000_000 {
        true => format!("{:.0} MB", bytes as f64 / 1e6),
        false => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// The README's tables, in Markdown.
///
/// # Errors
/// As [`Needs::flash`].
pub fn tables() -> Result<String> {
    let flash = Needs::flash()?;
    let mut text = String::from("| on a Mac | |\n|---|---|\n");
    let memory = format!(
        "{} GB or more for the GPU, which 16 GB are too few for; where the system gives it too little of them, \
         `mmfp4 doctor` says how to give it more",
        Needs::smallest_mac(flash.bytes(CONTEXTS[0], CacheKind::default(), DType::BF16)?).unwrap_or(0)
    );
    for (name, needed) in [
        ("system", format!("macOS {MACOS} or newer")),
        (
            "processor",
            format!("M1 or later (GPU family Apple{APPLE_FAMILY})"),
        ),
        ("Candle", format!("{CANDLE}, which this is written for")),
        (&format!("memory for {}", flash.name), memory),
    ] {
        text += &format!("| {name} | {needed} |\n");
    }
    text.push('\n');
    text += &format!(
        "| {} | a token | {} |\n|---|---|{}\n",
        flash.name,
        CONTEXTS
            .map(|tokens| format!("{tokens} tokens: weights + cache (Mac)"))
            .join(" | "),
        "---|".repeat(CONTEXTS.len()),
    );
    for kind in CACHES {
        let name = match kind {
            CacheKind::Contiguous => "contiguous, in F32".into(),
            paged => format!("`{paged}`"),
        };
        let per_token = flash.cache_per_token(kind, DType::F32)?;
        let mut row = format!("| cache {name} | {:.1} KB |", per_token as f64 / 1e3);
        for tokens in CONTEXTS {
            let bytes = flash.bytes(tokens, kind, DType::F32)?;
            let mac = Needs::smallest_mac(bytes).unwrap_or(0);
            row += &format!(
                " {} + {} ({mac} GB) |",
                gb(flash.weights),
                gb(bytes - flash.weights)
            );
        }
        text += &row;
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> String {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn the_readme_says_what_is_required() {
        let tables = tables().unwrap();
        assert!(file("README.md").contains(&tables), "README.md lacks\n{tables}");
    }

    #[test]
    fn it_is_that_candle() {
        let lock = file("Cargo.lock");
        for name in ["candle-core", "candle-nn", "candle-metal-kernels"] {
            let entry = format!("name = \"{name}\"\nversion = \"{CANDLE}\"\n");
            assert!(lock.contains(&entry), "{name}");
        }
        assert!(file("Cargo.toml").contains(&format!("candle-core = \"{CANDLE}\"")));
    }

    #[test]
    fn sixteen_gigabytes_are_too_few() {
        let flash = Needs::flash().unwrap();
        // 47 layers of 576 numbers.
        let per_token = |kind| flash.cache_per_token(kind, DType::F32).unwrap();
        assert_eq!(CACHES.map(per_token), [54_144, 47 * 656, 47 * 416, 108_288]);
        assert!((15_900_000_000..17_000_000_000).contains(&flash.weights));
        let bytes = |tokens, kind| flash.bytes(tokens, kind, DType::F32).unwrap();
        for kind in CACHES {
            assert!(bytes(1024, kind) + Needs::BESIDE > 16 << 30);
            assert_eq!(Needs::smallest_mac(bytes(CONTEXTS[0], kind)), Some(24));
        }
        // No sequence is longer than the model's context.
        let most = flash.most_tokens;
        assert_eq!(bytes(usize::MAX, CACHES[0]), bytes(most, CACHES[0]));
        assert_eq!(Needs::smallest_mac(1 << 40), None);
    }
}
