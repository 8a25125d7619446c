//! Runs launch plans on Linux: the unmodified `.metal` files, compiled for the host, a thread of the kernel a fiber.
//!
//! A development feature, for x86-64 and a checkout of this project: it builds `metal/*.metal` with `tests/msl/mslc.py`
//! (Python 3) and clang 17 or newer (`MSL_CLANG`, else `clang++-19` down to `-17`, else `clang++`).

mod abi;
pub mod build;

use super::plan::{Binding, Constant, Launch, Plan};
use crate::{Error, Result};
use abi::Library;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

const OP: &str = "msl-host";

/// A plan's operand.
#[derive(Debug)]
pub enum Operand<'a> {
    /// Bytes that kernels read.
    Read(&'a [u8]),
    /// Bytes that kernels write, or read and write.
    Write(&'a mut [u8]),
}

impl Operand<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Read(bytes) => bytes.len(),
            Self::Write(bytes) => bytes.len(),
        }
    }

    fn recorded(&self, contents: bool) -> RecordedOperand {
        let bytes: &[u8] = match self {
            Self::Read(bytes) => bytes,
            Self::Write(bytes) => bytes,
        };
        RecordedOperand {
            len: bytes.len(),
            bytes: if contents { bytes.to_vec() } else { Vec::new() },
            misalignment: bytes.as_ptr().addr() % 16,
            address: bytes.as_ptr().addr(),
            written: matches!(self, Self::Write(_)),
        }
    }
}

/// The compiled kernels.
#[derive(Debug)]
pub struct Host {
    kernels: Kernels,
    seed: u64,
    /// How often each kernel was launched.
    launched: Mutex<BTreeMap<String, usize>>,
    /// Ops that the CPU's own kernels ran.
    without_kernel: Mutex<BTreeSet<&'static str>>,
}

#[derive(Debug)]
enum Kernels {
    Compiled(Library),
    /// Plans are kept instead of run.
    Recorded {
        runs: Mutex<Vec<Recorded>>,
        contents: bool,
    },
}

/// A plan that was to be run, and what with.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The plan.
    pub plan: Plan,
    /// Its operands.
    pub operands: Vec<RecordedOperand>,
}

/// An operand of a [`Recorded`] plan.
#[derive(Debug, Clone)]
pub struct RecordedOperand {
    /// How many bytes it has.
    pub len: usize,
    /// Those bytes, where they were to be kept; otherwise none.
    pub bytes: Vec<u8>,
    /// How far behind a multiple of 16 bytes it begins.
    pub misalignment: usize,
    /// Where it was in memory: which operands of a plan are the same bytes.
    pub address: usize,
    /// Whether kernels may write it.
    pub written: bool,
}

thread_local! {
    static INSTALLED: RefCell<Option<Arc<Host>>> = const { RefCell::new(None) };
}

static EVERYWHERE: OnceLock<Arc<Host>> = OnceLock::new();

impl Host {
    /// The kernels of this checkout, compiled once a process.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] as [`build::library`]: without Python, without a compiler, with its messages
    /// where a kernel does not compile.
    pub fn start() -> Result<Arc<Self>> {
        static GLOBAL: OnceLock<Arc<Host>> = OnceLock::new();
        if let Some(host) = GLOBAL.get() {
            return Ok(Arc::clone(host));
        }
        let host = Arc::new(Self::load(&build::library(&build::Options::default())?)?);
        Ok(Arc::clone(GLOBAL.get_or_init(|| host)))
    }

    /// The kernels of a library that [`build::library`] made.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be loaded.
    pub fn load(path: &std::path::Path) -> Result<Self> {
        Ok(Self::of(Kernels::Compiled(Library::open(path)?)))
    }

    /// A host that runs nothing: it keeps the plans, and the bytes of their operands where `contents` says so, for
    /// [`recorded`](Self::recorded). Outputs are NaN. It needs no compiler.
    pub fn recorder(contents: bool) -> Self {
        Self::of(Kernels::Recorded {
            runs: Mutex::default(),
            contents,
        })
    }

    fn of(kernels: Kernels) -> Self {
        Self {
            kernels,
            seed: 0,
            launched: Mutex::default(),
            without_kernel: Mutex::default(),
        }
    }

    /// How often each kernel was launched, or would have been, since this host was made.
    pub fn launched(&self) -> BTreeMap<String, usize> {
        held(&self.launched).clone()
    }

    /// Names of the ops that were called while this host stood in for the CPU's kernels, and that these ran all the same:
    /// no kernel takes their operands. What is computed then says nothing of the kernels here.
    pub fn without_kernel(&self) -> Vec<&'static str> {
        held(&self.without_kernel).iter().copied().collect()
    }

    /// Notes such an op; says whether it is the first of its name.
    pub(crate) fn runs_on_cpu(&self, op: &'static str) -> bool {
        held(&self.without_kernel).insert(op)
    }

    /// What a [recorder](Self::recorder) was given since the last call, in order.
    pub fn recorded(&self) -> Vec<Recorded> {
        match &self.kernels {
            Kernels::Compiled(_) => Vec::new(),
            Kernels::Recorded { runs, .. } => std::mem::take(&mut held(runs)),
        }
    }

    /// The same kernels in another schedule: 0 runs threads in order, any other seed in an order of its own.
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Names of the kernels.
    pub fn kernels(&self) -> Vec<String> {
        match &self.kernels {
            Kernels::Compiled(library) => library.kernels(),
            Kernels::Recorded { .. } => Vec::new(),
        }
    }

    /// Runs `f` with Metal kernels in place of the CPU's for ops called on this thread.
    pub fn install<R>(self: &Arc<Self>, f: impl FnOnce() -> R) -> R {
        struct Restore(Option<Arc<Host>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                INSTALLED.set(self.0.take());
            }
        }
        let _restore = Restore(INSTALLED.replace(Some(Arc::clone(self))));
        f()
    }

    /// Puts Metal kernels in place of the CPU's for all ops of this process, from now on.
    pub fn install_everywhere(self: Arc<Self>) {
        let _ = EVERYWHERE.set(self);
    }

    /// What is installed, [on this thread](Self::install) or [everywhere](Self::install_everywhere).
    pub fn current() -> Option<Arc<Self>> {
        INSTALLED
            .with_borrow(Clone::clone)
            .or_else(|| EVERYWHERE.get().cloned())
    }

    /// Runs a plan.
    ///
    /// # Errors
    /// [`Error::Argument`] for a binding that names no operand or leaves it, and with the executor's message for whatever
    /// it finds in a launch or in the kernel.
    pub fn run(&self, plan: &Plan, operands: &mut [Operand<'_>]) -> Result<()> {
        for launch in &plan.launches {
            *held(&self.launched).entry(launch.kernel.clone()).or_default() += 1;
        }
        match &self.kernels {
            Kernels::Compiled(library) => plan
                .launches
                .iter()
                .try_for_each(|launch| self.launch(library, launch, operands)),
            Kernels::Recorded { runs, contents } => {
                let operands = operands
                    .iter()
                    .map(|operand| operand.recorded(*contents))
                    .collect();
                let plan = plan.clone();
                held(runs).push(Recorded { plan, operands });
                Ok(())
            }
        }
    }

    fn launch(&self, library: &Library, launch: &Launch, operands: &mut [Operand<'_>]) -> Result<()> {
        let refuse = |found: String| {
            let expected = format!("a launch of {} that fits", launch.kernel);
            Err(Error::argument(OP, "plan", expected, found))
        };
        let mut bindings = Vec::with_capacity(launch.bindings.len());
        for (index, binding) in &launch.bindings {
            let (kind, pointer, size) = match binding {
                Binding::Bytes(bytes) => (abi::BYTES, bytes.as_ptr().cast_mut(), bytes.len()),
                Binding::Read { operand, offset } | Binding::Write { operand, offset } => {
                    let Some(found) = operands.get_mut(*operand) else {
                        return refuse(format!("no operand {operand} for buffer {index}"));
                    };
                    let len = found.len();
                    if *offset > len {
                        return refuse(format!("buffer {index} from byte {offset} of {len}"));
                    }
                    let (kind, start) = match (binding, found) {
                        (Binding::Write { .. }, Operand::Write(bytes)) => (abi::WRITE, bytes.as_mut_ptr()),
                        (Binding::Write { .. }, Operand::Read(_)) => {
                            return refuse(format!(
                                "buffer {index} would write an operand that is only read"
                            ));
                        }
                        (_, Operand::Write(bytes)) => (abi::READ, bytes.as_mut_ptr()),
                        (_, Operand::Read(bytes)) => (abi::READ, bytes.as_ptr().cast_mut()),
                    };
                    (kind, start.wrapping_add(*offset), len - offset)
                }
            };
            bindings.push(abi::Binding {
                index: *index as u32,
                kind,
                pointer: pointer.cast(),
                size: size as u64,
            });
        }
        let constants: Vec<_> = launch
            .constants
            .iter()
            .map(|(index, constant)| {
                let mut value = [0; 8];
                let size = match constant {
                    Constant::Bool(on) => {
                        value[0] = u8::from(*on);
                        1
                    }
                    Constant::U16(number) => {
                        value[..2].copy_from_slice(&number.to_ne_bytes());
                        2
                    }
                };
                abi::Constant {
                    index: u32::from(*index),
                    size,
                    value,
                }
            })
            .collect();
        let of = |sizes: [usize; 3]| sizes.map(|size| size as u32);
        library
            .run(
                &launch.kernel,
                &constants,
                &bindings,
                of(launch.threadgroups),
                of(launch.threads),
                self.seed,
            )
            .or_else(refuse)
    }
}

/// What a lock holds, whatever became of those who held it: each change of it is whole.
fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp4::{Bytes, DenseTensor, FloatKind, Int8Tensor, Weight};
    use crate::ops::Linear;
    use candle_core::{DType, Device, Tensor};

    #[test]
    fn what_the_cpu_runs_in_a_hosts_place_is_told() {
        let host = Arc::new(Host::recorder(false));
        let zeros = Bytes::copy_from(&[0; 2 * 128]).unwrap();
        let dense = DenseTensor::new("w", (1, 128), FloatKind::BF16, zeros).unwrap();
        let int8 = Int8Tensor::round("w", &dense).unwrap();
        let run = |weight| {
            let x = Tensor::ones((1, 128), DType::F32, &Device::Cpu).unwrap();
            host.install(|| Linear::new(weight, None).unwrap().forward(&x).unwrap());
            (host.launched(), host.without_kernel())
        };
        let launched = BTreeMap::from([("dense_rows_f32_thin".to_string(), 1)]);
        assert_eq!(run(Weight::Dense(dense)), (launched.clone(), Vec::new()));
        assert_eq!(run(Weight::Int8(int8)), (launched, vec!["mmfp4-linear"]));
    }
}
