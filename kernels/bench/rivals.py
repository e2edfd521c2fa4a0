"""
What is compared: every version of an operation that can run, by name.

    triton                 the kernels of this repository
    torch, torch.compile   the stock version, eager and compiled
    SDPA flash ...         scaled_dot_product_attention held to one of its backends
    chunked                F.linear_cross_entropy, which never holds all logits
    liger, flash-attn      liger-kernel 0.8.5 and flash-attn 2.8, if installed: this repository does not need them
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.common import with_gradient_for

OURS = ("triton", "torch", "torch.compile")  # an error in any other is only reported
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,  # the only one of them on a CPU
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def versions(operation: str, compiled: bool, on_gpu: bool) -> dict[str, Callable]:
    """Return the functions to compare, by name; each takes the arguments of the operation in kernels.Ops."""
    stock = getattr(kernels.select("none"), operation)
    found = {"triton": getattr(kernels.select("all", "cuda"), operation)} if on_gpu else {}
    found["torch"] = stock
    if compiled:
        found["torch.compile"] = torch.compile(stock, fullgraph=True)
    if operation == "causal_attention":
        found |= {name: sdpa(backend) for name, backend in [*BACKENDS.items()][: None if on_gpu else 1]}
    if operation == "linear_cross_entropy":
        found["chunked"] = chunked_linear_cross_entropy
    for name, package, offered in (("liger", "liger_kernel", liger), ("flash-attn", "flash_attn", flash)):
        if on_gpu and importlib.util.find_spec(package):
            with leave_out_if_broken(package):
                found |= {name: offered()[operation]} if operation in offered() else {}
    return found


@contextlib.contextmanager
def leave_out_if_broken(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:  # most often built for another PyTorch
        print(f"{package} cannot be imported and is left out: {first_line(error)}", file=sys.stderr)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:100]


# --------------------------------------------------------------------------- PyTorch's


def sdpa(backend: SDPBackend) -> Callable:
    """Return causal attention through one backend of scaled_dot_product_attention, which raises if it cannot run."""

    def causal_attention(qkv, n_head, dropout_p, bias):
        (B, T, width), qkv = qkv.shape, with_gradient_for(bias, qkv)
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.split(width // 3, dim=-1))
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, width // 3)

    return causal_attention


def chunked_linear_cross_entropy(x, weight, targets, vocab_size):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight[:vocab_size].to(x.dtype), targets, options=options)


# ----------------------------------------------------------------------- other packages


def flash() -> dict[str, Callable]:
    """Return the operation that flash-attn has; its function takes (B, T, 3, H, D) in float16 or bfloat16."""
    from flash_attn import flash_attn_qkvpacked_func

    def causal_attention(qkv, n_head, dropout_p, bias):
        (B, T, width), qkv = qkv.shape, with_gradient_for(bias, qkv)
        packed = qkv.view(B, T, 3, n_head, width // 3 // n_head)
        return flash_attn_qkvpacked_func(packed, dropout_p, causal=True).reshape(B, T, width // 3)

    return {"causal_attention": causal_attention}


def liger() -> dict[str, Callable]:
    """Return the operations that liger-kernel has, called by position, which works with all its versions."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    layer_norm = LigerLayerNormFunction.apply

    def add_layer_norm(x, residual, weight, bias, eps):
        residual = residual + x
        return layer_norm(residual, weight, bias, eps), residual

    def linear_cross_entropy(x, weight, targets, vocab_size):
        loss = LigerFusedLinearCrossEntropyFunction.apply(x, weight[:vocab_size].to(x.dtype), targets)
        return loss[0] if isinstance(loss, tuple) else loss  # a tuple also holds the z loss and more

    found = {"layer_norm": layer_norm, "add_layer_norm": add_layer_norm}
    return found | {"linear_cross_entropy": linear_cross_entropy}
