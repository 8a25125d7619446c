//! Weights brought together.

use super::{Bytes, Weight};
use crate::Result;

/// Every region begins at a multiple of 16 bytes, for loads of as many.
fn aligned(len: usize) -> usize {
    len.next_multiple_of(16)
}

/// The bytes that [`gather`] would copy: none where all weights lie in one map.
pub(crate) fn gathered_bytes<'a>(all: impl Iterator<Item = &'a Weight> + Clone) -> usize {
    let regions = all.flat_map(Weight::regions);
    let apart = |home: &Bytes| regions.clone().any(|bytes| !bytes.same_map(home));
    match regions.clone().next().is_some_and(apart) {
        true => regions.map(|bytes| aligned(bytes.len())).sum(),
        false => 0,
    }
}

/// Moves all weights into one map where they are not in one, so that a device needs one buffer for them; gives the bytes
/// copied.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) where the system has no memory left.
pub(crate) fn gather(all: &mut [&mut Weight]) -> Result<usize> {
    let total = gathered_bytes(all.iter().map(|weight| &**weight));
    if total == 0 {
        return Ok(0);
    }
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
