//! Numbers and texts out of a file's bytes, never beyond their end.

use std::ops::Range;

/// A place in a file's bytes. What it reads is there, or is `None`.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    #[cfg_attr(not(feature = "hub"), allow(dead_code, reason = "the hub alone asks for it"))]
    furthest: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            furthest: 0,
        }
    }

    /// Bytes read so far.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Where the furthest ends of what was asked for: beyond the bytes, where some of it was not there.
    #[cfg(feature = "hub")]
    pub fn furthest(&self) -> usize {
        self.furthest
    }

    pub fn skip(&mut self, len: usize) -> Option<Range<usize>> {
        let end = self.at.saturating_add(len);
        self.furthest = self.furthest.max(end);
        (end <= self.bytes.len()).then(|| std::mem::replace(&mut self.at, end)..end)
    }

    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let range = self.skip(N)?;
        self.bytes[range].try_into().ok()
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count or a length.
    pub fn size(&mut self) -> Option<usize> {
        usize::try_from(self.u64()?).ok()
    }

    /// A text's bytes, behind their number.
    pub fn text(&mut self) -> Option<&'a [u8]> {
        let len = self.size()?;
        let range = self.skip(len)?;
        Some(&self.bytes[range])
    }
}
