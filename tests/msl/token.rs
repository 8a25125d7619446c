//! What a decoded token and a prompt cost a GPU, from the launch plans of GLM-4.7-Flash's own shapes: docs/metal.md.
//!
//! `MMFP4_WRITE_DOCS=1 cargo test --release --features msl-host --test msl token` writes the tables.

use crate::common::mmfp4_demo;
use crate::common::repository;
use crate::model::tolerance;
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::checkpoint::{LoadOptions, Synthetic};
use candle_mmfp4::fp4::{Bytes, DenseTensor, Factor, FloatKind, Format, Fp4Tensor, Parts, Weight};
use candle_mmfp4::kv::CacheKind;
use candle_mmfp4::metal::host::Host;
use candle_mmfp4::metal::plan::{Launch, Work};
use candle_mmfp4::models::check_finite;
use candle_mmfp4::models::glm4_moe_lite::{AttentionPath, Logits, Model, Sequence};
use candle_mmfp4::ops::Linear;
use serde_json::{Map, Value};
use std::fmt::Write as _;
use std::sync::Arc;

/// Tokens of the prompt whose operations are counted.
const PROMPT: usize = 512;
/// Tokens that a decoded token attends to, itself included.
const CACHED: u64 = 8192;
/// Rows of the output head while layers are looked at.
const VOCABULARY: u64 = 256;
/// Bytes of an activation.
const ACTIVATION: u64 = 2;

/// What a pass launches and reads.
struct Pass {
    launches: Vec<Launch>,
    /// Bytes of weights, as the model says.
    weights: u64,
    /// Bytes of cache a token.
    cache: u64,
}

/// A pass of so many tokens over the first layers of GLM-4.7-Flash, the vocabulary being small.
fn pass(layers: usize, tokens: usize, path: AttentionPath) -> Pass {
    let mut json = flash();
    json.insert("num_hidden_layers".into(), layers.into());
    json.insert("num_nextn_predict_layers".into(), 0.into());
    json.insert("vocab_size".into(), VOCABULARY.into());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = folder.path().join("model");
    let synthetic = Synthetic::new("shapes", &json).unwrap();
    synthetic.ensure(&model, |_, _| {}).unwrap();
    let options = LoadOptions {
        activations: Some(DType::BF16),
        ..LoadOptions::default()
    };
    let (mut model, _) = Model::from_folder(&model, &options, &Device::Cpu).unwrap();
    model.set_attention_path(path);
    let host = Arc::new(Host::recorder(false));
    let (mut cache, prompt) = (model.new_cache(), vec![1; tokens]);
    host.install(|| model.forward(&prompt, 0, &mut cache, Logits::Last))
        .unwrap();
    // What is counted here is nothing if the CPU did it.
    assert_eq!(host.without_kernel(), ["mmfp4-attention"]);
    let plans = host.recorded().into_iter().flat_map(|run| run.plan.launches);
    Pass {
        launches: plans.collect(),
        weights: model.bytes_read(tokens),
        cache: model.cache_bytes_per_token(CacheKind::Contiguous).unwrap(),
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

/// A pass of one layer, of two, and the launches of the second, which is sparse: it stands before the head.
fn layers(tokens: usize, path: AttentionPath) -> (Pass, Pass, Vec<Launch>) {
    let (one, two) = (pass(1, tokens, path), pass(2, tokens, path));
    let sparse = two.launches[one.launches.len() - 1..two.launches.len() - 1].to_vec();
    (one, two, sparse)
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

#[derive(Default)]
struct Table(String);

impl Table {
    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<_> = cells.into_iter().collect();
        writeln!(self.0, "| {} |", cells.join(" | ")).unwrap();
    }

    fn head(&mut self, names: &[&str]) {
        self.row(names.iter().map(ToString::to_string));
        self.row(names.iter().map(|_| "---".to_string()));
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn total(launches: &[Launch], of: impl Fn(&Work) -> u64) -> u64 {
    launches.iter().map(|launch| of(&launch.work)).sum()
}

/// What each launch of a decoded token is for, in order.
const DECODED: [&str; 10] = [
    "`q_a_proj` and `kv_a_proj_with_mqa`",
    "`q_a_layernorm` and `q_b_proj`",
    "`kv_a_layernorm`, rotation of key and queries",
    "queries into latent space (`kv_b_proj`, transposed)",
    "results out of it (`kv_b_proj`)",
    "`o_proj`",
    "residual sum, `post_attention_layernorm`",
    "router: scores, choice, weights",
    "gate, up and SiLU of four experts and the shared one",
    "down and the weighted sum",
];

/// Where attention stands among them: behind the queries in latent space.
const ATTENTION: usize = 4;

/// What attention over the cache cannot do without in a layer: bytes of the cache read and written, and of activations.
fn attention(cache: u64) -> ([u64; 2], [u64; 2]) {
    let (heads, latent) = (size("num_attention_heads"), size("kv_lora_rank"));
    let queries = heads * (latent + size("qk_rope_head_dim")) * ACTIVATION;
    ([CACHED * cache, cache], [queries, heads * latent * ACTIVATION])
}

fn decode_tables() -> [String; 2] {
    let (one, two, sparse) = layers(1, AttentionPath::Absorbed);
    let (table, share) = decode_table(&sparse, one.cache, two.weights - one.weights);
    assert!(share < 1.03, "{share}");
    [table, floor_table(&one, &two, &sparse)]
}

/// The launches of a sparse layer, and the share of its weights that they move.
fn decode_table(launches: &[Launch], cache: u64, weights: u64) -> (String, f64) {
    let mut table = Table::default();
    table.head(&["dispatch", "kernel", "threadgroups", "weights", "read", "written"]);
    let mut names = DECODED.iter().map(ToString::to_string).collect::<Vec<_>>();
    names.push("residual sum, the next layer's `input_layernorm`".into());
    let kernels: Vec<_> = launches.iter().map(|launch| launch.kernel.as_str()).collect();
    assert_eq!(kernels.len(), names.len(), "{kernels:?}");
    assert!(
        kernels[ATTENTION - 1].starts_with("linear_columns"),
        "attention is elsewhere: {kernels:?}"
    );
    let ([read, appended], [queries, mixed]) = attention(cache);
    for (index, (launch, name)) in launches.iter().zip(names).enumerate() {
        if index == ATTENTION {
            let candles = |what: &str, read: u64, written: u64| {
                let [read, written] = [read, written].map(thousands);
                [
                    what.into(),
                    "Candle's".into(),
                    String::new(),
                    "0".into(),
                    read,
                    written,
                ]
            };
            table.row(candles("the row of this token into the cache", cache, appended));
            let over = format!("attention over {} cached rows", thousands(CACHED));
            table.row(candles(&over, read + queries, mixed));
        }
        let [x, y, z] = launch.threadgroups;
        table.row([
            name,
            format!("`{}`", launch.kernel),
            format!("{x} × {y} × {z}"),
            thousands(launch.work.weights),
            thousands(launch.work.read),
            thousands(launch.work.written),
        ]);
    }
    // Counted apart from the plans: what the model says that a token reads. Its norms are f32 in both.
    let planned = total(launches, |work| work.weights);
    let bytes = planned + total(launches, |work| work.read + work.written);
    table.row([
        "all of this crate's".into(),
        format!("{} dispatches", launches.len()),
        String::new(),
        thousands(planned),
        thousands(total(launches, |work| work.read)),
        thousands(total(launches, |work| work.written)),
    ]);
    let share = bytes as f64 / weights as f64;
    assert_planned(planned, weights);
    let text = format!(
        "{}\nThe model needs {} bytes of weights for a token and such a layer; with activations the plans move {share:.3} × as\n\
         many.\n",
        table.0,
        thousands(weights),
    );
    (text, share)
}

/// Requires that plans read the weights that a token needs, to a thousandth.
fn assert_planned(planned: u64, weights: u64) {
    assert!(
        planned.abs_diff(weights) * 1000 < weights,
        "plans read {planned} bytes of weights, of {weights} that a token needs"
    );
}

/// All that a token cannot do without, part by part.
fn floor_table(one: &Pass, two: &Pass, sparse: &[Launch]) -> String {
    let layers = size("num_hidden_layers");
    let (vocabulary, hidden) = (size("vocab_size"), size("hidden_size"));
    let (head_launches, head_bytes) = head(vocabulary, true);
    let ([read, appended], [queries, mixed]) = attention(one.cache);
    // A row of BF16 numbers, which the host decodes and hands over.
    let embedding = hidden * 2;
    let moved = |work: &Work| work.read + work.written;
    let part = |name: String, launches: &[Launch], times: u64| {
        let of = |what: &dyn Fn(&Work) -> u64| times * total(launches, what);
        (
            name,
            (times * launches.len() as u64).to_string(),
            [of(&|work| work.weights), 0, of(&moved)],
        )
    };
    let dense = &one.launches[..one.launches.len() - 1];
    let parts = [
        (
            "a row of the embedding".to_string(),
            "the host's".to_string(),
            [embedding, 0, hidden * ACTIVATION],
        ),
        part("layer 0, with a dense MLP".into(), dense, 1),
        part(format!("{} sparse layers", layers - 1), sparse, layers - 1),
        (
            format!("attention over {} tokens in {layers} layers", thousands(CACHED)),
            "Candle's".into(),
            [
                0,
                layers * (read + appended),
                layers * (queries + mixed + one.cache),
            ],
        ),
        part("output head in MMFP4".into(), &head_launches, 1),
    ];
    let mut table = Table::default();
    table.head(&["part", "dispatches", "weights", "cache", "activations", "all"]);
    let mut sums = [0; 3];
    let mut row = |name: &str, dispatches: &str, bytes: [u64; 3]| {
        let all = thousands(bytes.iter().sum());
        let [weights, cache, activations] = bytes.map(thousands);
        table.row([name.into(), dispatches.into(), weights, cache, activations, all]);
    };
    for (name, dispatches, bytes) in &parts {
        row(name, dispatches, *bytes);
        sums.iter_mut().zip(bytes).for_each(|(sum, bytes)| *sum += bytes);
    }
    let dispatches = dense.len() as u64 + (layers - 1) * sparse.len() as u64 + head_launches.len() as u64;
    row(
        "**the floor of a token**",
        &format!("{dispatches} of this crate's"),
        sums,
    );

    // Counted apart from the plans: what models of one layer and of two say, with another head.
    let (_, small_head) = head(VOCABULARY, true);
    let needed = one.weights - small_head + head_bytes + (layers - 1) * (two.weights - one.weights);
    assert_planned(sums[0], needed);

    let floor: u64 = sums.iter().sum();
    let (_, bf16_head) = head(vocabulary, false);
    let with_bf16_head = floor - head_bytes + bf16_head;
    let milliseconds = |bytes: u64| bytes as f64 / 1e11 * 1e3;
    format!(
        "{}\nAt 100 GB/s a token takes {:.1} ms at least. With an output head in BF16, which is {} bytes instead of {}, the\n\
         floor is {} bytes, {:.1} ms.\n",
        table.0,
        milliseconds(floor),
        thousands(bf16_head),
        thousands(head_bytes),
        thousands(with_bf16_head),
        milliseconds(with_bf16_head),
    )
}

/// How far whole models may be off: what tests/msl/model.rs requires.
fn logits_table() -> String {
    let mut table = Table::default();
    table.head(&[
        "activations",
        "error of the logits at most",
        "in half of all cases",
    ]);
    for (name, dtype) in [("F32", DType::F32), ("F16", DType::F16), ("BF16", DType::BF16)] {
        let [most, middle] = tolerance(dtype);
        table.row([name.into(), format!("{most:e}"), format!("{middle:e}")]);
    }
    table.0
}

fn prompt_table() -> String {
    let (_, _, launches) = layers(PROMPT, AttentionPath::Materialised);
    let mut table = Table::default();
    table.head(&[
        "kernel",
        "threadgroups",
        "weights",
        "read and written",
        "operations",
    ]);
    for launch in &launches {
        let [x, y, z] = launch.threadgroups;
        table.row([
            format!("`{}`", launch.kernel),
            format!("{x} × {y} × {z}"),
            thousands(launch.work.weights),
            thousands(launch.work.read + launch.work.written),
            thousands(launch.work.operations),
        ]);
    }
    table.row([
        format!("{} dispatches", launches.len()),
        String::new(),
        thousands(total(&launches, |work| work.weights)),
        thousands(total(&launches, |work| work.read + work.written)),
        thousands(total(&launches, |work| work.operations)),
    ]);
    table.0
}

#[test]
fn docs_metal_md_says_what_the_plans_say() {
    let path = repository("docs/metal.md");
    let mut text = std::fs::read_to_string(&path).unwrap();
    let [decode, floor] = decode_tables();
    for (name, table) in [
        ("decode", decode),
        ("floor", floor),
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
