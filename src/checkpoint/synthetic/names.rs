//! Synthetic checkpoints by name.

use super::{Precision, Synthetic};
use crate::{Error, Result};
use serde_json::{Value, json};

impl std::str::FromStr for Synthetic {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let (model, precision) = [("-bf16-head", Precision::Bf16Head), ("-bf16", Precision::Bf16)]
            .into_iter()
            .find_map(|(suffix, precision)| Some((name.strip_suffix(suffix)?, precision)))
            .unwrap_or((name, Precision::Mmfp4));
        let layers = match model {
            "glm-4.7-flash" => Some(47),
            "slice" => Some(4),
            _ => (model.strip_prefix("slice-"))
                .and_then(|layers| layers.parse().ok())
                .filter(|layers| (2..=47).contains(layers)),
        };
        let Some(layers) = layers else {
            let expected = Self::NAMES.join(" or ");
            return Err(Error::argument("synthetic", "name", expected, name));
        };
        let config = json!({
            "model_type": "glm4_moe_lite", "num_hidden_layers": layers, "first_k_dense_replace": 1,
            "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536, "hidden_act": "silu",
            "num_attention_heads": 20, "num_key_value_heads": 20, "attention_bias": false,
            "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
            "v_head_dim": 256, "rope_interleave": true, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
            "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.8, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc", "vocab_size": 154880, "max_position_embeddings": 202752,
            "tie_word_embeddings": false, "eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820,
        });
        match &config {
            Value::Object(config) => {
                let synthetic = Self::new(name, config)?;
                Ok(match precision {
                    Precision::Mmfp4 => synthetic,
                    Precision::Bf16Head => synthetic.with_bf16_head(name),
                    Precision::Bf16 => synthetic.in_bf16(name),
                })
            }
            other => Err(Error::argument(
                "synthetic",
                "config",
                "an object",
                other.to_string(),
            )),
        }
    }
}
