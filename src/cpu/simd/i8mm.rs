//! AArch64 with 8-bit matrix products (`smmla`): Apple from M2, Arm from Neoverse V1 and N2.
//!
//! One instruction multiplies two rows of eight bytes with two rows of eight: twice the work of a dot product. So
//! decoded blocks and activations lie two rows to a register here, the four even codes of a word before the four odd.

use super::neon::{self, Bits128};
use super::{Simd, TILE};
use crate::cpu::activations::{BLOCK, Block};
use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

pub(super) fn available() -> bool {
    neon::available() && is_aarch64_feature_detected!("i8mm")
}

type I8mm = Bits128<true>;

/// Words of eight codes in a block.
const WORDS: usize = BLOCK / 8;

/// Pairs of rows of activations that a tile product takes at most.
const PAIRS: usize = 3;

/// Adds the products of each of two rows of eight bytes with each of two: `a0·b0, a0·b1, a1·b0, a1·b1`.
#[inline(always)]
pub(super) unsafe fn product(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // Rust's intrinsic for it is not stable.
    // SAFETY: the instruction is the caller's promise.
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The 32-bit words of two registers in turn.
#[inline(always)]
pub(super) unsafe fn zip_words(even: int8x16_t, odd: int8x16_t) -> (int8x16_t, int8x16_t) {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        let (even, odd) = (vreinterpretq_s32_s8(even), vreinterpretq_s32_s8(odd));
        (
            vreinterpretq_s8_s32(vzip1q_s32(even, odd)),
            vreinterpretq_s8_s32(vzip2q_s32(even, odd)),
        )
    }
}

/// The lower and the upper halves of two registers.
#[inline(always)]
unsafe fn zip_halves(a: int8x16_t, b: int8x16_t) -> (int8x16_t, int8x16_t) {
    // SAFETY: the instructions are the caller's promise.
    unsafe {
        let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
        (
            vreinterpretq_s8_s64(vzip1q_s64(a, b)),
            vreinterpretq_s8_s64(vzip2q_s64(a, b)),
        )
    }
}

/// Two rows of activations, a register a word.
#[inline(always)]
unsafe fn pair(a: &Block, b: &Block) -> [int8x16_t; WORDS] {
    // SAFETY: the instructions are the caller's promise; a block has 64 even and 64 odd elements.
    unsafe {
        let mut words = [vdupq_n_s8(0); WORDS];
        for quarter in 0..4 {
            let at = 16 * quarter;
            let (a, a2) = zip_words(
                vld1q_s8(a.even.as_ptr().add(at)),
                vld1q_s8(a.odd.as_ptr().add(at)),
            );
            let (b, b2) = zip_words(
                vld1q_s8(b.even.as_ptr().add(at)),
                vld1q_s8(b.odd.as_ptr().add(at)),
            );
            (words[4 * quarter], words[4 * quarter + 1]) = zip_halves(a, b);
            (words[4 * quarter + 2], words[4 * quarter + 3]) = zip_halves(a2, b2);
        }
        words
    }
}

/// As [`blocks::tile`](super::blocks::tile), over blocks [arranged](Simd::arrange) two rows to a register.
#[inline(always)]
pub(super) unsafe fn tile<const NR: usize, const MR: usize>(
    codes: &[u8; TILE * BLOCK],
    scales: &[f32],
    group: usize,
    x: [&Block; MR],
    out: &mut [f32],
) {
    const { assert!(MR <= 2 * PAIRS) };
    let pairs = MR.div_ceil(2);
    let out = out[..MR * TILE].as_mut_ptr();
    let words = group / 8;
    // SAFETY: the instructions are the caller's promise. `codes` holds sets of four rows, two registers a word, of which
    // NR sets begin at row `first`; `out` has MR rows of 64.
    unsafe {
        let mut packed = [[vdupq_n_s8(0); WORDS]; PAIRS];
        for p in 0..pairs {
            // Of an odd number the last row is its own neighbour, whose sums go nowhere.
            packed[p] = pair(x[2 * p], x[(2 * p + 1).min(MR - 1)]);
        }
        for first in (0..TILE).step_by(NR * I8mm::LANES) {
            for (g, scales) in scales.chunks_exact(TILE).enumerate() {
                let codes = codes.as_ptr().add(first * BLOCK);
                let mut sums = [[[vdupq_n_s32(0); 2]; NR]; PAIRS];
                for word in g * words..(g + 1) * words {
                    for v in 0..NR {
                        for half in 0..2 {
                            let at = v * I8mm::LANES * BLOCK + (2 * word + half) * 16;
                            let weights = I8mm::load_bytes(codes.add(at));
                            for p in 0..pairs {
                                sums[p][v][half] = product(sums[p][v][half], packed[p][word], weights);
                            }
                        }
                    }
                }
                for i in 0..MR {
                    let step = I8mm::splat(x[i].scale);
                    for v in 0..NR {
                        let [low, high] = sums[i / 2][v];
                        let (low, high) = (vreinterpretq_s64_s32(low), vreinterpretq_s64_s32(high));
                        let whole = match i % 2 {
                            0 => vzip1q_s64(low, high),
                            _ => vzip2q_s64(low, high),
                        };
                        let column = first + v * I8mm::LANES;
                        let scale = I8mm::mul(I8mm::load(scales.as_ptr().add(column)), step);
                        let out = out.add(i * TILE + column);
                        let whole = I8mm::to_float(vreinterpretq_s32_s64(whole));
                        I8mm::store(out, I8mm::fma(whole, scale, I8mm::load(out)));
                    }
                }
            }
        }
    }
}

// Of 32 registers a product of four by six takes 24 for sums, three for activations, two for weights.
super::table::kernels!(I8mm, registers: 4, rows: 6, features: "neon,dotprod,i8mm");
