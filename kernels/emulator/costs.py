"""
Count what the accesses of compiled kernels cost, without a GPU: bank conflicts and sectors.

    python -m kernels.emulator.costs sm_80 < work.json       in a process without TRITON_INTERPRET; prints JSON

Every operation runs as in training, forward and backward under bfloat16 autocast, compiled for the GPU and emulated, at
the real C, D and V and few rows or tokens: cost over least cost does not change with more of the same. Faults, such as
races, raise RuntimeError.

    wavefronts: of accesses to shared memory. A warp is served 128 bytes at a time; in one wavefront each of 32 banks
                gives one word of 4 bytes. The least is what as many distinct words need without a bank conflict.
    sectors:    of 32 bytes that each warp's accesses to global memory touch. The least is for the same bytes, side by
                side.
"""

import collections
import dataclasses
import json
import sys

import numpy as np
import torch

import kernels
from kernels.emulator.driver import Finished, emulated
from kernels.report.shapes import Shape, arguments, calls_per_step, forward_and_backward

ROWS, TOKENS = 16, 256
SPACES = {"shared": "wavefronts", "global": "sectors"}


def small_shape(operation: str, shape: Shape) -> Shape:
    """Return the shape to run: the real C, D and V; attention at T % 256 tokens more than 256, else 16 rows."""
    if operation == "causal_attention":
        T = shape.T if shape.T < TOKENS else TOKENS + shape.T % TOKENS
        return dataclasses.replace(shape, B=1, T=T, H=1, C=shape.C // shape.H)
    if operation.endswith("cross_entropy"):  # C belongs to the matrix product, which is PyTorch's
        return dataclasses.replace(shape, B=1, T=2, C=16, H=1)
    return dataclasses.replace(shape, B=1, T=ROWS)


def figures(launches: list[Finished]) -> dict:
    """Return the sums over launches, and per space the access that costs the most above its least."""
    result = {}
    for space, name in SPACES.items():
        sites = collections.defaultdict(lambda: np.zeros(2, np.int64))
        for (source, of, opcode), cost in (item for launch in launches for item in launch.costs.items()):
            if of == space:
                sites[f"{source} {opcode}"] += cost
        result[name], result[f"least_{name}"] = map(int, sum(sites.values(), np.zeros(2, np.int64)))
        above = {site: cost - least for site, (cost, least) in sites.items() if cost > least}
        worst = max(above, key=above.get, default=None)
        result[f"worst_{name}"] = worst and "{}: {}, least {}".format(worst, *sites[worst])
    return result


def count(shape: Shape, architecture: str) -> dict[str, dict]:
    """
    Return, by kernel ("causal_attention.forward"): wavefronts, least_wavefronts, worst_wavefronts, sectors,
    least_sectors and worst_sectors. worst_*: the line of the kernel, the instruction and its two figures, or None.
    """
    result = {}
    for operation in calls_per_step(shape):
        small = arguments(operation, small_shape(operation, shape), torch.bfloat16, "cpu")
        with emulated(architecture, counting=True) as launches:
            function = getattr(kernels.select("all"), operation)
            forward_and_backward(function, *small, torch.autocast("cpu", torch.bfloat16))
        for kernel in dict.fromkeys(launch.kernel for launch in launches):
            own = [launch for launch in launches if launch.kernel == kernel]
            result[f"{operation}.{kernel.split('.')[1]}"] = figures(own)
    return result


if __name__ == "__main__":
    print(json.dumps(count(Shape(**json.load(sys.stdin)), sys.argv[1])))
