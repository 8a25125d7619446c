//! What to quantise to.

use super::{GROUPS, ScaleKind};
use crate::{Error, Result};

/// What to quantise to: group and scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    /// Elements along K that share a scale: 16, 32, 64 or 128.
    pub group: usize,
    /// How scales are stored. E4M3 scales come with a factor, a power of two, for the whole tensor.
    pub kind: ScaleKind,
}

impl Format {
    /// Marlin MMFP4: groups of 128, F16 scales; 4.125 bits a weight.
    pub const fn mmfp4() -> Self {
        Self {
            group: 128,
            kind: ScaleKind::F16,
        }
    }

    /// OCP MXFP4: groups of 32, power-of-two scales; 4.25 bits a weight.
    pub const fn mxfp4() -> Self {
        Self {
            group: 32,
            kind: ScaleKind::E8M0,
        }
    }

    /// NVFP4: groups of 16, E4M3 scales and a tensor factor; 4.5 bits a weight.
    pub const fn nvfp4() -> Self {
        Self {
            group: 16,
            kind: ScaleKind::E4M3,
        }
    }

    /// Refuses a group that no tensor can have; `op` appears in the error.
    pub(crate) fn check(self, op: &'static str) -> Result<()> {
        match GROUPS.contains(&self.group) {
            true => Ok(()),
            false => Err(Error::argument(
                op,
                "format",
                "a group of 16, 32, 64 or 128",
                self.group.to_string(),
            )),
        }
    }

    /// Bits a weight takes, scales included.
    pub fn bits_per_weight(self) -> f64 {
        4.0 + 8.0 * self.kind.size() as f64 / self.group as f64
    }
}

impl std::str::FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "mmfp4" => Ok(Self::mmfp4()),
            "mxfp4" => Ok(Self::mxfp4()),
            "nvfp4" => Ok(Self::nvfp4()),
            other => Err(Error::argument(
                "quantize",
                "format",
                "mmfp4, mxfp4 or nvfp4",
                format!("`{other}`"),
            )),
        }
    }
}
