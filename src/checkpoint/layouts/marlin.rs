//! Marlin's MMFP4 layout: U32 codes `[N, K/8]` as `.weight`, F16 scales `[N, K/group]` beside them.

use super::siblings::{Named, Siblings};
use super::{Layout, WORDS, together};
use crate::Result;
use crate::fp4::{Bytes, Factor, Fp4Tensor, GROUPS, Parts, ScaleKind};
use safetensors::Dtype;

/// The names that codes go by, the published one first.
pub(super) const CODES: [&str; 3] = ["weight", "qweight", "packed_weight"];

/// The names that scales go by, the published one first.
const SCALES: [&str; 2] = ["scales", "weight.scales"];

pub(super) fn read(siblings: &Siblings<'_>, (n, k): (usize, usize)) -> Result<(Fp4Tensor, Layout)> {
    let codes = CODES.into_iter().find(|name| siblings.is(name, WORDS));
    let codes = siblings.get(codes.unwrap_or(CODES[0]))?;
    if !k.is_multiple_of(8) {
        return Err(codes.problem(format!("packed codes, but K = {k} is not a multiple of 8")));
    }
    codes.expect_shape(&[n, k / 8])?;
    for rotated in ["hadamard_block_size", "weight.hadamard_block_size"] {
        if siblings.has(rotated) {
            let problem = "this weight was rotated by a Hadamard matrix, which is not implemented";
            return Err(siblings.get(rotated)?.problem(problem));
        }
    }
    let scales = SCALES.into_iter().find(|name| siblings.has(name));
    let scales = siblings.get(scales.unwrap_or(SCALES[0]))?;
    let kind = match scales.tensor.dtype {
        Dtype::F16 => ScaleKind::F16,
        Dtype::BF16 => ScaleKind::BF16,
        other => {
            return Err(scales.problem(format!("dtype {other:?}; expected F16 or BF16 scales")));
        }
    };
    for told in ["group_size", "weight.group_size", "weight_group_size"] {
        siblings.see(told);
    }
    let (group, bytes) = by_row(&scales, n, k)?;
    let parts = Parts {
        shape: (n, k),
        group,
        codes: codes.tensor.bytes.clone(),
        scales: bytes,
        kind,
        factor: Factor::None,
    };
    Ok((together(&codes, &scales, parts)?, Layout::Marlin))
}

/// The group, and scales `[N, K/group]`: as they lie or, where they are `[K/group, N]`, turned.
fn by_row(scales: &Named, n: usize, k: usize) -> Result<(usize, Bytes)> {
    let group_of = |groups: usize| (GROUPS.into_iter()).find(|group| group * groups == k);
    let (rows, columns) = match scales.tensor.shape[..] {
        [rows, columns] => (rows, columns),
        _ => (0, 0),
    };
    let ordinary = group_of(columns).filter(|_| rows == n);
    let turned = group_of(rows).filter(|_| columns == n);
    match (ordinary, turned) {
        (Some(_), Some(_)) => Err(scales.problem(format!(
            "shape {:?} is both [N, K/group] and [K/group, N] of a weight [{n}, {k}]; store it as [N, K/group] with a group \
             that tells them apart",
            scales.tensor.shape
        ))),
        (Some(group), None) => Ok((group, scales.tensor.bytes.clone())),
        (None, Some(group)) => Ok((group, turn(&scales.tensor.bytes, rows, columns)?)),
        (None, None) => Err(scales.problem(format!(
            "shape {:?}; expected [{n}, {k} / group], the group 16, 32, 64 or 128",
            scales.tensor.shape
        ))),
    }
}

/// Two-byte elements `[rows, columns]` as `[columns, rows]`.
fn turn(bytes: &[u8], rows: usize, columns: usize) -> Result<Bytes> {
    Bytes::build(bytes.len(), |to| {
        for (i, to) in to.chunks_exact_mut(2).enumerate() {
            let from = 2 * (i % rows * columns + i / rows);
            to.copy_from_slice(&bytes[from..from + 2]);
        }
        Ok(())
    })
}
