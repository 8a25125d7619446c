//! Ops of Metal tensors by launch plans (macOS).

use super::products::Products;
use crate::metal::device::{Operand, run};
use candle_core::backend::BackendStorage;
use candle_core::{Layout, MetalStorage, Shape};

/// Runs products; without a kernel for them, an error.
pub(super) fn products(
    op: &str,
    products: Option<Products<'_>>,
    x: &MetalStorage,
    layout: &Layout,
) -> candle_core::Result<(MetalStorage, Shape)> {
    let Some(products) = products else {
        return super::no_metal(op);
    };
    let (device, dtype) = (x.device(), x.dtype());
    let planned = products.plan(layout, dtype)?;
    let count = planned.shape.elem_count();
    let y = device.new_buffer(count, dtype, op)?;
    for (plan, part) in planned.plans.iter().zip(products.parts()) {
        let mut operands = vec![
            Operand::Bytes(part.weight.codes()),
            Operand::Bytes(part.weight.scales()),
            Operand::Buffer(x.buffer()),
            Operand::Buffer(&y),
        ];
        operands.extend(part.bias.map(Operand::Bytes));
        run(device, plan, &operands)?;
    }
    Ok((MetalStorage::new(y, device.clone(), count, dtype), planned.shape))
}
