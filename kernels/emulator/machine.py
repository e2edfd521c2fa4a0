"""
Run a launch: the threads of several programs at a time in step, one numpy operation per instruction.

    launch = Launch(load(text), grid, values, tensors, shared_bytes)
    launch.run()
    launch.faults        sentences, with how often each applied; empty if the kernel did nothing wrong

Faults are: a race, an access outside the launch's tensors or misaligned, a read of shared memory that nobody wrote or
that an asynchronous copy is still to fill, a result of wgmma that is used before it is waited for, a barrier or
warp-wide instruction that not all threads reach, a register that was never set, and two threads that write different
values to one place. An instruction that is not in INSTRUCTIONS is refused, never guessed.
"""

import collections
import functools

import numpy as np

from kernels.emulator import access, scalar, warps
from kernels.emulator.memory import Memory
from kernels.emulator.ptx import Kernel, parse
from kernels.emulator.threads import Threads

THREADS_AT_ONCE = 2048
BRANCHES = {"bra": (None, ("uni",)), "ret": (None, ())}  # Threads.run does these
INSTRUCTIONS = scalar.INSTRUCTIONS | access.INSTRUCTIONS | warps.INSTRUCTIONS | BRANCHES
SHORT_FLOATS = (*scalar.AS_FMA, "cvt", "mma", "wgmma")  # what may take floats of 16 bits, or two to a register


@functools.cache
def load(text: str) -> Kernel:
    """Parse a kernel's PTX. Raise ValueError if it has instructions that are not emulated."""
    kernel, unknown = parse(text), []
    for block in kernel.blocks:
        for i in block:
            i.run, modifiers = INSTRUCTIONS.get(i.head, (None, None))
            short = any("f16" in type or type == "f32x2" for type in i.types)
            if modifiers is None or {*i.modifiers} - {*modifiers} or short and i.head not in SHORT_FLOATS:
                unknown.append(f"line {i.line}: {i.text}")
    if unknown:
        raise ValueError(f"the emulator does not know {len(unknown)} instructions of the PTX; {unknown[0]}")
    return kernel


class Launch:
    """
    One launch of a kernel.

    values:   the parameters' values, in order, as numpy scalars of their size
    tensors:  all memory that may be read or written; the launch changes their bytes
    errors:   how far approximate instructions are off, as arithmetic.py explains
    counting: whether to fill costs: (file:line of the kernel, "shared" or "global", opcode) -> wavefronts or sectors,
              and their least
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        values: list[np.generic],
        tensors: list[Memory],
        shared_bytes: int,
        errors: str = "uniform",
        counting: bool = False,
    ):
        self.kernel, self.grid, self.tensors, self.shared_bytes = kernel, grid, tensors, shared_bytes
        self.parameters = dict(zip(kernel.parameters, values, strict=True))
        self.errors, self.counting = errors, counting
        self.faults = collections.Counter()
        self.costs = collections.defaultdict(lambda: np.zeros(2, np.int64))

    def run(self) -> None:
        x, y, z = self.grid
        programs = np.stack(np.unravel_index(np.arange(x * y * z), (z, y, x))[::-1], axis=1)
        at_once = max(1, THREADS_AT_ONCE // self.kernel.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(programs), at_once):
                Threads(self, first, programs[first : first + at_once]).run()
