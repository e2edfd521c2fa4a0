"""
Six operations of a GPT, each in a Triton and a PyTorch version, selected by family.

    ops = select("layernorm,attention", torch.device("cuda"))     # the other families use PyTorch
    y = ops.layer_norm(x, weight, bias, 1e-5)

B sequences, T tokens, C channels, N = B * T rows, V vocabulary (weight and logits may be padded past V):

    layer_norm(x, weight, bias, eps)                        x (..., C)              -> y (..., C)
    add_layer_norm(x, residual, weight, bias, eps)          x, residual (..., C)    -> y, residual + x
    linear_gelu(x, weight, bias)                            x (..., C), (4C, C)     -> gelu_tanh(x @ weight.T + bias)
    causal_attention(qkv, n_head, dropout_p, bias)          qkv (B, T, 3C) packed   -> y (B, T, C)
    cross_entropy(logits, targets, vocab_size)              logits (N, >= V), (N,)  -> scalar mean loss, nats per token
    linear_cross_entropy(x, weight, targets, vocab_size)    x (N, C), (>= V, C)     -> the same, without logits

The model receives these as one bundle and does not know which versions are in it.
"""

from kernels import startup

if startup.is_command_of("kernels"):  # another package's keeps its own signals
    startup.begin()

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import attention, cross_entropy, gelu, layernorm
from kernels.common import unavailable

MODULES = {"layernorm": layernorm, "gelu": gelu, "attention": attention, "cross_entropy": cross_entropy}
FAMILIES = {  # name on the command line, also the file's -> its operations
    "layernorm": ("layer_norm", "add_layer_norm"),
    "gelu": ("linear_gelu",),
    "attention": ("causal_attention",),
    "cross_entropy": ("cross_entropy", "linear_cross_entropy"),
}

VOCAB_MULTIPLE = 128  # the logits' width is padded to it, for tensor cores and 128-bit loads


@dataclass(frozen=True)
class Ops:
    """The six operations as plain functions; select() fills it."""

    layer_norm: Callable
    add_layer_norm: Callable
    linear_gelu: Callable
    causal_attention: Callable
    cross_entropy: Callable
    linear_cross_entropy: Callable


def source_hash() -> str:
    """
    Return a hash of the code of the operators, for torch.compiler.config.cache_key_tag.

    PyTorch's cache of compiled graphs knows an operator by its name alone: after an edit, it would return the graph of
    the old gradient.
    """
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def families(names: str) -> tuple[str, ...]:
    """Return the families that "all", "none" or a comma-separated list means. Raise ValueError for an unknown name."""
    if names in ("all", "none"):
        return tuple(FAMILIES) if names == "all" else ()
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown or not chosen:
        raise ValueError(f"--kernels {names!r}: use all, none, or a comma-separated list of {', '.join(FAMILIES)}")
    return tuple(name for name in FAMILIES if name in chosen)


def unsupported(n_embd: int | None = None, n_head: int | None = None, dropout: float = 0.0) -> dict[str, str]:
    """Return family -> reason for each family whose kernels cannot run this shape. None: size not checked."""
    reasons = {
        "layernorm": layernorm.unsupported(n_embd) if n_embd else "",
        "attention": attention.unsupported(n_embd // n_head if n_embd and n_head else None, dropout),
    }
    return {family: reason for family, reason in reasons.items() if reason}


def check_shape(chosen: Iterable[str], n_embd: int | None, n_head: int | None, dropout: float) -> None:
    """Raise ValueError if one of the chosen families cannot run this shape; see `unsupported`."""
    reasons = unsupported(n_embd, n_head, dropout)
    for family in chosen:
        if family in reasons:
            others = ",".join(name for name in FAMILIES if name not in reasons)
            raise ValueError(f"{reasons[family]}: leave {family} to PyTorch with --kernels {others}")


def select(
    names: str,
    device: torch.device | str = "cpu",
    dropout: float = 0.0,
    n_embd: int | None = None,
    n_head: int | None = None,
    say: Callable[[str], object] = print,
) -> Ops:
    """
    Return the operations with the named families in Triton and the others in PyTorch, for tensors on this device.

    names: "all", "none" or a comma-separated list of FAMILIES; "auto": on a GPU every family whose kernels can run a
           model with this dropout and, if known, n_embd and n_head; elsewhere none
    say:   called with one sentence per family that auto leaves to PyTorch on a GPU
    Raise ValueError for an unknown family, and for a named one that cannot run on this device or this model.
    """
    device_reason, reasons = unavailable(torch.device(device)), unsupported(n_embd, n_head, dropout)
    if names == "auto":
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu and device_reason:
            say(f"--kernels auto leaves every family to PyTorch: {device_reason}")
            on_gpu = False
        chosen = [family for family in FAMILIES if on_gpu and family not in reasons]
        for family, reason in reasons.items() if on_gpu else ():
            say(f"--kernels auto leaves {family} to PyTorch: {reason}")
    else:
        chosen = families(names)
    if chosen and device_reason:
        cure = "use --kernels none to train, or set TRITON_INTERPRET=1 to study the kernels on a CPU"
        raise ValueError(f"--kernels {names} asks for Triton kernels, but {device_reason}: {cure}")
    check_shape(chosen, n_embd, n_head, dropout)
    versions = {}
    for family, functions in FAMILIES.items():
        for name in functions:
            versions[name] = getattr(MODULES[family], name if family in chosen else f"{name}_torch")
    return Ops(**versions)
