//! What a decoded token and a prompt cost a GPU, from the launch plans of GLM-4.7-Flash's own shapes: docs/metal.md.
//!
//! `MMFP4_WRITE_DOCS=1 cargo test --release --features msl-host --test msl token` writes the tables.

mod moved;
mod tables;

use crate::common::mmfp4_demo;
use crate::common::repository;
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::checkpoint::{LoadOptions, Synthetic};
use candle_mmfp4::fp4::{Bytes, DenseTensor, Factor, FloatKind, Format, Fp4Tensor, Parts, Weight};
use candle_mmfp4::kv::CacheFormat;
use candle_mmfp4::metal::host::Host;
use candle_mmfp4::metal::plan::{Launch, Work};
use candle_mmfp4::models::check_finite;
use candle_mmfp4::models::glm4_moe_lite::{AttentionPath, Logits, Model, Sequence};
use candle_mmfp4::nn::CacheSize;
use candle_mmfp4::ops::Linear;
use serde_json::{Map, Value};
use std::sync::Arc;
use tables::{decode_tables, logits_table, prompt_table};

/// Tokens of the prompt whose operations are counted.
const PROMPT: usize = 512;
/// Tokens that a decoded token attends to, itself included.
const CACHED: usize = 8192;
/// The same, of what is told of each format of the cache. At 1,408 there are as many splits as at any depth below 4,096, each as
/// short as can be.
const DEPTHS: [usize; 5] = [512, 1024, 1408, 4096, CACHED];
/// What a token may read, of its weights and its cache.
const SHARE: f64 = 1.03;
/// Rows of the output head while layers are looked at.
const VOCABULARY: u64 = 256;
/// Bytes of an activation.
const ACTIVATION: u64 = 2;
/// What a pass launches and reads.
struct Pass {
    launches: Vec<Launch>,
    /// Bytes of weights, as the model says.
    weights: u64,
    /// Bytes of the cache a token.
    cache: u64,
}

/// The first layers of GLM-4.7-Flash, the vocabulary being small.
struct Layers {
    model: Model,
    _folder: tempfile::TempDir,
}

impl Layers {
    fn new(layers: usize, path: AttentionPath) -> Self {
        let mut json = flash();
        json.insert("num_hidden_layers".into(), layers.into());
        json.insert("num_nextn_predict_layers".into(), 0.into());
        json.insert("vocab_size".into(), VOCABULARY.into());
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let files = folder.path().join("model");
        let synthetic = Synthetic::new("shapes", &json).unwrap();
        synthetic.ensure(&files, |_, _| {}).unwrap();
        let options = LoadOptions {
            activations: Some(DType::BF16),
            ..LoadOptions::default()
        };
        let (mut model, _) = Model::from_folder(&files, &options, &Device::Cpu).unwrap();
        model.set_attention_path(path);
        Self {
            model,
            _folder: folder,
        }
    }

    /// A pass of so many tokens, which attends to `total` with them.
    fn pass(&self, tokens: usize, total: usize, format: CacheFormat) -> Pass {
        let host = Arc::new(Host::recorder(false));
        let mut cache = self
            .model
            .new_paged_cache(format, CacheSize::Tokens(total))
            .unwrap();
        let all = vec![1; total];
        let run = || {
            let (sequence, _) = cache.start(&[]);
            if total > tokens {
                // What the tokens before left is not looked at.
                cache.begin(&[(sequence, &all[tokens..])])?;
                cache.commit();
            }
            let new = [(sequence, &all[..tokens])];
            self.model.forward_paged(&mut cache, &new, Logits::Last, None)
        };
        host.install(run).unwrap();
        let on_cpu = host.without_kernel();
        // What is counted here is nothing if the CPU did it.
        match tokens {
            1 => assert!(on_cpu.is_empty(), "{on_cpu:?}"),
            _ => assert_eq!(on_cpu, ["mmfp4-attention"]),
        }
        let recorded = host.recorded();
        if tokens == 1 {
            recorded.iter().for_each(moved::each_range_once);
        }
        let plans = recorded.into_iter().flat_map(|run| run.plan.launches);
        Pass {
            launches: plans.collect(),
            weights: self.model.bytes_read(tokens),
            cache: cache.layout().row_bytes() as u64,
        }
    }
}

/// The configuration of GLM-4.7-Flash.
fn flash() -> Map<String, Value> {
    let flash: Synthetic = "glm-4.7-flash".parse().unwrap();
    flash.json().as_object().unwrap().clone()
}

/// A number of that configuration.
fn size(name: &str) -> u64 {
    flash()[name].as_u64().unwrap()
}

/// Models of one layer and of two, the second of which is sparse.
struct Both {
    one: Layers,
    two: Layers,
}

impl Both {
    fn new(path: AttentionPath) -> Self {
        let [one, two] = [1, 2].map(|layers| Layers::new(layers, path));
        Self { one, two }
    }

    /// A pass of one layer, of two, and the launches of the second: it stands before the head.
    fn pass(&self, tokens: usize, total: usize, format: CacheFormat) -> (Pass, Pass, Vec<Launch>) {
        let [one, two] = [&self.one, &self.two].map(|layers| layers.pass(tokens, total, format));
        let sparse = two.launches[one.launches.len() - 1..two.launches.len() - 1].to_vec();
        (one, two, sparse)
    }
}

/// The output head of so many rows for one token, and its bytes. Its weight is memory that nobody writes or reads.
fn head(rows: u64, in_fp4: bool) -> (Vec<Launch>, u64) {
    let (n, k) = (rows as usize, size("hidden_size") as usize);
    let bytes = |len: usize| Bytes::build(len, |_| Ok(())).unwrap();
    let weight: Weight = match in_fp4 {
        true => {
            let format = Format::mmfp4();
            let parts = Parts {
                shape: (n, k),
                group: format.group,
                codes: bytes(n * k / 2),
                scales: bytes(n * k / format.group * 2),
                kind: format.kind,
                factor: Factor::None,
            };
            Fp4Tensor::new("lm_head", parts).unwrap().into()
        }
        false => DenseTensor::new("lm_head", (n, k), FloatKind::BF16, bytes(n * k * 2))
            .unwrap()
            .into(),
    };
    let (host, size) = (Arc::new(Host::recorder(false)), weight.size_in_bytes() as u64);
    let x = Tensor::zeros((1, k), DType::BF16, &Device::Cpu).unwrap();
    host.install(|| Linear::new(weight, None).unwrap().forward(&x))
        .unwrap();
    assert!(host.without_kernel().is_empty());
    let plans = host.recorded().into_iter().flat_map(|run| run.plan.launches);
    (plans.collect(), size)
}

fn sum(launches: &[Launch], of: impl Fn(&Work) -> u64) -> u64 {
    launches.iter().map(|launch| of(&launch.work)).sum()
}

/// What each launch of a decoded token is for, in order.
const DECODED: [&str; 12] = [
    "`q_a_proj` and `kv_a_proj_with_mqa`",
    "`q_a_layernorm` and `q_b_proj`",
    "`kv_a_layernorm`, rotation of key and queries, the token's row into the cache",
    "queries into latent space (`kv_b_proj`, transposed)",
    "attention over 8,192 rows of the cache",
    "its parts, and results out of latent space (`kv_b_proj`)",
    "`o_proj`",
    "residual sum, `post_attention_layernorm`",
    "router: scores, choice, weights",
    "gate, up and SiLU of four experts and the shared one",
    "down and the weighted sum",
    "residual sum, the next layer's `input_layernorm`",
];

#[test]
fn docs_metal_md_says_what_the_plans_say() {
    let path = repository("docs/metal.md");
    let mut text = std::fs::read_to_string(&path).unwrap();
    let [decode, floor, cache] = decode_tables();
    for (name, table) in [
        ("decode", decode),
        ("floor", floor),
        ("cache", cache),
        ("prompt", prompt_table()),
        ("logits", logits_table()),
    ] {
        let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
        let start = text.find(&begin).unwrap() + begin.len();
        let length = text[start..].find(&end).unwrap();
        if std::env::var_os("MMFP4_WRITE_DOCS").is_some() {
            text.replace_range(start..start + length, &table);
        } else {
            let found = &text[start..start + length];
            assert_eq!(
                found, table,
                "docs/metal.md: run this test with MMFP4_WRITE_DOCS=1"
            );
        }
    }
    if std::env::var_os("MMFP4_WRITE_DOCS").is_some() {
        let partial = path.with_extension("md.partial");
        std::fs::write(&partial, text).unwrap();
        std::fs::rename(&partial, &path).unwrap();
    }
}

/// Under a recorder nothing is computed: outputs are NaN, and ids of experts that are not there. What the host read of them
/// it could not go on with.
#[test]
fn no_value_is_read_on_the_host_between_embedding_and_logits() {
    let load = |separate_experts| {
        let options = LoadOptions {
            activations: Some(DType::BF16),
            separate_experts,
            ..LoadOptions::default()
        };
        Model::from_folder(mmfp4_demo(), &options, &Device::Cpu)
            .unwrap()
            .0
    };
    let (model, separate) = (load(false), load(true));
    for path in [AttentionPath::Absorbed, AttentionPath::Materialised] {
        let mut model = load(false);
        model.set_attention_path(path);
        let (host, mut cache) = (Arc::new(Host::recorder(false)), model.new_cache());
        // A prompt, a token, and some more tokens behind them.
        for tokens in [&[1, 2, 3, 4, 5, 6, 7, 8, 9][..], &[10], &[11, 12]] {
            let position = cache.len();
            let logits = host.install(|| model.forward(tokens, position, &mut cache, Logits::All));
            let logits = crate::values(&logits.unwrap());
            assert!(logits.iter().all(|logit| logit.is_nan()));
            // Six layers of at least nine plans.
            let plans = host.recorded().len();
            assert!(plans >= 6 * 9, "{plans} plans");
        }
        assert_eq!(host.without_kernel(), ["mmfp4-attention"]);
    }
    // Over a paged cache, attention included.
    let (host, mut absorbing) = (Arc::new(Host::recorder(false)), load(false));
    absorbing.set_attention_path(AttentionPath::Absorbed);
    let mut cache = absorbing
        .new_paged_cache(CacheFormat::fp4(), CacheSize::Tokens(64))
        .unwrap();
    let (sequence, _) = cache.start(&[]);
    for tokens in [&[1, 2, 3, 4, 5, 6, 7, 8, 9][..], &[10], &[11, 12]] {
        let new = [(sequence, tokens)];
        let logits = host.install(|| absorbing.forward_paged(&mut cache, &new, Logits::All, None));
        let logits = crate::values(&logits.unwrap());
        assert!(logits.iter().all(|logit| logit.is_nan()));
    }
    assert!(host.without_kernel().is_empty());
    // What does read values, as docs/metal.md says, is seen to.
    let host = Arc::new(Host::recorder(false));
    let mut cache = separate.new_cache();
    let error = host
        .install(|| separate.forward(&[1], 0, &mut cache, Logits::Last))
        .unwrap_err();
    assert!(error.to_string().contains("expert 4294967295 of 8"), "{error}");
    let mut alone = [Sequence {
        tokens: &[1],
        position: 0,
        cache: None,
    }];
    let checked = host.install(|| model.forward_batch(&mut alone, Logits::Last, Some(&mut check_finite)));
    assert!(checked.unwrap_err().to_string().contains("input_layernorm"));
}
