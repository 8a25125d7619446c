//! AArch64 with NEON and the dot product of signed bytes: Apple from M1, Arm from Cortex-A76 and Neoverse N1. With
//! 8-bit matrix products (see [`i8mm`](super::i8mm)) tile products take two rows by two; all else is the same.

use super::{Simd, TILE, blocks, i8mm, operations};
use crate::cpu::activations::{BLOCK, Block};
use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

pub(super) fn available() -> bool {
    is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")
}

/// Registers of 128 bits; `I8MM`: with 8-bit matrix products.
pub(super) struct Bits128<const I8MM: bool>;

type Neon = Bits128<false>;

/// Twice the value of each code.
const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The first four bytes, with their signs.
#[inline(always)]
unsafe fn widened(bytes: int8x16_t) -> int32x4_t {
    // SAFETY: the caller promises the instructions.
    unsafe { vmovl_s16(vget_low_s16(vmovl_s8(vget_low_s8(bytes)))) }
}

impl<const I8MM: bool> Simd for Bits128<I8MM> {
    const LANES: usize = 4;
    const BIASED: bool = false;
    type Int = int32x4_t;
    type Float = float32x4_t;
    type Bytes = int8x16_t;

    operations! {
        fn load_bytes(from: *const u8) -> int8x16_t { vld1q_s8(from.cast()) }
        fn store_bytes(to: *mut u8, bytes: int8x16_t) { vst1q_s8(to.cast(), bytes) }
        fn xor(a: int8x16_t, b: int8x16_t) -> int8x16_t { veorq_s8(a, b) }
        fn splat_bytes(bytes: i32) -> int8x16_t { vreinterpretq_s8_s32(vdupq_n_s32(bytes)) }

        fn lookup(codes: int8x16_t) -> (int8x16_t, int8x16_t) {
            let table = vld1q_s8(DOUBLED.as_ptr());
            let codes = vreinterpretq_u8_s8(codes);
            (
                vqtbl1q_s8(table, vandq_u8(codes, vdupq_n_u8(15))),
                vqtbl1q_s8(table, vshrq_n_u8::<4>(codes)),
            )
        }

        fn dot(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
            let mut sums = sums;
            // Rust's intrinsic for it is not stable.
            asm!(
                "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
                sums = inout(vreg) sums,
                codes = in(vreg) codes,
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
            sums
        }

        fn load_int(from: *const i32) -> int32x4_t { vld1q_s32(from) }
        fn splat_int(value: i32) -> int32x4_t { vdupq_n_s32(value) }
        fn add_int(a: int32x4_t, b: int32x4_t) -> int32x4_t { vaddq_s32(a, b) }
        fn to_float(values: int32x4_t) -> float32x4_t { vcvtq_f32_s32(values) }
        fn load(from: *const f32) -> float32x4_t { vld1q_f32(from) }
        fn store(to: *mut f32, values: float32x4_t) { vst1q_f32(to, values) }
        fn splat(value: f32) -> float32x4_t { vdupq_n_f32(value) }
        fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t { vmulq_f32(a, b) }
        fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t { vfmaq_f32(c, a, b) }
        fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t { vaddq_f32(a, b) }
        fn sum(values: float32x4_t) -> f32 { vaddvq_f32(values) }

        fn prefetch(from: *const u8) {
            // Rust's intrinsic for it is not stable.
            asm!("prfm pldl1keep, [{from}]", from = in(reg) from, options(nomem, nostack, preserves_flags))
        }

        /// Four rows of four words, four times.
        fn transpose(rows: &[*const u8], to: *mut u8) {
            for quarter in 0..4 {
                let mut a = [vdupq_n_s32(0); 4];
                for (a, row) in a.iter_mut().zip(rows) {
                    *a = vld1q_s32(row.add(16 * quarter).cast());
                }
                // Words 0 and 2, and words 1 and 3, of two rows.
                let even = [vtrn1q_s32(a[0], a[1]), vtrn1q_s32(a[2], a[3])];
                let odd = [vtrn2q_s32(a[0], a[1]), vtrn2q_s32(a[2], a[3])];
                for (word, [low, high]) in [even, odd].into_iter().enumerate() {
                    let (low, high) = (vreinterpretq_s64_s32(low), vreinterpretq_s64_s32(high));
                    let to = to.add(16 * (4 * quarter + word));
                    vst1q_s64(to.cast(), vtrn1q_s64(low, high));
                    vst1q_s64(to.add(2 * 16).cast(), vtrn2q_s64(low, high));
                }
            }
        }

        fn spread<const SHARE: usize>(from: *const f32) -> float32x4_t {
            match SHARE {
                2 => Self::splat_halves(*from, *from.add(1)),
                _ => vdupq_n_f32(*from),
            }
        }

        fn splat_halves(low: f32, high: f32) -> float32x4_t { vcombine_f32(vdup_n_f32(low), vdup_n_f32(high)) }

        fn values(codes: *const u8) -> (float32x4_t, float32x4_t) {
            let bytes = Self::splat_bytes(codes.cast::<i32>().read_unaligned());
            let (low, high) = Self::lookup(bytes);
            // To f32, and half of it.
            (
                vcvtq_n_f32_s32::<1>(widened(low)),
                vcvtq_n_f32_s32::<1>(widened(high)),
            )
        }

        fn signed(from: *const u8) -> float32x4_t {
            let bytes = Self::splat_bytes(from.cast::<i32>().read_unaligned());
            vcvtq_f32_s32(widened(bytes))
        }

        fn bf16(from: *const u8) -> (float32x4_t, float32x4_t) {
            let both = vld1q_u32(from.cast());
            (
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(both)),
                vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff_0000))),
            )
        }

        fn store_interleaved(to: *mut f32, even: float32x4_t, odd: float32x4_t) {
            vst1q_f32(to, vzip1q_f32(even, odd));
            vst1q_f32(to.add(4), vzip2q_f32(even, odd));
        }
    }

    #[inline(always)]
    unsafe fn arrange(even: int8x16_t, odd: int8x16_t) -> (int8x16_t, int8x16_t) {
        if I8MM {
            // SAFETY: the caller promises the instructions.
            unsafe { i8mm::zip_words(even, odd) }
        } else {
            (even, odd)
        }
    }

    #[inline(always)]
    unsafe fn tile<const NR: usize, const MR: usize>(
        codes: &[u8; TILE * BLOCK],
        scales: &[f32],
        group: usize,
        x: [&Block; MR],
        out: &mut [f32],
    ) {
        if I8MM {
            // SAFETY: the caller promises the instructions.
            unsafe { i8mm::tile::<NR, MR>(codes, scales, group, x, out) }
        } else {
            // SAFETY: the caller promises the instructions.
            unsafe { blocks::tile::<Self, NR, MR>(codes, scales, group, x, out) }
        }
    }

    const LANE_OPERATIONS: u64 = if I8MM { 16 } else { 8 };

    #[inline(always)]
    unsafe fn widest(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
        if I8MM {
            // SAFETY: the caller promises the instructions.
            unsafe { i8mm::product(sums, codes, x) }
        } else {
            // SAFETY: the caller promises the instructions.
            unsafe { Self::dot(sums, codes, x) }
        }
    }
}

// Of 32 registers a product of four by six takes 24 for sums, four for weights, one for an activation.
super::table::kernels!(Neon, registers: 4, rows: 6, features: "neon,dotprod");
