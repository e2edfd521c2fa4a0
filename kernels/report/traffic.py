"""
Launch parameters of the kernels, and the bytes and FLOPs of each launch, counted without a GPU.

    python -m kernels.report.traffic < work.json       in a process with TRITON_INTERPRET=1; prints report() as JSON

Launches: every operation runs as in training, forward and backward under bfloat16 autocast, at the full shape, with the
launch parameters of each GPU (kernels.common.emulate_gpu). Torch functions return uninitialized memory, and a kernel is
recorded instead of run: the types and alignment of its arguments, its constants, warps and grid. So this file
repeats nothing that the operators know.

Traffic: the same operations run for real, at a few rows, in Triton's interpreter, whose loads, stores and dots are
observed. Per kernel, in bytes: `loaded` and `stored` as issued, masked lanes excluded; `unique_bytes`, each distinct
byte counted once for reading and once for writing; `compulsory_bytes`, the same without partial sums (pointers named
*_parts_ptr), which the algorithm needs, not the operation. `flops` are those of tl.dot; `arithmetic` is every
other float operation, once per lane, masked lanes included. Loops over a row run at the real length.

Scaling: a kernel's figures are exactly a * units + b * programs + c * launches: what it does per row (in attention, per
head of a sequence, at the real T and D), per program and per launch. Small runs give a, b and c; the known grid at the
full shape gives the rest. (Only arithmetic, which counts masked lanes, is inexact if rows do not fill the last tile.)
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import triton.language as tl
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps

import kernels
from kernels.common import emulate_gpu
from kernels.report.shapes import Shape, arguments, calls_per_step, forward_and_backward

ROWS = (16, 24, 42)  # of the small runs: not proportional to programs, some of which take up to 16 rows
LONG_ROWS = (2, 3, 5)  # of the small runs of cross-entropy, whose programs take one row of V elements
HEADS = (1, 2)  # of the small runs of attention
FIGURES = ("loaded", "stored", "unique_bytes", "compulsory_bytes", "flops", "arithmetic", "atomics")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


@dataclasses.dataclass
class Launch:
    """One launch of a kernel: everything that compiling it needs, and the grid."""

    module: str
    kernel: str
    arguments: dict  # name -> ["*bf16", aligned to 16 bytes], an int, a float, or None
    constants: dict  # name -> value, of tl.constexpr parameters
    options: dict  # num_warps and num_stages, if given
    programs: int


# --------------------------------------------------------------------------- launches


class Uninitialized(TorchDispatchMode):
    """Replace every op by an uninitialized output of the right shape and dtype, so full-size launches are free."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # our operators run, and so do composite functions: what they call comes back to this method
            if func.namespace == "gpt2":
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        written = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        if written:
            return kwargs[written[0].name] if written[0].kwarg_only else args[0]
        if any(result.alias_info for result in func._schema.returns) or "empty" in func.__name__:
            return func(*args, **kwargs)  # views, and memory that is uninitialized already
        args, kwargs = tree_map_only(torch.Tensor, functools.partial(uninitialized, device="meta"), (args, kwargs))
        kwargs |= {"device": torch.device("meta")} if "device" in kwargs else {}
        return tree_map_only(torch.Tensor, functools.partial(uninitialized, device="cpu"), func(*args, **kwargs))


def uninitialized(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


@contextlib.contextmanager
def replaced(cls: type, **methods):
    """Replace methods of a class; each new one receives the original after self."""
    originals = {name: getattr(cls, name) for name in methods}
    for name, method in methods.items():
        setattr(cls, name, functools.partialmethod(method, originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(cls, name, original)


def named_arguments(kernel: InterpretedFunction, args: tuple, keywords: dict) -> dict:
    """Return the arguments of a launch by their names in the kernel's definition, without num_warps and the like."""
    signature = inspect.signature(kernel.fn)
    return signature.bind(*args, **{k: v for k, v in keywords.items() if k in signature.parameters}).arguments


def describe(kernel: InterpretedFunction, args: tuple, grid: tuple, keywords: dict) -> Launch:
    """Describe a launch so that another process can compile it."""
    parameters, described, constants = inspect.signature(kernel.fn).parameters, {}, {}
    for name, value in named_arguments(kernel, args, keywords).items():
        if parameters[name].annotation is tl.constexpr:
            constants[name] = value
        else:
            pointer = isinstance(value, torch.Tensor)
            described[name] = [POINTERS[value.dtype], value.data_ptr() % 16 == 0] if pointer else value
    options = {name: value for name, value in keywords.items() if name not in parameters}
    return Launch(kernel.fn.__module__, kernel.fn.__name__, described, constants, options, math.prod(grid))


def record_launches(operation: str, shape: Shape) -> list[Launch]:
    """Return every launch of one operation at this shape, in order, without running any."""
    launches = []

    def record(kernel, original, *args, grid, warmup, **keywords):
        launches.append(describe(kernel, args, grid, keywords))

    with Uninitialized(), replaced(InterpretedFunction, run=record):
        run_operation(operation, shape)
    return launches


def run_operation(operation: str, shape: Shape) -> None:
    function = getattr(kernels.select("all"), operation)
    autocast = torch.autocast("cpu", torch.bfloat16)
    forward_and_backward(function, *arguments(operation, shape, torch.bfloat16, "cpu"), autocast)


# --------------------------------------------------------------------------- traffic


class Count:
    """The traffic of one launch. Each tensor argument has two maps: elements read, elements written."""

    def __init__(self, arguments: dict):
        self.figures = dict.fromkeys(FIGURES, 0)
        self.sites = {}  # line of the kernel file -> the most bytes that one access in it spans
        self.tensors = []
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                items = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
                maps = (np.zeros(items, dtype=bool), np.zeros(items, dtype=bool))
                self.tensors.append((name, tensor.data_ptr(), tensor.element_size(), maps))

    def access(self, pointers, mask, stored: bool) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        line = line_of_kernel()
        self.sites[line] = max(self.sites.get(line, 0), pointers.data.size * size)
        reached = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if reached.size == 0:
            return
        self.figures["stored" if stored else "loaded"] += reached.size * size
        for _, start, item, maps in self.tensors:
            if start <= reached[0] < start + item * len(maps[0]):
                maps[stored][(reached - start) // item] = True
                return
        raise LookupError(f"line {line} reads or writes outside every argument")

    def totals(self) -> dict[str, int]:
        for name, _, item, maps in self.tensors:
            size = item * sum(int(used.sum()) for used in maps)
            self.figures["unique_bytes"] += size
            self.figures["compulsory_bytes"] += 0 if "_parts" in name else size
        return self.figures


def line_of_kernel() -> int:
    """Return the line of the kernel file that makes the running access."""
    frame = sys._getframe(1)
    while Path(frame.f_code.co_filename).stem not in kernels.FAMILIES:
        frame = frame.f_back
    return frame.f_lineno


@contextlib.contextmanager
def observing(counts: list[Count]):
    """Add the interpreter's operations to the last count."""

    def load(builder, original, pointers, mask, *rest):
        counts[-1].access(pointers, mask, stored=False)
        return original(builder, pointers, mask, *rest)

    def store(builder, original, pointers, value, mask, *rest):
        counts[-1].access(pointers, mask, stored=True)
        return original(builder, pointers, value, mask, *rest)

    def dot(builder, original, a, b, *rest):
        counts[-1].figures["flops"] += 2 * a.data.size * b.data.shape[-1]
        return original(builder, a, b, *rest)

    def arithmetic(builder, original, *operands):
        result = original(builder, *operands)
        counts[-1].figures["arithmetic"] += result.data.size if result.data.dtype.kind == "f" else 0
        return result

    def reduction(reduce, original, tensors):
        counts[-1].figures["arithmetic"] += tensors[0].handle.data.size
        return original(reduce, tensors)

    def atomic(builder, original, *rest):
        counts[-1].figures["atomics"] += 1
        return original(builder, *rest)

    observed = {"create_masked_load": load, "create_masked_store": store, "create_dot": dot}
    observed |= {"create_atomic_rmw": atomic, "create_atomic_cas": atomic}
    observed |= {"binary_op": arithmetic, "unary_op": arithmetic, "create_fma": arithmetic}
    with replaced(InterpreterBuilder, **observed), replaced(ReduceOps, apply_impl=reduction):
        yield


def measure(operation: str, shape: Shape) -> dict[str, dict]:
    """Run one operation in the interpreter. Return, by kernel: programs, launches, sites, and FIGURES."""
    found, counts = {}, []

    def run(kernel, original, *args, grid, warmup, **keywords):
        launch = describe(kernel, args, grid, keywords)
        counts.append(Count(named_arguments(kernel, args, keywords)))
        original(kernel, *args, grid=grid, warmup=warmup, **keywords)
        none = {"programs": 0, "launches": 0, "sites": {}} | dict.fromkeys(FIGURES, 0)
        total = found.setdefault(launch.kernel, none)
        total["programs"] += launch.programs
        total["launches"] += 1
        total["sites"] |= counts[-1].sites
        for name, value in counts[-1].totals().items():
            total[name] += value

    with replaced(InterpretedFunction, run=run), observing(counts), np.errstate(all="ignore"):
        run_operation(operation, shape)  # bfloat16 dots are wrong in the interpreter, but are counted right
    return found


# --------------------------------------------------------------------------- scaling


def units(operation: str, shape: Shape) -> int:
    return shape.B * shape.H if operation == "causal_attention" else shape.N


def small_shapes(operation: str, shape: Shape) -> list[Shape]:
    """Return the shapes to run: the real T, D, C and V, and few rows or heads."""
    if operation == "causal_attention":
        return [dataclasses.replace(shape, B=1, H=heads, C=heads * (shape.C // shape.H)) for heads in HEADS]
    if operation == "linear_cross_entropy":  # C belongs to its matrix products, which are PyTorch's
        shape = dataclasses.replace(shape, C=16, H=1)
    rows = LONG_ROWS if operation.endswith("cross_entropy") else ROWS
    return [dataclasses.replace(shape, B=1, T=T) for T in rows]


def small_runs(operation: str, shape: Shape) -> list[tuple[int, dict]]:
    """Return the units and the measured traffic of every small run."""
    return [(units(operation, small), measure(operation, small)) for small in small_shapes(operation, shape)]


def scaled(operation: str, shape: Shape, launches: list[Launch], runs: list[tuple[int, dict]]) -> dict[str, dict]:
    """Return, by kernel, FIGURES at this shape and the sites, scaled from the small runs."""
    result = {}
    for kernel in runs[0][1]:
        own = [launch for launch in launches if launch.kernel == kernel]
        full = [units(operation, shape), sum(launch.programs for launch in own), len(own)]
        small = np.array([[n, run[kernel]["programs"], run[kernel]["launches"]] for n, run in runs], dtype=np.float64)
        counted = np.array([[run[kernel][name] for name in FIGURES] for _, run in runs], dtype=np.float64)
        coefficients = np.linalg.lstsq(small, counted, rcond=None)[0]
        if not np.allclose(small @ coefficients, counted, rtol=1e-9, atol=1e-3):
            raise ArithmeticError(f"{operation}: the traffic of {kernel} is not linear in rows, programs and launches")
        predicted = [round(float(value)) for value in np.array(full) @ coefficients]
        result[kernel] = dict(zip(FIGURES, predicted, strict=True)) | {"sites": runs[0][1][kernel]["sites"]}
    return result


def report(shape: Shape, architectures: list[str]) -> dict[str, list[dict]]:
    """Return, by GPU, each kernel: name, calls per step, first launch, launches per call, FIGURES, sites."""
    result, done = {}, {}  # done: small runs, shared by GPUs with equal launches
    for architecture in architectures:
        rows = result[architecture] = []
        for operation, calls in calls_per_step(shape).items():
            with emulate_gpu(architecture):
                launches = record_launches(operation, shape)
                alike = json.dumps([operation, [[each.kernel, each.constants] for each in launches]])
                if alike not in done:
                    done[alike] = small_runs(operation, shape)
            for kernel, figures in scaled(operation, shape, launches, done[alike]).items():
                own = [launch for launch in launches if launch.kernel == kernel]
                name = f"{operation}.{kernel.strip('_').removesuffix('_kernel')}"
                row = {"name": name, "operation": operation, "calls": calls, "launches": len(own)}
                rows.append(row | {"launch": dataclasses.asdict(own[0])} | figures)
    return result


if __name__ == "__main__":
    work = json.load(sys.stdin)
    print(json.dumps(report(Shape(**work["shape"]), work["architectures"])))
