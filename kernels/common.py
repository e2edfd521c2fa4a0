"""Shared by the four kernel files: Triton or a stand-in, launch parameters per GPU, checks of tensors."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch.autograd import forward_ad

from kernels import machine


class _Missing:
    """Stand in for triton and tl while kernel files are imported: every attribute and every call is itself."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # no Triton wheel for macOS and Windows: kernels cannot run, PyTorch does the work
    triton = tl = _Missing()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what every kernel reads and writes
Row = TypeVar("Row")
_missing_for_triton = functools.cache(machine.missing_for_triton)  # asked at every launch
_emulated_gpu = contextvars.ContextVar("emulate_gpu", default="sm_80")


# ------------------------------------------------------------------------------ devices


def unavailable(device: torch.device) -> str:
    """Return why Triton kernels cannot run on tensors of this device, or "" if they can."""
    if isinstance(triton, _Missing):
        return "the package triton is not installed"
    if triton.knobs.runtime.interpret:
        return ""
    if device.type == "cuda":
        return _missing_for_triton()
    return f"they need a GPU and this run is on {device.type}"


def device_guard(x: torch.Tensor) -> torch.accelerator.device_index:
    """
    Return a context that makes the GPU of x the current one, on which Triton launches. No effect on a CPU.

    Raise ValueError if Triton cannot run on it: every launch happens inside this context.
    """
    if reason := unavailable(x.device):
        raise ValueError(f"Triton kernels cannot run on this tensor: {reason}; set TRITON_INTERPRET=1 to use a CPU")
    return torch.accelerator.device_index(x.device.index)


def architecture(x: torch.Tensor) -> str:
    """
    Return the GPU whose launch parameters suit this tensor: "sm_80", "sm_90", "gfx942" and so on.

    That is the GPU of the tensor; on a CPU, an A100 or the GPU that a surrounding emulate_gpu() names.
    """
    return _architecture_of_gpu(x.device.index) if x.device.type == "cuda" else _emulated_gpu.get()


@functools.cache
def _architecture_of_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
    return f"sm_{properties.major}{properties.minor}"


@contextlib.contextmanager
def emulate_gpu(name: str) -> Iterator[None]:
    """Interpret kernels on a CPU with the launch parameters of this GPU: for kernels.report and the tests."""
    before = _emulated_gpu.set(name)
    try:
        yield
    finally:
        _emulated_gpu.reset(before)


def for_architecture(table: dict[str, Row], name: str) -> Row:
    """Return the row of this GPU, else of the newest older NVIDIA GPU (sm_121: that of sm_120), else the first row."""
    first, *_ = table.values()
    if name in table or not name.startswith("sm_"):
        return table.get(name, first)
    older = [row for other, row in table.items() if other.startswith("sm_") and int(other[3:]) < int(name[3:])]
    return older[-1] if older else first


# ------------------------------------------------------------------------------ tensors


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of the next matrix product: autocast's if it is enabled, else that of x."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def check_tensors(**tensors: torch.Tensor) -> None:
    """
    Raise ValueError unless all tensors are float32, float16 or bfloat16 and are on one device.

    Raise RuntimeError in forward-mode differentiation, for which custom_op has no rule: tangents would get lost.
    """
    refuse_tangents(*tensors.values())
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: the kernels take float32, float16 or bfloat16")
        if tensor.device != tensors[first].device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {tensors[first].device}: move them together")


def refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError in forward-mode differentiation. A backward asks too: its gradients may have tangents."""
    if has_tangent(*tensors):
        raise RuntimeError("the Triton operators have no forward-mode derivative: use --kernels none for that")


def has_tangent(*tensors: torch.Tensor | None) -> bool:
    """Return whether a derivative with respect to one of the tensors is being computed in forward mode."""
    within = forward_ad._current_level >= 0  # else, as in training, no tensor needs a look
    return within and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class _WithGradientFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bias, x):
        ctx.dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx.flatten(0, -2).sum(0).to(ctx.dtype), dx


def with_gradient_for(bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x (..., C), to which bias (C,) was added, detached; the gradient of x will also give that of bias."""
    if has_tangent(bias, x):
        return x + (bias - bias.detach())
    return _WithGradientFor.apply(bias, x)


def forbid_double_backward(operator: torch.library.CustomOpDef) -> None:
    """Make differentiating this operator, itself a gradient, raise a RuntimeError."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{operator._qualname} has no second derivative: use --kernels none for that")

    operator.register_autograd(refuse)
