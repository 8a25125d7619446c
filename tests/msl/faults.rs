//! Faults planted in the kernels, and in their plans' bindings: the tests that would miss one are worth nothing.

use crate::backend::available;
use crate::checks::{failure, strict};
use candle_mmfp4::metal::host::build::{self, Options, Sanitize};
use candle_mmfp4::metal::source;
use std::fmt::Write as _;
use std::path::Path;

/// A fault: what it is, the file, and the text that is replaced.
struct Fault {
    what: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

/// Which checks found it, in the order in which they ran.
struct Found {
    strict: Option<String>,
    plain: Option<String>,
    schedules: Option<String>,
    addresses: Option<String>,
    races: Option<String>,
}

const LINEAR: &str = "linear.metal";

#[rustfmt::skip]
const FAULTS: &[Fault] = &[
    Fault { what: "no barrier after tiles are staged", file: LINEAR,
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n\n        // Steps of eight", to: "\n        // Steps of eight" },
    Fault { what: "no barrier before tiles are staged again", file: LINEAR,
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n    }\n\n    for (ushort i = 0; i < 2; i++) {\n        for (ushort j = 0; j < 2; j++) {\n            const uint to_row = first_x + top + i * 8 + place.x;\n            for (ushort e = 0; e < 2; e++) {\n                const uint column = first_w",
        to: "    }\n\n    for (ushort i = 0; i < 2; i++) {\n        for (ushort j = 0; j < 2; j++) {\n            const uint to_row = first_x + top + i * 8 + place.x;\n            for (ushort e = 0; e < 2; e++) {\n                const uint column = first_w" },
    Fault { what: "a barrier that orders no memory", file: LINEAR,
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n\n        // Steps of eight",
        to: "        threadgroup_barrier(mem_flags::mem_none);\n\n        // Steps of eight" },
    Fault { what: "no barrier before partial sums meet", file: LINEAR,
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    // Each simdgroup adds up", to: "\n    // Each simdgroup adds up" },
    Fault { what: "a barrier that one simdgroup does not reach", file: LINEAR,
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    // Each simdgroup adds up",
        to: "    if (simdgroup != 3) {\n        threadgroup_barrier(mem_flags::mem_threadgroup);\n    }\n\n    // Each simdgroup adds up" },
    Fault { what: "an early return before a barrier", file: LINEAR,
        from: "    const ushort top = simdgroup / 2 * 16, left = simdgroup % 2 * 16;\n    const ushort2 place",
        to: "    if (!row_of_x) {\n        return;\n    }\n    const ushort top = simdgroup / 2 * 16, left = simdgroup % 2 * 16;\n    const ushort2 place" },
    Fault { what: "rows of W read past the last", file: LINEAR,
        from: "linear::within(first + r, args.n);", to: "(first + r);" },
    Fault { what: "outputs written past the last row of W", file: LINEAR,
        from: "if (lane == 0 && first + r < args.n && first_x", to: "if (lane == 0 && first + r <= args.n && first_x" },
    Fault { what: "outputs written past the last row of x", file: LINEAR,
        from: "if (to_row < args.m && column < args.n) {", to: "if (column < args.n) {" },
    Fault { what: "columns of the transposed product written past the last", file: LINEAR,
        from: "if (word < words && first_x + m < args.m) {", to: "if (first_x + m < args.m) {" },
    Fault { what: "the end of K not filled with zeros", file: LINEAR,
        from: "        if (row_of_w && word < words) {\n            fp4::decode(from_w[word], low, high);\n        }",
        to: "        if (row_of_w && word < words) {\n            fp4::decode(from_w[word], low, high);\n        } else {\n            low = float4(float(tile_w[row][part * 8]));\n        }" },
    Fault { what: "nibbles in the wrong order", file: "fp4.h",
        from: "low = float4(a.x, b.x, c.x, d.x);", to: "low = float4(b.x, a.x, d.x, c.x);" },
    Fault { what: "the sign lost", file: "fp4.h",
        from: " | ((codes & 0x00080008u) << 12)));", to: "));" },
    Fault { what: "the code 0.5 flushed to zero", file: "fp4.h",
        from: "const uint codes = word >> (4 * from);",
        to: "uint codes = word >> (4 * from);\n    codes = (codes & 0x7u) == 1 ? codes & ~0xfu : codes;" },
    Fault { what: "E4M3's subnormals lost", file: "fp4.h",
        from: "const ushort bits = scales[index];\n        value", to: "const ushort bits = (scales[index] & 0x78) == 0 ? 0 : scales[index];\n        value" },
    Fault { what: "a divided factor multiplied", file: "fp4.h",
        from: "value /= factor;", to: "value *= factor;" },
    Fault { what: "the scale of the group before", file: LINEAR,
        from: "(start + from) * 8 / fp4::GROUP, args.factor", to: "max((start + from) * 8 / fp4::GROUP, 1u) - 1, args.factor" },
    Fault { what: "sums in half", file: LINEAR,
        from: "sums[r][m] = fma(part[r][m], scale, sums[r][m]);", to: "sums[r][m] = float(half(fma(part[r][m], scale, sums[r][m])));" },
    Fault { what: "fragments of products in half", file: LINEAR,
        from: "sums[i][j].thread_elements()[0] += products[i][j].thread_elements()[0] * scale;",
        to: "sums[i][j].thread_elements()[0] = float(half(sums[i][j].thread_elements()[0] + products[i][j].thread_elements()[0] * scale));" },
    Fault { what: "rows and columns of a fragment swapped", file: LINEAR,
        from: "return ushort2((quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2);",
        to: "return ushort2((quad & 2) * 2 + (lane % 2) * 2, (quad & 4) + (lane / 2) % 4);" },
    Fault { what: "weights not transposed", file: LINEAR,
        from: "TILE + PAD, ulong2(0, 0), true);", to: "TILE + PAD, ulong2(0, 0), false);" },
    Fault { what: "a reduction that half the lanes do not join", file: LINEAR,
        from: "            float sum = simd_sum(sums[r][m]) * fp4::UNIT;",
        to: "            float sum = 0.0f;\n            if (lane < 16) {\n                sum = simd_sum(sums[r][m]) * fp4::UNIT;\n            }" },
    Fault { what: "all lanes write the output", file: LINEAR,
        from: "if (lane == 0 && first + r < args.n", to: "if (first + r < args.n" },
    Fault { what: "wide loads of codes that are not aligned", file: LINEAR,
        from: "                word[r].x = row_codes[r][start];",
        to: "                word[r] = *(device const uint4*)(row_codes[r] + start);" },
    Fault { what: "arguments of another size than the host's", file: "args.h",
        from: "    uint m;           // rows", to: "    ulong m;          // rows" },
    Fault { what: "the output declared as an input", file: LINEAR,
        from: "    device T* y [[buffer(3)]],\n    constant LinearArgs& args [[buffer(4)]],\n    device const float* bias [[buffer(5), function_constant(HAS_BIAS)]],\n    uint3 group [[threadgroup_position_in_grid]],\n    ushort simdgroup",
        to: "    device const T* y [[buffer(3)]],\n    constant LinearArgs& args [[buffer(4)]],\n    device const float* bias [[buffer(5), function_constant(HAS_BIAS)]],\n    uint3 group [[threadgroup_position_in_grid]],\n    ushort simdgroup" },
    Fault { what: "a grid index taken for another", file: LINEAR,
        from: "const uint first_x = group.y * TILE;\n    const uint first_w", to: "const uint first_x = group.x * TILE;\n    const uint first_w" },
    Fault { what: "a buffer index used twice", file: LINEAR,
        from: "device const uchar* scales [[buffer(1)]],", to: "device const uchar* scales [[buffer(0)]]," },
];

/// Those that every run of the tests plants: one for each kind of check.
const IN_CI: [&str; 5] = [
    "a barrier that one simdgroup does not reach",
    "a barrier that orders no memory",
    "outputs written past the last row of W",
    "sums in half",
    "the code 0.5 flushed to zero",
];

impl Fault {
    /// The kernels with this fault, in a folder of their own.
    fn planted(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in source::HEADERS.iter().chain(source::KERNELS) {
            let text = if file.name == self.file {
                assert!(
                    file.text.contains(self.from),
                    "{}: the text is not there",
                    self.what
                );
                file.text.replace(self.from, self.to)
            } else {
                file.text.to_string()
            };
            std::fs::write(folder.path().join(file.name), text).unwrap();
        }
        folder
    }

    /// Runs the checks; `all` of them, or up to the first that finds it.
    fn find(&self, all: bool) -> Found {
        let folder = self.planted();
        let run = |sanitize, seeds: std::ops::Range<u64>| -> Option<String> {
            let options = Options {
                sanitize,
                program: true,
                ..Options::default()
            };
            match build::library_of(folder.path(), &folder.path().join("build"), &options) {
                Err(error) => Some(format!("does not compile: {}", first_line(&error.to_string()))),
                Ok(program) => seeds
                    .into_iter()
                    .find_map(|seed| failure(&program, seed))
                    .map(|text| text.replace(&format!("{}/", folder.path().display()), "")),
            }
        };
        let strict = strict(folder.path()).map(|text| first_line(&text));
        let mut found = Found {
            strict,
            plain: None,
            schedules: None,
            addresses: None,
            races: None,
        };
        if all || !found.any() {
            found.plain = run(Sanitize::None, 0..1);
        }
        if all || !found.any() {
            found.schedules = run(Sanitize::None, 1..9);
        }
        if all || !found.any() {
            found.addresses = run(Sanitize::Addresses, 0..1);
        }
        if all || !found.any() {
            found.races = run(Sanitize::Threads, 0..1);
        }
        found
    }
}

impl Found {
    fn each(&self) -> [&Option<String>; 5] {
        [
            &self.strict,
            &self.plain,
            &self.schedules,
            &self.addresses,
            &self.races,
        ]
    }

    fn any(&self) -> bool {
        self.each().iter().any(|found| found.is_some())
    }
}

/// The first line that tells something, without folders.
fn first_line(text: &str) -> String {
    let telling = |line: &&str| line.contains("error") || line.contains("lint");
    let line = text
        .lines()
        .find(telling)
        .or_else(|| text.lines().next())
        .unwrap_or_default();
    let line = line.rsplit('/').next().unwrap_or(line);
    line.chars().take(70).collect()
}

#[test]
fn planted_faults_are_found() {
    if !available() {
        return;
    }
    for what in IN_CI {
        let fault = FAULTS.iter().find(|fault| fault.what == what).unwrap();
        assert!(fault.find(false).any(), "nothing finds: {what}");
    }
}

/// All of them through all checks; writes docs/metal-faults.md.
#[test]
#[ignore = "many minutes: cargo test --release --features msl-host --test msl -- --ignored faults"]
fn faults() {
    assert!(available());
    let mut table = String::from(
        "# Faults planted in the Metal kernels\n\n\
         Each is one change of `metal/`, put through every check on Linux; a cell tells what the check said. Written by\n\
         `cargo test --release --features msl-host --test msl -- --ignored faults`, which fails where nothing finds one.\n\n\
         | fault | strict check | numbers, threads in order | eight other schedules | addresses, undefined behaviour | races |\n\
         |---|---|---|---|---|---|\n",
    );
    let mut missed = Vec::new();
    for fault in FAULTS {
        let found = fault.find(true);
        let cells = found
            .each()
            .map(|cell| cell.as_deref().unwrap_or("").replace('|', "\\|"));
        writeln!(table, "| {} | {} |", fault.what, cells.join(" | ")).unwrap();
        eprintln!("{}: {cells:?}", fault.what);
        if !found.any() {
            missed.push(fault.what);
        }
    }
    std::fs::write(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metal-faults.md"),
        table,
    )
    .unwrap();
    assert!(missed.is_empty(), "nothing finds {missed:?}");
}
