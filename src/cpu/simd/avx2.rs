//! AVX2 and FMA: Intel from Haswell, AMD from Zen. With AVX-VNNI (see [`avxvnni`](super::avxvnni)) the dot product is
//! one instruction; all else is the same.

use super::{Simd, operations};
use crate::fp4::code;
use std::arch::x86_64::*;

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// Registers of 256 bits; `VNNI`: with AVX-VNNI's dot product.
pub(super) struct Bits256<const VNNI: bool>;

type Avx2 = Bits256<false>;

/// Twice the value of each code, plus 12.
const DOUBLED: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

impl<const VNNI: bool> Simd for Bits256<VNNI> {
    const LANES: usize = 8;
    const BIASED: bool = true;
    type Int = __m256i;
    type Float = __m256;
    type Bytes = __m256i;

    operations! {
        fn load_bytes(from: *const u8) -> __m256i { _mm256_loadu_si256(from.cast()) }
        fn store_bytes(to: *mut u8, bytes: __m256i) { _mm256_storeu_si256(to.cast(), bytes) }
        fn xor(a: __m256i, b: __m256i) -> __m256i { _mm256_xor_si256(a, b) }
        fn splat_bytes(bytes: i32) -> __m256i { _mm256_set1_epi32(bytes) }

        fn lookup(codes: __m256i) -> (__m256i, __m256i) {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(DOUBLED.as_ptr().cast()));
            let low = _mm256_set1_epi8(15);
            (
                _mm256_shuffle_epi8(table, _mm256_and_si256(codes, low)),
                _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), low)),
            )
        }

        fn dot(sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
            if VNNI {
                _mm256_dpbusd_avx_epi32(sums, codes, x)
            } else {
                // Sixteen bits hold two products: of codes at most 2 · 24 · 127 in magnitude, and see `dot_int8`.
                let pairs = _mm256_maddubs_epi16(codes, x);
                _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }
        }

        /// One factor is unsigned: the weights' signs go to the activations. Sixteen bits hold two products, at most
        /// 2 · 127 · 127 in magnitude, which they would not with 128 added to the weights instead.
        fn dot_int8(sums: __m256i, weights: __m256i, x: __m256i) -> __m256i { Self::dot(sums, _mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights)) }

        fn load_int(from: *const i32) -> __m256i { _mm256_loadu_si256(from.cast()) }
        fn splat_int(value: i32) -> __m256i { _mm256_set1_epi32(value) }
        fn add_int(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
        fn to_float(values: __m256i) -> __m256 { _mm256_cvtepi32_ps(values) }
        fn load(from: *const f32) -> __m256 { _mm256_loadu_ps(from) }
        fn store(to: *mut f32, values: __m256) { _mm256_storeu_ps(to, values) }
        fn splat(value: f32) -> __m256 { _mm256_set1_ps(value) }
        fn mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        fn add(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }

        fn sum(values: __m256) -> f32 {
            let four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }

        fn prefetch(from: *const u8) { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }

        /// Eight rows of eight words, twice, in three rounds of two-register shuffles.
        fn transpose(rows: &[*const u8], to: *mut u8) {
            for half in 0..2 {
                let mut a = [_mm256_setzero_si256(); 8];
                for r in 0..8 {
                    a[r] = _mm256_loadu_si256(rows[r].add(32 * half).cast());
                }
                let mut b = a;
                for i in 0..4 {
                    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
                }
                for i in 0..2 {
                    a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
                    a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
                    a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
                    a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
                }
                // a[4q + c] holds, in its 128-bit part p, word 4p + c of rows 4q to 4q + 3.
                for c in 0..4 {
                    let to = to.add(32 * (8 * half + c));
                    let words = _mm256_permute2x128_si256(a[c], a[4 + c], 0x20);
                    let words4 = _mm256_permute2x128_si256(a[c], a[4 + c], 0x31);
                    _mm256_storeu_si256(to.cast(), words);
                    _mm256_storeu_si256(to.add(32 * 4).cast(), words4);
                }
            }
        }

        fn spread<const SHARE: usize>(from: *const f32) -> __m256 {
            let index = match SHARE {
                2 => _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3),
                4 => _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1),
                _ => return _mm256_set1_ps(*from),
            };
            _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), index)
        }

        fn splat_halves(low: f32, high: f32) -> __m256 { _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low)) }

        fn values(codes: *const u8) -> (__m256, __m256) {
            // The first eight values are the magnitudes: a permutation takes the low three bits of each index. The
            // fourth is the sign.
            let magnitudes = _mm256_loadu_ps(code::VALUES.as_ptr());
            let sign = _mm256_set1_ps(-0.0);
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.cast()));
            let low_signs = _mm256_castsi256_ps(_mm256_slli_epi32(bytes, 28));
            let high_signs = _mm256_castsi256_ps(_mm256_slli_epi32(bytes, 24));
            let low = _mm256_permutevar8x32_ps(magnitudes, bytes);
            let high = _mm256_permutevar8x32_ps(magnitudes, _mm256_srli_epi32(bytes, 4));
            (
                _mm256_or_ps(low, _mm256_and_ps(low_signs, sign)),
                _mm256_or_ps(high, _mm256_and_ps(high_signs, sign)),
            )
        }

        fn signed(from: *const u8) -> __m256 { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }

        fn bf16(from: *const u8) -> (__m256, __m256) {
            let both = _mm256_loadu_si256(from.cast());
            let odd = _mm256_and_si256(both, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            (
                _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
                _mm256_castsi256_ps(odd),
            )
        }

        fn store_interleaved(to: *mut f32, even: __m256, odd: __m256) {
            let low = _mm256_unpacklo_ps(even, odd);
            let high = _mm256_unpackhi_ps(even, odd);
            _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
            _mm256_storeu_ps(to.add(8), _mm256_permute2f128_ps(low, high, 0x31));
        }
    }
}

// Of sixteen registers a product of two by five takes ten for sums, two for weights, one for an activation, one for
// ones and one for pairs on their way.
super::table::kernels!(Avx2, registers: 2, rows: 5, features: "avx2,fma");
