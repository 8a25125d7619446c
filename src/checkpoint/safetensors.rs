//! A model's tensors: one or many safetensors files, or GGUF files, mapped.

use super::files::ModelFiles;
use super::surplus::Surplus;
use super::{gguf, header};
use crate::error::shortened;
use crate::fp4::{Bytes, DenseTensor, FloatKind};
use crate::{Error, Result};
use ::safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a model folder, by name: `model.safetensors`, or the files that
/// `model.safetensors.index.json` lists; without either, a GGUF file, or all parts of one. Files are mapped, not read.
///
/// A GGUF file's tensors have the names of a safetensors checkpoint of the model, experts stacked as MLX stacks them; blocks
/// are bytes `[…, N, bytes of a row]` under a name that ends in their type, as in `lm_head.weight.q6_k`.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, StoredTensor>,
    indexed: BTreeMap<String, String>,
    dangling: Vec<String>,
}

/// A tensor as a file holds it.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its elements, little-endian, row-major.
    pub bytes: Bytes,
    /// The file it lies in.
    pub file: PathBuf,
}

impl StoredTensor {
    /// The tensor as a matrix of floats `[N, K]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where it is something else.
    pub fn matrix(&self, name: &str, n: usize, k: usize) -> Result<DenseTensor> {
        let kind = self.float_kind(name)?;
        self.expect_shape(name, &[n, k])?;
        let matrix = DenseTensor::new(name, (n, k), kind, self.bytes.clone());
        matrix.map_err(|error| error.in_file(Some(self.file.clone())))
    }

    /// The tensor as a vector of `len` floats, in f32.
    ///
    /// # Errors
    /// [`Error::Tensor`] where it is something else.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let kind = self.float_kind(name)?;
        self.expect_shape(name, &[len])?;
        let mut values = vec![0.0; len];
        DenseTensor::new(name, (1, len), kind, self.bytes.clone())?.decode_row_part(0, 0, &mut values);
        Ok(values)
    }

    pub(super) fn float_kind(&self, name: &str) -> Result<FloatKind> {
        match self.dtype {
            Dtype::F32 => Ok(FloatKind::F32),
            Dtype::F16 => Ok(FloatKind::F16),
            Dtype::BF16 => Ok(FloatKind::BF16),
            other => Err(self.problem(name, format!("dtype {other:?}; expected F32, F16 or BF16"))),
        }
    }

    pub(super) fn expect_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(self.problem(name, format!("shape {:?}; expected {expected:?}", self.shape)))
    }

    pub(super) fn problem(&self, name: &str, problem: impl Into<String>) -> Error {
        Error::tensor(name, Some(self.file.clone()), problem)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Maps a folder's files and reads their headers.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`]: no such folder or file, a truncated or damaged file, an index that
    /// names files outside the folder, or that are not there and hold what the model needs.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::from_files(&ModelFiles::folder(folder.as_ref()))
    }

    /// As [`open`](Self::open), of files that may be in memory.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_files(model: &ModelFiles) -> Result<Self> {
        if model.is_gguf() {
            return Self::of_gguf(model);
        }
        let indexed = index(model)?;
        let mut names: BTreeSet<&str> = match indexed.is_empty() {
            true => BTreeSet::from([SINGLE]),
            false => indexed.values().map(String::as_str).collect(),
        };
        let surplus = Surplus::new(model);
        let absent: BTreeSet<&str> = names
            .iter()
            .copied()
            .filter(|name| !model.contains(name))
            .collect();
        // A file of nothing but layers that the model does not have is no loss.
        let needed =
            |(tensor, file): &(&String, &String)| absent.contains(file.as_str()) && !surplus.has(tensor);
        let missed = match indexed.is_empty() {
            true => absent.first().copied(),
            false => indexed.iter().filter(needed).map(|(_, file)| file.as_str()).min(),
        };
        if let Some(name) = missed {
            return Err(missing_file(model, name, !indexed.is_empty()));
        }
        names.retain(|name| !absent.contains(name));
        let (tensors, files) = read_files(model, &names, &indexed)?;
        let lost = indexed.keys().filter(|name| !tensors.contains_key(*name));
        let dangling = lost.filter(|name| surplus.has(name)).cloned().collect();
        Ok(Self {
            folder: model.root().to_path_buf(),
            files,
            tensors,
            indexed,
            dangling,
        })
    }

    /// Of a checkpoint with an index only the files that are to hold `wanted`; the others need not be there.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(super) fn holding(model: &ModelFiles, wanted: &[String]) -> Result<Self> {
        let indexed = match model.is_gguf() {
            true => BTreeMap::new(),
            false => index(model)?,
        };
        if indexed.is_empty() {
            return Self::from_files(model);
        }
        let names: BTreeSet<&str> = (wanted.iter())
            .filter_map(|tensor| indexed.get(tensor).map(String::as_str))
            .collect();
        if let Some(name) = names.iter().find(|name| !model.contains(name)) {
            return Err(missing_file(model, name, true));
        }
        let (tensors, files) = read_files(model, &names, &indexed)?;
        Ok(Self {
            folder: model.root().to_path_buf(),
            files,
            tensors,
            indexed,
            dangling: Vec::new(),
        })
    }

    fn of_gguf(model: &ModelFiles) -> Result<Self> {
        let (tensors, files) = gguf::tensors(model)?;
        Ok(Self {
            folder: model.root().to_path_buf(),
            files,
            tensors,
            indexed: BTreeMap::new(),
            dangling: Vec::new(),
        })
    }

    /// The same with `added` tensors in it.
    pub(super) fn with(&self, added: impl IntoIterator<Item = (String, StoredTensor)>) -> Self {
        let mut whole = self.clone();
        whole.tensors.extend(added);
        whole
    }

    /// The folder, or the name of what is in memory.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The safetensors or GGUF files, in the order of their names.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensors whose names begin with `prefix`, by name.
    pub fn tensors_with_prefix(&self, prefix: &str) -> impl Iterator<Item = (&str, &StoredTensor)> {
        let from = self
            .tensors
            .range(prefix.to_string()..)
            .map(|(name, tensor)| (name.as_str(), tensor));
        from.take_while(move |(name, _)| name.starts_with(prefix))
    }

    /// Whether there are tensors of a module.
    pub fn has_module(&self, module: &str) -> bool {
        self.tensors_with_prefix(&format!("{module}.")).next().is_some()
    }

    /// Bytes of all tensors but those whose names begin with one of `ignored`.
    pub fn size_without(&self, ignored: &[String]) -> u64 {
        let counts = |name: &&str| !ignored.iter().any(|prefix| name.starts_with(prefix));
        self.tensors()
            .filter(|(name, _)| counts(name))
            .map(|(_, tensor)| tensor.bytes.len() as u64)
            .sum()
    }

    /// A tensor, if it is there.
    pub fn find(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// What the index lists of layers that the model does not have, and no file holds: it is ignored.
    pub fn dangling(&self) -> &[String] {
        &self.dangling
    }

    /// Whether there are tensors of a module's weight, in whatever form: its biases alone are none.
    pub(super) fn has_weight_of(&self, module: &str) -> bool {
        let prefix = format!("{module}.");
        self.tensors_with_prefix(&prefix).any(|(name, _)| !is_bias(name))
    }

    /// A tensor that has to be there.
    ///
    /// # Errors
    /// [`Error::Tensor`] where it is not.
    pub fn get(&self, name: &str) -> Result<&StoredTensor> {
        self.find(name).ok_or_else(|| {
            let problem = match self.indexed.get(name) {
                Some(file) => format!("missing: the index places it in {file}, which does not hold it"),
                None => "missing from the checkpoint".into(),
            };
            // What is left of a quantised weight is not completed by a part of another.
            let is_whole = match name.strip_suffix(".weight") {
                Some(module) => !self.has_weight_of(module),
                None => is_bias(name),
            };
            let advice = match is_whole {
                true => "; --base FOLDER|REPO (LoadOptions::base) takes it from the original",
                false => "",
            };
            Error::tensor(name, Some(self.folder.clone()), problem + advice)
        })
    }
}

fn is_bias(name: &str) -> bool {
    name.ends_with(".bias") || name.ends_with(".e_score_correction_bias")
}

/// The index of a folder's files, empty where it has none.
fn index(model: &ModelFiles) -> Result<BTreeMap<String, String>> {
    match model.text_if_present(INDEX)? {
        Some(text) => read_index(&text, &model.path(INDEX)),
        None => Ok(BTreeMap::new()),
    }
}

/// The tensors of the files `names`, and those files' paths.
fn read_files(
    model: &ModelFiles,
    names: &BTreeSet<&str>,
    indexed: &BTreeMap<String, String>,
) -> Result<(BTreeMap<String, StoredTensor>, Vec<PathBuf>)> {
    let (mut tensors, mut files) = (BTreeMap::new(), Vec::new());
    for name in names {
        let path = model.path(name);
        for (tensor, stored) in read_file(&path, &model.map(name)?)? {
            // Of several files that hold it the one that the index names counts.
            if !tensors.contains_key(&tensor) || indexed.get(&tensor).is_some_and(|file| file == name) {
                tensors.insert(tensor, stored);
            }
        }
        files.push(path);
    }
    Ok((tensors, files))
}

fn read_index(text: &str, path: &Path) -> Result<BTreeMap<String, String>> {
    let again = "fetch the file again";
    let index: Index =
        serde_json::from_str(text).map_err(|e| Error::file(path, format!("not an index: {e}"), again))?;
    if index.weight_map.is_empty() {
        return Err(Error::file(path, "weight_map is empty", again));
    }
    for file in index.weight_map.values() {
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || Path::new(file).extension() != Some(OsStr::new("safetensors")) {
            let file = shortened(format!("{file:?}"));
            let problem = format!("it names {file}; expected safetensors files in the same folder");
            return Err(Error::file(path, problem, "do not use this checkpoint"));
        }
    }
    Ok(index.weight_map)
}

fn missing_file(model: &ModelFiles, name: &str, by_index: bool) -> Error {
    if by_index {
        let problem = "the index names this file, and it is not there";
        return Error::file(model.path(name), problem, "fetch it");
    }
    if let Err(error) = model.check() {
        return error;
    }
    let others = model.names_ending(&[".safetensors", ".bin", ".pth"]);
    let problem = match others.is_empty() {
        true => format!("neither {SINGLE} nor {INDEX} in it"),
        false => format!("neither {SINGLE} nor {INDEX} in it, only {}", others.join(", ")),
    };
    Error::file(
        model.root(),
        problem,
        "give a folder with a safetensors checkpoint or a GGUF file",
    )
}

fn read_file(path: &Path, bytes: &Bytes) -> Result<Vec<(String, StoredTensor)>> {
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| {
        let again = "it may be truncated; fetch it again";
        let problem = |e: &str| format!("not a whole safetensors file of {} bytes: {e}", bytes.len());
        match header::fault(bytes) {
            Some((name, fault)) => {
                Error::tensor(name, Some(path.into()), format!("{}; {again}", problem(&fault)))
            }
            None => Error::file(path, problem(&e.to_string()), again),
        }
    })?;
    let data = 8 + header;
    let stored = |(name, info): (String, &::safetensors::tensor::TensorInfo)| {
        let range = data + info.data_offsets.0..data + info.data_offsets.1;
        let outside = || Error::tensor(&name, Some(path.to_path_buf()), "its data lies outside the file");
        let bytes = bytes.slice(range).ok_or_else(outside)?;
        let tensor = StoredTensor {
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes,
            file: path.to_path_buf(),
        };
        Ok((name, tensor))
    };
    metadata.tensors().into_iter().map(stored).collect()
}
