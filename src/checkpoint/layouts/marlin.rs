//! Marlin's MMFP4 layout: U32 codes `[N, K/8]` as `.weight`, F16 scales `[N, K/group]`, or `[K/group, N]`, beside them.

use super::rotation;
use super::siblings::{Named, Siblings};
use super::{Layout, WORDS, together};
use crate::Result;
use crate::fp4::{Bytes, Factor, Fp4Tensor, GROUPS, Parts, ScaleKind};
use safetensors::Dtype;

/// The names that codes go by, the published one first.
pub(super) const CODES: [&str; 3] = ["weight", "qweight", "packed_weight"];

/// The names that scales go by, the published one first.
const SCALES: [&str; 2] = ["scales", "weight.scales"];

const INSTEAD: &str = "take a checkpoint with [N, K/8], or the original in BF16 with --quantize mmfp4";

/// The names of the size of the blocks that a weight was rotated in.
const ROTATIONS: [&str; 2] = ["hadamard_block_size", "weight.hadamard_block_size"];

pub(super) fn read(siblings: &Siblings<'_>, (n, k): (usize, usize)) -> Result<(Fp4Tensor, Layout)> {
    let codes = CODES.into_iter().find(|name| siblings.is(name, WORDS));
    let codes = siblings.get(codes.unwrap_or(CODES[0]))?;
    if !k.is_multiple_of(8) {
        return Err(codes.problem(format!("packed codes, but K = {k} is not a multiple of 8")));
    }
    if codes.tensor.shape == [k / 8, n] && n != k / 8 {
        let problem = format!(
            "shape {:?}: codes of a column in one word (Metal Marlin's round-to-nearest writer), which is not implemented; \
             {INSTEAD}",
            codes.tensor.shape
        );
        return Err(codes.problem(problem));
    }
    codes.expect_shape(&[n, k / 8])?;
    check_rotation(siblings)?;
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
    let (group, layout) = orientation(&scales, (n, k), siblings.reading().layout)?;
    let as_they_lie = &scales.tensor.bytes;
    let bytes = match layout {
        Layout::MarlinTurned if siblings.reading().headers_only => Bytes::unwritten(as_they_lie.len())?,
        Layout::MarlinTurned => turn(as_they_lie, k / group, n)?,
        _ => as_they_lie.clone(),
    };
    let parts = Parts {
        shape: (n, k),
        group,
        codes: codes.tensor.bytes.clone(),
        scales: bytes,
        kind,
        factor: Factor::None,
    };
    Ok((together(siblings, &codes, &scales, parts)?, layout))
}

/// Refuses a weight that was rotated: activations would have to be, too.
fn check_rotation(siblings: &Siblings<'_>) -> Result<()> {
    for block in ROTATIONS {
        if !siblings.has(block) {
            continue;
        }
        let named = siblings.get(block)?;
        let size = named.integer()?;
        // A rotation of single values, or of none, changes nothing.
        if !(0..=1).contains(&size) {
            let problem = format!(
                "it is {size}: this weight was rotated by a Hadamard matrix in blocks of {size} inputs, which is not \
                 implemented; {}",
                rotation::INSTEAD
            );
            return Err(named.problem(problem));
        }
    }
    Ok(())
}

/// The group, and whether scales lie as `[N, K/group]` or the other way round; where shapes allow both, `named` decides.
fn orientation(scales: &Named, (n, k): (usize, usize), named: Option<Layout>) -> Result<(usize, Layout)> {
    let group_of = |groups: usize| (GROUPS.into_iter()).find(|group| group * groups == k);
    let (rows, columns) = match scales.tensor.shape[..] {
        [rows, columns] => (rows, columns),
        _ => (0, 0),
    };
    let ordinary = group_of(columns).filter(|_| rows == n);
    let turned = group_of(rows).filter(|_| columns == n);
    match (ordinary, turned, named) {
        (Some(group), None, _) | (Some(group), Some(_), Some(Layout::Marlin)) => Ok((group, Layout::Marlin)),
        // Of square codes, scales that lie the other way round mean that codes may do so too.
        (None, Some(_), None) if n == k / 8 => Err(scales.problem(format!(
            "shape {:?}, beside codes [{n}, {n}] that may lie as [N, K/8] or as [K/8, N]: if the former, say so with --layout {}",
            scales.tensor.shape,
            Layout::MarlinTurned.name()
        ))),
        (None, Some(group), _) | (Some(_), Some(group), Some(Layout::MarlinTurned)) => {
            Ok((group, Layout::MarlinTurned))
        }
        (Some(_), Some(_), _) => Err(scales.problem(format!(
            "shape {:?} is both [N, K/group] and [K/group, N] of a weight [{n}, {k}]: say which with --layout {} or --layout \
             {}",
            scales.tensor.shape,
            Layout::Marlin.name(),
            Layout::MarlinTurned.name()
        ))),
        (None, None, _) => Err(scales.problem(format!(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::safetensors::StoredTensor;

    #[test]
    fn square_codes_beside_turned_scales_have_to_be_named() {
        // [16, 128 / 8] is square; four groups of 32.
        let scales = Named {
            name: "m.scales".into(),
            tensor: StoredTensor {
                dtype: Dtype::F16,
                shape: vec![4, 16],
                bytes: Bytes::copy_from(&[0; 4 * 16 * 2]).unwrap(),
                file: "f.safetensors".into(),
            },
        };
        let error = orientation(&scales, (16, 128), None).unwrap_err().to_string();
        assert!(
            error.contains("`m.scales`") && error.contains("--layout marlin-turned"),
            "{error}"
        );
        let named = orientation(&scales, (16, 128), Some(Layout::MarlinTurned)).unwrap();
        assert_eq!(named, (32, Layout::MarlinTurned));
        // Of any other shape nothing is in doubt: [8, 16] scales of a weight [16, 256].
        let scales = Named {
            tensor: StoredTensor {
                shape: vec![8, 16],
                ..scales.tensor
            },
            ..scales
        };
        assert_eq!(
            orientation(&scales, (16, 256), None).unwrap(),
            (32, Layout::MarlinTurned)
        );
    }
}
