//! Sums of activations.

use super::activations::{from_f32, to_f32};
use crate::Error;
use crate::cpu::{self, Executor};
use candle_core::{CpuStorage, CustomOp2, Layout, MetalStorage, Shape, Tensor};

const OP: &str = "mmfp4-add";

/// The sum of two tensors of one shape and dtype, in f32. Candle's own would wake threads of its own for a long prompt,
/// which then spin beside this crate's.
#[derive(Debug, Clone, Copy)]
pub struct Add;

impl Add {
    /// `a + b`, F32, F16 or BF16.
    ///
    /// # Errors
    /// Names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(&self, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
        a.apply_op2_no_bwd(b, self)
    }
}

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        super::without_kernel(OP);
        if a_layout.dims() != b_layout.dims() || std::mem::discriminant(a) != std::mem::discriminant(b) {
            let expected = format!("{:?} in the same dtype, as `a`", a_layout.dims());
            return Err(Error::argument(OP, "b", expected, format!("shape {:?}", b_layout.dims())).into());
        }
        let (left, right) = (to_f32(OP, "a", a, a_layout)?, to_f32(OP, "b", b, b_layout)?);
        let mut y = vec![0.0; left.len()];
        cpu::add(&*Executor::current()?, &left, &right, &mut y);
        Ok((from_f32(y, a), a_layout.shape().clone()))
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        super::no_metal(OP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn adds_what_fits_and_refuses_what_does_not() {
        let a = Tensor::arange(0f32, 6., &Device::Cpu)
            .unwrap()
            .reshape((2, 3))
            .unwrap();
        let turned = a.t().unwrap().contiguous().unwrap().t().unwrap();
        let sum = Add.forward(&a, &turned).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(sum, [[0., 2., 4.], [6., 8., 10.]]);
        for wrong in [
            a.t().unwrap(),
            a.to_dtype(DType::F16).unwrap(),
            a.narrow(0, 0, 1).unwrap(),
        ] {
            let error = Add.forward(&a, &wrong).unwrap_err().to_string();
            assert!(error.contains("`b`"), "{error}");
        }
    }
}
