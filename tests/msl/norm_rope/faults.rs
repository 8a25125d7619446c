//! Faults planted in metal/norm_rope.metal.

use crate::faults::Fault;

const FILE: &str = "norm_rope.metal";
const HEADER: &str = "norm_rope.h";

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    Fault { what: "a norm's sums read before they are all written", file: HEADER,
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    return simd_sum(lane", to: "    return simd_sum(lane" },
    Fault { what: "a norm of the first simdgroup's elements only", file: HEADER,
        from: "return simd_sum(lane < simdgroups ? parts[lane] : 0.0f);", to: "return simd_sum(lane < 1 ? parts[lane] : 0.0f);" },
    Fault { what: "a norm's sums of simdgroups that are not there", file: HEADER,
        from: "return simd_sum(lane < simdgroups ? parts[lane] : 0.0f);", to: "return simd_sum(parts[lane]);" },
    Fault { what: "epsilon left out", file: HEADER,
        from: "squares / float(d) + eps)", to: "squares / float(d))" },
    Fault { what: "squares in half", file: HEADER,
        from: "sum += dot(value, value);", to: "sum += float(half(value.x * value.x)) + float(half(value.y * value.y)) + float(half(value.z * value.z)) + float(half(value.w * value.w));" },
    Fault { what: "a norm of sums that are not rounded", file: FILE,
        from: "    const float own = norm_rope::squares((device const T*)sums, args.d, index, threads);\n    const float sum = norm_rope::total(own, parts, simdgroup, lane, simdgroups);\n    const float by = norm_rope::factor(sum, args.d, args.eps);\n    norm_rope::scale((device const T*)sums, weight,",
        to: "    const float own = norm_rope::squares(left, args.d, index, threads);\n    const float sum = norm_rope::total(own, parts, simdgroup, lane, simdgroups);\n    const float by = norm_rope::factor(sum, args.d, args.eps);\n    norm_rope::scale((device const T*)sums, weight," },
    Fault { what: "a pair turned the other way", file: HEADER,
        from: "a * sine + b * cosine);", to: "b * cosine - a * sine);" },
    Fault { what: "neighbours taken for halves", file: HEADER,
        from: "const uint second = INTERLEAVED ? 2 * i + 1 : i + pairs;", to: "const uint second = INTERLEAVED ? 2 * i + 1 : i + 1;" },
    Fault { what: "a token's queries turned by the first one's angles", file: FILE,
        from: "device const float* row_sines = sines + ulong(group.y) * args.sin_row;", to: "device const float* row_sines = sines;" },
    Fault { what: "pairs turned past the last head", file: HEADER,
        from: "if (place < heads * pairs)", to: "if (place <= heads * pairs)" },
    Fault { what: "a barrier that queries' threadgroups share with half their lanes", file: FILE,
        from: "    if (group.x == 0) {\n        device const T* from = kv", to: "    if (group.x == 0 && index < 16) {\n        device const T* from = kv" },
    Fault { what: "sums written past the end of a row", file: FILE,
        from: "            if (i < args.d) {\n                to[i]", to: "            if (i <= args.d) {\n                to[i]" },
];
