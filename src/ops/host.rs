//! Ops of CPU tensors by Metal kernels (feature `msl-host`).

use super::products::Products;
use crate::metal::host::{Host, Operand};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Layout, Shape};
use half::{bf16, f16};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

/// The host that is to run this product; with weights that no kernel takes it is named once, and the CPU runs it.
pub(super) fn for_products<'a>(
    op: &'static str,
    products: Option<Products<'a>>,
) -> Option<(Arc<Host>, Products<'a>)> {
    let host = Host::current()?;
    if products.is_none() {
        name_once(op, "for weights that are not in FP4");
    }
    Some((host, products?))
}

/// Names an op that has no kernel, where kernels run.
pub(super) fn without_kernel(op: &'static str) {
    if Host::current().is_some() {
        name_once(op, "yet");
    }
}

fn name_once(op: &'static str, why: &str) {
    static NAMED: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    if NAMED.lock().is_ok_and(|mut named| named.insert(op)) {
        eprintln!("msl-host: no kernel for {op} {why}; it runs on the CPU");
    }
}

/// Runs products.
pub(super) fn products(
    host: &Host,
    products: &Products<'_>,
    x: &CpuStorage,
    layout: &Layout,
) -> Result<(CpuStorage, Shape)> {
    fn run<T: Copy>(
        host: &Host,
        products: &Products<'_>,
        x: &[T],
        (layout, dtype): (&Layout, DType),
        nothing: T,
    ) -> Result<(Vec<T>, Shape)> {
        let planned = products.plan(layout, dtype)?;
        let mut y = vec![nothing; planned.shape.elem_count()];
        for (plan, part) in planned.plans.iter().zip(products.parts()) {
            let mut operands = vec![
                Operand::Read(part.weight.codes()),
                Operand::Read(part.weight.scales()),
                Operand::Read(bytes_of(x)),
                Operand::Write(bytes_of_mut(&mut y)),
            ];
            operands.extend(part.bias.map(|bias| Operand::Read(bias)));
            host.run(plan, &mut operands)?;
        }
        Ok((y, planned.shape))
    }
    // What no kernel writes is NaN.
    match x {
        CpuStorage::F32(x) => {
            let (y, shape) = run(host, products, x, (layout, DType::F32), f32::NAN)?;
            Ok((CpuStorage::F32(y), shape))
        }
        CpuStorage::F16(x) => {
            let (y, shape) = run(host, products, x, (layout, DType::F16), f16::NAN)?;
            Ok((CpuStorage::F16(y), shape))
        }
        CpuStorage::BF16(x) => {
            let (y, shape) = run(host, products, x, (layout, DType::BF16), bf16::NAN)?;
            Ok((CpuStorage::BF16(y), shape))
        }
        _ => Err(Error::argument(
            "msl-host",
            "x",
            "F32, F16 or BF16",
            "another dtype",
        )),
    }
}

fn bytes_of<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: T is one of f32, f16 and bf16, whose bytes are all initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_of_mut<T: Copy>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are a value of these types.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
