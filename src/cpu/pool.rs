//! Threads that wait for work close by.
//!
//! A decoded token is some hundred parallel regions of ten to a hundred microseconds each. Waking a sleeping
//! thread takes as long as such a region, so the workers spin between them: a few microseconds on the
//! processor, then yielding it to whoever wants it, then (after a millisecond without work) asleep. A region
//! does not wait for a worker that never came: on a busy machine those that run do the work of all.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Turns on the processor before a waiting thread begins to yield it.
const SPINS: u32 = 2000;
/// How long a worker yields before it sleeps.
const PATIENCE: Duration = Duration::from_millis(1);

/// A set of threads that run the tasks of one region at a time together with the thread that asks.
///
/// Tasks are claimed in order, some consecutive ones at a time; which thread runs which is left to chance, so that results must not
/// depend on it. A region that begins while another one runs (a task's own, or another caller's) is run by
/// its caller alone.
#[derive(Debug)]
pub struct ThreadPool {
    shared: Arc<Shared>,
    busy: AtomicBool,
    workers: Vec<JoinHandle<()>>,
}

impl ThreadPool {
    /// A pool of `threads` threads, the caller's included: one fewer is started.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let worker = |index| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("mmfp4-{index}"));
            // Where the system has no more threads, those that are there do the work.
            thread.spawn(move || shared.work()).ok()
        };
        let workers = (1..threads).filter_map(worker).collect();
        Self {
            shared,
            busy: AtomicBool::new(false),
            workers,
        }
    }

    /// Threads that take part, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task` once for each number below `tasks` and returns when all are done.
    ///
    /// # Panics
    /// If a task panics.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() || self.busy.swap(true, Ordering::Acquire) {
            return (0..tasks).for_each(task);
        }
        let region = Region(self);
        self.shared.shares.store(2 * self.threads(), Ordering::Relaxed);
        self.shared.begin(tasks, &task);
        self.shared.claim(&task);
        drop(region);
        if let Some(panic) = self.shared.panic().take() {
            panic::resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks; there is nothing to hear from it.
            let _ = worker.join();
        }
    }
}

/// A region that is under way; dropping it waits for the workers inside, also where a task of the caller's panics.
struct Region<'a>(&'a ThreadPool);

impl Drop for Region<'_> {
    fn drop(&mut self) {
        self.0.shared.end();
        self.0.busy.store(false, Ordering::Release);
    }
}

/// The task of a region, its lifetime erased.
#[derive(Clone, Copy)]
struct Task(*const (dyn Fn(usize) + Sync));

/// A region is OPEN while workers may enter it; the low bits count those inside, the high bits number it.
const OPEN: u64 = 1 << 31;
const NUMBER: u32 = 32;

#[derive(Default)]
struct Shared {
    state: AtomicU64,
    task: UnsafeCell<Option<Task>>,
    tasks: AtomicUsize,
    next: AtomicUsize,
    /// What is left is divided by this for a thread's next part.
    shares: AtomicUsize,
    stop: AtomicBool,
    asleep: AtomicUsize,
    sleep: Mutex<()>,
    woken: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `task` is the only member that is not Sync. It is written by `begin` alone, when the region before is
// closed and nobody is inside (see `end`), and read by workers inside an open region; entering acquires what
// opening released. The pointer leads to a `Sync` closure.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to one thread.
unsafe impl Send for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl Shared {
    /// Opens a region. The caller must `end` it before `task` goes away.
    fn begin(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let task: *const (dyn Fn(usize) + Sync + '_) = task;
        // SAFETY: only the lifetime changes; `Region` waits in `end` until no worker is inside, before the
        // closure that `run` borrows can go away.
        let task: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(task) };
        // SAFETY: `busy` admits one caller at a time, and the region before has ended: nobody reads.
        unsafe { *self.task.get() = Some(Task(task)) };
        self.tasks.store(tasks, Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        let number = (self.state.load(Ordering::Relaxed) >> NUMBER) + 1;
        self.state.store(number << NUMBER | OPEN, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
    }

    /// Closes the region and waits for the workers inside.
    fn end(&self) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            pause(&mut spins);
        }
    }

    /// Runs tasks until none is left: always a part of those that are, so that a thread goes on where it was (and
    /// memory with it) and yet all end together.
    fn claim(&self, task: &(dyn Fn(usize) + Sync)) {
        let (tasks, shares) = (
            self.tasks.load(Ordering::Relaxed),
            self.shares.load(Ordering::Relaxed),
        );
        let mut start = self.next.load(Ordering::Relaxed);
        while start < tasks {
            let end = start + ((tasks - start) / shares).max(1);
            match self
                .next
                .compare_exchange_weak(start, end, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => {
                    (start..end).for_each(task);
                    start = self.next.load(Ordering::Relaxed);
                }
                Err(now) => start = now,
            }
        }
    }

    /// A worker's life.
    fn work(&self) {
        let mut done = 0;
        while let Some(state) = self.wait_for_region(done) {
            if self
                .state
                .compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            done = state >> NUMBER;
            // SAFETY: this worker is counted inside an open region, so `begin` does not write, and the closure
            // lives until `end` has seen it leave.
            let task = unsafe { (*self.task.get()).map(|task| &*task.0) };
            if let Some(task) = task
                && let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| self.claim(task)))
            {
                *self.panic() = Some(panic);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The state of an open region other than number `done`, or `None` at the end.
    fn wait_for_region(&self, done: u64) -> Option<u64> {
        let ready = || {
            let state = self.state.load(Ordering::SeqCst);
            (state & OPEN != 0 && state >> NUMBER != done).then_some(state)
        };
        let mut spins = 0;
        let mut since = None;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(state) = ready() {
                return Some(state);
            }
            pause(&mut spins);
            if spins < SPINS || since.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
                continue;
            }
            let guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.asleep.fetch_add(1, Ordering::SeqCst);
            // `begin` opens, then looks who sleeps; this says that it sleeps, then looks whether one is open.
            if ready().is_none() && !self.stop.load(Ordering::SeqCst) {
                drop(self.woken.wait(guard));
            }
            self.asleep.fetch_sub(1, Ordering::SeqCst);
            (spins, since) = (0, None);
        }
    }

    fn wake(&self) {
        drop(self.sleep.lock());
        self.woken.notify_all();
    }

    fn panic(&self) -> std::sync::MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits a moment: on the processor at first, then giving it away.
fn pause(spins: &mut u32) {
    if *spins < SPINS {
        *spins += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads);
            for tasks in (0..300).chain([100_000]) {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |index| {
                    runs[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn sleepers_are_woken() {
        let pool = ThreadPool::new(3);
        for _ in 0..20 {
            while pool.shared.asleep.load(Ordering::SeqCst) < 2 {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Ends only when all three threads are inside.
            let inside = AtomicUsize::new(0);
            pool.run(3, |_| {
                inside.fetch_add(1, Ordering::SeqCst);
                while inside.load(Ordering::SeqCst) < 3 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn regions_within_and_beside_others_are_run_by_their_callers() {
        let pool = ThreadPool::new(3);
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, |_| {
                            pool.run(7, |_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 200 * 5 * 7);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(3);
        for index in [0, 50, 99] {
            let run = || pool.run(100, |i| assert_ne!(i, index, "task"));
            assert!(panic::catch_unwind(AssertUnwindSafe(run)).is_err());
            let count = AtomicUsize::new(0);
            pool.run(100, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 100);
        }
    }
}
