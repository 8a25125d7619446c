//! Faults planted in metal/moe.metal and metal/router.metal.

use crate::faults::Fault;

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[];
