//! Writing an MMFP4 checkpoint.

use super::layout::{self, Entry, File, with_format_note, write_index, write_json};
use super::safetensors::{Checkpoint, StoredTensor};
use crate::fp4::{Format, Fp4Tensor, ScaleKind, ScaleRule, quantize};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

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
    let partial = layout::partial_name(target)?;
    let real = |path: &Path| path.canonicalize().ok();
    if partial.exists() && real(&partial) == real(source.folder()) {
        let problem = "the source, which has the name that the target has while it is written";
        return Err(Error::file(partial, problem, "choose another name"));
    }
    layout::write_folder(target, |folder| write_files(source, folder, format, rule))
}

fn write_files(source: &Checkpoint, folder: &Path, format: Format, rule: ScaleRule) -> Result<()> {
    let mut files = Vec::new();
    for path in source.files() {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let file = plan(source, path, format)?;
        write_file(&file, &folder.join(&name), format, rule)?;
        files.push((name, file));
    }
    if files.len() > 1 {
        write_index(folder, &files)?;
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
    let config: Map<String, Value> = serde_json::from_str(&text).map_err(|e| {
        Error::file(
            &path,
            format!("expected a JSON object: {e}"),
            "fetch the file again",
        )
    })?;
    write_json(&to.join("config.json"), &with_format_note(config, format))
}

/// What a tensor of the new file is made of.
enum Content<'a> {
    Copy(&'a StoredTensor),
    Codes(&'a str, &'a StoredTensor),
    Scales,
}

/// What the new file in the place of `path` holds.
fn plan<'a>(source: &'a Checkpoint, path: &Path, format: Format) -> Result<File<Content<'a>>> {
    let mut entries = Vec::new();
    for (name, stored) in source
        .tensors()
        .filter(|(name, _)| home(source, name) == Some(path))
    {
        let (n, k) = match stored.shape[..] {
            [n, k] if k.is_multiple_of(format.group) && stored.float_kind(name).is_ok() => (n, k),
            _ => {
                entries.push(copy(name, stored));
                continue;
            }
        };
        let Some(module) = name.strip_suffix(".weight").filter(|module| is_linear(module)) else {
            entries.push(copy(name, stored));
            continue;
        };
        let scales = format!("{module}.scales");
        if let Some(stray) = source.find(&scales) {
            // Two tensors of one name would make a file that nobody can read.
            return Err(stray.problem(&scales, format!("scales, but {name} is in floating point")));
        }
        let codes = Content::Codes(name, stored);
        entries.extend(Entry::mmfp4(module, (n, k), format, codes, Content::Scales));
    }
    Ok(File::new(entries))
}

fn copy<'a>(name: &str, stored: &'a StoredTensor) -> Entry<Content<'a>> {
    let (shape, size) = (stored.shape.clone(), stored.bytes.len());
    Entry::new(name.to_string(), stored.dtype, shape, size, Content::Copy(stored))
}

fn write_file(file: &File<Content<'_>>, path: &Path, format: Format, rule: ScaleRule) -> Result<()> {
    let mut packed: Option<Fp4Tensor> = None;
    file.write(path, |entry, put| match entry.content {
        Content::Copy(stored) => put(&stored.bytes),
        Content::Codes(name, stored) => {
            let (n, k) = (stored.shape[0], stored.shape[1]);
            let values = stored.matrix(name, n, k)?.to_f32();
            put(packed
                .insert(quantize(name, &values, (n, k), format, rule)?)
                .codes())
        }
        Content::Scales => match &packed {
            Some(tensor) => put(tensor.scales()),
            None => Err(Error::tensor(&entry.name, None, "scales before their codes")),
        },
    })
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
