//! The numbers of a cache and back, plainly: what kernels are compared with, bit for bit.
//!
//! Every step is an exact comparison or a single rounding to nearest, ties to even, of values that all machines agree
//! on; there is nothing in it to reorder or to fuse.
//!
//! - **F16, BF16**: the nearest one.
//! - **FP8**: 128 elements share a scale, the smallest power of two (an F32, at least 2^-126) with which the largest
//!   of them is at most 448; codes are the nearest E4M3. A scale that takes the largest to 448 itself would store
//!   that one without an error, which is worth a tenth of the squared error of ordinary numbers and more where a few
//!   channels stand out; but with a power of two a decoded number has the four significant bits of its code, a BF16
//!   exactly, that kernels make by adding exponents.
//! - **FP4**: 16 or 32 elements share a scale in **UE5M3**: five exponent bits and three of the mantissa, the upper
//!   half of an F16 without its sign, so that `f16::from_bits(byte << 7)` decodes it. Codes are the nearest E2M1,
//!   ties to the even code, magnitudes beyond 6 scales to 6. Where the largest magnitude times 1/6, rounded, is the
//!   scale with number `s` (a UE5M3's byte), the eight scales from `s - 2` to `s + 5` are tried: the one with the
//!   least `Σ (|x| - code · scale)²` is stored, of equal ones the smallest. The sum is that of F32, in the elements'
//!   order, each operation rounded on its own: a device adds up the same. Beside the scale `s` alone this takes a
//!   quarter off the squared error of normal numbers, for no byte.
//!
//!   Why not E4M3, which NVFP4 uses: a scale has no sign, and E4M3 spends a bit on one. What it lacks is range: its
//!   full precision ends at 2^-6, so that a group whose largest element is below 0.09 would lose bits unless another
//!   factor came along, a number a tensor that a cache, written token by token, cannot know in advance. UE5M3 holds
//!   groups from 0.00037 to 360,000 in full and needs no factor. Why not E8M0, a power of two: it costs the same
//!   byte. A decoded number has at most six significant bits: a BF16 exactly.
//!
//! NaN and infinity stay visible. F16 and BF16 hold them. An element of FP8 that is not finite is stored as NaN, and
//! its neighbours as if it were not there. A group of FP4 that has one gets a NaN for its scale: all of it decodes to
//! NaN. What is too large does not saturate either: F16 holds infinity from 65,520 on, and a group of FP4 with a
//! magnitude from 380,928 on gets an infinite scale and codes of zero, which decode to NaN.

use super::layout::{Encoding, FP8_GROUP, Part, RowLayout};
use crate::fp4::{ScaleKind, code};
use crate::{Error, Result};
use half::{bf16, f16};

/// A scale of FP4 that is NaN.
const NAN_SCALE: u8 = 0xff;
/// A scale of FP4 that is infinite.
const INFINITE_SCALE: u8 = 0xf8;
/// The largest finite scale of FP4.
const LARGEST_SCALE: u8 = 0xf7;
/// Scales that are tried for a group of FP4.
const CANDIDATES: usize = 8;
/// A code of FP8 that is NaN.
const NAN_CODE: u8 = 0x7f;

/// The value of a scale of FP4, which is a UE5M3.
#[inline]
pub fn scale(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 7).to_f32()
}

/// Stores the numbers of a token, as they are: a rotation is the caller's, as it is the reader's
/// ([`RowLayout::rotation`]).
///
/// # Errors
/// [`Error::Argument`] where `values` is not as wide as a token or `pool` has no such slot.
pub fn write(layout: &RowLayout, values: &[f32], pool: &mut [u8], slot: u32) -> Result<()> {
    check(layout, values.len(), pool.len(), slot)?;
    let mut rest = values;
    for part in layout.parts() {
        let (values, tail) = rest.split_at(part.width);
        write_part(layout, part, values, pool, slot);
        rest = tail;
    }
    Ok(())
}

/// The numbers of a token as they are stored: where the layout has a [rotation](RowLayout::rotation), rotated.
///
/// # Errors
/// As [`write()`].
pub fn read(layout: &RowLayout, pool: &[u8], slot: u32, values: &mut [f32]) -> Result<()> {
    check(layout, values.len(), pool.len(), slot)?;
    let mut rest = values;
    for part in layout.parts() {
        let (values, tail) = rest.split_at_mut(part.width);
        read_part(layout, part, pool, slot, values);
        rest = tail;
    }
    Ok(())
}

/// [`read`] of a row on its own, which [`Latent`](super::RowKind::Latent) has.
///
/// # Errors
/// As [`read`], of slot 0.
pub fn decode(layout: &RowLayout, row: &[u8], values: &mut [f32]) -> Result<()> {
    read(layout, row, 0, values)
}

fn check(layout: &RowLayout, values: usize, pool: usize, slot: u32) -> Result<()> {
    const OP: &str = "kv-cache codec";
    if values != layout.width() {
        let expected = format!("{} numbers, a token's", layout.width());
        return Err(Error::argument(OP, "values", expected, values.to_string()));
    }
    // Whole blocks, or of latents whole rows.
    let held = match layout.kind() {
        super::RowKind::Latent { .. } => pool / layout.row_bytes(),
        super::RowKind::Heads { .. } => pool / layout.block_bytes() * layout.block_tokens(),
    };
    if slot as usize >= held {
        let expected = format!("below {held}, the slots of {pool} bytes");
        return Err(Error::argument(OP, "slot", expected, slot.to_string()));
    }
    Ok(())
}

/// Stores a vector of a token in a slot that the pool has.
pub(crate) fn write_part(layout: &RowLayout, part: &Part, values: &[f32], pool: &mut [u8], slot: u32) {
    let (codes, scales) = layout.place(part, slot);
    // Scales lie behind the codes.
    let (low, high) = pool.split_at_mut(scales);
    let (codes, scales) = (
        &mut low[codes..][..part.code_bytes()],
        &mut high[..part.scale_bytes()],
    );
    encode_vector(part.encoding, values, codes, scales);
}

/// Decodes a vector of a token in a slot that the pool has.
pub(crate) fn read_part(layout: &RowLayout, part: &Part, pool: &[u8], slot: u32, values: &mut [f32]) {
    let (codes, scales) = layout.place(part, slot);
    let (codes, scales) = (
        &pool[codes..][..part.code_bytes()],
        &pool[scales..][..part.scale_bytes()],
    );
    decode_vector(part.encoding, codes, scales, values);
}

pub(crate) fn encode_vector(encoding: Encoding, values: &[f32], codes: &mut [u8], scales: &mut [u8]) {
    match encoding {
        Encoding::F16 => {
            for (to, x) in codes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *to = f16::from_f32(*x).to_le_bytes();
            }
        }
        Encoding::BF16 => {
            for (to, x) in codes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *to = bf16::from_f32(*x).to_le_bytes();
            }
        }
        Encoding::Fp8 => {
            let groups = values.chunks(FP8_GROUP).zip(codes.chunks_mut(FP8_GROUP));
            for ((group, codes), to) in groups.zip(scales.as_chunks_mut::<4>().0) {
                let exponent = fp8_exponent(group);
                *to = power_of_two(exponent).to_le_bytes();
                let inverse = power_of_two(-exponent);
                for (code, x) in codes.iter_mut().zip(group) {
                    *code = encode_e4m3(x * inverse);
                }
            }
        }
        Encoding::Fp4 { group } => {
            let groups = values.chunks_exact(group).zip(codes.chunks_exact_mut(group / 2));
            for ((group, codes), to) in groups.zip(scales) {
                *to = fp4_scale(group);
                let scale = scale(*to);
                for (code, pair) in codes.iter_mut().zip(group.as_chunks::<2>().0) {
                    *code = encode_e2m1(pair[0], scale) | encode_e2m1(pair[1], scale) << 4;
                }
            }
        }
    }
}

fn decode_vector(encoding: Encoding, codes: &[u8], scales: &[u8], values: &mut [f32]) {
    match encoding {
        Encoding::F16 => {
            for (x, from) in values.iter_mut().zip(codes.as_chunks::<2>().0) {
                *x = f16::from_le_bytes(*from).to_f32();
            }
        }
        Encoding::BF16 => {
            for (x, from) in values.iter_mut().zip(codes.as_chunks::<2>().0) {
                *x = bf16::from_le_bytes(*from).to_f32();
            }
        }
        Encoding::Fp8 => {
            let groups = values.chunks_mut(FP8_GROUP).zip(codes.chunks(FP8_GROUP));
            for ((group, codes), from) in groups.zip(scales.as_chunks::<4>().0) {
                let scale = f32::from_le_bytes(*from);
                for (i, x) in group.iter_mut().enumerate() {
                    *x = ScaleKind::E4M3.decode(codes, i) * scale;
                }
            }
        }
        Encoding::Fp4 { group } => {
            let groups = values.chunks_exact_mut(group).zip(codes.chunks_exact(group / 2));
            for ((group, codes), from) in groups.zip(scales) {
                let scale = scale(*from);
                for (pair, code) in group.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                    *pair = [code & 15, code >> 4].map(|code| code::VALUES[usize::from(code)] * scale);
                }
            }
        }
    }
}

/// The exponent of the smallest power of two, at least 2^-126, with which the largest finite magnitude is at most
/// 448.
fn fp8_exponent(group: &[f32]) -> i32 {
    let finite = group.iter().map(|x| x.abs()).filter(|x| x.is_finite());
    let largest = finite.fold(0f32, f32::max);
    // 448 is 1.75 · 2^8: a mantissa beyond that carries into the exponent.
    let carried = (largest.to_bits() + 0x001f_ffff) >> 23;
    (carried as i32 - 127 - 8).max(-126)
}

/// A power of two from 2^-126 to 2^127.
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// The code nearest to `x`, at most 448 in magnitude or not finite, which NaN is stored for.
fn encode_e4m3(x: f32) -> u8 {
    if !x.is_finite() {
        return NAN_CODE;
    }
    let magnitude = ScaleKind::E4M3.encode(x.abs()) as u8;
    magnitude | u8::from(x.is_sign_negative()) << 7
}

/// The scale of a group: of the eight from two below to five above the largest magnitude times 1/6 the one with the
/// least squared error, of equal ones the smallest; NaN where an element is not finite.
fn fp4_scale(group: &[f32]) -> u8 {
    let (mut largest, mut finite) = (0f32, true);
    for x in group {
        largest = largest.max(x.abs());
        finite &= x.is_finite();
    }
    if !finite {
        return NAN_SCALE;
    }
    let ideal = encode_ue5m3(largest * (1.0 / code::MAX));
    if ideal == INFINITE_SCALE {
        return ideal;
    }
    let first = ideal.saturating_sub(2);
    let scales: [f32; CANDIDATES] = std::array::from_fn(|i| scale((first + i as u8).min(LARGEST_SCALE)));
    let mut errors = [0f32; CANDIDATES];
    for x in group {
        let a = x.abs();
        // In lanes, a candidate each; element after element, each operation rounded on its own.
        for (error, scale) in errors.iter_mut().zip(scales) {
            let above = |border: f32| f32::from(u8::from(a > border * scale));
            let from = |border: f32| f32::from(u8::from(a >= border * scale));
            let half = above(0.25) + from(0.75) + above(1.25) + from(1.75);
            let value = half * 0.5 + above(2.5) + from(3.5) + 2.0 * above(5.0);
            let distance = a - value * scale;
            *error += distance * distance;
        }
    }
    let mut best = 0;
    for i in 1..CANDIDATES {
        if errors[i] < errors[best] {
            best = i;
        }
    }
    (first + best as u8).min(LARGEST_SCALE)
}

/// The UE5M3 nearest to `x`, a finite number that is not negative; infinity from 63,488 on.
fn encode_ue5m3(x: f32) -> u8 {
    // The step between neighbours: 2^-17 up to 2^-14, then an eighth of the power of two below x.
    let exponent = ((x.to_bits() >> 23) as i32 - 127).max(-14);
    let steps = (x * power_of_two(3 - exponent)).round_ties_even() as i32;
    // Steps that round up to the next power of two carry into the exponent by themselves.
    let code = ((exponent + 14) << 3) + steps;
    code.min(INFINITE_SCALE.into()) as u8
}

/// The code whose product with `scale` is nearest to `x`; what rounds to zero is code 0 whatever its sign.
///
/// As [`code::encode`] of the quotient would be, if it were exact: the border between two codes has at most three
/// significant bits and a scale four, so that their product is exact.
fn encode_e2m1(x: f32, scale: f32) -> u8 {
    // Nothing but zeros, or what is too small for any scale.
    if scale == 0.0 {
        return 0;
    }
    let a = x.abs();
    let magnitude = u8::from(a > 0.25 * scale)
        + u8::from(a >= 0.75 * scale)
        + u8::from(a > 1.25 * scale)
        + u8::from(a >= 1.75 * scale)
        + u8::from(a > 2.5 * scale)
        + u8::from(a >= 3.5 * scale)
        + u8::from(a > 5.0 * scale);
    magnitude | u8::from(x < 0.0 && magnitude > 0) << 3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{CacheFormat, RowKind, ScaleGroup};
    use crate::random::Random;

    const LATENT: RowKind = RowKind::Latent { latent: 288, rope: 6 };
    const HEADS: RowKind = RowKind::Heads {
        kv_heads: 3,
        key_dim: 96,
        value_dim: 64,
    };

    /// Numbers of all magnitudes, zeros among them.
    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        let mut next = || random.uniform() as f32;
        (0..len)
            .map(|_| match next() {
                u if u < 0.1 => 0.0,
                _ => (next() - 0.5) * (next() * 12.0 - 8.0).exp2(),
            })
            .collect()
    }

    fn even_noise(len: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..len).map(|_| random.uniform() as f32 - 0.5).collect()
    }

    fn layouts() -> impl Iterator<Item = RowLayout> {
        let all = CacheFormat::ALL.into_iter();
        all.flat_map(|format| [LATENT, HEADS].map(|kind| RowLayout::new(format, kind, 16).unwrap()))
    }

    fn round_trip(layout: &RowLayout, values: &[f32]) -> Vec<f32> {
        let mut pool = vec![0xee; 2 * layout.block_bytes()];
        write(layout, values, &mut pool, 19).unwrap();
        let mut back = vec![f32::NAN; values.len()];
        read(layout, &pool, 19, &mut back).unwrap();
        back
    }

    #[test]
    fn kv_scales_of_fp4_are_by_definition_and_nearest() {
        for byte in 0..=255u8 {
            let value = scale(byte);
            let (exponent, mantissa) = (i32::from(byte >> 3), f64::from(byte & 7));
            let expected = match exponent {
                0 => mantissa / 8.0 * 2f64.powi(-14),
                31 if byte == INFINITE_SCALE => f64::INFINITY,
                31 => f64::NAN,
                _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 15),
            };
            assert!(
                f64::from(value) == expected || value.is_nan() && expected.is_nan(),
                "{byte:#x}"
            );
            if byte < INFINITE_SCALE {
                assert_eq!(encode_ue5m3(value), byte);
                let next = if byte == 0xf7 { 65536.0 } else { scale(byte + 1) };
                let tie = (value + next) / 2.0;
                assert_eq!(encode_ue5m3(tie), byte + byte % 2, "{tie}");
                assert_eq!(encode_ue5m3(tie.next_down()), byte);
                assert_eq!(encode_ue5m3(tie.next_up()), byte + 1);
            }
        }
        assert_eq!(encode_ue5m3(f32::MAX), INFINITE_SCALE);
        assert_eq!((fp4_scale(&[0.0; 16]), fp4_scale(&[1e-30; 16])), (0, 0));
        assert_eq!(fp4_scale(&[380_900.0; 16]), LARGEST_SCALE);
        assert_eq!(fp4_scale(&[380_928.0; 16]), INFINITE_SCALE);
        assert_eq!(encode_ue5m3(f32::MIN_POSITIVE / 8.0), 0);
    }

    /// Against all codes, in f64; of two that are as near, the even one.
    #[test]
    fn kv_codes_are_the_nearest() {
        let nearest = |x: f32, scale: f32, value: &dyn Fn(u8) -> f32, codes: std::ops::Range<u8>| {
            let distance = |c: u8| (f64::from(x.abs()) - f64::from(value(c)) * f64::from(scale)).abs();
            let by = |a: &u8, b: &u8| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2)));
            codes.min_by(by).unwrap()
        };
        let e4m3 = |code| ScaleKind::E4M3.decode(&[code], 0);
        let e2m1 = |code| code::VALUES[usize::from(code)];
        let mut chosen = [0; 8];
        for seed in 0..400 {
            let group = if seed % 2 == 0 {
                noise(32, seed)
            } else {
                even_noise(16, seed)
            };
            let byte = fp4_scale(&group);
            let largest = group.iter().fold(0f32, |m, x| m.max(x.abs()));
            let error = |byte: u8| -> f64 {
                let by = f64::from(scale(byte));
                let square = |x: &f32| {
                    let code = nearest(*x, scale(byte), &e2m1, 0..8);
                    (f64::from(x.abs()) - f64::from(e2m1(code)) * by).powi(2)
                };
                group.iter().map(square).sum()
            };
            let ideal = encode_ue5m3(largest * (1.0 / 6.0));
            let least = (ideal.saturating_sub(2)..=ideal + 5)
                .map(error)
                .fold(f64::INFINITY, f64::min);
            assert!((ideal.saturating_sub(2)..=ideal + 5).contains(&byte));
            assert!(error(byte) <= least * (1.0 + 1e-6), "{} for {least}", error(byte));
            chosen[usize::from(byte - ideal.saturating_sub(2))] += 1;
            let ties = [0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0].map(|tie| tie * scale(byte));
            for x in group.iter().chain(&ties).chain(&ties.map(f32::next_up)) {
                let expected = nearest(*x, scale(byte), &e2m1, 0..8);
                let sign = if *x < 0.0 && expected > 0 { 8 } else { 0 };
                assert_eq!(
                    encode_e2m1(*x, scale(byte)),
                    expected | sign,
                    "{x} by {}",
                    scale(byte)
                );
            }
            let exponent = fp8_exponent(&group);
            let by = power_of_two(exponent);
            assert!(largest <= 448.0 * by && largest > 224.0 * by, "{largest} by {by}");
            for x in &group {
                let expected = nearest(*x, by, &e4m3, 0..0x7f) | u8::from(x.is_sign_negative()) << 7;
                assert_eq!(encode_e4m3(x / by), expected, "{x} by {by}");
            }
        }
        // The first and the last of them are the best of some groups.
        assert!(chosen[0] > 0 && chosen[7] > 0, "{chosen:?}");
        for (largest, exponent) in [
            (448.0f32, 0),
            (448f32.next_up(), 1),
            (224.0, -1),
            (f32::MAX, 120),
            (1e-44, -126),
            (0.0, -126),
        ] {
            assert_eq!(
                fp8_exponent(&[0.0, -largest, f32::NAN, f32::INFINITY]),
                exponent,
                "{largest}"
            );
        }
    }

    #[test]
    fn kv_bytes_are_as_documented() {
        let layout = RowLayout::latent("fp4-16".parse().unwrap(), 16, 2).unwrap();
        let mut values = [0f32; 18];
        values[..4].copy_from_slice(&[1.5, -0.25, 0.5, 3.0]);
        values[16..].copy_from_slice(&[1.0, -2.0]);
        let mut row = [0xee; 16];
        write(&layout, &values, &mut row, 0).unwrap();
        // 3 / 6 is 0.5: exponent 14, mantissa 0. Codes 1.5 / 0.5 = 3 (5), -0.5 (9), 1 (2), 6 (7).
        let expected = [
            0x95,
            0x72,
            0,
            0,
            0,
            0,
            0,
            0,
            14 << 3,
            0xee,
            0xee,
            0xee,
            0x80,
            0x3f,
            0x00,
            0xc0,
        ];
        assert_eq!(row, expected);
        let layout = RowLayout::latent(CacheFormat::Fp8, 4, 0).unwrap();
        let mut row = [0xee; 16];
        write(&layout, &[448.0, -1.0, 0.0, -0.0], &mut row, 0).unwrap();
        assert_eq!(row[..8], [0x7e, 0xb8, 0, 0x80, 0, 0, 0x80, 0x3f]);
        let mut back = [f32::NAN; 4];
        decode(&layout, &row, &mut back).unwrap();
        assert_eq!(back, [448.0, -1.0, 0.0, 0.0]);
    }

    /// Tokens do not touch each other's bytes, what was stored is stored again as it is, and errors are what the
    /// codes explain.
    #[test]
    fn kv_rows_come_back() {
        for layout in layouts() {
            let what = format!("{} {:?}", layout.format(), layout.kind());
            let width = layout.width();
            let mut pool = vec![0; 3 * layout.block_bytes()];
            let rows: Vec<_> = (0..48).map(|slot| noise(width, slot)).collect();
            let mut order: Vec<u32> = (0..48).collect();
            order.sort_by_key(|slot| slot * 31 % 48);
            for slot in &order {
                write(&layout, &rows[*slot as usize], &mut pool, *slot).unwrap();
            }
            for (slot, row) in rows.iter().enumerate() {
                let mut back = vec![f32::NAN; width];
                read(&layout, &pool, slot as u32, &mut back).unwrap();
                let mut alone = vec![0; layout.block_bytes()];
                write(&layout, row, &mut alone, 3).unwrap();
                let mut of_alone = vec![0.0; width];
                read(&layout, &alone, 3, &mut of_alone).unwrap();
                assert_eq!(back, of_alone, "{what}");
                let mut first = 0;
                for part in layout.parts() {
                    let range = first..first + part.width;
                    first = range.end;
                    let (row, back) = (&row[range.clone()], &back[range]);
                    let group = match part.encoding {
                        Encoding::Fp4 { group } => group,
                        Encoding::Fp8 => FP8_GROUP,
                        _ => 1,
                    };
                    for (row, back) in row.chunks(group).zip(back.chunks(group)) {
                        let largest = row.iter().fold(0f32, |m, x| m.max(x.abs()));
                        for (x, y) in row.iter().zip(back) {
                            // Half a step: of E2M1 next to the largest 1 of 6, and the scale's own; of E4M3 1 of 16.
                            let bound = match part.encoding {
                                Encoding::F16 => x.abs() / 2048.0 + 3e-8,
                                Encoding::BF16 => x.abs() / 256.0,
                                Encoding::Fp8 => x.abs() / 16.0 + largest / 448.0 / 512.0,
                                Encoding::Fp4 { .. } => largest * 0.18 + 2e-5,
                            };
                            assert!((x - y).abs() <= bound, "{what}: {y} for {x}");
                            if part.encoding != Encoding::F16 {
                                assert_eq!(bf16::from_f32(*y).to_f32(), *y, "{what}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn kv_what_is_not_finite_stays_visible() {
        for layout in layouts() {
            let what = format!("{} {:?}", layout.format(), layout.kind());
            let clean = noise(layout.width(), 5);
            let expected = round_trip(&layout, &clean);
            assert!(expected.iter().all(|x| x.is_finite()), "{what}");
            for at in [0, 70, 100, 287, layout.width() - 1] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
                    let mut values = clean.clone();
                    values[at] = bad;
                    let back = round_trip(&layout, &values);
                    assert!(!back[at].is_finite(), "{what}: {} for {bad} at {at}", back[at]);
                    // Only neighbours that share a scale may see it.
                    let far = |i: usize| i.abs_diff(at) >= 128;
                    for i in (0..values.len()).filter(|i| far(*i)) {
                        assert_eq!(back[i].to_bits(), expected[i].to_bits(), "{what}: {i}");
                    }
                }
            }
        }
        for format in [CacheFormat::F16, CacheFormat::fp4()] {
            let layout = RowLayout::latent(format, 16, 0).unwrap();
            let back = round_trip(&layout, &[1e6; 16]);
            assert!(back.iter().all(|x| !x.is_finite()), "{format}");
        }
    }

    #[test]
    fn kv_slots_that_are_not_there_are_refused() {
        for layout in layouts() {
            let mut pool = vec![0; 2 * layout.block_bytes()];
            let mut values = vec![0.0; layout.width()];
            write(&layout, &values, &mut pool, 31).unwrap();
            for slot in [32, u32::MAX] {
                let error = write(&layout, &values, &mut pool, slot).unwrap_err().to_string();
                assert!(error.contains("`slot`") && error.contains("below 32"), "{error}");
                assert!(read(&layout, &pool, slot, &mut values).is_err());
            }
            assert!(write(&layout, &values[1..], &mut pool, 0).is_err());
            assert!(read(&layout, &pool[1..], 31, &mut values).is_err());
        }
        let layout = RowLayout::latent(CacheFormat::Fp8, 512, 64).unwrap();
        let mut values = vec![0.0; 576];
        assert!(decode(&layout, &[0; 656], &mut values).is_ok());
        assert!(decode(&layout, &[0; 655], &mut values).is_err());
    }

    #[test]
    fn kv_groups_of_32_share_a_scale() {
        let format = CacheFormat::Fp4 {
            group: ScaleGroup::ThirtyTwo,
            rotate: false,
        };
        let layout = RowLayout::latent(format, 64, 0).unwrap();
        let mut values = [0.01f32; 64];
        values[31] = 6.0;
        let back = round_trip(&layout, &values);
        assert!(back[..31].iter().all(|x| *x == 0.0) && back[31] == 6.0);
        assert!(back[32..].iter().all(|x| (x - 0.01).abs() < 0.001));
    }
}
