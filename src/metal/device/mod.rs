//! Runs launch plans on Apple GPUs through Candle's Metal backend (macOS). Type-checked for the real target; not run yet.
//!
//! Candle's rules (candle-metal-kernels 0.11, `metal/commands.rs` and `metal/encoder.rs`): all ops share one concurrent
//! encoder, which puts a barrier before a dispatch only for buffers bound since the one before. So every buffer is bound
//! anew for each dispatch, outputs as outputs; and no Candle call is made while the encoder is held, whose lock it would
//! wait for.

mod buffers;
mod examine;
mod pipelines;
mod timestamps;

pub use examine::{Gpu, has_bfloat, has_simdgroup_matrices};
pub use timestamps::Timestamps;

use super::memory;
use super::plan::{Binding, Launch, Plan};
use crate::fp4::{Bytes, Format};
use crate::{Error, Result};
use candle_core::{DType, Device, MetalDevice};
use candle_metal_kernels::metal::{Buffer, ComputeCommandEncoder};
use objc2_metal::MTLSize;
use pipelines::Pipelines;
use std::sync::Arc;

const OP: &str = "metal";

/// A plan's operand.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a> {
    /// Bytes of a map, of which the device gets no copy.
    Bytes(&'a Bytes),
    /// A buffer of Candle's.
    Buffer(&'a Buffer),
}

/// A Metal device of Candle's.
///
/// # Errors
/// [`Error::Argument`] where there is none: Candle panics where no GPU is visible, as in some remote sessions, and on
/// macOS before 15.
pub fn open(ordinal: usize) -> Result<Device> {
    let explain = |found: String| {
        let expected = "a GPU that this session sees, and macOS 15 or newer";
        Error::argument(OP, "device", expected, found)
    };
    match std::panic::catch_unwind(|| Device::new_metal(ordinal)) {
        Ok(device) => device.map_err(|error| explain(error.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(explain(text.unwrap_or_else(|| "a panic in Candle".into())))
        }
    }
}

/// Compiles the kernels ahead of the first op, for weights of this format and activations of this dtype.
///
/// # Errors
/// [`Error::Argument`] with the compiler's message.
pub fn warm_up(device: &MetalDevice, format: Format, dtype: DType) -> Result<()> {
    for plan in super::every_kernel(format, dtype)? {
        plan.launches
            .iter()
            .try_for_each(|launch| compile(device, launch))?;
    }
    Ok(())
}

/// Compiles the kernel of a launch, unless that was done before.
///
/// # Errors
/// [`Error::Argument`] with the compiler's message.
pub fn compile(device: &MetalDevice, launch: &Launch) -> Result<()> {
    Pipelines::of(device.device())?.get(device.device(), launch)?;
    Ok(())
}

/// Checks that the device can hold `bytes`, of weights and of cache, together.
///
/// # Errors
/// [`Error::Argument`]; see [`memory::check`].
pub fn check_memory(device: &MetalDevice, bytes: u64) -> Result<()> {
    memory::check(bytes, device.device().recommended_max_working_set_size() as u64)
}

/// Encodes a plan. What it writes is there for whatever Candle encodes next.
///
/// # Errors
/// [`Error::Argument`] for a binding that names no operand, a kernel that does not compile, a map that no buffer can be
/// made over; [`Error::Candle`] for a command buffer that failed.
pub fn run(device: &MetalDevice, plan: &Plan, operands: &[Operand<'_>]) -> Result<()> {
    objc2::rc::autoreleasepool(|_| encode(device, plan, operands))
}

fn encode(device: &MetalDevice, plan: &Plan, operands: &[Operand<'_>]) -> Result<()> {
    // All that may call Candle or compile comes first.
    let pipelines = Pipelines::of(device.device())?;
    let ready: Vec<_> = plan
        .launches
        .iter()
        .map(|launch| pipelines.get(device.device(), launch))
        .collect::<Result<_>>()?;
    let buffers: Vec<(Arc<Buffer>, usize)> = operands
        .iter()
        .map(|operand| match operand {
            Operand::Bytes(bytes) => buffers::of(device, bytes),
            Operand::Buffer(buffer) => Ok((Arc::new((*buffer).clone()), 0)),
        })
        .collect::<Result<_>>()?;
    let operand = |index: usize, kernel: &str| {
        buffers.get(index).ok_or_else(|| {
            let expected = format!("an operand {index} for {kernel}");
            Error::argument(OP, "plan", expected, format!("{} operands", buffers.len()))
        })
    };
    let dispatch = |encoder: &ComputeCommandEncoder| {
        for (launch, pipeline) in plan.launches.iter().zip(&ready) {
            encoder.set_compute_pipeline_state(pipeline);
            for (index, binding) in &launch.bindings {
                match binding {
                    Binding::Read { operand: at, offset } => {
                        let (buffer, start) = operand(*at, &launch.kernel)?;
                        encoder.set_input_buffer(*index, Some(buffer.as_ref()), start + offset);
                    }
                    Binding::Write { operand: at, offset } => {
                        let (buffer, start) = operand(*at, &launch.kernel)?;
                        encoder.set_output_buffer(*index, Some(buffer.as_ref()), start + offset);
                    }
                    Binding::Bytes(bytes) => {
                        encoder.set_bytes_directly(*index, bytes.len(), bytes.as_ptr().cast());
                    }
                }
            }
            let size = |[width, height, depth]: [usize; 3]| MTLSize { width, height, depth };
            encoder.dispatch_thread_groups(size(launch.threadgroups), size(launch.threads));
        }
        Ok(())
    };
    if timestamps::are_wanted() {
        return timestamps::timed(device, dispatch);
    }
    let guard = device.command_encoder()?;
    dispatch(guard.as_ref())
}
