//! Writing an MMFP4 checkpoint.

use super::safetensors::{Checkpoint, StoredTensor};
use crate::fp4::{Format, Fp4Tensor, ScaleKind, ScaleRule, quantize};
use crate::{Error, Result};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Where the tensors' data begins: on every system's page boundary, so that it can be handed to a GPU.
const DATA_ALIGNMENT: usize = 16 * 1024;
/// What every tensor's beginning is a multiple of, counted from there.
const TENSOR_ALIGNMENT: usize = 16;

/// Quantises the linear layers of a `glm4_moe_lite` folder to MMFP4 in Marlin's layout and writes a whole
/// model folder: U32 codes as `.weight`, F16 `.scales` beside them, everything else as it was.
///
/// Embeddings, output head, routers, norms and biases, and weights whose K is not a multiple of
/// `format.group`, stay in floating point. Output files match the source's one to one, so that no more than
/// one tensor at a time is in memory. The result is the same byte for byte each time. The folder appears
/// whole or not at all; `target` must not exist.
///
/// # Errors
/// [`Error::Argument`] for a format that this layout cannot hold; [`Error::Io`], [`Error::File`]; those of
/// [`quantize`].
pub fn quantize_folder(
    source: &Checkpoint,
    target: impl AsRef<Path>,
    format: Format,
    rule: ScaleRule,
) -> Result<()> {
    let target = target.as_ref();
    format.check("quantize_folder")?;
    if format.kind != ScaleKind::F16 {
        return Err(Error::argument(
            "quantize_folder",
            "format",
            "F16 scales",
            format!("{:?}", format.kind),
        ));
    }
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
    let partial = target.with_file_name(format!("{}.partial", name.to_string_lossy()));
    let real = |path: &Path| path.canonicalize().ok();
    if partial.exists() && real(&partial) == real(source.folder()) {
        let problem = "the source, which has the name that the target has while it is written";
        return Err(Error::file(partial, problem, "choose another name"));
    }
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(|e| Error::io(&partial, e, "remove it"))?;
    }
    let written = write_folder(source, &partial, format, rule)
        .and_then(|()| std::fs::rename(&partial, target).map_err(|e| Error::io(target, e, "")));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_dir_all(&partial);
    }
    written
}

fn write_folder(source: &Checkpoint, folder: &Path, format: Format, rule: ScaleRule) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e, ""))?;
    let mut weight_map = Map::new();
    let mut total = 0;
    for file in source.files() {
        let plan = Plan::of_file(source, file, format)?;
        let name = file.file_name().unwrap_or_default();
        for entry in &plan.entries {
            weight_map.insert(
                entry.name.clone(),
                Value::String(name.to_string_lossy().into_owned()),
            );
            total += entry.size;
        }
        plan.write(&folder.join(name), format, rule)?;
    }
    if source.files().len() > 1 {
        weight_map.sort_keys();
        let index = json!({"metadata": {"format": "mmfp4", "total_size": total}, "weight_map": weight_map});
        write_json(&folder.join("model.safetensors.index.json"), &index)?;
    }
    copy_side_files(source.folder(), folder, format)
}

/// Config, tokenizer, template: what a model folder has beside weights. `config.json` gets a note of the format.
fn copy_side_files(from: &Path, to: &Path, format: Format) -> Result<()> {
    let side_files = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
    ];
    for name in side_files {
        let path = from.join(name);
        if path.exists() {
            // Not `fs::copy`: a cache's read-only files must not make read-only copies.
            let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e, ""))?;
            std::fs::write(to.join(name), bytes).map_err(|e| Error::io(to.join(name), e, ""))?;
        }
    }
    let path = from.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e, ""))?;
    let mut config: Map<String, Value> = serde_json::from_str(&text).map_err(|e| {
        Error::file(
            &path,
            format!("expected a JSON object: {e}"),
            "fetch the file again",
        )
    })?;
    let note = json!({"quant_method": "mmfp4", "bits": 4, "group_size": format.group});
    config.insert("quantization_config".into(), note);
    write_json(&to.join("config.json"), &Value::Object(config))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n")).map_err(|e| Error::io(path, e, ""))
}

/// What a tensor of the new file is made of.
enum Content<'a> {
    Copy(&'a StoredTensor),
    Codes(&'a str, &'a StoredTensor),
    Scales,
}

struct Entry<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    size: usize,
    content: Content<'a>,
}

/// A file's tensors in the order of their data.
struct Plan<'a> {
    entries: Vec<Entry<'a>>,
}

impl<'a> Plan<'a> {
    fn of_file(source: &'a Checkpoint, file: &Path, format: Format) -> Result<Self> {
        let mut entries = Vec::new();
        for (name, stored) in source
            .tensors()
            .filter(|(name, _)| home(source, name) == Some(file))
        {
            let (n, k) = match stored.shape[..] {
                [n, k] if k.is_multiple_of(format.group) && stored.float_kind(name).is_ok() => (n, k),
                _ => {
                    entries.push(Entry::copy(name, stored));
                    continue;
                }
            };
            let Some(module) = name.strip_suffix(".weight").filter(|module| is_linear(module)) else {
                entries.push(Entry::copy(name, stored));
                continue;
            };
            let scales = format!("{module}.scales");
            if let Some(stray) = source.find(&scales) {
                // Two tensors of one name would make a file that nobody can read.
                return Err(stray.problem(&scales, format!("scales, but {name} is in floating point")));
            }
            entries.push(Entry {
                name: name.to_string(),
                dtype: Dtype::U32,
                shape: vec![n, k / 8],
                size: n * k / 2,
                content: Content::Codes(name, stored),
            });
            entries.push(Entry {
                name: scales,
                dtype: Dtype::F16,
                shape: vec![n, k / format.group],
                size: n * (k / format.group) * 2,
                content: Content::Scales,
            });
        }
        // The format allows no holes between tensors: those of odd sizes go last, and all others stay aligned.
        // Within each part the names' order keeps a layer's experts, and a weight's codes and scales, together.
        entries.sort_by_key(|entry| !entry.is_aligned(format));
        Ok(Self { entries })
    }

    fn header(&self) -> Vec<u8> {
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
        header.insert("__metadata__".into(), json!({"format": "mmfp4"}));
        header.extend(tensors.into_iter().map(|(name, info)| (name.to_string(), info)));
        let mut bytes = Value::Object(header).to_string().into_bytes();
        // Spaces after the JSON are part of the format; eight bytes of length stand before it.
        bytes.resize((8 + bytes.len()).next_multiple_of(DATA_ALIGNMENT) - 8, b' ');
        bytes
    }

    fn write(&self, path: &Path, format: Format, rule: ScaleRule) -> Result<()> {
        let fail = |e| Error::io(path, e, "");
        let header = self.header();
        let mut file = BufWriter::new(File::create(path).map_err(fail)?);
        file.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(fail)?;
        file.write_all(&header).map_err(fail)?;
        let mut packed: Option<Fp4Tensor> = None;
        for entry in &self.entries {
            let bytes = match entry.content {
                Content::Copy(stored) => &stored.bytes,
                Content::Codes(name, stored) => {
                    let (n, k) = (stored.shape[0], stored.shape[1]);
                    let values = stored.matrix(name, n, k)?.to_f32();
                    packed
                        .insert(quantize(name, &values, (n, k), format, rule)?)
                        .codes()
                }
                Content::Scales => match &packed {
                    Some(tensor) => tensor.scales(),
                    None => return Err(Error::tensor(&entry.name, None, "scales before their codes")),
                },
            };
            file.write_all(bytes).map_err(fail)?;
        }
        file.into_inner()
            .map_err(|e| fail(e.into_error()))?
            .sync_all()
            .map_err(fail)
    }
}

impl<'a> Entry<'a> {
    fn copy(name: &str, stored: &'a StoredTensor) -> Self {
        Self {
            name: name.to_string(),
            dtype: stored.dtype,
            shape: stored.shape.clone(),
            size: stored.bytes.len(),
            content: Content::Copy(stored),
        }
    }

    /// Codes and scales move together; codes are aligned wherever their scales are, being a multiple of them.
    fn is_aligned(&self, format: Format) -> bool {
        let size = match self.content {
            Content::Codes(..) => self.size / format.group * 4,
            Content::Copy(_) | Content::Scales => self.size,
        };
        size.is_multiple_of(TENSOR_ALIGNMENT)
    }
}

/// The source file after which the file that gets this tensor is named: that of the first tensor of its
/// layer, so that no layer's experts straddle two files.
fn home<'a>(source: &'a Checkpoint, name: &str) -> Option<&'a Path> {
    let layer = name
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'));
    let first = match layer {
        Some((layer, _)) => source
            .tensors_with_prefix(&format!("model.layers.{layer}."))
            .next()
            .map(|(_, t)| t),
        None => source.find(name),
    };
    first.map(|tensor| tensor.file.as_path())
}

/// The linear layers of the decoder; everything else is small or sensitive.
pub(super) fn is_linear(module: &str) -> bool {
    module.starts_with("model.layers.") && module.ends_with("_proj")
        || module.ends_with(".kv_a_proj_with_mqa")
}
