//! What a model's tensors are for.

use serde::Serialize;
use std::fmt;

/// A part of the model, by what its weights do; attention by its projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Component {
    /// Token embeddings.
    Embeddings,
    /// Queries, of a model without a low rank for them.
    AttentionQ,
    /// Queries down to their low rank.
    AttentionQA,
    /// Queries up from it.
    AttentionQB,
    /// Keys and values down to the latent.
    AttentionKvA,
    /// Keys and values up from it.
    AttentionKvB,
    /// The keys' half of `kv_b`, stored apart.
    AttentionEmbedQ,
    /// The values' half of `kv_b`, stored apart.
    AttentionUnembedOut,
    /// The output of attention.
    AttentionO,
    /// Routers, and the biases that correct their choice.
    Router,
    /// Routed experts.
    Experts,
    /// Experts that every token goes through.
    SharedExperts,
    /// The MLPs of layers without experts.
    DenseMlp,
    /// Norms.
    Norms,
    /// The output head, where it is not the embeddings.
    Head,
}

impl Component {
    /// The part that a module of ours belongs to; its biases go with it.
    pub(super) fn of(module: &str) -> Self {
        if let Some((_, projection)) = module.split_once(".self_attn.") {
            return match projection {
                "q_proj" => Self::AttentionQ,
                "q_a_proj" => Self::AttentionQA,
                "q_b_proj" => Self::AttentionQB,
                "kv_a_proj_with_mqa" => Self::AttentionKvA,
                "kv_b_proj" => Self::AttentionKvB,
                "embed_q" => Self::AttentionEmbedQ,
                "unembed_out" => Self::AttentionUnembedOut,
                "o_proj" => Self::AttentionO,
                _ => Self::Norms,
            };
        }
        if let Some((_, part)) = module.split_once(".mlp.") {
            return match part.split('.').next() {
                Some("gate") => Self::Router,
                Some("experts") => Self::Experts,
                Some("shared_experts") => Self::SharedExperts,
                _ => Self::DenseMlp,
            };
        }
        match module {
            "model.embed_tokens" => Self::Embeddings,
            "lm_head" => Self::Head,
            _ => Self::Norms,
        }
    }

    /// Whether its weights are those of a feed-forward op, which wants them in one map.
    pub(super) fn is_gathered(self) -> bool {
        matches!(self, Self::Experts | Self::SharedExperts | Self::DenseMlp)
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Embeddings => "embeddings",
            Self::AttentionQ => "attention q",
            Self::AttentionQA => "attention q_a",
            Self::AttentionQB => "attention q_b",
            Self::AttentionKvA => "attention kv_a",
            Self::AttentionKvB => "attention kv_b",
            Self::AttentionEmbedQ => "attention embed_q",
            Self::AttentionUnembedOut => "attention unembed_out",
            Self::AttentionO => "attention o",
            Self::Router => "router",
            Self::Experts => "experts",
            Self::SharedExperts => "shared expert",
            Self::DenseMlp => "dense MLP",
            Self::Norms => "norms",
            Self::Head => "output head",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_have_their_component() {
        for (module, component) in [
            ("model.embed_tokens", Component::Embeddings),
            ("model.layers.3.self_attn.q_proj", Component::AttentionQ),
            (
                "model.layers.3.self_attn.kv_a_proj_with_mqa",
                Component::AttentionKvA,
            ),
            ("model.layers.3.self_attn.kv_a_layernorm", Component::Norms),
            ("model.layers.3.mlp.gate", Component::Router),
            (
                "model.layers.3.mlp.gate.e_score_correction_bias",
                Component::Router,
            ),
            ("model.layers.3.mlp.gate_proj", Component::DenseMlp),
            ("model.layers.3.mlp.experts.12.gate_proj", Component::Experts),
            (
                "model.layers.3.mlp.shared_experts.down_proj",
                Component::SharedExperts,
            ),
            ("model.layers.3.input_layernorm", Component::Norms),
            ("model.norm", Component::Norms),
            ("lm_head", Component::Head),
        ] {
            assert_eq!(Component::of(module), component, "{module}");
        }
    }
}
