//! llama.cpp's names of a deepseek2 model's tensors, and ours.

/// Modules outside the layers.
const TOP: [(&str, &str); 3] = [
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];

/// Modules of a layer. Experts lie stacked, as MLX stacks them; so do, in MLX's names too, the halves of `kv_b`: what queries
/// are carried into latent space by, a head's keys transposed, and what results are carried out of it by.
const LAYER: [(&str, &str); 23] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_k_b", "self_attn.embed_q"),
    ("attn_v_b", "self_attn.unembed_out"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_exps", "mlp.switch_mlp.gate_proj"),
    ("ffn_up_exps", "mlp.switch_mlp.up_proj"),
    ("ffn_down_exps", "mlp.switch_mlp.down_proj"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    ("exp_probs_b", "mlp.gate"),
];

/// A tensor's module and what follows it; `None` for a name that this crate has no use for.
pub(super) fn ours(name: &str) -> Option<(String, &str)> {
    let (module, rest) = name.rsplit_once('.')?;
    if let Some((_, ours)) = TOP.iter().find(|(theirs, _)| *theirs == module) {
        return Some((ours.to_string(), rest));
    }
    let (layer, module) = module.strip_prefix("blk.")?.split_once('.')?;
    let index: usize = layer.parse().ok()?;
    let (theirs, ours) = LAYER.iter().find(|(theirs, _)| *theirs == module)?;
    let rest = match (*theirs, rest) {
        ("exp_probs_b", "bias") => "e_score_correction_bias",
        ("exp_probs_b", _) => return None,
        (_, rest) => rest,
    };
    Some((format!("model.layers.{index}.{ours}"), rest))
}

/// Of what layer a tensor is that has no name here.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_kinds() {
        let cases = [
            ("output.weight", "lm_head", "weight"),
            (
                "blk.7.attn_q_a.weight",
                "model.layers.7.self_attn.q_a_proj",
                "weight",
            ),
            (
                "blk.07.ffn_up_exps.scale",
                "model.layers.7.mlp.switch_mlp.up_proj",
                "scale",
            ),
            (
                "blk.1.exp_probs_b.bias",
                "model.layers.1.mlp.gate",
                "e_score_correction_bias",
            ),
        ];
        for (theirs, module, rest) in cases {
            assert_eq!(ours(theirs), Some((module.to_string(), rest)));
        }
        for none in [
            "",
            "output",
            "blk.x.attn_q.weight",
            "blk.1.weight",
            "blk.1.exp_probs_b.weight",
            "rope_freqs.weight",
        ] {
            assert_eq!(ours(none), None, "{none}");
        }
        assert_eq!(layer_of("blk.47.nextn.eh_proj.weight"), Some(47));
    }
}
