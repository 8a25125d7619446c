//! Arguments of the kernels: `metal/args.h` declares the same structs and asserts the same size and offsets.

use std::mem::{offset_of, size_of};

/// What a kernel reads as it lies in memory, without gaps.
pub(super) trait Argument {
    /// Appends its bytes.
    fn put(&self, bytes: &mut Vec<u8>);

    /// Its bytes.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.put(&mut bytes);
        bytes
    }
}

impl Argument for u32 {
    fn put(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_ne_bytes());
    }
}

impl Argument for u64 {
    fn put(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_ne_bytes());
    }
}

impl Argument for f32 {
    fn put(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_ne_bytes());
    }
}

impl<T: Argument, const N: usize> Argument for [T; N] {
    fn put(&self, bytes: &mut Vec<u8>) {
        self.iter().for_each(|argument| argument.put(bytes));
    }
}

/// Declares structs, each with its size in bytes and where some of its fields are, as `metal/args.h` has them. None has gaps.
macro_rules! arguments {
    ($(
        $(#[$about:meta])*
        struct $name:ident($size:literal $(, $at:ident at $offset:literal)*) {
            $($field:ident: $type:ty,)*
        }
    )*) => {$(
        $(#[$about])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub(super) struct $name {
            $(pub $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            assert!($size == 0 $(+ size_of::<$type>())*);
            $(assert!(offset_of!($name, $at) == $offset);)*
        };

        impl Argument for $name {
            fn put(&self, bytes: &mut Vec<u8>) {
                $(self.$field.put(bytes);)*
            }
        }
    )*};
}

arguments! {
    /// A product with a weight, or with each head's rows of one.
    struct LinearArgs(52, x_row at 12, y_row at 20, weight_row at 28, factor at 36, second_n at 40, eps at 48) {
        m: u32,
        n: u32,
        k: u32,
        x_row: u32,
        x_head: u32,
        y_row: u32,
        y_head: u32,
        weight_row: u32,
        weight_head: u32,
        factor: f32,
        second_n: u32,
        second_factor: f32,
        eps: f32,
    }

    /// A product with a weight in floating point.
    struct DenseArgs(40, x_row at 12, weight_row at 28, second_n at 36) {
        m: u32,
        n: u32,
        k: u32,
        x_row: u32,
        x_head: u32,
        y_row: u32,
        y_head: u32,
        weight_row: u32,
        weight_head: u32,
        second_n: u32,
    }

    /// A product with what attention's parts come to.
    struct MergedArgs(32, splits at 16, factor at 28) {
        m: u32,
        n: u32,
        k: u32,
        heads: u32,
        splits: u32,
        weight_row: u32,
        weight_head: u32,
        factor: f32,
    }
}

arguments! {
    /// A norm of rows, of sums of rows with another operand's.
    struct NormArgs(16, eps at 12) {
        d: u32,
        x_row: u32,
        delta_row: u32,
        eps: f32,
    }

    /// A sum of rows.
    struct AddArgs(12, delta_row at 8) {
        d: u32,
        x_row: u32,
        delta_row: u32,
    }

    /// Rotary position embedding.
    struct RopeArgs(24, cos_row at 16) {
        heads: u32,
        pairs: u32,
        x_token: u32,
        x_head: u32,
        cos_row: u32,
        sin_row: u32,
    }

    /// What MLA keeps of a token, and its queries.
    struct LatentArgs(36, cos_row at 12, heads at 20, eps at 32) {
        latent: u32,
        pairs: u32,
        kv_row: u32,
        cos_row: u32,
        sin_row: u32,
        heads: u32,
        q_token: u32,
        q_head: u32,
        eps: f32,
    }
}

arguments! {
    /// The router of a mixture of experts.
    struct RouterArgs(36, x_row at 12, groups at 20, scaling at 32) {
        tokens: u32,
        experts: u32,
        d: u32,
        x_row: u32,
        top_k: u32,
        groups: u32,
        chosen_groups: u32,
        normalize: u32,
        scaling: f32,
    }

    /// A mixture of experts.
    struct MoeArgs(40, experts at 12, width at 24, tiles at 36) {
        tokens: u32,
        d: u32,
        x_row: u32,
        experts: u32,
        shared: u32,
        top_k: u32,
        width: u32,
        shared_width: u32,
        h_row: u32,
        tiles: u32,
    }

    /// Where an expert's weights are: bytes of codes and of scales of gate, up and down from the start of all; their factors.
    struct MoePlace(64, offsets at 0, factors at 48) {
        offsets: [[u64; 2]; 3],
        factors: [f32; 3],
        unused: u32,
    }
}

/// Bytes of a `MoeTile`, which kernels write and read.
pub(super) const MOE_TILE: usize = 12;

arguments! {
    /// Where a vector of each token lies in a pool.
    struct CachePart(32, width at 8, code_stride at 16, scale_stride at 24, head_bytes at 28) {
        block_bytes: u32,
        block_tokens: u32,
        width: u32,
        codes: u32,
        code_stride: u32,
        scales: u32,
        scale_stride: u32,
        head_bytes: u32,
    }

    /// What MLA keeps of a token, in a pool, and its queries.
    struct AppendLatentsArgs(100, key at 32, rows at 64) {
        latent: CachePart,
        key: CachePart,
        rows: LatentArgs,
    }

    /// Keys and values of heads, in a pool.
    struct AppendHeadsArgs(84, values at 32, heads at 64, value_head at 80) {
        keys: CachePart,
        values: CachePart,
        heads: u32,
        key_token: u32,
        key_head: u32,
        value_token: u32,
        value_head: u32,
    }

    /// Attention over a paged cache.
    struct PagedArgs(112, values at 32, tokens at 64, splits at 80, q_token at 92, score_factor at 108) {
        keys: CachePart,
        values: CachePart,
        tokens: u32,
        first: u32,
        heads: u32,
        together: u32,
        splits: u32,
        split_tokens: u32,
        window: u32,
        q_token: u32,
        q_head: u32,
        rotary_token: u32,
        rotary_head: u32,
        score_factor: f32,
    }

    /// Parts of attention that are merged.
    struct MergeArgs(8) {
        splits: u32,
        width: u32,
    }

    /// Tokens of a sequence, as numbers.
    struct GatherArgs(80, heads at 64) {
        keys: CachePart,
        values: CachePart,
        heads: u32,
        table: u32,
        first: u32,
        positions: u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of every kind of field: a number, an array of arrays, a struct in a struct.
    #[test]
    fn bytes_are_the_struct_in_memory() {
        let words: [u32; 25] = std::array::from_fn(|i| i as u32);
        // SAFETY: the struct is 25 words without gaps, of which any bits are a number.
        let args = unsafe { std::mem::transmute::<[u32; 25], AppendLatentsArgs>(words) };
        assert_eq!(args.bytes(), words.map(u32::to_ne_bytes).concat());
        let place = MoePlace {
            offsets: [[1, 2], [3, 1 << 40], [5, 6]],
            factors: [0.1, 0.2, 0.3],
            unused: 0,
        };
        // SAFETY: the struct is six numbers of eight bytes and four of four, without gaps.
        let bytes = unsafe { std::mem::transmute::<MoePlace, [u8; 64]>(place) };
        assert_eq!(place.bytes(), bytes);
    }
}
