"""
The switchboard: six operations of a GPT, each in a Triton and in a PyTorch version, chosen by family.

    ops = select("layernorm,attention", torch.device("cuda"))     # the other families stay with PyTorch
    y = ops.layer_norm(x, weight, bias, 1e-5)

B sequences, T tokens, C channels, N = B * T rows, V vocabulary (weight and logits may hold more, padded, columns):

    layer_norm(x, weight, bias, eps)                        x (..., C)              -> y (..., C)
    add_layer_norm(x, residual, weight, bias, eps)          x, residual (..., C)    -> y, residual + x
    linear_gelu(x, weight, bias)                            x (..., C), (4C, C)     -> gelu_tanh(x @ weight.T + bias)
    causal_attention(qkv, n_head, dropout_p)                qkv (B, T, 3C) packed   -> y (B, T, C)
    cross_entropy(logits, targets, vocab_size)              logits (N, >= V), (N,)  -> scalar mean loss, nats per token
    linear_cross_entropy(x, weight, targets, vocab_size)    x (N, C), (>= V, C)     -> the same, without logits

The model receives the bundle and never asks what is in it.
"""

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # macOS and Windows have no Triton wheel: there the kernels are text, PyTorch does the work

    class _Missing:
        """Stands for triton and tl while kernel files are imported: every attribute and every call is itself."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = _Missing()

FAMILIES = {  # name on the command line, which is also the file -> its operations
    "layernorm": ("layer_norm", "add_layer_norm"),
    "gelu": ("linear_gelu",),
    "attention": ("causal_attention",),
    "cross_entropy": ("cross_entropy", "linear_cross_entropy"),
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what every kernel reads and writes
VOCAB_MULTIPLE = 128  # columns of the logits are padded to it: tensor cores and 128-bit loads want even shapes


@dataclass(frozen=True)
class Ops:
    """The six operations as plain functions; select() fills it."""

    layer_norm: Callable
    add_layer_norm: Callable
    linear_gelu: Callable
    causal_attention: Callable
    cross_entropy: Callable
    linear_cross_entropy: Callable


def available(device: torch.device) -> tuple[bool, str]:
    """Whether Triton kernels can run on tensors of this device, and in words why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if device.type == "cuda" or triton.knobs.runtime.interpret:
        return True, ""
    return False, f"they need a GPU and this run is on {device.type}"


def families(names: str) -> tuple[str, ...]:
    """The families that "all", "none" or a comma-separated list means. ValueError for a name that does not exist."""
    if names in ("all", "none"):
        return tuple(FAMILIES) if names == "all" else ()
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown or not chosen:
        raise ValueError(f"--kernels {names!r}: use all, none, or a comma-separated list of {', '.join(FAMILIES)}")
    return tuple(name for name in FAMILIES if name in chosen)


def select(names: str, device: torch.device | str = "cpu", dropout: float = 0.0) -> Ops:
    """
    The operations with the named families in Triton and the others in PyTorch.

    names:   "all", "none" or a comma-separated list of FAMILIES; "auto": all on a GPU, none elsewhere
    device:  where the tensors will live
    dropout: of attention; above 0, auto leaves attention to PyTorch, since the Triton version has none
    Raises ValueError for an unknown family, or where Triton cannot run on that device.
    """
    runs, why_not = available(torch.device(device))
    if names == "auto":
        names = "all" if runs and torch.device(device).type == "cuda" else "none"
        chosen = tuple(name for name in families(names) if name != "attention" or not dropout)
    else:
        chosen = families(names)
    if chosen and not runs:
        raise ValueError(
            f"--kernels {names} asks for Triton kernels, but {why_not}: "
            "use --kernels none to train, or set TRITON_INTERPRET=1 to study the kernels on a CPU"
        )
    operations = {}
    for family, functions in FAMILIES.items():
        module = importlib.import_module(f"kernels.{family}")
        for name in functions:
            operations[name] = getattr(module, name if family in chosen else f"{name}_torch")
    return Ops(**operations)


# ------------------------------------------------- shared by the kernel files


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that the next matrix product wants: that of autocast where it is on, else that of x."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def device_guard(x: torch.Tensor) -> torch.accelerator.device_index:
    """Where Triton must launch: on the GPU that holds x, which need not be the current one. No effect on a CPU."""
    return torch.accelerator.device_index(x.device.index)


Row = TypeVar("Row")
_emulated_gpu = contextvars.ContextVar("emulate_gpu", default="sm_80")


def architecture(x: torch.Tensor) -> str:
    """
    The GPU whose launch parameters suit this tensor: "sm_80", "sm_90", "gfx942" and so on.

    A GPU answers for itself, and nothing can make it answer otherwise. On a CPU kernels are only interpreted, with the
    parameters of an A100, or of the GPU that a surrounding emulate_gpu() names.
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
    """
    Within, kernels are interpreted on a CPU with the launch parameters of this GPU.

    Why not an argument of every operation: it would run through operators, their fake and autograd rules and the model
    for the sake of kernels.report, which notes down how a GPU that is not there would be used, and of the tests.
    """
    before = _emulated_gpu.set(name)
    try:
        yield
    finally:
        _emulated_gpu.reset(before)


def for_architecture(table: dict[str, Row], name: str) -> Row:
    """The row of this GPU or, of NVIDIA's, of the newest one before it (sm_121: that of sm_120); else the first row."""
    if name in table or not name.startswith("sm_"):
        return table.get(name, next(iter(table.values())))
    number = int(name.removeprefix("sm_"))
    older = [row for other, row in table.items() if other.startswith("sm_") and int(other[3:]) < number]
    return older[-1] if older else next(iter(table.values()))


def check_tensors(**tensors: torch.Tensor) -> None:
    """ValueError unless all of them are float32, float16 or bfloat16 and live on one device."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: the kernels take float32, float16 or bfloat16")
        if tensor.device != tensors[first].device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {tensors[first].device}: move them together")


def forbid_double_backward(operator: torch.library.CustomOpDef) -> None:
    """Make a gradient through this operator, itself a gradient, an error with a sentence."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{operator._qualname} has no second derivative: use --kernels none for that")

    operator.register_autograd(refuse)
