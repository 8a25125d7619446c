//! What plans of kernels that multiply with rows of FP4 weights have in common: `metal/rows.h`.

use super::plan::Constant;

/// The constant that tells a kernel the length of rows as its pipeline is made, for loops over them to be unrolled; 0, where
/// it does not fit or may differ, has the kernel read it from its arguments.
pub(super) fn known(k: usize) -> Constant {
    Constant::U16(u16::try_from(k).unwrap_or(0))
}
