//! What plans of kernels that multiply with rows of FP4 weights have in common: `metal/rows.h`.

use super::plan::Constant;
use crate::fp4::{Factor, Fp4Tensor, ScaleKind};

/// How FP4 weights of a launch are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub kind: ScaleKind,
    pub group: usize,
    /// As [`factor_constant`] has it.
    pub factor: u16,
}

impl Stored {
    /// The constants of `metal/fp4.h`, `wide` being whether codes and activations can be loaded so; and the length of sums.
    pub fn constants(self, wide: bool, length: usize) -> Vec<(u16, Constant)> {
        let kind = match self.kind {
            ScaleKind::F16 => 0,
            ScaleKind::BF16 => 1,
            ScaleKind::E8M0 => 2,
            ScaleKind::E4M3 => 3,
        };
        vec![
            (0, Constant::U16(kind)),
            (1, Constant::U16(self.group as u16)),
            (2, Constant::U16(self.factor)),
            (3, Constant::Bool(wide)),
            (11, known(length)),
        ]
    }
}

/// What a tensor's factor does to its scales, as `metal/fp4.h` numbers it.
pub(super) fn factor_constant(factor: Factor) -> u16 {
    match factor {
        Factor::None => 0,
        Factor::Mul(_) => 1,
        Factor::Div(_) => 2,
    }
}

/// The constant that tells a kernel the length of rows as its pipeline is made, for loops over them to be unrolled; 0, where
/// it does not fit or may differ, has the kernel read it from its arguments.
pub(super) fn known(k: usize) -> Constant {
    Constant::U16(u16::try_from(k).unwrap_or(0))
}

/// Whether a weight's codes can be loaded by 16 bytes, and its scales two at a time.
pub(super) fn wide(weight: &Fp4Tensor) -> bool {
    weight.codes().offset().is_multiple_of(16)
        && weight.scales().offset().is_multiple_of(2)
        && weight.shape().1.is_multiple_of(32)
}
