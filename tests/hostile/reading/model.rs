//! The model that is damaged: two layers of GLM-4.7-Flash's architecture, as small as all layouts allow.

use serde_json::{Value, json};

/// Inputs of every linear layer: a multiple of each layout's group.
pub const WIDTH: usize = 64;
pub const VOCABULARY: usize = 48;
pub const EXPERTS: usize = 2;
pub const HEADS: usize = 2;
pub const NOPE: usize = 32;
pub const VALUE: usize = 32;
const ROPE: usize = 16;

pub fn config() -> Value {
    json!({
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "hidden_act": "silu",
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": WIDTH, "kv_lora_rank": WIDTH,
        "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "qk_head_dim": NOPE + ROPE, "v_head_dim": VALUE,
        "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": true, "routed_scaling_factor": 1.8, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "rms_norm_eps": 1e-5, "rope_interleave": true, "partial_rotary_factor": 1.0, "attention_bias": false,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_theta": 1e6,
        "tie_word_embeddings": false, "max_position_embeddings": 64, "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
        "eos_token_id": [1], "dtype": "bfloat16",
    })
}

/// A linear layer: its module, N and K.
pub type Linear = (String, usize, usize);

/// The linear layers whose weights may be in four bits.
pub fn linears() -> Vec<Linear> {
    let mut all = Vec::new();
    for layer in 0..2 {
        let mut add = |module: &str, n: usize| all.push((format!("model.layers.{layer}.{module}"), n, WIDTH));
        add("self_attn.q_a_proj", WIDTH);
        add("self_attn.q_b_proj", HEADS * (NOPE + ROPE));
        add("self_attn.kv_a_proj_with_mqa", WIDTH + ROPE);
        add("self_attn.kv_b_proj", HEADS * (NOPE + VALUE));
        add("self_attn.o_proj", WIDTH);
        let mut mlp = |module: &str| {
            for part in ["gate_proj", "up_proj", "down_proj"] {
                add(&format!("{module}.{part}"), WIDTH);
            }
        };
        match layer {
            0 => mlp("mlp"),
            _ => {
                (0..EXPERTS).for_each(|expert| mlp(&format!("mlp.experts.{expert}")));
                mlp("mlp.shared_experts");
            }
        }
    }
    all
}

/// All other tensors, which stay in floating point: their names and shapes.
pub fn floats() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCABULARY, WIDTH]),
        ("lm_head.weight".to_string(), vec![VOCABULARY, WIDTH]),
        ("model.norm.weight".to_string(), vec![WIDTH]),
    ];
    for layer in 0..2 {
        for norm in [
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_a_layernorm",
            "self_attn.kv_a_layernorm",
        ] {
            all.push((format!("model.layers.{layer}.{norm}.weight"), vec![WIDTH]));
        }
    }
    all.push(("model.layers.1.mlp.gate.weight".into(), vec![EXPERTS, WIDTH]));
    all.push((
        "model.layers.1.mlp.gate.e_score_correction_bias".into(),
        vec![EXPERTS],
    ));
    all
}

/// The small files that come with a model.
pub fn texts() -> Vec<(String, Vec<u8>)> {
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 1, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        }],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 2, "ab": 3, "c": 4}, "merges": ["a b"]},
    });
    let tokenizer_config = json!({
        "bos_token": null, "eos_token": {"content": "<|end|>", "lstrip": false}, "pad_token": "<|end|>",
        "chat_template": [
            {"name": "default", "template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"},
            {"name": "tool_use", "template": "{{ tools | tojson }}"},
        ],
    });
    let generation_config = json!({
        "eos_token_id": [1], "pad_token_id": 1, "bos_token_id": null, "do_sample": true, "temperature": 0.7, "top_k": 20,
        "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1, "max_new_tokens": 8,
    });
    let quantization_config = json!({
        "format": "mmfp4_e2m1_marlin", "use_hadamard": false, "hadamard_block_size": 64, "transform_config": {"config_groups": {}},
    });
    let template = "{%- for message in messages -%}\n[{{ message.role }}]{{ message.content | trim }}\n\
                    {%- if not loop.last %}{{ loop.index }}{% endif %}\n{%- endfor -%}\n\
                    {%- if add_generation_prompt %}{% generation %}[assistant]{% endgeneration %}{% endif -%}";
    [
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", tokenizer_config.to_string()),
        ("generation_config.json", generation_config.to_string()),
        ("chat_template.jinja", template.to_string()),
        ("quantization_config.json", quantization_config.to_string()),
    ]
    .map(|(name, text)| (name.to_string(), text.into_bytes()))
    .into()
}
