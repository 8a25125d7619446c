//! Plain Rust, for processors without a set of their own, and as the slow and obvious one among the sets.

use super::Simd;
use crate::fp4::code;
use half::bf16;

pub(super) struct Portable;

const LANES: usize = 4;

impl Simd for Portable {
    const LANES: usize = LANES;
    const BIASED: bool = false;
    type Int = [i32; LANES];
    type Float = [f32; LANES];
    type Bytes = [i8; 4 * LANES];

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::Bytes>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, bytes: Self::Bytes) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::Bytes>().write_unaligned(bytes) }
    }

    #[inline(always)]
    unsafe fn xor(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        std::array::from_fn(|i| a[i] ^ b[i])
    }

    #[inline(always)]
    unsafe fn splat_bytes(bytes: i32) -> Self::Bytes {
        std::array::from_fn(|i| bytes.to_ne_bytes()[i % 4] as i8)
    }

    #[inline(always)]
    unsafe fn lookup(codes: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
        let doubled = |code: u8| (code::VALUES[usize::from(code)] * 2.0) as i8;
        (
            codes.map(|byte| doubled(byte as u8 & 15)),
            codes.map(|byte| doubled(byte as u8 >> 4)),
        )
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Int, codes: Self::Bytes, x: Self::Bytes) -> Self::Int {
        std::array::from_fn(|lane| {
            let products = (4 * lane..4 * lane + 4).map(|i| i32::from(codes[i]) * i32::from(x[i]));
            sums[lane] + products.sum::<i32>()
        })
    }

    #[inline(always)]
    unsafe fn load_int(from: *const i32) -> Self::Int {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::Int>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Int {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn add_int(a: Self::Int, b: Self::Int) -> Self::Int {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn to_float(values: Self::Int) -> Self::Float {
        values.map(|value| value as f32)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Float {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::Float>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, values: Self::Float) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::Float>().write_unaligned(values) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Float {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        // Rounded twice: without an instruction for it a fused one is a call of the C library.
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn sum(values: Self::Float) -> f32 {
        values.iter().sum()
    }

    #[inline(always)]
    unsafe fn spread<const SHARE: usize>(from: *const f32) -> Self::Float {
        // SAFETY: the caller's promise.
        std::array::from_fn(|lane| unsafe { *from.add(lane / SHARE) })
    }

    #[inline(always)]
    unsafe fn splat_halves(low: f32, high: f32) -> Self::Float {
        std::array::from_fn(|lane| if lane < LANES / 2 { low } else { high })
    }

    #[inline(always)]
    unsafe fn values(codes: *const u8) -> (Self::Float, Self::Float) {
        // SAFETY: the caller's promise.
        let codes = unsafe { codes.cast::<[u8; LANES]>().read_unaligned() };
        (
            codes.map(|byte| code::VALUES[usize::from(byte & 15)]),
            codes.map(|byte| code::VALUES[usize::from(byte >> 4)]),
        )
    }

    #[inline(always)]
    unsafe fn signed(from: *const u8) -> Self::Float {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }

    #[inline(always)]
    unsafe fn bf16(from: *const u8) -> (Self::Float, Self::Float) {
        // SAFETY: the caller's promise.
        let pairs = unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        (
            pairs.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            pairs.map(|b| bf16::from_le_bytes([b[2], b[3]]).to_f32()),
        )
    }

    #[inline(always)]
    unsafe fn store_interleaved(to: *mut f32, even: Self::Float, odd: Self::Float) {
        for lane in 0..LANES {
            // SAFETY: the caller's promise.
            unsafe {
                to.add(2 * lane).write(even[lane]);
                to.add(2 * lane + 1).write(odd[lane]);
            }
        }
    }
}

super::table::kernels!(Portable, registers: 2, rows: 2);
