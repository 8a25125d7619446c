//! Which cache a model uses.

use super::format::CacheFormat;
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
