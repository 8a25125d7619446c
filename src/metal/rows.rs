//! What plans of kernels that multiply with rows of FP4 weights have in common: `metal/rows.h`.

use super::plan::Constant;
use crate::fp4::Fp4Tensor;

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
