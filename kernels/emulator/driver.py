"""
Triton's runtime on a GPU that is not there: kernels are compiled to PTX, and machine.py runs the PTX.

    with emulated("sm_80") as launches:
        y = causal_attention(qkv, 12, 0.0)          tensors on the CPU; forward and backward

All above the driver is Triton's own: how arguments are bound, specialized, compiled and passed. The process must not
have TRITON_INTERPRET set when kernels are defined. Triton need not be told of a GPU, nor be able to run ptxas.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from kernels import attention
from kernels.common import emulate_gpu
from kernels.emulator.machine import Launch, load
from kernels.emulator.memory import Memory

SCALARS = {"i32": np.int32, "u32": np.uint32, "i64": np.int64, "u64": np.uint64, "fp32": np.float32}  # of Triton
SHARED_BYTES = 227 * 1024  # the most that a program may ask for; kernels.report holds each GPU's own limit


class Finished(NamedTuple):
    """A launch that has run."""

    kernel: str  # gelu.forward
    grid: tuple[int, int, int]
    faults: dict[str, int]
    costs: dict[tuple, np.ndarray]
    seconds: float


class PtxBackend(CUDABackend):
    """Stop at PTX: no ptxas, no machine code."""

    def __init__(self, target):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language):
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self):
        return f"{super().hash()}-ptx"


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, name, binary, shared, device):
        return None, binary.decode() if isinstance(binary, bytes) else binary, 0, 0, 1024


def memory_of(tensors: list[torch.Tensor], granule: int) -> list[Memory]:
    """Return the bytes of each tensor, from its first element to its last, padded to 16; once per address."""
    spans = {}
    for tensor in tensors:
        items = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans[tensor.data_ptr()] = max(spans.get(tensor.data_ptr(), 0), items * tensor.element_size())
    memories = []
    for address, size in spans.items():
        start, stop = address // 16 * 16, -(-(address + size) // 16) * 16  # within the pages of the tensor
        data = np.frombuffer((ctypes.c_uint8 * (stop - start)).from_address(start), np.uint8)
        memories.append(Memory(start, data, granule, address, address + size))
    return memories


class Launcher:
    """Run one compiled kernel, in whatever surrounding emulated() there is now: Triton keeps launchers for good."""

    def __init__(self, source, metadata):
        self.kinds, self.shared_bytes = list(source.signature.values()), metadata.shared
        self.name = f"{source.fn.__module__.split('.')[-1]}.{source.fn.__name__.strip('_').removesuffix('_kernel')}"

    def __call__(self, x, y, z, stream, text, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        driver, start = triton.runtime.driver.active, time.perf_counter()
        kernel = load(driver.change(self.name, text) if driver.change else text)
        passed = [(kind, a) for kind, a in zip(self.kinds, arguments, strict=True) if kind != "constexpr"]
        values = [np.uint64(a.data_ptr()) if kind[0] == "*" else SCALARS[kind](a) for kind, a in passed]
        values += [np.uint64(0)] * (len(kernel.parameters) - len(values))  # scratch memory, which no kernel uses
        tensors = [a for kind, a in passed if kind[0] == "*" and a.numel()]
        memory = memory_of(tensors, kernel.granule("global"))
        launch = Launch(kernel, (x, y, z), values, memory, self.shared_bytes, **driver.settings)
        launch.run()
        driver.finished.append(Finished(self.name, (x, y, z), launch.faults, launch.costs, time.perf_counter() - start))
        if launch.faults and not driver.collect:
            raise RuntimeError("\n".join(f"{self.name}: {n} x {fault}" for fault, n in launch.faults.items()))


class Driver:
    """What Triton asks of a driver, and what Launcher needs."""

    launcher_cls, utils = Launcher, Utils()

    def __init__(self, architecture: str, change: Callable | None, collect: bool, settings: dict):
        self.architecture, self.change, self.collect = int(architecture.removeprefix("sm_")), change, collect
        self.settings, self.finished = settings, []

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def emulated(
    architecture: str = "sm_80", change: Callable | None = None, collect: bool = False, **settings
) -> Iterator[list[Finished]]:
    """
    Run kernels on CPU tensors as compiled for this NVIDIA GPU; yield the list that every launch is added to.

    change:   a function of a kernel's name and its PTX that returns the PTX to run: tests plant mistakes with it
    collect:  record faults and go on; else the first launch with a fault raises RuntimeError
    settings: `errors` and `counting` of machine.Launch
    Raise ValueError if kernels are interpreted; in a launch, for an instruction that is not emulated.
    """
    if not isinstance(attention._forward_kernel, triton.runtime.JITFunction):
        raise ValueError("kernels are interpreted in this process: start it without TRITON_INTERPRET")
    driver, backend = Driver(architecture, change, collect, settings), backends["nvidia"]
    outer = triton.runtime.driver._active  # None, or that of a surrounding emulated(): to ask for .active needs a GPU
    backends["nvidia"] = type(backend)(PtxBackend, backend.driver)
    triton.runtime.driver.set_active(driver)
    try:
        with triton.knobs.runtime.scope(), emulate_gpu(architecture):
            triton.knobs.runtime.interpret = True  # what kernels.common asks before it launches on a CPU
            yield driver.finished
    finally:
        backends["nvidia"] = backend
        triton.runtime.driver.set_active(outer)
