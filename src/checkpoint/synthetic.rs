//! Random checkpoints of true shapes, for measuring speed and memory.

mod names;
mod shapes;
mod source;

use super::disk;
use super::layout::{self, File, with_format_note, write_index, write_json};
use crate::fp4::Format;
use crate::models::glm4_moe_lite::Config;
use crate::{Error, Result};
use serde_json::{Map, Value};
use shapes::Tensor;
use source::{Content, Source};
use std::path::Path;

/// The most bytes of tensors in a file, whole layers aside.
const SHARD: usize = 4_000_000_000;

/// A `glm4_moe_lite` checkpoint of random weights, whose speed and memory are those of a real one of its shapes.
///
/// Every linear layer, `kv_b_proj` and the output head (but see [`with_bf16_head`](Self::with_bf16_head) and
/// [`in_bf16`](Self::in_bf16)) are in MMFP4, as [`quantize_folder`](super::quantize_folder) lays it out; embeddings, routers and norms in BF16; correction biases are 0. Codes are uniform, and scales such that
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
    precision: Precision,
}

/// What is in BF16 besides embeddings, routers and norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Precision {
    Mmfp4,
    Bf16Head,
    Bf16,
}

impl Synthetic {
    /// Names that [`FromStr`](std::str::FromStr) knows: GLM-4.7-Flash, and its dense and first three sparse layers
    /// with the whole vocabulary; both with an output head in MMFP4 or in BF16; and the first eight layers, all in BF16.
    /// Any of them, and any number of layers, goes with `-bf16-head`, `-bf16`, or neither.
    pub const NAMES: [&str; 5] = [
        "glm-4.7-flash",
        "slice",
        "glm-4.7-flash-bf16-head",
        "slice-bf16-head",
        "slice-8-bf16",
    ];

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
            precision: Precision::Mmfp4,
        })
    }

    /// With an output head in BF16, as checkpoints have that keep theirs; `name` is its own.
    pub fn with_bf16_head(self, name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            precision: Precision::Bf16Head,
            ..self
        }
    }

    /// With every weight in BF16, as something to be quantised; `name` is its own.
    pub fn in_bf16(mut self, name: impl Into<String>) -> Self {
        if let Value::Object(json) = &mut self.json {
            json.shift_remove("quantization_config");
        }
        Self {
            name: name.into(),
            precision: Precision::Bf16,
            ..self
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its `config.json`.
    pub fn json(&self) -> &Value {
        &self.json
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
            let size = file.size() as u64;
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
        let layers =
            (0..self.config.layers.len()).map(|index| shapes::layer(&self.config, index, self.precision));
        let mut shards: Vec<Vec<Tensor>> = vec![shapes::outside(&self.config, self.precision)];
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, LoadOptions, ModelFiles};
    use crate::fp4::Bytes;
    use crate::kv::CacheKind;
    use crate::models::check_finite;
    use crate::models::glm4_moe_lite::{Logits, Model, Sequence};
    use crate::ops::ValueRange;
    use candle_core::Device;
    use serde_json::json;

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
        held.push((
            "config.json".into(),
            Bytes::copy_from(synthetic.json().to_string().as_bytes()).unwrap(),
        ));
        let (files, options) = (ModelFiles::in_memory(name, held), LoadOptions::default());
        let (model, report) = Model::from_files(&files, &options, &Device::Cpu).unwrap();
        assert!(report.unused.is_empty() && report.copied.is_empty(), "{report}");
        assert_eq!(report.bytes_a_token, model.bytes_read(1));
        assert_eq!(Model::inspect(&files, &options).unwrap().load, Some(report));
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
            let contiguous = model.cache_bytes_per_token(CacheKind::Contiguous).unwrap();
            assert_eq!(contiguous, layers * 576 * 4);
        }
    }

    #[test]
    fn a_bf16_head_is_four_times_as_large_but_for_its_scales() {
        let [mmfp4, bf16] = ["slice", "slice-bf16-head"].map(hollow);
        let head = 2048 * 154_880;
        let more = 2 * head - (head / 2 + head / 128 * 2);
        assert_eq!(bf16.bytes_read(1), mmfp4.bytes_read(1) + more);
    }

    #[test]
    fn one_in_bf16_is_there_to_be_quantised() {
        let eight: Synthetic = "slice-8-bf16".parse().unwrap();
        assert_eq!(
            (eight.config().layers.len(), eight.size_in_bytes() / 1_000_000_000),
            (8, 10)
        );
        let place = tempfile::tempdir().unwrap();
        let (source, target) = (place.path().join("bf16"), place.path().join("nvfp4"));
        tiny(&[])
            .unwrap()
            .in_bf16("tiny-bf16")
            .ensure(&source, |_, _| {})
            .unwrap();
        let original = Checkpoint::open(&source).unwrap();
        assert!(
            original
                .tensors()
                .all(|(name, t)| t.dtype == safetensors::Dtype::BF16 || name.ends_with("bias"))
        );
        crate::checkpoint::quantize_folder(
            &original,
            &target,
            crate::fp4::Format::nvfp4(),
            Default::default(),
        )
        .unwrap();
        let (model, report) = Model::from_folder(&target, &LoadOptions::default(), &Device::Cpu).unwrap();
        assert!(report.unused.is_empty() && report.fp4.tensors > 50, "{report}");
        assert!(
            model
                .forward(&[1, 2], 0, &mut model.new_cache(), Logits::Last)
                .is_ok()
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for name in ["slice-1", "slice-48", "slice-x", "slice--bf16"] {
            assert!(name.parse::<Synthetic>().is_err(), "{name}");
        }
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
