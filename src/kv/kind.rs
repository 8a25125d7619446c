//! Which cache a model uses.

use super::format::CacheFormat;
use super::layout::RowLayout;
use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Which cache a model uses, and what it stores.
///
/// ```
/// use candle_mmfp4::kv::{CacheFormat, CacheKind};
///
/// assert_eq!("fp8".parse::<CacheKind>()?, CacheKind::Paged(CacheFormat::Fp8));
/// assert_eq!(CacheKind::default().to_string(), "bf16");
/// assert_eq!("contiguous".parse::<CacheKind>()?, CacheKind::Contiguous);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheKind {
    /// Blocks of one pool a layer for all sequences, in a format: [`PagedKvCache`](crate::nn::PagedKvCache).
    Paged(CacheFormat),
    /// A tensor a layer and sequence, which grows, in the activations' dtype: [`TokenCache`](crate::nn::TokenCache), the
    /// reference that the other is compared with.
    Contiguous,
}

impl CacheKind {
    /// Bytes that MLA's latent and rotary key of a token take in a layer; a number of a contiguous cache takes `number`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a latent whose width the format does not take, or widths beyond the machine's sizes.
    pub fn latent_bytes(self, latent: usize, rope: usize, number: usize) -> Result<usize> {
        match self {
            Self::Paged(format) => Ok(RowLayout::latent(format, latent, rope)?.row_bytes()),
            Self::Contiguous => {
                let bytes = latent
                    .checked_add(rope)
                    .and_then(|width| width.checked_mul(number));
                bytes.ok_or_else(|| {
                    let found = format!("{latent} + {rope} numbers of {number} bytes");
                    Error::argument("kv-cache", "latent", "sizes within the machine's", found)
                })
            }
        }
    }
}

impl Default for CacheKind {
    /// Blocks in `bf16`.
    fn default() -> Self {
        Self::Paged(CacheFormat::BF16)
    }
}

impl From<CacheFormat> for CacheKind {
    fn from(format: CacheFormat) -> Self {
        Self::Paged(format)
    }
}

/// The [format](CacheFormat), or `contiguous`.
impl fmt::Display for CacheKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paged(format) => format.fmt(f),
            Self::Contiguous => f.pad("contiguous"),
        }
    }
}

impl FromStr for CacheKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if name == "contiguous" {
            return Ok(Self::Contiguous);
        }
        name.parse().map(Self::Paged).map_err(|error| match error {
            Error::Argument {
                op,
                argument,
                expected,
                found,
            } => {
                let expected = format!("{expected}, or contiguous");
                Error::argument(op, argument, expected, found)
            }
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_kinds_have_their_rows() {
        let bytes = |kind: &str| {
            kind.parse::<CacheKind>()
                .unwrap()
                .latent_bytes(512, 64, 4)
                .unwrap()
        };
        assert_eq!(
            ["contiguous", "f16", "fp8", "fp4"].map(bytes),
            [2304, 1152, 656, 416]
        );
        assert!(
            CacheKind::Paged(CacheFormat::fp4())
                .latent_bytes(520, 64, 4)
                .is_err()
        );
        for (latent, rope) in [(usize::MAX, 64), (usize::MAX / 2, 0)] {
            let error = CacheKind::Contiguous.latent_bytes(latent, rope, 4).unwrap_err();
            assert!(error.to_string().contains("within the machine's"), "{error}");
        }
    }

    #[test]
    fn kv_kinds_are_read_as_they_are_written() {
        let paged = CacheFormat::ALL.map(CacheKind::Paged);
        for kind in paged.into_iter().chain([CacheKind::Contiguous]) {
            assert_eq!(kind.to_string().parse::<CacheKind>().unwrap(), kind);
        }
        assert_eq!(format!("{:<11}|", CacheKind::Contiguous), "contiguous |");
        let error = "f32".parse::<CacheKind>().unwrap_err().to_string();
        assert!(
            error.contains("bf16") && error.contains("contiguous") && error.contains("`f32`"),
            "{error}"
        );
    }
}
