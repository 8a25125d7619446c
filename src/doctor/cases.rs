//! Each kind of kernel, on small inputs, beside the plain reference.

use super::runner::{DTYPES, FORMATS, Runner};
use super::{Check, Status};
use crate::Result;
use crate::cpu::{self, Arithmetic, Expert, HeadRows, HeadView, Pairing, Routing, reference};
use crate::fp4::{Format, ScaleRule, Weight, quantize};
use crate::ops::{
    Add, Attention, Comparison, FusedMoe, GatedMlp, Linear, Orientation, PerHead, RmsNorm, Rope, Route,
    Tolerance, compare_with_reference, validate_kernel_output,
};
use crate::random::Random;
use candle_core::{DType, Device, Tensor};

/// A kind of kernel: its name, its comparisons, and whether it has Metal kernels.
struct Family {
    name: &'static str,
    compare: fn(&mut Bench<'_>) -> Result<()>,
    on_metal: bool,
}

const FAMILIES: [Family; 9] = [
    Family {
        name: "linear",
        compare: linear,
        on_metal: true,
    },
    Family {
        name: "per head",
        compare: per_head,
        on_metal: true,
    },
    Family {
        name: "MLP",
        compare: mlp,
        on_metal: true,
    },
    Family {
        name: "mixture of experts",
        compare: moe,
        on_metal: true,
    },
    Family {
        name: "routing",
        compare: route,
        on_metal: true,
    },
    Family {
        name: "RMS norm",
        compare: norm,
        on_metal: true,
    },
    Family {
        name: "RoPE",
        compare: rope,
        on_metal: true,
    },
    Family {
        name: "addition",
        compare: add_rows,
        on_metal: true,
    },
    Family {
        name: "attention",
        compare: attention,
        // Candle's own there.
        on_metal: false,
    },
];

/// Compares every kind of kernel.
pub(super) fn compare(runner: &Runner, add: &mut dyn FnMut(Check)) {
    let runs = |family: &&Family| runner.is_cpu() || family.on_metal;
    for family in FAMILIES.iter().filter(runs) {
        let name = format!("{}: {}", runner.name(), family.name);
        let mut bench = Bench {
            runner,
            device: runner.device(),
            random: Random::new(1),
            cases: 0,
            worst: None,
        };
        let done = runner.run(|| (family.compare)(&mut bench));
        add(match done {
            Ok(()) => bench.check(name),
            Err(error) => Check::failed(name, &error, REPORT),
        });
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
        let expected = Tensor::from_vec(expected, output.shape(), &Device::Cpu)?;
        let tolerance = Tolerance::of(output.dtype());
        let comparison = compare_with_reference(output, &expected, tolerance)?;
        self.see(case, bound_of(output.dtype()), comparison);
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
                .with("cases", self.cases as f64)
                .with("nmse", comparison.nmse)
                .with("bound", bound);
        }
        Check::ok(name, format!("{case}: {comparison}"))
            .but(Status::Wrong, REPORT)
            .with("cases", self.cases as f64)
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

fn linear(bench: &mut Bench<'_>) -> Result<()> {
    let (n, k) = (67, 256);
    for format in FORMATS {
        let (weight, bias) = (bench.weight(n, k, format)?, bench.noise(n));
        for arithmetic in bench.runner.arithmetics() {
            let op = Linear::new(weight.clone(), Some(bias.clone()))?.with_arithmetic(*arithmetic);
            for (m, dtype) in ROWS.into_iter().zip(DTYPES.into_iter().cycle()) {
                let x = bench.tensor(&[m, k], dtype)?;
                let comparison = validate_kernel_output(&op, &x)?;
                bench.see(case(m, dtype, format, *arithmetic), bound_of(dtype), comparison);
            }
        }
    }
    Ok(())
}

fn case(m: usize, dtype: DType, format: Format, arithmetic: Arithmetic) -> String {
    format!("{m} rows, {dtype:?}, groups of {}, {arithmetic:?}", format.group)
}

fn per_head(bench: &mut Bench<'_>) -> Result<()> {
    let (heads, k) = (3, 256);
    let rows = HeadRows {
        heads,
        stride: 40,
        start: 8,
        len: 24,
    };
    for format in FORMATS {
        let weight = bench.weight(heads * rows.stride, k, format)?;
        for arithmetic in bench.runner.arithmetics() {
            for (orientation, width) in [(Orientation::Ordinary, k), (Orientation::Transposed, rows.len)] {
                let op = PerHead::new(weight.clone(), rows, orientation)?.with_arithmetic(*arithmetic);
                for (m, dtype) in ROWS.into_iter().zip(DTYPES.into_iter().cycle()) {
                    let x = bench.tensor(&[m, heads, width], dtype)?;
                    let comparison = validate_kernel_output(&op, &x)?;
                    let case = format!("{orientation:?}, {}", case(m, dtype, format, *arithmetic));
                    bench.see(case, bound_of(dtype), comparison);
                }
            }
        }
    }
    Ok(())
}

fn mlp(bench: &mut Bench<'_>) -> Result<()> {
    let (width, d) = (256, 128);
    for format in FORMATS {
        let mlp = bench.expert(width, d, format)?;
        for arithmetic in bench.runner.arithmetics() {
            let op = GatedMlp::new(mlp.clone())?.with_arithmetic(*arithmetic);
            for (m, dtype) in ROWS.into_iter().zip(DTYPES.into_iter().cycle()) {
                let x = bench.tensor(&[m, d], dtype)?;
                let (values, ids, ones) = (to_f32(&x)?, vec![0; m], vec![1.0; m]);
                let alone = std::slice::from_ref(&mlp);
                let expected = reference::fused_moe(alone, &[], &values, &ids, &ones, 1, *arithmetic);
                bench.compare(case(m, dtype, format, *arithmetic), &op.forward(&x)?, expected)?;
            }
        }
    }
    Ok(())
}

fn moe(bench: &mut Bench<'_>) -> Result<()> {
    let (experts, top_k, width, d) = (8, 3, 128, 256);
    for format in FORMATS {
        let routed = (0..experts).map(|_| bench.expert(width, d, format));
        let routed = routed.collect::<Result<Vec<_>>>()?;
        let shared = vec![bench.expert(width, d, format)?];
        for arithmetic in bench.runner.arithmetics() {
            let op = FusedMoe::new(routed.clone(), shared.clone())?.with_arithmetic(*arithmetic);
            for (m, dtype) in ROWS.into_iter().zip(DTYPES.into_iter().cycle()) {
                let x = bench.tensor(&[m, d], dtype)?;
                // Different ones for each token.
                let ids: Vec<u32> = (0..m)
                    .flat_map(|t| (0..top_k).map(move |slot| ((t + 3 * slot) % experts) as u32))
                    .collect();
                let ids = Tensor::from_vec(ids, (m, top_k), &bench.device)?;
                let weights = bench.tensor(&[m, top_k], DType::F32)?;
                let comparison = validate_kernel_output(&op, (&x, &ids, &weights))?;
                bench.see(case(m, dtype, format, *arithmetic), bound_of(dtype), comparison);
            }
        }
    }
    Ok(())
}

fn route(bench: &mut Bench<'_>) -> Result<()> {
    for (experts, n_group, topk_group) in [(64, 1, 1), (64, 4, 2)] {
        let routing = Routing {
            top_k: 4,
            n_group,
            topk_group,
            normalize: true,
            scaling_factor: 1.8,
        };
        let op = Route::new(routing, bench.noise(experts))?;
        for m in ROWS {
            let logits = bench.tensor(&[m, experts], DType::F32)?;
            let comparison = validate_kernel_output(&op, &logits)?;
            let case = format!("{m} rows, {topk_group} of {n_group} groups");
            bench.see(case, 1e-10, comparison);
        }
    }
    Ok(())
}

fn norm(bench: &mut Bench<'_>) -> Result<()> {
    const EPS: f64 = 1e-5;
    for width in [512, 771] {
        let weight = bench.noise(width);
        let op = RmsNorm::new(weight.clone(), EPS)?;
        for (m, dtype) in ROWS.into_iter().zip(DTYPES.into_iter().cycle()) {
            let x = bench.tensor(&[m, width], dtype)?;
            let expected = reference::rms_norm(&to_f32(&x)?, &weight, EPS as f32);
            bench.compare(format!("[{m}, {width}], {dtype:?}"), &op.forward(&x)?, expected)?;
        }
    }
    Ok(())
}

fn rope(bench: &mut Bench<'_>) -> Result<()> {
    let (heads, width) = (3, 64);
    for pairing in [Pairing::Interleaved, Pairing::Halves] {
        let op = Rope::new(pairing);
        for (m, dtype) in ROWS.into_iter().zip(DTYPES.into_iter().cycle()) {
            let x = bench.tensor(&[m, heads, width], dtype)?;
            let cos = bench.tensor(&[m, width / 2], DType::F32)?;
            let sin = bench.tensor(&[m, width / 2], DType::F32)?;
            let values = to_f32(&x)?;
            let view = HeadView {
                data: &values,
                row: heads * width,
                head: width,
                width,
            };
            let expected = reference::rope(pairing, view, heads, (&to_f32(&cos)?, &to_f32(&sin)?), m);
            bench.compare(
                format!("{m} rows, {dtype:?}, {pairing:?}"),
                &op.forward(&x, &cos, &sin)?,
                expected,
            )?;
        }
    }
    Ok(())
}

fn add_rows(bench: &mut Bench<'_>) -> Result<()> {
    for (m, dtype) in ROWS.into_iter().zip(DTYPES.into_iter().cycle()) {
        let (a, b) = (bench.tensor(&[m, 513], dtype)?, bench.tensor(&[m, 513], dtype)?);
        let expected = to_f32(&a)?.iter().zip(to_f32(&b)?).map(|(a, b)| a + b).collect();
        bench.compare(format!("[{m}, 513], {dtype:?}"), &Add.forward(&a, &b)?, expected)?;
    }
    Ok(())
}

fn attention(bench: &mut Bench<'_>) -> Result<()> {
    let (heads, width, value, scale) = (4, 96, 64, 0.1);
    let op = Attention::new(heads, scale, None)?;
    for (n, position) in [(1, 0), (1, 700), (7, 130), (33, 0)] {
        let total = position + n;
        let queries = bench.tensor(&[n, heads, width], DType::F32)?;
        let keys = bench.tensor(&[total, width], DType::F32)?;
        let values = keys.narrow(1, 0, value)?;
        let output = op.forward(&[&queries], &[&keys], &values, position)?;
        let (queries, keys) = (to_f32(&queries)?, to_f32(&keys)?);
        let rows = |data, row, head, width| HeadView {
            data,
            row,
            head,
            width,
        };
        let expected = reference::attention(
            cpu::Attention {
                heads,
                queries: &[rows(&queries, heads * width, width, width)],
                keys: &[rows(&keys, width, 0, width)],
                values: rows(&keys, width, 0, value),
                position,
                window: None,
                scale,
            },
            n,
        );
        bench.compare(format!("{n} queries at {position}"), &output, expected)?;
    }
    Ok(())
}

fn to_f32(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(tensor.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Executor;

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
        assert_eq!(check.numbers["cases"], 2.0);
    }
}
