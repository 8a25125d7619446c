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
}

const _: () = {
    assert!(size_of::<LinearArgs>() == 40);
    assert!(offset_of!(LinearArgs, x_row) == 12);
    assert!(offset_of!(LinearArgs, y_row) == 20);
    assert!(offset_of!(LinearArgs, weight_row) == 28);
    assert!(offset_of!(LinearArgs, factor) == 36);
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
        ];
        words.into_iter().flat_map(u32::to_ne_bytes).collect()
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
        };
        // SAFETY: the struct is ten words without gaps.
        let words = unsafe { std::mem::transmute::<LinearArgs, [u8; 40]>(args) };
        assert_eq!(args.bytes(), words);
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
