//! Faults planted in the plans of metal/linear.metal.

use crate::faults::PlanFault;
use candle_mmfp4::metal::plan::{Binding, Constant, Launch, Plan};

/// Fields of `LinearArgs`, in words.
const M: usize = 0;
const N: usize = 1;
const K: usize = 2;
const X_ROW: usize = 3;
const X_HEAD: usize = 4;
const Y_ROW: usize = 5;
const Y_HEAD: usize = 6;
const WEIGHT_ROW: usize = 7;
const WEIGHT_HEAD: usize = 8;
const FACTOR: usize = 9;

/// Buffer indices.
const SCALES: usize = 1;
const X: usize = 2;
const Y: usize = 3;
const ARGS: usize = 4;
const BIAS: usize = 5;

/// Function constants.
const KIND: u16 = 0;
const GROUP: u16 = 1;
const FACTOR_KIND: u16 = 2;
const WIDE: u16 = 3;
const HAS_BIAS: u16 = 4;

#[rustfmt::skip]
pub const FAULTS: &[PlanFault] = &[
    PlanFault { what: "a threadgroup too few along x", change: |plan| short(plan, 0) },
    PlanFault { what: "a threadgroup too few along y", change: |plan| short(plan, 1) },
    PlanFault { what: "a head too few", change: |plan| short(plan, 2) },
    PlanFault { what: "twice as many heads", change: |plan| in_linear(plan, |launch| {
        launch.threadgroups[2] *= 2;
        true
    }) },
    PlanFault { what: "grid x and y swapped", change: |plan| in_linear(plan, |launch| {
        launch.threadgroups.swap(0, 1);
        launch.threadgroups[0] != launch.threadgroups[1]
    }) },
    PlanFault { what: "half the threads", change: |plan| in_linear(plan, |launch| {
        launch.threads[0] /= 2;
        !launch.kernel.contains("_tiles") || args(launch)[M] > 16 || args(launch)[N] > 16
    }) },
    PlanFault { what: "twice the threads", change: |plan| in_linear(plan, |launch| {
        launch.threads[0] *= 2;
        !launch.kernel.contains("_rows") || launch.threadgroups[0] > 1
    }) },
    PlanFault { what: "threads that are no multiple of a simdgroup", change: |plan| in_linear(plan, |launch| {
        launch.threads[0] -= 16;
        launch.kernel.contains("_tiles") || args(launch)[K] > 1024
    }) },
    PlanFault { what: "x a row too far", change: |plan| further(plan, X, X_ROW) },
    PlanFault { what: "y a row too far", change: |plan| further(plan, Y, Y_ROW) },
    PlanFault { what: "x an element too far", change: |plan| in_linear(plan, |launch| {
        let size = element(launch);
        offset(launch, X, size)
    }) },
    PlanFault { what: "biases one too far", change: |plan| in_linear(plan, |launch| offset(launch, BIAS, 4)) },
    PlanFault { what: "rows of x too far apart", change: |plan| word(plan, X_ROW, |row, args| args[M] > 1 && add(row, 4)) },
    PlanFault { what: "rows of x all the same", change: |plan| word(plan, X_ROW, |row, args| args[M] > 1 && set(row, 0)) },
    PlanFault { what: "rows of y too close", change: |plan| word(plan, Y_ROW, |row, args| args[M] > 1 && set(row, *row - 1)) },
    PlanFault { what: "heads of x all the same", change: |plan| of_heads(plan, X_HEAD, 0) },
    PlanFault { what: "heads of y all the same", change: |plan| of_heads(plan, Y_HEAD, 0) },
    PlanFault { what: "a head's rows right behind the last one's", change: |plan| in_linear(plan, |launch| {
        let rows = args(launch)[N];
        launch.threadgroups[2] > 1 && change_word(launch, WEIGHT_HEAD, |stride, _| *stride != rows && set(stride, rows))
    }) },
    PlanFault { what: "the first row of W that a head has ignored",
        change: |plan| word(plan, WEIGHT_ROW, |row, _| *row > 0 && set(row, 0)) },
    PlanFault { what: "a row of x too many", change: |plan| in_linear(plan, |launch| {
        let (rows, _) = block(launch);
        change_word(launch, M, |m, _| !m.is_multiple_of(rows) && add(m, 1))
    }) },
    PlanFault { what: "a row of x too few", change: |plan| word(plan, M, |m, _| *m > 1 && set(m, *m - 1)) },
    PlanFault { what: "a row of W too many", change: |plan| in_linear(plan, |launch| {
        let (_, rows) = block(launch);
        change_word(launch, N, |n, _| !n.is_multiple_of(rows) && add(n, 1))
    }) },
    PlanFault { what: "a row of W too few", change: |plan| word(plan, N, |n, _| *n > 1 && set(n, *n - 1)) },
    PlanFault { what: "a group along K too few", change: |plan| in_linear(plan, |launch| {
        let group = u32::from(constant(launch, GROUP));
        change_word(launch, K, |k, _| *k > group && set(k, *k - group))
    }) },
    PlanFault { what: "a group along K too many", change: |plan| in_linear(plan, |launch| {
        let group = u32::from(constant(launch, GROUP));
        change_word(launch, K, |k, _| add(k, group))
    }) },
    PlanFault { what: "n and k swapped", change: |plan| word(plan, N, |n, args| *n != args[K] && {
        std::mem::swap(n, &mut args[K]);
        true
    }) },
    PlanFault { what: "another factor", change: |plan| in_linear(plan, |launch| {
        constant(launch, FACTOR_KIND) != 0 && change_word(launch, FACTOR, |factor, _| set(factor, 1f32.to_bits()))
    }) },
    PlanFault { what: "the kernel for fewer rows of x", change: |plan| variant(plan, &[("_m8", "_m4"), ("_m4", "_m1"), ("_m2", "_m1")]) },
    PlanFault { what: "the kernel for more rows of x", change: |plan| variant(plan, &[("_m4", "_m8"), ("_m2", "_m8")]) },
    PlanFault { what: "the kernel of another type", change: |plan| variant(plan, &[("_f32", "_f16"), ("_bf16", "_f16"), ("_f16", "_bf16")]) },
    PlanFault { what: "the kernel of the transposed product", change: |plan| variant(plan, &[("_tiles", "_columns_tiles"), ("_rows_f32_m1", "_columns_f32_m1")]) },
    PlanFault { what: "another group", change: |plan| set_constant(plan, GROUP, |old| Constant::U16(if old == 32 { 64 } else { 32 })) },
    PlanFault { what: "another kind of scales", change: |plan| set_constant(plan, KIND, |old| Constant::U16((old + 1) % 4)) },
    PlanFault { what: "a divided factor multiplied by the plan", change: |plan| in_linear(plan, |launch| {
        constant(launch, FACTOR_KIND) == 2 && replace_constant(launch, FACTOR_KIND, |_| Constant::U16(1))
    }) },
    PlanFault { what: "wide loads of what is not aligned", change: |plan| in_linear(plan, |launch| {
        launch.kernel.contains("_rows") && constant(launch, WIDE) == 0 && replace_constant(launch, WIDE, |_| Constant::Bool(true))
    }) },
    PlanFault { what: "biases that are not bound", change: |plan| in_linear(plan, |launch| {
        has(launch, HAS_BIAS) && constant(launch, HAS_BIAS) == 0 && replace_constant(launch, HAS_BIAS, |_| Constant::Bool(true))
    }) },
    PlanFault { what: "biases bound and not added", change: |plan| in_linear(plan, |launch| {
        has(launch, HAS_BIAS) && constant(launch, HAS_BIAS) == 1 && replace_constant(launch, HAS_BIAS, |_| Constant::Bool(false))
    }) },
    PlanFault { what: "a constant left out", change: |plan| in_linear(plan, |launch| {
        launch.constants.retain(|(index, _)| *index != GROUP);
        true
    }) },
    PlanFault { what: "an input bound for writing", change: |plan| in_linear(plan, |launch| {
        let Binding::Read { operand, offset } = *bound(launch, SCALES) else { return false };
        *bound(launch, SCALES) = Binding::Write { operand, offset };
        true
    }) },
    PlanFault { what: "the output bound for reading", change: |plan| in_linear(plan, |launch| {
        let Binding::Write { operand, offset } = *bound(launch, Y) else { return false };
        *bound(launch, Y) = Binding::Read { operand, offset };
        true
    }) },
    PlanFault { what: "codes and scales swapped", change: |plan| in_linear(plan, |launch| swap(launch, 0, SCALES)) },
    PlanFault { what: "scales and x swapped", change: |plan| in_linear(plan, |launch| swap(launch, SCALES, X)) },
    PlanFault { what: "the output written over x", change: |plan| in_linear(plan, |launch| {
        let Binding::Read { operand, offset } = *bound(launch, X) else { return false };
        *bound(launch, Y) = Binding::Write { operand, offset };
        true
    }) },
    PlanFault { what: "the output not bound", change: |plan| in_linear(plan, |launch| {
        launch.bindings.retain(|(index, _)| *index != Y);
        true
    }) },
    PlanFault { what: "a launch left out", change: |plan| in_linear(plan, |_| true) && plan.launches.pop().is_some() },
];

/// Changes the first launch of a plan, where it is one of a kernel of this family.
fn in_linear(plan: &mut Plan, change: impl FnOnce(&mut Launch) -> bool) -> bool {
    let launch = &mut plan.launches[0];
    launch.kernel.starts_with("linear_") && change(launch)
}

fn short(plan: &mut Plan, axis: usize) -> bool {
    in_linear(plan, |launch| {
        launch.threadgroups[axis] -= 1;
        launch.threadgroups[axis] > 0
    })
}

/// Binds a buffer as many elements further as an argument says.
fn further(plan: &mut Plan, buffer: usize, by: usize) -> bool {
    in_linear(plan, |launch| {
        let bytes = args(launch)[by] as usize * element(launch);
        offset(launch, buffer, bytes)
    })
}

fn offset(launch: &mut Launch, buffer: usize, bytes: usize) -> bool {
    let found = launch.bindings.iter_mut().find(|(index, _)| *index == buffer);
    match found {
        Some((_, Binding::Read { offset, .. } | Binding::Write { offset, .. })) => {
            *offset += bytes;
            true
        }
        _ => false,
    }
}

/// Rows of x and of W that a threadgroup has: those that it does not need are not written.
fn block(launch: &Launch) -> (u32, u32) {
    match launch.kernel.rsplit_once("_m") {
        Some((_, "8")) => (8, 4),
        Some((_, rows)) => (rows.parse().unwrap(), 8),
        None => (32, 32),
    }
}

fn element(launch: &Launch) -> usize {
    if launch.kernel.contains("_f32") { 4 } else { 2 }
}

fn bound(launch: &mut Launch, buffer: usize) -> &mut Binding {
    let found = launch.bindings.iter_mut().find(|(index, _)| *index == buffer);
    &mut found.unwrap().1
}

fn swap(launch: &mut Launch, a: usize, b: usize) -> bool {
    let first = bound(launch, a).clone();
    let second = std::mem::replace(bound(launch, b), first);
    *bound(launch, a) = second;
    true
}

fn args(launch: &mut Launch) -> Vec<u32> {
    let Binding::Bytes(bytes) = bound(launch, ARGS) else {
        unreachable!("arguments are bytes")
    };
    let words = bytes.as_chunks().0.iter();
    words.map(|word| u32::from_ne_bytes(*word)).collect()
}

/// Changes a word of the arguments, which `change` is given with all of them.
fn change_word(launch: &mut Launch, index: usize, change: impl FnOnce(&mut u32, &mut [u32]) -> bool) -> bool {
    let mut words = args(launch);
    let mut word = words[index];
    let changed = change(&mut word, &mut words);
    words[index] = word;
    *bound(launch, ARGS) = Binding::Bytes(words.into_iter().flat_map(u32::to_ne_bytes).collect());
    changed
}

fn word(plan: &mut Plan, index: usize, change: impl FnOnce(&mut u32, &mut [u32]) -> bool) -> bool {
    in_linear(plan, |launch| change_word(launch, index, change))
}

fn of_heads(plan: &mut Plan, index: usize, value: u32) -> bool {
    in_linear(plan, |launch| {
        launch.threadgroups[2] > 1 && change_word(launch, index, |word, _| set(word, value))
    })
}

fn set(word: &mut u32, value: u32) -> bool {
    *word = value;
    true
}

fn add(word: &mut u32, value: u32) -> bool {
    *word += value;
    true
}

/// Launches another kernel, whose name differs by the first of these that it has.
fn variant(plan: &mut Plan, names: &[(&str, &str)]) -> bool {
    in_linear(plan, |launch| {
        let found = names.iter().find(|(from, _)| launch.kernel.contains(from));
        found.is_some_and(|(from, to)| {
            launch.kernel = launch.kernel.replacen(from, to, 1);
            true
        })
    })
}

fn has(launch: &Launch, index: u16) -> bool {
    launch.constants.iter().any(|(at, _)| *at == index)
}

fn constant(launch: &Launch, index: u16) -> u16 {
    let found = launch.constants.iter().find(|(at, _)| *at == index);
    match found.unwrap().1 {
        Constant::Bool(on) => u16::from(on),
        Constant::U16(number) => number,
    }
}

fn replace_constant(launch: &mut Launch, index: u16, new: impl FnOnce(u16) -> Constant) -> bool {
    let new = new(constant(launch, index));
    let found = launch.constants.iter_mut().find(|(at, _)| *at == index);
    found.unwrap().1 = new;
    true
}

fn set_constant(plan: &mut Plan, index: u16, new: impl FnOnce(u16) -> Constant) -> bool {
    in_linear(plan, |launch| replace_constant(launch, index, new))
}
