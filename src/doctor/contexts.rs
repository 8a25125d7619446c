//! How much context fits beside a model's weights, by the format of the cache: the table of docs/kv-cache.md.

use super::requirements::{ACTIVATIONS, Needs, SYSTEM};
use crate::Result;
use crate::checkpoint::Synthetic;
use crate::kv::{CacheFormat, ScaleGroup};
use crate::models::glm4_moe_lite::Config;

/// Memory of machines, in GiB.
const MACHINES: [u64; 4] = [16, 24, 32, 64];

const FORMATS: [CacheFormat; 4] = [
    CacheFormat::BF16,
    CacheFormat::Fp8,
    CacheFormat::fp4(),
    CacheFormat::Fp4 {
        group: ScaleGroup::ThirtyTwo,
        rotate: false,
    },
];

/// Bytes of a token in one layer.
fn row_bytes(config: &Config, format: CacheFormat) -> Result<u64> {
    let layout = config.cache_layout(format)?;
    Ok(layout.row_bytes() as u64)
}

/// Tokens, in whole blocks, that fit in `gib` GiB beside weights, activations, the system and other programs.
fn tokens(gib: u64, weights: u64, of_token: u64) -> u64 {
    let left = (gib << 30).saturating_sub(weights + ACTIVATIONS + SYSTEM);
    let block = crate::kv::TOKENS_PER_BLOCK as u64;
    left / (of_token * block) * block
}

/// The table, in Markdown: GLM-4.7-Flash in MMFP4, its embeddings, routers and output head in BF16.
///
/// # Errors
/// None that the model's fixed dimensions could cause.
pub fn table() -> Result<String> {
    let flash = Needs::flash()?;
    let model: Synthetic = "glm-4.7-flash-bf16-head".parse()?;
    let config = model.config();
    let layers = config.layers.len() as u64;
    let key = config.qk_nope_head_dim + config.qk_rope_head_dim;
    let expanded = 2 * (config.num_attention_heads * (key + config.v_head_dim)) as u64;

    let machines = MACHINES.map(|gib| format!("{gib} GB"));
    let mut text = format!(
        "| cache | bytes a token and layer | all {layers} layers | {} |\n|---|---|---|{}\n",
        machines.join(" | "),
        "---|".repeat(MACHINES.len())
    );
    let mut rows = vec![("keys and values of all heads, BF16".to_string(), expanded)];
    for format in FORMATS {
        let name = match format {
            CacheFormat::BF16 => "`f16`, `bf16`".to_string(),
            format => format!("`{format}`"),
        };
        rows.push((name, row_bytes(config, format)?));
    }
    for (name, bytes) in rows {
        let fits = MACHINES.map(|gib| match tokens(gib, flash.weights, bytes * layers) {
            0 => "-".to_string(),
            tokens => thousands(tokens),
        });
        let all = thousands(bytes * layers);
        text += &format!(
            "| {name} | {} | {all} | {} |\n",
            thousands(bytes),
            fits.join(" | ")
        );
    }
    Ok(text)
}

/// A number with commas.
fn thousands(n: u64) -> String {
    match n {
        0..1000 => n.to_string(),
        _ => format!("{},{:03}", thousands(n / 1000), n % 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_says_what_fits() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kv-cache.md");
        let table = table().unwrap();
        assert!(
            std::fs::read_to_string(path).unwrap().contains(&table),
            "docs/kv-cache.md lacks\n{table}"
        );
    }

    #[test]
    fn what_fits_is_what_is_left() {
        // A GiB is left, of which a token takes a MiB, or all but one.
        let weights = (16 << 30) - ACTIVATIONS - SYSTEM - (1 << 30);
        assert_eq!(tokens(16, weights, 1 << 20), 1024);
        assert_eq!(tokens(16, weights + 1, 1 << 20), 1008);
        assert_eq!(tokens(15, weights, 1 << 20), 0);
        assert_eq!(tokens(8, weights, 1 << 20), 0);
        assert_eq!([7, 1000, 1_020_300].map(thousands), ["7", "1,000", "1,020,300"]);
    }
}
