"""
Threads in step: their registers, and which of them run next.

Threads that diverge at a branch wait for each other: those at the lowest block go first, until they meet. This is one
order of many; it is enough, since memory.py reports every access whose result depends on the order.
"""

import numpy as np

from kernels.emulator import arithmetic
from kernels.emulator.memory import PROGRAM, WARP, Memory
from kernels.emulator.ptx import DTYPES, Number, Register


class Threads:
    """The threads of some programs of a launch. programs: (n, 3), their places in the grid."""

    def __init__(self, launch, first_program: int, programs: np.ndarray):
        kernel = launch.kernel
        self.launch, self.kernel, self.n = launch, kernel, len(programs) * kernel.threads
        own = np.arange(self.n)
        self.slot = own // kernel.threads  # of the program, among these
        self.number = first_program * kernel.threads + own  # in the grid
        self.time = (first_program + self.slot) * PROGRAM
        self.special = {"%tid.x": own % kernel.threads, "%ntid.x": np.full(self.n, kernel.threads)}
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = programs[self.slot, axis]
            self.special[f"%nctaid.{name}"] = np.full(self.n, launch.grid[axis])
        self.registers = {}  # name -> (n,)
        self.at, self.active = None, None  # the instruction that runs, and which threads are in its block (None: all)
        self.stride = -(-launch.shared_bytes // 16) * 16  # of the programs' shared memories
        self.shared = Memory(0, np.full(len(programs) * self.stride, 0xFF, np.uint8), kernel.granule("shared"))  # nan
        self.copies, self.copy_group = [], np.zeros(self.n, np.int64)  # in flight; the group that is filled now
        self.products, self.product_group = [], np.zeros(self.n, np.int64)  # likewise, of wgmma
        self.pending = {}  # register -> which threads wait for a product in it

    def fault(self, what: str) -> None:
        self.launch.faults[f"{what}: {self.at.place}"] += 1

    def refuse(self) -> None:
        raise ValueError(f"the emulator does not know this form: {self.at.place}")

    def run(self) -> None:
        blocks, end = self.kernel.blocks, len(self.kernel.blocks)
        block_of = np.zeros(self.n, np.int64)
        while (block := int(block_of.min())) < end:
            here = block_of == block
            self.active = None if here.all() else here
            block_of[here] = block + 1
            for self.at in blocks[block]:
                i, mask = self.at, self.active
                if i.predicate:
                    chosen = self.read(i.predicate[0], DTYPES["pred"]) ^ i.predicate[1]
                    mask = chosen if mask is None else mask & chosen
                    mask = None if mask.all() else mask
                if i.head in ("bra", "ret"):
                    target = self.kernel.labels[i.operands[0]] if i.head == "bra" else end
                    block_of[slice(None) if mask is None else mask] = target
                else:
                    i.run(self, i, mask)

    # ------------------------------------------------------------------------- registers

    def read(self, operand: Register | Number | object, dtype: np.dtype) -> np.ndarray:
        """Return an operand's value for each thread, or one for all."""
        if type(operand) is Number:
            return operand.as_dtype(dtype)
        if type(operand) is not Register:
            return self.special[operand.name].astype(dtype)
        if operand.name in self.pending:
            self.check_pending(operand.name)
        value = self.registers.get(operand.name)
        if value is None:
            if self.at.head != "mov":  # LLVM packs halves that it never uses
                self.fault(f"register {operand.name} was never set")
            value = np.full(self.n, -1).astype(operand.stored)
        return value.view(dtype)

    def read_as(self, operand: object, type: str) -> np.ndarray:
        """Return an operand's value in a type of PTX; 16-bit floats as float32."""
        value = self.read(operand, DTYPES[type])
        if "f16" in type:
            halves = np.ascontiguousarray(np.broadcast_to(value, self.n)).view(np.uint16)
            return arithmetic.widen(halves, type.removesuffix("x2"))
        return value

    def read_words(self, operands: list, threads: np.ndarray) -> np.ndarray:
        """Return 32-bit registers of some threads as (*threads.shape, registers)."""
        words = [np.broadcast_to(self.read(operand, DTYPES["u32"]), self.n)[threads] for operand in operands]
        return np.stack(words, axis=-1)

    def put(self, target: Register | None, value: np.ndarray, mask: np.ndarray | None) -> None:
        if target is None:
            return
        if target.name in self.pending:
            self.check_pending(target.name)
        value = np.broadcast_to(value, self.n) if np.ndim(value) == 0 else value
        value = np.ascontiguousarray(value).view(target.stored)
        if mask is not None:
            before = self.registers.get(target.name)
            value = np.where(mask, value, np.full(self.n, -1).astype(target.stored) if before is None else before)
        self.registers[target.name] = value

    def put_in(self, target: Register, threads: np.ndarray, values: np.ndarray, mask: np.ndarray | None) -> None:
        """Put values of some threads only."""
        everyone = np.zeros(self.n, values.dtype)
        everyone[threads] = values
        self.put(target, everyone, mask)

    def check_pending(self, name: str) -> None:
        waiting = self.pending[name] if self.active is None else self.pending[name] & self.active
        if waiting.any() and self.at.head != "wgmma":
            self.fault(f"register {name} is used while wgmma is still to fill it")

    # --------------------------------------------------------------------------- threads

    def chosen(self, mask: np.ndarray | None) -> np.ndarray:
        return np.arange(self.n) if mask is None else np.flatnonzero(mask)

    def whole_warps(self, mask: np.ndarray | None, size: int = WARP) -> np.ndarray:
        """Return the threads of the warps that take part, (warps, 32); or of warpgroups of four, if size is 128."""
        warps = np.arange(self.n).reshape(-1, size)
        if mask is None:
            return warps
        taking_part = mask.reshape(-1, size)
        if (taking_part.any(axis=1) != taking_part.all(axis=1)).any():
            self.fault("not all threads of a warp reach a warp-wide instruction")
        return warps[taking_part.any(axis=1)]
