"""
Time one operation: the GPU's own time, and the time that Python takes to launch it.

Between two CUDA events lies what the GPU did, and also what it waited for: if Python takes longer to launch a kernel
than the kernel runs, events around a call time Python. So the GPU is first put to sleep for twice as long as the last
run took to launch, everything is queued while it sleeps, and runs that were not all queued when it woke do not count.
Runs take turns on copies of the arguments that together exceed four times the L2 cache, so that none finds its data
cached.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

import kernels
from kernels.bench.rivals import OURS, first_line, versions
from kernels.common import architecture
from kernels.gpus import GPU, named_gpu
from kernels.report import __main__ as report
from kernels.report import roofline
from kernels.report.shapes import Shape, arguments, calls_per_step

TINY = Shape(B=1, T=16, C=32, H=1, L=1, V=60)  # for the interpreter
WARM_UP = 3  # runs that compile, and fill caches of memory
FASTEST_CLOCK = 3e9  # cycles per second: no GPU has more, so a sleep of n cycles lasts at least n / FASTEST_CLOCK
LONGEST_SLEEP = 0.1  # seconds


def time_phases(phases: Callable[[int], Iterator], device: torch.device, repeats: int) -> dict[str, float]:
    """
    Return the median milliseconds of the two phases and of both, and on a GPU, of launching them.

    phases: called with the number of the run; yields before the first phase, between the two, and after the last
    """
    on_gpu, runs, launch = device.type == "cuda", [], 0.0
    for repeat in range(-WARM_UP, repeats):
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda._sleep(int(min(2 * launch + 1e-3, LONGEST_SLEEP) * FASTEST_CLOCK))
        start = time.perf_counter()
        marks = [mark(on_gpu) for _ in phases(repeat)]
        launch = time.perf_counter() - start
        runs.append((marks, launch, not on_gpu or not marks[0].query()))
    if on_gpu:
        torch.cuda.synchronize(device)
    runs = runs[WARM_UP:]
    queued = [run for run in runs if run[2]]
    times = [(between(a, b), between(b, c), between(a, c), 1e3 * host) for (a, b, c), host, _ in queued or runs]
    medians = map(statistics.median, zip(*times, strict=True))
    found = dict(zip(("forward_ms", "backward_ms", "both_ms", "launch_ms"), medians, strict=True))
    if on_gpu:
        return found | {"queued": len(queued) / len(runs)}
    del found["launch_ms"]  # on a CPU, the work itself
    return found


def mark(on_gpu: bool):
    """Return a point in time: a CUDA event, or the clock."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    """Return the milliseconds from one mark to another."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def time_operation(
    function: Callable, operation: str, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, float]:
    """Return time_phases of forward and backward, for one version of an operation."""
    first, differentiable = arguments(operation, shape, dtype, str(device))
    copies = [first]
    if device.type == "cuda":
        size = sum(a.nbytes for a in first if isinstance(a, torch.Tensor))
        more = 4 * torch.cuda.get_device_properties(device).L2_cache_size // size
        runs = WARM_UP + repeats  # a copy for each is enough
        copies += [arguments(operation, shape, dtype, str(device))[0] for _ in range(min(more, runs - 1))]
    upstream = []

    def phases(repeat: int) -> Iterator[None]:
        given = copies[repeat % len(copies)]
        leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
        yield
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [output for output, wanted in zip(outputs, differentiable, strict=True) if wanted]
        upstream.extend(torch.ones_like(output) for output in outputs[len(upstream) :])
        yield
        torch.autograd.grad(outputs, leaves, upstream)
        yield

    return time_phases(phases, device, repeats)


def needed(operation: str, shape: Shape, counted: list[dict], gpu: GPU | None) -> dict | None:
    """Return bytes, FLOPs and least milliseconds of both directions, matrix products with weights included."""
    own = [kernel for kernel in counted if kernel["operation"] == operation]
    if not own:
        return None
    width = {"linear_gelu": 4 * shape.C, "linear_cross_entropy": shape.W}.get(operation, 0)
    flops = 3 * 2 * shape.N * shape.C * width
    moved = 3 * 2 * (shape.N * (shape.C + width) + shape.C * width) if width else 0
    seconds = 0.0
    if gpu:
        seconds = roofline.least_seconds(moved, flops, gpu)[0] + sum(roofline.kernel_seconds(k, gpu)[0] for k in own)
    flops += sum(kernel["flops"] for kernel in own)
    return {"bytes": moved + sum(k["unique_bytes"] for k in own), "flops": flops, "least_ms": 1e3 * seconds}


def time_operations(shape: Shape, device: torch.device, dtype: str, compiled: bool, repeats: int) -> list[dict]:
    """Return a row per version of every operation; under TRITON_INTERPRET=1, one more per operation, interpreted."""
    on_gpu = device.type == "cuda"
    fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = getattr(torch, {"auto": "bfloat16" if fast else "float32"}.get(dtype, dtype))
    gpu = named_gpu(torch.cuda.get_device_name(device)) if on_gpu else None
    counted = []
    if on_gpu:  # counted in another process, in the interpreter, as launched on this GPU
        name = architecture(torch.empty(0, device=device))
        counted = report.count(shape, [name])[name]
    rows = []
    for operation in calls_per_step(shape):
        least = needed(operation, shape, counted, gpu)
        for version, function in versions(operation, compiled, on_gpu).items():
            row = {"operation": operation, "version": version}
            try:
                row |= time_operation(function, operation, shape, device, dtype, repeats)
            except Exception as error:  # a rival may raise anything: the others are still timed
                if version in OURS and "memory" not in str(error):
                    raise
                row["version"] += f": {first_line(error)}"
            if least and "both_ms" in row:
                row["gb_per_s"] = least["bytes"] / row["both_ms"] / 1e6
                row["tflops"] = least["flops"] / row["both_ms"] / 1e9
                row["roofline"] = least["least_ms"] / row["both_ms"] if gpu else None
            rows.append(row)
        if not on_gpu and os.environ.get("TRITON_INTERPRET") == "1":
            function = getattr(kernels.select("all"), operation)
            with np.errstate(all="ignore"):
                times = time_operation(function, operation, TINY, device, torch.float32, repeats=1)
            rows.append({"operation": operation, "version": "triton, interpreted, tiny: not a speed", **times})
        torch._dynamo.reset()
    return rows


def doubts(rows: list[dict]) -> list[str]:
    """Return a sentence per row whose time is uncertain, or not what a program that launches it would see."""
    found = []
    for row in rows:
        name = f"{row['operation']}, {row['version']}"
        if row.get("launch_ms", 0.0) > row.get("both_ms", 0.0):
            launch, both = f"{row['launch_ms']:.3f}", f"{row['both_ms']:.3f}"
            found.append(f"{name}: Python takes {launch} ms to launch {both} ms of work, so a GPU that runs it waits")
        if row.get("queued", 1.0) < 0.5:
            found.append(
                f"{name}: only {row['queued']:.0%} of the runs were queued in time: Python's time may be in it"
            )
    return found
