//! GGUF files made in memory, of the tiny model or of whatever a test wants.

use super::draft::Draft;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use candle_mmfp4::fp4::{Factor, Format, Fp4Tensor, ScaleRule, quantize};
use safetensors::Dtype;
use std::borrow::Cow;

pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const BF16: u32 = 30;
pub const MXFP4: u32 = 39;
pub const NVFP4: u32 = 40;

/// A metadata value: its type's number, and its bytes.
pub type Value = (u32, Vec<u8>);

pub fn u32_value(value: u32) -> Value {
    (4, value.to_le_bytes().into())
}

pub fn f32_value(value: f32) -> Value {
    (6, value.to_le_bytes().into())
}

pub fn bool_value(value: bool) -> Value {
    (7, vec![value.into()])
}

pub fn text_value(value: &str) -> Value {
    (8, text(value))
}

pub fn texts_value(values: &[&str]) -> Value {
    let mut bytes = 8u32.to_le_bytes().to_vec();
    bytes.extend((values.len() as u64).to_le_bytes());
    values.iter().for_each(|value| bytes.extend(text(value)));
    (9, bytes)
}

pub fn f32s_value(values: &[f32]) -> Value {
    let mut bytes = 6u32.to_le_bytes().to_vec();
    bytes.extend((values.len() as u64).to_le_bytes());
    values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    (9, bytes)
}

pub fn i32s_value(values: &[i32]) -> Value {
    let mut bytes = 5u32.to_le_bytes().to_vec();
    bytes.extend((values.len() as u64).to_le_bytes());
    values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    (9, bytes)
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

/// A tensor: shape with the slowest dimension first, the type's number, bytes.
#[derive(Clone)]
pub struct Stored {
    pub name: String,
    pub shape: Vec<usize>,
    pub kind: u32,
    pub bytes: Vec<u8>,
}

/// A GGUF file in memory, to be changed and written.
#[derive(Clone)]
pub struct Gguf {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<Stored>,
    pub alignment: usize,
}

/// A weight as a file has it: the type's number, bytes, and a factor if it has one.
pub struct Packed {
    pub kind: u32,
    pub bytes: Vec<u8>,
    pub factor: Option<f32>,
}

impl Gguf {
    /// The file's bytes; nothing follows the last tensor.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, (kind, value)) in &self.metadata {
            bytes.extend(text(key));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            bytes.extend(text(&tensor.name));
            bytes.extend((tensor.shape.len() as u32).to_le_bytes());
            for size in tensor.shape.iter().rev() {
                bytes.extend((*size as u64).to_le_bytes());
            }
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend((data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
        }
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend(data);
        bytes
    }

    pub fn get(&mut self, name: &str) -> &mut Stored {
        let found = self.tensors.iter_mut().find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("{name}"))
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.into(), value));
    }

    pub fn remove(&mut self, key: &str) {
        self.metadata.retain(|(name, _)| name != key);
    }

    /// The tiny model, its linear layers as `pack` has them; `kv_b` in halves, keys transposed, where `split` says so.
    pub fn tiny(split: bool, pack: impl Fn((usize, usize), &[f32]) -> Packed) -> Self {
        Self::of(&Draft::plain(), split, pack)
    }

    /// The same of another model in BF16.
    pub fn of(draft: &Draft, split: bool, pack: impl Fn((usize, usize), &[f32]) -> Packed) -> Self {
        let mut file = Self {
            metadata: metadata(&draft.config, split),
            tensors: Vec::new(),
            alignment: 32,
        };
        for (name, tensor) in &draft.tensors {
            let values = floats(tensor);
            let Some(module) = linear(name) else {
                let (kind, bytes) = match tensor.shape.len() {
                    // Norms and biases.
                    1 => (F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
                    _ => (BF16, tensor.bytes.clone()),
                };
                let name = theirs(name);
                let shape = tensor.shape.clone();
                file.tensors.push(Stored {
                    name,
                    shape,
                    kind,
                    bytes,
                });
                continue;
            };
            let (n, k) = (tensor.shape[0], tensor.shape[1]);
            if split && let Some(layer) = module.strip_suffix(".attn_kv_b") {
                let [heads, nope, value] = ["num_attention_heads", "qk_nope_head_dim", "v_head_dim"]
                    .map(|key| size(&draft.config, key));
                // A head's rows of keys, and its rows of values.
                let (keys, values): (Vec<_>, Vec<_>) = values
                    .chunks((nope + value) * k)
                    .map(|head| head.split_at(nope * k))
                    .unzip();
                let turned = keys
                    .iter()
                    .flat_map(|rows| (0..k).flat_map(move |c| (0..nope).map(move |r| rows[r * k + c])));
                file.add(
                    &format!("{layer}.attn_k_b"),
                    &[heads, k, nope],
                    pack((heads * k, nope), &turned.collect::<Vec<_>>()),
                );
                file.add(
                    &format!("{layer}.attn_v_b"),
                    &[heads, value, k],
                    pack((heads * value, k), &values.concat()),
                );
                continue;
            }
            let packed = pack((n, k), &values);
            match module.split_once("#") {
                Some((module, _)) => file.stack(module, &[n, k], packed),
                None => file.add(&module, &[n, k], packed),
            }
        }
        file
    }

    fn add(&mut self, module: &str, shape: &[usize], packed: Packed) {
        let name = |part: &str| format!("{module}.{part}");
        if let Some(factor) = packed.factor {
            let bytes = factor.to_le_bytes().into();
            self.tensors.push(Stored {
                name: name("scale"),
                shape: vec![1],
                kind: F32,
                bytes,
            });
        }
        let Packed { kind, bytes, .. } = packed;
        self.tensors.push(Stored {
            name: name("weight"),
            shape: shape.into(),
            kind,
            bytes,
        });
    }

    /// The next of a stack of experts.
    fn stack(&mut self, module: &str, shape: &[usize], packed: Packed) {
        let name = format!("{module}.weight");
        if !self.tensors.iter().any(|tensor| tensor.name == name) {
            let shape = [&[1], shape].concat();
            return self.add(module, &shape, packed);
        }
        let tensor = self.get(&name);
        tensor.shape[0] += 1;
        tensor.bytes.extend(&packed.bytes);
        if let Some(factor) = packed.factor {
            let scale = self.get(&format!("{module}.scale"));
            scale.shape[0] += 1;
            scale.bytes.extend(factor.to_le_bytes());
        }
    }
}

/// A size that a `config.json` says.
fn size(config: &serde_json::Value, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
}

/// The metadata of a model with such a `config.json`, a few more than are read.
fn metadata(config: &serde_json::Value, split: bool) -> Vec<(String, Value)> {
    let number = |value: &serde_json::Value| f32_value(value.as_f64().unwrap() as f32);
    let mut all = vec![
        ("general.architecture".into(), text_value("deepseek2")),
        ("general.name".into(), text_value("tiny")),
        ("tokenizer.ggml.tokens".into(), texts_value(&["a", "", "für"])),
        ("tokenizer.ggml.scores".into(), f32s_value(&[0.0, 1.0, 2.0])),
        ("tokenizer.ggml.eos_token_id".into(), u32_value(1)),
        (
            "deepseek2.expert_weights_scale".into(),
            number(&config["routed_scaling_factor"]),
        ),
        ("deepseek2.expert_weights_norm".into(), bool_value(true)),
        (
            "deepseek2.rope.freq_base".into(),
            number(&config["rope_parameters"]["rope_theta"]),
        ),
        (
            "deepseek2.attention.layer_norm_rms_epsilon".into(),
            number(&config["rms_norm_eps"]),
        ),
    ];
    let kinds = config["mlp_layer_types"].as_array().unwrap();
    let dense = kinds.iter().take_while(|kind| **kind == "dense").count();
    let of = |key| size(config, key);
    let sizes = [
        ("vocab_size", of("vocab_size")),
        ("context_length", of("max_position_embeddings")),
        ("block_count", of("num_hidden_layers")),
        ("leading_dense_block_count", dense),
        ("embedding_length", of("hidden_size")),
        ("feed_forward_length", of("intermediate_size")),
        ("expert_feed_forward_length", of("moe_intermediate_size")),
        ("expert_count", of("n_routed_experts")),
        ("expert_used_count", of("num_experts_per_tok")),
        ("expert_shared_count", of("n_shared_experts")),
        ("expert_gating_func", 2),
        ("attention.head_count", of("num_attention_heads")),
        ("attention.head_count_kv", 1),
        ("attention.q_lora_rank", of("q_lora_rank")),
        ("attention.kv_lora_rank", of("kv_lora_rank")),
        ("rope.dimension_count", of("qk_rope_head_dim")),
    ];
    let (keys, values) = (of("qk_nope_head_dim") + of("qk_rope_head_dim"), of("v_head_dim"));
    let latents = of("kv_lora_rank");
    // Of joined keys and values, a head's; else those of the one head of latents, and a head's under names of their own.
    let lengths: &[(&str, usize)] = match split {
        false => &[("attention.key_length", keys), ("attention.value_length", values)],
        true => &[
            ("attention.key_length", latents + of("qk_rope_head_dim")),
            ("attention.value_length", latents),
            ("attention.key_length_mla", keys),
            ("attention.value_length_mla", values),
        ],
    };
    for (key, size) in sizes.iter().chain(lengths) {
        all.push((format!("deepseek2.{key}"), u32_value(*size as u32)));
    }
    all
}

/// What llama.cpp calls a linear layer, an expert's with its number behind `#`; `None` for all else.
fn linear(name: &str) -> Option<String> {
    let (layer, module) = name
        .strip_prefix("model.layers.")?
        .strip_suffix(".weight")?
        .split_once('.')?;
    let (module, expert) = match module.strip_prefix("mlp.experts.") {
        Some(expert) => expert.split_once('.').map(|(index, part)| (part, Some(index)))?,
        None => (module, None),
    };
    let theirs = match (module, expert) {
        ("self_attn.q_a_proj", _) => "attn_q_a",
        ("self_attn.q_b_proj", _) => "attn_q_b",
        ("self_attn.kv_a_proj_with_mqa", _) => "attn_kv_a_mqa",
        ("self_attn.kv_b_proj", _) => "attn_kv_b",
        ("self_attn.o_proj", _) => "attn_output",
        ("mlp.gate_proj", _) => "ffn_gate",
        ("mlp.up_proj", _) => "ffn_up",
        ("mlp.down_proj", _) => "ffn_down",
        ("mlp.shared_experts.gate_proj", _) => "ffn_gate_shexp",
        ("mlp.shared_experts.up_proj", _) => "ffn_up_shexp",
        ("mlp.shared_experts.down_proj", _) => "ffn_down_shexp",
        ("gate_proj", Some(_)) => "ffn_gate_exps",
        ("up_proj", Some(_)) => "ffn_up_exps",
        ("down_proj", Some(_)) => "ffn_down_exps",
        _ => return None,
    };
    let number = expert.map_or(String::new(), |index| format!("#{index}"));
    Some(format!("blk.{layer}.{theirs}{number}"))
}

/// What llama.cpp calls the tensors that are no linear layer's.
fn theirs(name: &str) -> String {
    let top = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => "",
    };
    if !top.is_empty() {
        return top.into();
    }
    let (layer, rest) = name
        .strip_prefix("model.layers.")
        .unwrap()
        .split_once('.')
        .unwrap();
    let rest = match rest {
        "input_layernorm.weight" => "attn_norm.weight",
        "post_attention_layernorm.weight" => "ffn_norm.weight",
        "self_attn.q_a_layernorm.weight" => "attn_q_a_norm.weight",
        "self_attn.kv_a_layernorm.weight" => "attn_kv_a_norm.weight",
        "mlp.gate.weight" => "ffn_gate_inp.weight",
        "mlp.gate.e_score_correction_bias" => "exp_probs_b.bias",
        other => panic!("{other}"),
    };
    format!("blk.{layer}.{rest}")
}

fn floats(tensor: &super::draft::Stored) -> Vec<f32> {
    let bf16 = |b: &[u8]| half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
    let f32 = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    match tensor.dtype {
        Dtype::BF16 => tensor.bytes.chunks_exact(2).map(bf16).collect(),
        // Routers' corrections.
        Dtype::F32 if tensor.shape.len() == 1 => tensor.bytes.chunks_exact(4).map(f32).collect(),
        other => panic!("{other:?} {:?}", tensor.shape),
    }
}

/// In F16.
pub fn f16(_: (usize, usize), values: &[f32]) -> Packed {
    let bytes = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes());
    Packed {
        kind: F16,
        bytes: bytes.collect(),
        factor: None,
    }
}

/// In MXFP4 blocks of the codes that this crate chooses.
pub fn mxfp4(shape: (usize, usize), values: &[f32]) -> Packed {
    let tensor = quantize("w", values, shape, Format::mxfp4(), ScaleRule::default()).unwrap();
    Packed {
        kind: MXFP4,
        bytes: blocks(&tensor, 1),
        factor: None,
    }
}

/// In NVFP4 blocks of the codes that this crate chooses.
pub fn nvfp4(shape: (usize, usize), values: &[f32]) -> Packed {
    let tensor = quantize("w", values, shape, Format::nvfp4(), ScaleRule::default()).unwrap();
    let factor = match tensor.factor() {
        Factor::Mul(factor) => Some(factor),
        other => panic!("{other:?}"),
    };
    Packed {
        kind: NVFP4,
        bytes: blocks(&tensor, 4),
        factor,
    }
}

/// Blocks of so many groups: scales, then each group's codes, the first half below and the second above.
fn blocks(tensor: &Fp4Tensor, groups: usize) -> Vec<u8> {
    let half = tensor.group() / 2;
    let code = |byte: &[u8], i: usize| byte[i / 2] >> (4 * (i % 2)) & 15;
    let mut bytes = Vec::new();
    let codes = tensor.codes().chunks_exact(groups * half);
    for (scales, codes) in tensor.scales().chunks_exact(groups).zip(codes) {
        bytes.extend(scales);
        for group in codes.chunks_exact(half) {
            bytes.extend((0..half).map(|j| code(group, j) | code(group, j + half) << 4));
        }
    }
    bytes
}

/// In integers, those of 256 where K allows it, else the others.
pub fn integers(by_256: GgmlDType, by_32: GgmlDType) -> impl Fn((usize, usize), &[f32]) -> Packed {
    move |shape, values| {
        let kind = if shape.1.is_multiple_of(256) {
            by_256
        } else {
            by_32
        };
        let tensor = Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let tensor = QTensor::quantize(&tensor, kind).unwrap();
        Packed {
            kind: number(kind),
            bytes: tensor.data().unwrap().to_vec(),
            factor: None,
        }
    }
}

/// What Candle makes of integers.
pub fn decoded(packed: &Packed, shape: (usize, usize)) -> Vec<f32> {
    let kind = [GgmlDType::Q5_0, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K];
    let kind = kind
        .into_iter()
        .find(|kind| number(*kind) == packed.kind)
        .unwrap();
    let storage = QStorage::from_data(Cow::Borrowed(&packed.bytes), &Device::Cpu, kind).unwrap();
    let tensor = QTensor::new(storage, shape)
        .unwrap()
        .dequantize(&Device::Cpu)
        .unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn number(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q4K => 12,
        GgmlDType::Q6K => 14,
        other => panic!("{other:?}"),
    }
}
