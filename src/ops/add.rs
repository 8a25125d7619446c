//! Sums of activations.

use super::activations::{from_f32, to_f32};
use super::planned::{self, Planned};
use super::rows::rows;
use crate::cpu::{self, Executor};
use crate::metal::norm_rope::{self, Rows};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, MetalStorage, Shape, Tensor};

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
        planned::prepared(a, 1)?.apply_op2_no_bwd(&planned::prepared(b, 1)?, self)
    }

    /// What a device runs.
    fn planned(
        self,
        (a, dtype): (&Layout, DType),
        (b, of_b): (&Layout, DType),
    ) -> Result<Option<Planned<'static, 1>>> {
        check(OP, ("b", "a"), (a, dtype), (b, of_b))?;
        let (count, d) = (a.shape().elem_count(), a.dims().last().copied().unwrap_or(1));
        let together = |layout: &Layout, operand| Rows {
            operand,
            offset: layout.start_offset() * dtype.size_in_bytes(),
            row: count,
        };
        let (rows_of, d) = match a.is_contiguous() && b.is_contiguous() {
            true => ([together(a, 0), together(b, 1)], count),
            false => ([rows(OP, "a", a, dtype, 0)?, rows(OP, "b", b, dtype, 1)?], d),
        };
        let launches = match count {
            0 => Vec::new(),
            _ => {
                let [a, b] = rows_of;
                let add = norm_rope::Add {
                    dtype,
                    rows: count / d,
                    d,
                    a,
                    b,
                    y: 2,
                };
                vec![add.launch()?]
            }
        };
        Ok(Some(Planned {
            launches,
            bytes: Vec::new(),
            outputs: [(a.shape().clone(), dtype)],
            scratch: Vec::new(),
        }))
    }
}

/// Refuses tensors of different shapes or dtypes; names the second, and the first in its words.
pub(super) fn check(
    op: &'static str,
    (name, first): (&'static str, &'static str),
    (a, of_a): (&Layout, DType),
    (b, of_b): (&Layout, DType),
) -> Result<()> {
    if a.dims() == b.dims() && of_a == of_b {
        return Ok(());
    }
    let expected = format!("{:?} in {of_a:?}, as `{first}`", a.dims());
    let found = format!("shape {:?} in {of_b:?}", b.dims());
    Err(Error::argument(op, name, expected, found))
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
        let plan = || self.planned((a_layout, a.dtype()), (b_layout, b.dtype()));
        if let Some([done]) = planned::in_place_of_cpu(OP, &[a, b], plan)? {
            return Ok(done);
        }
        check(OP, ("b", "a"), (a_layout, a.dtype()), (b_layout, b.dtype()))?;
        let (left, right) = (to_f32(OP, "a", a, a_layout)?, to_f32(OP, "b", b, b_layout)?);
        let mut y = vec![0.0; left.len()];
        cpu::add(&*Executor::current()?, &left, &right, &mut y);
        Ok((from_f32(y, a), a_layout.shape().clone()))
    }

    fn metal_fwd(
        &self,
        a: &MetalStorage,
        a_layout: &Layout,
        b: &MetalStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let plan = || self.planned((a_layout, a.dtype()), (b_layout, b.dtype()));
        let [done] = planned::on_metal(OP, &[a, b], plan)?;
        Ok(done)
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
