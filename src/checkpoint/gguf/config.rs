//! From a GGUF file's metadata to what `config.json` would say.

use super::header::TensorInfo;
use super::metadata::{Metadata, Value as Found};
use crate::error::shortened;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

const ARCHITECTURE: &str = "deepseek2";
const INSTEAD: &str = "take a GGUF file of GLM-4.7-Flash, or a safetensors checkpoint";
/// llama.cpp's number for the sigmoid.
const SIGMOID: i128 = 2;
/// Layers of GLM-4.7-Flash without and with the one that predicts a second token; of models with so many, llama.cpp takes the
/// scoring function to be the sigmoid where nothing is said.
const FLASH: [usize; 2] = [47, 48];

/// The configuration, to be checked as that of a `config.json` is.
///
/// # Errors
/// [`Error::File`] names the key that is missing or of another type, and an architecture that is not implemented.
pub(super) fn from_metadata(metadata: &Metadata, tensors: &[TensorInfo], path: &Path) -> Result<Value> {
    let architecture = metadata.text("general.architecture").unwrap_or("missing");
    if architecture != ARCHITECTURE {
        let architecture = shortened(architecture.to_string());
        let problem = format!("general.architecture = {architecture}; only {ARCHITECTURE} is implemented");
        return Err(Error::file(path, problem, INSTEAD));
    }
    let keys = Keys { metadata, path };
    let blocks = keys.size("block_count")?;
    let predicting = keys.size_or("nextn_predict_layers", 0)?;
    let layers = blocks.saturating_sub(predicting);
    let dense = keys.size_or("leading_dense_block_count", 0)?;
    // A list of all layers is made below: as many as there are tensors at most.
    if dense > layers || layers > tensors.len() {
        let problem = format!(
            "{ARCHITECTURE}.block_count = {blocks}, leading_dense_block_count = {dense}, nextn_predict_layers = {predicting}; \
             it has {} tensors",
            tensors.len()
        );
        return Err(Error::file(path, problem, INSTEAD));
    }
    let heads = keys.size("attention.head_count")?;
    let rope = keys.size("rope.dimension_count")?;
    // Files with the keys and values of kv_b joined say it of heads; those of latents, apart.
    let key = keys.size_of_either("attention.key_length_mla", "attention.key_length")?;
    let value = keys.size_of_either("attention.value_length_mla", "attention.value_length")?;
    let Some(nope) = key.checked_sub(rope) else {
        let problem = format!(
            "{ARCHITECTURE}.rope.dimension_count = {rope}, more than {ARCHITECTURE}.attention.key_length, {key} a head"
        );
        return Err(Error::file(path, problem, INSTEAD));
    };
    keys.check_scoring(blocks)?;
    let tensor = |name: &str| tensors.iter().find(|info| info.name == name);
    let vocabulary = match keys.optional_size("vocab_size")? {
        Some(size) => Some(size),
        None => tensor("token_embd.weight").map(|info| info.shape[0]),
    };
    let scale = keys.float_or("expert_weights_scale", 1.0)?;
    let kinds = (0..layers).map(|layer| if layer < dense { "dense" } else { "sparse" });
    Ok(json!({
        "model_type": "glm4_moe_lite",
        "vocab_size": vocabulary,
        "hidden_size": keys.size("embedding_length")?,
        "intermediate_size": keys.size("feed_forward_length")?,
        "moe_intermediate_size": keys.size("expert_feed_forward_length")?,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": keys.optional_size("attention.q_lora_rank")?,
        "kv_lora_rank": keys.size("attention.kv_lora_rank")?,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "n_routed_experts": keys.size("expert_count")?,
        "n_shared_experts": keys.size_or("expert_shared_count", 0)?,
        "num_experts_per_tok": keys.size("expert_used_count")?,
        "n_group": keys.size_or("expert_group_count", 1)?,
        "topk_group": keys.size_or("expert_group_used_count", 1)?,
        "norm_topk_prob": keys.bool_or("expert_weights_norm", false)?,
        // As llama.cpp has it, none.
        "routed_scaling_factor": if scale == 0.0 { 1.0 } else { scale },
        "rms_norm_eps": keys.float("attention.layer_norm_rms_epsilon")?,
        "rope_parameters": {
            "rope_theta": keys.float_or("rope.freq_base", 10_000.0)?,
            "rope_type": match keys.text("rope.scaling.type")? {
                None | Some("none") => "default",
                Some(other) => other,
            },
        },
        "max_position_embeddings": keys.size("context_length")?,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": predicting,
        "tie_word_embeddings": tensor("output.weight").is_none(),
        "mlp_layer_types": kinds.collect::<Vec<_>>(),
        "eos_token_id": keys.ends()?,
    }))
}

/// The architecture's values, by their names without its own.
struct Keys<'a> {
    metadata: &'a Metadata,
    path: &'a Path,
}

impl<'a> Keys<'a> {
    fn find(&self, key: &str) -> Option<&'a Found> {
        self.metadata.get(&format!("{ARCHITECTURE}.{key}"))
    }

    fn wrong(&self, key: &str, found: &Found, expected: &str) -> Error {
        let found = shortened(format!("{found:?}"));
        let problem = format!("its metadata have {ARCHITECTURE}.{key} = {found}; expected {expected}");
        Error::file(self.path, problem, INSTEAD)
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| {
            let problem = format!("its metadata lack {ARCHITECTURE}.{key}");
            Error::file(self.path, problem, INSTEAD)
        })
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(found) = self.find(key) else {
            return Ok(None);
        };
        match found {
            Found::Integer(value) if (0..1 << 40).contains(value) => Ok(Some(*value as usize)),
            other => Err(self.wrong(key, other, "a size")),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.required(key, self.optional_size(key)?)
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    fn size_of_either(&self, first: &str, second: &str) -> Result<usize> {
        match self.optional_size(first)? {
            Some(size) => Ok(size),
            None => self.size(second),
        }
    }

    fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        match self.find(key) {
            None => Ok(None),
            Some(Found::Float(value)) if value.is_finite() => Ok(Some(*value)),
            Some(other) => Err(self.wrong(key, other, "a finite number")),
        }
    }

    fn float(&self, key: &str) -> Result<f64> {
        self.required(key, self.optional_float(key)?)
    }

    fn float_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.optional_float(key)?.unwrap_or(default))
    }

    fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.find(key) {
            None => Ok(default),
            Some(Found::Bool(value)) => Ok(*value),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.find(key) {
            None => Ok(None),
            Some(Found::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other, "a text")),
        }
    }

    /// How experts' scores are made of the router's logits.
    fn check_scoring(&self, blocks: usize) -> Result<()> {
        const KEY: &str = "expert_gating_func";
        match self.find(KEY) {
            Some(Found::Integer(SIGMOID)) => Ok(()),
            None if FLASH.contains(&blocks) => Ok(()),
            Some(other) => Err(self.wrong(KEY, other, "2, the sigmoid: others are not implemented")),
            None => self.required(KEY, None),
        }
    }

    /// The tokens that end a text, or an answer.
    fn ends(&self) -> Result<Vec<u32>> {
        let mut ends = Vec::new();
        for name in ["eos", "eot", "eom"] {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let Some(found) = self.metadata.get(&key) else {
                continue;
            };
            let id = self.metadata.integer(&key).and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| {
                Error::file(
                    self.path,
                    format!("{key} = {found:?}; expected a token's id"),
                    INSTEAD,
                )
            })?;
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        Ok(ends)
    }
}
