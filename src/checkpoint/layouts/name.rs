//! The layouts by name, for options and reports.

use crate::{Error, Result};
use serde::{Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// Who writes FP4 weights so.
///
/// ```
/// use candle_mmfp4::checkpoint::Layout;
///
/// let layout: Layout = "marlin-turned".parse()?;
/// assert_eq!(layout, Layout::MarlinTurned);
/// println!("{layout}: {}", layout.told_by());
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Layout {
    /// MMFP4 of Metal Marlin, and of this crate: U32 codes, F16 scales.
    Marlin,
    /// The same with its scales the other way round, a row a group.
    MarlinTurned,
    /// compressed-tensors, `nvfp4-pack-quantized`: U8 codes, E4M3 scales, a factor to divide by.
    CompressedNvfp4,
    /// compressed-tensors, `mxfp4-pack-quantized`: U8 codes, E8M0 scales.
    CompressedMxfp4,
    /// ModelOpt's NVFP4: U8 codes, E4M3 scales, a factor to multiply by.
    ModelOpt,
    /// ModelOpt's NVFP4 of experts that are one parameter, transposed: the codes of a row lie apart.
    ModelOptPacked,
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
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Marlin,
        Self::MarlinTurned,
        Self::CompressedNvfp4,
        Self::CompressedMxfp4,
        Self::ModelOpt,
        Self::ModelOptPacked,
        Self::MlxMxfp4,
        Self::MlxNvfp4,
        Self::GgufMxfp4,
        Self::GgufNvfp4,
    ];

    /// Whether weights are repacked while loading: their codes do not lie as kernels read them.
    pub fn is_repacked(self) -> bool {
        matches!(self, Self::ModelOptPacked | Self::GgufMxfp4 | Self::GgufNvfp4)
    }

    /// What `--layout` calls it, and the JSON of reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Marlin => "marlin",
            Self::MarlinTurned => "marlin-turned",
            Self::CompressedNvfp4 => "compressed-nvfp4",
            Self::CompressedMxfp4 => "compressed-mxfp4",
            Self::ModelOpt => "modelopt-nvfp4",
            Self::ModelOptPacked => "modelopt-packed",
            Self::MlxMxfp4 => "mlx-mxfp4",
            Self::MlxNvfp4 => "mlx-nvfp4",
            Self::GgufMxfp4 => "gguf-mxfp4",
            Self::GgufNvfp4 => "gguf-nvfp4",
        }
    }

    /// What of a weight's tensors tells that it is this one.
    pub fn told_by(self) -> &'static str {
        match self {
            Self::Marlin => "words of codes beside 16-bit scales [N, K/group]",
            Self::MarlinTurned => "words of codes beside 16-bit scales [K/group, N]",
            Self::CompressedNvfp4 => ".weight_packed beside scales in F8_E4M3",
            Self::CompressedMxfp4 => ".weight_packed beside scales in U8",
            Self::ModelOpt => ".weight in U8 beside scales in F8_E4M3",
            Self::ModelOptPacked => "experts.gate_up_proj and down_proj in U8, scales [E, K/16, R]",
            Self::MlxMxfp4 => "words of codes beside scales in U8, one every 32",
            Self::MlxNvfp4 => "words of codes beside scales in U8, one every 16",
            Self::GgufMxfp4 => "a tensor of type MXFP4",
            Self::GgufNvfp4 => "a tensor of type NVFP4",
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Marlin => "Marlin MMFP4",
            Self::MarlinTurned => "Marlin MMFP4, scales turned",
            Self::CompressedNvfp4 => "compressed-tensors nvfp4-pack-quantized",
            Self::CompressedMxfp4 => "compressed-tensors mxfp4-pack-quantized",
            Self::ModelOpt => "ModelOpt NVFP4",
            Self::ModelOptPacked => "ModelOpt NVFP4, packed experts",
            Self::MlxMxfp4 => "MLX mxfp4",
            Self::MlxNvfp4 => "MLX nvfp4",
            Self::GgufMxfp4 => "GGUF MXFP4",
            Self::GgufNvfp4 => "GGUF NVFP4",
        })
    }
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|layout| layout.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::argument("load", "layout", format!("one of {names}"), format!("`{name}`"))
        })
    }
}

impl Serialize for Layout {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written_and_documented() {
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/checkpoints.md");
        let docs = std::fs::read_to_string(docs).unwrap();
        for layout in Layout::ALL {
            assert_eq!(layout.name().parse::<Layout>().unwrap(), layout);
            assert!(docs.contains(&format!("| `{}` |", layout.name())), "{layout}");
        }
        let error = "awq".parse::<Layout>().unwrap_err().to_string();
        assert!(
            error.contains("marlin-turned") && error.contains("`awq`"),
            "{error}"
        );
    }
}
