//! Faults planted in the plans of metal/merged.metal.

use crate::faults::PlanFault;
use candle_mmfp4::metal::plan::{Binding, Constant, Launch, Plan};

/// Fields of `MergedArgs`, in words.
const M: usize = 0;
const N: usize = 1;
const HEADS: usize = 3;
const SPLITS: usize = 4;
const WEIGHT_ROW: usize = 5;

/// Buffer indices.
const PARTS: usize = 2;
const STATS: usize = 3;
const ARGS: usize = 5;

/// Function constants: how long rows are (kernels do not read `K` of the arguments where they have this one), and loads.
const KNOWN: u16 = 11;
const LOADS: u16 = 25;

#[rustfmt::skip]
pub const FAULTS: &[PlanFault] = &[
    PlanFault { what: "a threadgroup too few of a merged product", change: |plan| {
        let launch = first(plan);
        launch.threadgroups[0] -= 1;
        launch.threadgroups[0] > 0
    } },
    PlanFault { what: "a head too few of a merged product", change: |plan| {
        let launch = first(plan);
        launch.threadgroups[2] -= 1;
        launch.threadgroups[2] > 0
    } },
    PlanFault { what: "half of the simdgroups that merge", change: |plan| {
        first(plan).threads[0] /= 2;
        true
    } },
    PlanFault { what: "twice the simdgroups that merge", change: |plan| {
        first(plan).threads[0] *= 2;
        true
    } },
    PlanFault { what: "a split too few", change: |plan| word(plan, SPLITS, |splits, _| *splits > 1 && set(splits, *splits - 1)) },
    PlanFault { what: "a split too many", change: |plan| word(plan, SPLITS, |splits, _| set(splits, *splits + 1)) },
    PlanFault { what: "a head of parts too many", change: |plan| word(plan, HEADS, |heads, words| words[M] > 1 && set(heads, *heads + 1)) },
    PlanFault { what: "a token too many", change: |plan| word(plan, M, |m, _| !m.is_power_of_two() && set(m, *m + 1)) },
    PlanFault { what: "a token too few", change: |plan| word(plan, M, |m, _| set(m, *m - 1)) },
    PlanFault { what: "a row of W too few of a merged product", change: |plan| word(plan, N, |n, _| set(n, *n - 1)) },
    PlanFault { what: "columns of a part too few", change: |plan| constant(plan, KNOWN, |k| (k > 32).then(|| k - 32)) },
    PlanFault { what: "a head's first row of W ignored", change: |plan| word(plan, WEIGHT_ROW, |row, _| *row > 0 && set(row, 0)) },
    PlanFault { what: "parts and what is known of them swapped", change: |plan| {
        let launch = first(plan);
        let stats = bound(launch, STATS).clone();
        *bound(launch, STATS) = std::mem::replace(bound(launch, PARTS), stats);
        true
    } },
    PlanFault { what: "loads of 16 bytes where 8 of the weight are aligned", change: |plan| constant(plan, LOADS, |bytes| (bytes == 8).then_some(16)) },
];

fn first(plan: &mut Plan) -> &mut Launch {
    &mut plan.launches[0]
}

fn bound(launch: &mut Launch, buffer: usize) -> &mut Binding {
    let found = launch.bindings.iter_mut().find(|(index, _)| *index == buffer);
    &mut found.unwrap().1
}

/// Changes a function constant, where `change` gives another number for it.
fn constant(plan: &mut Plan, index: u16, change: impl Fn(u16) -> Option<u16>) -> bool {
    let constants = &mut first(plan).constants;
    constants.iter_mut().any(|(at, constant)| match *constant {
        Constant::U16(number) if *at == index => change(number)
            .map(|number| *constant = Constant::U16(number))
            .is_some(),
        _ => false,
    })
}

/// Changes a word of the arguments, which `change` is given with all of them.
fn word(plan: &mut Plan, index: usize, change: impl FnOnce(&mut u32, &[u32]) -> bool) -> bool {
    let Binding::Bytes(bytes) = bound(first(plan), ARGS) else {
        unreachable!("arguments are bytes")
    };
    let words: Vec<_> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|word| u32::from_ne_bytes(*word))
        .collect();
    let mut word = words[index];
    let changed = change(&mut word, &words);
    bytes[index * 4..][..4].copy_from_slice(&word.to_ne_bytes());
    changed
}

fn set(word: &mut u32, value: u32) -> bool {
    *word = value;
    true
}
