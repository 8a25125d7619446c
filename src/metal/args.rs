//! Arguments of the kernels: `metal/args.h` declares the same structs and asserts the same size and offsets.

use std::mem::{offset_of, size_of};

/// A product with a weight, or with each head's rows of one.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LinearArgs {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub x_row: u32,
    pub x_head: u32,
    pub y_row: u32,
    pub y_head: u32,
    pub weight_row: u32,
    pub weight_head: u32,
    pub factor: f32,
    pub second_n: u32,
    pub second_factor: f32,
    pub eps: f32,
}

const _: () = {
    assert!(size_of::<LinearArgs>() == 52);
    assert!(offset_of!(LinearArgs, x_row) == 12);
    assert!(offset_of!(LinearArgs, y_row) == 20);
    assert!(offset_of!(LinearArgs, weight_row) == 28);
    assert!(offset_of!(LinearArgs, factor) == 36);
    assert!(offset_of!(LinearArgs, second_n) == 40);
    assert!(offset_of!(LinearArgs, eps) == 48);
};

impl LinearArgs {
    /// As a kernel reads them. Every field is four bytes: there are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        let words = [
            self.m,
            self.n,
            self.k,
            self.x_row,
            self.x_head,
            self.y_row,
            self.y_head,
            self.weight_row,
            self.weight_head,
            self.factor.to_bits(),
            self.second_n,
            self.second_factor.to_bits(),
            self.eps.to_bits(),
        ];
        words.into_iter().flat_map(u32::to_ne_bytes).collect()
    }
}

/// A norm of rows, of sums of rows with another operand's.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NormArgs {
    pub d: u32,
    pub x_row: u32,
    pub delta_row: u32,
    pub eps: f32,
}

/// Rotary position embedding.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RopeArgs {
    pub heads: u32,
    pub pairs: u32,
    pub x_token: u32,
    pub x_head: u32,
    pub cos_row: u32,
    pub sin_row: u32,
}

/// What MLA keeps of a token, and its queries.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LatentArgs {
    pub latent: u32,
    pub pairs: u32,
    pub kv_row: u32,
    pub cos_row: u32,
    pub sin_row: u32,
    pub heads: u32,
    pub q_token: u32,
    pub q_head: u32,
    pub eps: f32,
}

/// A sum of rows.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct AddArgs {
    pub d: u32,
    pub x_row: u32,
    pub delta_row: u32,
}

/// A product with a weight in floating point.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct DenseArgs {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub x_row: u32,
    pub x_head: u32,
    pub y_row: u32,
    pub y_head: u32,
    pub weight_row: u32,
    pub weight_head: u32,
    pub second_n: u32,
}

const _: () = {
    assert!(size_of::<NormArgs>() == 16);
    assert!(offset_of!(NormArgs, eps) == 12);
    assert!(size_of::<RopeArgs>() == 24);
    assert!(offset_of!(RopeArgs, cos_row) == 16);
    assert!(size_of::<LatentArgs>() == 36);
    assert!(offset_of!(LatentArgs, cos_row) == 12);
    assert!(offset_of!(LatentArgs, heads) == 20);
    assert!(offset_of!(LatentArgs, eps) == 32);
    assert!(size_of::<AddArgs>() == 12);
    assert!(offset_of!(AddArgs, delta_row) == 8);
    assert!(size_of::<DenseArgs>() == 40);
    assert!(offset_of!(DenseArgs, x_row) == 12);
    assert!(offset_of!(DenseArgs, weight_row) == 28);
    assert!(offset_of!(DenseArgs, second_n) == 36);
};

/// Words as a kernel reads them.
fn words(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

impl NormArgs {
    /// As a kernel reads them. Every field is four bytes: there are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        words([self.d, self.x_row, self.delta_row, self.eps.to_bits()])
    }
}

impl RopeArgs {
    /// As a kernel reads them.
    pub fn bytes(&self) -> Vec<u8> {
        words([
            self.heads,
            self.pairs,
            self.x_token,
            self.x_head,
            self.cos_row,
            self.sin_row,
        ])
    }
}

impl LatentArgs {
    /// As a kernel reads them.
    pub fn bytes(&self) -> Vec<u8> {
        words([
            self.latent,
            self.pairs,
            self.kv_row,
            self.cos_row,
            self.sin_row,
            self.heads,
            self.q_token,
            self.q_head,
            self.eps.to_bits(),
        ])
    }
}

impl AddArgs {
    /// As a kernel reads them.
    pub fn bytes(&self) -> Vec<u8> {
        words([self.d, self.x_row, self.delta_row])
    }
}

impl DenseArgs {
    /// As a kernel reads them.
    pub fn bytes(&self) -> Vec<u8> {
        words([
            self.m,
            self.n,
            self.k,
            self.x_row,
            self.x_head,
            self.y_row,
            self.y_head,
            self.weight_row,
            self.weight_head,
            self.second_n,
        ])
    }
}

/// A product with what attention's parts come to.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct MergedArgs {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub heads: u32,
    pub splits: u32,
    pub weight_row: u32,
    pub weight_head: u32,
    pub factor: f32,
}

const _: () = {
    assert!(size_of::<MergedArgs>() == 32);
    assert!(offset_of!(MergedArgs, splits) == 16);
    assert!(offset_of!(MergedArgs, factor) == 28);
};

impl MergedArgs {
    /// As a kernel reads them. Every field is four bytes: there are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        words([
            self.m,
            self.n,
            self.k,
            self.heads,
            self.splits,
            self.weight_row,
            self.weight_head,
            self.factor.to_bits(),
        ])
    }
}

/// The router of a mixture of experts.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RouterArgs {
    pub tokens: u32,
    pub experts: u32,
    pub d: u32,
    pub x_row: u32,
    pub top_k: u32,
    pub groups: u32,
    pub chosen_groups: u32,
    pub normalize: u32,
    pub scaling: f32,
}

const _: () = {
    assert!(size_of::<RouterArgs>() == 36);
    assert!(offset_of!(RouterArgs, x_row) == 12);
    assert!(offset_of!(RouterArgs, groups) == 20);
    assert!(offset_of!(RouterArgs, scaling) == 32);
};

impl RouterArgs {
    /// As a kernel reads them. Every field is four bytes: there are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        let words = [
            self.tokens,
            self.experts,
            self.d,
            self.x_row,
            self.top_k,
            self.groups,
            self.chosen_groups,
            self.normalize,
            self.scaling.to_bits(),
        ];
        words.into_iter().flat_map(u32::to_ne_bytes).collect()
    }
}

/// A mixture of experts.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct MoeArgs {
    pub tokens: u32,
    pub d: u32,
    pub x_row: u32,
    pub experts: u32,
    pub shared: u32,
    pub top_k: u32,
    pub width: u32,
    pub shared_width: u32,
    pub h_row: u32,
    pub tiles: u32,
}

const _: () = {
    assert!(size_of::<MoeArgs>() == 40);
    assert!(offset_of!(MoeArgs, experts) == 12);
    assert!(offset_of!(MoeArgs, width) == 24);
    assert!(offset_of!(MoeArgs, tiles) == 36);
};

impl MoeArgs {
    /// As a kernel reads them. Every field is four bytes: there are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        let words = [
            self.tokens,
            self.d,
            self.x_row,
            self.experts,
            self.shared,
            self.top_k,
            self.width,
            self.shared_width,
            self.h_row,
            self.tiles,
        ];
        words.into_iter().flat_map(u32::to_ne_bytes).collect()
    }
}

/// Where an expert's weights are: bytes of gate, up and down from the start of all codes, and of all scales; their factors.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct MoePlace {
    /// Codes and scales of gate, up and down.
    pub offsets: [[u64; 2]; 3],
    pub factors: [f32; 3],
    pub unused: u32,
}

const _: () = {
    assert!(size_of::<MoePlace>() == 64);
    assert!(offset_of!(MoePlace, offsets) == 0);
    assert!(offset_of!(MoePlace, factors) == 48);
};

impl MoePlace {
    /// As a kernel reads it. There are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        let offsets = self
            .offsets
            .iter()
            .flatten()
            .flat_map(|offset| offset.to_ne_bytes());
        let factors = self.factors.iter().flat_map(|factor| factor.to_ne_bytes());
        offsets.chain(factors).chain(self.unused.to_ne_bytes()).collect()
    }
}

/// Where a vector of each token lies in a pool.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CachePart {
    pub block_bytes: u32,
    pub block_tokens: u32,
    pub width: u32,
    pub codes: u32,
    pub code_stride: u32,
    pub scales: u32,
    pub scale_stride: u32,
    pub head_bytes: u32,
}

const _: () = {
    assert!(size_of::<CachePart>() == 32);
    assert!(offset_of!(CachePart, width) == 8);
    assert!(offset_of!(CachePart, code_stride) == 16);
    assert!(offset_of!(CachePart, scale_stride) == 24);
    assert!(offset_of!(CachePart, head_bytes) == 28);
};

impl CachePart {
    /// As a kernel reads it, a part of other structs. Every field is four bytes: there are no gaps.
    pub fn words(&self) -> [u32; 8] {
        [
            self.block_bytes,
            self.block_tokens,
            self.width,
            self.codes,
            self.code_stride,
            self.scales,
            self.scale_stride,
            self.head_bytes,
        ]
    }
}

/// What MLA keeps of a token, in a pool, and its queries.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct AppendLatentsArgs {
    pub latent: CachePart,
    pub key: CachePart,
    pub rows: LatentArgs,
}

/// Keys and values of heads, in a pool.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AppendHeadsArgs {
    pub keys: CachePart,
    pub values: CachePart,
    pub heads: u32,
    pub key_token: u32,
    pub key_head: u32,
    pub value_token: u32,
    pub value_head: u32,
}

const _: () = {
    assert!(size_of::<AppendLatentsArgs>() == 100);
    assert!(offset_of!(AppendLatentsArgs, key) == 32);
    assert!(offset_of!(AppendLatentsArgs, rows) == 64);
    assert!(size_of::<AppendHeadsArgs>() == 84);
    assert!(offset_of!(AppendHeadsArgs, values) == 32);
    assert!(offset_of!(AppendHeadsArgs, heads) == 64);
    assert!(offset_of!(AppendHeadsArgs, value_head) == 80);
};

impl AppendLatentsArgs {
    /// As a kernel reads them. Every field is four bytes: there are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = words(self.latent.words().into_iter().chain(self.key.words()));
        bytes.extend(self.rows.bytes());
        bytes
    }
}

impl AppendHeadsArgs {
    /// As a kernel reads them. Every field is four bytes: there are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        let rest = [
            self.heads,
            self.key_token,
            self.key_head,
            self.value_token,
            self.value_head,
        ];
        words(
            self.keys
                .words()
                .into_iter()
                .chain(self.values.words())
                .chain(rest),
        )
    }
}

/// Attention over a paged cache.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PagedArgs {
    pub keys: CachePart,
    pub values: CachePart,
    pub tokens: u32,
    pub first: u32,
    pub heads: u32,
    pub together: u32,
    pub splits: u32,
    pub split_tokens: u32,
    pub window: u32,
    pub q_token: u32,
    pub q_head: u32,
    pub rotary_token: u32,
    pub rotary_head: u32,
    pub score_factor: f32,
}

/// Parts of attention that are merged.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct MergeArgs {
    pub splits: u32,
    pub width: u32,
}

/// Tokens of a sequence, as numbers.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct GatherArgs {
    pub keys: CachePart,
    pub values: CachePart,
    pub heads: u32,
    pub table: u32,
    pub first: u32,
    pub positions: u32,
}

const _: () = {
    assert!(size_of::<PagedArgs>() == 112);
    assert!(offset_of!(PagedArgs, values) == 32);
    assert!(offset_of!(PagedArgs, tokens) == 64);
    assert!(offset_of!(PagedArgs, splits) == 80);
    assert!(offset_of!(PagedArgs, q_token) == 92);
    assert!(offset_of!(PagedArgs, score_factor) == 108);
    assert!(size_of::<MergeArgs>() == 8);
    assert!(size_of::<GatherArgs>() == 80);
    assert!(offset_of!(GatherArgs, heads) == 64);
};

impl PagedArgs {
    /// As a kernel reads them. Every field is four bytes: there are no gaps.
    pub fn bytes(&self) -> Vec<u8> {
        let own = [
            self.tokens,
            self.first,
            self.heads,
            self.together,
            self.splits,
            self.split_tokens,
            self.window,
            self.q_token,
            self.q_head,
            self.rotary_token,
            self.rotary_head,
            self.score_factor.to_bits(),
        ];
        words(
            self.keys
                .words()
                .into_iter()
                .chain(self.values.words())
                .chain(own),
        )
    }
}

impl MergeArgs {
    /// As a kernel reads them.
    pub fn bytes(&self) -> Vec<u8> {
        words([self.splits, self.width])
    }
}

impl GatherArgs {
    /// As a kernel reads them.
    pub fn bytes(&self) -> Vec<u8> {
        let own = [self.heads, self.table, self.first, self.positions];
        words(
            self.keys
                .words()
                .into_iter()
                .chain(self.values.words())
                .chain(own),
        )
    }
}

/// Bytes of a `MoeTile`, which kernels write and read.
pub(super) const MOE_TILE: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_struct_in_memory() {
        let args = LinearArgs {
            m: 1,
            n: 2,
            k: 3,
            x_row: 4,
            x_head: 5,
            y_row: 6,
            y_head: 7,
            weight_row: 8,
            weight_head: 9,
            factor: 0.1,
            second_n: 10,
            second_factor: 0.2,
            eps: 1e-5,
        };
        // SAFETY: the struct is thirteen words without gaps.
        let words = unsafe { std::mem::transmute::<LinearArgs, [u8; 52]>(args) };
        assert_eq!(args.bytes(), words);
    }

    #[test]
    fn bytes_of_the_others_too() {
        let (norm, eps) = ([1, 2, 3, 0.1f32.to_bits()], 0.1);
        let args = NormArgs {
            d: 1,
            x_row: 2,
            delta_row: 3,
            eps,
        };
        // SAFETY: each struct is words without gaps, as many as its array.
        unsafe {
            assert_eq!(std::mem::transmute::<NormArgs, [u32; 4]>(args), norm);
            assert_eq!(args.bytes(), words(norm));
            let rope = std::mem::transmute::<[u32; 6], RopeArgs>([1, 2, 3, 4, 5, 6]);
            assert_eq!(rope.bytes(), words(1..=6));
            let latent = std::mem::transmute::<[u32; 9], LatentArgs>([1, 2, 3, 4, 5, 6, 7, 8, 9]);
            assert_eq!(latent.bytes(), words(1..=9));
            let add = std::mem::transmute::<[u32; 3], AddArgs>([1, 2, 3]);
            assert_eq!(add.bytes(), words(1..=3));
            let dense = std::mem::transmute::<[u32; 10], DenseArgs>([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
            assert_eq!(dense.bytes(), words(1..=10));
            let merged = std::mem::transmute::<[u32; 8], MergedArgs>([1, 2, 3, 4, 5, 6, 7, 8]);
            assert_eq!(merged.bytes(), words(1..=8));
            let part = std::mem::transmute::<[u32; 8], CachePart>([1, 2, 3, 4, 5, 6, 7, 8]);
            assert_eq!(part.words(), [1, 2, 3, 4, 5, 6, 7, 8]);
            let all: [u32; 25] = std::array::from_fn(|i| i as u32);
            assert_eq!(
                std::mem::transmute::<[u32; 25], AppendLatentsArgs>(all).bytes(),
                words(all)
            );
            let all: [u32; 21] = std::array::from_fn(|i| i as u32);
            assert_eq!(
                std::mem::transmute::<[u32; 21], AppendHeadsArgs>(all).bytes(),
                words(all)
            );
            let numbered: [u32; 28] = std::array::from_fn(|i| i as u32);
            let paged = std::mem::transmute::<[u32; 28], PagedArgs>(numbered);
            assert_eq!(paged.bytes(), words(0..28));
            let gather = std::mem::transmute::<[u32; 20], GatherArgs>(std::array::from_fn(|i| i as u32));
            assert_eq!(gather.bytes(), words(0..20));
            let merge = std::mem::transmute::<[u32; 2], MergeArgs>([1, 2]);
            assert_eq!(merge.bytes(), words(1..=2));
        }
    }

    #[test]
    fn bytes_of_a_mixture_are_its_structs_in_memory() {
        let place = MoePlace {
            offsets: [[1, 2], [3, 1 << 40], [5, 6]],
            factors: [0.1, 0.2, 0.3],
            unused: 0,
        };
        // SAFETY: the struct is six numbers of eight bytes and four of four, without gaps.
        let bytes = unsafe { std::mem::transmute::<MoePlace, [u8; 64]>(place) };
        assert_eq!(place.bytes(), bytes);
        let args = MoeArgs {
            tokens: 1,
            d: 2,
            x_row: 3,
            experts: 4,
            shared: 5,
            top_k: 6,
            width: 7,
            shared_width: 8,
            h_row: 9,
            tiles: 10,
        };
        // SAFETY: the struct is ten words without gaps.
        let bytes = unsafe { std::mem::transmute::<MoeArgs, [u8; 40]>(args) };
        assert_eq!(args.bytes(), bytes);
        let args = RouterArgs {
            tokens: 1,
            experts: 2,
            d: 3,
            x_row: 4,
            top_k: 5,
            groups: 6,
            chosen_groups: 7,
            normalize: 1,
            scaling: 1.8,
        };
        // SAFETY: the struct is nine words without gaps.
        let bytes = unsafe { std::mem::transmute::<RouterArgs, [u8; 36]>(args) };
        assert_eq!(args.bytes(), bytes);
    }
}
