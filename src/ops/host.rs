//! Ops of CPU tensors by Metal kernels (feature `msl-host`).

use super::planned::Planned;
use crate::metal::host::{Host, Operand};
use crate::metal::plan::Plan;
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Shape};
use half::{bf16, f16};

/// Names an op that the CPU runs although kernels stand in for it: there is none.
pub(super) fn without_kernel(op: &'static str) {
    if let Some(host) = Host::current() {
        name_once(&host, op, "yet");
    }
}

/// Counts an op that the CPU runs in the host's place, and says so the first time.
pub(super) fn name_once(host: &Host, op: &'static str, why: &str) {
    if host.runs_on_cpu(op) {
        eprintln!("msl-host: no kernel for {op} {why}; it runs on the CPU");
    }
}

/// Runs an op's plan, which may write into a tensor that is there.
pub(super) fn run<const N: usize>(
    host: &Host,
    planned: Planned<'_, N>,
    inputs: &[&CpuStorage],
    written: Option<&mut CpuStorage>,
) -> Result<[(CpuStorage, Shape); N]> {
    let Planned {
        launches,
        bytes,
        outputs,
        scratch,
    } = planned;
    for (_, dtype) in &outputs {
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::U32) {
            let found = format!("{dtype:?}");
            return Err(Error::argument("msl-host", "outputs", "floats or U32", found));
        }
    }
    let mut outputs = outputs.map(|(shape, dtype)| (unwritten(shape.elem_count(), dtype), shape));
    // As poisoned as outputs, and as aligned as a device's buffers.
    let mut scratch: Vec<_> = scratch
        .into_iter()
        .map(|size| vec![u64::MAX; size.div_ceil(size_of::<u64>())])
        .collect();
    let mut operands: Vec<_> = bytes.into_iter().map(|bytes| Operand::Read(bytes)).collect();
    for input in inputs {
        operands.push(Operand::Read(contents(input)?));
    }
    if let Some(storage) = written {
        operands.push(Operand::Write(contents_mut(storage)?));
    }
    for (storage, _) in &mut outputs {
        operands.push(Operand::Write(contents_mut(storage)?));
    }
    operands.extend(
        scratch
            .iter_mut()
            .map(|memory| Operand::Write(bytes_of_mut(memory))),
    );
    host.run(&Plan { launches }, &mut operands)?;
    Ok(outputs)
}

/// Memory of which no bit is a number: what no kernel writes stays visible.
fn unwritten(count: usize, dtype: DType) -> CpuStorage {
    match dtype {
        DType::F16 => CpuStorage::F16(vec![f16::NAN; count]),
        DType::BF16 => CpuStorage::BF16(vec![bf16::NAN; count]),
        DType::U32 => CpuStorage::U32(vec![u32::MAX; count]),
        _ => CpuStorage::F32(vec![f32::NAN; count]),
    }
}

fn contents(storage: &CpuStorage) -> Result<&[u8]> {
    match storage {
        CpuStorage::F32(values) => Ok(bytes_of(values)),
        CpuStorage::F16(values) => Ok(bytes_of(values)),
        CpuStorage::BF16(values) => Ok(bytes_of(values)),
        CpuStorage::U32(values) => Ok(bytes_of(values)),
        CpuStorage::U8(values) => Ok(values),
        _ => Err(no_kernel()),
    }
}

fn contents_mut(storage: &mut CpuStorage) -> Result<&mut [u8]> {
    match storage {
        CpuStorage::F32(values) => Ok(bytes_of_mut(values)),
        CpuStorage::F16(values) => Ok(bytes_of_mut(values)),
        CpuStorage::BF16(values) => Ok(bytes_of_mut(values)),
        CpuStorage::U32(values) => Ok(bytes_of_mut(values)),
        CpuStorage::U8(values) => Ok(values),
        _ => Err(no_kernel()),
    }
}

fn no_kernel() -> Error {
    Error::argument("msl-host", "inputs", "F32, F16, BF16, U32 or U8", "another dtype")
}

/// A number all of whose bytes are initialised, and of which any bytes are a value.
trait Number: Copy {}
impl Number for f32 {}
impl Number for f16 {}
impl Number for bf16 {}
impl Number for u32 {}
impl Number for u64 {}

fn bytes_of<T: Number>(values: &[T]) -> &[u8] {
    // SAFETY: a number's bytes are all initialised, and u8 has no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_of_mut<T: Number>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes written are a number.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
