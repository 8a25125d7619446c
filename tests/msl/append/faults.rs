//! Faults planted in metal/append.metal and what it includes, and in its plans.

use crate::faults::{Fault, PlanFault};
use candle_mmfp4::metal::plan::{Binding, Constant, Launch, Plan};

const FILE: &str = "append.metal";
const CACHE: &str = "cache.h";
const FP4: &str = "fp4.h";

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    Fault { what: "a cache's scale tried too few", file: FILE,
        from: "uint best = min(lowest + candidate, LARGEST_SCALE);", to: "uint best = min(lowest + min(candidate, 6u), LARGEST_SCALE);" },
    Fault { what: "a cache's scales tried from the next one on", file: FILE,
        from: "const uint lowest = max(ideal, 2u) - 2;", to: "const uint lowest = max(ideal, 2u) - 1;" },
    Fault { what: "of a cache's scales as good the largest", file: FILE,
        from: "&& other < best)", to: "&& other > best)" },
    Fault { what: "a cache's error of a group without its last element", file: FILE,
        from: "        for (uint i = 0; i < cache::SHARING; i++) {", to: "        for (uint i = 0; i + 1 < cache::SHARING; i++) {" },
    Fault { what: "a cache's errors added without rounding their squares", file: FILE,
        from: "error += fma(distance, distance, 0.0f);", to: "error = fma(distance, distance, error);" },
    Fault { what: "a scale that half of a cache's lanes compare", file: FILE,
        from: "const float other_error = simd_shuffle_xor(error, apart);", to: "const float other_error = apart < 4 ? simd_shuffle_xor(error, apart) : error;" },
    Fault { what: "shuffles that lanes without a cache's group miss", file: FILE,
        from: "        uint largest = 0;\n        for (uint i = 0; i < each; i++)", to: "        if (first + index >= tasks) {\n            continue;\n        }\n        uint largest = 0;\n        for (uint i = 0; i < each; i++)" },
    Fault { what: "a cache's group written by lanes without one", file: FILE,
        from: "        if (first + index < tasks) {\n            if (candidate == 0)", to: "        if (first + index < tasks + 32) {\n            if (candidate == 0)" },
    Fault { what: "a cache's codes with their nibbles swapped", file: FILE,
        from: "(4 * half_byte)", to: "(4 - 4 * half_byte)" },
    Fault { what: "NaN in a cache's group of FP4 lost", file: FILE,
        from: "const uint chosen = !finite ? NAN_SCALE :", to: "const uint chosen = !finite ? NAN_SCALE & LARGEST_SCALE :" },
    Fault { what: "what FP4 cannot hold in a cache taken for its largest", file: FILE,
        from: "ideal == INFINITE_SCALE ? INFINITE_SCALE", to: "ideal == INFINITE_SCALE ? best" },
    Fault { what: "NaN in a cache's FP8 lost", file: FILE,
        from: ": NAN_E4M3);", to: ": NAN_E4M3 - 1);" },
    Fault { what: "NaN in a cache's FP8 taken for the largest of its group", file: FILE,
        from: "largest = max(largest, bits < INFINITE ? bits : 0);", to: "largest = max(largest, bits);" },
    Fault { what: "a cache's FP8 beyond 448", file: FILE,
        from: "0x001fffffu) >> 23) - 127 - 8", to: "0x000fffffu) >> 23) - 127 - 8" },
    Fault { what: "numbers of FP8 behind the last one of a vector", file: FILE,
        from: "end = min(first + FP8_GROUP, count);", to: "end = first + FP8_GROUP;" },
    Fault { what: "a cache's ties rounded up", file: FILE,
        from: "int(rint(x * power_of_two(3 - exponent)))", to: "int(floor(x * power_of_two(3 - exponent) + 0.5f))" },
    Fault { what: "a cache's BF16 cut off", file: FILE,
        from: "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", to: "bits >> 16" },
    Fault { what: "ties between a cache's codes to the odd one", file: FP4,
        from: "uint(a >= 0.75f * by)", to: "uint(a > 0.75f * by)" },
    Fault { what: "a cache's rotation without signs", file: CACHE,
        from: "return (i * 0x9e3779b1u) >> 31 != 0;", to: "return i > 64;" },
    Fault { what: "a cache's rotation of the wrong length", file: CACHE,
        from: "whole * 0.70710677f", to: "whole * 0.5f" },
    Fault { what: "numbers rotated in a cache before all are there", file: FILE,
        from: "            values[i + distance] = a - b;\n        }\n        threadgroup_barrier(mem_flags::mem_threadgroup);", to: "            values[i + distance] = a - b;\n        }" },
    Fault { what: "a cache's numbers stored before all are there", file: FILE,
        from: "    const uint threads = simdgroups * 32;\n    threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (cache::ROTATED)", to: "    const uint threads = simdgroups * 32;\n    if (cache::ROTATED)" },
    Fault { what: "a cache's chunk over one that is being stored", file: FILE,
        from: "            threadgroup_barrier(mem_flags::mem_threadgroup);\n            for (uint i = index; i < count; i += threads) {\n                values[i] = float(from[start + i]) * by * weight[start + i];", to: "            for (uint i = index; i < count; i += threads) {\n                values[i] = float(from[start + i]) * by * weight[start + i];" },
    Fault { what: "a cache's second chunk with the first one's scales", file: FILE,
        from: "scales + append::scale_bytes(start)", to: "scales" },
    Fault { what: "a cache's latents with the first elements of their norm", file: FILE,
        from: "* by * weight[start + i]", to: "* by * weight[i]" },
    Fault { what: "a cache's tokens all in the first one's block", file: FILE,
        from: "const uint block = slots[group.y] / args.latent.block_tokens;", to: "const uint block = slots[0] / args.latent.block_tokens;" },
    Fault { what: "a cache's keys as they are", file: FILE,
        from: "norm_rope::turned(from + latent, at, row_cosines[i], row_sines[i])", to: "norm_rope::turned(from + latent, at, 1.0f, 0.0f)" },
    Fault { what: "a cache's values where its keys are", file: FILE,
        from: ": cache::codes_at(args.values, block, offset, head));", to: ": cache::codes_at(args.keys, block, offset, head));" },
    Fault { what: "heads of a cache all in the first one's place", file: CACHE,
        from: "part.codes + head * part.head_bytes", to: "part.codes" },
    Fault { what: "a cache's blocks as far apart as tokens", file: CACHE,
        from: "ulong(block) * part.block_bytes + (part.scales", to: "ulong(block) * part.scale_stride + (part.scales" },
];

/// Words of `AppendLatentsArgs` and `AppendHeadsArgs`: of the first part, and behind both.
const BLOCK_BYTES: usize = 0;
const WIDTH: usize = 2;
const CODE_STRIDE: usize = 4;
const BEHIND: usize = 16;

#[rustfmt::skip]
pub const PLAN_FAULTS: &[PlanFault] = &[
    PlanFault { what: "a token of a cache too few", change: |plan| in_append(plan, |launch| {
        launch.threadgroups[1] -= 1;
        true
    }) },
    PlanFault { what: "a token of a cache too many", change: |plan| in_append(plan, |launch| {
        launch.threadgroups[1] += 1;
        true
    }) },
    PlanFault { what: "a cache's vector too few", change: |plan| in_append(plan, |launch| {
        launch.threadgroups[0] -= 1;
        true
    }) },
    PlanFault { what: "a cache's head too many", change: |plan| in_append(plan, |launch| {
        launch.threadgroups[0] += 1;
        launch.kernel.contains("heads")
    }) },
    PlanFault { what: "a pool that is only read", change: |plan| in_append(plan, |launch| {
        let Some((_, binding)) = launch.bindings.iter_mut().find(|(_, binding)| matches!(binding, Binding::Write { .. })) else {
            return false;
        };
        let Binding::Write { operand, offset } = *binding else { return false };
        *binding = Binding::Read { operand, offset };
        true
    }) },
    PlanFault { what: "a pool sixteen bytes further", change: |plan| in_append(plan, |launch| {
        launch.bindings.iter_mut().any(|(_, binding)| match binding {
            Binding::Write { offset, .. } => {
                *offset += 16;
                true
            }
            _ => false,
        })
    }) },
    PlanFault { what: "a cache's vectors rotated that are not, or the other way", change: |plan| constant(plan, 34, |value| match value {
        Constant::Bool(on) => *on = !*on,
        Constant::U16(_) => {}
    }) },
    PlanFault { what: "F16 and BF16 taken for each other in a cache", change: |plan| constant(plan, 32, |value| if let Constant::U16(kind) = value {
        *kind ^= 1;
    }) },
    PlanFault { what: "a cache's blocks all the first", change: |plan| word(plan, BLOCK_BYTES, |bytes| *bytes = 0) },
    PlanFault { what: "a cache's tokens all the first of their block", change: |plan| word(plan, CODE_STRIDE, |stride| *stride = 0) },
    PlanFault { what: "a cache's keys of heads too narrow", change: |plan| of(plan, "heads") && word(plan, WIDTH, |width| *width -= 16) },
    PlanFault { what: "a cache's latents too narrow", change: |plan| of(plan, "latents") && word(plan, BEHIND, |latent| *latent -= 16) },
    PlanFault { what: "a cache's slots taken from its tables", change: |plan| in_append(plan, |launch| {
        let slots = if launch.kernel.contains("heads") { 2 } else { 4 };
        match launch.bindings.iter_mut().find(|(index, _)| *index == slots) {
            Some((_, Binding::Read { offset, .. })) => {
                *offset += 4;
                true
            }
            _ => false,
        }
    }) },
];

fn of(plan: &Plan, kernel: &str) -> bool {
    plan.launches.iter().any(|launch| launch.kernel.contains(kernel))
}

fn in_append(plan: &mut Plan, change: impl Fn(&mut Launch) -> bool) -> bool {
    plan.launches.iter_mut().any(change)
}

fn constant(plan: &mut Plan, index: u16, change: fn(&mut Constant)) -> bool {
    in_append(plan, |launch| {
        launch.constants.iter_mut().any(|(at, value)| {
            let found = *at == index;
            if found {
                change(value);
            }
            found
        })
    })
}

/// Changes a word of the arguments.
fn word(plan: &mut Plan, index: usize, change: fn(&mut u32)) -> bool {
    in_append(plan, |launch| {
        launch.bindings.iter_mut().any(|(_, binding)| match binding {
            Binding::Bytes(bytes) => {
                let at = &mut bytes[4 * index..4 * index + 4];
                let mut value = u32::from_ne_bytes([at[0], at[1], at[2], at[3]]);
                change(&mut value);
                at.copy_from_slice(&value.to_ne_bytes());
                true
            }
            _ => false,
        })
    })
}
