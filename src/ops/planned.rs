//! Ops as launch plans, and what runs them: a Mac's GPU, or (feature `msl-host`) the host, in place of the CPU's kernels.

use crate::fp4::Bytes;
use crate::metal::plan::Launch;
use crate::{Error, Result};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, MetalStorage, Shape, Storage, Tensor};
use std::cell::Cell;

/// What an op has a device run, and the plan's operands: first the bytes, then the op's inputs, the tensor that it
/// [writes into](into), the outputs, and memory between launches.
pub(super) struct Planned<'a, const N: usize> {
    pub launches: Vec<Launch>,
    /// Weights and tables, read where they lie.
    pub bytes: Vec<&'a Bytes>,
    pub outputs: [(Shape, DType); N],
    /// Sizes in bytes.
    pub scratch: Vec<usize>,
}

/// Whether ops of this device's tensors run launch plans.
pub(crate) fn runs_on(device: &Device) -> bool {
    #[cfg(msl_host)]
    if crate::metal::host::Host::current().is_some() {
        return true;
    }
    device.is_metal()
}

/// A tensor whose rows of the last `inner` dimensions lie as launch plans take them: itself wherever that does not matter.
pub(super) fn prepared(x: &Tensor, inner: usize) -> candle_core::Result<Tensor> {
    if runs_on(x.device()) && row_stride(x.layout(), inner).is_none() {
        return x.contiguous();
    }
    Ok(x.clone())
}

/// Elements from one row to the next, a row being the last `inner` dimensions, where rows lie one stride apart and a row's
/// elements together.
pub(super) fn row_stride(layout: &Layout, inner: usize) -> Option<usize> {
    let (dims, strides) = (layout.dims(), layout.stride());
    let leading = dims.len().checked_sub(inner)?;
    if *dims.last()? > 1 && *strides.last()? != 1 {
        return None;
    }
    let mut rows = dims[..leading]
        .iter()
        .zip(strides)
        .filter(|(dim, _)| **dim != 1)
        .rev();
    let Some((dim, stride)) = rows.next() else {
        // One row.
        return Some(dims[leading..].iter().product());
    };
    let mut expected = dim * stride;
    for (dim, stride) in rows {
        if *stride != expected {
            return None;
        }
        expected *= dim;
    }
    Some(*stride)
}

/// Runs an op of CPU tensors by Metal kernels, where those stand in for the CPU's (feature `msl-host`). `None`: the CPU is
/// to run it, because they do not, or because no kernel takes these operands, which is said once.
#[cfg(msl_host)]
pub(super) fn in_place_of_cpu<'a, const N: usize>(
    op: &'static str,
    inputs: &[&CpuStorage],
    plan: impl FnOnce() -> Result<Option<Planned<'a, N>>>,
) -> Result<Option<[(CpuStorage, Shape); N]>> {
    let Some(host) = crate::metal::host::Host::current() else {
        return Ok(None);
    };
    match plan()? {
        Some(planned) => super::host::run(&host, planned, inputs, None).map(Some),
        None => {
            super::host::name_once(&host, op, "for these operands");
            Ok(None)
        }
    }
}

/// Nothing stands in for the CPU's kernels here.
#[cfg(not(msl_host))]
pub(super) fn in_place_of_cpu<'a, const N: usize>(
    _op: &'static str,
    _inputs: &[&CpuStorage],
    _plan: impl FnOnce() -> Result<Option<Planned<'a, N>>>,
) -> Result<Option<[(CpuStorage, Shape); N]>> {
    Ok(None)
}

/// Runs an op of Metal tensors.
#[cfg(target_os = "macos")]
pub(super) fn on_metal<'a, const N: usize>(
    op: &'static str,
    inputs: &[&MetalStorage],
    plan: impl FnOnce() -> Result<Option<Planned<'a, N>>>,
) -> candle_core::Result<[(MetalStorage, Shape); N]> {
    match plan()? {
        Some(planned) => super::on_metal::run(op, planned, inputs, None),
        None => super::no_metal(op),
    }
}

/// There is no Metal here.
#[cfg(not(target_os = "macos"))]
pub(super) fn on_metal<'a, const N: usize>(
    op: &'static str,
    _inputs: &[&MetalStorage],
    _plan: impl FnOnce() -> Result<Option<Planned<'a, N>>>,
) -> candle_core::Result<[(MetalStorage, Shape); N]> {
    super::no_metal(op)
}

/// Runs an op that is no custom op of Candle's, having several outputs or many inputs. `None` as of [`in_place_of_cpu`].
pub(super) fn over<'a, const N: usize>(
    op: &'static str,
    inputs: &[&Tensor],
    plan: impl FnOnce() -> Result<Option<Planned<'a, N>>>,
) -> candle_core::Result<Option<[Tensor; N]>> {
    let held: Vec<_> = inputs.iter().map(|input| input.storage_and_layout()).collect();
    let (mut of_cpu, mut of_metal) = (Vec::new(), Vec::new());
    for (storage, _) in &held {
        match &**storage {
            Storage::Cpu(storage) => of_cpu.push(storage),
            Storage::Metal(storage) => of_metal.push(storage),
            Storage::Cuda(_) => return Ok(None),
        }
    }
    if of_cpu.len() == held.len() {
        let outputs = in_place_of_cpu(op, &of_cpu, plan)?;
        return Ok(outputs.map(|all| all.map(|(storage, shape)| tensor((Storage::Cpu(storage), shape)))));
    }
    if of_metal.len() == held.len() {
        let outputs = on_metal(op, &of_metal, plan)?;
        return Ok(Some(
            outputs.map(|(storage, shape)| tensor((Storage::Metal(storage), shape))),
        ));
    }
    Err(Error::argument(op, "inputs", "tensors of one device", "several").into())
}

fn tensor((storage, shape): (Storage, Shape)) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Runs an op that writes into a tensor that is there, and may have outputs besides. `None` where the CPU is to run it: as of
/// [`in_place_of_cpu`]. Where it fails before it runs, nothing is written.
///
/// Candle has the tensor for itself meanwhile: no input may share its memory.
pub(super) fn into<'a, const N: usize>(
    op: &'static str,
    inputs: &[&Tensor],
    written: &Tensor,
    plan: impl FnOnce() -> Result<Option<Planned<'a, N>>>,
) -> candle_core::Result<Option<[Tensor; N]>> {
    let device = written.device();
    if !runs_on(device) {
        return Ok(None);
    }
    if inputs.iter().any(|input| !input.device().same_device(device)) {
        return Err(Error::argument(op, "inputs", "tensors of one device", "several").into());
    }
    let Some(planned) = plan()? else {
        if device.is_metal() {
            return super::no_metal(op);
        }
        #[cfg(msl_host)]
        if let Some(host) = crate::metal::host::Host::current() {
            super::host::name_once(&host, op, "for these operands");
        }
        return Ok(None);
    };
    let held: Vec<_> = inputs.iter().map(|input| input.storage_and_layout()).collect();
    let call = Into {
        op,
        inputs: held.iter().map(|(storage, _)| &**storage).collect(),
        planned: Cell::new(Some(planned)),
        outputs: Cell::new(None),
    };
    written.inplace_op1(&call)?;
    Ok(call.outputs.into_inner().map(|all| all.map(tensor)))
}

/// A call of [`into`], as Candle runs it: once.
#[cfg_attr(
    not(any(msl_host, target_os = "macos")),
    allow(dead_code, reason = "nothing runs plans here")
)]
struct Into<'a, const N: usize> {
    op: &'static str,
    inputs: Vec<&'a Storage>,
    planned: Cell<Option<Planned<'a, N>>>,
    outputs: Cell<Option<[(Storage, Shape); N]>>,
}

impl<const N: usize> InplaceOp1 for Into<'_, N> {
    fn name(&self) -> &'static str {
        self.op
    }

    #[cfg(msl_host)]
    fn cpu_fwd(&self, written: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        let inputs = self.inputs.iter().filter_map(|input| match input {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        });
        if let (Some(host), Some(planned)) = (crate::metal::host::Host::current(), self.planned.take()) {
            let outputs = super::host::run(&host, planned, &inputs.collect::<Vec<_>>(), Some(written))?;
            let outputs = outputs.map(|(storage, shape)| (Storage::Cpu(storage), shape));
            self.outputs.set(Some(outputs));
        }
        Ok(())
    }

    #[cfg(not(msl_host))]
    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("{}: the CPU's own kernels are to run this", self.op)
    }

    #[cfg(target_os = "macos")]
    fn metal_fwd(&self, written: &mut MetalStorage, _: &Layout) -> candle_core::Result<()> {
        let inputs = self.inputs.iter().filter_map(|input| match input {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        });
        if let Some(planned) = self.planned.take() {
            let inputs: Vec<_> = inputs.collect();
            let outputs = super::on_metal::run(self.op, planned, &inputs, Some(written))?;
            let outputs = outputs.map(|(storage, shape)| (Storage::Metal(storage), shape));
            self.outputs.set(Some(outputs));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_one_stride_apart_are_found() {
        let stride = |x: &Tensor, inner: usize| row_stride(x.layout(), inner);
        let x = Tensor::zeros((2, 3, 4, 8), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(stride(&x, 1), Some(8));
        assert_eq!(stride(&x, 2), Some(32));
        assert_eq!(stride(&x.narrow(3, 2, 4).unwrap(), 1), Some(8));
        assert_eq!(stride(&x.narrow(1, 1, 2).unwrap(), 1), None);
        assert_eq!(
            stride(&x.narrow(0, 1, 1).unwrap().narrow(1, 1, 2).unwrap(), 1),
            Some(8)
        );
        assert_eq!(stride(&x.narrow(2, 0, 1).unwrap(), 1), Some(32));
        assert_eq!(stride(&x.t().unwrap(), 1), None);
        assert_eq!(
            stride(&Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap(), 1),
            Some(8)
        );
        assert_eq!(stride(&x.transpose(0, 1).unwrap(), 1), None);
    }
}
