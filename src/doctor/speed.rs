//! How fast kernels read what they cannot do without, and what their first call costs.

use super::Check;
#[cfg(msl_host)]
use super::Status;
use super::runner::Runner;
use crate::Result;
use crate::cpu::roofline::read_bandwidth;
use crate::cpu::{Expert, HeadRows};
use crate::fp4::{Bytes, Factor, Format, Fp4Tensor, Parts, Weight};
use crate::ops::{FusedMoe, Linear, Orientation, PerHead, RmsNorm};
use crate::random::Random;
use candle_core::{DType, Device, Tensor};
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

/// How long a measurement goes on, and how many samples it takes at most.
const TIME: Duration = Duration::from_millis(300);
const SAMPLES: usize = 9;

/// Weights to measure with, in MMFP4: random codes.
pub(super) struct Data {
    weights: Vec<Weight>,
    experts: Vec<Expert>,
    shared: Expert,
}

impl Data {
    /// Some 220 MB.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) without memory.
    pub fn new() -> Result<Self> {
        let mut random = Random::new(2);
        let mut weight = |n, k| weight(&mut random, n, k);
        let mut expert = || -> Result<_> {
            Ok(Expert {
                gate: weight(WIDTH, HIDDEN)?,
                up: weight(WIDTH, HIDDEN)?,
                down: weight(HIDDEN, WIDTH)?,
            })
        };
        Ok(Self {
            experts: (0..EXPERTS).map(|_| expert()).collect::<Result<_>>()?,
            shared: expert()?,
            weights: (0..WEIGHTS)
                .map(|_| weight(ROWS, COLUMNS))
                .collect::<Result<_>>()?,
        })
    }
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

/// One thing that is measured: calls in turn, of which each moves or computes as much as every other.
struct Case {
    name: String,
    /// Bytes that a call cannot do without: weights, activations and outputs, each once.
    bytes: u64,
    /// Multiplications and additions, where these are the limit rather than the bytes.
    operations: Option<u64>,
    #[allow(clippy::type_complexity, reason = "a list of calls")]
    calls: Vec<Box<dyn Fn() -> Result<()>>>,
}

/// The very first call of a kernel, and later ones.
pub(super) fn first_call(runner: &Runner, add: &mut dyn FnMut(Check)) {
    if !runner.has_speed() {
        return;
    }
    let name = format!("{}: first call", runner.name());
    let measured = || -> Result<(f64, f64)> {
        let op = Linear::new(weight(&mut Random::new(3), 256, 256)?, None)?;
        let x = Tensor::ones((1, 256), DType::F32, &runner.device())?;
        let call = || {
            runner.latency(|| {
                op.forward(&x)?;
                Ok(())
            })
        };
        let first = call()?;
        let later = (0..50).map(|_| call()).collect::<Result<Vec<_>>>()?;
        Ok((milliseconds(first), milliseconds(median(later))))
    };
    add(match measured() {
        Ok((first, later)) => Check::ok(
            name,
            format!("{first:.3} ms, later ones {later:.3} ms (a product of 256 × 256)"),
        )
        .with("first_ms", first)
        .with("later_ms", later),
        Err(error) => Check::failed(name, &error, ""),
    });
}

/// The bandwidth of each kind of kernel on tens of megabytes; of products of many rows, their operations a second.
pub(super) fn measure(runner: &Runner, data: &Data, add: &mut dyn FnMut(Check)) {
    #[cfg(msl_host)]
    if let Runner::Host(_) = runner {
        return compare_with_plans(data, add);
    }
    let reading = match runner {
        Runner::Cpu(executor) => {
            let regions: Vec<&[u8]> = data.weights.iter().flat_map(regions).collect();
            let rate = (0..5)
                .map(|_| read_bandwidth(executor, &regions))
                .fold(0.0, f64::max);
            let name = format!("{}: reading memory", runner.name());
            add(Check::ok(name, format!("{:.1} GB/s", rate / 1e9)).with("gb_per_s", rate / 1e9));
            Some(rate)
        }
        #[cfg(any(msl_host, target_os = "macos"))]
        _ => None,
    };
    let dtypes: &[DType] = match runner.is_cpu() {
        true => &[DType::F32],
        false => &[DType::F32, DType::F16],
    };
    for dtype in dtypes {
        let name = |case: &str| format!("{}: speed of {case}", runner.name());
        match cases(runner, data, *dtype) {
            Ok(cases) => {
                for case in cases {
                    let name = name(&case.name);
                    add(match run(runner, &case) {
                        Ok(times) => check(name, &case, times, reading),
                        Err(error) => Check::failed(name, &error, ""),
                    });
                }
            }
            Err(error) => add(Check::failed(name("kernels"), &error, "")),
        }
    }
}

/// Without a GPU there is no speed, but what it would be taken from: the bytes that are counted here are those of the
/// launch plans.
#[cfg(msl_host)]
fn compare_with_plans(data: &Data, add: &mut dyn FnMut(Check)) {
    use crate::metal::host::Host;
    use std::sync::Arc;
    let host = Arc::new(Host::recorder(false));
    let runner = Runner::Host(Arc::clone(&host));
    let name = |case: &str| format!("{}: bytes of {case}", runner.name());
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
        let planned: u64 = launches
            .map(|launch| launch.work.weights + launch.work.read + launch.work.written)
            .sum();
        if planned == 0 {
            // The CPU ran it: there is no kernel.
            continue;
        }
        let check = Check::ok(
            name,
            format!("{} counted, {planned} in its launch plans", case.bytes),
        )
        .with("bytes", case.bytes as f64)
        .with("planned_bytes", planned as f64);
        // What lies between two launches is a plan's own.
        add(match planned.abs_diff(case.bytes) <= case.bytes / 50 {
            true => check,
            false => check.but(Status::Wrong, "speeds would be wrong: correct doctor/speed.rs"),
        });
    }
}

fn regions(weight: &Weight) -> Vec<&[u8]> {
    weight.regions().map(|bytes| &bytes[..]).collect()
}

fn cases(runner: &Runner, data: &Data, dtype: DType) -> Result<Vec<Case>> {
    let device = runner.device();
    let noise = |dims: &[usize]| -> Result<Tensor> {
        let mut random = Random::new(4);
        let len: usize = dims.iter().product();
        let values: Vec<_> = (0..len).map(|_| (random.uniform() - 0.5) as f32).collect();
        let x = Tensor::from_vec(values, dims, &Device::Cpu)?;
        Ok(x.to_dtype(dtype)?.to_device(&device)?)
    };
    let suffix = match runner.is_cpu() {
        true => String::new(),
        false => format!(", {dtype:?}"),
    };
    let activations = |elements: usize| (elements * dtype.size_in_bytes()) as u64;
    let of_weight = data.weights[0].size_in_bytes() as u64;
    let mut cases = Vec::new();

    let x = noise(&[1, COLUMNS])?;
    cases.push(Case {
        name: format!("linear, 1 row{suffix}"),
        bytes: of_weight + activations(COLUMNS + ROWS),
        operations: None,
        calls: calls(&data.weights, |weight| {
            let (op, x) = (Linear::new(weight.clone(), None)?, x.clone());
            Ok(move || op.forward(&x))
        })?,
    });

    let heads = 64;
    let len = ROWS / heads;
    let rows = HeadRows {
        heads,
        stride: len,
        start: 0,
        len,
    };
    for (orientation, from, to) in [
        (Orientation::Ordinary, COLUMNS, len),
        (Orientation::Transposed, len, COLUMNS),
    ] {
        let x = noise(&[1, heads, from])?;
        let name = match orientation {
            Orientation::Ordinary => "per head",
            Orientation::Transposed => "per head, transposed",
        };
        cases.push(Case {
            name: format!("{name}{suffix}"),
            bytes: of_weight + activations(heads * (from + to)),
            operations: None,
            calls: calls(&data.weights, |weight| {
                let (op, x) = (PerHead::new(weight.clone(), rows, orientation)?, x.clone());
                Ok(move || op.forward(&x))
            })?,
        });
    }

    let moe = FusedMoe::new(data.experts.clone(), vec![data.shared.clone()])?;
    let x = noise(&[1, HIDDEN])?;
    let weights = Tensor::full(0.25f32, (1, TOP_K), &device)?;
    let of_expert = data.shared.size_in_bytes() as u64;
    let tokens: Vec<_> = (0..EXPERTS / TOP_K).collect();
    cases.push(Case {
        name: format!("mixture of experts, 1 token{suffix}"),
        bytes: (TOP_K + 1) as u64 * of_expert
            + activations(2 * HIDDEN)
            + (TOP_K * (size_of::<u32>() + size_of::<f32>())) as u64,
        operations: None,
        calls: calls(&tokens, |token| {
            let chosen: Vec<_> = (0..TOP_K).map(|slot| (token * TOP_K + slot) as u32).collect();
            let ids = Tensor::from_vec(chosen, (1, TOP_K), &device)?;
            let (op, x, weights) = (moe.clone(), x.clone(), weights.clone());
            Ok(move || op.forward(&x, &ids, &weights))
        })?,
    });

    // On a CPU, tens of megabytes of output would measure how fast the system hands out pages.
    let (m, width) = (if runner.is_cpu() { 256 } else { 4_096 }, 2_048);
    let x = noise(&[m, width])?;
    cases.push(Case {
        name: format!("RMS norm{suffix}"),
        bytes: activations(2 * m * width) + (width * size_of::<f32>()) as u64,
        operations: None,
        calls: calls(&[()], |()| {
            let (op, x) = (RmsNorm::new(vec![1.0; width], 1e-5)?, x.clone());
            Ok(move || op.forward(&x))
        })?,
    });

    // A CPU's plain code would take seconds for what a GPU does in a moment.
    let (n, k, m) = match runner.is_cpu() {
        true => (HIDDEN, WIDTH, 64),
        false => (ROWS, COLUMNS, 512),
    };
    let of_products: Vec<Weight> = match runner.is_cpu() {
        true => data.experts[..WEIGHTS]
            .iter()
            .map(|expert| expert.down.clone())
            .collect(),
        false => data.weights.clone(),
    };
    let x = noise(&[m, k])?;
    cases.push(Case {
        name: format!("linear, {m} rows{suffix}"),
        bytes: of_products[0].size_in_bytes() as u64 + activations(m * (k + n)),
        operations: Some((2 * m * n * k) as u64),
        calls: calls(&of_products, |weight| {
            let (op, x) = (Linear::new(weight.clone(), None)?, x.clone());
            Ok(move || op.forward(&x))
        })?,
    });
    Ok(cases)
}

/// A call for each of `items`.
#[allow(clippy::type_complexity, reason = "a list of calls")]
fn calls<T, F>(items: &[T], make: impl Fn(&T) -> Result<F>) -> Result<Vec<Box<dyn Fn() -> Result<()>>>>
where
    F: Fn() -> candle_core::Result<Tensor> + 'static,
{
    let boxed = |call: F| -> Box<dyn Fn() -> Result<()>> {
        Box::new(move || {
            call()?;
            Ok(())
        })
    };
    items.iter().map(|item| make(item).map(boxed)).collect()
}

/// The time of the first call, with all that it brings along, and of a later one in the median.
struct Times {
    first: Duration,
    later: Duration,
}

fn run(runner: &Runner, case: &Case) -> Result<Times> {
    let first = runner.latency(&case.calls[0])?;
    let (start, mut later) = (Instant::now(), Vec::new());
    while later.is_empty() || later.len() < SAMPLES && start.elapsed() < TIME {
        let all = runner.time(|| case.calls.iter().try_for_each(|call| call()))?;
        later.push(all / case.calls.len() as u32);
    }
    Ok(Times {
        first,
        later: median(later),
    })
}

fn check(name: String, case: &Case, times: Times, reading: Option<f64>) -> Check {
    let (first, later) = (milliseconds(times.first), milliseconds(times.later));
    let (rate, number, unit) = match case.operations {
        Some(operations) => (operations as f64 / later / 1e6, "gop_per_s", "GOP/s"),
        None => (case.bytes as f64 / later / 1e6, "gb_per_s", "GB/s"),
    };
    let share = reading
        .filter(|_| case.operations.is_none())
        .map(|reading| rate * 1e9 / reading);
    let found = format!(
        "{rate:.1} {unit}{}; {later:.3} ms, the first call {first:.3} ms",
        share.map_or(String::new(), |share| format!(
            ", {:.0} % of reading",
            share * 100.0
        )),
    );
    let check = Check::ok(name, found)
        .with(number, rate)
        .with("bytes", case.bytes as f64)
        .with("first_ms", first)
        .with("later_ms", later);
    match share {
        Some(share) => check.with("share", share),
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

    #[test]
    fn rates_follow_from_bytes_and_operations() {
        let times = || Times {
            first: Duration::from_millis(9),
            later: Duration::from_millis(2),
        };
        let case = |operations| Case {
            name: "x".into(),
            bytes: 30_000_000,
            operations,
            calls: Vec::new(),
        };
        let found = check("x".into(), &case(None), times(), Some(20e9)).numbers;
        let near = |name: &str, value: f64| assert!((found[name] / value - 1.0).abs() < 1e-9, "{name}");
        near("gb_per_s", 15.0);
        near("share", 0.75);
        near("first_ms", 9.0);
        near("later_ms", 2.0);
        let found = check("x".into(), &case(Some(5_000_000_000)), times(), Some(20e9)).numbers;
        assert!((found["gop_per_s"] / 2500.0 - 1.0).abs() < 1e-9);
        assert!(!found.contains_key("share") && !found.contains_key("gb_per_s"));
    }

    #[test]
    fn every_kernel_is_measured() {
        let runner = Runner::Cpu(Executor::current().unwrap());
        let mut checks = Vec::new();
        measure(&runner, &Data::new().unwrap(), &mut |check| checks.push(check));
        assert_eq!(checks.len(), 7);
        for check in checks {
            let rate = check.numbers.get("gb_per_s").or(check.numbers.get("gop_per_s"));
            assert!(rate.is_some_and(|rate| *rate > 0.01), "{check:?}");
        }
    }
}
