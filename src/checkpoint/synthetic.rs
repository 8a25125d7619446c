//! Random checkpoints of true shapes, for measuring speed and memory.

use super::disk;
use super::layout::{self, Entry, File, with_format_note, write_index, write_json};
use crate::fp4::{Format, code};
use crate::models::glm4_moe_lite::{Config, Layer};
use crate::random::Random;
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The most bytes of tensors in a file, whole layers aside.
const SHARD: usize = 4_000_000_000;
/// Random bytes made at a time: small enough for the second-level cache.
const PIECE: usize = 256 << 10;
const SEED: u64 = 47;

/// A `glm4_moe_lite` checkpoint of random weights, whose speed and memory are those of a real one of its shapes.
///
/// Every linear layer, `kv_b_proj` and the output head are in MMFP4, as [`quantize_folder`](super::quantize_folder)
/// lays it out; embeddings, routers and norms in BF16; correction biases are 0. Codes are uniform, and scales such that
/// activations keep a size of about 1 however many layers there are. There is no tokenizer. The same checkpoint is the
/// same byte for byte on every machine.
///
/// ```
/// use candle_mmfp4::checkpoint::Synthetic;
///
/// let full: Synthetic = "glm-4.7-flash".parse()?;
/// assert_eq!(full.config().layers.len(), 47);
/// assert_eq!(full.size_in_bytes() / 1_000_000_000, 15);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Synthetic {
    name: String,
    json: Value,
    config: Config,
}

impl Synthetic {
    /// The names that [`FromStr`](std::str::FromStr) knows: GLM-4.7-Flash, and its dense and first three sparse layers
    /// with the whole vocabulary.
    pub const NAMES: [&str; 2] = ["glm-4.7-flash", "slice"];

    /// A checkpoint of the shapes that a `config.json` describes.
    ///
    /// # Errors
    /// Those of [`Config::from_json`]; [`Error::Config`] for biases, and for a K of a linear layer that is not a
    /// multiple of MMFP4's group of 128.
    pub fn new(name: impl Into<String>, config: &Map<String, Value>) -> Result<Self> {
        let json = with_format_note(config.clone(), Format::mmfp4());
        let config = Config::from_json(&json)?;
        let refuse = |field: &str, value: String, problem: &str| {
            Err(Error::Config {
                field: field.into(),
                value,
                problem: problem.into(),
            })
        };
        if config.attention_bias {
            return refuse(
                "attention_bias",
                "true".into(),
                "synthetic checkpoints have no biases",
            );
        }
        let group = Format::mmfp4().group;
        let rows = [
            ("hidden_size", config.hidden_size),
            ("q_lora_rank", config.q_lora_rank.unwrap_or(group)),
            ("kv_lora_rank", config.kv_lora_rank),
            (
                "num_attention_heads · v_head_dim",
                config.num_attention_heads * config.v_head_dim,
            ),
            ("intermediate_size", config.intermediate_size),
            ("moe_intermediate_size", config.moe_intermediate_size),
        ];
        for (field, k) in rows {
            if !k.is_multiple_of(group) {
                return refuse(field, k.to_string(), "MMFP4 needs a multiple of 128");
            }
        }
        Ok(Self {
            name: name.into(),
            json,
            config,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of all its tensors.
    pub fn size_in_bytes(&self) -> u64 {
        self.files().iter().map(|(_, file)| file.data_size() as u64).sum()
    }

    /// Makes sure that the checkpoint is in `folder`, which is written where it is not there and appears whole or not
    /// at all. `progress` is told the bytes written, and those to write. Besides the headers no more than 512 KiB are
    /// held in memory.
    ///
    /// # Errors
    /// [`Error::DiskSpace`]; [`Error::Io`]; [`Error::File`] where something else is there.
    pub fn ensure(&self, folder: impl AsRef<Path>, progress: impl FnMut(u64, u64)) -> Result<()> {
        let folder = folder.as_ref();
        let files = self.files();
        if folder.exists() {
            return self.check(folder, &files);
        }
        disk::check_space(folder, self.size_in_bytes(), disk::free_space(folder))?;
        layout::write_folder(folder, |partial| self.write(partial, &files, progress))
    }

    /// Whether `folder` holds this checkpoint, by its config and its files' sizes.
    fn check(&self, folder: &Path, files: &[(String, File<Content>)]) -> Result<()> {
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap_or_default();
        let whole = files.iter().all(|(name, file)| {
            let size = (file.preamble().len() + file.data_size()) as u64;
            std::fs::metadata(folder.join(name)).is_ok_and(|found| found.len() == size)
        });
        if whole && config == layout::json_text(&self.json) {
            return Ok(());
        }
        let problem = format!(
            "expected the synthetic checkpoint {}, found something else",
            self.name
        );
        Err(Error::file(folder, problem, "remove it or choose another folder"))
    }

    fn write(
        &self,
        folder: &Path,
        files: &[(String, File<Content>)],
        mut progress: impl FnMut(u64, u64),
    ) -> Result<()> {
        let total = self.size_in_bytes();
        let mut done = 0;
        let mut source = Source::new();
        for (name, file) in files {
            file.write(&folder.join(name), |entry, put| {
                source.produce(entry, &mut |bytes| {
                    done += bytes.len() as u64;
                    progress(done, total);
                    put(bytes)
                })
            })?;
        }
        if files.len() > 1 {
            write_index(folder, files)?;
        }
        write_json(&folder.join("config.json"), &self.json)
    }

    /// The files by name: what is outside of the layers first, then as many layers a file as fit.
    fn files(&self) -> Vec<(String, File<Content>)> {
        let layers = (0..self.config.layers.len()).map(|index| self.layer(index));
        let mut shards: Vec<Vec<Tensor>> = vec![self.outside()];
        let size = |tensors: &[Tensor]| tensors.iter().map(Tensor::size).sum::<usize>();
        for layer in layers {
            match shards.last_mut() {
                Some(last) if size(last) + size(&layer) <= SHARD => last.extend(layer),
                _ => shards.push(layer),
            }
        }
        let count = shards.len();
        let files = shards.into_iter().enumerate().map(|(index, mut tensors)| {
            let name = match count {
                1 => "model.safetensors".to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            tensors.sort_by(|a, b| a.module.cmp(&b.module));
            (
                name,
                File::new(tensors.into_iter().flat_map(Tensor::entries).collect()),
            )
        });
        files.collect()
    }

    fn outside(&self) -> Vec<Tensor> {
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let unit = 1.0 / (hidden as f32).sqrt();
        let tied = self.config.tie_word_embeddings;
        let rms = if tied { unit } else { 1.0 };
        let mut tensors = vec![
            Tensor::new("model.embed_tokens", Kind::Random { rms }, vec![vocab, hidden]),
            Tensor::norm("model.norm", hidden),
        ];
        if !tied {
            tensors.push(Tensor::linear("lm_head", vocab, hidden, 1.0));
        }
        tensors
    }

    fn layer(&self, index: usize) -> Vec<Tensor> {
        let config = &self.config;
        let hidden = config.hidden_size;
        let heads = config.num_attention_heads;
        let head = config.qk_nope_head_dim + config.qk_rope_head_dim;
        // What a layer adds twice to the residual stream; that many of unit size would grow it by the root of twice
        // the depth.
        let added = 1.0 / (2.0 * config.layers.len() as f32).sqrt();
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let attention = |part: &str| name(&format!("self_attn.{part}"));
        let (latent, value) = (config.kv_lora_rank, config.v_head_dim);
        let mut tensors = vec![
            Tensor::norm(name("input_layernorm"), hidden),
            Tensor::norm(name("post_attention_layernorm"), hidden),
            Tensor::linear(attention("kv_a_proj_with_mqa"), config.cache_width(), hidden, 1.0),
            Tensor::norm(attention("kv_a_layernorm"), latent),
            Tensor::linear(
                attention("kv_b_proj"),
                heads * (config.qk_nope_head_dim + value),
                latent,
                1.0,
            ),
            Tensor::linear(attention("o_proj"), hidden, heads * value, added),
        ];
        match config.q_lora_rank {
            None => tensors.push(Tensor::linear(attention("q_proj"), heads * head, hidden, 1.0)),
            Some(rank) => tensors.extend([
                Tensor::linear(attention("q_a_proj"), rank, hidden, 1.0),
                Tensor::norm(attention("q_a_layernorm"), rank),
                Tensor::linear(attention("q_b_proj"), heads * head, rank, 1.0),
            ]),
        }
        let mut mlp = |module: &str, width: usize| {
            let part = |part: &str| name(&format!("{module}.{part}"));
            tensors.extend([
                Tensor::linear(part("gate_proj"), width, hidden, 1.0),
                Tensor::linear(part("up_proj"), width, hidden, 1.0),
                Tensor::linear(part("down_proj"), hidden, width, added),
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
}

impl std::str::FromStr for Synthetic {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let layers = match name {
            "glm-4.7-flash" => 47,
            "slice" => 4,
            _ => {
                let expected = Self::NAMES.join(" or ");
                return Err(Error::argument("synthetic", "name", expected, name));
            }
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
            Value::Object(config) => Self::new(name, config),
            other => Err(Error::argument(
                "synthetic",
                "config",
                "an object",
                other.to_string(),
            )),
        }
    }
}

/// A weight of the model, of one tensor or two.
struct Tensor {
    module: String,
    kind: Kind,
    shape: Vec<usize>,
}

#[derive(Clone, Copy)]
enum Kind {
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

    fn size(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        match self.kind {
            Kind::Linear { .. } => elements / 2 + elements / Format::mmfp4().group * 2,
            Kind::Random { .. } | Kind::Norm => elements * 2,
            Kind::CorrectionBias => elements * 4,
        }
    }

    fn entries(self) -> Vec<Entry<Content>> {
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

/// What a tensor's bytes are.
#[derive(Debug, Clone, Copy)]
enum Content {
    Codes,
    /// Scales of a weight of this root mean square, each within a quarter of their mean.
    Scales {
        rms: f32,
    },
    Uniform {
        rms: f32,
    },
    Ones,
    Zeros,
}

/// Where the bytes come from, piece by piece.
struct Source {
    random: Random,
    piece: Vec<u8>,
    halves: Vec<u8>,
}

impl Source {
    fn new() -> Self {
        Self {
            random: Random::new(SEED),
            piece: vec![0; PIECE / 2],
            halves: Vec::with_capacity(PIECE),
        }
    }

    fn produce(&mut self, entry: &Entry<Content>, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match entry.content {
            Content::Codes => {
                let mut left = entry.size;
                while left > 0 {
                    let piece = &mut self.piece[..left.min(PIECE / 2)];
                    self.random.fill(piece);
                    put(piece)?;
                    left -= piece.len();
                }
                Ok(())
            }
            Content::Scales { rms } => {
                let square = code::VALUES.iter().map(|value| value * value).sum::<f32>() / 16.0;
                let mean = rms / square.sqrt();
                self.halves(entry.size, put, |u| {
                    f16::from_f32(mean * (1.0 + u / 4.0)).to_le_bytes()
                })
            }
            Content::Uniform { rms } => {
                let bound = rms * 3f32.sqrt();
                self.halves(entry.size, put, |u| bf16::from_f32(bound * u).to_le_bytes())
            }
            Content::Ones => self.halves(entry.size, put, |_| bf16::ONE.to_le_bytes()),
            Content::Zeros => put(&vec![0; entry.size]),
        }
    }

    /// `size` bytes of 16-bit floats, each `value` of one of 256 numbers evenly spread over -1 to 1.
    fn halves(
        &mut self,
        size: usize,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
        value: impl Fn(f32) -> [u8; 2],
    ) -> Result<()> {
        let table: [[u8; 2]; 256] = std::array::from_fn(|index| value((2.0 * index as f32 - 255.0) / 255.0));
        let mut left = size / 2;
        while left > 0 {
            let piece = &mut self.piece[..left.min(PIECE / 2)];
            self.random.fill(piece);
            self.halves.clear();
            self.halves
                .extend(piece.iter().flat_map(|byte| table[usize::from(*byte)]));
            put(&self.halves)?;
            left -= piece.len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, LoadOptions, ModelFiles};
    use crate::fp4::Bytes;
    use crate::models::check_finite;
    use crate::models::glm4_moe_lite::{Logits, Model, Sequence};
    use crate::ops::ValueRange;
    use candle_core::Device;

    fn tiny(changes: &[(&str, Value)]) -> Result<Synthetic> {
        let Value::Object(mut config) = json!({
            "model_type": "glm4_moe_lite", "num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 384,
            "moe_intermediate_size": 128, "num_attention_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128,
            "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 64, "n_routed_experts": 8,
            "n_shared_experts": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 1.8, "rope_theta": 1e6,
            "rms_norm_eps": 1e-5, "vocab_size": 320, "max_position_embeddings": 512,
        }) else {
            unreachable!()
        };
        for (field, value) in changes {
            config.insert(field.to_string(), value.clone());
        }
        Synthetic::new("tiny", &config)
    }

    #[test]
    fn it_loads_whole_and_activations_keep_their_size() {
        let folder = tempfile::tempdir().unwrap();
        for (name, changes) in [
            ("deep", vec![("num_hidden_layers", json!(24))]),
            (
                "direct-and-tied",
                vec![
                    ("q_lora_rank", Value::Null),
                    ("tie_word_embeddings", json!(true)),
                    ("n_shared_experts", json!(0)),
                ],
            ),
        ] {
            let (synthetic, target) = (tiny(&changes).unwrap(), folder.path().join(name));
            let mut last = (0, 0);
            synthetic
                .ensure(&target, |done, total| last = (done, total))
                .unwrap();
            assert_eq!(last, (synthetic.size_in_bytes(), synthetic.size_in_bytes()));
            let (model, report) = Model::from_folder(&target, &LoadOptions::default(), &Device::Cpu).unwrap();
            assert!(report.unused.is_empty() && report.copied.is_empty(), "{report}");
            assert_eq!(
                (report.fp4.bytes + report.dense.bytes) as u64,
                synthetic.size_in_bytes()
            );
            let tokens: Vec<u32> = (0..40).map(|i| i * 7).collect();
            let mut alone = [Sequence {
                tokens: &tokens,
                position: 0,
                cache: None,
            }];
            let mut look =
                |site: crate::models::Site, input: &candle_core::Tensor, output: &candle_core::Tensor| {
                    check_finite(site, input, output)?;
                    let rms = output.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt();
                    assert!(
                        (0.02..4.0).contains(&rms),
                        "{site}: {rms}, {}",
                        ValueRange::of(output)?
                    );
                    Ok(())
                };
            let logits = model
                .forward_batch(&mut alone, Logits::All, Some(&mut look))
                .unwrap();
            assert_eq!(logits.dims(), [40, 320]);
        }
    }

    #[test]
    fn the_same_bytes_each_time_in_aligned_shards() {
        let folder = tempfile::tempdir().unwrap();
        let synthetic = tiny(&[]).unwrap();
        let read = |name: &str| {
            let target = folder.path().join(name);
            synthetic.ensure(&target, |_, _| {}).unwrap();
            std::fs::read(target.join("model.safetensors")).unwrap()
        };
        let first = read("a");
        assert_eq!(first, read("b"));
        let checkpoint = Checkpoint::open(folder.path().join("a")).unwrap();
        for (name, stored) in checkpoint.tensors() {
            assert_eq!(stored.bytes.offset() % 16, 0, "{name}");
        }
        let experts: Vec<_> = checkpoint
            .tensors_with_prefix("model.layers.1.mlp.experts.")
            .collect();
        let start = experts.iter().map(|(_, t)| t.bytes.offset()).min().unwrap();
        let end = experts
            .iter()
            .map(|(_, t)| t.bytes.offset() + t.bytes.len())
            .max()
            .unwrap();
        assert_eq!(
            end - start,
            experts.iter().map(|(_, t)| t.bytes.len()).sum::<usize>()
        );
        assert!(!folder.path().join("a.partial").exists());
    }

    #[test]
    fn what_is_there_is_used_if_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("tiny");
        let synthetic = tiny(&[]).unwrap();
        synthetic.ensure(&target, |_, _| {}).unwrap();
        synthetic.ensure(&target, |_, _| panic!("written again")).unwrap();
        let other = tiny(&[("vocab_size", json!(384))]).unwrap();
        for (checkpoint, change) in [(&other, false), (&synthetic, true)] {
            if change {
                let file = std::fs::File::options()
                    .write(true)
                    .open(target.join("model.safetensors"))
                    .unwrap();
                file.set_len(100_000).unwrap();
            }
            let error = checkpoint.ensure(&target, |_, _| {}).unwrap_err().to_string();
            assert!(
                error.contains("expected the synthetic checkpoint tiny"),
                "{error}"
            );
        }
    }

    #[test]
    fn the_full_model_is_cut_between_layers() {
        let full: Synthetic = "glm-4.7-flash".parse().unwrap();
        let files = full.files();
        assert_eq!(files.len(), 5);
        for (name, file) in &files {
            assert!(file.data_size() <= SHARD, "{name}");
        }
        let home = |tensor: &str| {
            let holds = |(_, file): &(String, File<Content>)| file.entries().iter().any(|e| e.name == tensor);
            files.iter().position(holds).unwrap()
        };
        for layer in 1..47 {
            let part = |part: &str| home(&format!("model.layers.{layer}.mlp.{part}_proj.weight"));
            assert_eq!(part("experts.0.gate"), part("experts.63.up"), "{layer}");
            assert_eq!(part("experts.0.gate"), part("shared_experts.down"), "{layer}");
        }
        assert_eq!(home("lm_head.scales"), 0);
    }

    /// The model over memory that is never written, but for the files' headers: zeros that take no room.
    fn hollow(name: &str) -> Model {
        let synthetic: Synthetic = name.parse().unwrap();
        let files = synthetic.files();
        let mut held: Vec<(String, Bytes)> = Vec::new();
        for (name, file) in &files {
            let preamble = file.preamble();
            let fill = |memory: &mut [u8]| {
                memory[..preamble.len()].copy_from_slice(&preamble);
                Ok(())
            };
            held.push((
                name.clone(),
                Bytes::build(preamble.len() + file.data_size(), fill).unwrap(),
            ));
        }
        if files.len() > 1 {
            let folder = tempfile::tempdir().unwrap();
            write_index(folder.path(), &files).unwrap();
            let index = "model.safetensors.index.json";
            let text = std::fs::read(folder.path().join(index)).unwrap();
            held.push((index.into(), Bytes::copy_from(&text).unwrap()));
        }
        let checkpoint = Checkpoint::from_files(&ModelFiles::in_memory(name, held)).unwrap();
        let config = synthetic.config().clone();
        let (model, report) =
            Model::load(config, &checkpoint, &LoadOptions::default(), &Device::Cpu).unwrap();
        assert!(report.unused.is_empty() && report.copied.is_empty(), "{report}");
        model
    }

    #[test]
    fn a_token_reads_what_its_shapes_say() {
        // Linear weights of a layer's attention, of an expert, of the dense layer's MLP and of the head.
        let attention = 2048 * 768 + 768 * 5120 + 2048 * 576 + 512 * 20 * 448 + 5120 * 2048;
        let (expert, dense, head) = (3 * 2048 * 1536, 3 * 2048 * 10240, 2048 * 154_880);
        for (name, layers, gigabytes) in [("slice", 4, 0.314), ("glm-4.7-flash", 47, 1.84)] {
            let model = hollow(name);
            let weights = dense + head + layers * attention + (layers - 1) * 5 * expert;
            let packed = weights / 2 + weights / 128 * 2;
            assert!((packed as f64 / 1e9 / gigabytes - 1.0).abs() < 0.005, "{packed}");
            // Norms and biases in F32; routers and a row of the embedding in BF16.
            let norms = 4 * (2048 + layers * (2 * 2048 + 768 + 512));
            let routers = (layers - 1) * 64 * (2 * 2048 + 4);
            let floats = norms + routers + 2 * 2048;
            assert_eq!(model.bytes_read(1), packed + floats, "{name}");
            // Two tokens choose up to eight experts, sixteen and more all of them; each reads a row of the embedding.
            let more = (expert / 2 + expert / 128 * 2) * (layers - 1);
            assert_eq!(model.bytes_read(2), packed + floats + 4 * more + 2 * 2048);
            assert_eq!(
                model.bytes_read(512),
                packed + floats + 60 * more + 511 * 2 * 2048
            );
            assert_eq!(model.cache_bytes_per_token(), layers * 576 * 4);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (field, value) in [
            ("attention_bias", json!(true)),
            ("hidden_size", json!(192)),
            ("kv_lora_rank", json!(64)),
            ("v_head_dim", json!(48)),
            ("model_type", json!("llama")),
        ] {
            let error = tiny(&[(field, value)]).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        let error = "glm".parse::<Synthetic>().unwrap_err().to_string();
        assert!(error.contains("glm-4.7-flash or slice"), "{error}");
    }
}
