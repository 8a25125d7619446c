//! Runs plans in a program of their own, which sanitizers can watch: each operand is memory of exactly its size.

use crate::cases::{self, Case};
use candle_core::DType;
use candle_mmfp4::cpu::HeadRows;
use candle_mmfp4::fp4::Weight;
use candle_mmfp4::metal::linear::{Direction, Product};
use candle_mmfp4::metal::plan::{Binding, Constant, Plan};
use std::path::Path;
use std::process::Command;

/// What a run ended with.
#[derive(Debug)]
pub enum Outcome {
    /// Normalised mean-square error of the output.
    Error(f64),
    /// The program refused, or a sanitizer ended it: the first line that says why.
    Stopped(String),
}

/// A product as a plan, its operands, and what it should give.
pub struct Work {
    plan: Plan,
    operands: Vec<Operand>,
    expected: Vec<f32>,
    dtype: DType,
}

/// Bytes that begin so far behind a multiple of 16.
struct Operand {
    misalignment: usize,
    bytes: Vec<u8>,
}

/// Which way a case's weight is taken.
pub fn work(case: &Case, direction: Direction) -> Work {
    let op = case.op();
    let Weight::Fp4(weight) = op.weight() else {
        unreachable!("cases are in FP4")
    };
    let (n, k) = weight.shape();
    let (from, to) = match direction {
        Direction::Rows => (k, n),
        Direction::Columns => (n, k),
    };
    let bias = op.bias().filter(|_| direction == Direction::Rows);
    let x = cases::activations((case.m, from), case.dtype, 17);
    let x32 = cases::values(&x);
    let rows = HeadRows {
        heads: 1,
        stride: n,
        start: 0,
        len: n,
    };
    let plan = Product {
        weight,
        rows,
        direction,
        bias: bias.is_some(),
        dtype: case.dtype,
        m: case.m,
        x_offset: 0,
        x_row: from,
        x_head: 0,
        y_offset: 0,
        y_row: to,
        y_head: 0,
    };
    let expected = match direction {
        Direction::Rows => case.expected(&op, &x32),
        Direction::Columns => {
            candle_mmfp4::cpu::reference::per_head_transposed(op.weight(), rows, &x32, case.m)
        }
    };
    let operand = |bytes: &[u8], misalignment| Operand {
        misalignment,
        bytes: bytes.to_vec(),
    };
    let mut operands = vec![
        operand(weight.codes(), weight.codes().offset() % 16),
        operand(weight.scales(), weight.scales().offset() % 16),
        operand(&rounded(&x32, case.dtype), 0),
        operand(&vec![0xff; case.m * to * case.dtype.size_in_bytes()], 0),
    ];
    operands.extend(bias.map(|bias| operand(&rounded(bias, DType::F32), 0)));
    Work {
        plan: plan.plan().unwrap(),
        operands,
        expected,
        dtype: case.dtype,
    }
}

impl Work {
    /// Runs it with a program that `build::library` made.
    pub fn run(&self, program: &Path, seed: u64) -> Outcome {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("work");
        std::fs::write(&file, self.file(seed)).unwrap();
        let output = Command::new(program)
            .arg(&file)
            .env("TSAN_OPTIONS", "halt_on_error=1")
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .output()
            .unwrap();
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let telling = |line: &&str| {
                [
                    "ERROR: ",
                    "WARNING: ThreadSanitizer",
                    "runtime error",
                    "SUMMARY",
                    "msl",
                ]
                .iter()
                .any(|sign| line.contains(sign))
            };
            let line = text.lines().find(telling).or_else(|| text.lines().next());
            let line = line.map_or_else(|| output.status.to_string(), str::to_string);
            return Outcome::Stopped(without_addresses(
                &line.replace(&format!("{}: ", file.display()), ""),
            ));
        }
        let written = std::fs::read(folder.path().join("work.out")).unwrap();
        let start = self.operands[..3].iter().map(|o| o.bytes.len()).sum::<usize>();
        let y = &written[start..start + self.operands[3].bytes.len()];
        Outcome::Error(cases::nmse(&decoded(y, self.dtype), &self.expected))
    }

    /// The program's input; tests/msl/runtime tells its format.
    fn file(&self, seed: u64) -> Vec<u8> {
        let mut file = b"MSLRUN1\0".to_vec();
        let word = |file: &mut Vec<u8>, value: usize| file.extend((value as u32).to_le_bytes());
        let long = |file: &mut Vec<u8>, value: usize| file.extend((value as u64).to_le_bytes());
        word(&mut file, self.operands.len());
        for operand in &self.operands {
            long(&mut file, operand.bytes.len());
            long(&mut file, operand.misalignment);
            file.extend(&operand.bytes);
        }
        word(&mut file, self.plan.launches.len());
        for launch in &self.plan.launches {
            word(&mut file, launch.kernel.len());
            file.extend(launch.kernel.as_bytes());
            long(&mut file, seed as usize);
            for size in launch.threadgroups.into_iter().chain(launch.threads) {
                word(&mut file, size);
            }
            // No threadgroup memory but the kernels' own.
            word(&mut file, 0);
            word(&mut file, launch.constants.len());
            for (index, constant) in &launch.constants {
                let mut value = [0u8; 8];
                let size = match constant {
                    Constant::Bool(on) => {
                        value[0] = u8::from(*on);
                        1
                    }
                    Constant::U16(number) => {
                        value[..2].copy_from_slice(&number.to_le_bytes());
                        2
                    }
                };
                word(&mut file, usize::from(*index));
                word(&mut file, size);
                file.extend(value);
            }
            word(&mut file, launch.bindings.len());
            for (index, binding) in &launch.bindings {
                word(&mut file, *index);
                match binding {
                    Binding::Bytes(bytes) => {
                        word(&mut file, 2);
                        word(&mut file, bytes.len());
                        file.extend(bytes);
                    }
                    Binding::Read { operand, offset } | Binding::Write { operand, offset } => {
                        word(&mut file, usize::from(matches!(binding, Binding::Write { .. })));
                        word(&mut file, *operand);
                        long(&mut file, *offset);
                        long(&mut file, self.operands[*operand].bytes.len() - offset);
                    }
                }
            }
        }
        file
    }
}

/// What a sanitizer says, without process and addresses, which differ from run to run.
fn without_addresses(line: &str) -> String {
    let line = line.split("ERROR: ").last().unwrap_or(line);
    let end = [" (pid=", " on address", " on unknown address", " 0x"]
        .iter()
        .filter_map(|sign| line.find(sign))
        .min();
    line[..end.unwrap_or(line.len())].to_string()
}

fn rounded(values: &[f32], dtype: DType) -> Vec<u8> {
    let bytes = |v: &f32| match dtype {
        DType::F16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
        DType::BF16 => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
        _ => v.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

fn decoded(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let two = |b: &[u8]| [b[0], b[1]];
    let value = |b: &[u8]| match dtype {
        DType::F16 => half::f16::from_le_bytes(two(b)).to_f32(),
        DType::BF16 => half::bf16::from_le_bytes(two(b)).to_f32(),
        _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
    };
    bytes.chunks_exact(dtype.size_in_bytes()).map(value).collect()
}
