//! Block scales to f32, many at a time, in arithmetic that a compiler turns into vector instructions.

use super::{Fp4Rows, TILE, sized};
use crate::fp4::{Factor, Fp4Tensor, ScaleKind};

/// Writes the scales `first..first + out.len()` of the tensor, its factor included.
#[inline(always)]
pub(super) fn decode(tensor: &Fp4Tensor, first: usize, out: &mut [f32]) {
    let kind = tensor.scale_kind();
    let bytes = &tensor.scales()[first * kind.size()..][..out.len() * kind.size()];
    match kind {
        ScaleKind::F16 => halves(bytes, out, |h| {
            // The half's exponent and mantissa as a float's are 2^-112 of its value, subnormals included.
            let magnitude = f32::from_bits((h & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
            f32::from_bits(magnitude.to_bits() | (h & 0x8000) << 16)
        }),
        ScaleKind::BF16 => halves(bytes, out, |h| f32::from_bits(h << 16)),
        ScaleKind::E8M0 => octets(bytes, out, |e| {
            f32::from_bits(if e == 0 { 1 << 22 } else { e << 23 })
        }),
        ScaleKind::E4M3 => octets(bytes, out, |e| {
            let magnitude = f32::from_bits((e & 0x7f) << 20) * f32::from_bits((127 + 120) << 23);
            f32::from_bits(magnitude.to_bits() | (e & 0x80) << 24)
        }),
    }
    match tensor.factor() {
        Factor::None => {}
        Factor::Mul(factor) => out.iter_mut().for_each(|scale| *scale *= factor),
        Factor::Div(factor) => out.iter_mut().for_each(|scale| *scale /= factor),
    }
}

/// The scales of up to 64 rows, group by group, those of a group's rows together.
#[inline(always)]
pub(super) fn by_row<'a>(
    weights: Fp4Rows<'_>,
    decoded: &mut Vec<f32>,
    by_row: &'a mut Vec<f32>,
) -> &'a [f32] {
    let groups = weights.tensor.shape().1 / weights.tensor.group();
    let decoded = sized(decoded, weights.rows * groups);
    decode(weights.tensor, weights.first * groups, decoded);
    let by_row = sized(by_row, groups * TILE);
    for (g, by_row) in by_row.chunks_exact_mut(TILE).enumerate() {
        for (by_row, decoded) in by_row.iter_mut().zip(decoded.chunks_exact(groups)) {
            *by_row = decoded[g];
        }
    }
    by_row
}

#[inline(always)]
fn halves(bytes: &[u8], out: &mut [f32], value: impl Fn(u32) -> f32) {
    for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *out = value(u32::from(u16::from_le_bytes([b[0], b[1]])));
    }
}

#[inline(always)]
fn octets(bytes: &[u8], out: &mut [f32], value: impl Fn(u32) -> f32) {
    for (out, b) in out.iter_mut().zip(bytes) {
        *out = value(u32::from(*b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp4::{Bytes, Parts};

    #[test]
    fn every_scale_of_every_kind_is_the_formats_own() {
        for kind in [ScaleKind::F16, ScaleKind::BF16, ScaleKind::E8M0, ScaleKind::E4M3] {
            for factor in [Factor::None, Factor::Mul(0.37), Factor::Div(3.0)] {
                let codes = 0..1u32 << (8 * kind.size());
                let finite: Vec<u8> = codes
                    .filter(|code| kind.value(*code as u16).is_finite())
                    .flat_map(|code| {
                        code.to_le_bytes()
                            .into_iter()
                            .take(kind.size())
                            .collect::<Vec<_>>()
                    })
                    .collect();
                let n = finite.len() / kind.size();
                let tensor = Fp4Tensor::new(
                    "w",
                    Parts {
                        shape: (n, 16),
                        group: 16,
                        codes: Bytes::copy_from(&vec![0; n * 8]).unwrap(),
                        scales: Bytes::copy_from(&finite).unwrap(),
                        kind,
                        factor,
                    },
                )
                .unwrap();
                let mut out = vec![0.0; n];
                decode(&tensor, 0, &mut out);
                for (index, scale) in out.iter().enumerate() {
                    assert_eq!(scale.to_bits(), tensor.scale(index).to_bits(), "{kind:?} {index}");
                }
            }
        }
    }
}
