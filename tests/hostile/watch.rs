//! What a call does to this process: whether it panics, how much memory it asks for, how long it takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The system's allocator, with an account of it.
struct Counting;

/// Bytes in use, the most there were, and the largest that were asked for at once.
static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

fn add(bytes: usize) {
    let in_use = IN_USE.fetch_add(bytes, Ordering::Relaxed).wrapping_add(bytes);
    PEAK.fetch_max(in_use, Ordering::Relaxed);
    LARGEST.fetch_max(bytes, Ordering::Relaxed);
}

// SAFETY: every call is the system allocator's own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist while one is copied to the other.
        add(size);
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(start, layout, size) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a call took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// The most bytes at once, beyond those that were in use before.
    pub peak: usize,
    /// The most bytes asked for in one piece.
    pub largest: usize,
    pub time: Duration,
}

impl Seen {
    /// The more of each.
    pub fn max(self, other: Self) -> Self {
        Self {
            peak: self.peak.max(other.peak),
            largest: self.largest.max(other.largest),
            time: self.time.max(other.time),
        }
    }
}

/// What the last panic of any thread said, and where.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// While it is there, panics are kept instead of printed.
pub struct Quiet;

impl Quiet {
    pub fn new() -> Self {
        std::panic::set_hook(Box::new(|info| {
            *PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = info.to_string();
        }));
        Self
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // Not while this thread unwinds: the hook cannot be changed then.
        if !std::thread::panicking() {
            _ = std::panic::take_hook();
        }
    }
}

/// Calls; the error is what a panic said.
pub fn watch<T>(call: impl FnOnce() -> T) -> (Result<T, String>, Seen) {
    let before = IN_USE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    let start = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(call));
    let seen = Seen {
        peak: PEAK.load(Ordering::Relaxed).saturating_sub(before),
        largest: LARGEST.load(Ordering::Relaxed),
        time: start.elapsed(),
    };
    let said = || {
        PANIC
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    };
    (result.map_err(|_| said()), seen)
}

/// The largest address space that this process has had so far, in bytes: maps of memory count that no allocator sees. `None`
/// where the system does not tell.
pub fn most_mapped() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? << 10)
}
