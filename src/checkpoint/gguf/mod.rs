//! GGUF files (llama.cpp's) of the architecture deepseek2, which GLM-4.7-Flash is there.
//!
//! A file's tensors get the names that a safetensors checkpoint has: floats as `….weight` and so on, experts stacked as
//! `….switch_mlp.…`, and blocks as bytes `[…, N, bytes of a row]` under a name that tells their type, `….weight.q4_k`. What
//! reads blocks is beside the other layouts.

mod config;
mod cursor;
mod header;
mod metadata;
mod names;
mod tokenizer;
mod types;

pub(super) use types::{BLOCK_TYPES, MXFP4, NVFP4, Type};

use super::files::ModelFiles;
use super::safetensors::StoredTensor;
use crate::fp4::Bytes;
use crate::{Error, Result};
use header::{Header, TensorInfo};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use types::Content;

/// The tensors of a model's GGUF files by our names, and the files.
///
/// # Errors
/// [`Error::Io`], [`Error::File`] and [`Error::Tensor`]: a truncated or damaged file, parts of a model that are missing,
/// tensors that are there twice, of another shape than their names want, or of a type that is not implemented.
pub(super) fn tensors(model: &ModelFiles) -> Result<(BTreeMap<String, StoredTensor>, Vec<PathBuf>)> {
    let (mut all, mut files) = (BTreeMap::new(), Vec::new());
    for name in model.gguf_files()? {
        let path = model.path(&name);
        let header = Header::read(&path, &model.map(&name)?)?;
        for info in header.tensors {
            let theirs = info.name.clone();
            let (name, stored) = stored(&path, info)?;
            if all.insert(name.clone(), stored).is_some() {
                let problem = format!("a second tensor that is `{name}`");
                return Err(Error::tensor(theirs, Some(path), problem));
            }
        }
        files.push(path);
    }
    Ok((all, files))
}

/// What a model's first GGUF file says of it, as the `config.json` that it would have.
///
/// # Errors
/// As [`tensors`]; and [`Error::File`] for another architecture, or what its metadata lack.
pub(crate) fn config(model: &ModelFiles) -> Result<(Value, PathBuf)> {
    let (header, _, path) = first(model)?;
    let mut tensors = header.tensors;
    for name in model.gguf_files()?.iter().skip(1) {
        tensors.extend(Header::read(&model.path(name), &model.map(name)?)?.tensors);
    }
    Ok((config::from_metadata(&header.metadata, &tensors, &path)?, path))
}

/// The tokenizer that a model's first GGUF file carries, as the `tokenizer.json` that it was made from, and the file.
///
/// # Errors
/// As [`tensors`]; and [`Error::File`] where it carries none, or one of another kind.
pub(crate) fn tokenizer(model: &ModelFiles) -> Result<(Vec<u8>, PathBuf)> {
    let (header, file, path) = first(model)?;
    Ok((tokenizer::from_metadata(&header.metadata, &file, &path)?, path))
}

/// The chat template that a model's first GGUF file carries, and the file, if there is such a file and it does.
///
/// # Errors
/// As [`tensors`].
pub(crate) fn chat_template(model: &ModelFiles) -> Result<Option<(String, PathBuf)>> {
    if !model.is_gguf() {
        return Ok(None);
    }
    let (header, _, path) = first(model)?;
    let template = header.metadata.text("tokenizer.chat_template");
    Ok(template.map(|template| (template.to_string(), path)))
}

/// How far the header of a GGUF file goes that begins so: further than these bytes where they do not hold all of it, and then
/// at least so far.
#[cfg(feature = "hub")]
pub(super) fn reach_of_header(beginning: &[u8]) -> usize {
    Header::reach(beginning)
}

/// A model's first GGUF file: of parts the one with the metadata.
fn first(model: &ModelFiles) -> Result<(Header, Bytes, PathBuf)> {
    let none = || Error::file(model.root(), "no GGUF file in it", "");
    let name = model.gguf_files()?.into_iter().next().ok_or_else(none)?;
    let (path, file) = (model.path(&name), model.map(&name)?);
    Ok((Header::read(&path, &file)?, file, path))
}

/// A tensor under our name.
fn stored(path: &Path, info: TensorInfo) -> Result<(String, StoredTensor)> {
    let refuse = |problem: String| Error::tensor(&info.name, Some(path.into()), problem);
    let Some((module, rest)) = names::ours(&info.name) else {
        // Of no use, unless it belongs to a layer that predicts several tokens at once: those are known by their numbers.
        let name = match names::layer_of(&info.name) {
            Some(layer) => format!("model.layers.{layer}.gguf.{}", info.name),
            None => info.name.clone(),
        };
        return Ok((name, bytes_of(path, info)));
    };
    let mut shape = info.shape.clone();
    let (rest, dtype) = match info.kind.content {
        Content::Plain(dtype) => (rest, dtype),
        Content::Blocks(suffix) if rest == "weight" => (suffix, Dtype::U8),
        Content::Blocks(_) => {
            return Err(refuse(format!(
                "type {}; only weights are read in blocks",
                info.kind.name
            )));
        }
        Content::Other => {
            return Err(refuse(format!(
                "type {}, which is not implemented; take a file in MXFP4, NVFP4, Q4_K_M, Q5_K_M, Q6_K or Q8_0",
                info.kind.name
            )));
        }
    };
    if let Some(columns) = shape.last_mut().filter(|_| dtype == Dtype::U8) {
        *columns = *columns / info.kind.block * info.kind.size;
    }
    let tensor = StoredTensor {
        dtype,
        shape,
        bytes: info.bytes,
        file: path.into(),
    };
    Ok((format!("{module}.{rest}"), tensor))
}

/// A tensor that nothing reads.
fn bytes_of(path: &Path, info: TensorInfo) -> StoredTensor {
    StoredTensor {
        dtype: Dtype::U8,
        shape: vec![info.bytes.len()],
        bytes: info.bytes,
        file: path.into(),
    }
}
