//! Quantised folders: what is in them, where it lies, and that interruptions do no harm.

mod common;

use candle_core::Device;
use candle_mmfp4::checkpoint::{
    Checkpoint, Layout, LoadOptions, QuantizeOptions, QuantizeReport, quantize_checkpoint,
};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::{Format, ScaleRule, quantize_dense, shared_factor};
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model};
use candle_mmfp4::{Error, Result};
use common::draft::{Draft, GROUP_64, Stored, tiny, write_json};
use common::{assert_nmse, bf16_demo, contents, values};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

fn write(source: &Path, target: &Path, options: &QuantizeOptions) -> Result<QuantizeReport> {
    quantize_checkpoint(&Checkpoint::open(source)?, target, options, |_, _| {})
}

fn logits(folder: &Path, quantize: Option<Format>) -> (Vec<f32>, BTreeSet<Layout>) {
    let options = LoadOptions {
        quantize,
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    };
    let (model, report) = Model::from_folder(folder, &options, &Device::Cpu).unwrap();
    assert!(report.unused.is_empty() && report.copied.is_empty(), "{report}");
    let logits = model.forward(&[5, 99, 3, 511, 0, 42], 0, &mut model.new_cache(), Logits::All);
    (values(&logits.unwrap()), report.layouts)
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// The modules of a checkpoint's matrices but the embeddings: what torch calls linear.
fn matrices(folder: &Path) -> BTreeSet<String> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let matrices = checkpoint.tensors().filter(|(_, stored)| stored.shape.len() == 2);
    matrices
        .filter_map(|(name, _)| name.strip_suffix(".weight"))
        .filter(|module| !module.ends_with("embed_tokens"))
        .map(String::from)
        .collect()
}

#[test]
fn each_format_is_read_back_as_it_was_quantised() {
    let place = tempfile::tempdir().unwrap();
    for (name, format, layout) in [
        ("mmfp4", Format::mmfp4(), Layout::Marlin),
        ("mxfp4", Format::mxfp4(), Layout::CompressedMxfp4),
        ("nvfp4", Format::nvfp4(), Layout::CompressedNvfp4),
    ] {
        let target = place.path().join(name);
        let report = write(&bf16_demo(), &target, &QuantizeOptions::new(format)).unwrap();
        assert!(report.kept.is_empty() && report.warnings.is_empty(), "{report}");
        assert_eq!((report.shards, report.resumed), (1, 0));
        let (found, layouts) = logits(&target, None);
        assert_eq!(layouts, BTreeSet::from([layout]));
        let (expected, _) = logits(&bf16_demo(), Some(format));
        match format == Format::nvfp4() {
            // There matrices share a factor, which moves the smallest scales.
            true => assert_nmse(&found, &expected, 1e-3, name),
            false => assert!(found == expected, "{name}"),
        }
        for file in [
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        ] {
            let same =
                std::fs::read(target.join(file)).unwrap() == std::fs::read(bf16_demo().join(file)).unwrap();
            assert!(same, "{file}");
        }
    }
}

#[test]
fn matrices_that_servers_join_share_a_factor() {
    let mut draft = Draft::plain();
    // One of each pair far larger than the other.
    let louder = [
        "mlp.experts.0.up_proj",
        "mlp.shared_experts.gate_proj",
        "self_attn.kv_a_proj_with_mqa",
    ];
    for part in louder {
        let stored = draft.get(&format!("model.layers.1.{part}.weight"));
        for value in stored.bytes.chunks_exact_mut(2) {
            let louder = half::bf16::from_le_bytes([value[0], value[1]]).to_f32() * 1000.0;
            value.copy_from_slice(&half::bf16::from_f32(louder).to_le_bytes());
        }
    }
    let source = draft.write();
    let target = source.path().join("nvfp4");
    write(source.path(), &target, &QuantizeOptions::new(Format::nvfp4())).unwrap();
    let (original, written) = (
        Checkpoint::open(source.path()).unwrap(),
        Checkpoint::open(&target).unwrap(),
    );
    let dense = |module: &str| {
        let name = format!("{module}.weight");
        let stored = original.get(&name).unwrap();
        stored.matrix(&name, stored.shape[0], stored.shape[1]).unwrap()
    };
    let divisor = |module: &str| {
        let name = format!("{module}.weight_global_scale");
        let stored = written.get(&name).unwrap();
        assert_eq!((stored.dtype, &stored.shape[..]), (Dtype::F32, &[1][..]));
        stored.vector(&name, 1).unwrap()[0]
    };
    let mut different = 0;
    for module in matrices(source.path())
        .iter()
        .filter(|m| m.ends_with("_proj") || m.ends_with("_mqa"))
    {
        let partner = match module.rsplit_once('.').unwrap() {
            (parent, "gate_proj") => Some(format!("{parent}.up_proj")),
            (parent, "up_proj") => Some(format!("{parent}.gate_proj")),
            (parent, "q_a_proj") => Some(format!("{parent}.kv_a_proj_with_mqa")),
            (parent, "kv_a_proj_with_mqa") => Some(format!("{parent}.q_a_proj")),
            _ => None,
        };
        let together: Vec<_> = [Some(module.clone()), partner].into_iter().flatten().collect();
        let matrices: Vec<_> = together.iter().map(|m| (m.as_str(), dense(m))).collect();
        let borrowed: Vec<_> = matrices.iter().map(|(name, matrix)| (*name, matrix)).collect();
        let factor = shared_factor(&borrowed).unwrap();
        different += usize::from(shared_factor(&borrowed[..1]).unwrap() != factor);
        for module in &together {
            assert_eq!(divisor(module), 1.0 / factor, "{module}");
        }
        let expected = quantize_dense(
            module,
            &matrices[0].1,
            Format::nvfp4(),
            ScaleRule::default(),
            Some(factor),
        )
        .unwrap();
        let tensor = |suffix: &str| written.get(&format!("{module}.{suffix}")).unwrap();
        let (codes, scales) = (tensor("weight_packed"), tensor("weight_scale"));
        let (n, k) = expected.shape();
        assert_eq!((codes.dtype, &codes.shape[..]), (Dtype::U8, &[n, k / 2][..]));
        assert_eq!(
            (scales.dtype, &scales.shape[..]),
            (Dtype::F8_E4M3, &[n, k / 16][..])
        );
        assert!(
            codes.bytes[..] == expected.codes()[..] && scales.bytes[..] == expected.scales()[..],
            "{module}"
        );
    }
    assert!(different >= 3, "{different}");
    // Our own reader makes the same of it.
    assert!(logits(&target, None).0.iter().all(|v| v.is_finite()));
}

#[test]
fn the_config_names_every_linear_layer_that_is_not_quantised() {
    let place = tempfile::tempdir().unwrap();
    for (name, format, strategy, group) in [
        ("nvfp4-pack-quantized", Format::nvfp4(), "tensor_group", 16),
        ("mxfp4-pack-quantized", Format::mxfp4(), "group", 32),
    ] {
        let target = place.path().join(name);
        let options = QuantizeOptions {
            skip_layers: vec![-1],
            keep: vec!["kv_b_proj".into()],
            source: Some("org/model@abc".into()),
            ..QuantizeOptions::new(format)
        };
        write(&tiny(), &target, &options).unwrap();
        let note = &config(&target)["quantization_config"];
        assert_eq!(note["quant_method"], "compressed-tensors");
        assert_eq!(note["format"], name);
        assert_eq!(note["quantization_status"], "compressed");
        let group_0 = &note["config_groups"]["group_0"];
        assert_eq!(group_0["targets"], json!(["Linear"]));
        assert_eq!(group_0["input_activations"], Value::Null);
        let weights = json!({
            "num_bits": 4, "type": "float", "strategy": strategy, "group_size": group, "symmetric": true,
            "dynamic": false,
        });
        assert_eq!(group_0["weights"], weights);
        assert_eq!(note["producer"]["source"], "org/model@abc");
        assert_eq!(note["producer"]["keep"], json!(["kv_b_proj"]));

        let written = Checkpoint::open(&target).unwrap();
        let quantised: BTreeSet<String> = written
            .tensors()
            .filter_map(|(n, _)| Some(n.strip_suffix(".weight_packed")?.to_string()))
            .collect();
        let ignored: Vec<String> = serde_json::from_value(note["ignore"].clone()).unwrap();
        let ignored_set: BTreeSet<String> = ignored.iter().cloned().collect();
        assert_eq!(ignored.len(), ignored_set.len());
        assert!(quantised.is_disjoint(&ignored_set));
        let all: BTreeSet<String> = quantised.union(&ignored_set).cloned().collect();
        assert_eq!(all, matrices(&tiny()));
        for kept in [
            "lm_head",
            "model.layers.1.mlp.gate",
            "model.layers.0.self_attn.kv_b_proj",
        ] {
            assert!(ignored_set.contains(kept), "{kept}");
        }
        assert!(ignored_set.contains("model.layers.2.mlp.experts.1.down_proj") && quantised.len() > 10);
        // Everything else of the config is as it was.
        let mut rest = config(&target);
        rest.as_object_mut().unwrap().remove("quantization_config");
        assert_eq!(rest, config(&tiny()));
    }
}

#[test]
fn a_shared_head_is_named_too() {
    let source = tied();
    let target = tempfile::tempdir().unwrap();
    let target = target.path().join("nvfp4");
    write(&source, &target, &QuantizeOptions::new(Format::nvfp4())).unwrap();
    let ignored = config(&target)["quantization_config"]["ignore"].clone();
    assert!(
        ignored.as_array().unwrap().contains(&json!("lm_head")),
        "{ignored}"
    );
    assert!(
        Checkpoint::open(&target)
            .unwrap()
            .find("lm_head.weight")
            .is_none()
    );
}

fn tied() -> PathBuf {
    common::repository("tests/data/tiny-models/tied-and-biased")
}

#[test]
fn layers_lie_in_order_each_whole_and_aligned() {
    let place = tempfile::tempdir().unwrap();
    for (name, format) in [
        ("mmfp4", GROUP_64),
        ("mxfp4", Format::mxfp4()),
        ("nvfp4", Format::nvfp4()),
    ] {
        let target = place.path().join(name);
        let options = QuantizeOptions {
            shard_bytes: 1,
            ..QuantizeOptions::new(format)
        };
        let report = write(&tiny(), &target, &options).unwrap();
        // Embeddings, and three layers; the last norm is with the last layer.
        assert_eq!(report.shards, 4);
        let written = Checkpoint::open(&target).unwrap();
        assert_eq!(written.files().len(), 4);
        for (index, file) in written.files().iter().enumerate() {
            let here: Vec<_> = written
                .tensors()
                .filter(|(_, tensor)| tensor.file == *file)
                .collect();
            let start = here
                .iter()
                .map(|(_, tensor)| tensor.bytes.offset())
                .min()
                .unwrap();
            assert_eq!(start % (16 * 1024), 0);
            for (name, tensor) in &here {
                match index {
                    0 => assert!(
                        ["lm_head.weight", "model.embed_tokens.weight"].contains(name),
                        "{name}"
                    ),
                    _ => {
                        let layer = format!("model.layers.{}.", index - 1);
                        assert!(
                            name.starts_with(&layer) || (index == 3 && *name == "model.norm.weight"),
                            "{name}"
                        );
                    }
                }
                if tensor.bytes.len() % 16 == 0 {
                    assert_eq!(tensor.bytes.offset() % 16, 0, "{name}");
                }
            }
            let experts: Vec<_> = here
                .iter()
                .filter(|(name, t)| name.contains(".experts.") && t.bytes.len() % 16 == 0)
                .map(|(_, tensor)| (tensor.bytes.offset(), tensor.bytes.len()))
                .collect();
            let start = experts.iter().map(|(start, _)| *start).min();
            let end = experts.iter().map(|(start, len)| start + len).max();
            let whole: usize = experts.iter().map(|(_, len)| len).sum();
            assert_eq!(end.zip(start).map_or(0, |(end, start)| end - start), whole);
        }
    }
}

#[test]
fn what_is_kept_is_as_it_was() {
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("packed");
    let options = QuantizeOptions {
        skip_layers: vec![0],
        keep: vec!["o_proj".into(), "nothing_like_it".into()],
        ..QuantizeOptions::new(GROUP_64)
    };
    let report = write(&tiny(), &target, &options).unwrap();
    assert!(
        report.warnings.len() == 1 && report.warnings[0].contains("nothing_like_it"),
        "{report}"
    );
    let text = report.to_string();
    assert!(
        text.contains("layer 0 is one of") && text.contains("names it: o_proj"),
        "{text}"
    );
    let (plain, written) = (
        Checkpoint::open(tiny()).unwrap(),
        Checkpoint::open(&target).unwrap(),
    );
    let mut kept = BTreeSet::new();
    for module in matrices(&tiny()) {
        let name = format!("{module}.weight");
        if written.get(&name).unwrap().dtype == Dtype::BF16 {
            assert_eq!(
                written.get(&name).unwrap().bytes[..],
                plain.get(&name).unwrap().bytes[..],
                "{name}"
            );
            kept.insert(name);
        }
    }
    for name in &report.kept {
        assert!(kept.contains(&name.name), "{}", name.name);
    }
    assert!(
        kept.contains("model.layers.0.mlp.gate_proj.weight")
            && kept.contains("model.layers.2.self_attn.o_proj.weight")
    );
    assert!(!kept.contains("model.layers.1.mlp.experts.0.gate_proj.weight"));
    let bytes: usize = written.tensors().map(|(_, tensor)| tensor.bytes.len()).sum();
    assert_eq!(bytes, report.quantized.bytes + report.copied.bytes);
    assert_eq!(logits(&target, None).0.len(), logits(&tiny(), None).0.len());
}

#[test]
fn half_of_what_servers_join_cannot_be_kept() {
    let place = tempfile::tempdir().unwrap();
    for (pattern, named) in [
        ("layers.1.mlp.experts.2.down_proj", "experts.2.down_proj"),
        ("model.layers.0.mlp.up_proj", "mlp.up_proj"),
        ("q_a_proj", "q_a_proj"),
    ] {
        let options = |format| QuantizeOptions {
            keep: vec![pattern.into()],
            ..QuantizeOptions::new(format)
        };
        let target = place.path().join("packed");
        let error = write(&tiny(), &target, &options(Format::mxfp4())).unwrap_err();
        assert!(
            matches!(error, Error::Argument { argument: "keep", .. }),
            "{error}"
        );
        assert!(error.to_string().contains(named), "{error}");
        assert!(!target.exists());
        write(&tiny(), &place.path().join(named), &options(GROUP_64)).unwrap();
    }
}

#[test]
fn a_layer_of_several_tokens_keeps_its_joint() {
    let mut draft = Draft::plain();
    let plain = draft.get("model.layers.1.self_attn.o_proj.weight").clone();
    for part in ["eh_proj", "shared_head.head", "mlp.experts.0.down_proj"] {
        draft
            .tensors
            .insert(format!("model.layers.3.{part}.weight"), plain.clone());
    }
    draft.config["num_nextn_predict_layers"] = json!(1);
    let source = draft.write();
    let target = source.path().join("packed");
    let options = QuantizeOptions::new(Format::mxfp4());
    write(source.path(), &target, &options).unwrap();
    let written = Checkpoint::open(&target).unwrap();
    assert!(
        written
            .find("model.layers.3.mlp.experts.0.down_proj.weight_packed")
            .is_some()
    );
    let ignored = config(&target)["quantization_config"]["ignore"].to_string();
    for kept in ["model.layers.3.eh_proj", "model.layers.3.shared_head.head"] {
        assert_eq!(
            written.get(&format!("{kept}.weight")).unwrap().bytes[..],
            plain.bytes[..]
        );
        assert!(ignored.contains(kept), "{ignored}");
    }
    logits(&target, None);
}

const MANY: QuantizeOptions = QuantizeOptions {
    format: Format::nvfp4(),
    rule: ScaleRule::SquaredError,
    skip_layers: Vec::new(),
    keep: Vec::new(),
    shard_bytes: 1,
    source: None,
};

/// Runs until so many files are finished, and then stops as a killed process does: at once.
fn interrupted(source: &Path, target: &Path, files: usize) -> PathBuf {
    let partial = target.with_extension("partial");
    let finished = || {
        let names = std::fs::read_dir(&partial)
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        names
            .filter(|name| name.to_string_lossy().ends_with(".safetensors"))
            .count()
    };
    let source = Checkpoint::open(source).unwrap();
    let stopped = catch_unwind(AssertUnwindSafe(|| {
        quantize_checkpoint(&source, target, &MANY, |_, _| {
            assert!(finished() < files, "stopped")
        })
    }));
    assert!(stopped.is_err() && !target.exists());
    assert_eq!(finished(), files);
    partial
}

/// What is done to a finished file.
type Damage<'a> = &'a dyn Fn(&Path);

#[test]
fn an_interrupted_run_is_continued_with_what_is_whole() {
    let place = tempfile::tempdir().unwrap();
    let straight = place.path().join("straight");
    assert_eq!(write(&tiny(), &straight, &MANY).unwrap().resumed, 0);
    let expected = contents(&straight);
    let shard = |index: usize| format!("model-{index:05}-of-00004.safetensors");
    let cut = |path: &Path| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    };
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    let empty = |path: &Path| std::fs::write(path, "").unwrap();
    let none = |_: &Path| {};
    let cases: [(&str, Damage<'_>, usize); 4] = [
        ("whole", &none, 3),
        ("cut", &cut, 2),
        ("flipped", &flip, 2),
        ("empty", &empty, 2),
    ];
    for (name, damage, resumed) in cases {
        let target = place.path().join(name);
        let partial = interrupted(&tiny(), &target, 3);
        let untouched = std::fs::metadata(partial.join(shard(2)))
            .unwrap()
            .modified()
            .unwrap();
        damage(&partial.join(shard(1)));
        std::fs::write(partial.join("stale"), "of something else").unwrap();
        let mut first = None;
        let source = Checkpoint::open(tiny()).unwrap();
        let report = quantize_checkpoint(&source, &target, &MANY, |done, total| {
            first.get_or_insert((done, total));
        });
        assert_eq!(report.unwrap().resumed, resumed, "{name}");
        let (done, total) = first.unwrap();
        assert!(0 < done && done < total, "{name}");
        assert!(contents(&target) == expected, "{name}");
        let kept = std::fs::metadata(target.join(shard(2)))
            .unwrap()
            .modified()
            .unwrap();
        assert_eq!(kept, untouched, "{name}");
        assert!(!partial.exists());
    }
}

#[test]
fn what_belongs_to_another_source_or_other_options_is_written_anew() {
    let place = tempfile::tempdir().unwrap();
    let source = Draft::plain().write();
    let target = place.path().join("packed");
    interrupted(source.path(), &target, 3);
    let options = QuantizeOptions {
        rule: ScaleRule::Maximum,
        ..MANY
    };
    assert_eq!(write(source.path(), &target, &options).unwrap().resumed, 0);
    std::fs::remove_dir_all(&target).unwrap();

    interrupted(source.path(), &target, 3);
    let mut other = Draft::plain();
    other.get("model.layers.2.mlp.experts.0.up_proj.weight").bytes[1] ^= 1;
    let other = other.write();
    std::fs::copy(
        other.path().join("model.safetensors"),
        source.path().join("model.safetensors"),
    )
    .unwrap();
    assert_eq!(write(source.path(), &target, &MANY).unwrap().resumed, 0);
}

#[test]
fn an_error_leaves_what_is_finished_and_nothing_where_nothing_is() {
    let place = tempfile::tempdir().unwrap();
    let count = || std::fs::read_dir(place.path()).unwrap().count();
    let mut draft = Draft::plain();
    let nan = 0x7fc0u16.to_le_bytes();
    draft.get("model.layers.2.mlp.experts.0.up_proj.weight").bytes[..2].copy_from_slice(&nan);
    let (source, target) = (draft.write(), place.path().join("packed"));
    let whole = QuantizeOptions::new(Format::mxfp4());
    assert!(matches!(
        write(source.path(), &target, &whole),
        Err(Error::NonFinite { .. })
    ));
    assert_eq!(count(), 0);
    assert!(matches!(
        write(source.path(), &target, &MANY),
        Err(Error::NonFinite { .. })
    ));
    assert_eq!(count(), 1);
    assert!(
        !target.exists()
            && place
                .path()
                .join("packed.partial")
                .join("model-00003-of-00004.safetensors")
                .exists()
    );

    let file = place.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = write(&tiny(), &file.join("packed"), &MANY).unwrap_err();
    assert!(
        matches!(error, Error::Io { .. }) && error.to_string().contains("packed.partial"),
        "{error}"
    );
    let error = write(&tiny(), &file, &MANY).unwrap_err().to_string();
    assert!(error.contains("already there"), "{error}");
}

#[test]
fn two_do_not_write_one_folder() {
    let place = tempfile::tempdir().unwrap();
    let partial = place.path().join("packed.partial");
    std::fs::create_dir(&partial).unwrap();
    let lock = std::fs::File::create(partial.join("quantize.lock")).unwrap();
    lock.lock().unwrap();
    let target = place.path().join("packed");
    let error = write(&tiny(), &target, &MANY).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    drop(lock);
    write(&tiny(), &target, &MANY).unwrap();
}

#[test]
fn what_is_quantised_already_or_has_nothing_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("again");
    let refused = |source: &Path, part: &str| {
        let error = write(source, &target, &MANY).unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} should hold {part:?}");
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
    };
    // By its config, and by its tensors alone.
    let mut packed = Draft::packed();
    refused(packed.write().path(), "quantised already");
    packed.config = Draft::plain().config;
    refused(packed.write().path(), "quantised already");
    let mut eight_bits = Draft::plain();
    let stored = eight_bits.get("model.layers.1.self_attn.o_proj.weight");
    (stored.dtype, stored.bytes) = (Dtype::F8_E4M3, stored.bytes[..stored.bytes.len() / 2].to_vec());
    refused(eight_bits.write().path(), "F8_E4M3");

    let mut stacked = Draft::plain();
    let experts = Stored {
        dtype: Dtype::BF16,
        shape: vec![2, 4, 64],
        bytes: vec![0; 1024],
    };
    stacked
        .tensors
        .insert("model.layers.1.mlp.experts.gate_up_proj".into(), experts);
    refused(stacked.write().path(), "all experts in one");

    let mut none = Draft::plain();
    none.tensors.retain(|name, _| !name.contains("_proj"));
    refused(none.write().path(), "no linear layer");
    let empty = tempfile::tempdir().unwrap();
    write_json(empty.path(), "config.json", &json!({}));
    refused(empty.path(), "safetensors");
}
