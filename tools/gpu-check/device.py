"""The driver's part: loads PTX, launches its entries on torch's stream, captures launches as a graph, times them."""
import ctypes
import statistics

import torch

EMPTY = b""".version 8.0
.target sm_90
.address_size 64
.visible .entry empty() { ret; }
\0"""
# More than any cache.
SWEPT = 240 << 20


class Driver:
    """libcuda, in torch's context."""

    def __init__(self):
        torch.zeros(1, device="cuda")
        self.cuda = ctypes.CDLL("libcuda.so.1")

    def call(self, name, *arguments):
        status = getattr(self.cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {status} {(text.value or b'').decode()}")

    def module(self, ptx):
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ptx)
        return module

    def function(self, module, name):
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def registers(self, function):
        number = ctypes.c_int()
        self.call("cuFuncGetAttribute", ctypes.byref(number), 4, function)
        return number.value

    def launch(self, function, grid, threads, arguments):
        """`arguments`: ctypes values, in the order of the entry's parameters."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("cuLaunchKernel", function, *grid, *threads, 0, stream, pointers, None)


def graph_of(run):
    """What `run` launches, to be replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def seconds(replay, at_least=5):
    """The median time of a replay, after warming up."""
    times = []
    for _ in range(2 + at_least):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def copy_bandwidth():
    """Bytes per second of a large copy, those read and those written. (In a graph a copy is slower: another engine's.)"""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 9)


def empty_launch(driver):
    """Seconds of a kernel that does nothing, among many in a graph."""
    function = driver.function(driver.module(EMPTY), "empty")
    graph = graph_of(lambda: [driver.launch(function, (1, 1, 1), (32, 1, 1), []) for _ in range(200)])
    return seconds(graph.replay) / 200
