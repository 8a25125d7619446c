#!/usr/bin/env python3
"""Prepares what gpu_check.py runs: the launches of real ops (recorded by a test of this project) and their kernels as PTX."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METAL = ROOT / "metal"
sys.path.insert(0, str(ROOT / "tests/msl"))
from mslc import driver  # noqa: E402
from mslc.rewrite import Rewriter  # noqa: E402


def record(folder):
    command = ["cargo", "test", "--release", "--features", "msl-host", "--test", "msl", "gpu_works"]
    command += ["--", "--ignored", "--nocapture"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "MMFP4_GPU_WORKS": str(folder)})


def compile_kernels(works, folder):
    """A PTX module for each file and each set of constants; launches learn their module and its kernel's buffers."""
    file_of = {}
    for file in METAL.glob("*.metal"):
        for kernel in Rewriter(*driver.read(file, [METAL]), execute=True).kernel_names():
            file_of[kernel] = file
    modules = {}
    for launch in (launch for work in works for launch in work["launches"]):
        file, constants = file_of[launch["kernel"]], tuple(sorted(map(tuple, launch["constants"])))
        modules.setdefault((file, constants), []).append(launch)
    for (file, constants), launches in modules.items():
        name = f"{file.stem}.{'.'.join(f'{index}-{value}' for index, value in constants)}.ptx"
        kernels = sorted({launch["kernel"] for launch in launches})
        buffers = driver.ptx(file, [METAL], dict(constants), kernels, folder / name)
        for launch in launches:
            launch.update(module=name, buffers=buffers[launch["kernel"]])
        print(f"{name}: {len(kernels)} kernels", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "target/gpu-check")
    parser.add_argument("--recorded", action="store_true", help="works.json is there already")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not options.recorded:
        record(options.folder)
    path = options.folder / "works.json"
    works = json.loads(path.read_text())
    compile_kernels(works, options.folder)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(works))
    partial.rename(path)


if __name__ == "__main__":
    main()
