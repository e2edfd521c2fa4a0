"""
What Python takes to launch an eager micro-step beside what the GPU takes to run it: python -m kernels.bench --launches.

If the launches take longer than the kernels, an eager run is bound by the CPU: the GPU waits. kernels.emulator.launches
measures them, in a process of its own.
"""

import math

import kernels
from kernels.bench.operations import needed
from kernels.gpus import GPU
from kernels.report import __main__ as report
from kernels.report import roofline
from kernels.report.shapes import Shape, calls_per_step


def measure(shape: Shape, repeats: int) -> dict:
    """Return kernels.emulator.launches.launches() of a micro-step and its operations."""
    operations = [name for name, calls in calls_per_step(shape).items() if calls]
    work = {"layers": shape.L, "repeats": repeats, "operations": operations}
    return report.child("kernels.emulator.launches", work=work, interpret=False)


def compare(found: dict, counted: list[dict], shape: Shape, gpu: GPU, name: str) -> tuple[list[dict], str]:
    """
    Return a row per operation and one for a micro-step: launches, Python's time, least time of this GPU; the verdict.

    found:   measure()
    counted: the kernels at this shape, as kernels.report counts them
    name:    of the GPU
    """
    calls = {operation: n for operation, n in calls_per_step(shape).items() if n}
    least = {operation: needed(operation, shape, counted, gpu)["least_ms"] for operation in calls}
    step = roofline.step(counted, shape, gpu, set(kernels.FAMILIES), compiled=False)
    least["micro-step"] = step["total"] - step["adamw"]
    rows = []
    for operation, milliseconds in least.items():
        times = found[operation] | {"least_us": 1e3 * milliseconds}
        rows.append({"operation": operation, "calls": calls.get(operation, 1), **times})
    python, work = found["micro-step"]["both_us"] / 1e3, least["micro-step"]
    return rows, (
        f"One core of {found['processor']} takes {python:.1f} ms to launch a micro-step; with {shape.B} sequences the "
        f"{name} takes at least {work:.1f} ms. In proportion, an eager run waits for Python below "
        f"{math.ceil(shape.B * python / work)} sequences."
    )
