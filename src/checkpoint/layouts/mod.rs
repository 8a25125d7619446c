//! The layouts in which checkpoints store FP4 weights, a file each. All but GGUF's have codes of consecutive k, the even one in
//! the low nibble, and are used where they lie; they differ in names, and in how scales are stored.
//!
//! What is there decides, not a configuration: names beside the weight, dtypes and shapes.

mod compressed;
mod config;
mod gguf;
mod marlin;
mod mlx;
mod modelopt;
mod refused;
mod siblings;

pub(crate) use config::check as check_config;

use super::safetensors::{Checkpoint, StoredTensor};
use crate::fp4::{Fp4Tensor, Parts, Weight};
use crate::{Error, Result};
use safetensors::Dtype;
use siblings::{Named, Siblings};
use std::fmt;

/// Who writes FP4 weights so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Layout {
    /// MMFP4 of Metal Marlin, and of this crate: U32 codes, F16 scales.
    Marlin,
    /// compressed-tensors, `nvfp4-pack-quantized`: U8 codes, E4M3 scales, a factor to divide by.
    CompressedNvfp4,
    /// compressed-tensors, `mxfp4-pack-quantized`: U8 codes, E8M0 scales.
    CompressedMxfp4,
    /// ModelOpt's NVFP4: U8 codes, E4M3 scales, a factor to multiply by.
    ModelOpt,
    /// MLX's `mxfp4`: U32 codes, E8M0 scales; experts stacked.
    MlxMxfp4,
    /// MLX's `nvfp4`: U32 codes, E4M3 scales; experts stacked.
    MlxNvfp4,
    /// GGUF's `MXFP4`: blocks of 32 codes behind their scale; experts stacked.
    GgufMxfp4,
    /// GGUF's `NVFP4`: blocks of 64 codes behind their four scales, a factor to multiply by; experts stacked.
    GgufNvfp4,
}

impl Layout {
    /// Whether weights are repacked while loading: their codes do not lie as kernels read them.
    pub fn is_repacked(self) -> bool {
        matches!(self, Self::GgufMxfp4 | Self::GgufNvfp4)
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Marlin => "Marlin MMFP4",
            Self::CompressedNvfp4 => "compressed-tensors nvfp4-pack-quantized",
            Self::CompressedMxfp4 => "compressed-tensors mxfp4-pack-quantized",
            Self::ModelOpt => "ModelOpt NVFP4",
            Self::MlxMxfp4 => "MLX mxfp4",
            Self::MlxNvfp4 => "MLX nvfp4",
            Self::GgufMxfp4 => "GGUF MXFP4",
            Self::GgufNvfp4 => "GGUF NVFP4",
        })
    }
}

/// A weight as a checkpoint has it.
#[derive(Debug)]
pub(super) struct Found {
    pub weight: Weight,
    /// Of an FP4 weight.
    pub layout: Option<Layout>,
    /// The tensors that it consists of.
    pub used: Vec<String>,
}

/// The weight `[N, K]` of a linear layer, in FP4, floating point or GGML's integers.
///
/// # Errors
/// [`Error::Tensor`] names what is missing or malformed, and weights of a kind that is not implemented.
pub(super) fn read(checkpoint: &Checkpoint, module: &str, shape: (usize, usize)) -> Result<Found> {
    found(Siblings::of(checkpoint, module), shape)
}

/// The weight `[H · N, K]` of a module that has a matrix `[N, K]` a head, one below the other.
///
/// # Errors
/// As [`read`].
pub(super) fn read_stack(checkpoint: &Checkpoint, module: &str, shape: (usize, usize)) -> Result<Found> {
    found(Siblings::stacked(checkpoint, module), shape)
}

fn found(siblings: Siblings<'_>, shape: (usize, usize)) -> Result<Found> {
    refused::check(&siblings)?;
    let (weight, layout) = match reader(&siblings) {
        Some(read) => {
            let (tensor, layout) = read(&siblings, shape)?;
            (tensor.into(), Some(layout))
        }
        None => (unpacked(&siblings, shape)?, None),
    };
    Ok(Found {
        weight,
        layout,
        used: siblings.used(),
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
fn together(codes: &Named, scales: &Named, parts: Parts) -> Result<Fp4Tensor> {
    Fp4Tensor::new(&codes.name, parts).map_err(|error| match error {
        Error::Tensor { problem, .. } => scales.problem(problem),
        other => other,
    })
}

/// Whether a checkpoint has a linear layer's weight in FP4.
pub(super) fn holds(checkpoint: &Checkpoint, module: &str) -> bool {
    reader(&Siblings::of(checkpoint, module)).is_some()
}

type Reader = fn(&Siblings<'_>, (usize, usize)) -> Result<(Fp4Tensor, Layout)>;

/// What reads a layer's codes, if it has any.
fn reader(siblings: &Siblings<'_>) -> Option<Reader> {
    if let Some(read) = gguf::reader(siblings) {
        Some(read)
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
