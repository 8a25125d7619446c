//! What the kernels run on: which instructions, how many threads.

use super::pool::ThreadPool;
use super::simd::{Kernels, Order};
use crate::{Error, Result};
use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

/// A set of instructions that kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, for any processor.
    Reference,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX2, FMA and AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX-512 (F, BW, VL) and VNNI.
    Avx512,
    /// The same with BF16 dot products, which attention over a paged cache uses.
    Avx512Bf16,
    /// AArch64 with NEON and the dot product instructions.
    Neon,
    /// AArch64 with NEON, dot product and 8-bit matrix product instructions.
    I8mm,
}

impl Isa {
    /// All of them, the better ones of an architecture later.
    pub const ALL: [Self; 7] = [
        Self::Reference,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Neon,
        Self::I8mm,
    ];

    /// Its name in `MMFP4_CPU`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Neon => "neon",
            Self::I8mm => "i8mm",
        }
    }

    /// Those that this machine can run, the best one last.
    pub fn available() -> Vec<Self> {
        let runs = |isa: &Self| Kernels::of(*isa).is_some();
        Self::ALL.into_iter().filter(runs).collect()
    }
}

/// Instructions and threads for kernels.
///
/// Programs need none of their own: ops use [`Executor::current`], which is made of `MMFP4_CPU` (the name of an
/// [`Isa`]; by default the best that the machine has) and `MMFP4_THREADS` (by default a thread a physical core).
/// To choose in code:
///
/// ```
/// use candle_mmfp4::cpu::{Executor, Isa};
///
/// let one_plain_thread = Executor::new(Isa::Reference, 1)?;
/// one_plain_thread.install(|| {
///     // ops called here run on it
///     assert_eq!(Executor::current().unwrap().isa(), Isa::Reference);
/// });
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug)]
pub struct Executor {
    isa: Isa,
    kernels: &'static Kernels,
    pool: Arc<ThreadPool>,
    order: Order,
}

thread_local! {
    static INSTALLED: RefCell<Option<Arc<Executor>>> = const { RefCell::new(None) };
}

static GLOBAL: OnceLock<Arc<Executor>> = OnceLock::new();

impl Executor {
    /// An executor with threads of its own.
    ///
    /// # Errors
    /// [`Error::Argument`] for instructions that this machine lacks, or no threads.
    pub fn new(isa: Isa, threads: usize) -> Result<Arc<Self>> {
        let Some(kernels) = Kernels::of(isa) else {
            return Err(unavailable("isa", isa.name()));
        };
        if threads == 0 {
            return Err(Error::argument("cpu", "threads", "at least 1", "0"));
        }
        Ok(Arc::new(Self {
            isa,
            kernels,
            pool: Arc::new(ThreadPool::new(threads)),
            order: Order::Fastest,
        }))
    }

    /// The same instructions and threads, with one order of sums for any number of rows: a row of activations gives the
    /// same bits alone and among many.
    ///
    /// It is the order of many rows: with it a few of them, as of a decoded token, take longer.
    pub fn uniform(&self) -> Arc<Self> {
        Arc::new(Self {
            isa: self.isa,
            kernels: self.kernels,
            pool: Arc::clone(&self.pool),
            order: Order::Uniform,
        })
    }

    /// What ops called on this thread run on: what is [installed](Self::install), or the process's own, which
    /// is made at the first call.
    ///
    /// # Errors
    /// [`Error::Argument`] where `MMFP4_CPU` or `MMFP4_THREADS` says something that cannot be.
    pub fn current() -> Result<Arc<Self>> {
        if let Some(installed) = INSTALLED.with_borrow(Clone::clone) {
            return Ok(installed);
        }
        if let Some(global) = GLOBAL.get() {
            return Ok(Arc::clone(global));
        }
        Self::start(None)
    }

    /// Makes the process's own executor with so many threads (`None`: as `MMFP4_THREADS` or the machine says),
    /// unless it was made already.
    ///
    /// # Errors
    /// As [`current`](Self::current); `threads` of 0.
    pub fn start(threads: Option<usize>) -> Result<Arc<Self>> {
        let threads = match threads {
            Some(threads) => threads,
            None => threads_by_environment()?,
        };
        let new = Self::new(isa_by_environment()?, threads)?;
        Ok(Arc::clone(GLOBAL.get_or_init(|| new)))
    }

    /// Runs `f` with this executor for all ops called on this thread.
    pub fn install<R>(self: &Arc<Self>, f: impl FnOnce() -> R) -> R {
        struct Restore(Option<Arc<Executor>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                INSTALLED.set(self.0.take());
            }
        }
        let _restore = Restore(INSTALLED.replace(Some(Arc::clone(self))));
        f()
    }

    /// The instructions.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads that take part in a kernel.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs `task` once for each number below `tasks`, on all threads.
    pub(crate) fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        self.pool.run(tasks, task);
    }

    pub(super) fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    pub(super) fn order(&self) -> Order {
        self.order
    }
}

fn isa_by_environment() -> Result<Isa> {
    let best = *Isa::available().last().unwrap_or(&Isa::Reference);
    let Some(name) = std::env::var_os("MMFP4_CPU") else {
        return Ok(best);
    };
    let named = Isa::available().into_iter().find(|isa| name == isa.name());
    named.ok_or_else(|| unavailable("MMFP4_CPU", &name.to_string_lossy()))
}

fn unavailable(argument: &'static str, found: &str) -> Error {
    let names: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
    let expected = format!("one of {}, which this machine can run", names.join(", "));
    Error::argument("cpu", argument, expected, format!("`{found}`"))
}

fn threads_by_environment() -> Result<usize> {
    let Some(text) = std::env::var_os("MMFP4_THREADS") else {
        let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
        // Two threads on one core share what limits them.
        return Ok(num_cpus::get_physical().clamp(1, allowed));
    };
    let threads = text.to_str().and_then(|text| text.parse().ok());
    threads.filter(|threads| *threads > 0).ok_or_else(|| {
        let found = format!("`{}`", text.to_string_lossy());
        Error::argument("cpu", "MMFP4_THREADS", "a number of threads, at least 1", found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let missing = Isa::ALL.into_iter().find(|isa| !Isa::available().contains(isa));
        let error = Executor::new(missing.unwrap(), 1).unwrap_err().to_string();
        assert!(
            error.contains(missing.unwrap().name()) && error.contains("reference"),
            "{error}"
        );
        assert!(Executor::new(Isa::Reference, 0).is_err());
    }

    #[test]
    fn what_is_installed_is_current_and_then_no_more() {
        let outer = Executor::new(Isa::Reference, 1).unwrap();
        let inner = Executor::new(Isa::Reference, 2).unwrap();
        let threads = || Executor::current().unwrap().threads();
        outer.install(|| {
            assert_eq!(inner.install(threads), 2);
            let panics = std::panic::AssertUnwindSafe(|| inner.install(|| panic!()));
            assert!(std::panic::catch_unwind(panics).is_err());
            assert_eq!(threads(), 1);
        });
        assert!(INSTALLED.with_borrow(Option::is_none));
    }
}
