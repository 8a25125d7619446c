//! Every model that a patch touches, tiny, behind one function: tokens at a position in, logits out.

use std::sync::LazyLock;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::{models as m, quantized_var_builder};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::weights::Weights;

/// Runs tokens `[1, n]` at a position. Models that count for themselves ignore the position, and clear
/// their cache at 0 as their users do.
pub type Decoder = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;

pub type Build = fn(DType) -> Result<Decoder>;

fn decoder<M: 'static>(
    mut model: M,
    mut forward: impl FnMut(&mut M, &Tensor, usize) -> Result<Tensor> + 'static,
) -> Result<Decoder> {
    Ok(Box::new(move |tokens, position| {
        forward(&mut model, tokens, position)
    }))
}

/// A superset of every model's fields, with `changes` on top.
fn config<C: DeserializeOwned>(changes: Value) -> C {
    let mut config = json!({
        "vocab_size": 40, "padded_vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5,
        "layer_norm_epsilon": 1e-5, "norm_epsilon": 1e-5, "layernorm_epsilon": 1e-5,
        "rope_theta": 10000.0, "rope_local_base_freq": 1000.0, "partial_rotary_factor": 0.5,
        "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": false,
        "attention_bias": false, "mlp_bias": false, "use_bias": true, "bos_token_id": 0, "eos_token_id": 0,
        "use_cache": true, "use_flash_attn": false, "qk_layernorm": false, "query_pre_attn_scalar": 8,
        "sliding_window": 16, "use_sliding_window": false, "max_window_layers": 1, "sliding_window_pattern": 2,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "norm_topk_prob": true,
    });
    if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
        config.extend(changes);
    }
    serde_json::from_value(config).expect("the fields of a configuration")
}

fn vb(dtype: DType) -> VarBuilder<'static> {
    Weights::default().var_builder(dtype)
}

/// The weights that `build` asked for, once more as GGUF.
fn gguf<M>(build: impl Fn(VarBuilder) -> Result<M>) -> Result<quantized_var_builder::VarBuilder> {
    let weights = Weights::default();
    build(weights.var_builder(DType::F32))?;
    quantized_var_builder::VarBuilder::from_gguf_buffer(&weights.gguf()?, &candle_core::Device::Cpu)
}

/// A model that takes its position, the configuration's changes and the constructor's arguments.
macro_rules! positional {
    ($model:path, $changes:tt, |$config:ident, $vb:ident| $new:expr) => {
        |dtype| {
            let $config = &config(json!($changes));
            let $vb = vb(dtype);
            decoder($new?, |model: &mut $model, tokens, position| {
                model.forward(tokens, position)
            })
        }
    };
}

/// A model that counts for itself.
macro_rules! counting {
    ($model:expr, $clear:ident) => {
        decoder($model?, |model, tokens, position| {
            if position == 0 {
                model.$clear();
            }
            model.forward(tokens)
        })
    };
}

/// A model with a cache of its own.
macro_rules! cached {
    ($model:expr, $cache:expr) => {
        decoder(($model?, $cache?), |(model, cache), tokens, position| {
            model.forward(tokens, position, cache)
        })
    };
}

/// What the released crate lacks, doing nothing: where the inherent method exists, it is the one called.
#[allow(dead_code)]
pub trait Lacking {
    fn clear_kv_cache(&mut self) {}
    fn reset(&mut self) {}
}

impl Lacking for m::mpt::Model {}
impl Lacking for m::llama::Cache {}

/// As many heads as it takes for the message that people report: `[5, 5] to [1, 32, 5, 7]`.
pub fn llama_and_cache(dtype: DType) -> Result<(m::llama::Llama, m::llama::Cache)> {
    let changes = json!({"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 8});
    let config = config::<m::llama::LlamaConfig>(changes).into_config(false);
    let cache = m::llama::Cache::new(true, dtype, &config, &candle_core::Device::Cpu)?;
    Ok((m::llama::Llama::load(vb(dtype), &config)?, cache))
}

pub const LLAMA: Build = |dtype| {
    decoder(llama_and_cache(dtype)?, |(model, cache), tokens, position| {
        model.forward(tokens, position, cache)
    })
};

pub const GRANITE: Build = |dtype| {
    let config = config::<m::granite::GraniteConfig>(json!({})).into_config(false);
    cached!(
        m::granite::Granite::load(vb(dtype), &config),
        m::granite::Cache::new(true, dtype, &config, &candle_core::Device::Cpu)
    )
};

pub const GRANITE_MOE_HYBRID: Build = |dtype| {
    use m::granitemoehybrid::{GraniteMoeHybrid, GraniteMoeHybridCache, GraniteMoeHybridConfig};
    let config = config::<GraniteMoeHybridConfig>(json!({"attention_multiplier": 0.5})).into_config(false);
    cached!(
        GraniteMoeHybrid::load(vb(dtype), &config),
        GraniteMoeHybridCache::new(true, dtype, &config, &candle_core::Device::Cpu)
    )
};

pub const VOXTRAL_LLAMA: Build = |dtype| {
    use m::voxtral::voxtral_llama::{VoxtralLlama, VoxtralLlamaCache, VoxtralLlamaConfig};
    let config = config::<VoxtralLlamaConfig>(json!({}));
    cached!(
        VoxtralLlama::load(vb(dtype), &config),
        VoxtralLlamaCache::new(true, dtype, &config, &candle_core::Device::Cpu)
    )
};

pub const LLAMA2_C: Build = |dtype| {
    let config = m::llama2_c::Config {
        dim: 32,
        hidden_dim: 48,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        vocab_size: 40,
        seq_len: 16,
        norm_eps: 1e-5,
    };
    cached!(
        m::llama2_c::Llama::load(vb(dtype), config.clone()),
        m::llama2_c::Cache::new(true, &config, vb(dtype))
    )
};

pub const MISTRAL: Build = positional!(m::mistral::Model, {}, |c, vb| m::mistral::Model::new(c, vb));
pub const MISTRAL_WINDOW: Build =
    positional!(m::mistral::Model, {"sliding_window": 3}, |c, vb| m::mistral::Model::new(c, vb));
pub const MIXTRAL: Build = positional!(m::mixtral::Model, {}, |c, vb| m::mixtral::Model::new(c, vb));
pub const MIXTRAL_WINDOW: Build =
    positional!(m::mixtral::Model, {"sliding_window": 3}, |c, vb| m::mixtral::Model::new(c, vb));
pub const QWEN2: Build = positional!(m::qwen2::ModelForCausalLM, {}, |c, vb| {
    m::qwen2::ModelForCausalLM::new(c, vb)
});
pub const QWEN2_UNUSED_WINDOW: Build = positional!(m::qwen2::ModelForCausalLM, {"sliding_window": 3}, |c, vb| m::qwen2::ModelForCausalLM::new(c, vb));
pub const QWEN2_WINDOW: Build = positional!(
    m::qwen2::ModelForCausalLM,
    {"sliding_window": 3, "use_sliding_window": true},
    |c, vb| m::qwen2::ModelForCausalLM::new(c, vb)
);
pub const QWEN2_MOE: Build = positional!(m::qwen2_moe::Model, {}, |c, vb| m::qwen2_moe::Model::new(c, vb));
pub const QWEN2_MOE_WINDOW: Build = positional!(
    m::qwen2_moe::Model,
    {"sliding_window": 3, "use_sliding_window": true},
    |c, vb| m::qwen2_moe::Model::new(c, vb)
);
pub const QWEN3: Build = positional!(m::qwen3::ModelForCausalLM, {}, |c, vb| {
    m::qwen3::ModelForCausalLM::new(c, vb)
});
pub const QWEN3_MOE: Build = positional!(m::qwen3_moe::ModelForCausalLM, {}, |c, vb| {
    m::qwen3_moe::ModelForCausalLM::new(c, vb)
});
pub const GEMMA: Build =
    positional!(m::gemma::Model, {"hidden_act": null}, |c, vb| m::gemma::Model::new(false, c, vb));
pub const GEMMA2: Build = positional!(
    m::gemma2::Model,
    {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
    |c, vb| m::gemma2::Model::new(false, c, vb)
);
pub const GEMMA2_WINDOW: Build = positional!(
    m::gemma2::Model,
    {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, "sliding_window": 3},
    |c, vb| m::gemma2::Model::new(false, c, vb)
);
pub const GEMMA3: Build = positional!(m::gemma3::Model, {}, |c, vb| m::gemma3::Model::new(false, c, vb));
pub const GEMMA3_WINDOW: Build =
    positional!(m::gemma3::Model, {"sliding_window": 3}, |c, vb| m::gemma3::Model::new(false, c, vb));
pub const STARCODER2: Build = positional!(
    m::starcoder2::Model,
    {"hidden_act": "gelu_pytorch_tanh"},
    |c, vb| m::starcoder2::Model::new(c, vb)
);
pub const STARCODER2_WINDOW: Build = positional!(
    m::starcoder2::Model,
    {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 3},
    |c, vb| m::starcoder2::Model::new(c, vb)
);
pub const PHI3: Build =
    positional!(m::phi3::Model, {"partial_rotary_factor": null}, |c, vb| m::phi3::Model::new(c, vb));
pub const HELIUM: Build = positional!(m::helium::Model, {}, |c, vb| m::helium::Model::new(c, vb));
pub const OLMO: Build = positional!(m::olmo::Model, {}, |c, vb| m::olmo::Model::new(c, vb));
pub const OLMO2: Build = positional!(m::olmo2::Model, {}, |c, vb| m::olmo2::Model::new(c, vb));
pub const STABLE_LM: Build = positional!(m::stable_lm::Model, {}, |c, vb| m::stable_lm::Model::new(c, vb));
pub const GLM4_NEW: Build = positional!(m::glm4_new::ModelForCausalLM, {}, |c, vb| {
    m::glm4_new::ModelForCausalLM::new(c, vb)
});

/// One layer, all of it local attention: `window / 2` earlier keys and the query's own.
pub const BASED_WINDOW: Build = positional!(
    m::based::Model,
    {
        "n_embd": 32, "n_inner": 64, "n_layer": 1, "n_head": 4, "alt_mixer_layers": [], "alt_mixer_2_layers": [0],
        "alt_mixer": {"num_heads": 4, "feature_dim": 8, "feature_map": {"input_dim": 8}},
        "alt_mixer_2": {"num_heads": 4, "window_size": 4}
    },
    |c, vb| m::based::Model::new(c, vb)
);

const DEEPSEEK2: &str = r#"{
    "norm_topk_prob": false, "n_shared_experts": 1, "n_routed_experts": 8, "q_lora_rank": null,
    "qk_rope_head_dim": 4, "kv_lora_rank": 16, "v_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5
}"#;

fn deepseek2(dtype: DType, changes: Value) -> Result<Decoder> {
    let mut all: Value = serde_json::from_str(DEEPSEEK2).expect("JSON");
    if let (Value::Object(all), Value::Object(changes)) = (&mut all, changes) {
        all.extend(changes);
    }
    let model = m::deepseek2::DeepSeekV2::new(&config(all), vb(dtype))?;
    decoder(model, |model, tokens, position| model.forward(tokens, position))
}

pub const DEEPSEEK2_PLAIN: Build = |dtype| deepseek2(dtype, json!({}));
pub const DEEPSEEK2_NORM: Build = |dtype| deepseek2(dtype, json!({"norm_topk_prob": true}));
pub const DEEPSEEK2_GROUPS: Build = |dtype| deepseek2(dtype, json!({"topk_method": "group_limited_greedy"}));

pub const QWEN3_VL: Build = |dtype| {
    let text: Value = config(json!({}));
    let vision = json!({
        "depth": 1, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16, "num_heads": 2,
        "patch_size": 2, "num_position_embeddings": 4
    });
    let config = config(json!({
        "text_config": text, "vision_config": vision, "image_token_id": 1, "video_token_id": 2,
        "vision_start_token_id": 3, "vision_end_token_id": 4
    }));
    decoder(
        m::qwen3_vl::Qwen3VLModel::new(&config, vb(dtype))?,
        |model, tokens, position| {
            let lens = vec![tokens.dim(1)?];
            model.forward(tokens, None, None, None, None, lens, vec![], vec![], &[position])
        },
    )
};

/// The three relatives of ChatGLM share their fields.
fn glm<C: DeserializeOwned>() -> C {
    config(json!({
        "num_layers": 2, "ffn_hidden_size": 48, "kv_channels": 8, "seq_length": 16, "rmsnorm": true,
        "apply_residual_connection_post_layernorm": false, "post_layer_norm": true, "add_bias_linear": false,
        "add_qkv_bias": true, "bias_dropout_fusion": true, "multi_query_attention": true,
        "multi_query_group_num": 2, "apply_query_key_layer_scaling": true, "attention_softmax_in_fp32": true,
        "fp32_residual_connection": false, "rope_ratio": 1
    }))
}

pub const GLM4: Build = |dtype| counting!(m::glm4::Model::new(&glm(), vb(dtype)), reset_kv_cache);
pub const CODEGEEX4: Build =
    |dtype| counting!(m::codegeex4_9b::Model::new(&glm(), vb(dtype)), reset_kv_cache);
pub const CHATGLM: Build = |dtype| {
    let config = m::chatglm::Config {
        num_layers: 2,
        padded_vocab_size: 40,
        hidden_size: 32,
        ffn_hidden_size: 48,
        kv_channels: 8,
        num_attention_heads: 4,
        seq_length: 16,
        multi_query_group_num: 2,
        ..m::chatglm::Config::glm3_6b()
    };
    counting!(m::chatglm::Model::new(&config, vb(dtype)), reset_kv_cache)
};
pub const PHI: Build = |dtype| counting!(m::phi::Model::new(&config(json!({})), vb(dtype)), clear_kv_cache);
pub const FALCON: Build = |dtype| {
    let config = m::falcon::Config {
        vocab_size: 40,
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        ..m::falcon::Config::falcon7b()
    };
    counting!(m::falcon::Falcon::load(vb(dtype), config), clear_kv_cache)
};

/// The one size that this crate can name, with a single layer's weights in all of them.
pub const MPT: Build = |dtype| {
    static WEIGHTS: LazyLock<Weights> = LazyLock::new(Weights::shared);
    let config = m::mpt::Config::replit_code_v1_5_3b();
    counting!(
        m::mpt::Model::new(&config, WEIGHTS.var_builder(dtype)),
        clear_kv_cache
    )
};

/// As MPT, but it takes a position.
pub const YI: Build = |dtype| {
    static WEIGHTS: LazyLock<Weights> = LazyLock::new(Weights::shared);
    let model = m::yi::Model::new(&m::yi::Config::config_6b(), WEIGHTS.var_builder(dtype))?;
    decoder(model, |model, tokens, position| model.forward(tokens, position))
};

fn mixformer() -> m::mixformer::Config {
    config(json!({
        "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_inner": null, "n_head": 4, "rotary_dim": 4,
        "activation_function": "gelu_new", "pad_vocab_size_multiple": 8
    }))
}

pub const MIXFORMER: Build = |dtype| {
    counting!(
        m::mixformer::MixFormerSequentialForCausalLM::new_v2(&mixformer(), vb(dtype)),
        clear_kv_cache
    )
};
pub const QUANTIZED_MIXFORMER: Build = |_| {
    let vb = gguf(|vb| m::mixformer::MixFormerSequentialForCausalLM::new_v2(&mixformer(), vb))?;
    counting!(
        m::quantized_mixformer::MixFormerSequentialForCausalLM::new_v2(&mixformer(), vb),
        clear_kv_cache
    )
};

fn quantized_mistral(changes: Value) -> Result<Decoder> {
    let config = &config(changes);
    let vb = gguf(|vb| m::mistral::Model::new(config, vb))?;
    decoder(
        m::quantized_mistral::Model::new(config, vb)?,
        |model, tokens, position| model.forward(tokens, position),
    )
}

pub const QUANTIZED_MISTRAL: Build = |_| quantized_mistral(json!({}));
pub const QUANTIZED_MISTRAL_WINDOW: Build = |_| quantized_mistral(json!({"sliding_window": 3}));
pub const QUANTIZED_STABLE_LM: Build = |_| {
    let config = &config(json!({}));
    let vb = gguf(|vb| m::stable_lm::Model::new(config, vb))?;
    decoder(
        m::quantized_stable_lm::Model::new(config, vb)?,
        |model, tokens, position| model.forward(tokens, position),
    )
};
