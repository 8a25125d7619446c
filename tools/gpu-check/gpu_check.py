#!/usr/bin/env python3
"""Runs the works that make.py prepared on an NVIDIA GPU: right against torch, and how fast. See README.md."""
import argparse
import collections
import ctypes
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import data
import torch
from device import SWEPT, Driver, copy_bandwidth, empty_launch, graph_of, seconds
from references import REFERENCES

HEAD = """# The Metal kernels on an NVIDIA GPU

Written by `tools/gpu-check`: the unmodified `.metal` files as PTX, launched as `src/metal` plans them at GLM-4.7-Flash's
shapes, on operands of noise. NMSE is of each output, against torch's in f64 of the same operands; ids of experts are counted that
are not torch's (scores within 1e-6 of each other may go either way). Times are of one launch among many in a graph, over copies
of the weights that no cache holds; MB are what the launch has to move, each byte once. An op of several launches has a row
for all of them in turn, and one for each by itself.

The bar: from 64 MB on, 65 % of the copy's bandwidth (activations in F32: 50 %); below, the floor is an empty launch plus the
bytes over that bandwidth, and the bar 1.6 × the floor from 8 MB on, else 2 × the floor + 1 µs. It is meant for one row of
activations; more rows stand here to be seen. Tiles (9 rows of activations and more) are not timed: their products of
matrices are shuffles here.

**Where the bar is not reached, and why** (2026-11-21, by cut-down copies of the kernel for one row, 13 MB of codes in one launch:
7.2 µs of a bar of 6.0): decoding and multiplying without loading codes take 5.7 µs, loading without decoding 6.7; the two overlap
but not wholly. Launches of experts, which look up where theirs are, add that wait. The router of one token is one
threadgroup, as its choice needs every score: one of 132 processors reads all of the weight. Attention of one token over
latents is a threadgroup a split, 22 up to 4,096 tokens, as every split writes a part that must be read again: 22 of 132
processors work, and each multiplies a latent with 20 heads. Longer caches and further sequences have more of them.

**What this says of a Mac**: the numbers, barriers and bounds of these kernels hold on a GPU whose threads really run at once,
at real sizes. A kernel that is slow here because its loads are narrow or far apart, because few of them are on their way at
once, or because few threads have work, probably is slow there for the same reason.

**What it does not say**: anything about Apple's compiler, registers, occupancy, caches, launches or clocks, or about
`simdgroup_matrix`. Where a kernel here is bound by instructions (products with FP4 are: about four and a half for a code),
the share of its own bandwidth that an Apple GPU reaches is another number. Nothing here has run on an Apple GPU.

"""
# NMSE, as in the tests on Linux; of numbers without a sign and of a cache's bytes, how many differ; of bytes that sums in another
# order may tip, which part of them.
BOUNDS = {"f32": 1e-9, "f16": 3e-7, "bf16": 1e-5, "u32": 0, "bytes": 0, "most bytes": 1e-3}
# What is compared one by one: how many differ is told as so many of these.
COUNTED = {"u32": "ids", "bytes": "bytes"}
# Copies of weights take no more.
MOST_MEMORY = 48 << 30
# Runs in a graph, so that its start does not count.
RUNS = 200


class Work:
    """An op's launches over operands of its own; the weights are there as many times as it takes to outgrow caches."""

    def __init__(self, driver, folder, modules, description, copies):
        self.driver, self.description, self.meta = driver, description, description["meta"]
        random = data.generator(len(description["name"]) + 7 * self.meta["m"])
        operands = description["operands"]
        self.weights = [i for i, operand in enumerate(operands) if operand["weight"]]
        made = [data.operand(operand, self.meta, random) for operand in operands]
        self.sets = [made]
        for _ in range(self.copies() - 1 if copies else 0):
            self.sets.append([tensor.clone() if i in self.weights else tensor for i, tensor in enumerate(made)])
        self.calls = []
        for launch in description["launches"]:
            path = folder / launch["module"]
            if path not in modules:
                modules[path] = driver.module(path.read_bytes() + b"\0")
            function = driver.function(modules[path], launch["kernel"])
            self.calls.append((function, launch, [self.arguments(launch, operands) for operands in self.sets]))

    def copies(self):
        """So many that each launch has read more than caches hold before it is back at its weights: it may need a part of
        them only."""
        size = sum(self.description["operands"][i]["len"] for i in self.weights)
        read = [launch["weights"] for launch in self.description["launches"] if launch["weights"]]
        if not size or not read:
            return 1
        return max(1, min(512, MOST_MEMORY // size, math.ceil(SWEPT / min(read))))

    @staticmethod
    def arguments(launch, operands):
        """In the order of the entry's parameters; a buffer that is not bound is null."""
        bound = dict(map(tuple, launch["bindings"]))
        values = []
        for index in launch["buffers"]:
            binding = bound.get(index)
            if binding is None:
                values.append(ctypes.c_void_p(0))
            elif "bytes" in binding:
                values.append(ctypes.create_string_buffer(bytes.fromhex(binding["bytes"])))
            else:
                values.append(ctypes.c_void_p(operands[binding["operand"]].data_ptr() + binding["offset"]))
        return values

    def run(self, calls=None, which=0):
        for function, launch, arguments in calls or self.calls:
            self.driver.launch(function, launch["grid"], launch["threads"], arguments[which])

    def errors(self):
        """Of each output: its dtype, and its NMSE, or how many numbers differ."""
        self.run()
        torch.cuda.synchronize()
        described = self.description["operands"]
        by_role = {operand["role"]: tensor for operand, tensor in zip(described, self.sets[0])}
        outputs = [tensor for operand, tensor in zip(described, self.sets[0]) if operand["role"].startswith("y")]
        expected = REFERENCES[self.description["op"]](by_role, self.meta)
        dtypes = self.meta.get("outputs", [self.meta["dtype"]] * len(outputs))
        return [(dtype, difference(*pair, dtype)) for *pair, dtype in zip(outputs, expected, dtypes, strict=True)]

    def seconds(self, calls=None):
        """Of one run (of these calls only), among many in a graph, over every copy of the weights in turn."""
        rounds = max(1, RUNS // len(self.sets))
        graph = graph_of(lambda: [self.run(calls, i) for _ in range(rounds) for i in range(len(self.sets))])
        return seconds(graph.replay) / (rounds * len(self.sets))

    def bytes(self):
        return sum(launch["bytes"] for _, launch, _ in self.calls)


def difference(output, expected, dtype):
    actual = output.view(data.DTYPES[dtype]).view(expected.shape)
    if dtype in COUNTED:
        return (actual != expected).sum().item()
    if dtype == "most bytes":
        return (actual != expected).double().mean().item()
    error = ((actual.double() - expected).square().sum() / expected.square().sum()).item()
    return error if error == error else math.inf


def sanitized(options, works):
    """What compute-sanitizer's tools say of each work, run once: a sentence a tool."""
    program = shutil.which("compute-sanitizer")
    if not program:
        return ["compute-sanitizer is not on this machine."]
    # Each operand an allocation of its own, so that what lies behind one is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    prefixes = sorted({launch["kernel"].split("_")[0] for work in works for launch in work["launches"]})
    filters = [part for prefix in prefixes for part in ("--kernel-name", f"kernel_substring={prefix}_")]
    notes = []
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, *filters, sys.executable, __file__, str(options.folder), "--once"]
        done = subprocess.run([*command, "--only", options.only], env=environment, capture_output=True, text=True)
        text = done.stdout + done.stderr
        found = re.findall(r"========= ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
        ran = re.findall(r"\d+ works run", text)
        notes.append(f"compute-sanitizer {tool}: {'; '.join(found + ran) or text[-300:]}.")
        print(notes[-1], flush=True)
    return notes


def speed(moved, time):
    return [f"{moved / 1e6:.2f}", f"{time * 1e6:.2f}", f"{moved / time / 1e9:.0f}"]


def rows(work, empty, bandwidth):
    """A work's rows, each a name and the cells from MB to "reached", and how many launches are too slow. Several launches have
    a row of all of them, without a bar, before those of each."""
    launches = [launch for _, launch, _ in work.calls]
    if not work.description["timed"]:
        return [(", ".join(launch["kernel"] for launch in launches), [""] * 5)], 0
    found, slow = [], 0
    if len(launches) > 1:
        moved, time = work.bytes(), work.seconds()
        floor = len(launches) * empty + moved / bandwidth
        found.append(("all", [*speed(moved, time), f"{time / floor:.2f} × floors {floor * 1e6:.1f} µs", ""]))
    for call, launch in zip(work.calls, launches):
        moved, time = launch["bytes"], work.seconds([call])
        text, reached = verdict(moved, time, empty, bandwidth, work.meta["dtype"])
        found.append((launch["kernel"], [*speed(moved, time), text, "yes" if reached else "**no**"]))
        slow += not reached
    return found, slow


def verdict(moved, time, empty, bandwidth, dtype):
    """What the bar is, and whether it is reached."""
    if moved >= 64e6:
        bar, share = 0.5 if dtype == "f32" else 0.65, moved / time / bandwidth
        return f"{share:.0%} of the copy's bandwidth", share >= bar
    floor = empty + moved / bandwidth
    reached = time <= 1.6 * floor if moved >= 8e6 else time <= 2 * floor + 1e-6
    return f"{time / floor:.2f} × floor {floor * 1e6:.1f} µs", reached


def chosen(work, only):
    texts = [work["op"], work["name"], *(launch["kernel"] for launch in work["launches"])]
    return any(re.search(only, text) for text in texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what make.py wrote")
    parser.add_argument("--output", type=Path, help="the table; else stdout")
    parser.add_argument("--only", default="", help="works with this regular expression in their op, name or a kernel")
    parser.add_argument("--once", action="store_true", help="each work once, for compute-sanitizer to watch")
    parser.add_argument("--sanitize", action="store_true", help="first, all of them under compute-sanitizer")
    options = parser.parse_args()
    works = [work for work in json.loads((options.folder / "works.json").read_text()) if chosen(work, options.only)]
    notes = sanitized(options, works) if options.sanitize else []
    driver, modules = Driver(), {}
    if options.once:
        for work in works:
            Work(driver, options.folder, modules, work, False).run()
            torch.cuda.synchronize()
        print(f"{len(works)} works run")
        return
    bandwidth, empty = copy_bandwidth(), empty_launch(driver)
    head = [
        f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}. A copy of 4 GiB moves {bandwidth / 1e9:.0f} GB/s "
        f"(read and written); an empty launch in a graph takes {empty * 1e6:.2f} µs.",
        *notes,
    ]
    lines = ["| work | kernel | MB | µs | GB/s | against the bar | reached | NMSE |", "|---|---|---|---|---|---|---|---|"]
    failed = collections.Counter()
    for description in works:
        work = Work(driver, options.folder, modules, description, description["timed"])
        errors = work.errors()
        right = all(error <= BOUNDS[dtype] for dtype, error in errors)
        failed["wrong"] += not right
        found, slow = rows(work, empty, bandwidth)
        failed["slow"] += slow
        error = ", ".join(f"{error} {COUNTED[dtype]}" if dtype in COUNTED else f"{error:.1e}" for dtype, error in errors)
        for i, (kernel, cells) in enumerate(found):
            last = (error if right else f"**{error}**") if i == 0 else ""
            lines.append(f"| {description['name']} | {kernel} | {' | '.join(cells)} | {last} |")
            print(lines[-1], flush=True)
        del work
    table = HEAD + "\n\n".join(head) + "\n\n" + "\n".join(lines) + "\n"
    print("\n".join(head), dict(failed), flush=True)
    if options.output:
        options.output.write_text(table)
    raise SystemExit(1 if failed["wrong"] else 0)


if __name__ == "__main__":
    main()
