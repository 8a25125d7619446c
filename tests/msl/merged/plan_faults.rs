//! Faults planted in the plans of metal/merged.metal.

use crate::faults::PlanFault;
use candle_mmfp4::metal::plan::{Binding, Constant, Launch, Plan};

/// Fields of `MergedArgs`, in words.
const M: usize = 0;
const N: usize = 1;
const K: usize = 2;
const HEADS: usize = 3;
const SPLITS: usize = 4;
const WEIGHT_ROW: usize = 5;

/// Buffer indices.
const PARTS: usize = 2;
const STATS: usize = 3;
const ARGS: usize = 5;

/// A function constant.
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
    PlanFault { what: "columns of a part too few", change: |plan| word(plan, K, |k, _| *k > 32 && set(k, *k - 32)) },
    PlanFault { what: "a head's first row of W ignored", change: |plan| word(plan, WEIGHT_ROW, |row, _| *row > 0 && set(row, 0)) },
    PlanFault { what: "parts and what is known of them swapped", change: |plan| {
        let launch = first(plan);
        let stats = bound(launch, STATS).clone();
        *bound(launch, STATS) = std::mem::replace(bound(launch, PARTS), stats);
        true
    } },
    PlanFault { what: "loads of 16 bytes where 8 of the weight are aligned", change: |plan| {
        let constants = &mut first(plan).constants;
        let loads = constants.iter_mut().find(|(index, constant)| *index == LOADS && *constant == Constant::U16(8));
        loads.map(|(_, constant)| *constant = Constant::U16(16)).is_some()
    } },
];

fn first(plan: &mut Plan) -> &mut Launch {
    &mut plan.launches[0]
}

fn bound(launch: &mut Launch, buffer: usize) -> &mut Binding {
    let found = launch.bindings.iter_mut().find(|(index, _)| *index == buffer);
    &mut found.unwrap().1
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
