//! Where a pass writes.

use crate::{Error, Result};

/// The slots of a pool that a pass's tokens are written to, one a token, no two alike: tokens are written by several
/// threads at once, and a slot with two of them would hold either.
///
/// ```
/// use candle_mmfp4::kv::Slots;
///
/// assert_eq!(Slots::new(vec![35, 36, 7])?.end(), 37);
/// assert!(Slots::new(vec![35, 7, 35]).is_err());
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slots {
    slots: Vec<u32>,
    end: usize,
}

impl Slots {
    /// Slots, checked.
    ///
    /// # Errors
    /// [`Error::Argument`] names a slot that is there twice.
    pub fn new(slots: Vec<u32>) -> Result<Self> {
        // Those of a sequence rise but where a block ends; sorting is quick.
        let mut sorted = slots.clone();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            let found = format!("slot {} twice", pair[0]);
            return Err(Error::argument(
                "kv-cache append",
                "slots",
                "a slot of its own for each token",
                found,
            ));
        }
        let end = sorted.last().map_or(0, |last| *last as usize + 1);
        Ok(Self { slots, end })
    }

    /// The slots, a token's each.
    pub fn as_slice(&self) -> &[u32] {
        &self.slots
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The slots that a pool must have: one more than the largest.
    pub fn end(&self) -> usize {
        self.end
    }
}
