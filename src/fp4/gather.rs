//! Weights brought together.

use super::{Bytes, Weight};
use crate::Result;

/// Moves all weights into one map where they are not in one, so that a device needs one buffer for them; gives the bytes
/// copied.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) where the system has no memory left.
pub(crate) fn gather(all: &mut [&mut Weight]) -> Result<usize> {
    let home = all.first().and_then(|weight| weight.regions().next().cloned());
    let together = home.is_none_or(|home| all.iter().all(|w| w.regions().all(|bytes| bytes.same_map(&home))));
    if together {
        return Ok(0);
    }
    // Every region begins at a multiple of 16 bytes, for loads of as many.
    let aligned = |len: usize| len.next_multiple_of(16);
    let total = all
        .iter()
        .flat_map(|w| w.regions())
        .map(|bytes| aligned(bytes.len()))
        .sum();
    let region = Bytes::build(total, |memory| {
        let mut rest = memory;
        for bytes in all.iter().flat_map(|w| w.regions()) {
            let (place, after) = rest.split_at_mut(aligned(bytes.len()));
            place[..bytes.len()].copy_from_slice(bytes);
            rest = after;
        }
        Ok(())
    })?;
    let mut start = 0;
    for weight in all {
        **weight = weight.relocated(|old| {
            let place = region
                .slice(start..start + old.len())
                .expect("the region was sized for all weights");
            start += aligned(old.len());
            place
        });
    }
    Ok(total)
}
