//! What a model folder has beside weights, and what its `config.json` says of them.

use super::QuantizeOptions;
use super::plan::Plan;
use crate::checkpoint::layouts::Layout;
use crate::checkpoint::safetensors::Checkpoint;
use crate::fp4::ScaleRule;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

const CONFIG: &str = "config.json";

/// What is copied where it is there.
const SIDE_FILES: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "LICENSE",
];

/// The source's `config.json`, which must not tell of quantised weights.
pub fn read(source: &Checkpoint) -> Result<Map<String, Value>> {
    let path = source.folder().join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e, ""))?;
    let config: Map<String, Value> = serde_json::from_str(&text).map_err(|e| {
        let problem = format!("expected a JSON object: {e}");
        Error::file(&path, problem, "fetch the file again")
    })?;
    for field in ["quantization_config", "quantization"] {
        if let Some(found) = config.get(field).filter(|found| !found.is_null()) {
            let method = ["quant_method", "mode", "format"]
                .iter()
                .find_map(|name| found.get(name));
            let method = method.and_then(Value::as_str).unwrap_or("of an unknown kind");
            let problem = format!("{field} ({method}): the weights are quantised already");
            return Err(Error::file(path, problem, "give the floating-point original"));
        }
    }
    Ok(config)
}

/// `config.json` with a note of what the weights are and how they came to be.
pub fn with_note(
    mut config: Map<String, Value>,
    options: &QuantizeOptions,
    layout: Layout,
    plan: &Plan<'_>,
    folder: &Path,
) -> Value {
    let mut note = match layout {
        Layout::CompressedNvfp4 => compressed("nvfp4-pack-quantized", "tensor_group", options, plan),
        Layout::CompressedMxfp4 => compressed("mxfp4-pack-quantized", "group", options, plan),
        _ => json!({
            "quant_method": "mmfp4", "bits": 4, "group_size": options.format.group, "ignore": plan.ignored,
        }),
    };
    // Not the whole path, which is nobody's business.
    let name = || {
        folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    note["producer"] = json!({
        "name": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "source": options.source.clone().unwrap_or_else(name),
        "scales": match options.rule {
            ScaleRule::SquaredError => "squared error",
            ScaleRule::Maximum => "maximum",
        },
        "skip_layers": options.skip_layers,
        "keep": options.keep,
    });
    config.insert("quantization_config".into(), note);
    Value::Object(config)
}

/// compressed-tensors' note, of the fields that all its versions since FP4 know.
fn compressed(name: &str, strategy: &str, options: &QuantizeOptions, plan: &Plan<'_>) -> Value {
    let mut ignore = plan.ignored.clone();
    let head = "lm_head".to_string();
    if !ignore.contains(&head) {
        // A head that shares the embeddings' matrix is a linear layer all the same.
        ignore.insert(0, head);
    }
    json!({
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": name,
                "weights": {
                    "num_bits": 4,
                    "type": "float",
                    "strategy": strategy,
                    "group_size": options.format.group,
                    "symmetric": true,
                    "dynamic": false,
                },
                "input_activations": null,
                "output_activations": null,
            },
        },
        "ignore": ignore,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
    })
}

/// Tokenizer, template, generation's defaults.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<()> {
    for name in SIDE_FILES {
        let path = from.join(name);
        if path.exists() {
            // Not `fs::copy`: a cache's read-only files must not make read-only copies.
            let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e, ""))?;
            std::fs::write(to.join(name), bytes).map_err(|e| Error::io(to.join(name), e, ""))?;
        }
    }
    Ok(())
}
