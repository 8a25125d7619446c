//! What this crate requires of a machine: one place for `mmfp4 doctor` and for the README's table.

use crate::Result;
use crate::checkpoint::{Checkpoint, ModelFiles, Synthetic};
use crate::models::glm4_moe_lite::{Config, cache_width, weights_stored};

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

/// What a number of the cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheFormat {
    /// As [`Model`](crate::models::glm4_moe_lite::Model) keeps it on the CPU.
    F32,
    /// F16 or BF16; on a GPU the latter unless [`LoadOptions::activations`](crate::checkpoint::LoadOptions::activations)
    /// says otherwise.
    Half,
}

impl CacheFormat {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F32, Self::Half];

    const fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Half => 2,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Half => "F16, BF16",
        }
    }
}

/// What a model takes of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// What it is called.
    pub name: String,
    /// Bytes of its tensors.
    pub weights: u64,
    /// Numbers that the cache holds of a token.
    pub cache_width: u64,
    /// Tokens that it holds at most.
    pub most_tokens: usize,
}

impl Needs {
    /// Of a model of this configuration whose tensors take so many bytes.
    pub fn new(name: impl Into<String>, config: &Config, weights: u64) -> Self {
        Self {
            name: name.into(),
            weights,
            cache_width: cache_width(config),
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

    /// Bytes of the cache a token.
    pub fn cache_per_token(&self, format: CacheFormat) -> u64 {
        self.cache_width * format.size()
    }

    /// Of so many tokens those that the cache can hold.
    pub fn held(&self, tokens: usize) -> usize {
        tokens.min(self.most_tokens)
    }

    /// Bytes of weights and of a cache for so many tokens: what
    /// [`Model::load`](crate::models::glm4_moe_lite::Model::load) asks of a GPU.
    pub fn bytes(&self, tokens: usize, format: CacheFormat) -> u64 {
        let held = self.held(tokens) as u64;
        let cache = self.cache_per_token(format).saturating_mul(held);
        self.weights.saturating_add(cache)
    }

    /// Bytes that a machine should have for it, the system's and other programs' included.
    pub fn of_machine(&self, tokens: usize, format: CacheFormat) -> u64 {
        self.bytes(tokens, format).saturating_add(ACTIVATIONS + SYSTEM)
    }

    /// The smallest of [`MACS`] that has them, in GiB.
    pub fn smallest_mac(&self, tokens: usize, format: CacheFormat) -> Option<u64> {
        let needed = self.of_machine(tokens, format);
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
        flash.smallest_mac(CONTEXTS[0], CacheFormat::Half).unwrap_or(0)
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
    for format in CacheFormat::ALL {
        let cells = CONTEXTS.map(|tokens| {
            let mac = flash.smallest_mac(tokens, format).unwrap_or(0);
            format!(
                "{} + {} ({mac} GB)",
                gb(flash.weights),
                gb(flash.bytes(tokens, format) - flash.weights)
            )
        });
        text += &format!(
            "| cache in {} | {:.1} KB | {} |\n",
            format.name(),
            flash.cache_per_token(format) as f64 / 1e3,
            cells.join(" | ")
        );
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
        assert_eq!(flash.cache_per_token(CacheFormat::F32), 108_288);
        assert!((15_900_000_000..17_000_000_000).contains(&flash.weights));
        for format in CacheFormat::ALL {
            assert!(flash.of_machine(1024, format) > 16 << 30);
            assert_eq!(flash.smallest_mac(CONTEXTS[0], format), Some(24));
        }
        // No cache holds more than the model's context.
        let most = flash.most_tokens;
        assert_eq!(
            flash.bytes(usize::MAX, CacheFormat::F32),
            flash.bytes(most, CacheFormat::F32)
        );
        let larger = Needs {
            weights: 1 << 40,
            ..flash
        };
        assert_eq!(larger.smallest_mac(CONTEXTS[0], CacheFormat::F32), None);
    }
}
