//! What quantising a whole checkpoint cost, tensor by tensor.

use super::layouts::{self, Layout, Reading};
use super::safetensors::Checkpoint;
use super::write::is_linear;
use crate::fp4::{Format, ScaleRule, Validation, Weight, quantize, validate};
use crate::{Error, Result};

/// What a floating-point checkpoint is compared with.
#[derive(Debug, Clone, Copy)]
pub enum Quantized<'a> {
    /// The weights of another checkpoint that are packed there, in the layout that somebody says they are in, if anybody does:
    /// see [`LoadOptions::layout`](super::LoadOptions::layout).
    Stored(&'a Checkpoint, Option<Layout>),
    /// The linear layers of decoder layers, quantised to this format as loading does it.
    Simulated(Format),
}

/// Compares the matrices of `original`, one after the other as they are asked for, with what `quantized` made of them:
/// yields tensors' names and [`validate`]'s findings, in the order of the names.
///
/// # Errors
/// [`Error::File`] where there is nothing to compare; as items, [`Error::Tensor`] for a tensor that is malformed or
/// has another shape in the other checkpoint, and those of [`quantize`] and [`validate`].
pub fn validate_checkpoint<'a>(
    original: &'a Checkpoint,
    quantized: Quantized<'a>,
) -> Result<impl ExactSizeIterator<Item = Result<(&'a str, Validation)>>> {
    let mut matrices = Vec::new();
    for (name, stored) in original.tensors() {
        let (Some(module), [n, k]) = (name.strip_suffix(".weight"), &stored.shape[..]) else {
            continue;
        };
        let is_compared = match quantized {
            Quantized::Stored(other, _) => layouts::holds(other, module),
            Quantized::Simulated(format) => is_linear(module) && k.is_multiple_of(format.group),
        };
        if is_compared && stored.float_kind(name).is_ok() {
            matrices.push((name, module, stored, (*n, *k)));
        }
    }
    if matrices.is_empty() {
        return Err(nothing(original, quantized));
    }
    Ok(matrices.into_iter().map(move |(name, module, stored, (n, k))| {
        let values = stored.matrix(name, n, k)?.to_f32();
        let packed = match quantized {
            Quantized::Stored(other, layout) => {
                let reading = Reading {
                    layout,
                    ..Reading::default()
                };
                match layouts::read(other, module, (n, k), reading)?.weight {
                    Weight::Fp4(packed) => packed,
                    _ => {
                        let folder = Some(other.folder().to_path_buf());
                        return Err(Error::tensor(name, folder, "not packed there"));
                    }
                }
            }
            Quantized::Simulated(format) => quantize(name, &values, (n, k), format, ScaleRule::default())?,
        };
        Ok((name, validate(&values, &packed)?))
    }))
}

fn nothing(original: &Checkpoint, quantized: Quantized<'_>) -> Error {
    let packed = |checkpoint: &Checkpoint| checkpoint.tensors().any(|(_, stored)| layouts::is_packed(stored));
    if packed(original) {
        let remedy = "give the floating-point original first";
        return Error::file(original.folder(), "its weights are quantised already", remedy);
    }
    match quantized {
        Quantized::Stored(other, _) if !packed(other) => Error::file(
            other.folder(),
            "no weight in it is packed in MMFP4",
            "give a quantised folder, or a format to simulate",
        ),
        Quantized::Stored(other, _) => Error::file(
            other.folder(),
            format!(
                "none of its packed weights has a counterpart in {}",
                original.folder().display()
            ),
            "give the model that it was made from",
        ),
        Quantized::Simulated(_) => Error::file(
            original.folder(),
            "no linear layer in it whose width the format's group divides",
            "give a glm4_moe_lite checkpoint, or choose a format with smaller groups",
        ),
    }
}
