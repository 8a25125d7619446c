"""PTX of Metal kernels: what must be in it, and what is refused. That it runs is tools/gpu-check's."""
import json
import tempfile
import unittest
from pathlib import Path

from support import mslc

KERNELS = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
struct Args { uint n; float a; };
constant bool DOUBLED [[function_constant(3)]];
constant ushort WIDTH [[function_constant(5)]];
constant uint AREA = WIDTH * WIDTH;
template <typename T>
kernel void sums(device const T* x [[buffer(2)]], device T* y [[buffer(0)]], constant Args& args [[buffer(4)]],
  device const float* more [[buffer(6), function_constant(DOUBLED)]],
  uint3 group [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float parts[32];
  parts[lane] = exp(float(x[lane])) * AREA;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = simd_sum(parts[lane ^ 1]) * args.a;
  if (DOUBLED) { sum += more[lane]; }
  if (lane < args.n) { y[group.x * 32 + lane] = T(sum); } }
#define I(name, T) template [[host_name(name)]] kernel decltype(sums<T>) sums<T>;
I("sums_f16", half) I("sums_bf16", bfloat)
kernel void product(device float* y, device const half* x) {
  simdgroup_half8x8 a; simdgroup_load(a, x, 8);
  simdgroup_float8x8 c(0.0f); simdgroup_multiply_accumulate(c, a, a, c); simdgroup_store(c, y, 8); }
[[kernel, max_total_threads_per_threadgroup(96)]] void few(device float* y) { y[0] = 1; }
[[kernel, max_total_threads_per_threadgroup(3 * 32)]] void reckoned(device float* y) { y[0] = 1; }
kernel void dynamic(device float* y, threadgroup float* t [[threadgroup(0)]]) { y[0] = t[0]; }
"""


class Ptx(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.file, self.out = Path(self.folder.name) / "kernels.metal", Path(self.folder.name) / "kernels.ptx"
        self.file.write_text(KERNELS)

    def ptx(self, *arguments):
        return mslc("ptx", "-o", self.out, *arguments, self.file)

    def test_entries_and_their_buffers(self):
        status, printed = self.ptx("-D", "3=0", "-D", "5=7", "-k", "sums_f16", "-k", "product")
        self.assertEqual(status, 0, printed)
        self.assertEqual(json.loads(printed), {"sums_f16": [2, 0, 4, 6], "product": [0, 1]})
        text = self.out.read_text()
        self.assertEqual(text.count(".visible .entry"), 2)
        self.assertIn("sums_f16_param_2[8]", text)  # arguments by value
        for instruction in ("shfl.sync.bfly", "shfl.sync.idx", "bar.sync", "ex2.approx", ".shared"):
            self.assertIn(instruction, text)

    def test_constants_are_baked_in(self):
        texts = []
        for doubled in (0, 1):
            self.assertEqual(self.ptx("-D", f"3={doubled}", "-D", "5=7", "-k", "sums_bf16")[0], 0)
            texts.append(self.out.read_text())
        self.assertEqual([text.count("ld.param.u64") for text in texts], [2, 3])
        self.assertIn("0f42440000", texts[0])  # 49

    def test_most_threads(self):
        self.assertEqual(self.ptx("-k", "few")[0], 0)
        self.assertIn(".maxntid 96", self.out.read_text())

    def test_what_is_refused(self):
        for arguments, reason in (
            (["-k", "reckoned"], "max_total_threads_per_threadgroup(3 * 32) is no number"),
            (["-D", "3=0", "-k", "sums_f16"], "needs function constant 5, WIDTH"),
            (["-k", "none"], "there is no kernel 'none'"),
            (["-k", "dynamic"], "takes threadgroup memory of the launch's"),
        ):
            status, printed = self.ptx(*arguments)
            self.assertEqual(status, 1)
            self.assertIn(reason, printed)


if __name__ == "__main__":
    unittest.main()
