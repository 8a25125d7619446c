//! How a block's scale is found.

use super::{ScaleKind, code};

/// How a block's scale is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ScaleRule {
    /// The scale, out of a small search around the block's maximum / 6, with the least squared error, refined
    /// by fitting it to the codes it chose.
    #[default]
    SquaredError,
    /// The block's maximum becomes the largest code (for E8M0: the OCP rule, the power of two below it, / 4).
    Maximum,
}

/// Multiples of maximum / 6 that the search tries: below 1 it clips the block's outlier, above 1 it moves
/// the rest of the block onto better codes.
pub(super) const SEARCH: [f32; 11] = [1.0, 0.7, 0.76, 0.82, 0.88, 0.94, 1.06, 1.12, 1.18, 1.24, 1.3];

/// How often a scale is fitted to its codes at most; most blocks settle after one or two.
const REFINEMENTS: usize = 4;

/// The smallest power of two with which the largest block's scale fits E4M3.
///
/// Scales of the search may lie 1.3 times higher; they saturate at 448, which the search takes into account.
pub(super) fn power_of_two_factor(largest: f32) -> f32 {
    let needed = f64::from(largest) / f64::from(code::MAX) / f64::from(ScaleKind::E4M3.max());
    if needed == 0.0 {
        1.0
    } else {
        needed.log2().ceil().clamp(-126.0, 127.0).exp2() as f32
    }
}

/// A scale to divide by. A block whose scale underflows to zero has only zero codes.
#[derive(Clone, Copy)]
pub(super) struct Divisor {
    scale: f32,
}

impl Divisor {
    pub(super) fn of(scale: f32) -> Self {
        Self { scale }
    }

    /// Division, not a product with the reciprocal: a tie must stay a tie.
    #[inline]
    pub(super) fn encode(self, value: f32) -> u8 {
        if self.scale == 0.0 {
            0
        } else {
            code::encode(value / self.scale)
        }
    }

    /// What a code stands for.
    #[inline]
    pub(super) fn value(self, code: u8) -> f32 {
        code::VALUES[usize::from(code)] * self.scale
    }
}

/// The scale's bits for a block, to be multiplied by the tensor's `factor`.
pub(super) fn choose_scale(block: &[f32], kind: ScaleKind, factor: f32, rule: ScaleRule) -> u16 {
    let max = block.iter().fold(0f32, |m, v| m.max(v.abs()));
    if max == 0.0 {
        return 0;
    }
    let ideal = max / code::MAX / factor;
    let by_maximum = match kind {
        // OCP MX 1.0, 6.3: the largest power of two not above the maximum, over that of E2M1, 4.
        ScaleKind::E8M0 => u16::from(e8m0_floor(max)).saturating_sub(2),
        _ => match kind.encode(ideal) {
            // Rounded up, the scale of the largest floats makes the largest code infinite.
            bits if (code::MAX * (kind.value(bits) * factor)).is_infinite() => bits - 1,
            bits => bits,
        },
    };
    if rule == ScaleRule::Maximum {
        return by_maximum;
    }
    let mut best = (f64::INFINITY, by_maximum);
    let mut consider = |bits: u16| {
        if best.0.is_finite() && bits == best.1 {
            return;
        }
        let error = squared_error(block, kind.value(bits) * factor);
        if error < best.0 {
            best = (error, bits);
        }
    };
    if kind == ScaleKind::E8M0 {
        // The whole neighbourhood of a power of two is its two neighbours.
        for bits in by_maximum.saturating_sub(1)..=(by_maximum + 2).min(254) {
            consider(bits);
        }
    } else {
        for multiple in SEARCH {
            consider(kind.encode(ideal * multiple));
        }
        refine(block, kind, factor, &mut best);
    }
    best.1
}

/// Fits the scale to its codes, `Σ v·q / Σ q²`, and chooses codes anew, while that lowers the error.
fn refine(block: &[f32], kind: ScaleKind, factor: f32, best: &mut (f64, u16)) {
    for _ in 0..REFINEMENTS {
        let divisor = Divisor::of(kind.value(best.1) * factor);
        let (mut products, mut squares) = (0f64, 0f64);
        for &value in block {
            let q = f64::from(code::VALUES[usize::from(divisor.encode(value))]);
            products += f64::from(value) * q;
            squares += q * q;
        }
        if squares == 0.0 {
            return;
        }
        let bits = kind.encode((products / squares / f64::from(factor)) as f32);
        let error = squared_error(block, kind.value(bits) * factor);
        if error >= best.0 {
            return;
        }
        *best = (error, bits);
    }
}

/// The exponent field of the power of two not above `x`, a positive finite number.
fn e8m0_floor(x: f32) -> u8 {
    (x.to_bits() >> 23) as u8
}

pub(super) fn squared_error(block: &[f32], scale: f32) -> f64 {
    let divisor = Divisor::of(scale);
    block
        .iter()
        .map(|&v| {
            let rounded = divisor.value(divisor.encode(v));
            f64::from(v - rounded).powi(2)
        })
        .sum()
}
