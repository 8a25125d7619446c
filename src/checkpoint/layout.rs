//! How the model folders that this crate writes lie on disk: aligned safetensors files, an index, all or nothing.

use crate::fp4::{Format, ScaleKind};
use crate::{Error, Result};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Where the tensors' data begins: on every system's page boundary, so that it can be handed to a GPU.
const DATA_ALIGNMENT: usize = 16 * 1024;
/// What every tensor's beginning is a multiple of, counted from there.
const TENSOR_ALIGNMENT: usize = 16;

/// A tensor of a file to be written; `content` is what its bytes come from.
pub(super) struct Entry<C> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub size: usize,
    pub content: C,
    aligned: bool,
}

impl<C> Entry<C> {
    pub fn new(name: String, dtype: Dtype, shape: Vec<usize>, size: usize, content: C) -> Self {
        Self {
            name,
            dtype,
            shape,
            size,
            content,
            aligned: size.is_multiple_of(TENSOR_ALIGNMENT),
        }
    }

    /// The two tensors of an MMFP4 weight `[N, K]` in Marlin's layout, codes first.
    pub fn mmfp4(module: &str, (n, k): (usize, usize), format: Format, codes: C, scales: C) -> [Self; 2] {
        let groups = k / format.group;
        let scales = Self::new(
            format!("{module}.scales"),
            Dtype::F16,
            vec![n, groups],
            n * groups * 2,
            scales,
        );
        let name = format!("{module}.weight");
        let mut codes = Self::new(name, Dtype::U32, vec![n, k / 8], n * k / 2, codes);
        // Codes and scales move together; codes are aligned wherever their scales are, being a multiple of them.
        codes.aligned = scales.aligned;
        [codes, scales]
    }

    /// The tensors of an NVFP4 or MXFP4 weight `[N, K]` in compressed-tensors' layout: codes, scales and, for E4M3 scales,
    /// what divides them.
    pub fn compressed(
        module: &str,
        (n, k): (usize, usize),
        format: Format,
        [codes, scales, divisor]: [C; 3],
    ) -> Vec<Self> {
        let groups = k / format.group;
        let tensor = |suffix: &str, dtype, shape, size, content| {
            Self::new(format!("{module}.{suffix}"), dtype, shape, size, content)
        };
        let dtype = match format.kind {
            ScaleKind::E4M3 => Dtype::F8_E4M3,
            _ => Dtype::U8,
        };
        let scales = tensor("weight_scale", dtype, vec![n, groups], n * groups, scales);
        let mut codes = tensor("weight_packed", Dtype::U8, vec![n, k / 2], n * k / 2, codes);
        codes.aligned = scales.aligned;
        let mut entries = vec![codes, scales];
        if format.kind == ScaleKind::E4M3 {
            entries.push(tensor("weight_global_scale", Dtype::F32, vec![1], 4, divisor));
        }
        entries
    }
}

/// A safetensors file's tensors in the order of their data.
pub(super) struct File<C> {
    entries: Vec<Entry<C>>,
    format: &'static str,
}

impl<C> File<C> {
    /// Tensors in the order of their names keep a layer's experts, and a weight's codes and scales, together.
    pub fn new(mut entries: Vec<Entry<C>>) -> Self {
        // The format allows no holes between tensors: those of odd sizes go last, and all others stay aligned.
        entries.sort_by_key(|entry| !entry.aligned);
        Self {
            entries,
            format: "mmfp4",
        }
    }

    /// The same with another `format` in its metadata: some readers refuse what they do not know.
    pub fn with_format(self, format: &'static str) -> Self {
        Self { format, ..self }
    }

    pub fn entries(&self) -> &[Entry<C>] {
        &self.entries
    }

    /// What stands before the data: the header's length and the header, padded.
    pub fn preamble(&self) -> Vec<u8> {
        let mut tensors = BTreeMap::new();
        let mut start = 0;
        for entry in &self.entries {
            let info = json!({
                "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, start + entry.size],
            });
            tensors.insert(entry.name.as_str(), info);
            start += entry.size;
        }
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": self.format}));
        header.extend(tensors.into_iter().map(|(name, info)| (name.to_string(), info)));
        let header = Value::Object(header).to_string();
        // Spaces after the JSON are part of the format.
        let padded = (8 + header.len()).next_multiple_of(DATA_ALIGNMENT);
        let mut bytes = ((padded - 8) as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(padded, b' ');
        bytes
    }

    /// The tensors, each with where it lies in the file.
    pub fn ranges(&self) -> impl Iterator<Item = (&Entry<C>, Range<usize>)> {
        let mut end = self.preamble().len();
        self.entries.iter().map(move |entry| {
            let start = end;
            end += entry.size;
            (entry, start..end)
        })
    }

    /// Bytes of all tensors.
    pub fn data_size(&self) -> usize {
        self.entries.iter().map(|entry| entry.size).sum()
    }

    /// Bytes of the whole file.
    pub fn size(&self) -> usize {
        self.preamble().len() + self.data_size()
    }

    /// Writes the file; `content` hands each entry's bytes, in one or several pieces, to its second argument.
    pub fn write(
        &self,
        path: &Path,
        mut content: impl FnMut(&Entry<C>, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let fail = |e| Error::io(path, e, "");
        let mut file = BufWriter::new(std::fs::File::create(path).map_err(fail)?);
        let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(fail);
        put(&self.preamble())?;
        for entry in &self.entries {
            content(entry, &mut put)?;
        }
        file.into_inner()
            .map_err(|e| fail(e.into_error()))?
            .sync_all()
            .map_err(fail)
    }
}

/// Writes the index of a folder of several files.
pub(super) fn write_index<C>(folder: &Path, files: &[(String, File<C>)]) -> Result<()> {
    let mut weight_map = Map::new();
    for (name, file) in files {
        for entry in file.entries() {
            weight_map.insert(entry.name.clone(), Value::String(name.clone()));
        }
    }
    weight_map.sort_keys();
    let total: usize = files.iter().map(|(_, file)| file.data_size()).sum();
    let format = files.first().map(|(_, file)| file.format);
    let index = json!({"metadata": {"format": format, "total_size": total}, "weight_map": weight_map});
    write_json(&folder.join("model.safetensors.index.json"), &index)
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, json_text(value)).map_err(|e| Error::io(path, e, ""))
}

/// JSON as [`write_json`] writes it.
pub(super) fn json_text(value: &Value) -> String {
    format!("{value:#}\n")
}

/// `config.json` with a note of the weights' format.
pub(super) fn with_format_note(mut config: Map<String, Value>, format: Format) -> Value {
    let note = json!({"quant_method": "mmfp4", "bits": 4, "group_size": format.group});
    config.insert("quantization_config".into(), note);
    Value::Object(config)
}

/// The name that the folder `target` has while it is written.
///
/// # Errors
/// [`Error::File`] where `target` is there already, or no folder can have that name.
pub(super) fn partial_name(target: &Path) -> Result<PathBuf> {
    if target.exists() {
        return Err(Error::file(
            target,
            "already there",
            "remove it or choose another name",
        ));
    }
    let name = target
        .file_name()
        .ok_or_else(|| Error::file(target, "not a folder's name", ""))?;
    Ok(target.with_file_name(format!("{}.partial", name.to_string_lossy())))
}

/// Makes the folder `target`, which `write` fills under its [partial name](partial_name): it appears whole or not
/// at all.
pub(super) fn write_folder(target: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = partial_name(target)?;
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(|e| Error::io(&partial, e, "remove it"))?;
    }
    let written = std::fs::create_dir_all(&partial)
        .map_err(|e| Error::io(&partial, e, ""))
        .and_then(|()| write(&partial))
        .and_then(|()| std::fs::rename(&partial, target).map_err(|e| Error::io(target, e, "")));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_dir_all(&partial);
    }
    written
}
