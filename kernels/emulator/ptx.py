"""
Read the PTX of a kernel as Triton writes it: one kernel per text, virtual registers, one kind of shared memory.

Source: NVIDIA, "Parallel Thread Execution ISA", https://docs.nvidia.com/cuda/parallel-thread-execution
"""

import dataclasses
import re

import numpy as np

DTYPES = {  # f32x2 is two elements of float32 per register; the 16-bit floats are widened after they are read
    "pred": np.dtype(np.bool_),
    "f32": np.dtype(np.float32),
    "f32x2": np.dtype(np.float32),
    **dict.fromkeys(("f16", "bf16"), np.dtype(np.uint16)),
    **dict.fromkeys(("f16x2", "bf16x2"), np.dtype(np.uint32)),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
}
REGISTERS = {"p": np.dtype(np.bool_), "rs": DTYPES["u16"], "r": DTYPES["u32"], "rd": DTYPES["u64"]}
SHARED_BASE = 1024  # address of a program's first byte of shared memory


@dataclasses.dataclass(slots=True, frozen=True)
class Register:
    name: str
    stored: np.dtype


@dataclasses.dataclass(slots=True, frozen=True)
class Special:
    """A read-only register such as %tid.x."""

    name: str


class Number:
    """A constant, converted once per dtype."""

    def __init__(self, text: str):
        self.text, self.converted = text, {}

    def as_dtype(self, dtype: np.dtype) -> np.generic:
        if dtype not in self.converted:
            bits = int(self.text[2:], 16) if self.text.startswith("0f") else int(self.text, 0)
            unsigned = np.dtype(f"u{dtype.itemsize}").type(bits % 2 ** (8 * dtype.itemsize))
            self.converted[dtype] = np.bool_(bits != 0) if dtype == np.bool_ else unsigned.view(dtype)
        return self.converted[dtype]


@dataclasses.dataclass(slots=True, frozen=True)
class Address:
    """[base + offset]; the base is a register, a number or the name of a parameter."""

    base: object
    offset: int


@dataclasses.dataclass(slots=True)
class Instruction:
    head: str  # of ld.global.v4.b32: ld
    modifiers: tuple[str, ...]  # global, v4
    types: tuple[str, ...]  # b32
    operands: list
    predicate: tuple[Register, bool] | None  # the register, and whether it is negated
    line: int  # of the PTX
    source: str  # file:line of the kernel
    text: str
    run: object = None  # what executes it

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.types[0]]

    @property
    def width(self) -> int:
        """Return the bytes per thread that an access to memory moves."""
        if self.head == "cp":
            return int(self.operands[2].text, 0)
        vector = {"v2": 2, "v4": 4}
        return 16 if "matrix" in self.head else self.dtype.itemsize * max(vector.get(m, 1) for m in self.modifiers)

    @property
    def place(self) -> str:
        return f"PTX line {self.line}, {self.source}: {self.text}"


@dataclasses.dataclass
class Kernel:
    blocks: list[list[Instruction]]  # each ends in a branch or before a label
    labels: dict[str, int]  # label -> block
    parameters: list[str]
    threads: int  # per program

    def granule(self, space: str) -> int:
        """Return the bytes of the narrowest access to "shared" or "global" memory, 16 at most."""
        instructions = (i for block in self.blocks for i in block if space in i.modifiers and i.head != "fence")
        return min([16, *(i.width for i in instructions)])


def operand(text: str) -> object:
    text = text.strip()
    if text.startswith("{"):
        return [operand(part) for part in text[1:-1].split(",")]
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(operand(base), int(offset or "0", 0))
    if register := re.fullmatch(r"%(p|rs|r|rd)\d+", text):
        return Register(text, REGISTERS[register[1]])
    if text.startswith("%"):
        return Special(text)
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}|-?0x[0-9a-fA-F]+|-?\d+", text):
        return Number(text)
    if text == "_":  # a half of a register that nobody wants
        return None
    return Number(str(SHARED_BASE)) if text == "global_smem" else text


def parse(text: str) -> Kernel:
    """Return the kernel of this PTX."""
    threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", text)[1])
    parameters = re.findall(r"\.param \.\S+ .*?(\w+_param_\d+)", text)
    blocks, labels, source = [[]], {}, ""
    for number, row in enumerate(text.splitlines(), 1):
        code, _, comment = (part.strip() for part in row.partition("//"))
        if code.startswith(".loc") and comment:
            source = ":".join(comment.split()[0].split(":")[:2])
        elif label := re.fullmatch(r"(\$L__BB\w+):", code):
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif match := re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);", code):
            negated, predicate, opcode, rest = match.groups()
            operands = [operand(part) for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest)]
            head, *parts = re.split(r"\.|::", opcode)
            modifiers, types = (tuple(p for p in parts if (p in DTYPES) == typed) for typed in (False, True))
            guard = (Register(predicate, REGISTERS["p"]), bool(negated)) if predicate else None
            blocks[-1].append(Instruction(head, modifiers, types, operands, guard, number, source, code))
            if head in ("bra", "ret"):
                blocks.append([])
    return Kernel(blocks, labels, parameters, threads)
