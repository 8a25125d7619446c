//! How fast kernels read what they cannot do without, and what their first call costs.

mod cases;

use super::Check;
#[cfg(msl_host)]
use super::Status;
use super::runner::{DTYPES, Runner};
use crate::Result;
use crate::cpu::Expert;
use crate::cpu::roofline::read_bandwidth;
use crate::fp4::{Bytes, DenseTensor, Factor, FloatKind, Format, Fp4Tensor, Parts, Weight};
use crate::ops::{FusedMoe, GatedMlp, Linear};
use crate::random::Random;
use candle_core::{DType, Tensor};
use cases::{Case, cases};
use std::time::{Duration, Instant};

/// Weights that are read in turn, so that each comes from memory rather than from a cache: four of 34.6 MB.
const WEIGHTS: usize = 4;
const ROWS: usize = 16_384;
const COLUMNS: usize = 4_096;

/// Experts of GLM-4.7-Flash's shape: as many as four tokens choose, and a shared one.
const EXPERTS: usize = 16;
const TOP_K: usize = 4;
const WIDTH: usize = 1_536;
const HIDDEN: usize = 2_048;
/// The MLP of its first layer.
const MLP_WIDTH: usize = 10_240;
/// Experts that its routers choose among.
const CHOICES: usize = 64;

/// How long a measurement goes on, and how many samples it takes at most.
const TIME: Duration = Duration::from_millis(200);
const SAMPLES: usize = 9;

/// Bytes that calls in turn move at least if each is to find nothing in a cache.
const COLD: u64 = 64_000_000;

/// Weights to measure with, in MMFP4: random codes. An output head and a router in BF16.
pub(super) struct Data {
    weights: Vec<Weight>,
    moe: FusedMoe,
    mlps: Vec<GatedMlp>,
    head: Weight,
    gate: Weight,
}

impl Data {
    /// Some 360 MB.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) without memory.
    pub fn new() -> Result<Self> {
        let random = &mut Random::new(2);
        let experts = (0..EXPERTS)
            .map(|_| expert(random, WIDTH))
            .collect::<Result<_>>()?;
        Ok(Self {
            moe: FusedMoe::new(experts, vec![expert(random, WIDTH)?])?,
            mlps: (0..2)
                .map(|_| GatedMlp::new(expert(random, MLP_WIDTH)?))
                .collect::<Result<_>>()?,
            weights: (0..WEIGHTS)
                .map(|_| weight(random, ROWS, COLUMNS))
                .collect::<Result<_>>()?,
            head: dense(random, ROWS, HIDDEN)?,
            gate: dense(random, CHOICES, HIDDEN)?,
        })
    }
}

fn expert(random: &mut Random, width: usize) -> Result<Expert> {
    Ok(Expert {
        gate: weight(random, width, HIDDEN)?,
        up: weight(random, width, HIDDEN)?,
        down: weight(random, HIDDEN, width)?,
    })
}

/// In BF16, of numbers near 2⁻⁷.
fn dense(random: &mut Random, n: usize, k: usize) -> Result<Weight> {
    let bytes = Bytes::build(2 * n * k, |bytes| {
        random.fill(bytes);
        bytes.iter_mut().skip(1).step_by(2).for_each(|high| *high = 0x3c);
        Ok(())
    })?;
    Ok(DenseTensor::new("w", (n, k), FloatKind::BF16, bytes)?.into())
}

fn weight(random: &mut Random, n: usize, k: usize) -> Result<Weight> {
    let Format { group, kind } = Format::mmfp4();
    let codes = Bytes::build(n * k / 2, |bytes| {
        random.fill(bytes);
        Ok(())
    })?;
    // 2⁻⁶ in F16: sums stay of a size that every dtype holds.
    let scales = [0x00, 0x24].repeat(n * k / group);
    let parts = Parts {
        shape: (n, k),
        group,
        codes,
        scales: Bytes::copy_from(&scales)?,
        kind,
        factor: Factor::None,
    };
    Ok(Fp4Tensor::new("w", parts)?.into())
}

/// The very first call of a kernel, and later ones.
pub(super) fn first_call(runner: &Runner, add: &mut dyn FnMut(Check)) {
    if !runner.has_speed() {
        return;
    }
    let name = format!("{}: first call", runner.name());
    let measured = || -> Result<Times> {
        let op = Linear::new(weight(&mut Random::new(3), 256, 256)?, None)?;
        let x = Tensor::ones((1, 256), DType::F32, &runner.device())?;
        let call = || {
            op.forward(&x)?;
            Ok(())
        };
        let first = runner.latency(call)?;
        let later = (0..50).map(|_| runner.latency(call)).collect::<Result<_>>()?;
        Ok(Times {
            first,
            later: median(later),
            gpu: runner.gpu_time(call)?,
        })
    };
    add(match measured() {
        Ok(times) => {
            let found = format!(
                "{:.3} ms{}, later ones {:.3} ms{} (a product of 256 × 256)",
                milliseconds(times.first),
                if runner.is_cpu() { "" } else { " with compilation" },
                milliseconds(times.later),
                times.told_gpu(),
            );
            times.numbers(Check::ok(name, found))
        }
        Err(error) => Check::failed(name, &error, ""),
    });
}

/// What memory gives at best: what speeds are a share of.
struct Yardstick {
    /// Bytes a second.
    rate: f64,
    name: &'static str,
}

/// The bandwidth of each kind of kernel on tens of megabytes; of products of many rows, their operations a second.
pub(super) fn measure(runner: &Runner, data: &Data, add: &mut dyn FnMut(Check)) {
    #[cfg(msl_host)]
    if let Runner::Host(_) = runner {
        return compare_with_plans(data, add);
    }
    let best = yardstick(runner, data);
    let name = format!("{}: memory", runner.name());
    add(match &best {
        Ok(Yardstick { rate, name: way }) => {
            Check::ok(name, format!("{:.1} GB/s by {way}", rate / 1e9)).with("gb_per_s", rate / 1e9)
        }
        Err(error) => Check::failed(name, error, ""),
    });
    let best = best.ok();
    let dtypes: &[DType] = match runner.is_cpu() {
        true => &[DType::F32],
        false => &DTYPES,
    };
    for dtype in dtypes {
        let name = |case: &str| format!("{}: speed of {case}", runner.name());
        match cases(runner, data, *dtype) {
            Ok(cases) => {
                for case in cases {
                    let name = name(&case.name);
                    add(match run(runner, &case) {
                        Ok(times) => check(name, &case, times, best.as_ref()),
                        Err(error) => Check::failed(name, &error, ""),
                    });
                }
            }
            Err(error) => add(Check::failed(name("kernels"), &error, "")),
        }
    }
}

/// What speeds are a share of on this runner.
fn yardstick(runner: &Runner, data: &Data) -> Result<Yardstick> {
    match runner {
        // Plain loads by the threads that the kernels use.
        Runner::Cpu(executor) => {
            let regions: Vec<&[u8]> = data.weights.iter().flat_map(regions).collect();
            let rates = (0..5).map(|_| read_bandwidth(executor, &regions));
            Ok(Yardstick {
                rate: rates.fold(0.0, f64::max),
                name: "reading",
            })
        }
        #[cfg(any(msl_host, target_os = "macos"))]
        _ => copying(runner),
    }
}

/// Candle's copy, many times one after another, so that starting and waiting count for little.
#[cfg(any(msl_host, target_os = "macos"))]
fn copying(runner: &Runner) -> Result<Yardstick> {
    const COPIES: usize = 16;
    let len = COLD as usize;
    let from = Tensor::zeros(len, DType::U8, &runner.device())?;
    let copy = || {
        runner.latency(|| {
            (0..COPIES).try_for_each(|_| from.force_contiguous().map(drop))?;
            Ok(())
        })
    };
    copy()?;
    let times = (0..5).map(|_| copy()).collect::<Result<Vec<_>>>()?;
    let best = times.into_iter().min().unwrap_or_default();
    Ok(Yardstick {
        // Each byte is read and written.
        rate: (2 * COPIES * len) as f64 / best.as_secs_f64(),
        name: "copying",
    })
}

/// Without a GPU there is no speed, but what it would be taken from: the bytes and operations that are counted here are
/// those of the launch plans.
#[cfg(msl_host)]
fn compare_with_plans(data: &Data, add: &mut dyn FnMut(Check)) {
    use crate::metal::host::Host;
    use std::sync::Arc;
    let host = Arc::new(Host::recorder(false));
    let runner = Runner::Host(Arc::clone(&host));
    let name = |case: &str| format!("{}: work of {case}", runner.name());
    let cases = match cases(&runner, data, DType::F16) {
        Ok(cases) => cases,
        Err(error) => return add(Check::failed(name("kernels"), &error, "")),
    };
    for case in cases {
        let name = name(&case.name);
        if let Err(error) = runner.run(&case.calls[0]) {
            add(Check::failed(name, &error, ""));
            continue;
        }
        let plans = host.recorded();
        let launches = plans.iter().flat_map(|run| &run.plan.launches);
        // Of what computing is the limit for, operations count.
        let (counted, what) = match case.operations {
            Some(operations) => (operations, "operations"),
            None => (case.bytes, "bytes"),
        };
        let planned: u64 = launches
            .map(|launch| match case.operations {
                Some(_) => launch.work.operations,
                None => launch.work.weights + launch.work.read + launch.work.written,
            })
            .sum();
        let check = Check::ok(
            name,
            format!("{counted} {what} counted, {planned} in its launch plans"),
        )
        .with("counted", counted)
        .with("planned", planned);
        // What lies between two launches is a plan's own.
        add(match planned.abs_diff(counted) <= counted / 50 {
            true => check,
            false => check.but(
                Status::Wrong,
                "speeds would be wrong: correct doctor/speed/cases.rs",
            ),
        });
    }
}

fn regions(weight: &Weight) -> Vec<&[u8]> {
    weight.regions().map(|bytes| &bytes[..]).collect()
}

/// How long a call takes.
struct Times {
    /// The first, with all that it brings along, and a later one in the median: from starting it to knowing that it is done.
    first: Duration,
    later: Duration,
    /// By a GPU's own clock, without what starting and waiting costs.
    gpu: Option<Duration>,
}

impl Times {
    /// What a rate is taken from.
    fn of_work(&self) -> Duration {
        self.gpu.unwrap_or(self.later)
    }

    fn told_gpu(&self) -> String {
        self.gpu.map_or(String::new(), |gpu| {
            format!(", of which the GPU computes {:.3} ms", milliseconds(gpu))
        })
    }

    fn numbers(&self, check: Check) -> Check {
        let check = check
            .with("first_ms", milliseconds(self.first))
            .with("later_ms", milliseconds(self.later));
        match self.gpu {
            Some(gpu) => check.with("gpu_ms", milliseconds(gpu)),
            None => check,
        }
    }
}

fn run(runner: &Runner, case: &Case) -> Result<Times> {
    let first = runner.latency(&case.calls[0])?;
    let (start, mut later, mut gpu) = (Instant::now(), Vec::new(), Vec::new());
    while later.is_empty() || later.len() < SAMPLES && start.elapsed() < TIME {
        for call in &case.calls {
            later.push(runner.latency(call)?);
        }
        gpu.extend(runner.gpu_time(|| case.calls.iter().try_for_each(|call| call()))?);
    }
    let gpu = (!gpu.is_empty()).then(|| median(gpu) / case.calls.len() as u32);
    Ok(Times {
        first,
        later: median(later),
        gpu,
    })
}

fn check(name: String, case: &Case, times: Times, best: Option<&Yardstick>) -> Check {
    let seconds = times.of_work().as_secs_f64();
    let (rate, number, unit) = match case.operations {
        Some(operations) => (operations as f64 / seconds / 1e9, "gop_per_s", "GOP/s"),
        None => (case.bytes as f64 / seconds / 1e9, "gb_per_s", "GB/s"),
    };
    // What a cache holds is no share of what memory gives.
    let share = best
        .filter(|_| case.operations.is_none() && case.bytes * case.calls.len() as u64 >= COLD)
        .map(|best| (rate * 1e9 / best.rate, best.name));
    let found = format!(
        "{rate:.1} {unit}{}; {:.3} ms{}, the first call {:.3} ms",
        share.map_or(String::new(), |(share, name)| format!(
            ", {:.0} % of {name}",
            share * 100.0
        )),
        milliseconds(times.later),
        times.told_gpu(),
        milliseconds(times.first),
    );
    let check = times.numbers(Check::ok(name, found).with(number, rate));
    let check = match case.operations {
        Some(operations) => check.with("operations", operations),
        None => check.with("bytes", case.bytes),
    };
    match share {
        Some((share, _)) => check.with("share", share),
        None => check,
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Executor;

    fn case(operations: Option<u64>, bytes: u64) -> Case {
        Case {
            name: "x".into(),
            bytes,
            operations,
            calls: vec![Box::new(|| Ok(()))],
        }
    }

    fn found(case: Case, gpu: Option<Duration>) -> Check {
        let times = Times {
            first: Duration::from_millis(9),
            later: Duration::from_millis(8),
            gpu,
        };
        let best = Yardstick {
            rate: 20e9,
            name: "copying",
        };
        check("x".into(), &case, times, Some(&best))
    }

    fn near(check: &Check, name: &str, value: f64) {
        let found = check.numbers[name].value();
        assert!((found / value - 1.0).abs() < 1e-9, "{name}: {check:?}");
    }

    #[test]
    fn rates_follow_from_bytes_and_operations() {
        let check = found(case(None, 80_000_000), None);
        near(&check, "gb_per_s", 10.0);
        near(&check, "share", 0.5);
        near(&check, "first_ms", 9.0);
        near(&check, "later_ms", 8.0);
        assert!(check.found.contains("50 % of copying") && !check.numbers.contains_key("gpu_ms"));
        let check = found(case(Some(8_000_000_000), 80_000_000), None);
        near(&check, "gop_per_s", 1000.0);
        assert!(!check.numbers.contains_key("share") && !check.numbers.contains_key("gb_per_s"));
    }

    #[test]
    fn a_gpus_own_time_counts_where_there_is_one() {
        let check = found(case(None, 80_000_000), Some(Duration::from_millis(5)));
        near(&check, "gb_per_s", 16.0);
        near(&check, "later_ms", 8.0);
        near(&check, "gpu_ms", 5.0);
        assert!(
            check.found.contains("of which the GPU computes 5.000 ms"),
            "{check:?}"
        );
    }

    #[test]
    fn what_a_cache_holds_is_no_share_of_memory() {
        let check = found(case(None, 4_000_000), None);
        near(&check, "gb_per_s", 0.5);
        assert!(
            !check.numbers.contains_key("share") && !check.found.contains('%'),
            "{check:?}"
        );
    }

    #[test]
    fn every_kernel_is_measured() {
        let runner = Runner::Cpu(Executor::current().unwrap());
        let mut checks = Vec::new();
        measure(&runner, &Data::new().unwrap(), &mut |check| checks.push(check));
        assert_eq!(checks.len(), 14);
        for check in checks {
            let rate = check.numbers.get("gb_per_s").or(check.numbers.get("gop_per_s"));
            assert!(rate.is_some_and(|rate| rate.value() > 0.01), "{check:?}");
        }
    }
}
