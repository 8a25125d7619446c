//! What runs the kernels that are examined: the CPU's by an executor, Metal's on a GPU or, for developers, on the host.

use super::{Check, Gpu, Options, Status};
use crate::cpu::{Arithmetic, Executor};
use crate::fp4::{Format, ScaleKind};
use crate::metal::plan::Launch;
use crate::{Error, Place, Result, metal};
use candle_core::{DType, Device};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
        // One of its own, that no other thread launches anything on.
        Place::MslHost => {
            use metal::host::{Host, build};
            let library = build::library(&build::Options::default())?;
            Ok(Runner::Host(Arc::new(Host::load(&library)?)))
        }
        #[cfg(target_os = "macos")]
        Place::Auto | Place::Metal => match metal::device::open(0)? {
            Device::Metal(device) => Ok(Runner::Gpu(device)),
            _ => Ok(Runner::Cpu(Executor::current()?)),
        },
        // No such place here: opening it says why.
        other => other.open().and_then(|_| Ok(Runner::Cpu(Executor::current()?))),
    }
}

/// That Metal kernels cannot be run at all, and what to do.
pub(super) fn refused(place: Place, error: &Error) -> Check {
    match place {
        Place::MslHost => Check::failed("msl-host", error, "compute on the CPU: --device cpu"),
        _ => Check::failed(
            "GPU",
            error,
            "compute on the CPU: --device cpu; a GPU's kernels need a Mac with M1 or later and macOS 15 or newer, and a \
             session that sees the GPU (not every remote one does)",
        ),
    }
}

/// What ran in place of what: counts up to a moment.
#[cfg_attr(not(msl_host), allow(dead_code, reason = "nothing else counts"))]
pub(super) struct Launches {
    count: usize,
    without_kernel: Vec<&'static str>,
}

impl Launches {
    /// How many launches there were since another moment; an error says where there were none, or the CPU ran an op.
    pub fn since(&self, before: &Self) -> std::result::Result<usize, String> {
        let new = |op: &&&str| !before.without_kernel.contains(op);
        let without: Vec<_> = self.without_kernel.iter().filter(new).copied().collect();
        if !without.is_empty() {
            return Err(format!("no kernel ran {}: the CPU did", without.join(", ")));
        }
        match self.count - before.count {
            0 => Err("no kernel ran".into()),
            count => Ok(count),
        }
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

    /// How long ops take by a GPU's own clock, without what starting and waiting costs; `None` where there is no GPU.
    pub fn gpu_time(&self, ops: impl FnOnce() -> Result<()>) -> Result<Option<Duration>> {
        match self {
            #[cfg(target_os = "macos")]
            Self::Gpu(device) => {
                device.wait_until_completed()?;
                let mut timestamps = metal::device::Timestamps::start();
                ops()?;
                Ok(Some(timestamps.take()))
            }
            _ => {
                let _ = ops;
                Ok(None)
            }
        }
    }

    /// What was launched so far; `None` where that is not counted: the CPU's own kernels, and a GPU, on which an op without
    /// a kernel is an error.
    pub fn launches(&self) -> Option<Launches> {
        match self {
            #[cfg(msl_host)]
            Self::Host(host) => Some(Launches {
                count: host.launched().values().sum(),
                without_kernel: host.without_kernel(),
            }),
            _ => None,
        }
    }
}

/// Tells what a GPU is.
pub(super) fn describe(runner: &Runner, options: &Options, add: &mut dyn FnMut(Check)) -> Option<Gpu> {
    match runner {
        #[cfg(target_os = "macos")]
        Runner::Gpu(device) => Some(super::gpu::describe(device, options, add)),
        _ => {
            let found = "no GPU: Metal kernels, compiled for the CPU, for developers; they say nothing of a GPU's speed";
            add(Check::ok(runner.name(), found));
            let _ = options;
            None
        }
    }
}

/// Formats that kernels are compiled for: each kind of scales.
fn compiled_formats() -> impl Iterator<Item = Format> {
    let with_bf16 = Format {
        group: 64,
        kind: ScaleKind::BF16,
    };
    FORMATS.into_iter().chain([with_bf16])
}

/// Every kernel in all its variants, by name and constants.
///
/// # Errors
/// None that these formats and dtypes could cause.
pub(super) fn variants() -> Result<BTreeMap<String, Launch>> {
    let mut variants = BTreeMap::new();
    for format in compiled_formats() {
        for dtype in DTYPES {
            let plans = metal::every_kernel(format, dtype)?;
            let launches = plans.into_iter().flat_map(|plan| plan.launches);
            variants
                .extend(launches.map(|launch| (format!("{} {:?}", launch.kernel, launch.constants), launch)));
        }
    }
    Ok(variants)
}

/// How many failures are told in full.
const TOLD: usize = 8;

/// Compiles every kernel, for all formats and dtypes; goes on where one does not compile.
pub(super) fn compile(runner: &Runner, add: &mut dyn FnMut(Check)) {
    let name = format!("{}: compiling", runner.name());
    let advice = "please report it; meanwhile compute on the CPU: --device cpu";
    let variants = match variants() {
        Ok(variants) => variants,
        Err(error) => return add(Check::failed(name, &error, advice)),
    };
    let (mut failures, mut slowest) = (Vec::new(), (Duration::ZERO, ""));
    let start = Instant::now();
    for (variant, launch) in &variants {
        let one = Instant::now();
        if let Err(error) = compile_one(runner, launch) {
            failures.push(error.to_string());
        }
        slowest = slowest.max((one.elapsed(), variant.as_str()));
    }
    let (total, (longest, which)) = (start.elapsed().as_secs_f64(), slowest);
    let count = variants.len();
    let check = if failures.is_empty() {
        let found = match runner.has_speed() {
            true => format!(
                "{count} variants in {total:.1} s, the slowest {:.0} ms: {which}",
                longest.as_secs_f64() * 1e3
            ),
            // They were compiled beforehand, all together.
            false => format!("{count} variants"),
        };
        Check::ok(name, found)
    } else {
        let more = match failures.len().saturating_sub(TOLD) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        let told = &failures[..failures.len().min(TOLD)];
        let found = format!(
            "{} of {count} variants fail: {}{more}",
            failures.len(),
            told.join("; ")
        );
        Check::ok(name, found)
            .but(Status::Wrong, advice)
            .with("failed", failures.len())
    };
    let check = check.with("variants", count);
    add(match runner.has_speed() {
        true => check
            .with("seconds", total)
            .with("slowest_ms", longest.as_secs_f64() * 1e3),
        false => check,
    });
}

/// Makes the pipeline of a launch.
fn compile_one(runner: &Runner, launch: &Launch) -> Result<()> {
    match runner {
        #[cfg(target_os = "macos")]
        Runner::Gpu(device) => metal::device::compile(device, launch),
        #[cfg(msl_host)]
        Runner::Host(host) => match host.kernels().contains(&launch.kernel) {
            true => Ok(()),
            false => {
                let found = format!("no {}", launch.kernel);
                Err(Error::argument(
                    "msl-host",
                    "kernels",
                    "a kernel of every plan",
                    found,
                ))
            }
        },
        Runner::Cpu(_) => {
            let _ = launch;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_op_that_the_cpu_ran_is_no_kernel() {
        let at = |count, without_kernel: &[&'static str]| Launches {
            count,
            without_kernel: without_kernel.into(),
        };
        let before = at(3, &["a"]);
        assert_eq!(at(5, &["a"]).since(&before), Ok(2));
        let none = at(3, &["a"]).since(&before).unwrap_err();
        assert_eq!(none, "no kernel ran");
        let some = at(5, &["a", "b"]).since(&before).unwrap_err();
        assert_eq!(some, "no kernel ran b: the CPU did");
    }

    #[test]
    fn every_kind_of_weight_and_of_pairs_is_compiled() {
        let variants = variants().unwrap();
        let some = |part: &str| variants.keys().any(|variant| variant.contains(part));
        for kind in 0..4 {
            assert!(some(&format!("moe_down_f16 [(0, U16({kind}))")), "scales {kind}");
        }
        for kind in 0..3 {
            assert!(
                some(&format!("dense_tiles_bf16 [(24, U16({kind}))")),
                "floats {kind}"
            );
        }
        for interleaved in [true, false] {
            assert!(some(&format!("rope_f32 [(17, Bool({interleaved}))")));
        }
    }
}
