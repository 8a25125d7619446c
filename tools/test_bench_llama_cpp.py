"""Tests of bench_llama_cpp.py and glm_gguf.py, a few seconds:

    target/llama-bench/python/bin/python -m unittest tools/test_bench_llama_cpp.py

Where llama-bench is built, it runs a small model of each mixture.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_llama_cpp as bench  # noqa: E402
import glm_gguf as glm  # noqa: E402

SMALL = glm.Shape(
    layers=4, hidden=256, heads=2, q_lora=256, kv_lora=256, nope=64, rope=32, value=128, experts=8, experts_used=2,
    expert_width=256, dense_width=512, vocabulary=512,
)
LLAMA_BENCH = Path(os.environ.get("CARGO_TARGET_DIR", bench.ROOT / "target")) / "llama-bench/bin/llama-bench"

# Answers the tests it is asked for; tokens a second are what the environment says, by round where there are several.
FAKE = """#!{python}
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
if "--version" in arguments:
    print("fake 1.0")
    sys.exit()
value = lambda flag: arguments[arguments.index(flag) + 1]
calls = Path(__file__ + ".calls")
before = calls.read_text().splitlines() if calls.exists() else []
calls.write_text("\\n".join(before + [json.dumps(arguments)]))
rates = [float(rate) for rate in os.environ[{name!r}].split(",")]
rate = rates[min(len(before), len(rates) - 1)]
tests = [(int(p), 0) for p in value("-p").split(",")] + [(0, int(value("-n")))]
if "bench" in arguments:
    folder = Path(os.environ["CARGO_TARGET_DIR"]) / "synthetic" / value("--synthetic")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    rows = [dict(test="first_prompt", prompt_tokens=p, generated_tokens=n, depth=0) for p, n in tests]
    rows += [dict(test="pp" if p else "tg", prompt_tokens=p, generated_tokens=n, depth=0, tokens_per_s=rate,
                  bytes_per_token=300_000_000, read_bandwidth_gb_s=30.0, noisy=rate == 90,
                  samples_ms=[(p or n) * 1000 / rate]) for p, n in tests]
else:
    assert Path(value("-m")).exists()
    rows = [dict(n_prompt=p, n_gen=n, n_depth=0, samples_ts=[rate - 1, rate, rate + 5]) for p, n in tests]
print(json.dumps(rows))
"""


class Blocks(unittest.TestCase):
    def test_have_the_deviation_asked_for(self):
        for kind in (glm.MXFP4, glm.Q4_K, glm.Q5_0, glm.Q6_K, glm.Q8_0):
            for std in (1.0, 2048**-0.5, (1536 * 94) ** -0.5):
                rng = np.random.Generator(np.random.SFC64(1))
                values = dequantize(glm.draw(kind, 20_000, std, rng), kind)
                with self.subTest(kind=kind.name, std=std):
                    self.assertAlmostEqual(values.std() / std, 1, delta=0.02)
                    self.assertLess(abs(values.mean()) / std, 0.06)

    def test_are_the_same_each_time_and_differ_by_tensor(self):
        ends = ("ffn_gate.weight", "ffn_up.weight")
        first, second = (t for t in glm.tensors(SMALL, "q4_k_m") if t.name.endswith(ends))
        self.assertTrue((glm.data_of(first) == glm.data_of(first)).all())
        self.assertFalse((glm.data_of(first) == glm.data_of(second)).all())


class Shapes(unittest.TestCase):
    def test_sizes_are_those_of_llama_quantize(self):
        # `llama-quantize --dry-run` of the shapes in BF16, MiB in all; for mxfp4 there is no such tool.
        for model, mixture, size in (
            ("slice", "q4_k_m", 1589.00), ("slice", "mxfp4_moe", 1733.73),
            ("full", "q4_k_m", 17283.67), ("full", "mxfp4_moe", 16173.39),
        ):
            with self.subTest(model=model, mixture=mixture):
                total = sum(t.nbytes for t in glm.tensors(glm.SHAPES[model], mixture))
                self.assertAlmostEqual(total / 2**20, size, delta=0.006)

    def test_a_token_reads_four_of_sixty_four_experts_and_one_row(self):
        # Counted by hand: 17/32 byte a weight of attention, MLP, head; routers and norms in F32.
        attention = 2048 * 768 + 768 * 5120 + 2048 * 576 + 20 * 512 * 192 + 20 * 256 * 512 + 5120 * 2048
        dense, sparse = 3 * 2048 * 10240, 5 * 3 * 2048 * 1536
        layers = 4 * attention + dense + 3 * sparse
        norms = 4 * (2 * 2048 + 768 + 512) + 2048
        expected = (layers + 154881 * 2048) * 17 / 32 + 4 * (norms + 3 * (2048 * 64 + 64))
        self.assertEqual(glm.bytes_per_token(glm.tensors(glm.SHAPES["slice"], "mxfp4")), expected)


class Files(unittest.TestCase):
    def test_hold_what_was_planned(self):
        with tempfile.TemporaryDirectory() as folder:
            for mixture in glm.FILE_TYPES:
                path = Path(folder, f"{mixture}.gguf")
                glm.write(path, SMALL, mixture)
                planned = {t.name: t for t in glm.tensors(SMALL, mixture)}
                reader = GGUFReader(path)
                self.assertEqual([t.name for t in reader.tensors], list(planned))
                self.assertEqual(reader.fields["deepseek2.expert_gating_func"].contents(), 2)
                for found in reader.tensors:
                    wanted = planned[found.name]
                    with self.subTest(mixture=mixture, tensor=found.name):
                        self.assertEqual((found.tensor_type, tuple(found.shape[::-1])), (wanted.kind, wanted.shape))
                        values = dequantize(found.data, found.tensor_type)
                        self.assertTrue(np.isfinite(values).all())
                        self.assertAlmostEqual(values.std(), wanted.std, delta=0.1 * wanted.std)
            self.assertEqual(len(os.listdir(folder)), len(glm.FILE_TYPES))

    def test_that_broke_off_leave_nothing(self):
        def broken(done, total):
            raise OSError("no room")

        with tempfile.TemporaryDirectory() as folder:
            with self.assertRaises(OSError):
                glm.write(Path(folder, "model.gguf"), SMALL, "mxfp4", broken)
            self.assertEqual(os.listdir(folder), [])

    @unittest.skipUnless(LLAMA_BENCH.exists(), "llama-bench is not built")
    def test_run_in_llama_bench(self):
        with tempfile.TemporaryDirectory() as folder:
            for mixture in glm.FILE_TYPES:
                path = Path(folder, f"{mixture}.gguf")
                glm.write(path, SMALL, mixture)
                command = [LLAMA_BENCH, "-m", path, "-t", "1", "-p", "16", "-n", "4", "-r", "2", "-o", "json"]
                done = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)
                rows = json.loads(done.stdout)
                for prompt, generated in ((16, 0), (0, 4)):
                    numbers = bench.their_numbers(rows, prompt, generated)
                    self.assertEqual(len(numbers["samples"]), 2)
                    self.assertGreater(numbers["tokens_per_s"], 0)


class Benchmark(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.target = Path(folder.name, "target")
        self.programs = Path(folder.name, "programs")
        self.programs.mkdir()
        self.target.mkdir()
        for name, variable in (("mmfp4", "OURS"), ("llama-bench", "THEIRS")):
            program = self.programs / name
            program.write_text(FAKE.format(python=sys.executable, name=variable))
            program.chmod(0o755)

    def call(self, *arguments, ours="20", theirs="10"):
        environment = {"CARGO_TARGET_DIR": str(self.target), "OURS": ours, "THEIRS": theirs}
        programs = ["--mmfp4", str(self.programs / "mmfp4"), "--llama-bench", str(self.programs / "llama-bench")]
        out, log = io.StringIO(), io.StringIO()
        shapes = {"slice": SMALL, "full": SMALL}
        with (
            mock.patch.dict(os.environ, environment), mock.patch.dict(glm.SHAPES, shapes),
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(log),
        ):
            bench.main([*arguments, *programs, "-t", "1"])
        return out.getvalue(), log.getvalue()

    def calls(self, name):
        return [json.loads(line) for line in (self.programs / f"{name}.calls").read_text().splitlines()]

    def test_gives_ratios_of_medians_without_the_first_round(self):
        json_file = self.target / "result.json"
        out, _ = self.call("slice", "--formats", "mxfp4", "-p", "8", "-n", "4", "--rounds", "5",
                           "--json", str(json_file),
                           ours="1,20,30,40,90", theirs="1000,10,10,20,20")
        result = json.loads(json_file.read_text())
        self.assertEqual([r["test"] for r in result["ratios"]], ["pp8", "tg4"])
        for ratio in result["ratios"]:
            self.assertEqual((ratio["mmfp4_tokens_per_s"], ratio["llama_cpp_tokens_per_s"]), (35, 15))
            self.assertEqual((ratio["lowest_ratio"], ratio["highest_ratio"]), (2, 4.5))
        # 0.3 GB a token at 35 a second, of 30 GB/s.
        self.assertAlmostEqual(result["ratios"][1]["mmfp4_share_of_bandwidth"], 0.35)
        self.assertEqual(len(result["runs"]), 2 * 2 * 5)
        order = [r["program"] for r in result["runs"] if r["test"] == "tg4"]
        self.assertEqual(order, ["mmfp4", "llama.cpp", "llama.cpp", "mmfp4", "mmfp4", "llama.cpp", "llama.cpp", "mmfp4",
                                 "mmfp4", "llama.cpp"])
        self.assertIn("| mxfp4 | tg4 | 35.0 | 15.0 | **2.33** | 2.00 to 4.50 | 35% |", out)
        self.assertIn("| mxfp4 | 5 | mmfp4 | tg4 | 90.0 | 90.0 | 27.0 | 30.0, noisy |", out)
        self.assertIn("| mxfp4 | 1, discarded | llama.cpp | pp8 | 1000.0 | 999.0, 1000.0, 1005.0 |", out)

    def test_tells_which_runs_are_void(self):
        arguments = ["slice", "--formats", "mxfp4", "-p", "8", "-n", "4", "--rounds", "3"]
        with mock.patch.object(bench, "foreign_share", side_effect=[0.5, 0.5, 0.04, 0.02, 0, 0]):
            out, _ = self.call(*arguments, ours="1,20,90")
        # Both tests of llama.cpp in round 2 for the 4 %, both of ours in round 3 for the bandwidth.
        self.assertIn("**To be repeated**: in 4 of 8 runs", out)
        with mock.patch.object(bench, "foreign_share", return_value=0.01):
            out, _ = self.call(*arguments)
        self.assertNotIn("To be repeated", out)

    def test_counts_what_other_programs_take(self):
        # In 10 s on all processors 6 s of work, 2 s of it ours.
        share = bench.foreign_share((100.0, 50.0, 7.0), (110.0, 56.0, 9.0))
        self.assertAlmostEqual(share, 0.4 / os.cpu_count())

    def test_asks_both_programs_for_the_same(self):
        self.call("slice", "--formats", "mxfp4,q4_k_m", "-p", "8,16", "-n", "4", "-r", "2", "--rounds", "2",
                  "--mmfp4-args=--exact")
        self.assertEqual(self.calls("mmfp4"), 4 * [["bench", "--synthetic", "slice", "-p", "8,16", "-n", "4", "-r", "2",
                                                    "--json", "--exact"]])
        theirs = self.calls("llama-bench")
        models = [call[1] for call in theirs]
        self.assertEqual([Path(m).name for m in models], 2 * ["slice-mxfp4-1.gguf"] + 2 * ["slice-q4_k_m-1.gguf"])
        self.assertTrue(all(Path(m).exists() for m in models))
        self.assertEqual(theirs[0][2:], ["-t", "1", "-p", "8,16", "-n", "4", "-r", "2", "-o", "json"])

    def test_of_the_full_model_leaves_no_file(self):
        self.call("full", "--formats", "mxfp4,q4_k_m", "-p", "8", "-n", "4", "--rounds", "2")
        self.assertEqual(os.listdir(self.target / "llama-bench"), [])
        self.assertEqual(self.calls("mmfp4")[0][2], "glm-4.7-flash")

    def test_dry_run_does_nothing(self):
        out, _ = self.call("slice", "--formats", "mxfp4", "--dry-run")
        self.assertIn("-p 128,512 -n 64 -r 3 --json", out)
        self.assertEqual(os.listdir(self.target), [])
        self.assertEqual(sorted(os.listdir(self.programs)), ["llama-bench", "mmfp4"])

    def test_says_what_failed(self):
        with self.assertRaisesRegex(bench.Failure, "exit status 1 of: .*mmfp4 bench"):
            self.call("slice", ours="not a number")
        with self.assertRaisesRegex(bench.Failure, "expected a program at .*: cargo build --release"):
            (self.programs / "mmfp4").unlink()
            self.call("slice")
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            bench.parse(["slice", "--rounds", "1"], self.target)


if __name__ == "__main__":
    unittest.main()
