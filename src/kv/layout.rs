//! Where each number of a token lies in a pool.

use super::format::CacheFormat;
use super::hadamard;
use crate::{Error, Result};

const OP: &str = "kv-cache layout";

/// Tokens of a block where nobody says otherwise.
pub const TOKENS_PER_BLOCK: usize = 16;

/// Rows, and the sections of blocks, begin at multiples of so many bytes: a vector load.
const ALIGNMENT: usize = 16;

/// Elements that share a scale in FP8.
pub(super) const FP8_GROUP: usize = 128;

/// What the model keeps of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowKind {
    /// MLA: a latent and a rotary key, shared by all heads.
    Latent {
        /// Width of the latent.
        latent: usize,
        /// Width of the rotary key; may be 0.
        rope: usize,
    },
    /// Multi-head and grouped-query attention: a key and a value a head.
    Heads {
        /// Heads of keys and values.
        kv_heads: usize,
        /// Width of a key.
        key_dim: usize,
        /// Width of a value.
        value_dim: usize,
    },
}

/// How a vector's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Two bytes each, little-endian IEEE half precision.
    F16,
    /// Two bytes each, little-endian bfloat16.
    BF16,
    /// One E4M3 byte each; a little-endian F32 scale every 128, the last group of a vector may be shorter.
    Fp8,
    /// Half a byte each, E2M1, the even element in the low nibble; a scale every `group`, one byte, UE5M3.
    Fp4 {
        /// 16 or 32.
        group: usize,
    },
}

impl Encoding {
    /// Bytes of the codes of `width` elements.
    fn code_bytes(self, width: usize) -> Option<usize> {
        match self {
            Self::F16 | Self::BF16 => width.checked_mul(2),
            Self::Fp8 => Some(width),
            Self::Fp4 { .. } => Some(width / 2),
        }
    }

    /// Bytes of the scales of `width` elements.
    fn scale_bytes(self, width: usize) -> Option<usize> {
        match self {
            Self::F16 | Self::BF16 => Some(0),
            Self::Fp8 => width.div_ceil(FP8_GROUP).checked_mul(4),
            Self::Fp4 { group } => Some(width.div_ceil(group)),
        }
    }
}

/// One vector of every token: a latent, a rotary key, a head's key or value.
///
/// The codes of the token at offset `t` of a block begin `codes + t · code_stride` bytes after the block, its scales
/// `scales + t · scale_stride` bytes after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// How elements are stored.
    pub encoding: Encoding,
    /// Elements.
    pub width: usize,
    /// Where the codes of a block's first token begin.
    pub codes: usize,
    /// Bytes from one token's codes to the next token's.
    pub code_stride: usize,
    /// Where the scales of a block's first token begin; the encodings without scales have none there.
    pub scales: usize,
    /// Bytes from one token's scales to the next token's.
    pub scale_stride: usize,
}

impl Part {
    /// Bytes of a token's codes.
    pub fn code_bytes(&self) -> usize {
        self.encoding.code_bytes(self.width).unwrap_or(0)
    }

    /// Bytes of a token's scales.
    pub fn scale_bytes(&self) -> usize {
        self.encoding.scale_bytes(self.width).unwrap_or(0)
    }
}

/// Where the bytes of tokens lie in a pool, a slice of whole blocks: the one place that knows strides, for who writes
/// and who reads.
///
/// Token `slot`, `block · block_tokens + offset`, is the one at `offset` in the block that begins
/// `block · block_bytes()` bytes into the pool.
///
/// - **Latent**: a row a token, `slot · row_bytes()` bytes into the pool whatever the block: the latent's codes, its
///   scales, the rotary key; each of these at a multiple of 4, rows at multiples of 16. All heads read all of a row,
///   in one go.
/// - **Heads**: within a block head after head, of each the codes of all keys, the scales of all keys, the codes of
///   all values, the scales of all values. Attention works by head, a task being a head and a range of blocks: so a
///   task reads one run of bytes a block, and next to nothing of what other tasks read, which rows `[token][head]`
///   would have scattered in pieces of 64 to 80 bytes. Codes and scales lie apart because each is then aligned
///   without padding: an FP4 key of 128 has 64 bytes of codes and 8 of scales.
///
/// ```
/// use candle_mmfp4::kv::{CacheFormat, RowLayout};
///
/// let bytes = |format| RowLayout::latent(format, 512, 64).map(|layout| layout.row_bytes());
/// assert_eq!(bytes(CacheFormat::BF16)?, 1152);
/// assert_eq!(bytes(CacheFormat::Fp8)?, 656);
/// assert_eq!(bytes("fp4-16".parse()?)?, 416);
/// assert_eq!(bytes("fp4-32".parse()?)?, 400);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowLayout {
    format: CacheFormat,
    kind: RowKind,
    block_tokens: usize,
    row_bytes: usize,
    parts: Vec<Part>,
}

impl RowLayout {
    /// MLA's rows, in blocks of 16 tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] without a latent, for an FP4 latent that is no multiple of the group, or sizes beyond the
    /// machine's.
    pub fn latent(format: CacheFormat, latent: usize, rope: usize) -> Result<Self> {
        Self::new(format, RowKind::Latent { latent, rope }, TOKENS_PER_BLOCK)
    }

    /// Keys and values of heads, in blocks of 16 tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] without heads or widths, for an FP4 width that is no multiple of the group, or sizes
    /// beyond the machine's.
    pub fn heads(format: CacheFormat, kv_heads: usize, key_dim: usize, value_dim: usize) -> Result<Self> {
        let kind = RowKind::Heads {
            kv_heads,
            key_dim,
            value_dim,
        };
        Self::new(format, kind, TOKENS_PER_BLOCK)
    }

    /// Rows of this kind in blocks of `block_tokens` tokens, a multiple of 16.
    ///
    /// # Errors
    /// As [`latent`](Self::latent) and [`heads`](Self::heads); [`Error::Argument`] for blocks of another size.
    pub fn new(format: CacheFormat, kind: RowKind, block_tokens: usize) -> Result<Self> {
        if block_tokens == 0 || !block_tokens.is_multiple_of(ALIGNMENT) {
            let expected = format!("a multiple of {ALIGNMENT}");
            return Err(Error::argument(
                OP,
                "block_tokens",
                expected,
                block_tokens.to_string(),
            ));
        }
        let encoding = match format {
            CacheFormat::F16 => Encoding::F16,
            CacheFormat::BF16 => Encoding::BF16,
            CacheFormat::Fp8 => Encoding::Fp8,
            CacheFormat::Fp4 { group, .. } => Encoding::Fp4 {
                group: group.elements(),
            },
        };
        let check = |argument, width: usize| {
            let expected = match encoding {
                Encoding::Fp4 { group } if !width.is_multiple_of(group) => {
                    format!("a multiple of {group} for {format}; fp8 takes any width")
                }
                _ if width == 0 => "at least 1".into(),
                _ => return Ok(()),
            };
            Err(Error::argument(OP, argument, expected, width.to_string()))
        };
        let built = match kind {
            RowKind::Latent { latent, rope } => {
                check("latent", latent)?;
                rows(encoding, latent, rope)
            }
            RowKind::Heads {
                kv_heads,
                key_dim,
                value_dim,
            } => {
                check("key_dim", key_dim)?;
                check("value_dim", value_dim)?;
                if kv_heads == 0 {
                    return Err(Error::argument(OP, "kv_heads", "at least 1", "0"));
                }
                heads(encoding, kv_heads, [key_dim, value_dim], block_tokens)
            }
        };
        let fits = |(row_bytes, _): &(usize, Vec<Part>)| row_bytes.checked_mul(block_tokens).is_some();
        let Some((row_bytes, parts)) = built.filter(fits) else {
            let found = format!("{kind:?} in blocks of {block_tokens}");
            return Err(Error::argument(OP, "kind", "sizes within the machine's", found));
        };
        Ok(Self {
            format,
            kind,
            block_tokens,
            row_bytes,
            parts,
        })
    }

    /// The format.
    pub fn format(&self) -> CacheFormat {
        self.format
    }

    /// What is kept of a token.
    pub fn kind(&self) -> RowKind {
        self.kind
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Bytes of a token; for [`RowKind::Latent`] also from one row to the next.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.row_bytes * self.block_tokens
    }

    /// Numbers of a token.
    pub fn width(&self) -> usize {
        self.parts.iter().map(|part| part.width).sum()
    }

    /// The vectors of a token, in the order of its numbers: the latent and, unless it has no width, the rotary key;
    /// or the keys of all heads and then the values of all heads.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The block in which vectors of this width are stored [rotated](hadamard), where the format has them so. Rotary
    /// keys never are.
    pub fn rotation(&self, width: usize) -> Option<usize> {
        matches!(self.format, CacheFormat::Fp4 { rotate: true, .. }).then(|| hadamard::block(width))
    }

    /// Where the codes and the scales of a token's vector begin in a pool.
    ///
    /// Pools hold all bytes of all their slots: for a slot of one, these are positions in it.
    #[inline]
    pub fn place(&self, part: &Part, slot: u32) -> (usize, usize) {
        let slot = slot as usize;
        let (block, offset) = (slot / self.block_tokens, slot % self.block_tokens);
        let start = block * self.block_bytes();
        (
            start + part.codes + offset * part.code_stride,
            start + part.scales + offset * part.scale_stride,
        )
    }

    /// Bytes of a pool of so many blocks.
    ///
    /// # Errors
    /// [`Error::Argument`] where slots would not be u32, or bytes beyond the machine's.
    pub fn pool_bytes(&self, blocks: usize) -> Result<usize> {
        let slots = blocks.checked_mul(self.block_tokens);
        let bytes = blocks.checked_mul(self.block_bytes());
        match (slots, bytes) {
            // The largest slot is one less; u32::MAX itself stands for none.
            (Some(slots), Some(bytes)) if slots <= u32::MAX as usize => Ok(bytes),
            _ => {
                let expected = format!("at most {} slots, in blocks of {}", u32::MAX, self.block_tokens);
                Err(Error::argument(OP, "blocks", expected, blocks.to_string()))
            }
        }
    }
}

/// A row a token; gives its bytes.
fn rows(encoding: Encoding, latent: usize, rope: usize) -> Option<(usize, Vec<Part>)> {
    let scales = encoding.code_bytes(latent)?.checked_next_multiple_of(4)?;
    let rotary = scales
        .checked_add(encoding.scale_bytes(latent)?)?
        .checked_next_multiple_of(4)?;
    let of_rotary = match encoding {
        Encoding::F16 => Encoding::F16,
        _ => Encoding::BF16,
    };
    let end = rotary.checked_add(of_rotary.code_bytes(rope)?)?;
    let row = end.checked_next_multiple_of(ALIGNMENT)?;
    let part = |encoding, width, codes, scales| Part {
        encoding,
        width,
        codes,
        code_stride: row,
        scales,
        scale_stride: row,
    };
    let mut parts = vec![part(encoding, latent, 0, scales)];
    if rope > 0 {
        parts.push(part(of_rotary, rope, rotary, end));
    }
    Some((row, parts))
}

/// Head after head, of each keys and values; gives the bytes of a token.
fn heads(
    encoding: Encoding,
    kv_heads: usize,
    widths: [usize; 2],
    block: usize,
) -> Option<(usize, Vec<Part>)> {
    let mut of_head = 0usize;
    let mut first = Vec::with_capacity(2);
    for width in widths {
        let (code_stride, scale_stride) = (encoding.code_bytes(width)?, encoding.scale_bytes(width)?);
        let scales = of_head.checked_add(code_stride.checked_mul(block)?)?;
        first.push(Part {
            encoding,
            width,
            codes: of_head,
            code_stride,
            scales,
            scale_stride,
        });
        of_head = scales.checked_add(scale_stride.checked_mul(block)?)?;
    }
    // Everything before this holds `block` vectors, and `block` is a multiple of the alignment.
    let total = of_head.checked_mul(kv_heads)?;
    let mut parts = Vec::new();
    parts.try_reserve_exact(kv_heads.checked_mul(2)?).ok()?;
    for part in first {
        for head in 0..kv_heads {
            parts.push(Part {
                codes: part.codes + head * of_head,
                scales: part.scales + head * of_head,
                ..part
            });
        }
    }
    Some((total / block, parts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::ScaleGroup;

    const FP4: [CacheFormat; 2] = [
        CacheFormat::Fp4 {
            group: ScaleGroup::Sixteen,
            rotate: false,
        },
        CacheFormat::Fp4 {
            group: ScaleGroup::ThirtyTwo,
            rotate: true,
        },
    ];

    #[test]
    fn kv_rows_of_latents_lie_as_documented() {
        let layout = RowLayout::latent(CacheFormat::Fp8, 512, 64).unwrap();
        let [latent, rope] = layout.parts() else {
            panic!("two parts");
        };
        assert_eq!((latent.codes, latent.scales, rope.codes), (0, 512, 528));
        assert_eq!((layout.row_bytes(), layout.width()), (656, 576));
        assert_eq!(rope.encoding, Encoding::BF16);
        assert_eq!(layout.place(rope, 35), (35 * 656 + 528, 35 * 656 + 528 + 128));
        for (format, scales, rope, row) in [(FP4[0], 256, 288, 416), (FP4[1], 256, 272, 400)] {
            let layout = RowLayout::latent(format, 512, 64).unwrap();
            let parts = layout.parts();
            assert_eq!(
                (parts[0].scales, parts[1].codes, layout.row_bytes()),
                (scales, rope, row)
            );
        }
        assert_eq!(
            RowLayout::latent(FP4[1], 512, 64).unwrap().rotation(512),
            Some(64)
        );
        assert_eq!(RowLayout::latent(FP4[0], 512, 64).unwrap().rotation(512), None);
        // The demo model's, an odd one and one without a rotary key.
        let bytes = |format, latent, rope| RowLayout::latent(format, latent, rope).unwrap().row_bytes();
        assert_eq!(bytes(CacheFormat::F16, 128, 32), 320);
        assert_eq!(bytes(CacheFormat::Fp8, 128, 32), 208);
        assert_eq!(bytes(FP4[0], 128, 32), 144);
        assert_eq!(bytes(CacheFormat::Fp8, 131, 3), 160);
        assert_eq!(bytes(CacheFormat::BF16, 8, 0), 16);
        assert_eq!(
            RowLayout::latent(CacheFormat::BF16, 8, 0).unwrap().parts().len(),
            1
        );
    }

    /// Every byte of a block belongs to at most one vector, vectors stay within the block, and what is left over is
    /// only what rounding up explains.
    #[test]
    fn kv_no_byte_belongs_to_two_vectors() {
        let kinds = [
            RowKind::Latent {
                latent: 512,
                rope: 64,
            },
            RowKind::Latent { latent: 32, rope: 6 },
            RowKind::Heads {
                kv_heads: 3,
                key_dim: 96,
                value_dim: 64,
            },
            RowKind::Heads {
                kv_heads: 8,
                key_dim: 256,
                value_dim: 256,
            },
        ];
        for kind in kinds {
            for format in CacheFormat::ALL {
                for block in [16, 48] {
                    let layout = RowLayout::new(format, kind, block).unwrap();
                    let mut used = vec![0u8; 2 * layout.block_bytes()];
                    for slot in 0..2 * block as u32 {
                        for part in layout.parts() {
                            let (codes, scales) = layout.place(part, slot);
                            let of_codes = codes..codes + part.code_bytes();
                            used[of_codes].iter_mut().for_each(|n| *n += 1);
                            let of_scales = scales..scales + part.scale_bytes();
                            used[of_scales].iter_mut().for_each(|n| *n += 1);
                        }
                    }
                    assert!(used.iter().all(|n| *n <= 1), "{kind:?} {format}");
                    let unused = used.iter().filter(|n| **n == 0).count();
                    let spare = match kind {
                        RowKind::Latent { .. } => 15 * 2 * block,
                        RowKind::Heads { .. } => 0,
                    };
                    assert!(unused <= spare, "{kind:?} {format}: {unused}");
                }
            }
        }
    }

    #[test]
    fn kv_heads_lie_head_by_head() {
        let layout = RowLayout::heads(FP4[0], 8, 128, 128).unwrap();
        assert_eq!(layout.row_bytes(), 8 * 2 * 72);
        let (key, value) = (layout.parts()[1], layout.parts()[8 + 1]);
        assert_eq!((key.codes, key.scales), (16 * 144, 16 * 144 + 16 * 64));
        assert_eq!(value.codes, 16 * 144 + 16 * 72);
        let (codes, scales) = layout.place(&value, 16 * 5 + 3);
        assert_eq!(codes, 5 * layout.block_bytes() + value.codes + 3 * 64);
        assert_eq!(scales, 5 * layout.block_bytes() + value.scales + 3 * 8);
    }

    #[test]
    fn kv_layouts_that_cannot_be_are_refused() {
        let message = |layout: Result<RowLayout>| layout.unwrap_err().to_string();
        let text = message(RowLayout::latent(FP4[1], 48, 64));
        assert!(
            text.contains("`latent`") && text.contains("multiple of 32"),
            "{text}"
        );
        assert!(message(RowLayout::latent(CacheFormat::Fp8, 0, 64)).contains("`latent`"));
        assert!(message(RowLayout::heads(FP4[0], 2, 64, 40)).contains("`value_dim`"));
        assert!(message(RowLayout::heads(FP4[0], 0, 64, 64)).contains("`kv_heads`"));
        for format in CacheFormat::ALL {
            let huge = usize::MAX / 64 * 64;
            message(RowLayout::latent(format, huge, 64));
            message(RowLayout::latent(format, 64, huge));
            message(RowLayout::heads(format, huge, 64, 64));
            message(RowLayout::heads(format, 1, 64, huge));
        }
        let kind = RowKind::Latent { latent: 64, rope: 0 };
        for block in [0, 8, 24] {
            assert!(message(RowLayout::new(CacheFormat::F16, kind, block)).contains("`block_tokens`"));
        }
        let layout = RowLayout::latent(CacheFormat::F16, 512, 64).unwrap();
        assert_eq!(layout.pool_bytes(3).unwrap(), 3 * 16 * 1152);
        assert!(layout.pool_bytes(1 << 28).is_err() && layout.pool_bytes(usize::MAX).is_err());
        assert!(layout.pool_bytes((1 << 28) - 1).is_ok());
    }
}
