"""
Run the programs of a launch: all their threads in step, one numpy operation per instruction.

    launch = Launch(load(text), grid, values, tensors, shared_bytes)
    launch.run()
    launch.faults        sentences, with how often each applied; empty if the kernel did nothing wrong

Threads that part at a branch wait for each other: those at the lowest block go first, until they meet. That is one
order of many; it stands for all, since memory.py reports races. Faults are: a race, an access outside the launch's
tensors or misaligned, a read of shared memory that nobody wrote or that an asynchronous copy is still to fill, a
barrier or warp-wide instruction that not all threads reach, a register that was never set, and two threads that write
different values to one place. An instruction that is not in KNOWN is refused, never guessed.
"""

import collections
import functools

import numpy as np

from kernels.emulator import arithmetic
from kernels.emulator.memory import BARRIER, PROGRAM, WARP, Memory, sectors, wavefronts
from kernels.emulator.ptx import DTYPES, SHARED_BASE, Address, Instruction, Kernel, Number, Register, parse

THREADS_AT_ONCE = 2048
ELEMENTWISE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda a, b, c: arithmetic.fma(np.asarray(a), b, np.asarray(c)),
    "max": lambda *operands: functools.reduce(np.fmax, operands),  # of two or three, those that are not nan, as in PTX
    "min": lambda *operands: functools.reduce(np.fmin, operands),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
}
AS_FMA = {  # of 16-bit floats: operands -> a, b and c of a * b + c
    "add": lambda a, b: (a, 1.0, b),
    "sub": lambda a, b: (b, -1.0, a),
    "mul": lambda a, b: (a, b, 0.0),
    "fma": lambda a, b, c: (a, b, c),
}
APPROXIMATE = {"ex2": arithmetic.ex2, "div": arithmetic.div_full, "rsqrt": arithmetic.rsqrt}
COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
KNOWN = {  # instruction -> the modifiers that it may have
    **dict.fromkeys(("and", "or", "xor", "not", "neg", "abs", "max", "min", "shl", "shr", "bfe", "selp", "mov"), ()),
    **dict.fromkeys(("add", "sub", "fma"), ("rn", "ftz")),
    "mul": ("lo", "wide", "rn", "ftz"),
    "mad": ("lo", "wide"),
    "div": ("full",),
    **dict.fromkeys(("ex2", "rsqrt"), ("approx", "ftz")),
    "setp": tuple(COMPARE),
    "cvt": ("rn",),
    "createpolicy": ("fractional", "L2", "evict_last", "evict_first"),
    "shfl": ("sync", "bfly", "idx"),
    "mma": ("sync", "aligned", "m16n8k16", "row", "col"),
    **dict.fromkeys(("ldmatrix", "stmatrix"), ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared")),
    "bar": ("sync", "warp"),
    "ld": ("param", "global", "shared", "v2", "v4", "L1", "L2", "evict_last", "evict_first", "cache_hint"),
    "st": ("global", "shared", "v2", "v4", "cs"),
    "cp": ("async", "ca", "cg", "shared", "global", "commit_group", "wait_group"),
    "bra": ("uni",),
    "ret": (),
}


SHORT_FLOATS = (*AS_FMA, "cvt", "mma")  # what may have two operands per register, or operands of 16 bits


@functools.cache
def load(text: str) -> Kernel:
    """Parse a kernel's PTX. Raise ValueError if it has instructions that are not emulated."""
    kernel, unknown = parse(text), []
    for block in kernel.blocks:
        for i in block:
            floats = [type for type in i.types if "f16" in type or type == "f32x2"]
            if i.head not in KNOWN or set(i.modifiers) - {*KNOWN[i.head]} or floats and i.head not in SHORT_FLOATS:
                unknown.append(f"line {i.line}: {i.text}")
            elif i.head in ELEMENTWISE or i.head in APPROXIMATE:
                i.run = Threads.elementwise
            else:
                i.run = getattr(Threads, f"do_{i.head}", None)  # Threads.run itself does bra and ret
    if unknown:
        raise ValueError(f"the emulator does not know {len(unknown)} instructions of the PTX; {unknown[0]}")
    return kernel


class Launch:
    """
    One launch of a kernel.

    values:  of the parameters, in order, as numpy scalars of their size
    tensors: all memory that may be read or written; their bytes change
    errors:  of approximate instructions, as arithmetic.py explains
    costs:   if `counting`, (file:line of the kernel, "shared" or "global", opcode) -> wavefronts or sectors, the least
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


class Threads:
    """The threads of some programs of a launch. programs: (n, 3), their places in the grid."""

    def __init__(self, launch: Launch, first_program: int, programs: np.ndarray):
        kernel = launch.kernel
        self.launch, self.kernel, self.n = launch, kernel, len(programs) * kernel.threads
        own = np.arange(self.n)
        self.slot = own // kernel.threads  # of the program, among these
        self.number = first_program * kernel.threads + own  # in the grid
        self.time = (first_program + self.slot) * PROGRAM
        self.registers, self.at = {}, None  # name -> (n,); the instruction that runs
        self.special = {"%tid.x": own % kernel.threads, "%ntid.x": np.full(self.n, kernel.threads)}
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = programs[self.slot, axis]
            self.special[f"%nctaid.{name}"] = np.full(self.n, launch.grid[axis])
        self.stride = -(-launch.shared_bytes // 16) * 16  # of the programs' shared memories
        bytes_of_all = np.full(len(programs) * self.stride, 0xFF, np.uint8)  # nan in every float type
        self.shared = Memory(0, bytes_of_all, 0, len(bytes_of_all), kernel.granule("shared"))
        self.copies, self.group = [], np.zeros(self.n, np.int64)  # in flight; the group that is filled now

    def fault(self, what: str) -> None:
        self.launch.faults[f"{what}: {self.at.place}"] += 1

    def refuse(self) -> None:
        raise ValueError(f"the emulator does not know this form: {self.at.place}")

    def run(self) -> None:
        blocks, end = self.kernel.blocks, len(self.kernel.blocks)
        block_of = np.zeros(self.n, np.int64)
        while (block := int(block_of.min())) < end:
            active = block_of == block
            everyone = active.all()
            block_of[active] = block + 1
            for self.at in blocks[block]:
                i, mask = self.at, None if everyone else active
                if i.predicate:
                    chosen = self.read(i.predicate[0], np.dtype(np.bool_)) ^ i.predicate[1]
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
        if type(operand) is Register:
            value = self.registers.get(operand.name)
            if value is None:
                if self.at.head != "mov":  # LLVM packs halves that it never uses
                    self.fault(f"register {operand.name} was never set")
                value = np.full(self.n, -1).astype(operand.stored)
            return value.view(dtype)
        return operand.as_dtype(dtype) if type(operand) is Number else self.special[operand.name].astype(dtype)

    def read_as(self, operand: object, type: str) -> np.ndarray:
        """Return an operand's value in a type of PTX; 16-bit floats as float32."""
        value = self.read(operand, DTYPES[type])
        if "f16" in type:
            halves = np.ascontiguousarray(np.broadcast_to(value, self.n)).view(np.uint16)
            return arithmetic.widen(halves, type.removesuffix("x2"))
        return value

    def put(self, target: Register | None, value: np.ndarray, mask: np.ndarray | None) -> None:
        if target is None:
            return
        value = np.broadcast_to(value, self.n) if np.ndim(value) == 0 else value
        value = np.ascontiguousarray(value).view(target.stored)
        if mask is not None:
            before = self.registers.get(target.name)
            value = np.where(mask, value, np.full(self.n, -1).astype(target.stored) if before is None else before)
        self.registers[target.name] = value

    # ------------------------------------------------------------------------ arithmetic

    def elementwise(self, i: Instruction, mask) -> None:
        types = [*i.types[1:], *i.types[:1] * 3]  # add.f32.bf16: the first operand is bf16
        sources = [self.read_as(source, type) for source, type in zip(i.operands[1:], types, strict=False)]
        if "wide" in i.modifiers:
            sources = [source.astype(f"{source.dtype.kind}{2 * source.dtype.itemsize}") for source in sources]
        flush = arithmetic.flush if "ftz" in i.modifiers else lambda x: x
        if "f16" in i.types[0]:
            value = arithmetic.fma_16_bits(i.types[0].removesuffix("x2"), *AS_FMA[i.head](*sources))
        elif i.head in APPROXIMATE:
            value = APPROXIMATE[i.head](*map(np.atleast_1d, sources), self.launch.errors)
        else:
            value = flush(ELEMENTWISE[i.head](*map(flush, sources)))
        self.put(i.operands[0], value, mask)

    def do_mad(self, i, mask) -> None:
        a, b = (self.read(source, i.dtype) for source in i.operands[1:3])
        wide = np.dtype(f"{i.dtype.kind}{i.dtype.itemsize * (2 if 'wide' in i.modifiers else 1)}")
        self.put(i.operands[0], a.astype(wide) * b.astype(wide) + self.read(i.operands[3], wide), mask)

    def do_shl(self, i, mask) -> None:
        """Shift left or right; by the width or more, all bits go."""
        bits, by = i.dtype.itemsize * 8, self.read(i.operands[2], DTYPES["u32"])
        shift = np.left_shift if i.head == "shl" else np.right_shift
        value = shift(self.read(i.operands[1], i.dtype), np.minimum(by, bits - 1).astype(i.dtype))
        gone = by >= bits if i.dtype.kind == "u" else False
        self.put(i.operands[0], np.where(gone, i.dtype.type(0), value), mask)

    do_shr = do_shl

    def do_bfe(self, i, mask) -> None:
        bits, x = i.dtype.itemsize * 8, self.read(i.operands[1], i.dtype)
        start, length = (self.read(each, DTYPES["u32"]).astype(i.dtype) for each in i.operands[2:])
        self.put(i.operands[0], x << (bits - start - length) >> (bits - length), mask)

    def do_setp(self, i, mask) -> None:
        if len(i.operands) != 3:
            self.refuse()
        a, b = (self.read(source, i.dtype) for source in i.operands[1:])
        value = COMPARE[i.modifiers[0]](a, b)
        if i.dtype.kind == "f" and i.modifiers[0] == "ne":
            value = value & (a == a) & (b == b)  # nan compares false; setp.neu, which does not, is unknown
        self.put(i.operands[0], value, mask)

    def do_selp(self, i, mask) -> None:
        a, b = (self.read(source, i.dtype) for source in i.operands[1:3])
        self.put(i.operands[0], np.where(self.read(i.operands[3], DTYPES["pred"]), a, b), mask)

    def do_mov(self, i, mask) -> None:
        target, source = i.operands
        bits = np.dtype(f"u{i.dtype.itemsize}")
        if isinstance(target, list):
            value = np.broadcast_to(self.read(source, bits), self.n)
            parts = np.ascontiguousarray(value).view(f"u{bits.itemsize // len(target)}").reshape(self.n, -1)
            for part, register in enumerate(target):
                self.put(register, parts[:, part], mask)
        elif isinstance(source, list):
            half = np.dtype(f"u{bits.itemsize // len(source)}")
            parts = [np.broadcast_to(self.read(part, half), self.n) for part in source]
            self.put(target, np.stack(parts, axis=1).view(bits)[:, 0], mask)
        else:
            self.put(target, self.read(source, i.dtype), mask)

    def do_cvt(self, i, mask) -> None:
        to, source = i.types
        values = [self.read_as(operand, source) for operand in i.operands[1:]]
        if to.endswith("16x2"):
            high, low = (arithmetic.round_to_16_bits(value, to[:-2]).astype(np.uint32) for value in values)
            value = high << np.uint32(16) | low
        elif to in ("bf16", "f16"):
            value = arithmetic.round_to_16_bits(values[0], to)
        elif source[0] == "f" and to[0] != "f":
            self.refuse()
        else:
            value = values[0].astype(DTYPES[to])
        self.put(i.operands[0], value, mask)

    def do_createpolicy(self, i, mask) -> None:
        self.put(i.operands[0], np.uint64(0), mask)

    # ----------------------------------------------------------------------------- warps

    def whole_warps(self, mask) -> np.ndarray:
        """Return the threads of the warps that take part, (warps, 32)."""
        warps = np.arange(self.n).reshape(-1, WARP)
        if mask is None:
            return warps
        taking_part = mask.reshape(-1, WARP)
        if (taking_part.any(axis=1) != taking_part.all(axis=1)).any():
            self.fault("not all threads of a warp reach a warp-wide instruction")
        return warps[taking_part.any(axis=1)]

    def put_in(self, target: Register, threads: np.ndarray, values: np.ndarray, mask) -> None:
        """Put values of some threads only."""
        everyone = np.zeros(self.n, values.dtype)
        everyone[threads] = values
        self.put(target, everyone, mask)

    def do_shfl(self, i, mask) -> None:
        target, source, by, clamp, members = i.operands
        if members.text != "-1" or clamp.text != "31":
            self.refuse()
        threads = self.whole_warps(mask)
        by = np.broadcast_to(self.read(by, DTYPES["u32"]), self.n)[threads]
        lane = (arithmetic.LANES ^ by if "bfly" in i.modifiers else by) & 31
        values = self.read(source, DTYPES["u32"])[threads]
        self.put_in(target, threads, np.take_along_axis(values, lane.astype(np.int64), axis=1), mask)

    def fragment(self, registers: list[Register], threads: np.ndarray, type: str) -> np.ndarray:
        """Return what warps hold of a matrix, float32 of (warps, 32, registers), 16-bit types (..., registers, 2)."""
        words = np.stack([self.read(register, DTYPES["u32"])[threads] for register in registers], axis=-1)
        return words.view(np.float32) if type == "f32" else arithmetic.widen(words[..., None].view(np.uint16), type)

    def do_mma(self, i, mask) -> None:
        d, a, b, c = i.types
        if d != "f32" or c != "f32" or "m16n8k16" not in i.modifiers:
            self.refuse()
        threads = self.whole_warps(mask)
        a, b, c = (self.fragment(o, threads, type) for o, type in zip(i.operands[1:], (a, b, c), strict=True))
        a, b = (np.ascontiguousarray(m[:, *at].swapaxes(0, 1)) for m, at in ((a, A_PLACE), (b, B_PLACE)))
        result = arithmetic.multiply_add(a, b, c[:, *C_PLACE])
        for n, target in enumerate(i.operands[0]):
            lanes = arithmetic.LANES
            self.put_in(target, threads, result[:, lanes // 4 + n // 2 * 8, lanes % 4 * 2 + n % 2], mask)

    def do_ldmatrix(self, i, mask) -> None:
        targets, address = i.operands
        threads = self.whole_warps(mask)
        givers = threads[:, : len(targets) * 8].ravel()  # of the addresses of rows of 16 bytes
        rows = self.load(self.shared, givers, self.in_shared(givers, address, 16), 2, 8)
        matrices = rows.reshape(-1, len(targets), 8, 8)
        matrices = matrices.swapaxes(2, 3) if "trans" in i.modifiers else matrices
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(targets), WARP)
        for n, target in enumerate(targets):
            self.put_in(target, threads, pairs[:, n], mask)

    def do_stmatrix(self, i, mask) -> None:
        address, sources = i.operands
        threads = self.whole_warps(mask)
        givers = threads[:, : len(sources) * 8].ravel()
        words = np.stack([self.read(source, DTYPES["u32"])[threads] for source in sources], axis=1)
        matrices = words.view(np.uint16).reshape(-1, len(sources), 8, 8)
        matrices = matrices.swapaxes(2, 3) if "trans" in i.modifiers else matrices
        self.store(self.shared, givers, self.in_shared(givers, address, 16), matrices.reshape(-1, 8))

    def do_bar(self, i, mask) -> None:
        if i.modifiers[0] == "warp":
            self.time[self.whole_warps(mask)] += 1
            return
        here = np.ones(self.n, np.bool_) if mask is None else mask
        programs = here.reshape(-1, self.kernel.threads)
        if (programs.any(axis=1) != programs.all(axis=1)).any():
            self.fault("not all threads reach a barrier")
        self.time[here] += BARRIER

    # ---------------------------------------------------------------------------- memory

    def chosen(self, mask) -> np.ndarray:
        return np.arange(self.n) if mask is None else np.flatnonzero(mask)

    def addresses(self, threads: np.ndarray, address: Address) -> np.ndarray:
        dtype = address.base.stored if type(address.base) is Register else DTYPES["u32"]
        return np.broadcast_to(self.read(address.base, dtype), self.n)[threads].astype(np.int64) + address.offset

    def cost(self, space: str, threads: np.ndarray, address: np.ndarray, size: int) -> None:
        if self.launch.counting and len(threads):
            count, group = (sectors, WARP) if space == "global" else (wavefronts, min(WARP, 128 // size))
            opcode = ".".join((self.at.head, *self.at.modifiers, *self.at.types))
            self.launch.costs[self.at.source, space, opcode] += count(threads // group, address, size)

    def in_shared(self, threads: np.ndarray, address: Address, size: int) -> np.ndarray:
        """Return the places in self.shared of accesses of `size` bytes; faults read or write the first bytes."""
        found = self.addresses(threads, address)
        self.cost("shared", threads, found, size)
        place = found - SHARED_BASE
        good = (place >= 0) & (place + size <= self.launch.shared_bytes)
        if not good.all():
            bad = place[~good][0]
            self.fault(f"byte {bad} of a program's {self.launch.shared_bytes} bytes of shared memory is accessed")
        if (found % size).any():
            self.fault("a misaligned access to shared memory")
        return np.where(good, place, 0) // size * size + self.slot[threads] * self.stride

    def in_tensors(self, threads: np.ndarray, address: Address, size: int):
        """Yield (tensor, which of the threads, places in it) for every tensor that is accessed."""
        found = self.addresses(threads, address)
        self.cost("global", threads, found, size)
        left = found % size == 0
        if not left.all():
            self.fault(f"a misaligned access of {size} bytes to global memory")
        for tensor in self.launch.tensors:
            which = np.flatnonzero(left & tensor.inside(found, size))
            if len(which):
                yield tensor, which, found[which] - tensor.start
                left[which] = False
                if not left.any():
                    return
        if left.any():
            self.fault(f"{left.sum()} threads access memory outside every tensor: {self.nearest(found[left][0])}")

    def nearest(self, address: int) -> str:
        distance, tensor = min(
            ((max(t.first - address, address - t.end), t) for t in self.launch.tensors), key=lambda pair: pair[0]
        )
        return f"byte {address - tensor.first} of one of {tensor.end - tensor.first}"

    def load(self, memory: Memory, threads: np.ndarray, place: np.ndarray, width: int, count: int) -> np.ndarray:
        """Return (threads, count) items of `width` bytes."""
        at = memory.granules(place, width * count)
        each, at = at.shape[1], at.ravel()
        thread, time = np.repeat(self.number[threads], each), np.repeat(self.time[threads], each)
        if memory is self.shared:
            if memory.in_flight[at].any():
                self.fault("shared memory is read that an asynchronous copy is still to fill")
            if (memory.history.writer[at] < 0).any():
                self.fault("shared memory is read that nobody wrote")
        self.report_race("read", memory, at, thread, memory.history.note_reads(at, thread, time))
        return memory.views[width][memory.items(place, width, count)]

    def note_writes(self, memory: Memory, threads: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
        """Record writes; return the granules."""
        at = memory.granules(place, size)
        each, at = at.shape[1], at.ravel()
        thread, time = np.repeat(self.number[threads], each), np.repeat(self.time[threads], each)
        if memory is self.shared and memory.in_flight[at].any():
            self.fault("shared memory is written that an asynchronous copy is still to fill")
        self.report_race("write", memory, at, thread, memory.history.note_writes(at, thread, time))
        return at

    def store(self, memory: Memory, threads: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
        """Write (threads, count) values. That several threads write the same value to one place is no fault."""
        width, count = values.dtype.itemsize, values.shape[1]
        self.note_writes(memory, threads, place, width * count)
        items = memory.items(place, width, count)
        memory.views[width][items] = values
        if (memory.views[width][items] != values).any():
            self.fault("several threads write different values to one place")

    def report_race(self, verb: str, memory: Memory, at: np.ndarray, thread: np.ndarray, bad: np.ndarray) -> None:
        if bad.any():
            space = "shared" if memory is self.shared else "global"
            self.fault(f"race in {space} memory at a {verb}")

    def do_ld(self, i, mask) -> None:
        targets = i.operands[0] if isinstance(i.operands[0], list) else [i.operands[0]]
        address, width, count = i.operands[1], i.dtype.itemsize, len(targets)
        if "param" in i.modifiers:
            value = np.asarray(self.launch.parameters[address.base]).view(i.dtype)
            return self.put(targets[0], value.astype(f"{i.dtype.kind}{targets[0].stored.itemsize}"), mask)
        threads = self.chosen(mask)
        values = np.zeros((self.n, count), f"u{width}")
        if "shared" in i.modifiers and len(threads):
            values[threads] = self.load(
                self.shared, threads, self.in_shared(threads, address, width * count), width, count
            )
        elif len(threads):
            for tensor, which, place in self.in_tensors(threads, address, width * count):
                values[threads[which]] = self.load(tensor, threads[which], place, width, count)
        for n, target in enumerate(targets):
            self.put(target, values[:, n].astype(target.stored), mask)

    def do_st(self, i, mask) -> None:
        address, sources = i.operands
        sources = sources if isinstance(sources, list) else [sources]
        bits, threads = np.dtype(f"u{i.dtype.itemsize}"), self.chosen(mask)
        values = np.stack([np.broadcast_to(self.read(source, bits), self.n)[threads] for source in sources], axis=1)
        if "shared" in i.modifiers and len(threads):
            self.store(self.shared, threads, self.in_shared(threads, address, i.width), values)
        elif len(threads):
            for tensor, which, place in self.in_tensors(threads, address, i.width):
                self.store(tensor, threads[which], place, values[which])

    def do_cp(self, i, mask) -> None:
        if "commit_group" in i.modifiers:
            self.group = self.group + (1 if mask is None else mask)
        elif "wait_group" in i.modifiers:
            pending = int(i.operands[0].text, 0)
            self.land(np.where(True if mask is None else mask, self.group - pending, 0))
        else:
            self.copy(i, self.chosen(mask))

    def copy(self, i: Instruction, threads: np.ndarray) -> None:
        """Start asynchronous copies. The bytes are read now and appear when their group is waited for."""
        target, source, _, *wanted = i.operands
        size = i.width
        bytes_read = np.broadcast_to(self.read(wanted[0], DTYPES["u32"]) if wanted else size, self.n)[threads]
        if not np.isin(bytes_read, (0, size)).all():
            self.refuse()
        place = self.in_shared(threads, target, size)
        data = np.zeros((len(threads), size), np.uint8)  # what is not read is zero
        reading = np.flatnonzero(bytes_read)
        if len(reading):
            for tensor, which, byte in self.in_tensors(threads[reading], source, size):
                data[reading[which]] = self.load(tensor, threads[reading[which]], byte, 1, size)
        if len(threads):
            self.shared.in_flight[self.note_writes(self.shared, threads, place, size)] = True
            self.shared.views[1][self.shared.items(place, 1, size)] = 0xFF
            self.copies.append((self.group[threads], threads, place, data))

    def land(self, before: np.ndarray) -> None:
        """Finish each thread's copies of groups before this one."""
        waiting = []
        for group, threads, place, data in self.copies:
            done = group < before[threads]
            if done.any():
                size = data.shape[1]
                self.shared.in_flight[self.shared.granules(place[done], size)] = False
                self.note_writes(self.shared, threads[done], place[done], size)
                self.shared.views[1][self.shared.items(place[done], 1, size)] = data[done]
            if not done.all():
                waiting.append((group[~done], threads[~done], place[~done], data[~done]))
        self.copies = waiting


# which lane, register and half hold an element of a 16 x 16 (k, m), a 16 x 8 (k, n) and a 16 x 8 (m, n) matrix
def _places():
    k, m = np.divmod(np.arange(256).reshape(16, 16), 16)
    row, column = np.divmod(np.arange(128).reshape(16, 8), 8)
    a = m % 8 * 4 + k % 8 // 2, m // 8 + k // 8 * 2, k % 2
    b = column * 4 + row % 8 // 2, row // 8, row % 2
    c = row % 8 * 4 + column // 2, row // 8 * 2 + column % 2
    return a, b, c


A_PLACE, B_PLACE, C_PLACE = _places()
