//! What a checkpoint lacks: from another of the same model, or an error that says so.

mod common;

use candle_core::Device;
use candle_mmfp4::checkpoint::{Checkpoint, LoadOptions, LoadReport, ModelFiles};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model};
use common::draft::{Draft, tiny, write_json};
use common::values;
use serde_json::Value;
use std::path::{Path, PathBuf};

const NORM: &str = "model.norm.weight";
const BIAS: &str = "model.layers.1.mlp.gate.e_score_correction_bias";
const UP: &str = "model.layers.1.mlp.experts.3.up_proj";
const INDEX: &str = "model.safetensors.index.json";

fn load(folder: &Path, base: Option<&Path>) -> candle_mmfp4::Result<(Model, LoadReport)> {
    let options = LoadOptions {
        base: base.map(ModelFiles::folder),
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    };
    Model::from_folder(folder, &options, &Device::Cpu)
}

fn bits(model: &Model) -> Vec<u32> {
    let logits = model.forward(&[5, 99, 3, 511, 0, 42], 0, &mut model.new_cache(), Logits::All);
    values(&logits.unwrap()).into_iter().map(f32::to_bits).collect()
}

fn assert_refused(draft: &Draft, base: Option<&Path>, parts: &[&str]) -> String {
    let error = load(draft.write().path(), base).err();
    let error = error
        .unwrap_or_else(|| panic!("should say {parts:?}"))
        .to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} should hold {part:?}");
    }
    error
}

fn without(mut draft: Draft, names: &[&str]) -> Draft {
    for name in names {
        draft.tensors.remove(*name).unwrap_or_else(|| panic!("{name}"));
    }
    draft
}

#[test]
fn what_is_missing_comes_from_the_base() {
    let original = tiny();
    let whole = bits(&load(&original, None).unwrap().0);
    for name in [
        NORM,
        BIAS,
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.self_attn.kv_b_proj.weight",
        "model.layers.0.input_layernorm.weight",
        &format!("{UP}.weight"),
    ] {
        let draft = without(Draft::plain(), &[name]);
        assert_refused(&draft, None, &[&format!("`{name}`"), "missing", "--base"]);
        let (model, report) = load(draft.write().path(), Some(&original)).unwrap();
        assert!(bits(&model) == whole, "{name}");
        let [supplied] = &report.supplied[..] else {
            panic!("{report}")
        };
        assert_eq!(supplied.name, name);
        assert_eq!(supplied.file, original.join("model.safetensors"));
        assert!(report.unused.is_empty() && report.warnings.is_empty(), "{report}");
        let line = format!("1 missing tensors taken from {}: {name}", supplied.file.display());
        assert!(report.to_string().lines().any(|found| found == line), "{report}");
    }
    // Nothing is missing: said, and of no effect.
    let (model, report) = load(&original, Some(&original)).unwrap();
    assert!(bits(&model) == whole && report.supplied.is_empty());
    assert!(report.to_string().contains("it has no effect"), "{report}");
}

#[test]
fn a_quantised_checkpoint_is_completed_but_never_mixed() {
    let original = tiny();
    let draft = without(Draft::packed(), &[NORM, BIAS]);
    let (model, report) = load(draft.write().path(), Some(&original)).unwrap();
    let (expected, before) = load(Draft::packed().write().path(), None).unwrap();
    assert!(bits(&model) == bits(&expected));
    assert_eq!((report.supplied.len(), report.fp4), (2, before.fp4));

    // A whole weight comes in floating point.
    let (codes, scales) = (format!("{UP}.weight"), format!("{UP}.scales"));
    let draft = without(Draft::packed(), &[&codes, &scales]);
    let folder = draft.write();
    assert_eq!(
        Model::missing_tensors(&ModelFiles::folder(folder.path())).unwrap(),
        std::slice::from_ref(&codes)
    );
    let (_, report) = load(folder.path(), Some(&original)).unwrap();
    assert_eq!(
        (report.supplied.len(), report.fp4.tensors),
        (1, before.fp4.tensors - 1)
    );

    // Of one that is there in part, nothing.
    for part in [&codes, &scales] {
        let draft = without(Draft::packed(), &[part]);
        let error = assert_refused(&draft, Some(&original), &[&format!("`{part}`"), "missing"]);
        assert!(!error.contains("--base"), "{error}");
    }
}

#[test]
fn a_base_that_does_not_fit_is_refused_with_its_file() {
    let draft = without(Draft::plain(), &[NORM]);
    let beside = |change: &dyn Fn(&mut Draft)| {
        let mut base = Draft::plain();
        change(&mut base);
        base.write()
    };
    let base = beside(&|base| base.get(NORM).shape = vec![2, 64]);
    let file = base.path().join("model.safetensors").display().to_string();
    assert_refused(
        &draft,
        Some(base.path()),
        &["`model.norm.weight`", &file, "shape [2, 64]"],
    );
    let base = beside(&|base| drop(base.tensors.remove(NORM)));
    let folder = base.path().display().to_string();
    assert_refused(
        &draft,
        Some(base.path()),
        &["`model.norm.weight`", &folder, "missing there"],
    );
    // Quantised there.
    let base = Draft::packed().write();
    let file = base.path().join("model.safetensors").display().to_string();
    let weight = format!("{UP}.weight");
    let draft = without(Draft::plain(), &[&weight]);
    assert_refused(
        &draft,
        Some(base.path()),
        &[&format!("`{weight}`"), &file, "dtype U32"],
    );
    let nowhere = base.path().join("no-such-folder");
    assert_refused(&draft, Some(&nowhere), &["no-such-folder", "no such folder"]);
}

#[test]
fn of_a_base_only_the_files_that_are_needed_are_opened() {
    let base = Draft::plain().write_split(|name| match name.contains("layers.1.") {
        true => "a.safetensors",
        false => "b.safetensors",
    });
    std::fs::write(base.path().join("a.safetensors"), "damaged").unwrap();
    let (_, report) = load(without(Draft::plain(), &[NORM]).write().path(), Some(base.path())).unwrap();
    assert_eq!(report.supplied[0].file, base.path().join("b.safetensors"));
    let needs_both = without(Draft::plain(), &[NORM, BIAS]);
    assert_refused(&needs_both, Some(base.path()), &["a.safetensors", "not a whole"]);
    std::fs::remove_file(base.path().join("a.safetensors")).unwrap();
    assert_refused(
        &needs_both,
        Some(base.path()),
        &["a.safetensors", "index names this file"],
    );
}

/// The tiny model in two files, their index with `added` entries.
fn indexed(added: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let folder = Draft::plain().write_split(|name| match name.contains("layers.1.") {
        true => "a.safetensors",
        false => "b.safetensors",
    });
    let path = folder.path().join(INDEX);
    let mut index: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (name, file) in added {
        index["weight_map"][name] = (*file).into();
    }
    write_json(folder.path(), INDEX, &index);
    (folder, path)
}

#[test]
fn entries_of_layers_that_the_model_does_not_have_may_dangle() {
    let whole = bits(&load(&tiny(), None).unwrap().0);
    // The model has layers 0 to 2; a file that lacks them, and files that are not there.
    let surplus = [
        ("model.layers.3.eh_proj.weight", "b.safetensors"),
        ("model.layers.3.mlp.gate.weight", "c.safetensors"),
        ("model.layers.47.enorm.weight", "d.safetensors"),
    ];
    let (folder, _) = indexed(&surplus);
    let (model, report) = load(folder.path(), None).unwrap();
    assert!(bits(&model) == whole);
    assert_eq!(report.dangling, surplus.map(|(name, _)| name));
    let said = report.to_string();
    let lines: Vec<_> = said.lines().filter(|line| line.contains("in no file")).collect();
    assert!(
        lines.len() == 1 && lines[0].starts_with("3 tensors") && lines[0].contains(surplus[0].0),
        "{said}"
    );
    assert_eq!(Checkpoint::open(folder.path()).unwrap().dangling().len(), 3);

    // Where one entry of the file is of the model, or nothing says how many layers it has, the file is missed.
    let (folder, _) = indexed(&[surplus[1], ("model.layers.2.extra.weight", "c.safetensors")]);
    let error = load(folder.path(), None).unwrap_err().to_string();
    assert!(
        error.contains("c.safetensors: the index names this file"),
        "{error}"
    );
    let (folder, _) = indexed(&surplus);
    for config in ["{}", "no JSON"] {
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("c.safetensors: the index names this file"),
            "{error}"
        );
    }
}
