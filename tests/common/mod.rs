//! What the tests share: where the models lie, and their references.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod draft;
pub mod gguf;
pub mod packed;
pub mod transcribe;

use candle_core::{Device, Tensor};
use candle_mmfp4::checkpoint::{Checkpoint, LoadOptions, LoadReport, ModelFiles, StoredTensor};
use candle_mmfp4::models::glm4_moe_lite::Model;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// A file or folder of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The trained model in BF16, with references.
pub fn bf16_demo() -> PathBuf {
    repository("tests/data/demo-model")
}

/// The trained model in MMFP4, as examples use it.
pub fn mmfp4_demo() -> PathBuf {
    repository("examples/demo-model")
}

/// Parts of messages about what only data tell, not headers.
const OF_DATA: [&str; 4] = ["scale [", "above 0", "with a sign", "can be quantised"];

/// Loads on the CPU, and holds what headers alone tell against it: the same report or, where loading fails, that error
/// among the problems.
pub fn load(files: &ModelFiles, options: &LoadOptions) -> candle_mmfp4::Result<(Model, LoadReport)> {
    let loaded = Model::from_files(files, options, &Device::Cpu);
    let inspected = Model::inspect(files, options);
    match (&loaded, inspected) {
        (Ok((model, report)), inspected) => {
            let found = inspected.unwrap();
            assert_eq!(found.problems, [""; 0]);
            assert_eq!(found.load.as_ref(), Some(report));
            assert_eq!(report.bytes_a_token, model.bytes_read(1));
        }
        (Err(error), inspected) => {
            let error = error.to_string();
            let problems = inspected.map_or_else(|error| vec![error.to_string()], |found| found.problems);
            let of_data = OF_DATA.iter().any(|part| error.contains(part));
            assert!(
                of_data || problems.contains(&error),
                "{error:?} is not in {problems:?}"
            );
        }
    }
    loaded
}

/// A folder's files, by name.
pub fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(&path).unwrap())
        })
        .collect()
}

/// A tensor to be written: name, dtype, shape, bytes.
pub type Written = (String, Dtype, Vec<usize>, Vec<u8>);

/// A copy of a model folder in which some tensors are replaced; those that `change` gives nothing for stay.
pub fn rewritten(
    source: &Path,
    change: impl Fn(&str, &StoredTensor) -> Option<Vec<Written>>,
) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(source).unwrap();
    let tensors: Vec<Written> = checkpoint
        .tensors()
        .flat_map(|(name, stored)| {
            let same = || {
                vec![(
                    name.to_string(),
                    stored.dtype,
                    stored.shape.clone(),
                    stored.bytes.to_vec(),
                )]
            };
            change(name, stored).unwrap_or_else(same)
        })
        .collect();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &target.path().join("model.safetensors")).unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !name.contains("safetensors") && !name.contains("golden") {
            std::fs::write(target.path().join(name), std::fs::read(&path).unwrap()).unwrap();
        }
    }
    target
}

/// One reference case of a model.
#[derive(Debug, Deserialize)]
pub struct Case {
    pub name: String,
    pub input_ids: Vec<u32>,
    pub greedy_ids: Vec<u32>,
}

/// A model's references: cases, and tensors by name (`<case>.logits`, `<case>.hidden.<i>`).
pub struct Golden {
    pub folder: PathBuf,
    pub cases: Vec<Case>,
    pub tensors: HashMap<String, Tensor>,
}

impl Golden {
    pub fn read(folder: &Path) -> Self {
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        Self {
            folder: folder.to_path_buf(),
            cases: serde_json::from_str(&text).unwrap(),
            tensors: candle_core::safetensors::load(folder.join("golden.safetensors"), &Device::Cpu).unwrap(),
        }
    }

    pub fn logits(&self, case: &Case) -> &Tensor {
        &self.tensors[&format!("{}.logits", case.name)]
    }
}

/// Every model folder with references under `MMFP4_GOLDEN_DIR`, or the repository's.
pub fn goldens() -> Vec<Golden> {
    let root = std::env::var_os("MMFP4_GOLDEN_DIR").map_or(repository("tests/data"), PathBuf::from);
    let mut folders = Vec::new();
    find_goldens(&root, &mut folders);
    assert!(
        !folders.is_empty(),
        "no model folder with a golden.json under {}",
        root.display()
    );
    folders.iter().map(|folder| Golden::read(folder)).collect()
}

fn find_goldens(folder: &Path, found: &mut Vec<PathBuf>) {
    if folder.join("golden.json").exists() {
        found.push(folder.to_path_buf());
    }
    let mut inner: Vec<_> = std::fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    inner.sort();
    for folder in inner {
        find_goldens(&folder, found);
    }
}

/// The largest absolute difference of two tensors of one shape.
pub fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b)
        .unwrap()
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar()
        .unwrap()
}

/// The index of the largest of `logits`, and how far the second is below it.
pub fn top(logits: &[f32]) -> (u32, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    (order[0] as u32, logits[order[0]] - logits[order[1]])
}

/// Reproducible values in -1 .. 1.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A tensor's values in row-major order, in f32.
pub fn values(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_dtype(candle_core::DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Requires a normalised mean-square error of at most `bound`.
pub fn assert_nmse(actual: &[f32], expected: &[f32], bound: f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let pairs = || {
        let widen = |(a, e): (&f32, &f32)| (f64::from(*a), f64::from(*e));
        actual.iter().zip(expected).map(widen)
    };
    let error: f64 = pairs().map(|(a, e)| (a - e) * (a - e)).sum();
    let norm: f64 = pairs().map(|(_, e)| e * e).sum();
    let largest = pairs().map(|(a, e)| (a - e).abs()).fold(0.0, f64::max);
    // Not `>`: NaN must fail.
    assert!(
        error <= bound * norm,
        "{what}: NMSE {:e}, largest difference {largest:e}",
        error / norm
    );
}
