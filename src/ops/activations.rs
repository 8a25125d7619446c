//! Between Candle's CPU storage and slices of f32.

use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Layout, WithDType};
use half::{bf16, f16};
use std::borrow::Cow;

/// The elements of a float tensor in row-major order, in f32; contiguous f32 is not copied.
pub(super) fn to_f32<'a>(
    op: &'static str,
    argument: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Cow<'a, [f32]>> {
    match storage {
        CpuStorage::F32(values) => Ok(elements(values, layout)),
        CpuStorage::F16(values) => Ok(elements(values, layout).iter().map(|v| v.to_f32()).collect()),
        CpuStorage::BF16(values) => Ok(elements(values, layout).iter().map(|v| v.to_f32()).collect()),
        other => Err(Error::argument(
            op,
            argument,
            "F32, F16 or BF16",
            format!("{:?}", dtype(other)),
        )),
    }
}

/// The elements of a float tensor in f32, with strides; copied only where they are no f32 or a row's do not lie
/// together.
pub(super) struct View<'a> {
    pub data: Cow<'a, [f32]>,
    pub strides: Cow<'a, [usize]>,
}

pub(super) fn view<'a>(
    op: &'static str,
    argument: &'static str,
    storage: &'a CpuStorage,
    layout: &'a Layout,
) -> Result<View<'a>> {
    if let (CpuStorage::F32(values), Some(1)) = (storage, layout.stride().last()) {
        return Ok(View {
            data: Cow::Borrowed(&values[layout.start_offset()..]),
            strides: Cow::Borrowed(layout.stride()),
        });
    }
    Ok(View {
        data: to_f32(op, argument, storage, layout)?,
        strides: Cow::Owned(Layout::contiguous(layout.shape()).stride().to_vec()),
    })
}

/// The elements of a U32 tensor in row-major order.
pub(super) fn to_u32<'a>(
    op: &'static str,
    argument: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Cow<'a, [u32]>> {
    match storage {
        CpuStorage::U32(values) => Ok(elements(values, layout)),
        other => Err(Error::argument(
            op,
            argument,
            "U32",
            format!("{:?}", dtype(other)),
        )),
    }
}

/// A storage with these values, rounded to the dtype of `like`.
pub(super) fn from_f32(values: Vec<f32>, like: &CpuStorage) -> CpuStorage {
    match like {
        CpuStorage::F16(_) => CpuStorage::F16(values.into_iter().map(f16::from_f32).collect()),
        CpuStorage::BF16(_) => CpuStorage::BF16(values.into_iter().map(bf16::from_f32).collect()),
        _ => CpuStorage::F32(values),
    }
}

fn elements<'a, T: WithDType>(values: &'a [T], layout: &Layout) -> Cow<'a, [T]> {
    if let Some((start, end)) = layout.contiguous_offsets() {
        return Cow::Borrowed(&values[start..end]);
    }
    let mut offsets = vec![layout.start_offset()];
    for (dim, stride) in layout.dims().iter().zip(layout.stride()) {
        offsets = offsets
            .iter()
            .flat_map(|offset| (0..*dim).map(move |i| offset + i * stride))
            .collect();
    }
    offsets.into_iter().map(|offset| values[offset]).collect()
}

fn dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}
