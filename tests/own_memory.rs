//! A map, not a copy: loading takes the memory that its report says, whatever the size of the file. A process of its own, with
//! one test, so that nothing else moves it.
//!
//! Needs Linux' count of a process's own memory; elsewhere it says that it was skipped.

mod common;

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_mmfp4::checkpoint::{
    Checkpoint, Layout, LoadOptions, LoadReport, ModelFiles, OwnReason, QuantizeOptions, Share,
    quantize_checkpoint,
};
use candle_mmfp4::fp4::Format;
use candle_mmfp4::memory::private_resident;
use candle_mmfp4::models::glm4_moe_lite::Model;
use common::bf16_demo;
use common::draft::Draft;
use common::gguf::{Gguf, Packed, integers, mxfp4, nvfp4, u32_value};
use common::packed::{Factors, Lie, pack_experts};
use safetensors::Dtype;
use serde_json::json;
use std::path::Path;
use tempfile::TempDir;

/// What loading takes beside the weights that it makes: the structures around them, a few hundred bytes each.
const BESIDE: u64 = 1 << 20;
/// The system gives whole pages to each weight.
const PAGE: u64 = 4096;
/// Layers of the smaller model and of the larger.
const LAYERS: [usize; 2] = [6, 24];

/// The trained model with its sparse layers repeated, in BF16.
fn deep(layers: usize) -> TempDir {
    let mut draft = Draft::read(&bf16_demo());
    for layer in LAYERS[0]..layers {
        let from = format!("model.layers.{}.", 1 + (layer - 1) % 5);
        let copied: Vec<_> = draft
            .tensors
            .iter()
            .filter(|(name, _)| name.starts_with(&from))
            .collect();
        let copied: Vec<_> = copied
            .into_iter()
            .map(|(name, tensor)| {
                (
                    name.replace(&from, &format!("model.layers.{layer}.")),
                    tensor.clone(),
                )
            })
            .collect();
        draft.tensors.extend(copied);
    }
    let kinds = (0..layers).map(|layer| if layer == 0 { "dense" } else { "sparse" });
    draft.config["num_hidden_layers"] = json!(layers);
    draft.config["mlp_layer_types"] = json!(kinds.collect::<Vec<_>>());
    draft.write()
}

fn quantized(source: &Path, format: Format) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(source).unwrap();
    let target = folder.path().join("model");
    quantize_checkpoint(&source, &target, &QuantizeOptions::new(format), |_, _| {}).unwrap();
    folder
}

/// The same codes under other names, as another writer has them; their values do not matter here.
fn renamed(folder: &TempDir, change: impl Fn(&str, &mut common::draft::Stored) -> Option<String>) -> TempDir {
    let mut draft = Draft::read(&folder.path().join("model"));
    let tensors = std::mem::take(&mut draft.tensors).into_iter();
    draft.tensors = tensors
        .filter_map(|(name, mut tensor)| Some((change(&name, &mut tensor)?, tensor)))
        .collect();
    draft.write()
}

fn modelopt(folder: &TempDir) -> TempDir {
    renamed(folder, |name, _| {
        let name = name.replace("weight_packed", "weight");
        Some(name.replace("weight_global_scale", "weight_scale_2"))
    })
}

fn mlx(folder: &TempDir) -> TempDir {
    renamed(folder, |name, tensor| {
        if name.ends_with("weight_global_scale") {
            return None;
        }
        if name.ends_with("weight_packed") {
            tensor.dtype = Dtype::U32;
            tensor.shape[1] /= 4;
        } else if name.ends_with("weight_scale") {
            tensor.dtype = Dtype::U8;
        }
        let name = name.replace("weight_packed", "weight");
        Some(name.replace("weight_scale", "scales"))
    })
}

fn turned(folder: &TempDir) -> TempDir {
    renamed(folder, |name, tensor| {
        if name.ends_with(".scales") {
            tensor.shape.reverse();
        }
        Some(name.into())
    })
}

/// The same with the experts of a layer in one parameter, rows as columns.
fn packed(folder: &TempDir) -> TempDir {
    let mut draft = Draft::read(modelopt(folder).path());
    pack_experts(&mut draft, Lie::Columns, Factors::Each);
    draft.write()
}

/// A GGUF file of a model in BF16 with its last layer repeated.
fn gguf(model: &Draft, layers: usize, pack: impl Fn((usize, usize), &[f32]) -> Packed) -> TempDir {
    let mut file = Gguf::of(model, false, pack);
    let there = model.config["num_hidden_layers"].as_u64().unwrap() as usize;
    let from = format!("blk.{}.", there - 1);
    let last: Vec<_> = (file.tensors.iter())
        .filter(|tensor| tensor.name.starts_with(&from))
        .cloned()
        .collect();
    for layer in there..layers {
        for tensor in &last {
            let mut tensor = tensor.clone();
            tensor.name = tensor.name.replace(&from, &format!("blk.{layer}."));
            file.tensors.push(tensor);
        }
    }
    file.set("deepseek2.block_count", u32_value(layers as u32));
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.gguf"), file.bytes()).unwrap();
    folder
}

/// What of a load is the process's own: measured, and as reported.
struct Taken {
    measured: u64,
    report: LoadReport,
    file: u64,
}

/// Loads, holds the memory against the report, and looks at headers alone, which takes none.
fn load(folder: &Path, options: &LoadOptions) -> Taken {
    let files = ModelFiles::folder(folder);
    let own = || private_resident().unwrap();
    let before = own();
    let found = Model::inspect(&files, options).unwrap();
    let inspecting = own().saturating_sub(before);
    assert!(inspecting <= BESIDE, "{inspecting} bytes to look at headers");

    let before = own();
    let (model, report) = Model::from_files(&files, options, &Device::Cpu).unwrap();
    let measured = own().saturating_sub(before);
    drop(model);
    assert_eq!(found.load.as_ref(), Some(&report));
    let told = report.own_bytes() as u64;
    let weights: usize = report.own.iter().map(|own| own.weights).sum();
    let what = format!(
        "{measured} bytes measured, {told} reported ({:?})",
        report.layouts
    );
    assert!(measured <= told + BESIDE + PAGE * weights as u64, "{what}");
    // What was freed before may be used again, but weights lie in maps of their own.
    let vectors = report.own.iter().find(|own| own.reason == OwnReason::Decoded);
    let maps = told - vectors.map_or(0, |own| own.bytes as u64);
    assert!(measured >= maps, "{what}");
    let file = found.files.iter().map(|file| file.bytes).sum();
    Taken {
        measured,
        report,
        file,
    }
}

/// Of models of different depths, used where they lie: no more memory than the structures of the layers take. Gives the
/// larger's report.
fn used_where_it_lies(folders: &[TempDir; 2], inside: &str, layout: Option<Layout>) -> LoadReport {
    let [small, large] = [0, 1].map(|i| load(&folders[i].path().join(inside), &LoadOptions::default()));
    assert_eq!(large.report.layouts.iter().next(), layout.as_ref());
    for taken in [&small, &large] {
        assert_eq!(
            taken.report.own.len(),
            1,
            "nothing but norms and biases: {:?}",
            taken.report.own
        );
    }
    let (file, own) = (
        large.file - small.file,
        large.measured.saturating_sub(small.measured),
    );
    println!(
        "{}: {} and {} bytes of tensors, {} and {} of memory",
        layout.map_or("no FP4", Layout::name),
        small.file,
        large.file,
        small.measured,
        large.measured
    );
    assert!(
        file > 15 << 20 && own <= BESIDE,
        "{own} bytes more for a file of {file} bytes more"
    );
    large.report
}

/// What is made while loading: it is there, and no more than that. Gives the report.
fn made(folder: &Path, options: &LoadOptions, reason: OwnReason) -> LoadReport {
    let taken = load(folder, options);
    let own = taken.report.own.iter().find(|own| own.reason == reason);
    let own = own.unwrap_or_else(|| panic!("{reason:?} in {:?}", taken.report.own));
    println!(
        "{reason:?}: {} bytes of {} in the file, {} measured",
        own.bytes, taken.file, taken.measured
    );
    assert!(own.bytes > 4 << 20, "{reason:?}: {} bytes", own.bytes);
    taken.report
}

/// What is repacked while loading, once: nothing is copied from what was repacked, and no more of it is there than the weights.
fn repacked(folder: &Path, layout: Layout) {
    let report = made(folder, &LoadOptions::default(), OwnReason::Repacked);
    assert!(report.layouts.contains(&layout), "{:?}", report.layouts);
    let reasons: Vec<_> = report.own.iter().map(|own| own.reason).collect();
    assert_eq!(reasons, [OwnReason::Repacked, OwnReason::Decoded]);
    // Each expert's weights begin aligned where they were brought together.
    let (own, weights) = (report.own[0].bytes, report.repacked.bytes);
    assert!(
        weights <= own && own < weights + weights / 100,
        "{own} bytes of {weights}"
    );
}

#[test]
fn loading_takes_the_memory_that_it_reports() {
    if private_resident().is_none() {
        println!("skipped: this system does not tell how much memory is a process's own");
        return;
    }
    let bf16 = LAYERS.map(deep);
    let of = |format| [0, 1].map(|i| quantized(bf16[i].path(), format));
    let [marlin, nv, mx] = [Format::mmfp4(), Format::nvfp4(), Format::mxfp4()].map(of);
    let other =
        |folders: &[TempDir; 2], write: fn(&TempDir) -> TempDir| [write(&folders[0]), write(&folders[1])];
    let none = LoadOptions::default();

    used_where_it_lies(&bf16, "", None);
    used_where_it_lies(&marlin, "model", Some(Layout::Marlin));
    used_where_it_lies(&nv, "model", Some(Layout::CompressedNvfp4));
    used_where_it_lies(&mx, "model", Some(Layout::CompressedMxfp4));
    used_where_it_lies(&other(&nv, modelopt), "", Some(Layout::ModelOpt));
    used_where_it_lies(&other(&nv, mlx), "", Some(Layout::MlxNvfp4));
    used_where_it_lies(&other(&mx, mlx), "", Some(Layout::MlxMxfp4));

    // Rows of 128, which k-quants do not divide, in Q8_0, as llama.cpp has them.
    let demo = Draft::read(&bf16_demo());
    let blocks = LAYERS.map(|layers| gguf(&demo, layers, integers(GgmlDType::Q4K, GgmlDType::Q8_0)));
    let report = used_where_it_lies(&blocks, "", None);
    let of_q4k = |share: &&Share| share.format == "Q4K";
    let q4k = report.components.iter().filter(of_q4k).map(|share| share.bytes);
    assert!(q4k.sum::<usize>() > 15 << 20, "{:?}", report.components);

    // Codes of experts whose scales are turned are copied together with these.
    made(turned(&marlin[1]).path(), &none, OwnReason::Gathered);
    let tiny = Draft::plain();
    repacked(gguf(&tiny, 64, mxfp4).path(), Layout::GgufMxfp4);
    repacked(gguf(&tiny, 64, nvfp4).path(), Layout::GgufNvfp4);
    // The shared expert beside them lies in the file: all of a layer's are copied together, what was repacked among them, once.
    let report = made(packed(&nv[1]).path(), &none, OwnReason::Gathered);
    assert!(
        report.layouts.contains(&Layout::ModelOptPacked),
        "{:?}",
        report.layouts
    );
    assert!(
        report.repacked.tensors > 0 && report.own.len() == 2,
        "{:?}",
        report.own
    );
    let quantize = LoadOptions {
        quantize: Some(Format::mmfp4()),
        ..none.clone()
    };
    made(bf16[1].path(), &quantize, OwnReason::Quantized);
    let split = Draft::read(bf16[0].path()).write_split(|name| match name.contains(".experts.1.") {
        true => "model-00002-of-00002.safetensors",
        false => "model-00001-of-00002.safetensors",
    });
    made(split.path(), &none, OwnReason::Gathered);
}
