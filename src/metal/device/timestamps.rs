//! The GPU's own time of launch plans.
//!
//! Candle keeps its command buffers to itself. While timestamps are wanted, each plan therefore has a command buffer of
//! ours, with waits before and after it in place of the ordering that Candle's encoder gives.

use super::OP;
use crate::{Error, Result};
use candle_core::MetalDevice;
use candle_metal_kernels::metal::{CommandBuffer, ComputeCommandEncoder};
use objc2_metal::{MTLCommandBuffer as _, MTLCommandQueue as _};
use std::cell::Cell;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

thread_local! {
    /// Seconds since they were taken last; `None` while nobody wants them.
    static GPU: Cell<Option<f64>> = const { Cell::new(None) };
    /// What plans waited for Candle's queue since that was taken last.
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Lets plans that this thread runs be timed by the GPU, for as long as it lives.
#[derive(Debug)]
pub struct Timestamps(PhantomData<*const ()>);

impl Timestamps {
    /// From now on.
    pub fn start() -> Self {
        GPU.set(Some(0.0));
        WAITED.set(Duration::ZERO);
        Self(PhantomData)
    }

    /// The GPU's time for the plans since the last call: from the start to the end of their command buffers.
    pub fn take(&mut self) -> Duration {
        let seconds = GPU.replace(Some(0.0)).unwrap_or(0.0);
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    }

    /// What the plans since the last call waited, by the host's clock, for ops of Candle's that were still under way.
    pub fn take_waits(&mut self) -> Duration {
        WAITED.take()
    }
}

impl Drop for Timestamps {
    fn drop(&mut self) {
        GPU.set(None);
    }
}

pub(super) fn are_wanted() -> bool {
    GPU.get().is_some()
}

/// Runs what `dispatch` encodes, and adds its time.
pub(super) fn timed(
    device: &MetalDevice,
    dispatch: impl FnOnce(&ComputeCommandEncoder) -> Result<()>,
) -> Result<()> {
    // What the plan reads may still be under way in Candle's queue.
    let start = Instant::now();
    device.wait_until_completed()?;
    WAITED.set(WAITED.get() + start.elapsed());
    let failed = |found: String| Error::argument(OP, "timestamps", "a command buffer that completes", found);
    let queue = device
        .device()
        .new_command_queue()
        .map_err(|error| failed(error.to_string()))?;
    let buffer = queue.commandBuffer().ok_or_else(|| failed("none".into()))?;
    let buffer = CommandBuffer::new(buffer);
    let encoder = buffer.compute_command_encoder_no_fence();
    let encoded = dispatch(&encoder);
    // An encoder has to end, whatever came before.
    encoder.end_encoding();
    encoded?;
    buffer.commit();
    buffer.wait_until_completed();
    if let Some(error) = buffer.error() {
        return Err(failed(error.into_owned()));
    }
    let raw = buffer.as_ref();
    let seconds = raw.GPUEndTime() - raw.GPUStartTime();
    GPU.set(Some(GPU.get().unwrap_or(0.0) + seconds));
    Ok(())
}
