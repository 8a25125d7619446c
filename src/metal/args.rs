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
}
