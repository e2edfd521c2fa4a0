"""Instructions on a thread's own registers: arithmetic, comparisons, conversions, moves."""

import functools

import numpy as np

from kernels.emulator import arithmetic
from kernels.emulator.ptx import DTYPES, Instruction
from kernels.emulator.threads import Threads

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


def elementwise(t: Threads, i: Instruction, mask) -> None:
    types = [*i.types[1:], *i.types[:1] * 3]  # add.f32.bf16: the first operand is bf16
    sources = [t.read_as(source, type) for source, type in zip(i.operands[1:], types, strict=False)]
    if "wide" in i.modifiers or "hi" in i.modifiers:
        sources = [source.astype(f"{source.dtype.kind}{2 * source.dtype.itemsize}") for source in sources]
    flush = arithmetic.flush if "ftz" in i.modifiers else lambda x: x
    if "f16" in i.types[0]:
        value = arithmetic.fma_16_bits(i.types[0].removesuffix("x2"), *AS_FMA[i.head](*sources))
    elif i.head in APPROXIMATE:
        value = APPROXIMATE[i.head](*map(np.atleast_1d, sources), t.launch.errors)
    else:
        value = flush(ELEMENTWISE[i.head](*map(flush, sources)))
        if "hi" in i.modifiers:
            value = (value >> value.dtype.type(8 * i.dtype.itemsize)).astype(i.dtype)
    t.put(i.operands[0], value, mask)


def mad(t: Threads, i: Instruction, mask) -> None:
    a, b = (t.read(source, i.dtype) for source in i.operands[1:3])
    wide = np.dtype(f"{i.dtype.kind}{i.dtype.itemsize * (2 if 'wide' in i.modifiers else 1)}")
    t.put(i.operands[0], a.astype(wide) * b.astype(wide) + t.read(i.operands[3], wide), mask)


def shift(t: Threads, i: Instruction, mask) -> None:
    """Shift left or right; by the width or more, all bits go."""
    bits, by = i.dtype.itemsize * 8, t.read(i.operands[2], DTYPES["u32"])
    function = np.left_shift if i.head == "shl" else np.right_shift
    value = function(t.read(i.operands[1], i.dtype), np.minimum(by, bits - 1).astype(i.dtype))
    t.put(i.operands[0], np.where(by >= bits if i.dtype.kind == "u" else False, i.dtype.type(0), value), mask)


def bfe(t: Threads, i: Instruction, mask) -> None:
    bits, x = i.dtype.itemsize * 8, t.read(i.operands[1], i.dtype)
    start, length = (t.read(each, DTYPES["u32"]).astype(i.dtype) for each in i.operands[2:])
    t.put(i.operands[0], x << (bits - start - length) >> (bits - length), mask)


def setp(t: Threads, i: Instruction, mask) -> None:
    if len(i.operands) != 3:
        t.refuse()
    a, b = (t.read(source, i.dtype) for source in i.operands[1:])
    value = COMPARE[i.modifiers[0]](a, b)
    if i.dtype.kind == "f" and i.modifiers[0] == "ne":
        value = value & (a == a) & (b == b)  # nan compares false; setp.neu, which does not, is unknown
    t.put(i.operands[0], value, mask)


def selp(t: Threads, i: Instruction, mask) -> None:
    a, b = (t.read(source, i.dtype) for source in i.operands[1:3])
    t.put(i.operands[0], np.where(t.read(i.operands[3], DTYPES["pred"]), a, b), mask)


def mov(t: Threads, i: Instruction, mask) -> None:
    target, source = i.operands
    if isinstance(target, list):
        value = np.ascontiguousarray(np.broadcast_to(t.read(source, i.dtype), t.n))
        parts = value.view(f"u{i.dtype.itemsize // len(target)}").reshape(t.n, -1)
        for register, part in zip(target, parts.T, strict=True):
            t.put(register, part, mask)
    elif isinstance(source, list):
        half = np.dtype(f"u{i.dtype.itemsize // len(source)}")
        parts = [np.broadcast_to(t.read(part, half), t.n) for part in source]
        t.put(target, np.stack(parts, axis=1).view(i.dtype)[:, 0], mask)
    else:
        t.put(target, t.read(source, i.dtype), mask)


def cvt(t: Threads, i: Instruction, mask) -> None:
    to, source = i.types
    values = [t.read_as(operand, source) for operand in i.operands[1:]]
    if to.endswith("16x2"):
        high, low = (arithmetic.round_to_16_bits(value, to[:-2]).astype(np.uint32) for value in values)
        value = high << np.uint32(16) | low
    elif to in ("bf16", "f16"):
        value = arithmetic.round_to_16_bits(values[0], to)
    elif "f" in source and "f" not in to:
        t.refuse()
    else:
        value = values[0].astype(DTYPES[to])
    t.put(i.operands[0], value, mask)


def prmt(t: Threads, i: Instruction, mask) -> None:
    """Pick four of the eight bytes of two words; a selector's fourth bit asks for the byte's sign instead."""
    a, b, selectors = (np.broadcast_to(t.read(source, DTYPES["u32"]), t.n) for source in i.operands[1:])
    selectors = selectors[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    pool = np.stack([a, b], axis=1).view(np.uint8)
    chosen = np.take_along_axis(pool, (selectors & 7).astype(np.int64), axis=1)
    signs = np.where(chosen >= 128, np.uint8(255), np.uint8(0))
    t.put(i.operands[0], np.where(selectors >= 8, signs, chosen).view(np.uint32)[:, 0], mask)


def createpolicy(t: Threads, i: Instruction, mask) -> None:
    t.put(i.operands[0], np.uint64(0), mask)


INSTRUCTIONS = {  # head -> what executes it, and the modifiers that it may have
    **dict.fromkeys(("and", "or", "xor", "not", "neg", "abs", "max", "min"), (elementwise, ())),
    **dict.fromkeys(("add", "sub", "fma"), (elementwise, ("rn", "ftz"))),
    **dict.fromkeys(("ex2", "rsqrt"), (elementwise, ("approx", "ftz"))),
    "mul": (elementwise, ("lo", "hi", "wide", "rn", "ftz")),
    "div": (elementwise, ("full",)),
    "mad": (mad, ("lo", "wide")),
    **dict.fromkeys(("shl", "shr"), (shift, ())),
    "bfe": (bfe, ()),
    "prmt": (prmt, ()),
    "setp": (setp, tuple(COMPARE)),
    "selp": (selp, ()),
    "mov": (mov, ()),
    "cvt": (cvt, ("rn",)),
    "createpolicy": (createpolicy, ("fractional", "L2", "evict_last", "evict_first")),
}
