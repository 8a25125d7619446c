//! The model in each layout that is read.

use super::model::{self, EXPERTS, HEADS, Linear, NOPE, VALUE, WIDTH};
use crate::common::gguf::{self, Gguf};
use candle_mmfp4::checkpoint::ModelFiles;
use candle_mmfp4::fp4::Bytes;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// What messages call the folder.
pub const ROOT: &str = "hostile";
pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const GGUF: &str = "model.gguf";
/// The small files beside `config.json`.
pub const TEXTS: [&str; 5] = [
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "quantization_config.json",
];
const SHARDS: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

/// A tensor of a safetensors file.
#[derive(Clone)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A model folder, to be changed and read.
#[derive(Clone)]
pub struct Folder {
    pub layout: &'static str,
    /// What is in it, by name.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Of a safetensors checkpoint in one file, what `files` has of it.
    pub tensors: Vec<Stored>,
    /// Of a GGUF file, the same.
    pub gguf: Option<Gguf>,
    /// The names that a GGUF file's tensors have when they have been read.
    pub ours: BTreeMap<String, String>,
}

impl Folder {
    fn new(layout: &'static str) -> Self {
        let mut files = BTreeMap::from_iter(model::texts());
        files.insert("config.json".into(), model::config().to_string().into_bytes());
        Self {
            layout,
            files,
            tensors: Vec::new(),
            gguf: None,
            ours: BTreeMap::new(),
        }
    }

    fn of_tensors(layout: &'static str, tensors: Vec<Stored>) -> Self {
        let mut folder = Self::new(layout);
        folder.tensors = tensors;
        folder.write_tensors();
        folder
    }

    /// Puts what `tensors` or `gguf` says into the file.
    pub fn write_tensors(&mut self) {
        match &self.gguf {
            Some(gguf) => self.files.insert(GGUF.into(), gguf.bytes()),
            None => self.files.insert(SINGLE.into(), serialized(&self.tensors)),
        };
    }

    /// Writes the files to a folder, which is made where it is not there.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)?;
        let mut files = self.files.iter();
        files.try_for_each(|(name, bytes)| std::fs::write(path.join(name), bytes))
    }

    /// Bytes of all files.
    pub fn size(&self) -> usize {
        self.files.values().map(Vec::len).sum()
    }

    /// The folder as a program has it that holds its files in memory.
    pub fn in_memory(&self) -> ModelFiles {
        let copied = |(name, bytes): (&String, &Vec<u8>)| (name.clone(), Bytes::copy_from(bytes).unwrap());
        ModelFiles::in_memory(ROOT, self.files.iter().map(copied))
    }
}

/// One folder of each layout.
pub fn all() -> Vec<Folder> {
    vec![
        plain(),
        of_linears("marlin", |linear| {
            vec![
                codes(linear, "weight", Dtype::U32),
                scales(linear, "scales", Dtype::F16, 64),
            ]
        }),
        // Under its other names, and with scales that lie the other way round.
        of_linears("marlin-turned", |linear| {
            let mut scales = scales(linear, "weight.scales", Dtype::BF16, 16);
            scales.shape.reverse();
            vec![codes(linear, "qweight", Dtype::I32), scales]
        }),
        of_linears("compressed-nvfp4", |linear| {
            vec![
                codes(linear, "weight_packed", Dtype::U8),
                scales(linear, "weight_scale", Dtype::F8_E4M3, 16),
                number(linear, "weight_global_scale", 64.0),
                number(linear, "input_global_scale", 64.0),
            ]
        }),
        of_linears("compressed-mxfp4", |linear| {
            vec![
                codes(linear, "weight_packed", Dtype::U8),
                scales(linear, "weight_scale", Dtype::U8, 32),
            ]
        }),
        of_linears("modelopt", |linear| {
            vec![
                codes(linear, "weight", Dtype::U8),
                scales(linear, "weight_scale", Dtype::F8_E4M3, 16),
                number(linear, "weight_scale_2", 1.0 / 64.0),
                number(linear, "input_scale", 1.0),
            ]
        }),
        stacked("mlx-mxfp4", 32),
        stacked("mlx-nvfp4", 16),
        two_files(),
        in_gguf("gguf-mxfp4", gguf::MXFP4, |weights| {
            (weights / 32, [&[120; 1][..], &[0x5a; 16]].concat())
        }),
        in_gguf("gguf-nvfp4", gguf::NVFP4, |weights| {
            (weights / 64, [&[0x38; 4][..], &[0x5a; 32]].concat())
        }),
        // Q8_0: a scale in F16 and 32 bytes.
        in_gguf("gguf-q8_0", 8, |weights| {
            (weights / 32, [&[0, 0x20][..], &[3; 32]].concat())
        }),
        in_gguf("gguf-bf16", gguf::BF16, |weights| (weights, vec![0x80, 0x3c])),
    ]
}

/// A folder by the name of its layout.
pub fn find(layout: &str) -> Folder {
    let found = all().into_iter().find(|folder| folder.layout == layout);
    found.unwrap_or_else(|| panic!("{layout}"))
}

fn plain() -> Folder {
    let mut tensors = floats();
    let linears = model::linears().into_iter();
    tensors.extend(linears.map(|(module, n, k)| float(format!("{module}.weight"), vec![n, k])));
    Folder::of_tensors("bf16", tensors)
}

fn of_linears(layout: &'static str, write: impl Fn(&Linear) -> Vec<Stored>) -> Folder {
    let mut tensors = floats();
    tensors.extend(model::linears().iter().flat_map(write));
    Folder::of_tensors(layout, tensors)
}

/// MLX's: experts in one tensor, `kv_b` in halves.
fn stacked(layout: &'static str, group: usize) -> Folder {
    let mut tensors = floats();
    let mut add = |module: &str, leading: &[usize], n: usize, k: usize| {
        let rows = leading.iter().product::<usize>() * n;
        let whole = (module.to_string(), rows, k);
        for mut stored in [
            codes(&whole, "weight", Dtype::U32),
            scales(&whole, "scales", Dtype::U8, group),
        ] {
            stored.shape = [leading, &[n, stored.shape[1]]].concat();
            tensors.push(stored);
        }
    };
    for (module, n, k) in model::linears() {
        if let Some(layer) = module.strip_suffix(".kv_b_proj") {
            add(&format!("{layer}.embed_q"), &[HEADS], WIDTH, NOPE);
            add(&format!("{layer}.unembed_out"), &[HEADS], VALUE, WIDTH);
        } else if let Some((layer, part)) = module.split_once(".experts.0.") {
            add(&format!("{layer}.switch_mlp.{part}"), &[EXPERTS], n, k);
        } else if !module.contains(".experts.") {
            add(&module, &[], n, k);
        }
    }
    Folder::of_tensors(layout, tensors)
}

/// Two files and an index.
fn two_files() -> Folder {
    let mut folder = plain();
    folder.layout = "two-files";
    folder.files.remove(SINGLE);
    let tensors = std::mem::take(&mut folder.tensors);
    let mut weight_map = serde_json::Map::new();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    for (name, tensors) in SHARDS.iter().zip([first, second]) {
        folder.files.insert(name.to_string(), serialized(tensors));
        weight_map.extend(tensors.iter().map(|stored| (stored.name.clone(), (*name).into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    folder.files.insert(INDEX.into(), index.to_string().into_bytes());
    folder
}

/// llama.cpp's; `blocks` says how many blocks so many weights are, and what each is.
fn in_gguf(layout: &'static str, kind: u32, blocks: impl Fn(usize) -> (usize, Vec<u8>)) -> Folder {
    let mut folder = Folder::new(layout);
    // It needs nothing beside it.
    folder.files.clear();
    let mut file = Gguf {
        metadata: metadata(),
        tensors: Vec::new(),
        alignment: 32,
    };
    let mut add = |theirs: String, ours: &str, shape: Vec<usize>, kind: u32, bytes: Vec<u8>| {
        folder.ours.insert(theirs.clone(), ours.to_string());
        file.tensors.push(gguf::Stored {
            name: theirs,
            shape,
            kind,
            bytes,
        });
    };
    for (name, shape) in model::floats() {
        let elements = shape.iter().product();
        add(
            their_name(&name),
            &name,
            shape,
            gguf::F32,
            0.5f32.to_le_bytes().repeat(elements),
        );
    }
    for (module, n, k) in model::linears() {
        let (leading, module) = match module.split_once(".experts.") {
            Some((layer, expert)) => match expert.strip_prefix("0.") {
                Some(part) => (vec![EXPERTS], format!("{layer}.switch_mlp.{part}")),
                None => continue,
            },
            None => (vec![], module),
        };
        let weights = leading.iter().product::<usize>() * n * k;
        let (count, block) = blocks(weights);
        let name = format!("{module}.weight");
        let shape = [&leading[..], &[n, k]].concat();
        add(their_name(&name), &module, shape, kind, block.repeat(count));
    }
    folder.gguf = Some(file);
    folder.write_tensors();
    folder
}

fn metadata() -> Vec<(String, gguf::Value)> {
    let sizes = [
        ("vocab_size", model::VOCABULARY),
        ("context_length", 64),
        ("block_count", 2),
        ("leading_dense_block_count", 1),
        ("nextn_predict_layers", 0),
        ("embedding_length", WIDTH),
        ("feed_forward_length", WIDTH),
        ("expert_feed_forward_length", WIDTH),
        ("expert_count", EXPERTS),
        ("expert_used_count", 1),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
        ("expert_group_count", 1),
        ("expert_group_used_count", 1),
        ("attention.head_count", HEADS),
        ("attention.q_lora_rank", WIDTH),
        ("attention.kv_lora_rank", WIDTH),
        ("attention.key_length", 48),
        ("attention.value_length", VALUE),
        ("rope.dimension_count", 16),
    ];
    let sizes = sizes.map(|(key, size)| (format!("deepseek2.{key}"), gguf::u32_value(size as u32)));
    let others = [
        ("general.architecture", gguf::text_value("deepseek2")),
        ("general.alignment", gguf::u32_value(32)),
        ("deepseek2.expert_weights_scale", gguf::f32_value(1.8)),
        ("deepseek2.expert_weights_norm", gguf::bool_value(true)),
        ("deepseek2.rope.freq_base", gguf::f32_value(1e6)),
        (
            "deepseek2.attention.layer_norm_rms_epsilon",
            gguf::f32_value(1e-5),
        ),
        ("tokenizer.ggml.model", gguf::text_value("gpt2")),
        ("tokenizer.ggml.pre", gguf::text_value("glm4")),
        (
            "tokenizer.ggml.tokens",
            gguf::texts_value(&["a", "<|end|>", "b", "ab"]),
        ),
        ("tokenizer.ggml.token_type", gguf::i32s_value(&[1, 3, 1, 1])),
        ("tokenizer.ggml.merges", gguf::texts_value(&["a b"])),
        ("tokenizer.ggml.scores", gguf::f32s_value(&[0.0, 1.0])),
        ("tokenizer.ggml.eos_token_id", gguf::u32_value(1)),
        (
            "tokenizer.chat_template",
            gguf::text_value("{{ messages[0].content }}"),
        ),
    ];
    sizes
        .into_iter()
        .chain(others.map(|(key, value)| (key.to_string(), value)))
        .collect()
}

/// llama.cpp's name of a tensor of ours.
fn their_name(ours: &str) -> String {
    const MODULES: [(&str, &str); 21] = [
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.norm", "output_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_a_layernorm", "attn_q_a_norm"),
        ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
        ("self_attn.q_a_proj", "attn_q_a"),
        ("self_attn.q_b_proj", "attn_q_b"),
        ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
        ("self_attn.kv_b_proj", "attn_kv_b"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate", "ffn_gate_inp"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
        ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
        ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
        ("mlp.switch_mlp.gate_proj", "ffn_gate_exps"),
        ("mlp.switch_mlp.up_proj", "ffn_up_exps"),
    ];
    if let Some(layer) = ours.strip_suffix(".mlp.gate.e_score_correction_bias") {
        return format!("{}.exp_probs_b.bias", layer.replace("model.layers", "blk"));
    }
    let module = ours.strip_suffix(".weight").expect("all others are weights");
    let (prefix, module) = match module
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'))
    {
        Some((layer, module)) => (format!("blk.{layer}."), module),
        None => (String::new(), module),
    };
    let theirs = MODULES.iter().find(|(name, _)| *name == module);
    format!(
        "{prefix}{}.weight",
        theirs.map_or("ffn_down_exps", |(_, theirs)| theirs)
    )
}

fn floats() -> Vec<Stored> {
    model::floats()
        .into_iter()
        .map(|(name, shape)| float(name, shape))
        .collect()
}

/// A tensor in BF16.
fn float(name: String, shape: Vec<usize>) -> Stored {
    Stored {
        bytes: [0x80, 0x3c].repeat(shape.iter().product()),
        dtype: Dtype::BF16,
        name,
        shape,
    }
}

/// Codes, two in a byte.
fn codes((module, n, k): &Linear, suffix: &str, dtype: Dtype) -> Stored {
    let elements = k / 2 / (dtype.bitsize() / 8);
    Stored {
        name: format!("{module}.{suffix}"),
        dtype,
        shape: vec![*n, elements],
        bytes: (0..n * k / 2).map(|i| (i * 37 % 251) as u8).collect(),
    }
}

/// A scale every `group`, each near 1.
fn scales((module, n, k): &Linear, suffix: &str, dtype: Dtype, group: usize) -> Stored {
    let one: &[u8] = match dtype {
        Dtype::F16 => &[0, 0x3c],
        Dtype::BF16 => &[0x80, 0x3f],
        Dtype::F8_E4M3 => &[0x38],
        _ => &[120],
    };
    Stored {
        name: format!("{module}.{suffix}"),
        dtype,
        shape: vec![*n, k / group],
        bytes: one.repeat(n * k / group),
    }
}

/// A factor.
fn number((module, ..): &Linear, suffix: &str, value: f32) -> Stored {
    Stored {
        name: format!("{module}.{suffix}"),
        dtype: Dtype::F32,
        shape: vec![1],
        bytes: value.to_le_bytes().into(),
    }
}

/// A safetensors file.
pub fn serialized(tensors: &[Stored]) -> Vec<u8> {
    let views = tensors.iter().map(|stored| {
        let view = TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes).unwrap();
        (stored.name.as_str(), view)
    });
    safetensors::serialize(views, None).unwrap()
}
