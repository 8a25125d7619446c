//! What headers tell of a model: the same as loading it does. `common::load` holds both against each other wherever tests
//! load a model; here is what is left.

mod common;

use candle_core::Device;
use candle_mmfp4::checkpoint::{Component, Layout, LoadOptions, LoadReport, ModelFiles, OwnReason};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::{Format, ScaleKind, ScaleRule, quantize};
use candle_mmfp4::models::glm4_moe_lite::{Inspection, Logits, Model};
use candle_mmfp4::nn::CacheSize;
use common::draft::{Draft, Stored};
use common::{bf16_demo, mmfp4_demo, repository, values};
use safetensors::Dtype;
use serde_json::json;
use std::path::Path;

fn inspect(folder: &Path, options: &LoadOptions) -> Inspection {
    Model::inspect(&ModelFiles::folder(folder), options).unwrap()
}

fn load(folder: &Path, options: &LoadOptions) -> LoadReport {
    common::load(&ModelFiles::folder(folder), options).unwrap().1
}

fn own(report: &LoadReport, reason: OwnReason) -> Option<(usize, usize)> {
    let found = report.own.iter().find(|own| own.reason == reason);
    found.map(|own| (own.weights, own.bytes))
}

#[test]
fn components_and_bytes_are_those_of_the_shapes() {
    let report = load(&mmfp4_demo(), &LoadOptions::default());
    let of = |component: Component| {
        let shares = report
            .components
            .iter()
            .filter(|share| share.component == component);
        let sums = shares.map(|share| (share.weights, share.stored, share.bytes));
        sums.fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2))
    };
    // Six layers, one of them dense; hidden 256, eight experts of 256, 4,096 tokens.
    let packed = |n: usize, k: usize| n * k / 2 + n * k / 128 * 2;
    assert_eq!(of(Component::Embeddings), (1, 4096 * 256 * 2, 4096 * 256 * 2));
    let experts = 5 * 8 * 3 * packed(256, 256);
    assert_eq!(of(Component::Experts), (120, experts, experts));
    assert_eq!(
        of(Component::Router),
        (10, 5 * 8 * (256 * 2 + 4), 5 * 8 * (256 * 2 + 4))
    );
    let norms = 256 * (2 * 6 + 1) + 6 * (128 + 128);
    assert_eq!(of(Component::Norms).2, 4 * norms);
    let all: usize = report.components.iter().map(|share| share.bytes).sum();
    assert_eq!(report.bytes(), all);
    // Nothing but vectors is the process's own.
    assert_eq!(
        own(&report, OwnReason::Decoded),
        Some((30, 4 * norms + 5 * 8 * 4))
    );
    assert_eq!((report.own.len(), report.own_bytes()), (1, 4 * norms + 5 * 8 * 4));
    assert_eq!(report.mapped_bytes() + report.own_bytes(), all);
}

#[test]
fn what_is_made_while_loading_is_told_to_the_byte() {
    let options = LoadOptions {
        quantize: Some(Format::nvfp4()),
        skip_layers: vec![0],
        keep: vec!["o_proj".into()],
        int8_head: true,
        ..LoadOptions::default()
    };
    let report = load(&bf16_demo(), &options);
    let quantized = own(&report, OwnReason::Quantized).unwrap();
    assert_eq!(quantized, (report.quantized.tensors, report.quantized.bytes));
    let head = report.int8_head.unwrap();
    assert_eq!(own(&report, OwnReason::HeadRounded), Some((1, head.after)));
    assert!(own(&report, OwnReason::Gathered).is_none());

    // The third layer's experts in two files: all of its feed-forward weights are copied.
    let folder = Draft::packed().write_split(|name| match name.contains("layers.2.mlp.experts.3.") {
        true => "model-00002-of-00002.safetensors",
        false => "model-00001-of-00002.safetensors",
    });
    let report = load(folder.path(), &LoadOptions::default());
    assert_eq!(report.copied.len(), 1);
    assert_eq!(own(&report, OwnReason::Gathered), Some((27, report.copied[0].1)));

    for (file, reason) in [
        ("mxfp4.gguf", OwnReason::Repacked),
        ("nvfp4.gguf", OwnReason::Repacked),
        ("q4_k_m.gguf", OwnReason::Decoded),
    ] {
        let files = ModelFiles::folder(repository("tests/data/gguf").join(file));
        let (_, report) = common::load(&files, &LoadOptions::default()).unwrap();
        let vectors = own(&report, OwnReason::Decoded).unwrap();
        let expected = match reason {
            OwnReason::Repacked => (report.repacked.tensors, report.repacked.bytes),
            _ => vectors,
        };
        assert_eq!(own(&report, reason), Some(expected), "{file}");
        assert_eq!(report.own_bytes(), report.repacked.bytes + vectors.1, "{file}");
    }
}

#[test]
fn all_problems_are_told_and_not_only_the_first() {
    let mut draft = Draft::packed();
    draft.tensors.remove("model.norm.weight").unwrap();
    draft
        .tensors
        .remove("model.layers.1.mlp.gate.e_score_correction_bias")
        .unwrap();
    let found = inspect(draft.write().path(), &LoadOptions::default());
    assert_eq!(found.problems.len(), 2, "{:?}", found.problems);
    assert!(
        found.problems[0].contains("e_score_correction_bias") && found.problems[1].contains("model.norm")
    );
    let report = found.load.unwrap();
    assert!(report.layouts.contains(&Layout::Marlin) && report.bytes_a_token > 0);

    // A configuration that nothing is known of still leaves the tensors.
    draft.config["model_type"] = json!("llama");
    let found = inspect(draft.write().path(), &LoadOptions::default());
    assert!(found.load.is_none() && found.memory.is_none() && found.dtypes.contains_key("U32"));
    assert!(
        found.problems[0].contains("model_type = llama"),
        "{:?}",
        found.problems
    );
}

#[test]
fn no_data_are_read() {
    let mut draft = Draft::packed();
    let expected = inspect(draft.write().path(), &LoadOptions::default());
    for tensor in draft.tensors.values_mut() {
        tensor.bytes.fill(0xff);
    }
    let folder = draft.write();
    let found = inspect(folder.path(), &LoadOptions::default());
    // All codes are the largest now, which is what a sample of them warns of.
    let mut report = found.load.unwrap();
    assert!(std::mem::take(&mut report.warnings)[0].contains("maximum"));
    assert_eq!(Some(report), expected.load);
    assert!(Model::from_folder(folder.path(), &LoadOptions::default(), &Device::Cpu).is_err());
}

#[test]
fn memory_is_what_loading_asks_for() {
    let sized = |tokens| LoadOptions {
        kv_size: Some(CacheSize::Tokens(tokens)),
        ..LoadOptions::default()
    };
    let needed = inspect(&mmfp4_demo(), &sized(1000)).memory.unwrap();
    // A row of 128 + 32 numbers of two bytes in each of six layers.
    assert_eq!((needed.cache_a_token, needed.cache), (1920, 1_920_000));
    assert_eq!(needed.total, needed.weights + needed.cache);
    let json = serde_json::to_value(inspect(&mmfp4_demo(), &sized(1000))).unwrap();
    assert_eq!(json["load"]["components"][0]["component"], "embeddings");
    assert_eq!(json["load"]["layouts"], json!(["marlin"]));
    assert_eq!(json["layouts"][0]["layout"], "marlin");
    assert_eq!(json["memory"]["cache"], 1_920_000);
    assert_eq!(json["problems"], json!([]));
}

/// Queries of rank 8 and a group of 16, so that the scales of q_a are [8, 8]; turned, or as they should be.
fn square(turned: bool) -> Draft {
    const RANK: usize = 8;
    let mut draft = Draft::plain();
    draft.config["q_lora_rank"] = json!(RANK);
    let names: Vec<_> = draft.tensors.keys().cloned().collect();
    for name in names {
        let tensor = draft.get(&name);
        if name.ends_with("q_a_layernorm.weight") {
            let element = tensor.bytes.len() / tensor.shape[0];
            tensor.shape[0] = RANK;
            tensor.bytes.truncate(RANK * element);
        } else if name.ends_with("q_b_proj.weight") {
            let row = tensor.bytes.len() / tensor.shape[0];
            let kept = row / tensor.shape[1] * RANK;
            tensor.bytes = tensor
                .bytes
                .chunks(row)
                .flat_map(|row| row[..kept].to_vec())
                .collect();
            tensor.shape[1] = RANK;
        } else if let Some(module) = name
            .strip_suffix(".weight")
            .filter(|name| name.ends_with("q_a_proj"))
        {
            draft.tensors.remove(&name);
            let (k, seed) = (128, module.len() as u64 + module.as_bytes()[13] as u64);
            let weights = common::noise(RANK * k, seed);
            let format = Format {
                group: 16,
                kind: ScaleKind::F16,
            };
            let packed = quantize(module, &weights, (RANK, k), format, ScaleRule::default()).unwrap();
            let mut scales = packed.scales().to_vec();
            if turned {
                let from = scales.clone();
                for (i, to) in scales.chunks_exact_mut(2).enumerate() {
                    let at = 2 * (i % RANK * RANK + i / RANK);
                    to.copy_from_slice(&from[at..at + 2]);
                }
            }
            let mut insert = |suffix: &str, dtype, shape: &[usize], bytes: &[u8]| {
                let stored = Stored {
                    dtype,
                    shape: shape.into(),
                    bytes: bytes.into(),
                };
                draft.tensors.insert(format!("{module}.{suffix}"), stored);
            };
            insert("weight", Dtype::U32, &[RANK, k / 8], packed.codes());
            insert("scales", Dtype::F16, &[RANK, RANK], &scales);
        }
    }
    draft
}

#[test]
fn a_layout_decides_what_shapes_leave_open() {
    let read = |draft: &Draft, layout| {
        let options = LoadOptions {
            layout,
            arithmetic: Arithmetic::Exact,
            ..LoadOptions::default()
        };
        let folder = draft.write();
        let (model, report) = common::load(&ModelFiles::folder(folder.path()), &options)?;
        let logits = model.forward(&[5, 99, 3], 0, &mut model.new_cache(), Logits::All)?;
        Ok((report.layouts.into_iter().collect::<Vec<_>>(), values(&logits)))
    };
    let error = |found: candle_mmfp4::Result<(Vec<Layout>, Vec<f32>)>| found.unwrap_err().to_string();
    for turned in [false, true] {
        let text = error(read(&square(turned), None));
        for part in [
            "q_a_proj.scales",
            "[8, 8]",
            "--layout marlin ",
            "--layout marlin-turned",
        ] {
            assert!(text.contains(part), "{text:?} should hold {part:?}");
        }
    }
    let (ordinary, other) = (Some(Layout::Marlin), Some(Layout::MarlinTurned));
    let expected = read(&square(false), ordinary).unwrap();
    let turned = read(&square(true), other).unwrap();
    assert_eq!(
        (expected.0, turned.0),
        (vec![Layout::Marlin], vec![Layout::MarlinTurned])
    );
    assert!(turned.1 == expected.1 && read(&square(true), ordinary).unwrap().1 != expected.1);

    // What contradicts the content is an error, whether its reader is another or the same.
    for (named, name) in [(other, "marlin-turned"), (Some(Layout::MlxMxfp4), "mlx-mxfp4")] {
        let text = error(read(&Draft::packed(), named));
        for part in ["--layout", name, "it is in marlin (", "mlp.gate_proj"] {
            assert!(text.contains(part), "{text:?} should hold {part:?}");
        }
    }
    assert!(read(&Draft::packed(), ordinary).is_ok());
}
