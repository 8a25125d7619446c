//! Faults planted in metal/append.metal, and in its plans.

use crate::faults::{Fault, PlanFault};

pub const FAULTS: &[Fault] = &[];
pub const PLAN_FAULTS: &[PlanFault] = &[];
