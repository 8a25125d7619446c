//! What a cache holds, as numbers.

use super::{OP, rotate};
use crate::cpu::Executor;
use crate::cpu::tile::SharedSlice;
use crate::kv::{RowLayout, hadamard};
use crate::{Error, Result};
use std::ops::Range;

/// Decodes the tokens at these positions of a sequence: `to` is `[positions, layout.width()]`, of each token the vectors of
/// [`RowLayout::parts`] one after the other, rotated back where they are stored rotated.
///
/// # Errors
/// [`Error::Argument`] where `table` is too short for the positions or names a block beyond the pool, or `to` is of another
/// length.
pub fn gather(
    executor: &Executor,
    layout: &RowLayout,
    pool: &[u8],
    table: &[u32],
    positions: Range<usize>,
    to: &mut [f32],
) -> Result<()> {
    let (tokens, bytes, width) = (layout.block_tokens(), layout.block_bytes(), layout.width());
    if positions.len().checked_mul(width) != Some(to.len()) {
        let expected = format!("[{}, {width}]", positions.len());
        return Err(Error::argument(OP, "to", expected, to.len().to_string()));
    }
    if positions.is_empty() {
        return Ok(());
    }
    let blocks = positions.start / tokens..positions.end.div_ceil(tokens);
    let Some(needed) = table.get(blocks.clone()) else {
        let expected = format!("{} blocks for {} tokens", blocks.end, positions.end);
        return Err(Error::argument(OP, "table", expected, table.len().to_string()));
    };
    let held = pool.len() / bytes;
    if let Some(block) = needed.iter().find(|block| **block as usize >= held) {
        let expected = format!("blocks below {held}, the pool's");
        return Err(Error::argument(OP, "table", expected, block.to_string()));
    }
    let to = SharedSlice::new(to);
    let decode = executor.kernels().paged.decode;
    executor.run(blocks.len(), |index| {
        let first = (blocks.start + index) * tokens;
        let block = &pool[needed[index] as usize * bytes..][..bytes];
        for position in first.max(positions.start)..(first + tokens).min(positions.end) {
            let start = (position - positions.start) * width;
            // SAFETY: this token's numbers are this task's alone.
            let mut rest = unsafe { to.part(start..start + width) };
            for (index, part) in layout.parts().iter().enumerate() {
                let (numbers, tail) = rest.split_at_mut(part.width);
                let place = position - first;
                let codes = &block[part.codes + place * part.code_stride..][..part.code_bytes()];
                let scales = &block[part.scales + place * part.scale_stride..][..part.scale_bytes()];
                // SAFETY: the executor has checked the instructions.
                unsafe { decode(part.encoding, codes, scales, numbers) };
                if is_rotated(layout, index) {
                    rotate(layout, numbers, hadamard::unrotate_whole);
                }
                rest = tail;
            }
        }
    });
    Ok(())
}

/// Whether vector `index` of a token is stored rotated, if any is: rotary keys are not.
fn is_rotated(layout: &RowLayout, index: usize) -> bool {
    !matches!(layout.kind(), crate::kv::RowKind::Latent { .. }) || index == 0
}
