//! GGML's types of tensors: how large their blocks are, and what becomes of each here.

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

/// How a type lies in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::checkpoint) struct Type {
    /// What llama.cpp calls it.
    pub name: &'static str,
    /// Elements a block.
    pub block: usize,
    /// Bytes a block.
    pub size: usize,
    /// What follows a module's name where a tensor is in blocks; those of plain numbers have names of their own.
    pub suffix: &'static str,
}

const fn blocks(name: &'static str, block: usize, size: usize, suffix: &'static str) -> Type {
    Type {
        name,
        block,
        size,
        suffix,
    }
}

/// FP4 with a power of two every 32.
pub(in crate::checkpoint) const MXFP4: Type = blocks("MXFP4", 32, 17, "weight.mxfp4");
/// FP4 with an E4M3 every 16.
pub(in crate::checkpoint) const NVFP4: Type = blocks("NVFP4", 64, 36, "weight.nvfp4");

/// Integers that Candle has block types for.
pub(in crate::checkpoint) const BLOCK_TYPES: [(GgmlDType, Type); 10] = [
    (GgmlDType::Q4_0, blocks("Q4_0", 32, 18, "weight.q4_0")),
    (GgmlDType::Q4_1, blocks("Q4_1", 32, 20, "weight.q4_1")),
    (GgmlDType::Q5_0, blocks("Q5_0", 32, 22, "weight.q5_0")),
    (GgmlDType::Q5_1, blocks("Q5_1", 32, 24, "weight.q5_1")),
    (GgmlDType::Q8_0, blocks("Q8_0", 32, 34, "weight.q8_0")),
    (GgmlDType::Q2K, blocks("Q2_K", 256, 84, "weight.q2_k")),
    (GgmlDType::Q3K, blocks("Q3_K", 256, 110, "weight.q3_k")),
    (GgmlDType::Q4K, blocks("Q4_K", 256, 144, "weight.q4_k")),
    (GgmlDType::Q5K, blocks("Q5_K", 256, 176, "weight.q5_k")),
    (GgmlDType::Q6K, blocks("Q6_K", 256, 210, "weight.q6_k")),
];

/// What becomes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Numbers as safetensors have them too.
    Plain(Dtype),
    /// Blocks that a reader is for.
    Blocks(&'static str),
    /// Blocks without a reader.
    Other,
}

/// A type of the file format: its name, elements and bytes a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    pub name: &'static str,
    pub block: usize,
    pub size: usize,
    pub content: Content,
}

/// The type with this number; `None` where it is of a later date, or was taken back.
pub(super) fn of_id(id: u32) -> Option<Known> {
    let plain = |name, dtype: Dtype| Known {
        name,
        block: 1,
        size: dtype.bitsize() / 8,
        content: Content::Plain(dtype),
    };
    let other = |name, size| Known {
        name,
        block: 256,
        size,
        content: Content::Other,
    };
    let read = |found: &Type| Known {
        name: found.name,
        block: found.block,
        size: found.size,
        content: Content::Blocks(found.suffix),
    };
    let integers = |index: usize| read(&BLOCK_TYPES[index].1);
    Some(match id {
        0 => plain("F32", Dtype::F32),
        1 => plain("F16", Dtype::F16),
        2 => integers(0),
        3 => integers(1),
        6 => integers(2),
        7 => integers(3),
        8 => integers(4),
        9 => Known {
            block: 32,
            ..other("Q8_1", 36)
        },
        10 => integers(5),
        11 => integers(6),
        12 => integers(7),
        13 => integers(8),
        14 => integers(9),
        15 => other("Q8_K", 292),
        16 => other("IQ2_XXS", 66),
        17 => other("IQ2_XS", 74),
        18 => other("IQ3_XXS", 98),
        19 => other("IQ1_S", 50),
        20 => Known {
            block: 32,
            ..other("IQ4_NL", 18)
        },
        21 => other("IQ3_S", 110),
        22 => other("IQ2_S", 82),
        23 => other("IQ4_XS", 136),
        24 => plain("I8", Dtype::I8),
        25 => plain("I16", Dtype::I16),
        26 => plain("I32", Dtype::I32),
        27 => plain("I64", Dtype::I64),
        28 => plain("F64", Dtype::F64),
        29 => other("IQ1_M", 56),
        30 => plain("BF16", Dtype::BF16),
        34 => other("TQ1_0", 54),
        35 => other("TQ2_0", 66),
        39 => read(&MXFP4),
        40 => read(&NVFP4),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candle_has_blocks_of_these_sizes() {
        for (kind, found) in &BLOCK_TYPES {
            let candle = (kind.block_size(), kind.type_size());
            assert_eq!((found.block, found.size), candle, "{}", found.name);
            let same = (0..64).filter_map(of_id).filter(|known| known.name == found.name);
            assert_eq!(same.count(), 1, "{}", found.name);
        }
    }
}
