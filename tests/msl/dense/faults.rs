//! Faults planted in metal/dense.metal.

use crate::faults::Fault;

const FILE: &str = "dense.metal";
const HEADER: &str = "dense.h";

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    Fault { what: "the halves of a word of weights swapped", file: HEADER,
        from: "return float2(as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));", to: "return float2(as_type<float>(word & 0xffff0000u), as_type<float>(word << 16));" },
    Fault { what: "bfloat weights taken for half", file: HEADER,
        from: "return KIND == F16 ? float(as_type<half>(bits)) : as_type<float>(uint(bits) << 16);", to: "return float(as_type<half>(bits));" },
    Fault { what: "loads of 16 bytes where 8 are aligned", file: HEADER,
        from: "if (LOADS == 16) {\n        return", to: "if (LOADS != 0) {\n        return" },
    Fault { what: "a weight's rows read past the last", file: FILE,
        from: "args.weight_row + group.z * args.weight_head + rows::within(first + r, n);", to: "args.weight_row + group.z * args.weight_head + first + r;" },
    Fault { what: "dense sums in half", file: HEADER,
        from: "sums[i] = rows::add_dot(high[r], x_high, rows::add_dot(low[r], x_low, sums[i]));", to: "sums[i] = float(half(rows::add_dot(high[r], x_high, rows::add_dot(low[r], x_low, sums[i]))));" },
    Fault { what: "a simdgroup's share of K left out", file: FILE,
        from: "for (ushort s = 0; s < dense::SHARES; s++) {", to: "for (ushort s = 1; s < dense::SHARES; s++) {" },
    Fault { what: "what is left of K left out", file: FILE,
        from: "if (at < k) {", to: "if (at < whole * span) {" },
    Fault { what: "a turn between two at once and what is left of K left out", file: FILE,
        from: "for (; turn < whole; turn++) {\n            dense::add_along", to: "for (; turn < turn; turn++) {\n            dense::add_along" },
    Fault { what: "no barrier before the shares of K meet", file: FILE,
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n        sum = 0.0f;", to: "        sum = 0.0f;" },
    Fault { what: "a second dense weight's outputs in place of the first's", file: FILE,
        from: "column = args.n;", to: "column = 0;" },
    Fault { what: "a second dense weight with the first's rows", file: FILE,
        from: "n = args.second_n;", to: "n = args.n;" },
    Fault { what: "the second dense weight taken for the first", file: FILE,
        from: "weight = second_weight;", to: "" },
    Fault { what: "columns read past the last", file: FILE,
        from: "args.k + min(column, args.k - 8);", to: "args.k + column;" },
    Fault { what: "rows of a transposed product left out", file: FILE,
        from: "if (row < n) {", to: "if (row < whole * SPAN) {" },
    Fault { what: "columns of a simdgroup's lanes exchanged", file: FILE,
        from: "lane % ACROSS * 8 + lane / ACROSS]", to: "lane]" },
    Fault { what: "no barrier before columns' sums meet", file: FILE,
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    // A simdgroup for each row of x", to: "\n    // A simdgroup for each row of x" },
    Fault { what: "tiles of a dense product written past the last column", file: FILE,
        from: "if (to_row < args.m && to < outer) {", to: "if (to_row < args.m && to <= outer) {" },
    Fault { what: "dense tiles staged again too early", file: FILE,
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n    }\n\n    for (ushort i = 0; i < 2; i++) {\n        for (ushort j = 0; j < 2; j++) {\n            const uint to_row",
        to: "    }\n\n    for (ushort i = 0; i < 2; i++) {\n        for (ushort j = 0; j < 2; j++) {\n            const uint to_row" },
    Fault { what: "every head given the first one's rows", file: FILE,
        from: "    const uint first_x = group.y * TILE, first_y = group.x * TILE;\n    const uint head_row = args.weight_row + group.z * args.weight_head;", to: "    const uint first_x = group.y * TILE, first_y = group.x * TILE;\n    const uint head_row = args.weight_row;" },
];
