//! GGUF's weights, under the names that [`gguf`](crate::checkpoint::gguf) gives them: FP4 blocks, repacked, and integer blocks.
//!
//! A block of 32 MXFP4 codes is its E8M0 scale and 16 bytes, byte j with code j below and code j + 16 above; one of 64 NVFP4
//! codes is four E4M3 scales without sign and 32 bytes, of which each scale's eight are alike with 8 in the place of 16
//! (`ggml-common.h`, llama.cpp's project).

use super::siblings::{Named, Siblings};
use super::{Layout, Reader};
use crate::Result;
use crate::checkpoint::gguf::{BLOCK_TYPES, MXFP4, NVFP4, Type};
use crate::checkpoint::safetensors::Checkpoint;
use crate::fp4::{BlockTensor, Bytes, Factor, Fp4Tensor, Parts, ScaleKind};
use rayon::prelude::*;
use safetensors::Dtype;

/// Elements of a block of k-quants, which rows have to be a multiple of.
pub(in crate::checkpoint) const K_BLOCK: usize = 256;

/// Whether some tensor of a checkpoint is in k-quants.
pub(in crate::checkpoint) fn has_k_quants(checkpoint: &Checkpoint) -> bool {
    let of_k = |(_, found): &&(_, Type)| found.block == K_BLOCK;
    let suffixes: Vec<_> = BLOCK_TYPES
        .iter()
        .filter(of_k)
        .map(|(_, found)| found.suffix)
        .collect();
    let mut tensors = checkpoint.tensors();
    tensors.any(|(name, _)| suffixes.iter().any(|suffix| name.ends_with(suffix)))
}

/// What reads a layer's FP4 blocks, if it has any.
pub(super) fn reader(siblings: &Siblings<'_>) -> Option<Reader> {
    if siblings.has(MXFP4.suffix) {
        Some(|siblings, shape| {
            let tensor = repacked(siblings, shape, &MXFP4, (32, 1), ScaleKind::E8M0)?;
            Ok((tensor, Layout::GgufMxfp4))
        })
    } else if siblings.has(NVFP4.suffix) {
        Some(|siblings, shape| {
            let tensor = repacked(siblings, shape, &NVFP4, (16, 4), ScaleKind::E4M3)?;
            Ok((tensor, Layout::GgufNvfp4))
        })
    } else {
        None
    }
}

/// A layer's weight in integer blocks, where it lies, if it is in any.
pub(super) fn integers(siblings: &Siblings<'_>, (n, k): (usize, usize)) -> Result<Option<BlockTensor>> {
    let mut known = BLOCK_TYPES.iter();
    let Some((kind, found)) = known.find(|(_, found)| siblings.has(found.suffix)) else {
        return Ok(None);
    };
    let Named { name, tensor } = blocks(siblings, (n, k), found)?;
    BlockTensor::new(&name, (n, k), *kind, tensor.bytes).map(Some)
}

/// The tensor of a layer's blocks, its shape that of a weight `[N, K]`.
fn blocks(siblings: &Siblings<'_>, (n, k): (usize, usize), found: &Type) -> Result<Named> {
    let named = siblings.get(found.suffix)?;
    // Of a GGUF file it is; another may use the name for anything.
    if named.tensor.dtype != Dtype::U8 {
        let problem = format!(
            "dtype {:?}; expected {}'s blocks in U8",
            named.tensor.dtype, found.name
        );
        return Err(named.problem(problem));
    }
    if !k.is_multiple_of(found.block) {
        let problem = format!(
            "K = {k} is not a multiple of {}'s block of {}",
            found.name, found.block
        );
        return Err(named.problem(problem));
    }
    named.expect_shape(&[n, k / found.block * found.size])?;
    Ok(named)
}

/// An FP4 weight of blocks of so many `groups`, each block's scales before its codes.
fn repacked(
    siblings: &Siblings<'_>,
    (n, k): (usize, usize),
    found: &Type,
    (group, groups): (usize, usize),
    kind: ScaleKind,
) -> Result<Fp4Tensor> {
    let named = blocks(siblings, (n, k), found)?;
    let factor = match siblings.has("scale") {
        true => Factor::Mul(siblings.get("scale")?.factor(siblings.reading())?),
        false => Factor::None,
    };
    // What activations are quantised by, which here they are not.
    siblings.see("input_scale");
    let (bytes, row) = (&named.tensor.bytes, k / found.block * found.size);
    let signed = |block: &[u8]| block[..groups].iter().any(|scale| scale & 0x80 != 0);
    let unread = siblings.reading().headers_only;
    if !unread && kind == ScaleKind::E4M3 && bytes.par_chunks_exact(found.size).any(signed) {
        return Err(named.problem("a scale with a sign; expected E4M3 without one"));
    }
    // One map for both, the scales aligned as codes are.
    let (of_codes, of_scales) = (n * k / 2, n * k / group);
    let start = of_codes.next_multiple_of(16);
    let repack = |memory: &mut [u8]| {
        let (codes, scales) = memory.split_at_mut(start);
        let rows = codes[..of_codes]
            .par_chunks_exact_mut(k / 2)
            .zip(bytes.par_chunks_exact(row));
        rows.for_each(|(codes, row)| {
            let to = codes.chunks_exact_mut(found.block / 2);
            for (to, block) in to.zip(row.chunks_exact(found.size)) {
                let from = block[groups..].chunks_exact(group / 2);
                (to.chunks_exact_mut(group / 2).zip(from)).for_each(|(to, from)| in_order(from, to));
            }
        });
        let blocks = bytes.chunks_exact(found.size);
        for (to, block) in scales.chunks_exact_mut(groups).zip(blocks) {
            to.copy_from_slice(&block[..groups]);
        }
        Ok(())
    };
    let both = match unread {
        true => Bytes::unwritten(start + of_scales)?,
        false => Bytes::build(start + of_scales, repack)?,
    };
    let part = |range| (both.slice(range)).ok_or_else(|| named.problem("its blocks are larger than memory"));
    let parts = Parts {
        shape: (n, k),
        group,
        codes: part(0..of_codes)?,
        scales: part(start..start + of_scales)?,
        kind,
        factor,
    };
    super::together(siblings, &named, &named, parts)
}

/// A group's codes, the first half in low nibbles and the second in high ones, as codes of consecutive k.
#[inline]
fn in_order(from: &[u8], to: &mut [u8]) {
    let (first, second) = to.split_at_mut(from.len() / 2);
    let pairs = from.chunks_exact(2);
    for ((first, second), pair) in first.iter_mut().zip(second).zip(pairs) {
        *first = pair[0] & 15 | pair[1] << 4;
        *second = pair[0] >> 4 | pair[1] & 0xf0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_in_order() {
        // Byte j holds code j below and code j + 8 above, of a group of 16.
        let from: Vec<u8> = (0..8).map(|j| j | (j + 8) << 4).collect();
        let mut to = [0; 8];
        in_order(&from, &mut to);
        let codes: Vec<u8> = to.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect();
        assert_eq!(codes, (0..16).collect::<Vec<u8>>());
    }
}
