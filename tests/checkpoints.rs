//! Checkpoints as they come: in one file or several, packed or not, and damaged in every way.

mod common;

use candle_core::Device;
use candle_mmfp4::Error;
use candle_mmfp4::checkpoint::{
    Checkpoint, LoadOptions, LoadReport, ModelFiles, QuantizeOptions, quantize_checkpoint, quantize_folder,
};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::{Bytes, Factor, Format, Fp4Tensor, Parts, ScaleKind, ScaleRule};
use candle_mmfp4::generation::Pipeline;
use candle_mmfp4::models::glm4_moe_lite::{Config, Logits, Model};
use common::draft::{Draft, GROUP_64, Stored, tiny, write_json};
use common::{bf16_demo, mmfp4_demo, values};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use tempfile::TempDir;

const UP: &str = "model.layers.1.mlp.experts.3.up_proj";
const TOKENS: [u32; 7] = [5, 99, 3, 511, 0, 42, 42];

fn load(folder: &Path, quantize: Option<Format>) -> candle_mmfp4::Result<(Model, LoadReport)> {
    // What is compared here differs by nothing but the order of sums.
    let options = LoadOptions {
        quantize,
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    };
    common::load(&ModelFiles::folder(folder), &options)
}

fn logits(model: &Model) -> Vec<f32> {
    values(
        &model
            .forward(&TOKENS, 0, &mut model.new_cache(), Logits::All)
            .unwrap(),
    )
}

fn bits(model: &Model) -> Vec<u32> {
    logits(model).into_iter().map(f32::to_bits).collect()
}

/// Loading fails and says all of `parts`.
fn assert_refused(folder: &Path, parts: &[&str]) {
    let error = load(folder, None)
        .err()
        .unwrap_or_else(|| panic!("should say {parts:?}"))
        .to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} should hold {part:?}");
    }
}

fn is_linear(name: &str) -> bool {
    name.ends_with("_proj.weight") || name.ends_with("_proj_with_mqa.weight")
}

#[test]
fn files_that_are_not_there() {
    let empty = tempfile::tempdir().unwrap();
    assert_refused(empty.path(), &["config.json"]);
    let missing = empty.path().join("no-such-model");
    assert_refused(&missing, &["no-such-model"]);
    assert!(Pipeline::from_folder(&missing, &Default::default(), &Device::Cpu).is_err());
    let error = Checkpoint::open(&missing).unwrap_err().to_string();
    assert!(error.contains("no such folder"), "{error}");

    write_json(empty.path(), "config.json", &Draft::plain().config);
    assert_refused(empty.path(), &["neither model.safetensors nor"]);
    std::fs::write(empty.path().join("pytorch_model.bin"), "PK").unwrap();
    assert_refused(
        empty.path(),
        &["neither model.safetensors nor", "pytorch_model.bin"],
    );
}

#[test]
fn files_cut_anywhere() {
    let folder = Draft::plain().write();
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let cuts = [
        0,
        1,
        7,
        8,
        9,
        header / 2,
        header - 1,
        header,
        header + 1,
        whole.len() / 2,
        whole.len() - 1,
    ];
    for cut in cuts {
        std::fs::write(&path, &whole[..cut]).unwrap();
        assert_refused(
            folder.path(),
            &["model.safetensors", &format!("{cut} bytes"), "truncated"],
        );
    }
    // And one that goes on.
    std::fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    assert_refused(folder.path(), &["model.safetensors"]);
}

#[test]
fn damaged_headers() {
    let folder = Draft::plain().write();
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [
        0u64,
        1,
        u64::MAX,
        1 << 40,
        whole.len() as u64,
        whole.len() as u64 - 8,
    ] {
        std::fs::write(&path, [&length.to_le_bytes(), &whole[8..]].concat()).unwrap();
        assert_refused(folder.path(), &["model.safetensors", "fetch it again"]);
    }
    let headers = [
        "{",
        "[]",
        "null",
        "{}",
        "\u{0}",
        r#"{"a": {"dtype": "F4000", "shape": [1], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [18446744073709551615, 9], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 18446744073709551615]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}"#,
    ];
    for header in headers {
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(&path, [&length, header.as_bytes(), &[0; 4]].concat()).unwrap();
        assert_refused(folder.path(), &["model.safetensors"]);
    }
}

#[test]
fn indices_that_lead_astray() {
    let draft = Draft::plain();
    let split = |name: &str| match name.contains("layers.1.") {
        true => "model-00002-of-00002.safetensors",
        false => "model-00001-of-00002.safetensors",
    };
    let folder = draft.write_split(split);
    assert_eq!(
        bits(&load(folder.path(), None).unwrap().0),
        bits(&load(&tiny(), None).unwrap().0)
    );

    let index = "model.safetensors.index.json";
    let good: Value = serde_json::from_slice(&std::fs::read(folder.path().join(index)).unwrap()).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let outside = elsewhere.path().join("model.safetensors");
    std::fs::copy(tiny().join("model.safetensors"), &outside).unwrap();
    for bad in [
        "../model.safetensors",
        "sub/model.safetensors",
        "./../model.safetensors",
        outside.to_str().unwrap(),
        "..",
        "",
        "model.bin",
        "config.json",
    ] {
        let mut astray = good.clone();
        astray["weight_map"]["model.norm.weight"] = bad.into();
        write_json(folder.path(), index, &astray);
        assert_refused(folder.path(), &[index, &format!("{bad:?}"), "same folder"]);
    }
    let mut astray = good.clone();
    astray["weight_map"]["model.norm.weight"] = "model-00003-of-00003.safetensors".into();
    write_json(folder.path(), index, &astray);
    assert_refused(
        folder.path(),
        &["model-00003-of-00003.safetensors", "index names this file"],
    );

    for bad in [
        json!({}),
        json!({"weight_map": {}}),
        json!({"weight_map": {"a": 1}}),
        json!([]),
    ] {
        write_json(folder.path(), index, &bad);
        assert_refused(folder.path(), &[index]);
    }
    std::fs::write(folder.path().join(index), "{").unwrap();
    assert_refused(folder.path(), &[index]);

    // A tensor that the index lists and its file does not hold.
    let mut without = draft.clone();
    without.tensors.remove("model.norm.weight");
    let folder = without.write_split(split);
    write_json(folder.path(), index, &good);
    assert_refused(
        folder.path(),
        &[
            "`model.norm.weight`",
            "model-00001-of-00002.safetensors",
            "does not hold",
        ],
    );
}

#[test]
fn other_models_are_refused_by_name() {
    let mut draft = Draft::plain();
    draft.config["model_type"] = "llama".into();
    assert_refused(draft.write().path(), &["model_type = llama", "glm4_moe_lite"]);
    let mut draft = Draft::plain();
    draft.config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
    assert_refused(draft.write().path(), &["quant_method = gptq", "mmfp4"]);
    let folder = Draft::plain().write();
    std::fs::write(folder.path().join("config.json"), "{\"model_type\":").unwrap();
    assert_refused(folder.path(), &["config.json", "not JSON"]);
}

#[test]
fn every_tensor_is_missed_by_name() {
    for draft in [Draft::plain(), Draft::packed()] {
        for name in draft.tensors.keys() {
            let mut without = draft.clone();
            without.tensors.remove(name);
            assert_refused(without.write().path(), &[&format!("`{name}`"), "missing"]);
        }
    }
}

#[test]
fn every_tensor_of_another_shape_is_named_with_its_file() {
    for draft in [Draft::plain(), Draft::packed()] {
        for name in draft.tensors.keys() {
            let mut other = draft.clone();
            let stored = other.get(name);
            // The same elements: [2, N / 2] or, for matrices, [N · 2, K / 2], or one dimension more.
            stored.shape = match stored.shape[..] {
                [n] => vec![2, n / 2],
                [n, k] if k > 1 => vec![n * 2, k / 2],
                ref shape => [&[1], shape].concat(),
            };
            let found = format!("{:?}", stored.shape);
            assert_refused(
                other.write().path(),
                &[&format!("`{name}`"), "model.safetensors", "shape", &found],
            );
        }
    }
}

#[test]
fn every_tensor_of_another_type_is_named_with_its_file() {
    let draft = Draft::packed();
    for name in draft.tensors.keys() {
        let mut other = draft.clone();
        let stored = other.get(name);
        stored.dtype = match stored.dtype {
            Dtype::U32 => Dtype::F8_E5M2,
            _ => Dtype::I16,
        };
        if stored.dtype == Dtype::F8_E5M2 {
            *stored.shape.last_mut().unwrap() *= 4;
        }
        assert_refused(
            other.write().path(),
            &[&format!("`{name}`"), "model.safetensors", "dtype"],
        );
    }
}

#[test]
fn scales_that_are_nan_or_in_groups_unknown() {
    let packed = Draft::packed();
    let scales = format!("{UP}.scales");
    for bad in [0x7e00u16, 0x7c00, 0xfc00] {
        let mut draft = packed.clone();
        draft.get(&scales).bytes[6..8].copy_from_slice(&bad.to_le_bytes());
        assert_refused(
            draft.write().path(),
            &[&format!("`{scales}`"), "model.safetensors", "scale [1, 1]"],
        );
    }
    // [64, 16]: groups of 8.
    let mut draft = packed.clone();
    let stored = draft.get(&scales);
    (stored.shape, stored.bytes) = (vec![64, 16], stored.bytes.repeat(8));
    assert_refused(
        draft.write().path(),
        &[&format!("`{scales}`"), "model.safetensors", "[64, 16]"],
    );
}

#[test]
fn spellings_of_the_packed_layout() {
    let packed = Draft::packed();
    let (model, report) = load(packed.write().path(), None).unwrap();
    let expected = bits(&model);
    let linear = packed.tensors.keys().filter(|name| is_linear(name)).count();
    assert_eq!((report.fp4.tensors, report.quantized.tensors), (linear, 0));
    assert!(
        report.unused.is_empty() && report.kept.is_empty() && report.copied.is_empty(),
        "{report}"
    );

    let mut signed = packed.clone();
    for stored in signed
        .tensors
        .values_mut()
        .filter(|stored| stored.dtype == Dtype::U32)
    {
        stored.dtype = Dtype::I32;
    }
    let mut alias = packed.clone();
    for name in packed.tensors.keys().filter(|name| name.ends_with(".scales")) {
        alias.rename(name, &name.replace(".scales", ".weight.scales"));
    }
    let mut with_group_size = packed.clone();
    let group = Stored {
        dtype: Dtype::I32,
        shape: vec![1],
        bytes: vec![64, 0, 0, 0],
    };
    with_group_size.tensors.insert(format!("{UP}.group_size"), group);
    for (what, draft) in [
        ("I32 codes", signed),
        (".weight.scales", alias),
        (".group_size", with_group_size),
    ] {
        let (model, report) = load(draft.write().path(), None).unwrap();
        assert_eq!(bits(&model), expected, "{what}");
        assert_eq!(
            (report.fp4.tensors, report.unused.len()),
            (linear, 0),
            "{what}: {report}"
        );
    }
}

#[test]
fn the_next_token_layer_is_ignored_and_counted() {
    let mut draft = Draft::plain();
    let layer: Vec<_> = draft
        .tensors
        .iter()
        .filter(|(name, _)| name.starts_with("model.layers.2."))
        .map(|(name, stored)| (name.replace("layers.2.", "layers.3."), stored.clone()))
        .collect();
    let added = layer.len();
    draft.tensors.extend(layer);
    let expected = bits(&load(&tiny(), None).unwrap().0);

    let (model, report) = load(draft.write().path(), None).unwrap();
    assert_eq!(
        (bits(&model), report.unused.len(), report.ignored),
        (expected.clone(), added, 0)
    );
    draft.config["num_nextn_predict_layers"] = 1.into();
    let (model, report) = load(draft.write().path(), None).unwrap();
    assert_eq!(
        (bits(&model), report.unused.len(), report.ignored),
        (expected.clone(), 0, added)
    );
    // Announced and absent, as in most 4-bit checkpoints.
    draft
        .tensors
        .retain(|name, _| !name.starts_with("model.layers.3."));
    let (model, report) = load(draft.write().path(), None).unwrap();
    assert_eq!((bits(&model), report.ignored), (expected, 0));
}

#[test]
fn what_nothing_asked_for_is_reported() {
    let mut draft = Draft::plain();
    let extra = draft.get("model.norm.weight").clone();
    for name in ["model.extra.weight", "model.layers.0.self_attn.q_a_proj.bias"] {
        draft.tensors.insert(name.into(), extra.clone());
    }
    // Old checkpoints carry these along; they can be computed.
    draft
        .tensors
        .insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), extra);
    let (_, report) = load(draft.write().path(), None).unwrap();
    assert_eq!(
        report.unused,
        ["model.extra.weight", "model.layers.0.self_attn.q_a_proj.bias"]
    );
    assert!(report.to_string().contains("model.extra.weight"), "{report}");
}

#[test]
fn what_no_group_divides_stays_as_it_is_and_is_listed() {
    let plain = Draft::plain();
    let odd = |(name, stored): &(&String, &Stored)| is_linear(name) && stored.shape[1] % 128 != 0;
    let expected: BTreeSet<_> = plain
        .tensors
        .iter()
        .filter(odd)
        .map(|(name, _)| name.clone())
        .collect();
    assert!(expected.len() > 10);
    let (on_load, report) = load(&tiny(), Some(Format::mmfp4())).unwrap();
    let kept: BTreeSet<_> = report.kept.iter().map(|kept| kept.name.clone()).collect();
    assert_eq!(kept, expected);
    assert!(
        report
            .kept
            .iter()
            .all(|kept| kept.reason.contains("64") && kept.reason.contains("128"))
    );
    assert!(report.quantized.tensors > 10 && report.to_string().contains(&report.kept[0].name));

    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("mmfp4");
    quantize_folder(
        &Checkpoint::open(tiny()).unwrap(),
        &target,
        Format::mmfp4(),
        ScaleRule::default(),
    )
    .unwrap();
    let written = Draft::read(&target);
    for name in &expected {
        assert_eq!(written.tensors[name].dtype, Dtype::BF16, "{name}");
        assert_eq!(written.tensors[name].bytes, plain.tensors[name].bytes, "{name}");
    }
    assert_eq!(bits(&load(&target, None).unwrap().0), bits(&on_load));
}

#[test]
fn what_is_sensitive_stays_in_floating_point() {
    let (plain, packed) = (Draft::plain(), Draft::packed());
    for (name, stored) in &plain.tensors {
        if is_linear(name) {
            assert_eq!(packed.tensors[name].dtype, Dtype::U32, "{name}");
        } else {
            let same = &packed.tensors[name];
            assert_eq!((same.dtype, &same.bytes), (stored.dtype, &stored.bytes), "{name}");
        }
    }
    for name in [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate.weight",
    ] {
        assert_eq!(packed.tensors[name].dtype, Dtype::BF16, "{name}");
    }
    let linear = plain.tensors.keys().filter(|name| is_linear(name)).count();
    let (_, report) = load(&tiny(), Some(Format::nvfp4())).unwrap();
    assert_eq!(report.quantized.tensors, linear);
    assert_eq!(report.dense.tensors, plain.tensors.len() - linear);
    assert!(report.kept.is_empty(), "{report}");
}

#[test]
fn quantised_while_loading_or_on_disk_is_the_same() {
    let on_load = bits(&load(&tiny(), Some(GROUP_64)).unwrap().0);
    assert_eq!(
        on_load,
        bits(&load(Draft::packed().write().path(), None).unwrap().0)
    );
    assert_ne!(on_load, bits(&load(&tiny(), None).unwrap().0));
    assert_eq!(
        bits(&load(&bf16_demo(), Some(Format::mmfp4())).unwrap().0),
        bits(&load(&mmfp4_demo(), None).unwrap().0)
    );
}

#[test]
fn fp4_and_floats_mix_tensor_by_tensor() {
    let packed = Draft::packed();
    let expected = logits(&load(packed.write().path(), None).unwrap().0);
    let linear: Vec<_> = packed
        .tensors
        .keys()
        .filter(|name| is_linear(name))
        .cloned()
        .collect();
    for parity in [0, 1] {
        let mut mixed = packed.clone();
        for name in linear.iter().skip(parity).step_by(2) {
            let scales = mixed.tensors.remove(&name.replace(".weight", ".scales")).unwrap();
            let codes = mixed.get(name);
            let (n, k) = (codes.shape[0], codes.shape[1] * 8);
            let parts = Parts {
                shape: (n, k),
                group: 64,
                codes: Bytes::copy_from(&codes.bytes).unwrap(),
                scales: Bytes::copy_from(&scales.bytes).unwrap(),
                kind: ScaleKind::F16,
                factor: Factor::None,
            };
            let dense = Fp4Tensor::new(name, parts).unwrap().dequantize();
            let bytes = dense.iter().flat_map(|v| v.to_le_bytes()).collect();
            *codes = Stored {
                dtype: Dtype::F32,
                shape: vec![n, k],
                bytes,
            };
        }
        let (model, report) = load(mixed.write().path(), None).unwrap();
        let half = linear.len().div_ceil(2);
        assert!(
            report.fp4.tensors.abs_diff(half) <= 1 && report.unused.is_empty(),
            "{report}"
        );
        common::assert_nmse(&logits(&model), &expected, 1e-9, "mixed");
    }
}

#[test]
fn experts_in_two_files_are_copied_together_and_quantising_reunites_them() {
    let draft = Draft::plain();
    let split = |name: &str| match name.contains("up_proj") {
        true => "model-00001-of-00002.safetensors",
        false => "model-00002-of-00002.safetensors",
    };
    let folder = draft.write_split(split);
    let (model, report) = load(folder.path(), None).unwrap();
    assert_eq!(bits(&model), bits(&load(&tiny(), None).unwrap().0));
    let copied: Vec<_> = report.copied.iter().map(|(module, _)| module.as_str()).collect();
    // The first layer's is one MLP.
    assert_eq!(
        copied,
        ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]
    );
    assert!(
        report.to_string().contains("3 feed-forward layers copied"),
        "{report}"
    );

    let target = folder.path().join("packed");
    quantize_folder(
        &Checkpoint::open(folder.path()).unwrap(),
        &target,
        GROUP_64,
        ScaleRule::default(),
    )
    .unwrap();
    let (model, report) = load(&target, None).unwrap();
    assert!(report.copied.is_empty(), "{report}");
    assert_eq!(bits(&model), bits(&load(&tiny(), Some(GROUP_64)).unwrap().0));
}

#[test]
fn the_bundled_model_is_remade_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("demo-model");
    let source = Checkpoint::open(bf16_demo()).unwrap();
    // As examples/quantize.rs.
    let options = QuantizeOptions {
        shard_bytes: 7_000_000,
        ..QuantizeOptions::new(Format::mmfp4())
    };
    quantize_checkpoint(&source, &target, &options, |_, _| {}).unwrap();
    let names = |folder: &Path| -> BTreeSet<_> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    };
    let bundled = mmfp4_demo();
    // A README there is written by hand.
    let mut expected = names(&bundled);
    expected.retain(|name| name != "README.md");
    assert_eq!(names(&target), expected);
    for name in expected {
        let [made, bundled] = [&target, &bundled].map(|folder| std::fs::read(folder.join(&name)).unwrap());
        if name == "config.json" {
            // It names the version that wrote it.
            let parsed = [made, bundled].map(|text| {
                let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
                config["quantization_config"]["producer"]["version"].take();
                config
            });
            assert_eq!(parsed[0], parsed[1]);
            continue;
        }
        assert!(made == bundled, "{} differs", name.display());
    }
}

#[test]
fn written_files_are_aligned_with_odd_sizes_last() {
    let mut draft = Draft::plain();
    for (name, len) in [("a.first", 3), ("model.layers.1.odd", 5), ("z.last", 1)] {
        let odd = Stored {
            dtype: Dtype::BF16,
            shape: vec![len],
            bytes: vec![0; 2 * len],
        };
        draft.tensors.insert(name.into(), odd);
    }
    let source = draft.write();
    let target = source.path().join("packed");
    quantize_folder(
        &Checkpoint::open(source.path()).unwrap(),
        &target,
        GROUP_64,
        ScaleRule::default(),
    )
    .unwrap();
    for folder in [target, mmfp4_demo()] {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        for file in checkpoint.files() {
            let here = || checkpoint.tensors().filter(|(_, tensor)| tensor.file == *file);
            let start = here().map(|(_, tensor)| tensor.bytes.offset()).min().unwrap();
            assert_eq!(start % (16 * 1024), 0, "{}", file.display());
            let odd = |len: usize| !len.is_multiple_of(16);
            let first_odd = here()
                .filter(|(_, t)| odd(t.bytes.len()))
                .map(|(_, t)| t.bytes.offset())
                .min();
            for (name, tensor) in here().filter(|(_, tensor)| !odd(tensor.bytes.len())) {
                assert_eq!(tensor.bytes.offset() % 16, 0, "{name}");
                assert!(
                    first_odd.is_none_or(|first| tensor.bytes.offset() < first),
                    "{name}"
                );
            }
        }
    }
}

#[test]
fn quantising_writes_a_whole_folder_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let here = |folder: &Path| std::fs::read_dir(folder).unwrap().count();
    let target = folder.path().join("packed");
    let quantize = |source: &Path, format| {
        quantize_folder(
            &Checkpoint::open(source).unwrap(),
            &target,
            format,
            ScaleRule::default(),
        )
    };

    let odd = Format {
        group: 64,
        kind: ScaleKind::E8M0,
    };
    let error = quantize(&tiny(), odd).unwrap_err().to_string();
    assert!(
        error.contains("`format`") && error.contains("E8M0 every 64"),
        "{error}"
    );
    let mut nan = Draft::plain();
    nan.get(&format!("{UP}.weight")).bytes[20..22].copy_from_slice(&0x7fc0u16.to_le_bytes());
    let error = quantize(nan.write().path(), GROUP_64).unwrap_err();
    let Error::NonFinite { name, index: 10, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*name, format!("{UP}.weight"));
    let no_config = Draft::plain().write();
    let source = Checkpoint::open(no_config.path()).unwrap();
    std::fs::remove_file(no_config.path().join("config.json")).unwrap();
    let error = quantize_folder(&source, &target, GROUP_64, ScaleRule::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("config.json"), "{error}");
    assert_eq!(here(folder.path()), 0, "a failure leaves nothing");

    // What a killed process left is no obstacle.
    std::fs::create_dir(folder.path().join("packed.partial")).unwrap();
    std::fs::write(folder.path().join("packed.partial/stale"), "").unwrap();
    quantize(&tiny(), GROUP_64).unwrap();
    assert_eq!(here(folder.path()), 1);
    assert!(!target.join("stale").exists());
    let before = std::fs::read(target.join("model.safetensors")).unwrap();

    let error = quantize(&tiny(), Format::mmfp4()).unwrap_err().to_string();
    assert!(error.contains("already there"), "{error}");
    assert_eq!(std::fs::read(target.join("model.safetensors")).unwrap(), before);
}

/// The parts of a small model's folder, to be damaged.
fn whole_folder() -> TempDir {
    let folder = Draft::packed().write();
    for name in [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        std::fs::copy(mmfp4_demo().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

/// Loads a folder and, if that succeeds, computes: an error is welcome, a panic is not.
fn try_all(folder: &Path) -> bool {
    match Pipeline::from_folder(folder, &Default::default(), &Device::Cpu) {
        Ok((pipeline, _)) => {
            let model = pipeline.model();
            model
                .forward(&[1, 2], 0, &mut model.new_cache(), Logits::Last)
                .is_ok()
        }
        Err(_) => false,
    }
}

#[test]
fn no_damage_to_a_small_file_makes_a_panic() {
    let folder = whole_folder();
    assert!(try_all(folder.path()));
    let names = [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ];
    let files: Vec<_> = names
        .iter()
        .map(|name| {
            (
                folder.path().join(name),
                std::fs::read(folder.path().join(name)).unwrap(),
            )
        })
        .collect();
    let config = ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(which in 0..files.len(), at in any::<prop::sample::Index>(), byte: u8, cut: bool)| {
        let (path, whole) = &files[which];
        let mut damaged = whole.clone();
        let at = at.index(whole.len());
        match cut {
            true => damaged.truncate(at),
            false => damaged[at] = byte,
        }
        std::fs::write(path, damaged).unwrap();
        try_all(folder.path());
        std::fs::write(path, whole).unwrap();
    });
}

#[test]
fn no_damage_to_a_header_makes_a_panic() {
    let folder = Draft::packed().write();
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let config = ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(at in 0..header, bytes in prop::collection::vec(any::<u8>(), 1..4), digit: bool)| {
        let mut damaged = whole.clone();
        for (place, byte) in damaged[at..header].iter_mut().zip(&bytes) {
            // Digits keep the header's JSON whole, so that shapes and offsets are what is wrong.
            *place = match digit && place.is_ascii_digit() {
                true => b'0' + byte % 10,
                false if digit => *place,
                false => *byte,
            };
        }
        let changed = damaged != whole;
        std::fs::write(&path, damaged).unwrap();
        if let Ok((model, _)) = load(folder.path(), None) {
            let _ = model.forward(&TOKENS, 0, &mut model.new_cache(), Logits::Last);
        } else {
            prop_assert!(changed);
        }
    });
}

#[test]
fn quantising_never_removes_its_source() {
    let folder = tempfile::tempdir().unwrap();
    let partial = folder.path().join("model.partial");
    std::fs::rename(Draft::plain().write().keep(), &partial).unwrap();
    let source = Checkpoint::open(&partial).unwrap();
    let target = folder.path().join("model");
    let error = quantize_folder(&source, &target, GROUP_64, ScaleRule::Maximum)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("model.partial") && error.contains("choose another name"),
        "{error}"
    );
    assert!(partial.join("model.safetensors").exists() && partial.join("config.json").exists());
}

#[test]
fn a_config_that_is_no_object_is_refused_by_the_writer_too() {
    let folder = Draft::plain().write();
    let source = Checkpoint::open(folder.path()).unwrap();
    let target = folder.path().join("packed");
    for config in ["[]", "\"text\"", "7", "null"] {
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let error = quantize_folder(&source, &target, GROUP_64, ScaleRule::Maximum).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::File { .. }) && text.contains("config.json") && text.contains("object"),
            "{text}"
        );
        assert!(!target.exists());
    }
}

#[test]
fn groups_that_no_tensor_can_have_are_refused_before_anything_is_done() {
    let source = Checkpoint::open(tiny()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("packed");
    for group in [0, 7, 8, 48, 256, usize::MAX] {
        let format = Format {
            group,
            kind: ScaleKind::F16,
        };
        let written = quantize_folder(&source, &target, format, ScaleRule::Maximum);
        for error in [written.unwrap_err(), load(&tiny(), Some(format)).err().unwrap()] {
            let text = error.to_string();
            assert!(
                matches!(
                    error,
                    Error::Argument {
                        argument: "format",
                        ..
                    }
                ) && text.contains("16, 32, 64 or 128")
                    && text.contains(&group.to_string()),
                "{text}"
            );
        }
        assert!(!target.exists());
    }
}

#[test]
fn scales_beside_weights_in_floating_point_are_not_written_twice() {
    let mut draft = Draft::plain();
    let stray = draft.get("model.norm.weight").clone();
    draft.tensors.insert(format!("{UP}.scales"), stray);
    let folder = draft.write();
    let target = folder.path().join("packed");
    let source = Checkpoint::open(folder.path()).unwrap();
    let error = quantize_folder(&source, &target, GROUP_64, ScaleRule::Maximum).unwrap_err();
    let Error::Tensor { name, problem, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*name, format!("{UP}.scales"));
    assert!(problem.contains("floating point"), "{problem}");
    assert!(!target.exists());
}

#[test]
fn counts_beyond_any_model_are_refused() {
    let config = Draft::plain().config;
    for field in ["num_nextn_predict_layers", "n_shared_experts"] {
        for count in [1u64 << 40, u64::MAX] {
            let mut config = config.clone();
            config[field] = json!(count);
            let error = Config::from_json(&config).unwrap_err();
            assert!(
                matches!(&error, Error::Config { field: named, .. } if named == field),
                "{error}"
            );
        }
    }
}

#[test]
fn of_a_tensor_in_two_files_the_indexed_one_counts() {
    let draft = Draft::plain();
    let folder = draft.write_split(|name| match name.starts_with("model.layers.1.") {
        true => "b.safetensors",
        false => "a.safetensors",
    });
    let name = format!("{UP}.weight");
    let mut stale = draft.clone();
    stale
        .tensors
        .retain(|tensor, _| !tensor.starts_with("model.layers.1.") || *tensor == name);
    stale.get(&name).bytes.fill(0);
    let stale = stale.write();
    std::fs::copy(
        stale.path().join("model.safetensors"),
        folder.path().join("a.safetensors"),
    )
    .unwrap();
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(
        &opened.get(&name).unwrap().bytes[..],
        &draft.tensors[&name].bytes[..]
    );
}
