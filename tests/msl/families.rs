//! The families of kernels: a file or two each, with runs that reach all of it and faults that these must find.

use crate::faults::{Fault, PlanFault};
use crate::runner::Work;
use crate::{append, dense, linear, merged, moe, norm_rope, paged};

pub struct Family {
    /// Files of `metal/`, headers aside.
    pub files: &'static [&'static str],
    /// Runs that reach every kernel's loops and edges.
    pub works: fn() -> Vec<Work>,
    /// Faults of the files, and of headers that they include.
    pub faults: &'static [Fault],
    /// Faults of the runs' plans.
    pub plan_faults: &'static [PlanFault],
}

pub const FAMILIES: &[Family] = &[
    Family {
        files: &["linear.metal"],
        works: linear::works::all,
        faults: linear::faults::FAULTS,
        plan_faults: linear::plan_faults::FAULTS,
    },
    Family {
        files: &["norm_rope.metal"],
        works: norm_rope::works::all,
        faults: norm_rope::faults::FAULTS,
        plan_faults: &[],
    },
    Family {
        files: &["append.metal"],
        works: append::works::all,
        faults: append::faults::FAULTS,
        plan_faults: append::faults::PLAN_FAULTS,
    },
    Family {
        files: &["dense.metal"],
        works: dense::works::all,
        faults: dense::faults::FAULTS,
        plan_faults: &[],
    },
    Family {
        files: &["merged.metal"],
        works: merged::works::all,
        faults: merged::faults::FAULTS,
        plan_faults: merged::plan_faults::FAULTS,
    },
    Family {
        files: &["moe.metal", "router.metal"],
        works: moe::works::all,
        faults: moe::faults::FAULTS,
        plan_faults: &[],
    },
    Family {
        files: &["paged_latents.metal", "paged_heads.metal", "paged_rows.metal"],
        works: paged::works::all,
        faults: paged::faults::FAULTS,
        plan_faults: paged::faults::PLAN_FAULTS,
    },
];
