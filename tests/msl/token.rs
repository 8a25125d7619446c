//! What a decoded token and a prompt cost a GPU, from the launch plans of GLM-4.7-Flash's own shapes: docs/metal.md.
//!
//! `MMFP4_WRITE_DOCS=1 cargo test --release --features msl-host --test msl token` writes the tables.

use crate::common::mmfp4_demo;
use crate::common::repository;
use crate::model::tolerance;
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::checkpoint::{LoadOptions, Synthetic};
use candle_mmfp4::fp4::{Bytes, DenseTensor, Factor, FloatKind, Format, Fp4Tensor, Parts, Weight};
use candle_mmfp4::kv::CacheFormat;
use candle_mmfp4::metal::host::Host;
use candle_mmfp4::metal::plan::{Binding, Launch, Work};
use candle_mmfp4::models::check_finite;
use candle_mmfp4::models::glm4_moe_lite::{AttentionPath, Logits, Model, Sequence};
use candle_mmfp4::nn::CacheSize;
use candle_mmfp4::ops::Linear;
use serde_json::{Map, Value};
use std::fmt::Write as _;
use std::sync::Arc;

/// Tokens of the prompt whose operations are counted.
const PROMPT: usize = 512;
/// Tokens that a decoded token attends to, itself included.
const CACHED: usize = 8192;
/// The same, of what is told of each format of the cache.
const DEPTHS: [usize; 4] = [512, 1024, 4096, CACHED];
/// What a token may read, of what it cannot do without.
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
        let plans = host.recorded().into_iter().flat_map(|run| run.plan.launches);
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

/// Bytes that launches of a decoded token move.
#[derive(Clone, Copy, Default)]
struct Moved {
    dispatches: u64,
    weights: u64,
    cache: u64,
    activations: u64,
    /// What attention over splits of the context leaves, written and read.
    parts: u64,
    /// Of all that, what is read.
    read: u64,
    /// What would be read if attention left its outputs.
    least: u64,
}

impl Moved {
    /// Of a layer, for a token that attends to `total`, itself included, with rows of so many bytes.
    fn of(layer: &[Launch], total: usize, row: u64) -> Self {
        let kernels: Vec<_> = layer.iter().map(|launch| launch.kernel.as_str()).collect();
        assert!(layer.len() <= DECODED.len(), "{kernels:?}");
        layer.iter().for_each(each_range_once);
        let work = |kernel: &str| match kernels.iter().position(|name| name.starts_with(kernel)) {
            Some(index) => layer[index].work,
            None => panic!("no {kernel}: {kernels:?}"),
        };
        let (append, attention, merged) = (work("append_latents"), work("paged_latents"), work("merged_"));
        let cached = total as u64 * row;
        assert!(append.written >= row && attention.read >= cached);
        // What is written and read again is the parts.
        assert_eq!(attention.written, merged.read);
        let read = sum(layer, |work| work.read);
        let (cache, parts) = (cached + row, attention.written + merged.read);
        let weights = sum(layer, |work| work.weights);
        let outputs = size("num_attention_heads") * size("kv_lora_rank") * ACTIVATION;
        Self {
            dispatches: layer.len() as u64,
            weights,
            cache,
            activations: read + sum(layer, |work| work.written) - cache - parts,
            parts,
            read: weights + read,
            least: weights + read - merged.read + outputs,
        }
    }

    fn plus(self, times: u64, other: Self) -> Self {
        Self {
            dispatches: self.dispatches + times * other.dispatches,
            weights: self.weights + times * other.weights,
            cache: self.cache + times * other.cache,
            activations: self.activations + times * other.activations,
            parts: self.parts + times * other.parts,
            read: self.read + times * other.read,
            least: self.least + times * other.least,
        }
    }

    fn all(self) -> u64 {
        self.weights + self.cache + self.activations + self.parts
    }

    fn share(self) -> f64 {
        self.read as f64 / self.least as f64
    }
}

/// Requires that no two buffers of a launch begin at the same place.
fn each_range_once(launch: &Launch) {
    let mut seen = Vec::new();
    for (_, binding) in &launch.bindings {
        if let Binding::Read { operand, offset } | Binding::Write { operand, offset } = binding {
            let found = (*operand, *offset);
            assert!(
                !seen.contains(&found),
                "{}: operand {operand} twice",
                launch.kernel
            );
            seen.push(found);
        }
    }
}

/// What a decoded token of GLM-4.7-Flash moves, part by part and as a whole.
struct Token {
    parts: [(String, Moved); 4],
    all: Moved,
}

impl Token {
    fn new(both: &Both, total: usize, format: CacheFormat) -> Self {
        let (one, two, sparse) = both.pass(1, total, format);
        let (layers, hidden) = (size("num_hidden_layers"), size("hidden_size"));
        // A row of BF16 numbers, which the host decodes and hands over.
        let embedding = Moved {
            weights: hidden * 2,
            activations: hidden * ACTIVATION,
            read: hidden * 2,
            least: hidden * 2,
            ..Moved::default()
        };
        let (launches, head_bytes) = head(size("vocab_size"), true);
        let read = sum(&launches, |work| work.weights + work.read);
        let head_moved = Moved {
            dispatches: launches.len() as u64,
            weights: sum(&launches, |work| work.weights),
            activations: sum(&launches, |work| work.read + work.written),
            read,
            least: read,
            ..Moved::default()
        };
        let dense = Moved::of(&one.launches[..one.launches.len() - 1], total, one.cache);
        let sparse = Moved::of(&sparse, total, one.cache);
        let none = Moved::default();
        let parts = [
            ("a row of the embedding".into(), embedding),
            ("layer 0, with a dense MLP".into(), dense),
            (
                format!("{} sparse layers", layers - 1),
                none.plus(layers - 1, sparse),
            ),
            ("output head in MMFP4".into(), head_moved),
        ];
        let all = parts.iter().fold(none, |all, (_, part)| all.plus(1, *part));
        // Counted apart from the plans: what models of one layer and of two say, with another head.
        let (_, small_head) = head(VOCABULARY, true);
        let needed = one.weights - small_head + head_bytes + (layers - 1) * (two.weights - one.weights);
        assert_planned(all.weights, needed);
        Self { parts, all }
    }
}

fn decode_tables() -> [String; 3] {
    let both = Both::new(AttentionPath::Absorbed);
    let (one, two, sparse) = both.pass(1, CACHED, CacheFormat::BF16);
    [
        decode_table(&sparse, one.cache, two.weights - one.weights),
        floor_table(&Token::new(&both, CACHED, CacheFormat::BF16)),
        cache_table(&both),
    ]
}

/// The launches of a sparse layer.
fn decode_table(launches: &[Launch], row: u64, weights: u64) -> String {
    let mut table = Table::default();
    table.head(&["dispatch", "kernel", "threadgroups", "weights", "read", "written"]);
    for (launch, name) in launches.iter().zip(DECODED) {
        let [x, y, z] = launch.threadgroups;
        table.row([
            name.into(),
            format!("`{}`", launch.kernel),
            format!("{x} × {y} × {z}"),
            thousands(launch.work.weights),
            thousands(launch.work.read),
            thousands(launch.work.written),
        ]);
    }
    let moved = Moved::of(launches, CACHED, row);
    table.row([
        "all".into(),
        format!("{} dispatches", launches.len()),
        String::new(),
        thousands(moved.weights),
        thousands(sum(launches, |work| work.read)),
        thousands(sum(launches, |work| work.written)),
    ]);
    // Counted apart from the plans: what the model says that a token reads. Its norms are f32 in both.
    assert_planned(moved.weights, weights);
    format!(
        "{}\nThe model needs {} bytes of weights for a token and such a layer; the cache has {} for {} tokens. What the plans\n\
         read is {:.3} × that, with the activations between dispatches.\n",
        table.0,
        thousands(weights),
        thousands(CACHED as u64 * row),
        thousands(CACHED as u64),
        moved.read as f64 / (weights + CACHED as u64 * row) as f64,
    )
}

/// Requires that plans read the weights that a token needs, to a thousandth.
fn assert_planned(planned: u64, weights: u64) {
    assert!(
        planned.abs_diff(weights) * 1000 < weights,
        "plans read {planned} bytes of weights, of {weights} that a token needs"
    );
}

/// All that a token moves, part by part.
fn floor_table(token: &Token) -> String {
    let mut table = Table::default();
    let names = [
        "part",
        "dispatches",
        "weights",
        "cache",
        "activations",
        "attention's parts",
        "all",
    ];
    table.head(&names);
    let whole = ("**a token**".to_string(), token.all);
    for (name, moved) in token.parts.iter().chain([&whole]) {
        let dispatches = match moved.dispatches {
            0 => "the host's".into(),
            count => count.to_string(),
        };
        let bytes = [
            moved.weights,
            moved.cache,
            moved.activations,
            moved.parts,
            moved.all(),
        ];
        table.row([name.clone(), dispatches].into_iter().chain(bytes.map(thousands)));
    }
    let (_, fp4_head) = head(size("vocab_size"), true);
    let (_, bf16_head) = head(size("vocab_size"), false);
    let (all, with_bf16_head) = (token.all.all(), token.all.all() - fp4_head + bf16_head);
    let milliseconds = |bytes: u64| bytes as f64 / 1e11 * 1e3;
    format!(
        "{}\nAt 100 GB/s a token takes {:.1} ms at least. With an output head in BF16, which is {} bytes instead of {}, these\n\
         are {} bytes, {:.1} ms.\n",
        table.0,
        milliseconds(all),
        thousands(bf16_head),
        thousands(fp4_head),
        thousands(with_bf16_head),
        milliseconds(with_bf16_head),
    )
}

/// Of each format what a token reads of the cache, and of all that it reads the share of what it cannot do without.
fn cache_table(both: &Both) -> String {
    let mut table = Table::default();
    let depths = DEPTHS.map(|depth| format!("at {}", thousands(depth as u64)));
    let names = ["cache", "bytes a token and layer"].map(String::from);
    let names: Vec<_> = names.into_iter().chain(depths).collect();
    table.head(&names.iter().map(String::as_str).collect::<Vec<_>>());
    for name in ["f16", "bf16", "fp8", "fp4"] {
        let format = name.parse().unwrap();
        let mut cells = vec![format!("`{name}`")];
        for depth in DEPTHS {
            let Token { all, .. } = Token::new(both, depth, format);
            let row = all.cache / size("num_hidden_layers") / (depth as u64 + 1);
            if cells.len() == 1 {
                cells.push(row.to_string());
            }
            assert!(all.share() <= SHARE, "{name} at {depth}: {}", all.share());
            let cached = all.cache - row * size("num_hidden_layers");
            cells.push(format!("{}, {:.3} ×", thousands(cached), all.share()));
        }
        table.row(cells);
    }
    table.0
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
    let both = Both::new(AttentionPath::Materialised);
    let (_, _, launches) = both.pass(PROMPT, PROMPT, CacheFormat::BF16);
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
        thousands(sum(&launches, |work| work.weights)),
        thousands(sum(&launches, |work| work.read + work.written)),
        thousands(sum(&launches, |work| work.operations)),
    ]);
    table.0
}

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
