//! What the numbers of a cache are stored as.

use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// How many consecutive elements of an FP4 row share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleGroup {
    /// 16: 4.5 bits an element.
    Sixteen,
    /// 32: 4.25 bits an element.
    ThirtyTwo,
}

impl ScaleGroup {
    /// The elements.
    pub const fn elements(self) -> usize {
        match self {
            Self::Sixteen => 16,
            Self::ThirtyTwo => 32,
        }
    }
}

/// What a cache stores of a token: the bytes of MLA's 512 + 64 numbers, and what becomes of them.
///
/// | format | bytes | of BF16 |
/// |---|---|---|
/// | `f16`, `bf16` | 1152 | 1 |
/// | `fp8` | 656 | 1 / 1.76 |
/// | `fp4`, a scale every 16 | 416 | 1 / 2.77 |
/// | `fp4`, a scale every 32 | 400 | 1 / 2.88 |
///
/// Rotary keys are kept in 16 bits by all of them. See [`codec`](super::codec) for the numbers.
///
/// ```
/// use candle_mmfp4::kv::CacheFormat;
///
/// assert_eq!("fp8".parse::<CacheFormat>()?, CacheFormat::Fp8);
/// assert_eq!("fp4".parse::<CacheFormat>()?, CacheFormat::fp4());
/// assert_eq!(CacheFormat::fp4().to_string(), "fp4");
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheFormat {
    /// IEEE half precision. What exceeds 65,504 becomes infinite.
    F16,
    /// bfloat16.
    BF16,
    /// E4M3 codes, 128 of which share an F32 scale, a power of two.
    Fp8,
    /// E2M1 codes with a scale of one byte a group.
    Fp4 {
        /// The elements that share a scale.
        group: ScaleGroup,
        /// Whether vectors are stored [rotated](super::hadamard), which spreads the outliers of single channels.
        rotate: bool,
    },
}

impl CacheFormat {
    /// The FP4 format that `fp4` stands for.
    pub const fn fp4() -> Self {
        Self::Fp4 {
            group: ScaleGroup::Sixteen,
            rotate: false,
        }
    }

    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::F16,
        Self::BF16,
        Self::Fp8,
        Self::Fp4 {
            group: ScaleGroup::Sixteen,
            rotate: false,
        },
        Self::Fp4 {
            group: ScaleGroup::Sixteen,
            rotate: true,
        },
        Self::Fp4 {
            group: ScaleGroup::ThirtyTwo,
            rotate: false,
        },
        Self::Fp4 {
            group: ScaleGroup::ThirtyTwo,
            rotate: true,
        },
    ];

    /// The name that says all of it, also of what `fp4` stands for.
    const fn name(self) -> &'static str {
        use ScaleGroup::{Sixteen, ThirtyTwo};
        match self {
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Fp4 { group, rotate } => match (group, rotate) {
                (Sixteen, false) => "fp4-16",
                (Sixteen, true) => "fp4-16-rotated",
                (ThirtyTwo, false) => "fp4-32",
                (ThirtyTwo, true) => "fp4-32-rotated",
            },
        }
    }
}

/// `fp4` for [`CacheFormat::fp4`], else `f16`, `bf16`, `fp8`, `fp4-16`, `fp4-16-rotated`, `fp4-32` or
/// `fp4-32-rotated`.
impl fmt::Display for CacheFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(if *self == Self::fp4() { "fp4" } else { self.name() })
    }
}

impl FromStr for CacheFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if name == "fp4" {
            return Ok(Self::fp4());
        }
        Self::ALL
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| {
                let names = "f16, bf16, fp8 or fp4 (fp4-16, fp4-16-rotated, fp4-32, fp4-32-rotated)";
                Error::argument("kv-cache", "format", names, format!("`{name}`"))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_formats_are_read_as_they_are_written() {
        for format in CacheFormat::ALL {
            assert_eq!(format.to_string().parse::<CacheFormat>().unwrap(), format);
            assert_eq!(format.name().parse::<CacheFormat>().unwrap(), format);
        }
        assert_eq!(format!("{:<6}|", CacheFormat::Fp8), "fp8   |");
        let error = "fp16".parse::<CacheFormat>().unwrap_err().to_string();
        assert!(error.contains("bf16") && error.contains("`fp16`"), "{error}");
    }
}
