"""Writes a model in every layout that FP4 checkpoints come in, each by the library that defines the layout.

    python -m venv venv && venv/bin/pip install -r tools/layout_fixtures/requirements.txt
    venv/bin/python tools/layout_fixtures tests/data/demo-model target/layouts [LAYOUT ...]
    MMFP4_LAYOUTS=target/layouts cargo test --release --test layouts_by_library -- --nocapture

A folder a layout, and digests.json beside them: of each layout, which library wrote it and a digest of every matrix of
a layer and of the output head as that library decodes it. tests/layouts_by_library.rs reads the folders: every value is
the library's, to the bit, and the logits are those of this crate's own file of the same codes. With LAYOUTs given, only
those are written, and the others' digests stay.

The small fixtures of tests/data/layouts, which need no Python, are made so from a part of the demo model (see source.py):

    venv/bin/python tools/layout_fixtures --part tests/data/demo-model tests/data/layouts
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import source

# Layouts by the module that writes them, imported only where it is asked for.
LAYOUTS = {
    "compressed-nvfp4": "compressed",
    "compressed-mxfp4": "compressed",
    "modelopt-nvfp4": "modelopt_nvfp4",
    "modelopt-nvfp4-power": "modelopt_nvfp4",
    "mlx-mxfp4": "mlx_folder",
    "mlx-nvfp4": "mlx_folder",
    "marlin-a": "marlin",
    "marlin-b": "marlin",
    "gguf-mxfp4": "gguf_file",
    "gguf-nvfp4": "gguf_file",
    "gguf-q4_0": "gguf_file",
    "gguf-q5_1": "gguf_file",
    "gguf-q8_0": "gguf_file",
    "gguf-q4_k_m": "gguf_file",
}
# The small fixtures are in four bits; integers, of which tests/data/gguf has some, take more room.
PART = [name for name in LAYOUTS if not name.startswith("gguf-q") and name != "marlin-a"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="store_true", help="only a small part of the model")
    parser.add_argument("model", type=Path, help="a glm4_moe_lite folder in BF16")
    parser.add_argument("out", type=Path, help="where the folders go; what it has of a layout is replaced")
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)}")
    args = parser.parse_args()
    unknown = set(args.layouts) - set(LAYOUTS)
    if unknown:
        sys.exit(f"error: no layout {', '.join(sorted(unknown))}; there are {', '.join(LAYOUTS)}")
    model = source.read(args.model)
    if args.part:
        model = source.part(model)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "digests.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for layout in args.layouts or (PART if args.part else LAYOUTS):
        with tempfile.TemporaryDirectory(dir=args.out) as scratch:
            folder = Path(scratch) / layout
            folder.mkdir()
            library, decoded = importlib.import_module(LAYOUTS[layout]).write(model, folder, layout)
            shutil.rmtree(args.out / layout, ignore_errors=True)
            folder.rename(args.out / layout)
        found[layout] = {"library": library, "digests": sorted(source.digest(matrix) for matrix in decoded)}
        print(f"{layout}: {library}, {len(decoded)} matrices")
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        aside.rename(path)


if __name__ == "__main__":
    main()
