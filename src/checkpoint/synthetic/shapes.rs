//! The tensors of a `glm4_moe_lite` checkpoint, by its config alone.

use super::Precision;
use super::source::Content;
use crate::checkpoint::layout::Entry;
use crate::fp4::Format;
use crate::models::glm4_moe_lite::{Config, Layer};
use safetensors::Dtype;

/// What stands before and after the layers.
pub(super) fn outside(config: &Config, precision: Precision) -> Vec<Tensor> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let tied = config.tie_word_embeddings;
    // As an output head it is to give logits of unit size.
    let unit = 1.0 / (hidden as f32).sqrt();
    let rms = if tied { unit } else { 1.0 };
    let mut tensors = vec![
        Tensor::new("model.embed_tokens", Kind::Random { rms }, vec![vocab, hidden]),
        Tensor::norm("model.norm", hidden),
    ];
    match (tied, precision) {
        (true, _) => {}
        (false, Precision::Bf16Head | Precision::Bf16) => tensors.push(Tensor::new(
            "lm_head",
            Kind::Random { rms: unit },
            vec![vocab, hidden],
        )),
        (false, Precision::Mmfp4) => tensors.push(Tensor::linear("lm_head", vocab, hidden, 1.0)),
    }
    tensors
}

/// The weights of one layer.
pub(super) fn layer(config: &Config, index: usize, precision: Precision) -> Vec<Tensor> {
    let hidden = config.hidden_size;
    let heads = config.num_attention_heads;
    let head = config.qk_nope_head_dim + config.qk_rope_head_dim;
    // What a layer adds twice to the residual stream; that many of unit size would grow it by the root of twice
    // the depth.
    let added = 1.0 / (2.0 * config.layers.len() as f32).sqrt();
    let name = |part: &str| format!("model.layers.{index}.{part}");
    let attention = |part: &str| name(&format!("self_attn.{part}"));
    let linear = |module: String, n: usize, k: usize, gain: f32| match precision {
        Precision::Mmfp4 | Precision::Bf16Head => Tensor::linear(module, n, k, gain),
        Precision::Bf16 => {
            let rms = gain / (k as f32).sqrt();
            Tensor::new(module, Kind::Random { rms }, vec![n, k])
        }
    };
    let (latent, value) = (config.kv_lora_rank, config.v_head_dim);
    let mut tensors = vec![
        Tensor::norm(name("input_layernorm"), hidden),
        Tensor::norm(name("post_attention_layernorm"), hidden),
        linear(attention("kv_a_proj_with_mqa"), config.cache_width(), hidden, 1.0),
        Tensor::norm(attention("kv_a_layernorm"), latent),
        linear(
            attention("kv_b_proj"),
            heads * (config.qk_nope_head_dim + value),
            latent,
            1.0,
        ),
        linear(attention("o_proj"), hidden, heads * value, added),
    ];
    match config.q_lora_rank {
        None => tensors.push(linear(attention("q_proj"), heads * head, hidden, 1.0)),
        Some(rank) => tensors.extend([
            linear(attention("q_a_proj"), rank, hidden, 1.0),
            Tensor::norm(attention("q_a_layernorm"), rank),
            linear(attention("q_b_proj"), heads * head, rank, 1.0),
        ]),
    }
    let mut mlp = |module: &str, width: usize| {
        let part = |part: &str| name(&format!("{module}.{part}"));
        tensors.extend([
            linear(part("gate_proj"), width, hidden, 1.0),
            linear(part("up_proj"), width, hidden, 1.0),
            linear(part("down_proj"), hidden, width, added),
        ]);
    };
    if config.layers[index] == Layer::Dense {
        mlp("mlp", config.intermediate_size);
        return tensors;
    }
    for expert in 0..config.n_routed_experts {
        mlp(&format!("mlp.experts.{expert}"), config.moe_intermediate_size);
    }
    if config.n_shared_experts > 0 {
        mlp(
            "mlp.shared_experts",
            config.moe_intermediate_size * config.n_shared_experts,
        );
    }
    let experts = config.n_routed_experts;
    let rms = 1.0 / (hidden as f32).sqrt();
    tensors.push(Tensor::new(
        name("mlp.gate"),
        Kind::Random { rms },
        vec![experts, hidden],
    ));
    tensors.push(Tensor::new(name("mlp.gate"), Kind::CorrectionBias, vec![experts]));
    tensors
}

/// A weight of the model, of one tensor or two.
pub(super) struct Tensor {
    pub(super) module: String,
    kind: Kind,
    shape: Vec<usize>,
}

#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// MMFP4 whose outputs are `gain` times as large as its inputs.
    Linear { gain: f32 },
    /// BF16, uniform around 0.
    Random { rms: f32 },
    /// BF16 ones.
    Norm,
    /// F32 zeros.
    CorrectionBias,
}

impl Tensor {
    fn new(module: impl Into<String>, kind: Kind, shape: Vec<usize>) -> Self {
        Self {
            module: module.into(),
            kind,
            shape,
        }
    }

    fn linear(module: impl Into<String>, n: usize, k: usize, gain: f32) -> Self {
        Self::new(module, Kind::Linear { gain }, vec![n, k])
    }

    fn norm(module: impl Into<String>, len: usize) -> Self {
        Self::new(module, Kind::Norm, vec![len])
    }

    pub(super) fn size(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        match self.kind {
            Kind::Linear { .. } => elements / 2 + elements / Format::mmfp4().group * 2,
            Kind::Random { .. } | Kind::Norm => elements * 2,
            Kind::CorrectionBias => elements * 4,
        }
    }

    pub(super) fn entries(self) -> Vec<Entry<Content>> {
        let size = self.size();
        let one = |suffix: &str, dtype, shape, content| {
            vec![Entry::new(
                format!("{}.{suffix}", self.module),
                dtype,
                shape,
                size,
                content,
            )]
        };
        match self.kind {
            Kind::Linear { gain } => {
                let (n, k) = (self.shape[0], self.shape[1]);
                let rms = gain / (k as f32).sqrt();
                Entry::mmfp4(
                    &self.module,
                    (n, k),
                    Format::mmfp4(),
                    Content::Codes,
                    Content::Scales { rms },
                )
                .into()
            }
            Kind::Random { rms } => one("weight", Dtype::BF16, self.shape, Content::Uniform { rms }),
            Kind::Norm => one("weight", Dtype::BF16, self.shape, Content::Ones),
            Kind::CorrectionBias => one("e_score_correction_bias", Dtype::F32, self.shape, Content::Zeros),
        }
    }
}
