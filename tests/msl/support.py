"""For the tests: launching kernels of a built library through ctypes, and writing files for the runner program."""
import ctypes
import struct
import subprocess
import sys
from pathlib import Path

MSLC = Path(__file__).resolve().parent / "mslc.py"
READ, WRITE, BYTES = 0, 1, 2


def mslc(*arguments):
    """Runs the tool; (exit status, everything it printed)."""
    command = [sys.executable, str(MSLC), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


class _Binding(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("kind", ctypes.c_uint32)]
    _fields_ += [("pointer", ctypes.c_void_p), ("size", ctypes.c_uint64)]


class _Constant(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("size", ctypes.c_uint32), ("value", ctypes.c_uint8 * 8)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("constants", ctypes.POINTER(_Constant)),
        ("constant_count", ctypes.c_uint32),
        ("bindings", ctypes.POINTER(_Binding)),
        ("binding_count", ctypes.c_uint32),
        ("threadgroup_memory", ctypes.POINTER(ctypes.c_uint32)),
        ("threadgroup_memory_count", ctypes.c_uint32),
        ("threadgroups", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
    ]


class Launch:
    """A kernel's name, its bindings (index, kind, bytearray) and the rest of a launch."""

    def __init__(self, kernel, bindings, threadgroups=1, threads=32, memory=(), constants=(), seed=0):
        self.kernel, self.bindings, self.memory, self.constants, self.seed = kernel, bindings, memory, constants, seed
        self.threadgroups, self.threads = _three(threadgroups), _three(threads)


def _three(size):
    return (size, 1, 1) if isinstance(size, int) else (*size, 1, 1)[:3]


def floats(values):
    values = list(values)
    return bytearray(struct.pack(f"<{len(values)}f", *values))


def words(values):
    values = list(values)
    return bytearray(struct.pack(f"<{len(values)}I", *values))


def as_floats(data):
    return struct.unpack(f"<{len(data) // 4}f", data)


def as_words(data):
    return struct.unpack(f"<{len(data) // 4}I", data)


class Library:
    """A library that `mslc.py build` made."""

    def __init__(self, path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.msl_kernel_name.restype = ctypes.c_char_p

    def kernels(self):
        count = self.functions.msl_kernel_count()
        return [self.functions.msl_kernel_name(i).decode() for i in range(count)]

    def run(self, launch):
        """The error message, empty if all went well. Output buffers are changed in place."""
        views = [(ctypes.c_uint8 * len(data)).from_buffer(data) for _, _, data in launch.bindings]
        bindings = [
            _Binding(index, kind, ctypes.addressof(view), len(view))
            for (index, kind, _), view in zip(launch.bindings, views)
        ]
        constants = [
            _Constant(index, len(value), (ctypes.c_uint8 * 8)(*value)) for index, value in launch.constants
        ]
        raw = _Launch(
            launch.kernel.encode(),
            (_Constant * len(constants))(*constants), len(constants),
            (_Binding * len(bindings))(*bindings), len(bindings),
            (ctypes.c_uint32 * len(launch.memory))(*launch.memory), len(launch.memory),
            (ctypes.c_uint32 * 3)(*launch.threadgroups), (ctypes.c_uint32 * 3)(*launch.threads), launch.seed,
        )  # fmt: skip
        error = ctypes.create_string_buffer(2048)
        failed = self.functions.msl_run(ctypes.byref(raw), error, ctypes.c_uint64(len(error)))
        return error.value.decode() if failed else ""


def write_run_file(path, launches, misalignment=0):
    """Every binding becomes a buffer of its own, that many bytes after a multiple of 16."""
    buffers = [data for launch in launches for _, kind, data in launch.bindings if kind != BYTES]
    out = b"MSLRUN1\0" + struct.pack("<I", len(buffers))
    for data in buffers:
        out += struct.pack("<QQ", len(data), misalignment) + data
    out += struct.pack("<I", len(launches))
    next_buffer = 0
    for launch in launches:
        name = launch.kernel.encode()
        out += struct.pack("<I", len(name)) + name + struct.pack("<Q", launch.seed)
        out += struct.pack("<6I", *launch.threadgroups, *launch.threads)
        out += struct.pack(f"<I{len(launch.memory)}I", len(launch.memory), *launch.memory)
        out += struct.pack("<I", len(launch.constants))
        for index, value in launch.constants:
            out += struct.pack("<II8s", index, len(value), value)
        out += struct.pack("<I", len(launch.bindings))
        for index, kind, data in launch.bindings:
            out += struct.pack("<II", index, kind)
            if kind == BYTES:
                out += struct.pack("<I", len(data)) + data
            else:
                out += struct.pack("<IQQ", next_buffer, 0, len(data))
                next_buffer += 1
    Path(path).write_bytes(out)


def run_program(program, file):
    """(exit status, what it printed)."""
    done = subprocess.run([str(program), str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout
