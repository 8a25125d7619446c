//! What runs the kernels that are examined: the CPU's by an executor, Metal's on a GPU or, for developers, on the host.

use super::{Check, Options};
use crate::cpu::{Arithmetic, Executor};
use crate::fp4::Format;
use crate::{Place, Result, metal};
use candle_core::{DType, Device};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What to do where Metal kernels cannot be run at all.
pub(super) const ADVICE: &str = "compute on the CPU: --device cpu; a GPU's kernels need a Mac with M1 or later and \
                                 macOS 15 or newer, and a session that sees the GPU (not every remote one does)";

/// Formats that the kernels are tried with.
pub(super) const FORMATS: [Format; 3] = [Format::mmfp4(), Format::mxfp4(), Format::nvfp4()];

/// Dtypes of activations.
pub(super) const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Something that runs ops.
pub(super) enum Runner {
    Cpu(Arc<Executor>),
    #[cfg(msl_host)]
    Host(Arc<metal::host::Host>),
    #[cfg(target_os = "macos")]
    Gpu(candle_core::MetalDevice),
}

/// The runner of Metal kernels.
pub(super) fn of_place(place: Place) -> Result<Runner> {
    match place {
        #[cfg(msl_host)]
        // Not everywhere: the CPU's kernels are still to be had.
        Place::MslHost => Ok(Runner::Host(metal::host::Host::start()?)),
        #[cfg(target_os = "macos")]
        Place::Auto | Place::Metal => match metal::device::open(0)? {
            Device::Metal(device) => Ok(Runner::Gpu(device)),
            _ => Ok(Runner::Cpu(Executor::current()?)),
        },
        // No such place here: opening it says why.
        other => other.open().and_then(|_| Ok(Runner::Cpu(Executor::current()?))),
    }
}

impl Runner {
    /// What its checks are called.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu(executor) => format!("CPU {}", executor.isa().name()),
            #[cfg(msl_host)]
            Self::Host(_) => "Metal on the host".into(),
            #[cfg(target_os = "macos")]
            Self::Gpu(_) => "Metal".into(),
        }
    }

    /// Where tensors are.
    pub fn device(&self) -> Device {
        match self {
            #[cfg(target_os = "macos")]
            Self::Gpu(device) => Device::Metal(device.clone()),
            _ => Device::Cpu,
        }
    }

    /// Whether these are the CPU's own kernels.
    pub fn is_cpu(&self) -> bool {
        matches!(self, Self::Cpu(_))
    }

    /// Arithmetics that its kernels have.
    pub fn arithmetics(&self) -> &'static [Arithmetic] {
        match self {
            Self::Cpu(_) => &[Arithmetic::W4A8, Arithmetic::Exact],
            #[cfg(any(msl_host, target_os = "macos"))]
            _ => &[Arithmetic::Exact],
        }
    }

    /// Whether its speed says anything.
    pub fn has_speed(&self) -> bool {
        match self {
            #[cfg(msl_host)]
            Self::Host(_) => false,
            _ => true,
        }
    }

    /// Runs ops of tensors of [`device`](Self::device).
    pub fn run<T>(&self, ops: impl FnOnce() -> T) -> T {
        match self {
            Self::Cpu(executor) => executor.install(ops),
            #[cfg(msl_host)]
            Self::Host(host) => host.install(ops),
            #[cfg(target_os = "macos")]
            Self::Gpu(_) => ops(),
        }
    }

    /// How long ops take until they are done, by the host's clock.
    pub fn latency(&self, ops: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.run(|| {
            let start = Instant::now();
            ops()?;
            self.device().synchronize()?;
            Ok(start.elapsed())
        })
    }

    /// How long ops take: on a GPU by its timestamps, without what starting and waiting costs.
    pub fn time(&self, ops: impl FnOnce() -> Result<()>) -> Result<Duration> {
        match self {
            #[cfg(target_os = "macos")]
            Self::Gpu(device) => {
                device.wait_until_completed()?;
                let mut timestamps = metal::device::Timestamps::start();
                ops()?;
                Ok(timestamps.take())
            }
            _ => self.latency(ops),
        }
    }
}

/// What a GPU is.
pub(super) fn describe(runner: &Runner, options: &Options, add: &mut dyn FnMut(Check)) {
    match runner {
        #[cfg(target_os = "macos")]
        Runner::Gpu(device) => super::gpu::describe(device, options, add),
        _ => {
            let found = "no GPU: Metal kernels, compiled for the CPU, for developers; they say nothing of a GPU's speed";
            add(Check::ok(runner.name(), found));
            let _ = options;
        }
    }
}

/// Compiles every kernel, for all formats and dtypes.
pub(super) fn compile(runner: &Runner, add: &mut dyn FnMut(Check)) {
    let name = format!("{}: compiling", runner.name());
    let start = Instant::now();
    let mut variants = BTreeSet::new();
    for format in FORMATS {
        for dtype in DTYPES {
            let plans = match metal::every_kernel(format, dtype) {
                Ok(plans) => plans,
                Err(error) => return add(Check::failed(name, &error, "")),
            };
            for launch in plans.iter().flat_map(|plan| &plan.launches) {
                variants.insert(format!("{} {:?}", launch.kernel, launch.constants));
            }
            if let Err(error) = compile_one(runner, format, dtype, &variants) {
                let advice = "please report it; meanwhile compute on the CPU: --device cpu";
                return add(Check::failed(name, &error, advice));
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let check = Check::ok(name, format!("{} variants in {seconds:.1} s", variants.len()));
    add(check
        .with("variants", variants.len() as f64)
        .with("seconds", seconds));
}

fn compile_one(runner: &Runner, format: Format, dtype: DType, variants: &BTreeSet<String>) -> Result<()> {
    let _ = (format, dtype, variants);
    match runner {
        Runner::Cpu(_) => Ok(()),
        #[cfg(msl_host)]
        Runner::Host(host) => {
            let compiled: BTreeSet<_> = host.kernels().into_iter().collect();
            let missing = variants
                .iter()
                .filter_map(|variant| variant.split(' ').next())
                .find(|kernel| !compiled.contains(*kernel));
            missing.map_or(Ok(()), |kernel| {
                let expected = "a kernel of every plan";
                Err(crate::Error::argument(
                    "msl-host",
                    "kernels",
                    expected,
                    format!("no {kernel}"),
                ))
            })
        }
        #[cfg(target_os = "macos")]
        Runner::Gpu(device) => metal::device::warm_up(device, format, dtype),
    }
}
