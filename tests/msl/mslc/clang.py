"""Finding clang, its flags, and reading its diagnostics."""
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "include"
RUNTIME = ROOT / "runtime"
OLDEST = 17
PREFERRED = ("clang++-19", "clang++-18", "clang++-17", "clang++")

LANGUAGE = ["-x", "c++", "-std=c++17"]
PREPROCESS = ["-E", "-nostdinc", "-undef", "-D__METAL__=1", "-D__METAL_VERSION__=310", "-D__HAVE_BFLOAT__=1"]
# 1.0 is a float in Metal; half and bfloat are rounded after each operation.
DIALECT = [
    "-nostdinc", "-nostdinc++", "-fno-lax-vector-conversions", "-fno-exceptions", "-fno-rtti", "-ferror-limit=0",
    "-Xclang", "-cl-single-precision-constant",
    "-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none",
    "-Wno-user-defined-literals", "-Wno-reserved-user-defined-literal",
    "-Wno-duplicate-decl-specifier", "-Wno-unknown-attributes",
    f"-isystem{INCLUDE / 'msl'}", "-include", "shim.h",
]  # fmt: skip
# Metal 3.1 is a dialect of C++14. Conversions that may lose something are to be written down: an index of 64 bits kept
# in 32, or of 32 in 16, is right for every small test.
STRICT = [
    "-std=c++14", "-Wimplicit-int-conversion", "-Wfloat-conversion", "-Wsign-compare",
    "-Wtautological-unsigned-zero-compare",
    "-fsyntax-only", "-DMSL_CHECK", "-Werror", "-fno-caret-diagnostics", "-fno-show-column",
    "-fno-diagnostics-show-option", "-Wreturn-type", "-Wvla", "-Wvla-cxx-extension", "-Wuninitialized",
    "-Wsometimes-uninitialized", "-Winfinite-recursion", "-Wunused-variable", "-Wunused-but-set-variable",
    "-Wno-unknown-warning-option",
]  # fmt: skip
CODE = [
    "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-mf16c", "-mfma", "-fno-strict-aliasing", "-fno-omit-frame-pointer",
]  # fmt: skip
POISON = "-ftrivial-auto-var-init=pattern"  # variables without a value are NaN, or large
# For the driver of an NVIDIA GPU, which compiles it for the one that is there.
PTX = [
    "-x", "cuda", "-std=c++17", "--cuda-device-only", "--cuda-gpu-arch=sm_90", "--cuda-feature=+ptx80",
    "-nocudainc", "-nocudalib", "-DMSL_CUDA", "-O3", "-ffp-contract=fast", "-fno-strict-aliasing",
    # Every call is inlined, as Apple's compiler does.
    "-Wno-unknown-cuda-version", "-mllvm", "-inline-threshold=1000000", "-S",
]  # fmt: skip
EXACT, FAST = ["-ffp-contract=off"], ["-ffast-math", "-ffp-contract=fast"]


class ClangError(Exception):
    """clang could not be found, or refused what the tool gave it."""


@functools.lru_cache(maxsize=None)
def compiler():
    """The clang to use: MSL_CLANG, or the best of the usual names."""
    names = [os.environ["MSL_CLANG"]] if os.environ.get("MSL_CLANG") else PREFERRED
    path = next((name for name in names if shutil.which(name)), None)
    advice = f"clang {OLDEST} or newer is needed: apt install clang-19 libclang-rt-19-dev llvm-19, or set MSL_CLANG"
    if not path:
        raise ClangError(f"{' and '.join(names)} not found; {advice}")
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    number = re.search(r"clang version (\d+)", version)
    if not number or int(number.group(1)) < OLDEST:
        raise ClangError(f"{path} is {version.splitlines()[0] if version else 'not a clang'}; {advice}")
    return path


def run(arguments, text=None):
    """Runs clang; (exit status, stdout, stderr)."""
    done = subprocess.run([compiler(), *map(str, arguments)], input=text, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def preprocess(file, includes):
    flags = [f"-I{INCLUDE / 'stubs'}", *(f"-I{directory}" for directory in includes)]
    status, text, messages = run([*LANGUAGE, *PREPROCESS, *flags, file])
    if status:
        raise ClangError(messages.strip())
    return text


def type_errors(text):
    """What the strict type and address-space check says, a string each; once for all instances of a template."""
    status, _, messages = run([*LANGUAGE, *STRICT, *DIALECT, "-"], text)
    groups = _groups(messages)
    if status and not groups:
        return [messages or f"{compiler()} ended with status {status}"]
    return list(dict.fromkeys(group[0] for group in groups if not _is_metal(group)))


def _groups(messages):
    """The lines of each error, with its notes."""
    groups = []
    for line in messages.splitlines():
        if re.search(r": (fatal )?error: ", line):
            groups.append([line])
        elif groups:
            groups[-1].append(line)
    return groups


def _is_metal(group):
    return "error: constexpr if is a C++17 extension" in group[0] or _copies_between_spaces(group)


def _copies_between_spaces(group):
    """Metal copies a struct from one address space to another; C++ has no such copy constructor."""
    if not re.search(r"error: (no matching constructor for initialization of|no viable overloaded '=')", group[0]):
        return False
    candidates = [line for line in group if "note: " in line and "candidate" in line]
    implicit = r"implicit (copy|move|default)|requires \d+ argument|could not match"
    return (
        bool(candidates)
        and all(re.search(implicit, line) for line in candidates)
        and any("address space" in line for line in candidates)
    )
