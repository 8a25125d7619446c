//! Ops of Metal tensors by launch plans (macOS).

use super::planned::Planned;
use crate::metal::device::{self, Operand};
use crate::metal::plan::Plan;
use candle_core::backend::BackendStorage;
use candle_core::{DType, MetalStorage, Shape};

/// Runs an op's plan on the device of its inputs; it may write into a tensor that is there.
pub(super) fn run<const N: usize>(
    op: &str,
    planned: Planned<'_, N>,
    inputs: &[&MetalStorage],
    written: Option<&mut MetalStorage>,
) -> candle_core::Result<[(MetalStorage, Shape); N]> {
    let Some(device) = inputs.first().map(|input| input.device()) else {
        candle_core::bail!("{op}: no inputs")
    };
    let Planned {
        launches,
        bytes,
        outputs,
        scratch,
    } = planned;
    let mut made = Vec::with_capacity(N + scratch.len());
    for (shape, dtype) in &outputs {
        made.push(device.new_buffer(shape.elem_count(), *dtype, op)?);
    }
    for size in scratch {
        made.push(device.new_buffer(size, DType::U8, op)?);
    }
    let mut operands: Vec<_> = bytes.into_iter().map(Operand::Bytes).collect();
    operands.extend(inputs.iter().map(|input| Operand::Buffer(input.buffer())));
    operands.extend(written.iter().map(|storage| Operand::Buffer(storage.buffer())));
    operands.extend(made.iter().map(|buffer| Operand::Buffer(buffer)));
    device::run(device, &Plan { launches }, &operands)?;
    let mut made = made.into_iter();
    let outputs = outputs.map(|(shape, dtype)| {
        let count = shape.elem_count();
        made.next()
            .map(|buffer| (MetalStorage::new(buffer, device.clone(), count, dtype), shape))
    });
    // As many buffers were made as there are outputs.
    let mut complete = Vec::with_capacity(N);
    complete.extend(outputs.into_iter().flatten());
    complete
        .try_into()
        .map_err(|_| candle_core::Error::Msg(format!("{op}: outputs without buffers")))
}
