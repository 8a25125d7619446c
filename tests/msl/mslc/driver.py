"""The commands: `check`, `build` and `ptx`."""
import argparse
import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import clang, lint
from .ptx import PtxRewriter
from .rewrite import Rewriter
from .signatures import Declarations
from .tokens import Source, Unreadable

RUNTIME_SOURCES = ("bfloat.cpp", "fiber.cpp", "launch.cpp", "registry.cpp", "scheduler.cpp", "shared_memory.cpp")
LINK = ("-lm", "-lpthread", "-Wl,-z,defs")  # nothing undefined: it would only show when the library is loaded
SANITIZERS = {
    "address": ["-fsanitize=address", "-fsanitize-address-use-after-return=never"],
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=function,vptr"],
    "thread": ["-fsanitize=thread"],
}


def read(file, includes):
    """(source, declarations) of a .metal file."""
    source = Source(clang.preprocess(file, includes))
    return source, Declarations(source)


def check(file, includes):
    """Every diagnostic of one file, as text."""
    try:
        source, declarations = read(file, includes)
        found = [str(problem) for problem in lint.problems(source, declarations)]
        text = Rewriter(source, declarations, execute=False).result()
    except Unreadable as problem:
        return [str(problem)]
    except clang.ClangError as error:
        return str(error).splitlines()
    return found + clang.type_errors(text)


def translate(files, includes, kernels):
    """The C++ of each file that has one of these kernels (None: any); no two may have a kernel of the same name."""
    owner, texts = {}, []
    for file in files:
        rewriter = Rewriter(*read(file, includes), execute=True, kernels=kernels)
        names = rewriter.kernel_names()
        for name in names:
            if name in owner:
                raise clang.ClangError(f"{file}: kernel '{name}' is also in {owner[name]}")
            owner[name] = file
        if names or kernels is None:
            texts.append(rewriter.result())
    missing = sorted(set(kernels or ()) - set(owner))
    if missing:
        raise clang.ClangError(f"there is no kernel '{missing[0]}'")
    return texts


def compile_kernels(text, flags, out):
    return clang.run([*clang.LANGUAGE, *clang.CODE, *flags, *clang.DIALECT, "-c", "-o", out, "-"], text)


def compile_runtime(file, defines, out):
    if out.exists():
        return 0, "", ""
    partial = out.with_suffix(f".{os.getpid()}")  # others may compile it into the same folder
    done = clang.run([*clang.LANGUAGE, *clang.CODE, *defines, "-Wall", "-Wextra", "-c", "-o", partial, file])
    if done[0] == 0:
        partial.rename(out)
    return done


def runtime_objects(files, defines, folder):
    """Where the runtime's objects are in a folder, by names that tell what they are made of."""
    digest = hashlib.sha256(repr((clang.compiler(), clang.CODE, defines)).encode())
    for file in sorted(clang.RUNTIME.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return [Path(folder) / f"{file.stem}-{digest.hexdigest()[:16]}.o" for file in files]


def build(options):
    """Makes the library or the program; what clang said, empty if all went well."""
    chosen = [name for name in options.sanitize.split(",") if name]
    unknown = set(chosen) - set(SANITIZERS)
    if unknown:
        return f"unknown sanitizer '{sorted(unknown)[0]}': {', '.join(SANITIZERS)}"
    if chosen and not options.exe:
        return "--sanitize needs --exe: a sanitizer's runtime must be in the program itself"
    flags = [flag for name in chosen for flag in SANITIZERS[name]]
    defines = [f"-DMSL_SANITIZE_{name.upper()}" for name in chosen]
    kernel_flags = [*flags, *defines, clang.POISON, *(clang.FAST if options.fast_math else clang.EXACT)]
    texts = translate(options.files, options.include, options.kernels)
    runtime = [clang.RUNTIME / name for name in (*RUNTIME_SOURCES, *(["runner.cpp"] if options.exe else []))]
    if options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [Path(directory) / f"kernels{i}.o" for i in range(len(texts))]
        objects = [*kernels, *runtime_objects(runtime, defines, options.keep or directory)]
        jobs = [pool.submit(compile_kernels, text, kernel_flags, out) for text, out in zip(texts, kernels)]
        jobs += [pool.submit(compile_runtime, file, defines, out) for file, out in zip(runtime, objects[len(texts) :])]
        messages = "".join(job.result()[2] for job in jobs)
        if any(job.result()[0] for job in jobs):
            return messages
        kind = [] if options.exe else ["-shared"]
        status, _, linked = clang.run([*kind, *flags, *objects, *LINK, "-o", options.output])
        return messages + linked if status else ""


def ptx(file, includes, constants, kernels, output):
    """Makes PTX of one file's kernels (all of them for None), specialised by `constants`, values by index; each kernel's
    buffer indices, in the order in which its entry takes them."""
    rewriter = PtxRewriter(*read(file, includes), constants, kernels)
    status, _, messages = clang.run([*clang.PTX, *clang.DIALECT, "-o", output, "-"], rewriter.result())
    if status:
        raise clang.ClangError(messages or "clang failed")
    return rewriter.buffers()


def parse(arguments):
    parser = argparse.ArgumentParser(prog="mslc.py", description="Metal Shading Language on Linux")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("check", "strict check and lint"), ("build", "a library, or a program, for the CPU")):
        command = commands.add_parser(name, help=text)
        command.add_argument("files", nargs="+", metavar="FILE.metal")
        command.add_argument("-I", dest="include", action="append", default=[], metavar="DIR")
    command.add_argument("-o", dest="output", required=True)
    command.add_argument("--sanitize", default="", help="address, undefined, thread; comma-separated")
    command.add_argument("--fast-math", action="store_true", help="as Metal compiles by default")
    command.add_argument("--exe", action="store_true", help="the runner program instead of a library")
    command.add_argument("-k", dest="kernels", action="append", metavar="NAME", help="this kernel; else every one")
    command.add_argument("--keep", metavar="DIR", help="the runtime's objects stay there, for the next build")
    command = commands.add_parser("ptx", help="PTX, for an NVIDIA GPU")
    command.add_argument("file", metavar="FILE.metal")
    command.add_argument("-I", dest="include", action="append", default=[], metavar="DIR")
    command.add_argument("-o", dest="output", required=True)
    command.add_argument("-D", dest="constants", action="append", default=[], metavar="INDEX=VALUE",
                         help="a function constant; what is left out is undefined")  # fmt: skip
    command.add_argument("-k", dest="kernels", action="append", metavar="NAME", help="this kernel; else every one")
    return parser.parse_args(arguments)


def main(arguments):
    options = parse(arguments)
    try:
        if options.command == "check":
            found = [line for file in options.files for line in check(file, options.include)]
            print("\n".join(found), end="\n" if found else "")
            return 1 if found else 0
        if options.command == "ptx":
            constants = dict(map(int, text.split("=")) for text in options.constants)
            print(json.dumps(ptx(options.file, options.include, constants, options.kernels, options.output)))
            return 0
        messages = build(options)
    except (clang.ClangError, Unreadable) as error:
        messages = str(error)
    if messages:
        print(messages, file=sys.stderr)
    return 1 if messages else 0
