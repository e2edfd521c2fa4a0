"""
The one rule of accuracy for every kernel, and what the kernel tests share.

Against the reference in float64, a result may be at most twice as wrong as PyTorch's own operation in the same dtype,
plus one rounding step of that dtype. The error is relative, ||result - exact|| / ||exact||. A single number can be
right by luck: there, PyTorch's error counts as at least half a step.
"""

import contextlib
import ctypes
import math
import mmap
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="there kernels are compiled, and take no tensor of the CPU")
plain_memory = pytest.mark.skipif(
    DEVICE == "cuda" or sys.platform != "linux", reason="plays with the memory map of the process, on Linux, on a CPU"
)


def error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||, or ||result|| where the exact answer is zero throughout."""
    size = exact.double().norm().item()
    return (result.double() - exact.double()).norm().item() / (size or 1.0)


def check(name: str, result: Tensor, pytorch: Tensor, exact: Tensor) -> None:
    """Fail unless `result` is finite, shaped like `exact`, and as right as the rule above asks."""
    assert result.shape == exact.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    assert result.isfinite().all(), f"{name}: {(~result.isfinite()).sum().item()} numbers are not finite"
    step = torch.finfo(result.dtype).eps
    limit = 2 * max(error(pytorch, exact), step / 2 if result.numel() == 1 else 0.0) + step
    assert error(result, exact) <= limit, f"{name}: relative error {error(result, exact):.2e}, allowed {limit:.2e}"


def results(function, tensors: dict[str, Tensor], upstream: tuple[Tensor, ...], **options) -> dict[str, Tensor]:
    """
    The outputs of function(**tensors, **options), and the gradient of each tensor that requires one.

    upstream: the gradient of each output that takes part in the backward
    """
    tensors = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    outputs = function(**tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = {f"d{name}": tensor for name, tensor in tensors.items() if tensor.requires_grad}
    used = outputs[: len(upstream)]
    upstream = [gradient.to(output.dtype) for gradient, output in zip(upstream, used, strict=True)]
    grads = torch.autograd.grad(used, list(leaves.values()), upstream)
    return {f"output {i}": output.detach() for i, output in enumerate(outputs)} | dict(zip(leaves, grads, strict=True))


def in_float64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as float64 leaves."""
    convert = {name: t.detach().double() if t.is_floating_point() else t for name, t in tensors.items()}
    return {name: t.requires_grad_(tensors[name].requires_grad) for name, t in convert.items()}


def check_all(kernel, pytorch, reference, tensors, upstream, **options) -> None:
    """check() for every output and every gradient of three versions of one operation."""
    ours = results(kernel, tensors, upstream, **options)
    theirs = results(pytorch, tensors, upstream, **options)
    exact = results(reference, in_float64(tensors), upstream, **options)
    for name in exact:
        check(name, ours[name], theirs[name], exact[name])


@contextlib.contextmanager
def new_memory_is_nan():
    """Within, torch.empty() and its kin give nan: what a kernel forgets to write, or reads too early, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def approximations_of_a_gpu():
    """
    Within, the interpreter divides and takes exp2 in float32 as wrongly as a GPU may, and its fma rounds once.

    Both instructions, div.full and ex2.approx, err by up to two units in the last place: here by two, up or down,
    except that x / 1 = x and exp2(0) = 1.
    Source: https://docs.nvidia.com/cuda/parallel-thread-execution, "div" and "ex2"
    """

    def two_units_off(function, right_at):
        def approximate(self, *operands):
            numbers = [operand.data for operand in operands]
            exact = function(*numbers)
            bits = exact.view(np.int32)
            units = np.where(bits.astype(np.uint32) * np.uint32(0x9E3779B1) >> 31, np.int32(2), np.int32(-2))
            right = ~np.isfinite(exact) | (exact == 0) | (numbers[-1] == right_at)
            return TensorHandle(np.where(right, bits, bits + units).view(np.float32), operands[0].dtype.scalar)

        return approximate

    def fma(self, x, y, z):
        return TensorHandle((np.float64(x.data) * y.data + z.data).astype(x.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fdiv", two_units_off(np.divide, right_at=1))
        patch.setattr(InterpreterBuilder, "create_exp2", two_units_off(np.exp2, right_at=0))
        patch.setattr(InterpreterBuilder, "create_fma", fma)
        yield


def far_rows(rows: int, stride: int, cols: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """`rows` rows of `cols` zeros, `stride` elements apart in memory that is mapped but, between them, not there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on
    mapping = mmap.mmap(-1, rows * stride * dtype.itemsize, flags=flags)
    return [torch.frombuffer(mapping, dtype=dtype, count=cols, offset=i * stride * dtype.itemsize) for i in range(rows)]


def before_a_wall(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor behind whose last byte memory ends: to read one number more crashes."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    mapping = mmap.mmap(-1, (math.ceil(size / page) + 1) * page)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + len(mapping) - page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), page, 0) == 0
    offset = len(mapping) - page - size
    copy = torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)
