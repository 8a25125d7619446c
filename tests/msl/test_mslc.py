"""The check and the build of Metal kernels, tried on small ones: `python3 -m unittest discover -s tests/msl`."""
import math
import re
import struct
import tempfile
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mslc import clang, driver
from refused import ACCEPTED, MATRIX, ONLINE, REDUCE, REFUSED, VECTORS, file_of
from support import (
    BYTES, READ, WRITE, Launch, Library, as_floats, as_words, floats, mslc, run_program, words, write_run_file,
)  # fmt: skip

CONSTRUCTS = Path(__file__).parent / "accepted.metal"
KERNELS = """#include <metal_stdlib>
using namespace metal;
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define TID uint tid [[thread_index_in_threadgroup]]
kernel void divergent(device float* y, TID) { if (tid < 32) { BARRIER; } else {
 BARRIER; } y[tid] = 1; }
kernel void returned(device float* y, TID) { if (tid == 5) return; BARRIER; y[tid] = 1; }
kernel void returned_later(device float* y, TID) { BARRIER; if (tid == 5) return; y[tid] = 1; BARRIER; }
kernel void returned_lane(device float* y, TID) { if (tid == 5) return; y[tid] = simd_sum(1.0f); }
kernel void different(device float* y, TID) { y[tid] = tid % 2 ? simd_sum(1.0f) : simd_max(2.0f); }
kernel void mixed(device float* y, TID) { if (tid % 2) { BARRIER; } else { y[tid] = simd_sum(1.0f); } }
kernel void half_matrix(device float* y, TID) { simdgroup_float8x8 m(1.0f); simdgroup_store(m, y, 8); }
kernel void skewed(device float* y, TID) { simdgroup_float8x8 m(1.0f); simdgroup_store(m, y + tid % 2, 8);
  simdgroup_barrier(mem_flags::mem_none); }
kernel void broadcast(device float* y, TID) { y[tid] = simd_broadcast(1.0f, ushort(tid % 32)); }
kernel void dynamic(device float* y, threadgroup float* a [[threadgroup(0)]], threadgroup float* b [[threadgroup(1)]],
  TID) { threadgroup float c[4]; c[tid % 4] = 1; y[tid] = a[0] + b[0] + c[0]; }
kernel void poison(device float* y, device uint* z, TID) { threadgroup float t[4]; threadgroup uint u;
  simdgroup_float8x8 m; y[tid] = tid % 2 ? t[tid % 4] : m.thread_elements()[0]; z[tid] = u; }
kernel void rounding(device const float* x, device float* y) { y[0] = x[0] * x[0] - x[1];
  const half one = half(x[2]), little = half(x[3]); y[1] = float(one + little + little);
  y[2] = x[0] + x[4] - x[4]; }
kernel void late(device float* y, TID) { threadgroup float t[64]; t[tid] = float(tid); y[tid] = t[tid ^ 1]; }
kernel void again(device float* y, TID) { threadgroup float t[64]; float sum = 0;
  for (uint r = 1; r < 4; r++) { t[tid] = float(r * tid); BARRIER; sum = sum * 100 + t[tid ^ 33]; } y[tid] = sum; }
kernel void order(device atomic_uint* next, device uint* y, TID, uint g [[threadgroup_position_in_grid]]) {
  y[g * 64 + tid] = atomic_fetch_add_explicit(next, 1u, memory_order_relaxed); }
[[max_total_threads_per_threadgroup(64)]] kernel void few(device float* y, TID) { y[tid] = 1; }
kernel void lanes(device uint* y, ushort lane [[thread_index_in_simdgroup]]) {
  const uint x = lane * lane;
  y[lane] = simd_sum(x); y[32 + lane] = simd_prefix_exclusive_sum(x); y[64 + lane] = simd_prefix_inclusive_sum(x);
  y[96 + lane] = simd_shuffle_xor(x, 5); y[128 + lane] = simd_shuffle_down(x, 3); y[160 + lane] = simd_shuffle_up(x, 3);
  y[192 + lane] = simd_broadcast(x, 7); y[224 + lane] = uint(ulong(simd_ballot(lane % 3 == 0)));
  y[256 + lane] = simd_shuffle(x, 31 - lane); y[288 + lane] = simd_min(x + 1) + simd_max(x) + uint(simd_any(lane == 3));
  y[320 + lane] = simd_broadcast_first(lane + 9); y[352 + lane] = simd_shuffle_rotate_up(x, 1); }
kernel void tail(device uint* y, ushort lane [[thread_index_in_simdgroup]]) { y[lane] = simd_shuffle(7u, 20); }
template <typename V> inline V to(uint4 x) { return V(x); }
kernel void convert(device const packed_uint4* w, device float4* y) { const uint4 q = w[0]; y[0] = (float4)(q & 15u);
  y[1] = to<float4>(q >> 4); y[2] = static_cast<float4>(q >> 28);
  using V = vec<half, 4>;  y[3] = float4(V(float4(q))); }
kernel void places(device uint* y, uint3 p [[thread_position_in_grid]], uint3 n [[threads_per_grid]],
  uint3 t [[thread_position_in_threadgroup]], uint3 g [[threadgroup_position_in_grid]]) {
  y[(p.z * n.y + p.y) * n.x + p.x] = t.x | t.y << 4 | t.z << 8 | g.x << 12 | g.y << 16 | g.z << 20; }
"""
MEMORY = """#include <metal_stdlib>
using namespace metal;
kernel void race(device float* y, uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float t[64]; t[tid] = float(tid); y[tid] = t[tid ^ 33]; }
kernel void ordered(device float* y, uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float t[64]; t[tid] = float(tid); threadgroup_barrier(mem_flags::mem_threadgroup); y[tid] = t[tid ^ 33]; }
kernel void unordered(device float* y, uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float t[64]; t[tid] = float(tid); threadgroup_barrier(mem_flags::mem_none); y[tid] = t[tid ^ 33]; }
kernel void stacks(device float* y, uint i [[thread_position_in_grid]]) {
  float a[8]; for (uint k = 0; k < 8; k++) a[(k + i) % 8] = float(k);
  y[i] = simd_sum(a[i % 8]) + simd_max(a[i % 7]); }
kernel void returns(device float* y, uint i [[thread_position_in_grid]]) {
  if (i == 3) return;
  threadgroup_barrier(mem_flags::mem_none); y[i] = 1.0f; }
kernel void groups(device float* y, uint tid [[thread_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]]) {
  y[tid ^ g] = 1.0f; }
kernel void past_the_end(device float* y, uint i [[thread_position_in_grid]]) { y[i] = 1.0f; }
kernel void past_the_array(device float* y, constant uint& n, uint i [[thread_position_in_grid]]) {
  threadgroup float t[20]; threadgroup float u[64]; threadgroup float* p = t; p[i + n] = 1.0f;
  u[i] = 2.0f; y[i] = t[0]; }
constant bool with_scale [[function_constant(0)]];
kernel void optional(device float* y, constant float& scale [[buffer(1), function_constant(with_scale)]],
  uint i [[thread_position_in_grid]]) { y[i] = with_scale ? scale : 3.0f; }
kernel void shift(device uint* y, uint i [[thread_position_in_grid]]) { y[i] = 1u << (i + 20u); }
kernel void other_memory(device float* y, device float* z, uint tid [[thread_index_in_threadgroup]]) {
  z[tid] = float(tid); threadgroup_barrier(mem_flags::mem_threadgroup); y[tid] = z[tid ^ 33]; }
kernel void this_memory(device float* y, device float* z, uint tid [[thread_index_in_threadgroup]]) {
  z[tid] = float(tid); threadgroup_barrier(mem_flags::mem_device); y[tid] = z[tid ^ 33]; }
kernel void other_way_round(device float* y, uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float t[64]; t[tid] = float(tid); threadgroup_barrier(mem_flags::mem_device); y[tid] = t[tid ^ 33]; }
kernel void both_memories(device float* y, device float* z, uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float t[64]; t[tid] = z[tid] = 1.0f;
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup); y[tid] = z[tid ^ 33] + t[tid ^ 33]; }
kernel void in_simdgroup(device float* y, device float* z, uint tid [[thread_index_in_threadgroup]]) {
  z[tid] = float(tid); simdgroup_barrier(mem_flags::mem_threadgroup); y[tid] = z[tid ^ 1]; }
kernel void matrices(device float* y, uint tid [[thread_index_in_threadgroup]],
                     uint g [[threadgroup_position_in_grid]]) {
  threadgroup float t[64]; t[tid] = 1.0f; simdgroup_float8x8 m, sum(0.0f);
  for (uint k = 0; k < 8; k++) {
    threadgroup_barrier(mem_flags::mem_threadgroup); simdgroup_load(m, t, 8);
    simdgroup_multiply_accumulate(sum, m, m, sum); threadgroup_barrier(mem_flags::mem_threadgroup); }
  if (tid == 0) y[g] = sum.thread_elements()[0]; }
kernel void unset(device float* y, uint i [[thread_position_in_grid]]) {
  float a[4]; uint4 b; if (y[i] > 5) { a[i & 3] = 1; b.y = 1; } y[i] = i % 2 ? a[i & 3] : float(b.y); }
kernel void negative(device uint* y, device const float* x, uint i [[thread_position_in_grid]]) { y[i] = uint(x[i]); }
"""


def reduction(seed=0, threads=64, **changes):
    """A launch of the accepted reduction kernel."""
    values = [0.25 * k for k in range(50)]
    parts = {
        "bindings": [(0, READ, floats(values)), (1, WRITE, floats([0])), (2, BYTES, words([50]) + floats([0.5])),
                     (3, READ, floats([2]))],
        "memory": [16],
        "constants": [(0, b"\1"), (1, b"\5\0\0\0")],
    }  # fmt: skip
    parts.update(changes)
    return Launch("f_float", threadgroups=1, threads=threads, seed=seed, **parts)


class Check(unittest.TestCase):
    """What `mslc.py check` refuses and accepts."""

    def check(self, cases):
        with tempfile.TemporaryDirectory() as directory:
            files = [Path(directory) / f"case{i}.metal" for i in range(len(cases))]
            for file, text in zip(files, cases):
                file.write_text(text)
            with ThreadPoolExecutor() as pool:
                return list(pool.map(lambda file: driver.check(str(file), []), files))

    def test_refused(self):
        found = self.check([file_of(snippet) for _, snippet, _ in REFUSED])
        for (name, _, reason), messages in zip(REFUSED, found):
            with self.subTest(name):
                self.assertRegex("\n".join(messages) or "nothing found", reason)

    def test_accepted(self):
        accepted = [*ACCEPTED, ("constructs", CONSTRUCTS.read_text())]
        found = self.check([text for _, text in accepted])
        for (name, _), messages in zip(accepted, found):
            with self.subTest(name):
                self.assertEqual(messages, [])

    def test_lines_and_status(self):
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "shared.h").write_text("inline float twice(float x) {\n  return y;\n}\n")
            file = Path(directory) / "case.metal"
            text = '#include "shared.h"\n\n#define TWO int a = 1; int b = 2;\nkernel void k(\n  double x) { TWO }\n'
            file.write_text(text)
            status, printed = mslc("check", "-I", directory, file)
            self.assertEqual(status, 1)
            self.assertRegex(printed, r"case\.metal:5: error: 'double' is not in Metal")
            self.assertRegex(printed, r"shared\.h:2: error: use of undeclared identifier 'y'")
            file.write_text(VECTORS)
            self.assertEqual(mslc("check", file), (0, ""))

    def test_compiler_missing(self):
        clang.compiler.cache_clear()
        before = dict(clang.os.environ)
        clang.os.environ["MSL_CLANG"] = "no-such-clang"
        try:
            with self.assertRaisesRegex(clang.ClangError, "apt install clang-19"):
                clang.compiler()
        finally:
            clang.os.environ.clear()
            clang.os.environ.update(before)
            clang.compiler.cache_clear()


class Run(unittest.TestCase):
    """A library of the accepted kernels and of faulty ones."""

    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.directory.cleanup)
        place = Path(cls.directory.name)
        files = []
        texts = {"reduce": REDUCE, "matrix": MATRIX, "vectors": VECTORS, "online": ONLINE, "kernels": KERNELS}
        for name, text in texts.items():
            files.append(place / f"{name}.metal")
            files[-1].write_text(text)
        status, printed = mslc("build", "-o", place / "library.so", CONSTRUCTS, *files)
        if status:
            raise AssertionError(printed)
        cls.library = Library(place / "library.so")

    def fails(self, launch, reason):
        self.assertRegex(self.library.run(launch) or "no error", reason)

    def runs(self, launch):
        self.assertEqual(self.library.run(launch), "")

    def test_abi(self):
        self.assertEqual(self.library.functions.msl_abi(), 1)
        self.assertIn("f_half", self.library.kernels())
        self.assertIn("product_bf16", self.library.kernels())
        self.assertNotIn("f", self.library.kernels())

    def test_kernel_names_differ(self):
        place = Path(self.directory.name)
        (place / "again.metal").write_text("kernel void few() {}\n")
        status, printed = mslc("build", "-o", place / "x.so", place / "kernels.metal", place / "again.metal")
        self.assertEqual(status, 1)
        self.assertRegex(printed, "again.metal: kernel 'few' is also in .*kernels.metal")

    def test_chosen_kernels(self):
        """Of all files only these kernels, and nothing of files that have none."""
        place = Path(self.directory.name)
        build = ["build", "-o", place / "chosen.so", "-k", "few", "-k", "product_bf16"]
        files = [place / "kernels.metal", place / "matrix.metal", place / "vectors.metal"]
        self.assertEqual(mslc(*build, *files), (0, ""))
        self.assertEqual(sorted(Library(place / "chosen.so").kernels()), ["few", "product_bf16"])
        status, printed = mslc(*build, "-k", "none", *files)
        self.assertEqual((status, printed), (1, "there is no kernel 'none'\n"))

    def test_kept_objects(self):
        """The runtime is compiled once for each set of flags."""
        place = Path(self.directory.name)
        kept = place / "kept" / "objects"
        build = ["build", "--keep", kept, "-o", place / "kept.so", "-k", "few", place / "kernels.metal"]
        self.assertEqual(mslc(*build), (0, ""))
        first = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
        self.assertEqual({file.name.split("-")[0] + ".cpp" for file in first}, set(driver.RUNTIME_SOURCES))
        self.assertEqual(mslc(*build), (0, ""))
        self.assertEqual(first, {file: file.stat().st_mtime_ns for file in kept.iterdir()})
        self.assertEqual(mslc(*build, "--exe", "--sanitize", "address"), (0, ""))
        self.assertEqual(len(list(kept.iterdir())), 2 * len(first) + 1)

    def test_launch_is_checked(self):
        x, y, args, bias = reduction().bindings
        for reason, changes in (
            ("buffer 0 'x' is not bound", {"bindings": [y, args, bias]}),
            ("buffer 3 'bias' is not bound", {"bindings": [x, y, args]}),
            ("buffer 7: the kernel has no such", {"bindings": [x, y, args, bias, (7, READ, words([0]))]}),
            ("buffer 0 is bound twice", {"bindings": [x, y, args, bias, x]}),
            ("'y' is written by the kernel", {"bindings": [x, (1, READ, y[2]), args, bias]}),
            ("'y' is written by the kernel", {"bindings": [x, (1, BYTES, y[2]), args, bias]}),
            ("'x' is read, but bound for writing", {"bindings": [(0, WRITE, x[2]), y, args, bias]}),
            ("'args': 4 bytes, its type has 8", {"bindings": [x, y, (2, BYTES, words([1])), bias]}),
            ("constant 9: the kernel's file has none", {"constants": [(0, b"\1"), (9, b"\1")]}),
            ("constant 0 'has_bias' is not set", {"constants": []}),
            ("constant 0 'has_bias': 4 bytes given", {"constants": [(0, b"\1\0\0\0")]}),
            ("memory 0 'shared' is not given", {"memory": []}),
            ("memory 0: 20 bytes, not a multiple of 16", {"memory": [20]}),
            ("memory 1: the kernel has no such", {"memory": [16, 16]}),
            ("32784 bytes of threadgroup memory", {"memory": [32768]}),
            ("1025x1x1 threads", {"threads": 1025}),
            ("an empty threadgroup", {"threads": 0}),
        ):
            with self.subTest(reason):
                self.fails(reduction(**changes), reason)
        self.fails(Launch("none", []), "none: no such kernel")
        self.fails(Launch("few", [(0, WRITE, floats([0] * 65))], threads=65), "at most 64")
        shifted = (0, WRITE, memoryview(bytearray(260))[2:258])
        self.fails(Launch("few", [shifted], threads=64), "not aligned to 4 bytes")

    def test_function_constants(self):
        """A constant may be left out where the file asks for it; a parameter that one turns off need not be bound."""
        for constants, width, bias in (([(0, b"\1")], 8, 2), ([(0, b"\0"), (1, b"\5\0\0\0")], 5, 0)):
            launch = reduction(constants=constants)
            if not bias:
                launch.bindings = launch.bindings[:3]
            self.runs(launch)
            simdgroup = sum(0.25 * k for k in range(32)) + 32 * (31 + width)
            self.assertEqual(as_floats(launch.bindings[1][2])[0], simdgroup + 1 + bias + 0.5)

    def test_online_softmax(self):
        rows, columns = 3, 100
        x, y = [math.sin(k) * 4 for k in range(rows * columns)], floats([0] * rows * columns)
        bindings = [(0, READ, floats(x)), (1, WRITE, y), (2, BYTES, words([columns]) + floats([1.5]))]
        constants = [(0, b"\4\0"), (1, b"\0")]
        for seed in range(3):
            launch = Launch("softmax", bindings, threadgroups=rows, threads=64, constants=constants, seed=seed)
            self.runs(launch)
            for row in range(rows):
                powers = [math.exp(1.5 * value) for value in x[row * columns : (row + 1) * columns]]
                for power, value in zip(powers, as_floats(y)[row * columns :]):
                    self.assertAlmostEqual(power / sum(powers), value, 6)
        self.fails(Launch("softmax", bindings, threads=96, constants=constants), "96 threads .*, at most 64")

    def test_matrices(self):
        """Rows times rows in each type, with Apple's layout of the lanes: small numbers, so exact in all of them."""
        a = [[(7 * r + c) % 5 - 2.0 for c in range(8)] for r in range(8)]
        b = [[(r - c) % 4 + 0.5 for c in range(8)] for r in range(8)]
        flat_a, flat_b = sum(a, []), sum(b, [])
        want = [sum(a[r][k] * b[c][k] for k in range(8)) for r in range(8) for c in range(8)]
        for name, code in (("product_f32", "f"), ("product_f16", "e"), ("product_bf16", "f")):
            count, c = words([0]), floats([0] * 64)
            inputs = [bytearray(struct.pack(f"<64{code}", *values)) for values in (flat_a, flat_b)]
            if name == "product_bf16":  # the upper half of a float
                inputs = [bytearray(x for i, x in enumerate(data) if i % 4 > 1) for data in inputs]
            self.runs(Launch(name, [(0, READ, inputs[0]), (1, READ, inputs[1]), (2, WRITE, c), (3, WRITE, count)]))
            self.assertEqual(list(as_floats(c)), want)
            self.assertEqual(as_words(count), (32,))

    def test_conversions(self):
        """Constructors and casts convert values, not bits; packed vectors need the alignment of their elements only."""
        packed, y = bytearray(4) + words([0x21, 0x30000000, 5, 0x100]), floats([0] * 16)
        self.runs(Launch("convert", [(0, READ, memoryview(packed)[4:]), (1, WRITE, y)], threads=1))
        want = [1, 0, 5, 0, 2, 0x3000000, 0, 16, 0, 3, 0, 0, 33, math.inf, 5, 256]
        self.assertEqual(list(as_floats(y)), want)

    def test_simdgroup_operations(self):
        y = words([0] * 384)
        self.runs(Launch("lanes", [(0, WRITE, y)]))
        got, x = as_words(y), [k * k for k in range(32)]
        rows = [got[32 * k : 32 * k + 32] for k in range(12)]
        ballot = sum(1 << k for k in range(0, 32, 3))
        want = [
            [sum(x)] * 32, [sum(x[:k]) for k in range(32)], [sum(x[: k + 1]) for k in range(32)],
            [x[k ^ 5] for k in range(32)], [x[k + 3] if k < 29 else x[k] for k in range(32)],
            [x[k - 3] if k > 2 else x[k] for k in range(32)], [49] * 32, [ballot] * 32, x[::-1],
            [1 + x[31] + 1] * 32, [9] * 32, [x[k - 1] for k in range(32)],
        ]  # fmt: skip
        self.assertEqual([list(row) for row in rows], want)
        y = words([0] * 20)
        self.runs(Launch("tail", [(0, WRITE, y)], threads=20))
        self.assertEqual(set(as_words(y)), {0xFFFFFFFF})

    def test_positions(self):
        y = words([0] * 96)
        self.runs(Launch("places", [(0, WRITE, y)], threadgroups=(2, 1, 2), threads=(3, 4, 2)))
        for i, value in enumerate(as_words(y)):
            x, row, z = i % 6, i // 6 % 4, i // 24
            self.assertEqual(value, x % 3 | row << 4 | z % 2 << 8 | x // 3 << 12 | z // 2 << 20)

    def test_faults(self):
        for kernel, reason in (
            ("divergent", r"kernels\.metal:[56]: divergent threadgroup_barrier: .* line [56]"),
            ("returned", r"kernels\.metal:7: threadgroup_barrier .*returned"),
            ("returned_later", r"kernels\.metal:8: threadgroup_barrier .*returned"),
            ("returned_lane", r"kernels\.metal:9: simd_sum after lane"),
            ("different", r"kernels\.metal:10: lanes of simdgroup \d at different operations: simd_(sum|max)"),
            ("mixed", r"kernels\.metal:11: (threadgroup_barrier|simd_sum) in lane"),
            ("skewed", r"kernels\.metal:14: lanes of simdgroup \d did not do the same simdgroup_load"),
            ("broadcast", "simd_broadcast: the lane to take from must be the same"),
        ):
            for seed in range(4):
                with self.subTest(kernel, seed=seed):
                    self.fails(Launch(kernel, [(0, WRITE, floats([0] * 80))], threads=64, seed=seed), reason)
        self.fails(Launch("half_matrix", [(0, WRITE, floats([0] * 64))], threads=16), "in less than 32 threads")
        self.fails(Launch("dynamic", [(0, WRITE, floats([0] * 64))], memory=[16384, 16384]), "32784 bytes of thr")
        self.runs(Launch("dynamic", [(0, WRITE, floats([0] * 64))], memory=[16384, 16368]))

    def test_poison(self):
        y, z = floats([0] * 32), words([0] * 32)
        self.runs(Launch("poison", [(0, WRITE, y), (1, WRITE, z)]))
        self.assertTrue(all(math.isnan(value) for value in as_floats(y)))
        self.assertEqual(set(as_words(z)), {0xFFFFFFFF})

    def test_rounding(self):
        """Every operation is rounded by itself, in its own type."""
        x, y = [1 + 2**-12, 1 + 2**-11, 1, 2**-11, 1e8], floats([0] * 3)
        self.runs(Launch("rounding", [(0, READ, floats(x)), (1, WRITE, y)], threads=1))
        self.assertEqual(as_floats(y), (0, 1, 0))

    def test_schedules(self):
        """Seeds change who comes first; a missing barrier shows."""
        orders, results = set(), set()
        for seed in range(8):
            count, y = words([0]), words([0] * 128)
            self.runs(Launch("order", [(0, WRITE, count), (1, WRITE, y)], threadgroups=2, threads=64, seed=seed))
            self.assertEqual(sorted(as_words(y)), list(range(128)))
            orders.add(as_words(y))
            late = floats([0] * 64)
            self.runs(Launch("late", [(0, WRITE, late)], threads=64, seed=seed))
            results.add(bytes(late))
        self.assertEqual(len(orders), 8)
        for seed in range(2, 10, 2):  # a barrier missing at a loop's end: simdgroups must be far apart
            y = floats([0] * 64)
            self.runs(Launch("again", [(0, WRITE, y)], threads=64, seed=seed))
            wrong = [value for i, value in enumerate(as_floats(y)) if value != (i ^ 33) * 10203]
            self.assertTrue(wrong, seed)
        self.assertGreater(len(results), 3)

    def test_threads_at_once(self):
        """Function constants and threadgroups belong to the calling thread."""
        failures = []

        def work(flag):
            for _ in range(200):
                launch = reduction(constants=[(0, bytes([flag]))])
                if not flag:
                    launch.bindings = launch.bindings[:3]
                failures.extend(filter(None, [self.library.run(launch)]))

        threads = [threading.Thread(target=work, args=(k % 2,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])


class Sanitized(unittest.TestCase):
    """The runner program under the sanitizers."""

    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.directory.cleanup)
        cls.place = Path(cls.directory.name)
        file = cls.place / "memory.metal"
        file.write_text(MEMORY)
        with ThreadPoolExecutor() as pool:
            built = pool.map(
                lambda kind: mslc("build", "--exe", "--sanitize", kind, "-o", cls.place / kind.split(",")[0], file),
                ("address,undefined", "thread"),
            )
            for status, printed in built:
                if status:
                    raise AssertionError(printed)

    def run_under(self, sanitizer, kernel, size=64, **parts):
        file = self.place / f"{self.id()}.{kernel}.run"
        bindings = [(0, WRITE, floats([0] * size)), *parts.pop("more", [])]
        write_run_file(file, [Launch(kernel, bindings, threads=64, **parts)])
        status, printed = run_program(self.place / sanitizer, file)
        return status, printed, file.with_suffix(".run.out")

    def test_races(self):
        for kernel, groups, found in (
            ("race", 1, True), ("unordered", 1, True), ("ordered", 1, False), ("ordered", 3, True), ("groups", 2, True),
            ("past_the_end", 1, False), ("stacks", 4, False), ("matrices", 40, False),
        ):  # fmt: skip
            with self.subTest(kernel, groups=groups):
                status, printed, _ = self.run_under("thread", kernel, size=64 * 4, threadgroups=groups)
                self.assertEqual("data race" in printed, found, printed)
                self.assertEqual(status != 0, found)

    def test_what_barriers_order(self):
        """A barrier orders the memory that its flags name, and no other."""
        for kernel, found in (
            ("other_memory", True), ("this_memory", False), ("other_way_round", True), ("both_memories", False),
            ("in_simdgroup", True),
        ):  # fmt: skip
            with self.subTest(kernel):
                more = [] if kernel == "other_way_round" else [(1, WRITE, floats([0] * 64))]
                status, printed, _ = self.run_under("thread", kernel, more=more)
                self.assertEqual("data race" in printed, found, printed)
                self.assertEqual(status != 0, found)

    def test_faults(self):
        """A fault is told as such under the race detector too."""
        for sanitizer in ("address", "thread"):
            status, printed, _ = self.run_under(sanitizer, "returns")
            self.assertEqual(status, 1)
            self.assertRegex(printed, r"returns: threadgroup 0, 0, 0: .*memory\.metal:14: threadgroup_barrier")
            self.assertNotIn("data race", printed)

    def test_bounds(self):
        status, printed, out = self.run_under("address", "past_the_end")
        self.assertEqual((status, printed), (0, ""))
        self.assertEqual(as_floats(out.read_bytes()), (1.0,) * 64)
        _, printed, _ = self.run_under("address", "past_the_end", size=63)
        self.assertRegex(printed, r"heap-buffer-overflow[\s\S]*past_the_end.*memory\.metal:17")
        _, printed, _ = self.run_under("address", "past_the_array", more=[(1, BYTES, words([0]))])
        self.assertRegex(printed, r"use-after-poison[\s\S]*memory\.metal:19")
        _, printed, _ = self.run_under("address", "shift")
        self.assertRegex(printed, "shift exponent 32 is too large")

    def test_values(self):
        """What has no value is NaN or large; a float that no integer is near is told."""
        _, printed, out = self.run_under("address", "unset")
        self.assertEqual(printed, "")
        for i, value in enumerate(as_floats(out.read_bytes())):
            self.assertTrue(math.isnan(value) if i % 2 else value > 1e9, value)
        _, printed, _ = self.run_under("address", "negative", more=[(1, READ, floats([-1] * 64))])
        self.assertRegex(printed, "-1 is outside the range of representable values")

    def test_fast_math(self):
        """As Metal compiles by default: still the same function, and still checked."""
        file, program = self.place / "fast.metal", self.place / "fast"
        file.write_text("kernel void root(device float* y, uint i [[thread_position_in_grid]]) {\n"
                        "  y[i] = metal::rsqrt(float(i + 1)) * metal::sqrt(float(i + 1)); }\n"
                        "kernel void sums(device float* y, uint i [[thread_position_in_grid]]) {\n"
                        "  const float x = y[i]; y[i] = x + 1e8f - 1e8f; }\n")
        self.assertEqual(mslc("build", "--exe", "--fast-math", "-o", program, file), (0, ""))
        launches = [Launch(name, [(0, WRITE, floats([1] * 64))], threads=64) for name in ("root", "sums")]
        write_run_file(self.place / "fast.run", launches)
        self.assertEqual(run_program(program, self.place / "fast.run"), (0, ""))
        for value in as_floats((self.place / "fast.run.out").read_bytes()):
            self.assertAlmostEqual(value, 1.0, 5)  # of sums, 0 if they were done in order

    def test_misaligned(self):
        """Buffers may begin anywhere that suits their elements; what is found at their ends stays the same."""
        file = self.place / "misaligned.run"
        cases = ((4, 64, "^$"), (12, 63, "heap-buffer-overflow"), (2, 64, "not aligned to 4"))
        for misalignment, size, reason in cases:
            launch = Launch("past_the_end", [(0, WRITE, floats([0] * size))], threads=64)
            write_run_file(file, [launch], misalignment)
            self.assertRegex(run_program(self.place / "address", file)[1], reason)

    def test_optional_reference(self):
        """A parameter that its function constant turns off is nobody's null reference."""
        for constant, more, want in ((b"\0", [], 3.0), (b"\1", [(1, BYTES, floats([5.0]))], 5.0)):
            status, printed, out = self.run_under("address", "optional", more=more, constants=[(0, constant)])
            self.assertEqual((status, printed), (0, ""))
            self.assertEqual(set(as_floats(out.read_bytes())), {want})

    def test_errors(self):
        status, printed, _ = self.run_under("address", "none")
        self.assertEqual(status, 1)
        self.assertRegex(printed, "none: no such kernel")

    def test_needs_a_program(self):
        status, printed = mslc("build", "--sanitize", "address", "-o", self.place / "x", self.place / "memory.metal")
        self.assertEqual(status, 1)
        self.assertTrue(re.search("--sanitize needs --exe", printed))


if __name__ == "__main__":
    unittest.main()
