//! Faults planted in metal/merged.metal and metal/merge.h.

use crate::faults::Fault;

const FILE: &str = "merged.metal";
const HEADER: &str = "merge.h";

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    Fault { what: "no barrier before merged rows are multiplied", file: FILE,
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    const uint k", to: "\n    const uint k" },
    Fault { what: "each lane's own largest score", file: HEADER,
        from: "    largest = simd_max(largest);\n", to: "" },
    Fault { what: "parts that are not divided", file: HEADER,
        from: "return sum / simd_sum(total);", to: "return sum;" },
    Fault { what: "parts divided by a lane's own sum", file: HEADER,
        from: "return sum / simd_sum(total);", to: "return sum / total;" },
    Fault { what: "splits weighed in base e", file: HEADER,
        from: "weight = exp2(stat.x - largest);", to: "weight = exp(stat.x - largest);" },
    Fault { what: "splits behind the 32nd left out", file: HEADER,
        from: "for (uint start = 0; start < splits; start += 32) {", to: "for (uint start = 0; start < min(splits, 32u); start += 32) {" },
    Fault { what: "the weights of four splits in another order", file: HEADER,
        from: "simd_shuffle(weight, split + i)", to: "simd_shuffle(weight, split + 3 - i)" },
    Fault { what: "the last split left out", file: HEADER,
        from: "for (; split < count; split++) {", to: "for (; split + 1 < count; split++) {" },
    Fault { what: "columns of a part read past the last", file: HEADER,
        from: "right = rows::within(first + 32 + lane, width);", to: "right = first + 32 + lane;" },
    Fault { what: "the first head's parts for every head", file: FILE,
        from: "* args.heads + head) * args.splits;", to: "* args.heads) * args.splits;" },
    Fault { what: "all tokens merged into one row", file: FILE,
        from: "(threadgroup float*)(fours + m * FOURS);", to: "(threadgroup float*)fours;" },
    Fault { what: "what is merged rounded to half", file: FILE,
        from: "row[place(to)] = both[i];", to: "row[place(to)] = float(half(both[i]));" },
    Fault { what: "columns that two simdgroups merge", file: FILE,
        from: "unit += SIMDGROUPS) {", to: "unit += SIMDGROUPS - 1) {" },
    Fault { what: "outputs of tokens that are not there", file: FILE,
        from: "&& group.y * M + m < args.m) {", to: ") {" },
    Fault { what: "outputs of rows of W that are not there", file: FILE,
        from: "first + r < args.n && group", to: "first + r <= args.n && group" },
    Fault { what: "merged rows read without their gaps", file: FILE,
        from: "rows::within(m, there) * FOURS + place(at) / 4;", to: "rows::within(m, there) * FOURS + at / 4;" },
    Fault { what: "a group's scale for all of a row", file: FILE,
        from: "fp4::scale(w.scales[r], at / fp4::GROUP);", to: "fp4::scale(w.scales[r], 0);" },
    Fault { what: "the first turn's rows of W in every turn", file: FILE,
        from: "((group.x * TURNS + turn) * merged::SIMDGROUPS", to: "((group.x * TURNS) * merged::SIMDGROUPS" },
    Fault { what: "the first token's elements for every token", file: FILE,
        from: "const float value = x.one(m, at);", to: "const float value = x.one(0, at);" },
    Fault { what: "rows of a dense weight read past the last", file: FILE,
        from: "ulong(head_row + rows::within(first + r, args.n)) * k", to: "ulong(head_row + first + r) * k" },
];
