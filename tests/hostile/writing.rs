//! Quantising to a folder reads as well: what it makes of damaged ones.

use crate::reading::damage;
use crate::reading::folders::{self, SINGLE, serialized};
use crate::reading::random::Random;
use crate::run::alone;
use crate::watch::{Quiet, watch};
use candle_mmfp4::checkpoint::{Checkpoint, quantize_folder};
use candle_mmfp4::fp4::{Format, ScaleRule};
use std::path::Path;

const FOLDERS: usize = 300;

fn quantise(source: &Path, target: &Path) -> candle_mmfp4::Result<()> {
    quantize_folder(
        &Checkpoint::open(source)?,
        target,
        Format::nvfp4(),
        ScaleRule::Maximum,
    )
}

#[test]
fn damaged_folders_are_quantised_or_refused() {
    let _alone = alone();
    let whole = folders::find("bf16");
    let root = tempfile::tempdir().unwrap();
    let (source, target) = (root.path().join("source"), root.path().join("target"));
    let mut refused = 0;
    for number in 0..FOLDERS {
        let (mut folder, mut random) = (whole.clone(), Random::of_seed(number as u64));
        let damage = match number % 3 {
            0 => damage::config::damage(&mut folder, &mut random),
            1 => damage::header::damage(&mut folder, &mut random),
            _ => damage::tensors::damage(&mut folder, &mut random),
        };
        folder.write(&source).unwrap();
        let quiet = Quiet::new();
        let (result, seen) = watch(|| quantise(&source, &target));
        drop(quiet);
        let what = || format!("{number}, {}", damage.what);
        assert!(seen.peak < (1 << 20) + 8 * folder.size(), "{}: {seen:?}", what());
        match result.unwrap_or_else(|panic| panic!("{}: {panic}", what())) {
            Ok(()) => std::fs::remove_dir_all(&target).unwrap(),
            Err(error) => {
                refused += 1;
                let error = error.to_string();
                let named = error.contains(&root.path().display().to_string())
                    || error.starts_with("quantize: `keep`");
                assert!(named, "{}: {error}", what());
                assert!(!target.exists(), "{}", what());
            }
        }
    }
    assert!(refused > FOLDERS / 10 && refused < FOLDERS, "{refused}");
}

/// A layer of the largest number there is had none after it.
#[test]
fn a_layer_may_have_any_number() {
    let _alone = alone();
    let mut folder = folders::find("bf16");
    let mut config: serde_json::Value = serde_json::from_slice(&folder.files["config.json"]).unwrap();
    config.as_object_mut().unwrap().shift_remove("num_hidden_layers");
    folder
        .files
        .insert("config.json".into(), config.to_string().into_bytes());
    let mut last = folder.tensors[0].clone();
    last.name = format!("model.layers.{}.self_attn.o_proj.weight", usize::MAX);
    folder.tensors.push(last);
    folder.files.insert(SINGLE.into(), serialized(&folder.tensors));
    let root = tempfile::tempdir().unwrap();
    folder.write(root.path()).unwrap();
    let (result, _) = watch(|| quantise(root.path(), &root.path().join("target")));
    result.unwrap().unwrap();
}
