//! Bytes where they lie: a range of a mapped file, or of memory that this process owns.

use crate::{Error, Result};
use memmap2::{Mmap, MmapMut, MmapOptions};
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;
#[cfg(any(target_os = "macos", test))]
use std::{any::Any, sync::OnceLock};

/// From so many bytes on, the system is asked for large pages: a processor that looks up fewer of them reads faster
/// (measured for this process's own memory: 32 and 40 GB/s).
#[cfg(target_os = "linux")]
const LARGE: usize = 4 << 20;

/// A cheap, shared view of read-only bytes.
///
/// Both kinds are page-aligned memory maps, so that a Metal buffer can later be made over either of them
/// without a copy: a file's map for a checkpoint, an anonymous one for what is built in memory.
#[derive(Clone)]
pub struct Bytes {
    map: Arc<Map>,
    range: (usize, usize),
}

/// A map, and what a device keeps beside it for as long as it is there.
struct Map {
    memory: Arc<Mmap>,
    #[cfg(any(target_os = "macos", test))]
    attached: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Bytes {
    /// Maps a whole file, read-only.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be opened or mapped.
    pub fn map_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = std::fs::File::open(path).map_err(|e| Error::io(path, e, ""))?;
        // SAFETY: the map is read-only and private to this type. What remains is another process that
        // truncates or rewrites the file while it is mapped; checkpoints are written to a temporary file
        // and renamed (by this crate and by the hub's cache), so that a mapped file never changes under us.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e, ""))?;
        #[cfg(target_os = "linux")]
        if map.len() >= LARGE {
            // Advice only: a system or file system that cannot follow it reads as it always did.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self::whole(map))
    }

    /// Owned memory of `len` bytes, filled by `fill`.
    ///
    /// # Errors
    /// [`Error::Io`] where the system has no memory left; whatever `fill` answers.
    pub fn build(len: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Self> {
        let memory = |e| Error::io("(memory)", e, format!("{len} bytes were asked for"));
        // An empty map is refused by some systems.
        let mut map = MmapMut::map_anon(len.max(1)).map_err(memory)?;
        #[cfg(target_os = "linux")]
        if len >= LARGE {
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        fill(&mut map[..len])?;
        let mut bytes = Self::whole(map.make_read_only().map_err(memory)?);
        bytes.range.1 = len;
        Ok(bytes)
    }

    /// Owned memory with a copy of `bytes`.
    ///
    /// # Errors
    /// As [`Bytes::build`].
    pub fn copy_from(bytes: &[u8]) -> Result<Self> {
        Self::build(bytes.len(), |memory| {
            memory.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// Owned memory of `len` bytes that nothing is written to, zeros: addresses only, for which the system sets nothing aside.
    /// They stand for what loading would make, where only its size is asked for.
    ///
    /// # Errors
    /// [`Error::Io`] where there are no addresses left.
    pub(crate) fn unwritten(len: usize) -> Result<Self> {
        Self::beginning(&[], len)
    }

    /// As [`unwritten`](Self::unwritten), but for `first`, which it begins with; what is longer than that is left out.
    ///
    /// # Errors
    /// As [`unwritten`](Self::unwritten).
    pub(crate) fn beginning(first: &[u8], len: usize) -> Result<Self> {
        let mut options = MmapOptions::new();
        // An empty map is refused by some systems.
        let map = options.len(len.max(1)).no_reserve_swap().map_anon();
        let map = map.and_then(|mut map| {
            let written = first.len().min(len);
            map[..written].copy_from_slice(&first[..written]);
            map.make_read_only()
        });
        let memory = |e| Error::io("(memory)", e, format!("{len} bytes were asked for"));
        let mut bytes = Self::whole(map.map_err(memory)?);
        bytes.range.1 = len;
        Ok(bytes)
    }

    fn whole(map: Mmap) -> Self {
        let range = (0, map.len());
        let map = Map {
            memory: Arc::new(map),
            #[cfg(any(target_os = "macos", test))]
            attached: OnceLock::new(),
        };
        Self {
            map: Arc::new(map),
            range,
        }
    }

    /// A part of these bytes, or `None` where `range` leaves them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        Some(Self {
            map: self.map.clone(),
            range: (self.range.0 + range.start, self.range.0 + range.end),
        })
    }

    /// From the first byte of these to the last, where all lie in one map; it begins at a multiple of `alignment` in the map.
    pub(crate) fn spanning<'a>(parts: impl IntoIterator<Item = &'a Self>, alignment: usize) -> Option<Self> {
        let mut parts = parts.into_iter();
        let first = parts.next()?;
        let mut range = first.range;
        for part in parts {
            if !part.same_map(first) {
                return None;
            }
            range = (range.0.min(part.range.0), range.1.max(part.range.1));
        }
        range.0 -= range.0 % alignment;
        Some(Self {
            map: first.map.clone(),
            range,
        })
    }

    /// Whether both lie in the same map: one device buffer can serve both.
    pub fn same_map(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.map, &other.map)
    }

    /// The whole map.
    #[cfg(target_os = "macos")]
    pub(crate) fn map(&self) -> &Arc<Mmap> {
        &self.map.memory
    }

    /// What is kept beside the map, made the first time; it is dropped with the map's last `Bytes`. One type only is kept.
    #[cfg(any(target_os = "macos", test))]
    pub(crate) fn attached<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> &T {
        let attached = self.map.attached.get_or_init(|| Box::new(make()));
        attached
            .downcast_ref()
            .expect("one type only is attached to maps")
    }

    /// Where these bytes begin in their map.
    pub fn offset(&self) -> usize {
        self.range.0
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map.memory[self.range.0..self.range.1]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({} at {})", self.len(), self.range.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_the_map_and_stay_inside() {
        let bytes = Bytes::copy_from(&[1, 2, 3, 4, 5]).unwrap();
        let part = bytes.slice(1..4).unwrap();
        assert_eq!(&*part, [2, 3, 4]);
        assert_eq!(part.slice(1..2).unwrap().offset(), 2);
        assert!(part.same_map(&bytes));
        assert!(part.slice(0..4).is_none());
        assert!(!part.same_map(&Bytes::copy_from(&[2, 3, 4]).unwrap()));
        assert!(Bytes::copy_from(&[]).unwrap().is_empty());
    }

    #[test]
    fn a_span_is_of_one_map_and_aligned() {
        let bytes = Bytes::copy_from(&(0..40).collect::<Vec<u8>>()).unwrap();
        let parts = [30..35, 21..22, 33..38].map(|range| bytes.slice(range).unwrap());
        let span = Bytes::spanning(&parts, 16).unwrap();
        assert_eq!((span.offset(), span.len()), (16, 22));
        assert_eq!(span[21 - 16], 21);
        assert!(Bytes::spanning([&parts[0], &Bytes::copy_from(&[1]).unwrap()], 16).is_none());
        assert!(Bytes::spanning([], 16).is_none());
    }

    #[test]
    fn what_is_attached_goes_with_the_last_of_them() {
        let token = Arc::new(());
        let bytes = Bytes::copy_from(&[1, 2]).unwrap();
        let part = bytes.slice(1..2).unwrap();
        assert!(Arc::ptr_eq(
            part.attached(|| token.clone()),
            bytes.attached(|| Arc::new(()))
        ));
        drop(bytes);
        assert_eq!(Arc::strong_count(&token), 2);
        drop(part);
        assert_eq!(Arc::strong_count(&token), 1);
    }

    #[test]
    fn what_is_not_written_is_zero_and_takes_no_memory() {
        // More than any machine has, but not more than there are addresses.
        let bytes = Bytes::beginning(&[1, 2, 3], 1 << 40).unwrap();
        assert_eq!((bytes.len(), &bytes[..4]), (1 << 40, &[1, 2, 3, 0][..]));
        assert_eq!(bytes[(1 << 40) - 1], 0);
        assert_eq!(&*Bytes::beginning(&[1, 2, 3], 2).unwrap(), [1, 2]);
        assert!(Bytes::unwritten(0).unwrap().is_empty());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Bytes::map_file("no/such/file").unwrap_err().to_string();
        assert!(error.contains("no/such/file"), "{error}");
    }
}
