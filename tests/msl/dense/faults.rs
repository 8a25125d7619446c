//! Faults planted in metal/dense.metal.

use crate::faults::Fault;

const FILE: &str = "dense.metal";

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    Fault { what: "the halves of a word of weights swapped", file: FILE,
        from: "return float2(as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));", to: "return float2(as_type<float>(word & 0xffff0000u), as_type<float>(word << 16));" },
    Fault { what: "bfloat weights taken for half", file: FILE,
        from: "return KIND == F16 ? float(as_type<half>(bits)) : as_type<float>(uint(bits) << 16);", to: "return float(as_type<half>(bits));" },
    Fault { what: "loads of 16 bytes where 8 are aligned", file: FILE,
        from: "if (KIND != F32 && LOADS == 16) {", to: "if (KIND != F32) {" },
    Fault { what: "a weight's rows read past the last", file: FILE,
        from: "args.weight_row + group.z * args.weight_head + dense::within(first + r, args.n);", to: "args.weight_row + group.z * args.weight_head + first + r;" },
    Fault { what: "dense sums in half", file: FILE,
        from: "sums[r][m] += dot(low[r], x_low) + dot(high[r], x_high);", to: "sums[r][m] = float(half(sums[r][m] + dot(low[r], x_low) + dot(high[r], x_high)));" },
    Fault { what: "columns read past the last", file: FILE,
        from: "values = dense::four(weight, start + min(column, args.k - 4));", to: "values = dense::four(weight, start + column);" },
    Fault { what: "no barrier before columns' sums meet", file: FILE,
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    // Each simdgroup adds up one", to: "\n    // Each simdgroup adds up one" },
    Fault { what: "a tile's edge not filled with zeros", file: FILE,
        from: "row_of_x && along + i < inner ? float(from_x[along + i]) : 0.0f;", to: "float(from_x[min(along + i, inner - 1)]);" },
    Fault { what: "dense tiles staged again too early", file: FILE,
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n    }\n\n    for (ushort i = 0; i < 2; i++) {\n        for (ushort j = 0; j < 2; j++) {\n            const uint to_row",
        to: "    }\n\n    for (ushort i = 0; i < 2; i++) {\n        for (ushort j = 0; j < 2; j++) {\n            const uint to_row" },
    Fault { what: "every head given the first one's rows", file: FILE,
        from: "    const uint first_x = group.y * TILE, first_y = group.x * TILE;\n    const uint head_row = args.weight_row + group.z * args.weight_head;", to: "    const uint first_x = group.y * TILE, first_y = group.x * TILE;\n    const uint head_row = args.weight_row;" },
];
