//! ModelOpt's NVFP4 of a layer's experts that are one parameter: `experts.gate_up_proj`, gates first, and `experts.down_proj`,
//! each with `_weight_scale` and `_weight_scale_2` behind the name (`modelopt/torch/export`, NVIDIA's project).
//!
//! Most lie as their models multiply by them, transposed: U8 codes `[E, K/2, R]`, E4M3 scales `[E, K/16, R]`. Kernels here read
//! a row's codes one after the other, so these are repacked. Some lie as `[E, R, K/2]` and `[E, R, K/16]` and are used so.

use super::siblings::{Named, Packed, Siblings};
use super::{Layout, compressed};
use crate::Result;
use crate::checkpoint::safetensors::StoredTensor;
use crate::fp4::{Bytes, Factor, Fp4Tensor};
use rayon::prelude::*;
use safetensors::Dtype;
use std::ops::Range;

/// The weight `[N, K]` of an expert, of tensors that are [packed](Siblings::packed).
pub(super) fn read(siblings: &Siblings<'_>, (n, k): (usize, usize)) -> Result<(Fp4Tensor, Layout)> {
    let (codes, scales) = (siblings.get("weight")?, siblings.get("weight_scale")?);
    let Some(packed) = siblings.packed() else {
        return Err(codes.problem("it is no tensor of all experts"));
    };
    if codes.tensor.dtype != Dtype::U8 {
        let problem = format!(
            "dtype {:?}; of experts in one tensor only ModelOpt's NVFP4 is implemented, codes in U8",
            codes.tensor.dtype
        );
        return Err(codes.problem(problem));
    }
    if scales.tensor.dtype != Dtype::F8_E4M3 {
        let found = scales.tensor.dtype;
        return Err(scales.problem(format!(
            "dtype {found:?} beside codes in U8; expected F8_E4M3 (ModelOpt NVFP4)"
        )));
    }
    if !k.is_multiple_of(16) {
        return Err(codes.problem(format!("K = {k} is not a multiple of the group of 16")));
    }
    let place = Place::of(packed, (&codes, &scales), (n, k))?;
    let factor = siblings.get("weight_scale_2")?;
    let index = factor_of(packed, &factor, place.experts)?;
    let factor = Factor::Mul(factor.factor_at(index, siblings.reading())?);
    let (codes, scales) = (
        place.part(siblings, codes, k / 2)?,
        place.part(siblings, scales, k / 16)?,
    );
    // What activations are quantised by, which here they are not.
    siblings.see("input_scale");
    let layout = match place.is_turned {
        true => Layout::ModelOptPacked,
        false => Layout::ModelOpt,
    };
    let tensor = compressed::nvfp4(siblings, (&codes, &scales), (n, k), factor)?;
    Ok((tensor, layout))
}

/// Which part of the experts' tensors a matrix is.
struct Place {
    expert: usize,
    experts: usize,
    /// Of all rows of an expert those of the matrix.
    rows: Range<usize>,
    all_rows: usize,
    /// Whether rows lie as columns.
    is_turned: bool,
}

impl Place {
    fn of(packed: Packed, (codes, scales): (&Named, &Named), (n, k): (usize, usize)) -> Result<Self> {
        let rows = n * packed.half.map_or(1, |_| 2);
        let experts = codes.tensor.shape.first().copied().unwrap_or(0);
        let shapes = [codes, scales].map(|named| &named.tensor.shape[..]);
        // By the scales, the two ways to lie are never mistaken for each other.
        let is_turned = if shapes == [&[experts, k / 2, rows], &[experts, k / 16, rows]] {
            true
        } else if shapes == [&[experts, rows, k / 2], &[experts, rows, k / 16]] {
            false
        } else {
            return Err(scales.problem(format!(
                "shape {:?}, beside codes {:?}; expected [E, {}, {rows}] beside [E, {}, {rows}], or [E, {rows}, {}] beside \
                 [E, {rows}, {}]",
                shapes[1],
                shapes[0],
                k / 16,
                k / 2,
                k / 16,
                k / 2
            )));
        };
        if packed.expert >= experts {
            let problem = format!(
                "shape {:?}; expected more than {} experts",
                shapes[0], packed.expert
            );
            return Err(codes.problem(problem));
        }
        let first = packed.half.unwrap_or(0) * n;
        Ok(Self {
            expert: packed.expert,
            experts,
            rows: first..first + n,
            all_rows: rows,
            is_turned,
        })
    }

    /// The matrix of a tensor with `depth` bytes a row.
    fn part(&self, siblings: &Siblings<'_>, named: Named, depth: usize) -> Result<Named> {
        let (size, outside) = (self.all_rows * depth, || {
            named.problem("its data lies outside the file")
        });
        let expert = named
            .tensor
            .bytes
            .slice(self.expert * size..(self.expert + 1) * size);
        let expert = expert.ok_or_else(outside)?;
        let bytes = match self.is_turned {
            true if siblings.reading().headers_only => Bytes::unwritten(self.rows.len() * depth)?,
            true => turned(&expert, (depth, self.all_rows), self.rows.clone())?,
            false => {
                let rows = self.rows.start * depth..self.rows.end * depth;
                expert.slice(rows).ok_or_else(outside)?
            }
        };
        // Of rows that lie as columns the matrix's are spread over all of the expert's: it counts with its share of them.
        let share = expert.slice(self.rows.start * depth..self.rows.end * depth);
        siblings.give(&share.ok_or_else(outside)?);
        let shape = vec![self.rows.len(), depth];
        Ok(Named {
            tensor: StoredTensor {
                shape,
                bytes,
                ..named.tensor
            },
            name: named.name,
        })
    }
}

/// Which of the numbers multiplies the matrix: there is one for all experts, one an expert, one for gates and one for ups, or
/// both of each expert.
fn factor_of(packed: Packed, named: &Named, experts: usize) -> Result<usize> {
    let mut shape = &named.tensor.shape[..];
    while let [rest @ .., 1] = shape {
        shape = rest;
    }
    let index = match (shape, packed.half) {
        ([], _) => Some(0),
        // Of two experts' gates and ups: whose numbers two are is not said.
        ([2], Some(_)) if experts == 2 => None,
        ([2], Some(half)) => Some(half),
        ([of], _) if *of == experts => Some(packed.expert),
        ([of, 2], Some(half)) if *of == experts => Some(2 * packed.expert + half),
        _ => None,
    };
    index.ok_or_else(|| {
        let problem = format!(
            "shape {:?}; expected one number, or one for each of the {experts} experts, for gates and ups, or for each \
             expert's gate and up",
            named.tensor.shape
        );
        named.problem(problem)
    })
}

/// Some columns of a matrix of bytes `[depth, width]`, each as a row.
fn turned(bytes: &[u8], (depth, width): (usize, usize), columns: Range<usize>) -> Result<Bytes> {
    /// Columns at a time: as many as a line of the processor's cache has bytes.
    const BLOCK: usize = 64;
    Bytes::build(depth * columns.len(), |to| {
        let blocks = to.par_chunks_mut(BLOCK * depth).enumerate();
        blocks.for_each(|(block, to)| {
            let (first, count) = (columns.start + block * BLOCK, to.len() / depth);
            for (k, from) in bytes.chunks_exact(width).enumerate() {
                for (row, byte) in from[first..first + count].iter().enumerate() {
                    to[row * depth + k] = *byte;
                }
            }
        });
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_rows() {
        let (depth, width) = (5, 200);
        let bytes: Vec<u8> = (0..depth * width).map(|i| (i * 7 % 251) as u8).collect();
        for columns in [0..200, 3..4, 70..199] {
            let rows = turned(&bytes, (depth, width), columns.clone()).unwrap();
            let expected = columns.flat_map(|column| (0..depth).map(move |k| k * width + column));
            assert_eq!(rows.to_vec(), expected.map(|at| bytes[at]).collect::<Vec<_>>());
        }
    }
}
