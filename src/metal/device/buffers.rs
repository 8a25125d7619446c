//! Metal buffers over mapped memory, without a copy.

use super::OP;
use crate::fp4::Bytes;
use crate::metal::windows::Windows;
use crate::{Error, Result};
use block2::RcBlock;
use candle_core::MetalDevice;
use candle_metal_kernels::metal::Buffer;
use objc2_metal::{MTLDevice as _, MTLResourceOptions};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Pages of Apple Silicon.
const PAGE: usize = 16 << 10;

/// What a map carries: its buffers, a set for each device. They go when the map's last [`Bytes`] does.
#[derive(Default)]
struct OfMap(Mutex<Vec<OfDevice>>);

struct OfDevice {
    device: MetalDevice,
    windows: Windows,
    buffers: Vec<Arc<Buffer>>,
}

impl Drop for OfDevice {
    fn drop(&mut self) {
        // Without this Candle's residency set would keep them, and the map with them.
        self.device
            .unregister_buffers(self.buffers.iter().map(AsRef::as_ref));
    }
}

/// The buffer that holds these bytes, and where in it they begin.
pub(super) fn of(device: &MetalDevice, bytes: &Bytes) -> Result<(Arc<Buffer>, usize)> {
    let OfMap(sets) = bytes.attached(OfMap::default);
    let mut sets = sets.lock().unwrap_or_else(PoisonError::into_inner);
    let index = match sets.iter().position(|set| set.device.id() == device.id()) {
        Some(index) => index,
        None => {
            sets.push(wrap(device, bytes)?);
            sets.len() - 1
        }
    };
    let set = &sets[index];
    let range = bytes.offset()..bytes.offset() + bytes.len();
    let Some((window, offset)) = set.windows.find(range.clone()) else {
        let expected = format!("tensors of at most {} bytes", set.windows.largest());
        return Err(Error::argument(OP, "weight", expected, range.len().to_string()));
    };
    Ok((Arc::clone(&set.buffers[window]), offset))
}

/// Buffers over all of the map.
fn wrap(device: &MetalDevice, bytes: &Bytes) -> Result<OfDevice> {
    let raw = device.device().as_ref();
    let map = bytes.map();
    let windows = Windows::new(map.len(), raw.maxBufferLength(), PAGE);
    let buffers: Vec<_> = windows
        .ranges()
        .map(|range| {
            let start = map.as_ptr().wrapping_add(range.start).cast_mut();
            let Some(pointer) = NonNull::new(start.cast::<c_void>()) else {
                return Err(Error::argument(OP, "weight", "a map", "none"));
            };
            // The buffer holds the map for as long as the GPU holds the buffer.
            let held = Arc::clone(map);
            let release = RcBlock::new(move |_: NonNull<c_void>, _: usize| {
                let _ = &held;
            });
            // SAFETY: the range is of whole pages of a map that `release` keeps until the buffer is gone; the last page
            // is mapped to its end. Nobody writes: kernels are given it as an input only, the map is read-only.
            let buffer = unsafe {
                raw.newBufferWithBytesNoCopy_length_options_deallocator(
                    pointer,
                    range.len(),
                    MTLResourceOptions::StorageModeShared | MTLResourceOptions::HazardTrackingModeUntracked,
                    Some(&release),
                )
            };
            let Some(buffer) = buffer else {
                let expected = "a buffer over the mapped file";
                let found = format!("none for bytes {range:?}");
                return Err(Error::argument(OP, "weight", expected, found));
            };
            Ok(Arc::new(Buffer::new(buffer)))
        })
        .collect::<Result<_>>()?;
    device.register_buffers(buffers.iter().map(AsRef::as_ref));
    Ok(OfDevice {
        device: device.clone(),
        windows,
        buffers,
    })
}
