//! Memory of caches: as much as they were said to take.

use candle_core::{DType, Device, Shape, Tensor};

/// Zeros in a buffer of their own size. [`Tensor::zeros`] takes on Metal the next power of two, up to twice as many bytes as a
/// pool has, which nothing counts; a buffer made from the host's bytes is as long as these, which are there until it is made.
pub(super) fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    if device.is_cpu() {
        // Which the system gives page by page, as they are written to.
        return Tensor::zeros(shape, dtype, device);
    }
    uploaded(&shape.into(), dtype, device)
}

fn uploaded(shape: &Shape, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    let bytes = vec![0; shape.elem_count() * dtype.size_in_bytes()];
    Tensor::from_raw_buffer(&bytes, dtype, shape.dims(), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the CPU, as no other device is to be had by tests: which shape, dtype and numbers a device is given.
    #[test]
    fn what_a_device_is_given_is_zeros() {
        for dtype in [DType::U8, DType::F32, DType::F16, DType::BF16] {
            let found = uploaded(&(3, 5).into(), dtype, &Device::Cpu).unwrap();
            assert_eq!((found.dims(), found.dtype()), ([3, 5].as_slice(), dtype));
            let expected = zeros((3, 5), dtype, &Device::Cpu).unwrap();
            let numbers = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(numbers(&found), numbers(&expected));
            assert_eq!(numbers(&found), [[0.0; 5]; 3]);
        }
    }
}
