//! What kernels know of a paged cache's pool: `metal/cache.h`.

use super::args::CachePart;
use super::checked::narrow;
use super::plan::Constant;
use crate::Result;
use crate::kv::{Encoding, Part, RowKind, RowLayout};

/// The vectors of a token that a layout has: MLA's latent and rotary key, which has no width where there is none; or the
/// keys and the values of all heads.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for blocks beyond 32 bits.
pub(super) fn parts(op: &'static str, layout: &RowLayout) -> Result<[CachePart; 2]> {
    let parts = layout.parts();
    let block_bytes = narrow(op, "layout", layout.block_bytes())?;
    let block_tokens = narrow(op, "layout", layout.block_tokens())?;
    // What lies within a block is smaller than it is.
    let of = |part: &Part, head_bytes: usize| CachePart {
        block_bytes,
        block_tokens,
        width: part.width as u32,
        codes: part.codes as u32,
        code_stride: part.code_stride as u32,
        scales: part.scales as u32,
        scale_stride: part.scale_stride as u32,
        head_bytes: head_bytes as u32,
    };
    Ok(match layout.kind() {
        RowKind::Latent { .. } => {
            let latent = of(&parts[0], 0);
            let none = CachePart { width: 0, ..latent };
            [latent, parts.get(1).map_or(none, |key| of(key, 0))]
        }
        RowKind::Heads { kv_heads, .. } => {
            let head_bytes = match kv_heads {
                1 => 0,
                _ => parts[1].codes - parts[0].codes,
            };
            [&parts[0], &parts[kv_heads]].map(|part| of(part, head_bytes))
        }
    })
}

/// The constants of `metal/cache.h`.
pub(super) fn constants(layout: &RowLayout) -> [(u16, Constant); 3] {
    let first = &layout.parts()[0];
    let (encoding, group) = match first.encoding {
        Encoding::F16 => (0, 0),
        Encoding::BF16 => (1, 0),
        Encoding::Fp8 => (2, 128),
        Encoding::Fp4 { group } => (3, group as u16),
    };
    [
        (32, Constant::U16(encoding)),
        (33, Constant::U16(group)),
        (34, Constant::Bool(layout.rotation(first.width).is_some())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::CacheFormat;

    /// Where a kernel finds codes and scales, by the words that it is given.
    fn at(part: &CachePart, slot: u32, head: u32) -> (usize, usize) {
        let (block, offset) = (slot / part.block_tokens, slot % part.block_tokens);
        let start = block * part.block_bytes + head * part.head_bytes;
        let codes = start + part.codes + offset * part.code_stride;
        let scales = start + part.scales + offset * part.scale_stride;
        (codes as usize, scales as usize)
    }

    #[test]
    fn kernels_find_what_the_layout_places() {
        for format in CacheFormat::ALL {
            let layout = RowLayout::latent(format, 512, 64).unwrap();
            for (part, words) in layout.parts().iter().zip(parts("test", &layout).unwrap()) {
                assert_eq!(words.width as usize, part.width);
                for slot in [0, 5, 16, 37] {
                    assert_eq!(at(&words, slot, 0), layout.place(part, slot), "{format}");
                }
            }
            let [_, none] = parts("test", &RowLayout::latent(format, 64, 0).unwrap()).unwrap();
            assert_eq!(none.width, 0);
            for kv_heads in [1, 3] {
                let layout = RowLayout::heads(format, kv_heads, 96, 64).unwrap();
                let both = parts("test", &layout).unwrap();
                for (index, part) in layout.parts().iter().enumerate() {
                    let words = &both[index / kv_heads];
                    assert_eq!(words.width as usize, part.width);
                    let found = at(words, 37, (index % kv_heads) as u32);
                    assert_eq!(found, layout.place(part, 37), "{format}: {index}");
                }
            }
        }
    }

    #[test]
    fn constants_tell_how_vectors_are_stored() {
        let told = |format: &str| {
            let layout = RowLayout::latent(format.parse().unwrap(), 64, 0).unwrap();
            constants(&layout).map(|(_, constant)| constant)
        };
        use Constant::{Bool, U16};
        assert_eq!(told("f16"), [U16(0), U16(0), Bool(false)]);
        assert_eq!(told("bf16"), [U16(1), U16(0), Bool(false)]);
        assert_eq!(told("fp8"), [U16(2), U16(128), Bool(false)]);
        assert_eq!(told("fp4-16"), [U16(3), U16(16), Bool(false)]);
        assert_eq!(told("fp4-32-rotated"), [U16(3), U16(32), Bool(true)]);
    }
}
