//! Faults planted in metal/paged_latents.metal, metal/paged_heads.metal, metal/paged_rows.metal, what they include, and their
//! plans.

use crate::faults::{Fault, PlanFault};
use candle_mmfp4::metal::plan::{Binding, Launch, Plan};

const LATENTS: &str = "paged_latents.metal";
const HEADS: &str = "paged_heads.metal";
const ROWS: &str = "paged_rows.metal";
const PAGED: &str = "paged.h";
const CACHE: &str = "cache.h";
const FP4: &str = "fp4.h";

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    Fault { what: "tokens decoded over those that are still read", file: LATENTS,
        from: "        // Whoever still reads the tokens before is waited for.\n        threadgroup_barrier(mem_flags::mem_threadgroup);\n", to: "" },
    Fault { what: "tokens read before they are decoded", file: LATENTS,
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n\n        const uint there", to: "        const uint there" },
    Fault { what: "decoded tokens behind a barrier that orders no memory", file: LATENTS,
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n\n        const uint there", to: "        threadgroup_barrier(mem_flags::mem_none);\n\n        const uint there" },
    Fault { what: "a simdgroup without heads gone before the barrier", file: LATENTS,
        from: "    float4 query[HEADS][FOURS];\n    float2 turned", to: "    if (head >= heads) {\n        return;\n    }\n    float4 query[HEADS][FOURS];\n    float2 turned" },
    Fault { what: "latents' scores without rotary keys", file: LATENTS,
        from: "float sum = fma(key.y, turned[h].y, key.x * turned[h].x);", to: "float sum = key.x * turned[h].x;" },
    Fault { what: "a row too many at the end of a tile", file: LATENTS,
        from: "score = row + lane / (LANES * HEADS) < there ? score", to: "score = row + lane / (LANES * HEADS) <= there ? score" },
    Fault { what: "latents' sums not scaled down", file: LATENTS,
        from: "sums[h][i] *= by;", to: "sums[h][i] *= 1.0f;" },
    Fault { what: "weights of the other head", file: LATENTS,
        from: "simd_shuffle(weight, (r * HEADS + h) * LANES)", to: "simd_shuffle(weight, (h * HEADS + r) * LANES)" },
    Fault { what: "a head that is not there written", file: LATENTS,
        from: "        if (head + h < heads) {\n            const ulong row", to: "        if (head + h <= heads) {\n            const ulong row" },
    Fault { what: "blocks taken in the order of the pool", file: LATENTS,
        from: "const uint block = table[at / args.keys.block_tokens], offset", to: "const uint block = at / args.keys.block_tokens, offset" },
    Fault { what: "latents' outputs not divided", file: LATENTS,
        from: "sums[h][i] / of_head", to: "sums[h][i]" },
    Fault { what: "latents' outputs left rotated", file: LATENTS,
        from: "            paged::rotate_back(sums[h], width, lane);", to: "" },
    Fault { what: "latents' queries not rotated", file: LATENTS,
        from: "            paged::rotate_query(query[h], width, lane);", to: "" },
    Fault { what: "heads' tokens all of the first simdgroup's", file: HEADS,
        from: "for (uint first = seen.x + simdgroup * STEP;", to: "for (uint first = seen.x;" },
    Fault { what: "simdgroups' sums met before all are there", file: HEADS,
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    const uint width", to: "    const uint width" },
    Fault { what: "a token that is not seen given a weight", file: HEADS,
        from: "score = first + lane / (LANES * HEADS) < seen.y ? score : paged::none();", to: "score = first + lane / (LANES * HEADS) <= seen.y ? score : paged::none();" },
    Fault { what: "the first kv head's keys for all", file: HEADS,
        from: "cache::codes_at(args.keys, block[t], offset[t], kv_head)", to: "cache::codes_at(args.keys, block[t], offset[t], 0)" },
    Fault { what: "the first kv head's scales for all", file: HEADS,
        from: "cache::scales_at(args.values, block[t], offset[t], kv_head)", to: "cache::scales_at(args.values, block[t], offset[t], 0)" },
    Fault { what: "simdgroups' sums added as they are", file: HEADS,
        from: "            const float by = paged::worth(met_stats[s][h], most);", to: "            const float by = 1.0f;" },
    Fault { what: "query heads of the next kv head", file: HEADS,
        from: "const uint heads = (kv_head + 1) * args.together;", to: "const uint heads = args.heads;" },
    Fault { what: "heads' parts in another split's place", file: HEADS,
        from: "* args.splits + group.x;", to: "* args.splits;" },
    Fault { what: "stats of one simdgroup only", file: HEADS,
        from: "if (lane % LANES == 0 && lane < LANES * HEADS) {", to: "if (simdgroup == 0 && lane % LANES == 0 && lane < LANES * HEADS) {" },
    Fault { what: "a window's first token left out", file: PAGED,
        from: "end > args.window ? end - args.window : 0", to: "end > args.window ? end - args.window + 1 : 0" },
    Fault { what: "a window's splits counted from the context's start", file: PAGED,
        from: "(first / tokens + split) * tokens", to: "split * tokens" },
    Fault { what: "a query that does not see itself", file: PAGED,
        from: "const uint end = position + 1;", to: "const uint end = position;" },
    Fault { what: "splits that overlap", file: PAGED,
        from: "min(end, start + tokens)", to: "min(end, start + tokens + 1)" },
    Fault { what: "sums of weights not scaled down", file: PAGED,
        from: "total = fma(total, kept, sum);", to: "total += sum;" },
    Fault { what: "the largest score of one token in turn", file: PAGED,
        from: "        most = fmax(most, simd_shuffle_xor(most, apart));", to: "        most = fmax(most, most);" },
    Fault { what: "elements stored past a vector's end", file: PAGED,
        from: "        if (first + k < width) {\n            to", to: "        if (first + k <= width) {\n            to" },
    Fault { what: "signs of a rotation left out", file: PAGED,
        from: "x[k] = cache::turns((lane * 4u + k) & (block - 1)) ? -x[k] : x[k];", to: "x[k] = x[k];" },
    Fault { what: "a rotation one step short", file: PAGED,
        from: "for (ushort apart = 1; apart * 4u < block; apart *= 2) {", to: "for (ushort apart = 1; apart * 8u < block; apart *= 2) {" },
    Fault { what: "parts merged as they are", file: ROWS,
        from: "const float by = paged::worth(of_split, most);", to: "const float by = 1.0f;" },
    Fault { what: "parts merged without the last split", file: ROWS,
        from: "        for (uint split = 0; split < args.splits; split++) {\n            const float2", to: "        for (uint split = 0; split + 1 < args.splits; split++) {\n            const float2" },
    Fault { what: "tokens gathered from the table's start", file: ROWS,
        from: "const uint at = args.first + row;", to: "const uint at = row;" },
    Fault { what: "a token too many gathered", file: ROWS,
        from: "if (row < args.positions) {", to: "if (row <= args.positions) {" },
    Fault { what: "values gathered in the keys' place", file: ROWS,
        from: "args.heads * args.keys.width + head * width : head * width", to: "head * width : head * width" },
    Fault { what: "rotary keys read as the latents are stored", file: ROWS,
        from: "to[i] = T(cache::of_rotary(pool + codes_at, i));", to: "to[i] = T(cache::element(pool + codes_at, pool + scales_at, i));" },
    Fault { what: "a scale every eight elements", file: CACHE,
        from: "return fp4::decode_four(all) * (fp4::UNIT * fp4_scale(scales[i / SHARING]));", to: "return fp4::decode_four(all) * (fp4::UNIT * fp4_scale(scales[i / 8]));" },
    Fault { what: "a vector read past its end", file: CACHE,
        from: "return i < width ? four(codes, scales, i) : float4(0.0f);", to: "return four(codes, scales, i);" },
    Fault { what: "E4M3 without its 256", file: CACHE,
        from: "return float4(even.x, odd.x, even.y, odd.y) * 256.0f *", to: "return float4(even.x, odd.x, even.y, odd.y) *" },
    Fault { what: "neighbours of four codes swapped", file: FP4,
        from: "placed(((codes & 0xfu) | (codes & 0xf0u) << 12) << 9)", to: "placed(((codes & 0xf0u) >> 4 | (codes & 0xfu) << 16) << 9)" },
];

pub const PLAN_FAULTS: &[PlanFault] = &[
    PlanFault {
        what: "the index from its second word on",
        change: |plan| moved(plan, 3, 4),
    },
    PlanFault {
        what: "the pool from its second block on",
        change: |plan| moved(plan, 2, 16 * 64),
    },
    PlanFault {
        what: "threadgroups for a split too few",
        change: |plan| first_of(plan, "paged_", |launch| shrink(&mut launch.threadgroups[0])),
    },
    PlanFault {
        what: "threadgroups for a token too few",
        change: |plan| first_of(plan, "paged_", |launch| shrink(&mut launch.threadgroups[1])),
    },
    PlanFault {
        what: "a group of heads too few",
        change: |plan| first_of(plan, "paged_", |launch| shrink(&mut launch.threadgroups[2])),
    },
    PlanFault {
        what: "a simdgroup too few for the heads of a token",
        change: |plan| {
            first_of(plan, "paged_latents", |launch| {
                let enough = launch.threads[0] > 32;
                launch.threads[0] -= if enough { 32 } else { 0 };
                enough
            })
        },
    },
    PlanFault {
        what: "merging of a row too few",
        change: |plan| first_of(plan, "merge_parts", |launch| shrink(&mut launch.threadgroups[0])),
    },
    PlanFault {
        what: "gathering of a threadgroup too few",
        change: |plan| first_of(plan, "gather_paged", |launch| shrink(&mut launch.threadgroups[0])),
    },
    PlanFault {
        what: "parts without their merging",
        change: |plan| {
            let merges = plan.launches.len() > 1;
            plan.launches.truncate(1);
            merges
        },
    },
];

fn shrink(size: &mut usize) -> bool {
    let more = *size > 1;
    *size -= usize::from(more);
    more
}

/// Changes the first launch of such a kernel.
fn first_of(plan: &mut Plan, kernel: &str, change: impl Fn(&mut Launch) -> bool) -> bool {
    let found = plan
        .launches
        .iter_mut()
        .find(|launch| launch.kernel.starts_with(kernel));
    found.is_some_and(change)
}

/// Moves what stands at a buffer index of attention over latents by some bytes.
fn moved(plan: &mut Plan, index: usize, by: usize) -> bool {
    first_of(plan, "paged_latents", |launch| {
        let binding = launch.bindings.iter_mut().find(|(at, _)| *at == index);
        let Some((_, Binding::Read { offset, .. })) = binding else {
            return false;
        };
        *offset += by;
        true
    })
}
