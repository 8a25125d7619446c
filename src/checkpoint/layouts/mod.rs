//! The layouts in which checkpoints store FP4 weights, a file each. All but GGUF's and ModelOpt's packed experts have codes of
//! consecutive k, the even one in the low nibble, and are used where they lie; they differ in names, and in how scales are stored.
//!
//! What is there decides, not a configuration: names beside the weight, dtypes and shapes.

mod compressed;
mod config;
mod gguf;
mod marlin;
mod mlx;
mod modelopt;
mod modelopt_packed;
mod name;
mod refused;
mod rotation;
mod siblings;

pub(crate) use config::{check as check_config, check_beside as check_quantization_file};

pub(super) use gguf::{K_BLOCK, has_k_quants};

use super::safetensors::{Checkpoint, StoredTensor};
use crate::fp4::{Bytes, Fp4Tensor, Parts, Weight};
use crate::{Error, Result};
pub use name::Layout;
use safetensors::Dtype;
use siblings::{Named, Siblings};

/// How weights are read.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Reading {
    /// The layout that FP4 weights are in, where somebody says it: it decides what their tensors leave open, and whatever
    /// contradicts it is an error.
    pub layout: Option<Layout>,
    /// Only sizes are asked for: no data are read, and what would have to be made of them is memory that nothing is written
    /// to.
    pub headers_only: bool,
}

/// A weight as a checkpoint has it.
#[derive(Debug)]
pub(super) struct Found {
    pub weight: Weight,
    /// Of an FP4 weight.
    pub layout: Option<Layout>,
    /// The tensors that it consists of.
    pub used: Vec<String>,
    /// Their bytes, of stacks the weight's share.
    pub stored: usize,
    /// Bytes of the weight that lie in none of their maps: they were made while reading.
    pub own: usize,
}

/// The weight `[N, K]` of a linear layer, in FP4, floating point or GGML's integers.
///
/// # Errors
/// [`Error::Tensor`] names what is missing or malformed, and weights of a kind that is not implemented.
pub(super) fn read(
    checkpoint: &Checkpoint,
    module: &str,
    shape: (usize, usize),
    reading: Reading,
) -> Result<Found> {
    found(Siblings::of(checkpoint, module, reading), shape)
}

/// The weight `[H · N, K]` of a module that has a matrix `[N, K]` a head, one below the other.
///
/// # Errors
/// As [`read`].
pub(super) fn read_stack(
    checkpoint: &Checkpoint,
    module: &str,
    shape: (usize, usize),
    reading: Reading,
) -> Result<Found> {
    found(Siblings::stacked(checkpoint, module, reading), shape)
}

fn found(siblings: Siblings<'_>, shape: (usize, usize)) -> Result<Found> {
    refused::check(&siblings)?;
    let (weight, layout) = match reader(&siblings) {
        Some(read) => {
            let (tensor, layout) = read(&siblings, shape)?;
            siblings.check_layout(layout)?;
            (tensor.into(), Some(layout))
        }
        None => (unpacked(&siblings, shape)?, None),
    };
    let (used, given) = siblings.used();
    let mapped = |bytes: &&Bytes| given.iter().any(|given| given.same_map(bytes));
    let own = weight.regions().filter(|bytes| !mapped(bytes));
    Ok(Found {
        own: own.map(|bytes| bytes.len()).sum(),
        stored: given.iter().map(|bytes| bytes.len()).sum(),
        weight,
        layout,
        used,
    })
}

/// A weight in floating point or GGML's integers, where it lies.
fn unpacked(siblings: &Siblings<'_>, shape: (usize, usize)) -> Result<Weight> {
    if siblings.has("scale") {
        let problem = "a factor beside a weight that is not in FP4, which is not implemented";
        return Err(siblings.get("scale")?.problem(problem));
    }
    if let Some(blocks) = gguf::integers(siblings, shape)? {
        return Ok(blocks.into());
    }
    let Named { name, tensor } = siblings.get("weight")?;
    Ok(tensor.matrix(&name, shape.0, shape.1)?.into())
}

/// A tensor of these parts; of shapes checked before only a scale's value can be wrong.
fn together(siblings: &Siblings<'_>, codes: &Named, scales: &Named, parts: Parts) -> Result<Fp4Tensor> {
    let made = match siblings.reading().headers_only {
        true => Fp4Tensor::unread(&codes.name, parts),
        false => Fp4Tensor::new(&codes.name, parts),
    };
    made.map_err(|error| match error {
        Error::Tensor { problem, .. } => scales.problem(problem),
        other => other,
    })
}

/// Whether a checkpoint has the weight of a linear layer in some form, or a part of it.
pub(crate) fn has_weight(checkpoint: &Checkpoint, module: &str) -> bool {
    Siblings::of(checkpoint, module, Reading::default()).has_weight()
}

/// Whether a checkpoint has a linear layer's weight in FP4.
pub(super) fn holds(checkpoint: &Checkpoint, module: &str) -> bool {
    reader(&Siblings::of(checkpoint, module, Reading::default())).is_some()
}

type Reader = fn(&Siblings<'_>, (usize, usize)) -> Result<(Fp4Tensor, Layout)>;

/// What reads a layer's codes, if it has any.
fn reader(siblings: &Siblings<'_>) -> Option<Reader> {
    if let Some(read) = gguf::reader(siblings) {
        Some(read)
    } else if siblings.packed().is_some() {
        Some(modelopt_packed::read)
    } else if siblings.has("weight_packed") {
        Some(compressed::read)
    } else if siblings.is("weight", &[Dtype::U8]) {
        Some(modelopt::read)
    } else if !marlin::CODES.iter().any(|name| siblings.is(name, WORDS)) {
        None
    } else if siblings.is("scales", &[Dtype::U8]) {
        Some(mlx::read)
    } else {
        Some(marlin::read)
    }
}

/// The dtypes of eight codes.
const WORDS: &[Dtype] = &[Dtype::U32, Dtype::I32];

/// Whether a tensor holds packed codes.
pub(super) fn is_packed(tensor: &StoredTensor) -> bool {
    WORDS.contains(&tensor.dtype) || tensor.dtype == Dtype::U8
}
