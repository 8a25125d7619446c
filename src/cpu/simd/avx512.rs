//! AVX-512 with VNNI: Intel from Ice Lake (servers), AMD from Zen 4.

use super::{Simd, operations};
use crate::fp4::code;
use std::arch::x86_64::*;

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
}

pub(super) struct Avx512;

/// Twice the value of each code, plus 12.
const DOUBLED: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

impl Simd for Avx512 {
    const LANES: usize = 16;
    const HAS_NEXT: bool = true;
    const BIASED: bool = true;
    type Int = __m512i;
    type Float = __m512;
    type Bytes = __m512i;

    operations! {
        fn load_bytes(from: *const u8) -> __m512i { _mm512_loadu_si512(from.cast()) }
        fn store_bytes(to: *mut u8, bytes: __m512i) { _mm512_storeu_si512(to.cast(), bytes) }
        fn xor(a: __m512i, b: __m512i) -> __m512i { _mm512_xor_si512(a, b) }
        fn splat_bytes(bytes: i32) -> __m512i { _mm512_set1_epi32(bytes) }

        fn lookup(codes: __m512i) -> (__m512i, __m512i) {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(DOUBLED.as_ptr().cast()));
            let low = _mm512_set1_epi8(15);
            (
                _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low)),
                _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low)),
            )
        }

        fn dot(sums: __m512i, codes: __m512i, x: __m512i) -> __m512i { _mm512_dpbusd_epi32(sums, codes, x) }

        /// One factor is unsigned: the weights' signs go to the activations.
        fn dot_int8(sums: __m512i, weights: __m512i, x: __m512i) -> __m512i {
            let negative = _mm512_movepi8_mask(weights);
            let x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
            _mm512_dpbusd_epi32(sums, _mm512_abs_epi8(weights), x)
        }

        fn load_int(from: *const i32) -> __m512i { _mm512_loadu_si512(from.cast()) }
        fn splat_int(value: i32) -> __m512i { _mm512_set1_epi32(value) }
        fn add_int(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn to_float(values: __m512i) -> __m512 { _mm512_cvtepi32_ps(values) }
        fn load(from: *const f32) -> __m512 { _mm512_loadu_ps(from) }
        fn store(to: *mut f32, values: __m512) { _mm512_storeu_ps(to, values) }
        fn splat(value: f32) -> __m512 { _mm512_set1_ps(value) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sum(values: __m512) -> f32 { _mm512_reduce_add_ps(values) }
        fn prefetch(from: *const u8) { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }

        /// Sixteen rows of sixteen words, in four rounds of two-register shuffles.
        fn transpose(rows: &[*const u8], to: *mut u8) {
            let mut a = [_mm512_setzero_si512(); 16];
            for (a, row) in a.iter_mut().zip(rows) {
                *a = _mm512_loadu_si512(row.cast());
            }
            let mut b = a;
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
                a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
                a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
                a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
            }
            // a[4q + c] holds, in its 128-bit part p, word 4p + c of rows 4q to 4q + 3.
            for c in 0..4 {
                let low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
                let high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
                let low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
                let high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
                let words = [
                    _mm512_shuffle_i32x4(low, low2, 0x88),
                    _mm512_shuffle_i32x4(high, high2, 0x88),
                    _mm512_shuffle_i32x4(low, low2, 0xdd),
                    _mm512_shuffle_i32x4(high, high2, 0xdd),
                ];
                for (p, word) in words.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add(64 * (4 * p + c)).cast(), word);
                }
            }
        }

        fn spread<const SHARE: usize>(from: *const f32) -> __m512 {
            let index = match SHARE {
                2 => _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                4 => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                _ => _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            };
            _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(from)))
        }

        fn splat_halves(low: f32, high: f32) -> __m512 { _mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1) }

        fn values(codes: *const u8) -> (__m512, __m512) {
            let table = _mm512_loadu_ps(code::VALUES.as_ptr());
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
            // A permutation takes the low four bits of each index.
            let low = _mm512_permutexvar_ps(bytes, table);
            (low, _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table))
        }

        fn next_values(codes: __m512i) -> (__m512, __m512i) {
            let table = _mm512_loadu_ps(code::VALUES.as_ptr());
            (_mm512_permutexvar_ps(codes, table), _mm512_srli_epi32(codes, 4))
        }

        fn next_bf16(pairs: __m512i) -> (__m512, __m512i) {
            (_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_srli_epi32(pairs, 16))
        }

        fn signed(from: *const u8) -> __m512 { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }

        fn bf16(from: *const u8) -> (__m512, __m512) {
            let both = _mm512_loadu_si512(from.cast());
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (
                _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                _mm512_castsi512_ps(odd),
            )
        }

        fn store_interleaved(to: *mut f32, even: __m512, odd: __m512) {
            let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, first, odd));
            _mm512_storeu_ps(to.add(16), _mm512_permutex2var_ps(even, second, odd));
        }
    }
}

super::table::kernels!(Avx512, registers: 4, rows: 6, features: "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma");
pub(super) use kernels::TABLE;
