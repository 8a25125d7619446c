//! Model folders in memory, to be changed and written.

use super::repository;
use candle_mmfp4::checkpoint::{Checkpoint, quantize_folder};
use candle_mmfp4::fp4::{Format, ScaleKind, ScaleRule};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A group that every linear layer of the tiny model can be divided into; not so 128.
pub const GROUP_64: Format = Format {
    group: 64,
    kind: ScaleKind::F16,
};

#[derive(Clone)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A model folder in memory, to be changed and written.
#[derive(Clone)]
pub struct Draft {
    pub config: Value,
    pub tensors: BTreeMap<String, Stored>,
}

impl Draft {
    pub fn read(folder: &Path) -> Self {
        let config = std::fs::read(folder.join("config.json")).unwrap();
        let checkpoint = Checkpoint::open(folder).unwrap();
        let tensors = checkpoint.tensors().map(|(name, t)| {
            let (dtype, shape, bytes) = (t.dtype, t.shape.clone(), t.bytes.to_vec());
            (name.to_string(), Stored { dtype, shape, bytes })
        });
        Self {
            config: serde_json::from_slice(&config).unwrap(),
            tensors: tensors.collect(),
        }
    }

    pub fn plain() -> Self {
        Self::read(&tiny())
    }

    pub fn packed() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("packed");
        let source = Checkpoint::open(tiny()).unwrap();
        quantize_folder(&source, &target, GROUP_64, ScaleRule::SquaredError).unwrap();
        Self::read(&target)
    }

    pub fn get(&mut self, name: &str) -> &mut Stored {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("{name}"))
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.tensors.remove(from).unwrap();
        self.tensors.insert(to.into(), tensor);
    }

    pub fn write(&self) -> TempDir {
        self.write_split(|_| "model.safetensors")
    }

    /// Each tensor into the file that `file` says, with an index if there is more than one.
    pub fn write_split(&self, file: impl Fn(&str) -> &'static str) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let files: BTreeSet<_> = self.tensors.keys().map(|name| file(name)).collect();
        for name in &files {
            let here = self.tensors.iter().filter(|(tensor, _)| file(tensor) == *name);
            let views = here.map(|(tensor, t)| {
                (
                    tensor,
                    TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap(),
                )
            });
            let bytes = safetensors::serialize(views, None).unwrap();
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        if files.len() > 1 {
            let map: BTreeMap<_, _> = self.tensors.keys().map(|name| (name, file(name))).collect();
            write_json(
                folder.path(),
                "model.safetensors.index.json",
                &json!({"weight_map": map}),
            );
        }
        write_json(folder.path(), "config.json", &self.config);
        folder
    }
}

pub fn tiny() -> PathBuf {
    repository("tests/data/tiny-models/plain")
}

pub fn write_json(folder: &Path, name: &str, value: &Value) {
    std::fs::write(folder.join(name), value.to_string()).unwrap();
}
