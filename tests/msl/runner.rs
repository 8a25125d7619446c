//! Plans with all that they read and should write, to be run again and again: in other schedules, by other builds of the
//! kernels, and in a program of their own, which sanitizers can watch: each operand is memory of exactly its size.

use crate::nmse;
use candle_core::{DType, Device};
use candle_mmfp4::metal::host::{Host, Operand, Recorded, RecordedOperand};
use candle_mmfp4::metal::plan::{Binding, Constant, Plan};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// What an output should be.
#[derive(Clone)]
pub struct Expected {
    /// Values, of U32 as well.
    pub values: Vec<f32>,
    /// How they are stored.
    pub dtype: DType,
    /// The largest normalised mean-square error.
    pub bound: f64,
}

/// One run of an op: its plan, its operands, and what its outputs should be.
pub struct Work {
    pub name: String,
    recorded: Recorded,
    /// Those that are launched, and where the plan was changed those that were before.
    kernels: BTreeSet<String>,
    /// Of the first operands that are written.
    expected: Vec<Expected>,
}

/// Records the one plan of an op.
pub fn record<T>(
    name: String,
    op: impl FnOnce(&Device) -> candle_core::Result<T>,
    expected: Vec<Expected>,
) -> Work {
    let host = Arc::new(Host::recorder(true));
    if let Err(error) = host.install(|| op(&Device::Cpu)) {
        panic!("{name}: {error}");
    }
    let mut runs = host.recorded();
    assert_eq!(runs.len(), 1, "{name}: plans");
    let recorded = runs.remove(0);
    Work {
        name,
        kernels: launched(&recorded.plan).collect(),
        recorded,
        expected,
    }
}

fn launched(plan: &Plan) -> impl Iterator<Item = String> {
    plan.launches.iter().map(|launch| launch.kernel.clone())
}

impl Work {
    /// The same by another plan, where `change` says that it has changed this one.
    pub fn changed(&self, change: impl FnOnce(&mut Plan) -> bool) -> Option<Self> {
        let mut recorded = self.recorded.clone();
        change(&mut recorded.plan).then(|| Self {
            name: self.name.clone(),
            kernels: launched(&recorded.plan)
                .chain(self.kernels.iter().cloned())
                .collect(),
            recorded,
            expected: self.expected.clone(),
        })
    }

    /// What a program must have to run it.
    pub fn kernels(&self) -> &BTreeSet<String> {
        &self.kernels
    }

    /// Whether NaN is to come out, of which fast math promises nothing.
    pub fn expects_nan(&self) -> bool {
        self.expected
            .iter()
            .any(|expected| expected.values.iter().any(|v| v.is_nan()))
    }

    /// Runs it with kernels of this process; what went wrong.
    pub fn failure_on(&self, host: &Host) -> Option<String> {
        let mut memories: Vec<_> = self.recorded.operands.iter().map(Memory::of).collect();
        let mut operands: Vec<_> = memories.iter_mut().map(Memory::operand).collect();
        if let Err(error) = host.run(&self.recorded.plan, &mut operands) {
            return Some(error.to_string());
        }
        let written: Vec<_> = memories
            .iter()
            .filter(|memory| memory.written)
            .map(Memory::bytes)
            .collect();
        self.difference(&written)
    }

    /// Runs it with a program that `build::library` made; what went wrong.
    pub fn failure_of(&self, program: &Path, seed: u64) -> Option<String> {
        match self.run(program, seed) {
            Ok(written) => self.difference(&written.iter().map(Vec::as_slice).collect::<Vec<_>>()),
            Err(line) => Some(line),
        }
    }

    /// How written operands differ from what they should be by more than rounding.
    fn difference(&self, written: &[&[u8]]) -> Option<String> {
        assert!(written.len() >= self.expected.len(), "{}: outputs", self.name);
        written.iter().zip(&self.expected).find_map(|(bytes, expected)| {
            let error = nmse(&decoded(bytes, expected.dtype), &expected.values);
            (error > expected.bound).then(|| format!("NMSE {error:.1e}"))
        })
    }

    /// The operands written by the program, or the first line that says why it ended otherwise: it refused, or a sanitizer
    /// ended it.
    fn run(&self, program: &Path, seed: u64) -> Result<Vec<Vec<u8>>, String> {
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
            return Err(without_addresses(
                &line.replace(&format!("{}: ", file.display()), ""),
            ));
        }
        let written = std::fs::read(folder.path().join("work.out")).unwrap();
        let mut rest = written.as_slice();
        let mut outputs = Vec::new();
        for operand in &self.recorded.operands {
            let (bytes, after) = rest.split_at(operand.len);
            if operand.written {
                outputs.push(bytes.to_vec());
            }
            rest = after;
        }
        Ok(outputs)
    }

    /// The program's input; tests/msl/runtime tells its format.
    fn file(&self, seed: u64) -> Vec<u8> {
        let mut file = b"MSLRUN1\0".to_vec();
        let word = |file: &mut Vec<u8>, value: usize| file.extend((value as u32).to_le_bytes());
        let long = |file: &mut Vec<u8>, value: usize| file.extend((value as u64).to_le_bytes());
        word(&mut file, self.recorded.operands.len());
        for operand in &self.recorded.operands {
            long(&mut file, operand.bytes.len());
            long(&mut file, operand.misalignment);
            file.extend(&operand.bytes);
        }
        word(&mut file, self.recorded.plan.launches.len());
        for launch in &self.recorded.plan.launches {
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
                        let len = self.recorded.operands.get(*operand).map_or(0, |found| found.len);
                        long(&mut file, len.saturating_sub(*offset));
                    }
                }
            }
        }
        file
    }
}

/// What a sanitizer says, without process and addresses, which differ from run to run.
fn without_addresses(line: &str) -> String {
    let line = line.replace(concat!(env!("CARGO_MANIFEST_DIR"), "/"), "");
    let line = line.split("ERROR: ").last().unwrap_or(&line).trim_start();
    let end = [" (pid=", " on address", " on unknown address", " 0x"]
        .iter()
        .filter_map(|sign| line.find(sign))
        .min();
    line[..end.unwrap_or(line.len())].to_string()
}

/// An operand in memory of its own, as far behind a multiple of 16 as where it was recorded.
struct Memory {
    words: Vec<u128>,
    start: usize,
    len: usize,
    written: bool,
}

impl Memory {
    fn of(recorded: &RecordedOperand) -> Self {
        let (start, len) = (recorded.misalignment, recorded.len);
        let mut padded = vec![0; (start + len).next_multiple_of(16)];
        padded[start..start + len].copy_from_slice(&recorded.bytes);
        let words = padded
            .as_chunks()
            .0
            .iter()
            .map(|chunk| u128::from_ne_bytes(*chunk));
        Self {
            words: words.collect(),
            start,
            len,
            written: recorded.written,
        }
    }

    fn operand(&mut self) -> Operand<'_> {
        // SAFETY: any bytes are a u128 and a u128 is any bytes; the slice is borrowed as the words are.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast::<u8>(), self.words.len() * 16)
        };
        let bytes = &mut bytes[self.start..self.start + self.len];
        if self.written {
            Operand::Write(bytes)
        } else {
            Operand::Read(bytes)
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: as above.
        let bytes =
            unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>(), self.words.len() * 16) };
        &bytes[self.start..self.start + self.len]
    }
}

fn decoded(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let two = |b: &[u8]| [b[0], b[1]];
    let value = |b: &[u8]| match dtype {
        DType::F16 => half::f16::from_le_bytes(two(b)).to_f32(),
        DType::BF16 => half::bf16::from_le_bytes(two(b)).to_f32(),
        DType::U8 => b[0].into(),
        DType::U32 => u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32,
        _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
    };
    bytes.chunks_exact(dtype.size_in_bytes()).map(value).collect()
}
