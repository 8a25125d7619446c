//! The decoder: embeddings, layers, head.

use super::attention::{Attention, AttentionPath, norm_bytes};
use super::cache::{cache_bytes, cache_bytes_per_token, check_kernels};
use super::config::Config;
use super::experts::FeedForward;
use super::reads::Reads;
use super::tensors::completed;
use crate::checkpoint::{Checkpoint, LoadOptions, LoadReport, Loader, ModelFiles};
use crate::cpu::Executor;
use crate::fp4::Weight;
use crate::kv::{CacheFormat, CacheKind};
use crate::nn::{CacheSize, Embedding, MmfP4Linear, PagedKvCache, RmsNorm, RotaryEmbedding, TokenCache};
use crate::{Error, Result, nn, ops};
use candle_core::{DType, Device};

#[derive(Debug)]
pub(super) struct DecoderLayer {
    pub(super) input_norm: RmsNorm,
    pub(super) attention: Attention,
    pub(super) post_attention_norm: RmsNorm,
    pub(super) feed_forward: FeedForward,
}

/// GLM-4.7-Flash, ready to run. Activations and cache are of [`LoadOptions::activations`], logits F32.
///
/// ```no_run
/// use candle_core::Device;
/// use candle_mmfp4::models::glm4_moe_lite::{Logits, Model};
///
/// let (model, report) = Model::from_folder("path/to/model", &Default::default(), &Device::Cpu)?;
/// println!("{report}");
/// let mut cache = model.new_cache();
/// let logits = model.forward(&[1, 2, 3], 0, &mut cache, Logits::Last)?;
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug)]
pub struct Model {
    pub(super) config: Config,
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<DecoderLayer>,
    pub(super) norm: RmsNorm,
    pub(super) head: MmfP4Linear,
    pub(super) rotary: RotaryEmbedding,
    pub(super) path: AttentionPath,
    pub(super) dtype: DType,
    pub(super) device: Device,
}

impl Model {
    /// Loads a model folder: `config.json` and safetensors.
    ///
    /// # Errors
    /// Those of [`Config::from_file`], [`Checkpoint::open`] and [`Model::load`].
    pub fn from_folder(
        folder: impl AsRef<std::path::Path>,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<(Self, LoadReport)> {
        Self::from_files(&ModelFiles::folder(folder.as_ref()), options, device)
    }

    /// As [`from_folder`](Self::from_folder), of files that may be in memory.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder).
    pub fn from_files(
        files: &ModelFiles,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<(Self, LoadReport)> {
        let config = Config::from_files(files)?;
        Self::load(config, &Checkpoint::from_files(files)?, options, device)
    }

    /// Loads a model from its config and an open checkpoint, and reports what was found there.
    ///
    /// # Errors
    /// [`Error::Tensor`] names what is missing or malformed, and on a device that runs launch plans what no kernel takes;
    /// [`Error::Argument`] an option that makes no sense there, or anywhere; those of [`Checkpoint::from_files`] for
    /// [`LoadOptions::base`].
    pub fn load(
        config: Config,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<(Self, LoadReport)> {
        let dtype = options.activations_on(device)?;
        let completed = completed(&config, checkpoint, options)?;
        let checkpoint = completed.as_ref().map_or(checkpoint, |(whole, _)| whole);
        check_memory(&config, checkpoint, options, device, dtype)?;
        if let CacheKind::Paged(format) = options.kv_cache {
            check_kernels(&config.cache_layout(format)?, device)?;
        }
        // What the environment says of instructions and threads may be wrong; better to hear of it here.
        Executor::current()?;
        let by_kernels = ops::kernels_run_on(device);
        let loader = Loader::new(checkpoint, options, config.layers.len())?;
        let (vocab, hidden, eps) = (config.vocab_size, config.hidden_size, config.rms_norm_eps);
        let embedding = Embedding::new(loader.kept_weight("model.embed_tokens", vocab, hidden)?);
        let mut layers = Vec::with_capacity(config.layers.len());
        for (index, kind) in config.layers.iter().enumerate() {
            let name = |part: &str| format!("model.layers.{index}.{part}");
            let feed_forward = FeedForward::load(&loader, &name("mlp"), *kind, &config)?;
            let attention = Attention::load(&loader, &name("self_attn"), &config)?;
            if by_kernels {
                feed_forward.check_kernels(&name("mlp"))?;
                attention.check_kernels(&name("self_attn"))?;
            }
            layers.push(DecoderLayer {
                input_norm: loader.rms_norm(&name("input_layernorm"), hidden, eps)?,
                attention,
                post_attention_norm: loader.rms_norm(&name("post_attention_layernorm"), hidden, eps)?,
                feed_forward,
            });
        }
        let norm = loader.rms_norm("model.norm", hidden, eps)?;
        let tied = config.tie_word_embeddings.then(|| embedding.weight());
        let head = MmfP4Linear::new(loader.head("lm_head", vocab, hidden, tied)?, None)?;
        if by_kernels && !head.op().has_kernel() {
            let expected = "an output head as it is stored: no Metal kernel takes one in eight bits; leave out --int8-head, \
                            or compute on the CPU (--device cpu)";
            return Err(Error::argument("load", "int8_head", expected, "true"));
        }
        let mut report = loader.finish(&predicted(&config), duplicate_head(&config));
        if let Some((_, supplied)) = completed {
            report.note_base(supplied);
        }
        let rotary = RotaryEmbedding::new(config.qk_rope_head_dim, config.rope_theta, config.rope_pairing);
        let model = Self {
            embedding,
            layers,
            norm,
            head: head.with_arithmetic(options.arithmetic),
            rotary,
            path: AttentionPath::Auto,
            dtype,
            device: device.clone(),
            config,
        };
        report.bytes_a_token = model.bytes_read(1);
        Ok((model, report))
    }

    /// The model's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The device that activations are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Forces one way of computing attention; results differ by rounding only.
    pub fn set_attention_path(&mut self, path: AttentionPath) {
        self.path = path;
    }

    /// The weights of the layers' products and of the output head, where they lie; the routers' and, unless it is the
    /// head, the embedding are not among them.
    pub fn weights(&self) -> Vec<&Weight> {
        let layers = self.layers.iter();
        layers
            .flat_map(|layer| [layer.attention.weights(), layer.feed_forward.weights()].concat())
            .chain([self.head.weight()])
            .collect()
    }

    /// Bytes of weights that a pass over `tokens` tokens of one sequence reads at least, for the logits of the last:
    /// codes and scales, routers, norms, output head, each once; one row of the embedding a token; and as many experts
    /// as the tokens choose if no two choose alike, up to all of them. The cache is not counted: see
    /// [`cache_bytes_per_token`](Self::cache_bytes_per_token).
    ///
    /// ```no_run
    /// # use candle_mmfp4::models::glm4_moe_lite::Model;
    /// # fn told(model: &Model) {
    /// let decode = model.bytes_read(1);
    /// let prompt = model.bytes_read(512) / 512;
    /// println!("a token reads {decode} bytes of weights, in a prompt of 512 tokens {prompt}");
    /// # }
    /// ```
    pub fn bytes_read(&self, tokens: usize) -> u64 {
        let embedding = self.embedding.weight();
        let mut reads = Reads {
            always: norm_bytes(&self.norm) + self.head.size_in_bytes(),
            ..Reads::of_model(&self.config, embedding)
        };
        for layer in &self.layers {
            reads.always += norm_bytes(&layer.input_norm)
                + norm_bytes(&layer.post_attention_norm)
                + layer.attention.bytes_read();
            layer.feed_forward.add_to(&mut reads);
        }
        reads.of_tokens(tokens)
    }

    /// Bytes that a token takes in a cache of this kind; each later token reads them.
    ///
    /// # Errors
    /// [`Error::Argument`] for a latent whose width the format does not take.
    pub fn cache_bytes_per_token(&self, kind: CacheKind) -> Result<u64> {
        cache_bytes_per_token(&self.config, kind, self.dtype)
    }

    /// An empty cache for any number of sequences, each up to the model's context, whose memory is taken now. On Linux the
    /// system gives memory of the CPU's when it is written to, not before.
    ///
    /// # Errors
    /// As [`PagedKvCache::new`], and [`Error::Argument`] for a latent whose width the format, or a GPU's kernels, do not take.
    pub fn new_paged_cache(&self, format: CacheFormat, size: CacheSize) -> Result<PagedKvCache> {
        let limit = self.config.max_position_embeddings;
        let layout = self.config.cache_layout(format)?;
        check_kernels(&layout, &self.device)?;
        PagedKvCache::new(self.config.layers.len(), layout, size, limit, &self.device)
    }

    /// An empty contiguous cache for one sequence, up to the model's context.
    pub fn new_cache(&self) -> TokenCache {
        let config = &self.config;
        let limit = config.max_position_embeddings;
        TokenCache::new(
            config.layers.len(),
            config.cache_width(),
            limit,
            self.dtype,
            &self.device,
        )
    }
}

/// The layers for multi-token prediction, by the beginnings of their tensors' names: they are in checkpoints and take no
/// part here.
pub(super) fn predicted(config: &Config) -> Vec<String> {
    let layers = config.layers.len()..config.layers.len() + config.num_nextn_predict_layers;
    layers.map(|layer| format!("model.layers.{layer}.")).collect()
}

/// The name of a head that a checkpoint may have beside the embeddings which take its place.
pub(super) fn duplicate_head(config: &Config) -> Option<&'static str> {
    config.tie_word_embeddings.then_some("lm_head.weight")
}

/// Bytes of a checkpoint's tensors that take part, as they are stored.
pub(crate) fn weights_stored(config: &Config, checkpoint: &Checkpoint) -> u64 {
    checkpoint.size_without(&predicted(config))
}

/// Refuses what the machine cannot hold, before anything is read: on the CPU the cache that was asked for, weights being
/// files that the system reads again where it has to; on a GPU the cache and the weights, as they are stored or, quantised
/// while loading, at least that small.
fn check_memory(
    config: &Config,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    device: &Device,
    dtype: DType,
) -> Result<()> {
    let cache = cache_bytes(config, options, dtype)?;
    let needed = weights_needed(config, checkpoint, options).saturating_add(cache);
    #[cfg(target_os = "macos")]
    if let Device::Metal(device) = device {
        return crate::metal::device::check_memory(device, needed);
    }
    let _ = needed;
    match options.kv_size {
        None => Ok(()),
        Some(_) => {
            let row = cache_bytes_per_token(config, options.kv_cache, dtype)?;
            nn::check_cache_memory(cache, row, device)
        }
    }
}

/// Bytes of the weights at least.
pub(super) fn weights_needed(config: &Config, checkpoint: &Checkpoint, options: &LoadOptions) -> u64 {
    let stored = weights_stored(config, checkpoint);
    match options.quantize {
        None => stored,
        // Of 16 bits a weight, as originals have.
        Some(format) => (stored as f64 * format.bits_per_weight() / 16.0) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::requirements::Needs;
    use crate::fp4::Format;

    #[test]
    fn a_gpu_must_hold_weights_and_cache() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model");
        let checkpoint = Checkpoint::open(folder).unwrap();
        let config = Config::from_files(&ModelFiles::folder(std::path::Path::new(folder))).unwrap();
        let needed = |options: LoadOptions| {
            let cache = cache_bytes(&config, &options, DType::BF16).unwrap();
            weights_needed(&config, &checkpoint, &options) + cache
        };
        let plain = needed(LoadOptions::default());
        let files: u64 = checkpoint
            .files()
            .iter()
            .map(|file| file.metadata().unwrap().len())
            .sum();
        // A row of 128 + 32 numbers of two bytes in each of six layers, for the model's context.
        let cache = 2048 * 6 * 160 * 2;
        assert!(
            plain <= files + cache && plain > files * 9 / 10 + cache,
            "{plain}"
        );
        let sized = |kv_size| LoadOptions {
            kv_size: Some(kv_size),
            ..LoadOptions::default()
        };
        let none = needed(sized(CacheSize::Bytes(0)));
        assert_eq!(plain - none, cache);
        assert_eq!(needed(sized(CacheSize::Bytes(12_345))), none + 12_345);
        let quantized = needed(LoadOptions {
            quantize: Some(Format::mmfp4()),
            ..sized(CacheSize::Tokens(0))
        });
        assert_eq!(quantized, (none as f64 * 4.125 / 16.0) as u64);
        // `mmfp4 doctor` counts the same, whatever the context and the cache.
        let files = ModelFiles::folder(std::path::Path::new(folder));
        let needs = Needs::of_files("demo", &files).unwrap();
        for kind in ["bf16", "fp8", "fp4", "contiguous"].map(|kind| kind.parse().unwrap()) {
            for context in [0, 100, config.max_position_embeddings] {
                let options = LoadOptions {
                    kv_cache: kind,
                    ..sized(CacheSize::Tokens(context))
                };
                let counted = needs.bytes(context, kind, DType::BF16).unwrap();
                assert_eq!(counted, needed(options), "{kind}");
            }
        }
    }

    #[test]
    fn a_cache_that_the_machine_cannot_hold_is_refused_before_anything_is_loaded() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model");
        let load = |kv_cache: CacheKind, kv_size| {
            let options = LoadOptions {
                kv_cache,
                kv_size: Some(kv_size),
                // Refused as well, but by what loads.
                skip_layers: vec![99],
                ..LoadOptions::default()
            };
            let loaded = Model::from_folder(folder, &options, &Device::Cpu);
            loaded.map(|_| ()).unwrap_err().to_string()
        };
        if crate::memory::available().is_some() {
            for size in [CacheSize::Bytes(1 << 50), CacheSize::Tokens(1 << 40)] {
                let error = load(CacheKind::default(), size);
                assert!(error.contains("the memory that is available"), "{error}");
            }
        }
        let error = load(CacheKind::Contiguous, CacheSize::Bytes(1 << 20));
        assert!(error.contains("contiguous"), "{error}");
        let error = load(CacheKind::default(), CacheSize::Bytes(1 << 20));
        assert!(error.contains("99"), "{error}");
    }

    #[test]
    #[cfg(msl_host)]
    fn what_no_kernel_takes_is_refused_at_load() {
        let root = env!("CARGO_MANIFEST_DIR");
        let load = |folder: &str, options: LoadOptions| {
            Model::from_folder(format!("{root}/{folder}"), &options, &Device::Cpu).map(|_| ())
        };
        let (original, ours) = ("tests/data/demo-model", "examples/demo-model");
        let quantize = Some(Format::mmfp4());
        let eight_bits = LoadOptions {
            int8_head: true,
            ..LoadOptions::default()
        };
        // The CPU's kernels take all of it.
        load(original, LoadOptions::default()).unwrap();
        load(ours, eight_bits.clone()).unwrap();
        let host = std::sync::Arc::new(crate::metal::host::Host::recorder(false));
        host.install(|| {
            let refused = |options, name: &str, advice: &str| match load(original, options).unwrap_err() {
                Error::Tensor {
                    name: found, problem, ..
                } => assert!(found == name && problem.contains(advice), "{found}: {problem}"),
                other => panic!("{other}"),
            };
            refused(LoadOptions::default(), "model.layers.0.mlp", "--quantize mmfp4");
            let kept = LoadOptions {
                quantize,
                skip_layers: vec![3],
                ..LoadOptions::default()
            };
            refused(kept.clone(), "model.layers.3.mlp.experts", "--no-fused-moe");
            let one_by_one = LoadOptions {
                separate_experts: true,
                ..kept
            };
            load(original, one_by_one).unwrap();
            load(ours, LoadOptions::default()).unwrap();
            match load(ours, eight_bits).unwrap_err() {
                Error::Argument {
                    argument, expected, ..
                } => {
                    assert!(
                        argument == "int8_head" && expected.contains("leave out"),
                        "{expected}"
                    );
                }
                other => panic!("{other}"),
            }
        });
    }
}
