//! What a decoded token and a prompt cost a GPU, from the launch plans of GLM-4.7-Flash's own shapes: docs/metal.md.
//!
//! `MMFP4_WRITE_DOCS=1 cargo test --release --features msl-host --test msl token` writes the tables.

use crate::common::repository;
use candle_core::{DType, Device};
use candle_mmfp4::checkpoint::{LoadOptions, Synthetic};
use candle_mmfp4::metal::host::Host;
use candle_mmfp4::metal::plan::{Launch, Work};
use candle_mmfp4::models::glm4_moe_lite::{AttentionPath, Logits, Model};
use serde_json::{Map, Value};
use std::fmt::Write as _;
use std::sync::Arc;

/// Tokens of the prompt whose operations are counted.
const PROMPT: usize = 512;

/// The launches of a sparse layer for so many tokens, of a model with its true shapes but for a small vocabulary.
fn sparse_layer(tokens: usize, path: AttentionPath) -> (Vec<Launch>, u64) {
    let flash: Synthetic = "glm-4.7-flash".parse().unwrap();
    let launches = |layers: usize| {
        let mut json: Map<String, Value> = flash.json().as_object().unwrap().clone();
        json.insert("num_hidden_layers".into(), layers.into());
        json.insert("num_nextn_predict_layers".into(), 0.into());
        json.insert("vocab_size".into(), 256.into());
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
        let plans = host.recorded().into_iter().flat_map(|run| run.plan.launches);
        (plans.collect::<Vec<_>>(), model.bytes_read(tokens))
    };
    // The second layer is what two have more than one: it stands before the head.
    let ((one, less), (two, more)) = (launches(1), launches(2));
    (two[one.len() - 1..two.len() - 1].to_vec(), more - less)
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

fn decode_table() -> String {
    let (launches, weights) = sparse_layer(1, AttentionPath::Absorbed);
    let mut table = Table::default();
    table.head(&["dispatch", "kernel", "threadgroups", "weights", "read", "written"]);
    let mut names = DECODED.iter().map(ToString::to_string).collect::<Vec<_>>();
    names.push("residual sum, the next layer's `input_layernorm`".into());
    let kernels: Vec<_> = launches.iter().map(|launch| launch.kernel.as_str()).collect();
    assert_eq!(kernels.len(), names.len(), "{kernels:?}");
    for (launch, name) in launches.iter().zip(names) {
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
    let planned = total(&launches, |work| work.weights);
    let bytes = planned + total(&launches, |work| work.read + work.written);
    table.row([
        "all".into(),
        format!("{} dispatches", launches.len()),
        String::new(),
        thousands(planned),
        thousands(total(&launches, |work| work.read)),
        thousands(total(&launches, |work| work.written)),
    ]);
    let share = bytes as f64 / weights as f64;
    assert!(
        planned.abs_diff(weights) * 1000 < weights,
        "plans read {planned} bytes of weights, of {weights} that a token needs"
    );
    assert!(share < 1.03, "{bytes} bytes for {weights} of weights");
    format!(
        "{}\nThe model needs {} bytes of weights for a token and such a layer; with activations the plans move {:.3} × as\n\
         many.\n",
        table.0,
        thousands(weights),
        share
    )
}

fn prompt_table() -> String {
    let (launches, _) = sparse_layer(PROMPT, AttentionPath::Materialised);
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
    for (name, table) in [("decode", decode_table()), ("prompt", prompt_table())] {
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
