//! Page-aligned windows over a map that is larger than a device's largest buffer.

use std::ops::Range;

/// Windows over a map: one where it fits a buffer, else several, each overlapping half of the next, so that whatever is
/// no longer than half a window lies wholly in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Windows {
    /// Bytes of the map, to the end of its last page.
    len: usize,
    window: usize,
    stride: usize,
}

impl Windows {
    /// Windows over a map of `len` bytes, of at most `most` bytes each, at multiples of `page`.
    pub fn new(len: usize, most: usize, page: usize) -> Self {
        let len = len.max(1).next_multiple_of(page);
        if len <= most {
            return Self {
                len,
                window: len,
                stride: len,
            };
        }
        // An even number of pages, at least two.
        let window = (most / (2 * page)).max(1) * 2 * page;
        Self {
            len,
            window,
            stride: window / 2,
        }
    }

    /// Each window's range of the map.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        (0..self.count()).map(|index| {
            let start = index * self.stride;
            start..(start + self.window).min(self.len)
        })
    }

    /// The window that holds a range wholly, and where in it the range begins.
    pub fn find(&self, range: Range<usize>) -> Option<(usize, usize)> {
        let index = (range.start / self.stride).min(self.count() - 1);
        let start = index * self.stride;
        (range.end <= (start + self.window).min(self.len)).then_some((index, range.start - start))
    }

    /// What is no longer than this is found wherever it lies.
    pub fn largest(&self) -> usize {
        match self.count() {
            1 => self.len,
            _ => self.window - self.stride,
        }
    }

    fn count(&self) -> usize {
        // The last one reaches the end.
        (self.len - self.window).div_ceil(self.stride) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 16;

    #[test]
    fn a_map_that_fits_has_one_window() {
        let windows = Windows::new(100, 112, PAGE);
        assert!(windows.ranges().eq(std::iter::once(0..112)));
        assert_eq!(windows.find(30..100), Some((0, 30)));
        assert_eq!(windows.largest(), 112);
        assert_eq!(Windows::new(0, 112, PAGE).ranges().next(), Some(0..16));
    }

    #[test]
    fn whatever_is_no_longer_than_half_a_window_lies_in_one() {
        for len in [101, 128, 129, 160, 200, 1000] {
            for most in [32, 40, 64, 96, 100] {
                let windows = Windows::new(len, most, PAGE);
                let ranges: Vec<_> = windows.ranges().collect();
                for range in &ranges {
                    assert!(range.len() <= most && range.start % PAGE == 0 && range.len() % PAGE == 0);
                }
                assert_eq!(ranges.last().unwrap().end, len.next_multiple_of(PAGE));
                for start in 0..len {
                    for size in [1, 7, windows.largest()] {
                        if start + size <= len {
                            let (index, offset) = windows.find(start..start + size).unwrap();
                            assert_eq!(ranges[index].start + offset, start);
                            assert!(start + size <= ranges[index].end, "{len} {most} {start} {size}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_longer_than_a_window_is_not_found() {
        assert_eq!(Windows::new(1000, 64, PAGE).find(0..65), None);
    }
}
