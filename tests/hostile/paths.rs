//! Names that lead out of the folder: what lies outside is never read.

use crate::reading::folders::{self, INDEX, SINGLE};
use crate::reading::random::Random;
use crate::reading::values;
use crate::run::alone;
use crate::watch::watch;
use candle_core::Device;
use candle_mmfp4::checkpoint::{Checkpoint, ModelFiles};
use candle_mmfp4::generation::Pipeline;
use serde_json::json;

const PATHS: usize = 1500;

/// The whole model lies around the folder under every name that a step out of it ends in.
#[test]
fn no_index_leads_out_of_the_folder() {
    let _alone = alone();
    let root = tempfile::tempdir().unwrap();
    let (inside, plain) = (root.path().join("a/model"), folders::find("bf16"));
    for outside in [root.path().to_path_buf(), root.path().join("a"), inside.join("a")] {
        std::fs::create_dir_all(&outside).unwrap();
        for name in ["outside.safetensors", "outside", SINGLE] {
            std::fs::write(outside.join(name), &plain.files[SINGLE]).unwrap();
        }
    }
    plain.write(&inside).unwrap();
    std::fs::remove_file(inside.join(SINGLE)).unwrap();
    let names: Vec<_> = plain.tensors.iter().map(|stored| stored.name.as_str()).collect();
    let mut random = Random::of_seed(11);
    for number in 0..PATHS {
        let path = match number {
            // Without chance: a path that begins at the root.
            0 => root.path().join("outside.safetensors").display().to_string(),
            1 => "../outside.safetensors".to_string(),
            2 => "a/outside.safetensors".to_string(),
            3 => "./outside.safetensors".to_string(),
            _ => values::path(&mut random),
        };
        let weight_map: serde_json::Map<_, _> =
            names.iter().map(|name| (name.to_string(), json!(path))).collect();
        std::fs::write(inside.join(INDEX), json!({"weight_map": weight_map}).to_string()).unwrap();
        let (opened, _) = watch(|| Checkpoint::open(&inside).map(|_| ()));
        let error = opened.unwrap().expect_err(&path).to_string();
        let within = error.contains(&inside.display().to_string());
        assert!(
            within && (error.contains(INDEX) || error.contains("the index names")),
            "{path:?}: {error}"
        );
    }
}

/// Parts of a GGUF model are named by their number alone.
#[test]
fn parts_of_a_gguf_file_lie_beside_each_other() {
    let _alone = alone();
    let root = tempfile::tempdir().unwrap();
    let inside = root.path().join("model");
    std::fs::create_dir(&inside).unwrap();
    let whole = folders::find("gguf-mxfp4");
    let bytes = &whole.files[folders::GGUF];
    std::fs::write(root.path().join("m-00002-of-00002.gguf"), bytes).unwrap();
    for name in [
        "m-00001-of-00002.gguf",
        "m-00001-of-99999.gguf",
        "m-00002-of-00002.gguf",
        "..-00001-of-00002.gguf",
    ] {
        let path = inside.join(name);
        std::fs::write(&path, bytes).unwrap();
        for asked in [&inside, &path] {
            let (opened, _) = watch(|| Checkpoint::open(asked).map(|_| ()));
            let error = opened.unwrap().expect_err(name).to_string();
            assert!(
                error.contains("and it is not there") && error.contains("model"),
                "{error}"
            );
        }
        std::fs::remove_file(path).unwrap();
    }
}

/// A folder in the place of a file, a file in the place of the folder, and what would answer for ever.
#[test]
fn what_is_no_file_is_not_read() {
    let _alone = alone();
    let root = tempfile::tempdir().unwrap();
    let inside = root.path().join("model");
    let whole = folders::find("marlin");
    let read =
        || Pipeline::from_files(&ModelFiles::folder(&inside), &Default::default(), &Device::Cpu).map(|_| ());
    whole.write(&inside).unwrap();
    read().unwrap();
    for name in whole.files.keys() {
        let path = inside.join(name);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let error = read().expect_err(name).to_string();
        assert!(error.contains(name), "{name}: {error}");
        std::fs::remove_dir(&path).unwrap();
        #[cfg(unix)]
        {
            // A pipe that nobody writes to, and a file without end.
            let made = std::process::Command::new("mkfifo").arg(&path).status();
            if made.is_ok_and(|status| status.success()) {
                let error = read().expect_err(name).to_string();
                assert!(
                    error.contains(name) && error.contains("no ordinary file"),
                    "{name}: {error}"
                );
                std::fs::remove_file(&path).unwrap();
            }
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            let error = read().expect_err(name).to_string();
            assert!(
                error.contains(name) && error.contains("no ordinary file"),
                "{name}: {error}"
            );
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::write(&path, &whole.files[name]).unwrap();
    }
    let error = Checkpoint::open(inside.join(SINGLE)).unwrap_err().to_string();
    assert!(error.contains(SINGLE), "{error}");
}
