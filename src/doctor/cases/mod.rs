//! Each kind of kernel, on small inputs, beside the plain reference.

mod append;
mod attention;
mod experts;
mod paged;
mod products;
mod rows;

use super::runner::{DTYPES, Runner};
use super::{Check, Status};
use crate::Result;
use crate::cpu::{Arithmetic, Expert};
use crate::fp4::{Bytes, DenseTensor, FloatKind, Format, ScaleRule, Weight, quantize};
use crate::ops::{Comparison, Tolerance, compare_with_reference};
use crate::random::Random;
use candle_core::{DType, Device, Tensor};

/// A kind of kernel: its name and its comparisons.
struct Family {
    name: &'static str,
    compare: fn(&mut Bench<'_>) -> Result<()>,
    /// Whether the Metal kernels are this crate's; otherwise they are Candle's.
    ours: bool,
}

const FAMILIES: [Family; 18] = [
    ours("linear", products::linear),
    ours("linear, floating point", products::dense),
    ours("joined linear", products::joined),
    ours("normed linear", products::normed),
    ours("per head", products::per_head),
    ours("per head, floating point", products::per_head_dense),
    ours("merged per head", products::merged),
    ours("MLP", experts::mlp),
    ours("mixture of experts", experts::moe),
    ours("routing", experts::router),
    ours("RMS norm", rows::norm),
    ours("addition", rows::add),
    ours("RoPE", rows::rope),
    ours("latent rows", rows::latent),
    ours("paged attention", paged::attention),
    ours("tokens of a paged cache", paged::gather),
    ours("storing in a paged cache", append::append),
    Family {
        name: "attention",
        compare: attention::attention,
        ours: false,
    },
];

const fn ours(name: &'static str, compare: fn(&mut Bench<'_>) -> Result<()>) -> Family {
    Family {
        name,
        compare,
        ours: true,
    }
}

/// Compares every kind of kernel.
pub(super) fn compare(runner: &Runner, add: &mut dyn FnMut(Check)) {
    for family in &FAMILIES {
        add(check(runner, family));
    }
}

fn check(runner: &Runner, family: &Family) -> Check {
    let name = format!("{}: {}", runner.name(), family.name);
    let mut bench = Bench {
        runner,
        device: runner.device(),
        random: Random::new(1),
        cases: 0,
        worst: None,
    };
    let before = runner.launches();
    let done = runner.run(|| (family.compare)(&mut bench));
    let check = match done {
        Ok(()) => bench.check(name),
        Err(error) => return Check::failed(name, &error, REPORT),
    };
    match (before, runner.launches()) {
        // What the CPU computed in the kernels' place agrees with the reference, and says nothing of them.
        (Some(before), Some(after)) if family.ours => match after.since(&before) {
            Ok(launches) => check.with("launches", launches),
            Err(found) => Check::ok(check.name, found).but(Status::Wrong, REPORT),
        },
        (Some(_), Some(_)) => Check {
            found: format!("{} (the CPU's: on a GPU it is Candle's)", check.found),
            ..check
        },
        _ => check,
    }
}

const REPORT: &str = "results of this kernel cannot be trusted here: please report it with this output, and compute \
                      elsewhere (--device cpu, MMFP4_CPU)";

/// What a family's cases are made with, and the worst of them.
struct Bench<'a> {
    runner: &'a Runner,
    device: Device,
    random: Random,
    cases: usize,
    worst: Option<Worst>,
}

struct Worst {
    case: String,
    comparison: Comparison,
    bound: f64,
}

impl Bench<'_> {
    /// Numbers in -1 .. 1.
    fn noise(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| (self.random.uniform() * 2.0 - 1.0) as f32)
            .collect()
    }

    /// Noise as a tensor of the runner's device.
    fn tensor(&mut self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        let values = self.noise(dims.iter().product());
        Ok(Tensor::from_vec(values, dims, &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(&self.device)?)
    }

    fn weight(&mut self, n: usize, k: usize, format: Format) -> Result<Weight> {
        let values = self.noise(n * k);
        Ok(quantize("w", &values, (n, k), format, ScaleRule::Maximum)?.into())
    }

    /// A weight in floating point.
    fn dense(&mut self, n: usize, k: usize, kind: FloatKind) -> Result<Weight> {
        let dtype = match kind {
            FloatKind::F32 => DType::F32,
            FloatKind::F16 => DType::F16,
            FloatKind::BF16 => DType::BF16,
        };
        let values = Tensor::from_vec(self.noise(n * k), n * k, &Device::Cpu)?.to_dtype(dtype)?;
        let mut bytes = Vec::with_capacity(n * k * kind.size());
        values.write_bytes(&mut bytes)?;
        Ok(DenseTensor::new("w", (n, k), kind, Bytes::copy_from(&bytes)?)?.into())
    }

    fn expert(&mut self, width: usize, d: usize, format: Format) -> Result<Expert> {
        Ok(Expert {
            gate: self.weight(width, d, format)?,
            up: self.weight(width, d, format)?,
            down: self.weight(d, width, format)?,
        })
    }

    fn see(&mut self, case: String, bound: f64, comparison: Comparison) {
        self.cases += 1;
        let badness = |comparison: &Comparison, bound: f64| match comparison.all_close {
            true => comparison.nmse / bound,
            false => f64::INFINITY,
        };
        let worse = self
            .worst
            .as_ref()
            .is_none_or(|worst| badness(&comparison, bound) > badness(&worst.comparison, worst.bound));
        if worse {
            self.worst = Some(Worst {
                case,
                comparison,
                bound,
            });
        }
    }

    /// Compares an output with the reference's values.
    fn compare(&mut self, case: String, output: &Tensor, expected: Vec<f32>) -> Result<()> {
        self.compare_within(bound_of(output.dtype()), case, output, expected)
    }

    /// The same with another bound of the NMSE.
    fn compare_within(
        &mut self,
        bound: f64,
        case: String,
        output: &Tensor,
        expected: Vec<f32>,
    ) -> Result<()> {
        let expected = Tensor::from_vec(expected, output.shape(), &Device::Cpu)?;
        let comparison = compare_with_reference(output, &expected, Tolerance::Nmse(bound))?;
        self.see(case, bound, comparison);
        Ok(())
    }

    fn check(self, name: String) -> Check {
        let Some(worst) = self.worst else {
            return Check::ok(name, "no cases").but(Status::Wrong, REPORT);
        };
        let Worst {
            case,
            comparison,
            bound,
        } = worst;
        if comparison.all_close {
            let found = format!(
                "{} cases agree with the reference: NMSE at most {:.1e} (bound {bound:.0e})",
                self.cases, comparison.nmse
            );
            return Check::ok(name, found)
                .with("cases", self.cases)
                .with("nmse", comparison.nmse)
                .with("bound", bound);
        }
        Check::ok(name, format!("{case}: {comparison}"))
            .but(Status::Wrong, REPORT)
            .with("cases", self.cases)
            .with("nmse", comparison.nmse)
            .with("bound", bound)
    }
}

/// The NMSE that [`Tolerance::of`] allows.
fn bound_of(dtype: DType) -> f64 {
    match Tolerance::of(dtype) {
        Tolerance::Nmse(bound) => bound,
        Tolerance::Elements { relative, .. } => relative * relative,
    }
}

/// Rows of activations: each kernel's own number of them, and what is left over.
const ROWS: [usize; 6] = [1, 2, 4, 7, 8, 33];

/// Kinds of weights in floating point.
const FLOATS: [FloatKind; 3] = [FloatKind::F32, FloatKind::F16, FloatKind::BF16];

/// Each number of rows in each dtype: a kernel for one says nothing of another.
fn rows_and_dtypes() -> impl Iterator<Item = (usize, DType)> {
    ROWS.into_iter()
        .flat_map(|rows| DTYPES.into_iter().map(move |dtype| (rows, dtype)))
}

fn case(m: usize, dtype: DType, format: Format, arithmetic: Arithmetic) -> String {
    format!("{m} rows, {dtype:?}, groups of {}, {arithmetic:?}", format.group)
}

/// Values as a tensor of a dtype holds them.
fn rounded(values: Vec<f32>, dtype: DType) -> Result<Vec<f32>> {
    let len = values.len();
    to_f32(&Tensor::from_vec(values, len, &Device::Cpu)?.to_dtype(dtype)?)
}

fn to_f32(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(tensor.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Executor;
    use crate::doctor::Number;

    #[test]
    fn a_wrong_result_is_found_and_named() {
        let runner = Runner::Cpu(Executor::current().unwrap());
        let mut bench = Bench {
            runner: &runner,
            device: Device::Cpu,
            random: Random::new(1),
            cases: 0,
            worst: None,
        };
        let x = bench.tensor(&[2, 3], DType::F32).unwrap();
        let mut expected = to_f32(&x).unwrap();
        bench.compare("a".into(), &x, expected.clone()).unwrap();
        expected[4] += 0.1;
        bench.compare("b".into(), &x, expected).unwrap();
        let check = bench.check("kernel".into());
        assert_eq!(check.status, Status::Wrong);
        assert!(
            check.found.starts_with("b: NOT close") && check.found.contains("[1, 1]"),
            "{}",
            check.found
        );
        assert!(check.advice.contains("report it"));
        assert_eq!(check.numbers["cases"], Number::Whole(2));
    }

    #[test]
    fn every_family_agrees_on_the_cpu() {
        let runner = Runner::Cpu(Executor::current().unwrap());
        let mut checks = Vec::new();
        compare(&runner, &mut |check| checks.push(check));
        assert_eq!(checks.len(), FAMILIES.len());
        for check in checks {
            assert_eq!(check.status, Status::Ok, "{check:?}");
        }
    }

    #[test]
    #[cfg(msl_host)]
    fn what_the_cpu_computed_in_a_kernels_place_does_not_agree() {
        use crate::cpu::Routing;
        use crate::metal::host::Host;
        use crate::ops::{Route, validate_kernel_output};
        let runner = Runner::Host(std::sync::Arc::new(Host::recorder(false)));
        let of = |compare| check(&runner, &ours("family", compare));
        let nothing = of(|bench| {
            let x = bench.tensor(&[2, 3], DType::F32)?;
            let expected = to_f32(&x)?;
            bench.compare("a".into(), &x, expected)
        });
        assert_eq!(
            (nothing.status, nothing.found.as_str()),
            (Status::Wrong, "no kernel ran")
        );
        // The choice alone has no kernel; `Router` has.
        let route = of(|bench| {
            let routing = Routing {
                top_k: 1,
                n_group: 1,
                topk_group: 1,
                normalize: true,
                scaling_factor: 1.0,
            };
            let logits = bench.tensor(&[2, 3], DType::F32)?;
            let comparison = validate_kernel_output(&Route::new(routing, vec![0.0; 3])?, &logits)?;
            assert!(comparison.all_close);
            bench.see("a".into(), 1e-9, comparison);
            Ok(())
        });
        assert_eq!(route.status, Status::Wrong);
        assert!(route.found.contains("mmfp4-route: the CPU did"), "{route:?}");
    }

    /// By launch plans alone: it needs no compiler.
    #[test]
    #[cfg(msl_host)]
    fn every_kernel_that_is_compiled_is_compared_in_every_dtype() {
        use crate::doctor::runner::variants;
        use crate::metal::host::Host;
        use std::collections::BTreeSet;
        let host = std::sync::Arc::new(Host::recorder(false));
        let runner = Runner::Host(std::sync::Arc::clone(&host));
        compare(&runner, &mut |check| {
            // What a recorder gives are no results; attention is not ours, and the CPU's.
            let own = !check.name.ends_with(": attention");
            assert_eq!(check.status == Status::Wrong, own, "{check:?}");
        });
        let compared: BTreeSet<String> = host.launched().into_keys().collect();
        let compiled: BTreeSet<String> = variants()
            .unwrap()
            .into_values()
            .map(|launch| launch.kernel)
            .collect();
        let missing: Vec<_> = compiled.difference(&compared).collect();
        assert!(
            missing.is_empty() && compiled.len() > 80,
            "{missing:?} of {}",
            compiled.len()
        );
        // And each way to share a row out among simdgroups.
        let shares: BTreeSet<_> = host
            .recorded()
            .into_iter()
            .flat_map(|run| run.plan.launches)
            .filter(|launch| launch.kernel.starts_with("linear_rows_bf16"))
            .flat_map(|launch| {
                let sharing = launch.constants.into_iter().find(|(index, _)| *index == 7);
                sharing.map(|(_, sharing)| (launch.kernel, format!("{sharing:?}")))
            })
            .collect();
        for (kernel, sharing) in [
            ("thin", 1),
            ("thin", 2),
            ("thin", 4),
            ("m1", 1),
            ("m1", 2),
            ("m2", 4),
        ] {
            let share = (format!("linear_rows_bf16_{kernel}"), format!("U16({sharing})"));
            assert!(shares.contains(&share), "{share:?} of {shares:?}");
        }
    }
}
