"""
The processor time that Python takes to launch what an eager micro-step launches.

    python -m kernels.emulator.launches < work.json       in a process without TRITON_INTERPRET; prints JSON

Everything runs as on a GPU down to Triton's launcher, which here launches nothing: checks, dispatch, autograd, how
Triton binds and specializes arguments. Sizes are tiny, so that PyTorch's operators on the CPU take about as long as
their launches would. Times are of this thread's processor, which other programs cannot lengthen by taking turns, and
the lower quartile of many.
"""

import dataclasses
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.emulator.driver import emulated
from kernels.report.shapes import Shape, arguments, blocks

TINY = Shape(B=1, T=16, C=32, H=2, L=1, V=60)
WARM_UP = 5


class Launcher:
    """What Triton calls in place of a compiled kernel: count, and launch nothing."""

    launches = 0

    def __init__(self, source, metadata):
        pass

    def __call__(self, *_):
        Launcher.launches += 1


class Operators(TorchDispatchMode):
    """Count the operators of PyTorch that launch a kernel, also those within ours: neither views nor empty tensors."""

    launches = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "gpt2":
            with self:
                return OPDEFS[operator._schema.name]._init_fn(*args, **(kwargs or {}))
        views = any(result.alias_info and not result.alias_info.is_write for result in operator._schema.returns)
        self.launches += not views and "empty" not in operator._schema.name
        return operator(*args, **(kwargs or {}))


def time_launches(forward: Callable, leaves: list[torch.Tensor], wanted: list[bool], repeats: int) -> dict[str, float]:
    """Return the launches of a forward and a backward, of Triton's kernels and of PyTorch's; and their microseconds."""

    def both() -> tuple[int, int]:
        with torch.autocast("cpu", torch.bfloat16):
            start = time.thread_time_ns()
            outputs = forward()
            middle = time.thread_time_ns()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [output for output, each in zip(outputs, wanted, strict=True) if each]
        upstream = [torch.ones_like(output) for output in outputs]
        again = time.thread_time_ns()
        torch.autograd.grad(outputs, leaves, upstream)
        return middle - start, time.thread_time_ns() - again

    both()  # which compiles
    before = Launcher.launches
    with Operators() as counted:
        both()
    own, runs = Launcher.launches - before, [both() for _ in range(WARM_UP + repeats)][WARM_UP:]
    times = [sorted(each)[len(runs) // 4] / 1e3 for each in zip(*runs, strict=True)]
    found = {"triton": own, "pytorch": counted.launches - sum(wanted)}  # ones_like is not the operation's
    return found | {"forward_us": times[0], "backward_us": times[1], "both_us": sum(times)}


def launches(layers: int, repeats: int, operations: list[str]) -> dict:
    """Return time_launches of these operations and of a micro-step of so many layers; and the processor's name."""
    found = {"processor": processor()}
    torch.set_num_threads(1)
    with emulated("sm_80"):
        triton.runtime.driver.active.launcher_cls = Launcher
        ops = kernels.select("all")
        for name in operations:
            given, wanted = arguments(name, TINY, torch.bfloat16, "cpu")
            leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
            forward = lambda name=name, given=given: getattr(ops, name)(*given)  # noqa: E731
            found[name] = time_launches(forward, leaves, wanted, repeats)
        if layers:
            parameters, forward = blocks(ops, dataclasses.replace(TINY, L=layers), "cpu")
            found["micro-step"] = time_launches(forward, parameters, [True], repeats)
    return found


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    named = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


if __name__ == "__main__":
    print(json.dumps(launches(**json.load(sys.stdin))))
