"""
Layer normalization over the last dimension, alone or fused with the residual addition; forward and backward.

For one row x of C elements, with gain w and offset b:

    mean = sum(x) / C
    rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)          reciprocal standard deviation
    xhat = (x - mean) * rstd
    y    = w * xhat + b

Given dy = dL/dy, and writing dxhat = w * dy and avg() for the average over the C columns:

    dx = rstd * (dxhat - avg(dxhat) - xhat * avg(dxhat * xhat))
    dw = sum over rows of dy * xhat
    db = sum over rows of dy

With the residual, summed = residual + x replaces x above and is a second output, whose own gradient is added:
dresidual = dx + dsummed, which is the gradient of both terms of the sum.

Saved: x (or summed), and mean and rstd per row; the backward recomputes xhat from them.
Bytes per element under autocast (x, y bfloat16; stream float32), each input read once and each output written once:
forward 6 (12 with the residual), backward 10 (16). The partial sums of dw and db add at most 8 / ROWS.

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import common
from kernels.common import tl, triton

MAX_C = 8192  # a longer row does not fit in the registers of eight warps
ROWS = 16  # a backward program takes at least this many rows, so that its partial dw and db are small beside them
FORWARD_ELEMENTS = 1280  # most per warp: 40 per thread, so that rows up to this length need no barrier


class Launch(NamedTuple):
    """Backward launch config, fixed per GPU so that results are too. Alternatives tried: kernels/README.md."""

    elements_per_warp: int  # at most; registers hold the row and the sums for dw and db
    warps: int  # in flight, 8 per multiprocessor


LAUNCH = {  # GPU -> launch; multiprocessors of an A100, an H100, a B200, an RTX 5090
    "sm_80": Launch(elements_per_warp=1024, warps=8 * 108),
    "sm_90": Launch(elements_per_warp=1024, warps=8 * 132),
    "sm_100": Launch(elements_per_warp=1024, warps=8 * 148),
    "sm_120": Launch(elements_per_warp=768, warps=8 * 170),
}


@functools.cache  # computing it takes a sixth of the time that a forward takes to launch
def launch_parameters(C: int, elements_per_warp: int = FORWARD_ELEMENTS) -> dict[str, int]:
    """Return a block that holds a row, and its warps: 8 elements per thread if rows are not aligned to 16 bytes."""
    num_warps = triton.next_power_of_2(triton.cdiv(C, elements_per_warp if C % 8 == 0 else 256))
    return {"BLOCK_C": triton.next_power_of_2(C), "num_warps": num_warps}


def backward_launch_parameters(N: int, C: int, gpu: str) -> tuple[int, dict[str, int]]:
    """Return the number of programs that divide the N rows, and their block and warps."""
    elements_per_warp, warps = common.for_architecture(LAUNCH, gpu)
    launch = launch_parameters(C, elements_per_warp)
    return min(triton.cdiv(N, ROWS), max(1, warps // launch["num_warps"])), launch


# ------------------------------------------------------------------------------ PyTorch


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's own layer norm. x: (..., C); weight, bias: (C,). Return y: (..., C)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the layer norm of residual + x, and residual + x itself: both (..., C), like x and residual."""
    residual = residual + x
    return layer_norm_torch(residual, weight, bias, eps), residual


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the forward above in the dtype it is given: in float64, the exact answer of the tests."""
    centered = x - x.mean(dim=-1, keepdim=True)
    rstd = (centered.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return weight * (centered * rstd) + bias


# ------------------------------------------------------------------------------ kernels


@triton.jit
def _forward_kernel(
    x_ptr,  # in  (N, C)
    residual_ptr,  # in  (N, C), or None: no addition
    weight_ptr,  # in  (C,)
    bias_ptr,  # in  (C,)
    summed_ptr,  # out (N, C), or None
    y_ptr,  # out (N, C)
    mean_ptr,  # out (N,) float32
    rstd_ptr,  # out (N,) float32
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one row of summed and y, with its mean and rstd."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * C passes 2^31 for large batches
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    x = tl.load(x_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
        summed = x.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * C + cols, summed, mask=mask)
        x = summed.to(tl.float32)  # the rounded sum, which the backward will read
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)

    total = tl.sum(x, axis=0)
    mean = total * (1.0 / C)
    mean = tl.fma(tl.fma(mean, -C, total), 1.0 / C, mean)  # as right as a division, of which a GPU's is not
    centered = tl.where(mask, x - mean, 0.0)  # columns past C must not enter the variance
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=0) / C + eps)
    y = weight * (centered * rstd) + bias

    tl.store(y_ptr + row * C + cols, y, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    dy_ptr,  # in  (N, C)
    dsummed_ptr,  # in  (N, C), or None
    x_ptr,  # in  (N, C): x, or summed
    weight_ptr,  # in  (C,)
    mean_ptr,  # in  (N,)
    rstd_ptr,  # in  (N,)
    dx_ptr,  # out (N, C)
    dx_narrow_ptr,  # out (N, C) in the dtype of x, if that is narrower than summed's; or None
    dweight_parts_ptr,  # out (programs, C) float32
    dbias_parts_ptr,  # out (programs, C) float32
    N,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program of P: rows p, p + P, p + 2P, ... of dx, and their sums for dw and db."""
    program = tl.program_id(0).to(tl.int64)  # so row is int64 too
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_C,), dtype=tl.float32)

    for row in range(program, N, tl.num_programs(0)):
        x = tl.load(x_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)

        xhat = (x - mean) * rstd
        dxhat = weight * dy  # 0 past C, so in both sums too
        avg_dxhat = tl.sum(dxhat, axis=0) / C
        avg_dxhat_xhat = tl.sum(dxhat * xhat, axis=0) / C
        dx = rstd * (dxhat - avg_dxhat - xhat * avg_dxhat_xhat)
        if dsummed_ptr is not None:
            dx += tl.load(dsummed_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + cols, dx, mask=mask)
        if dx_narrow_ptr is not None:
            tl.store(dx_narrow_ptr + row * C + cols, dx, mask=mask)
        dweight += dy * xhat
        dbias += dy

    tl.store(dweight_parts_ptr + program * C + cols, dweight, mask=mask)
    tl.store(dbias_parts_ptr + program * C + cols, dbias, mask=mask)


# ---------------------------------------------------------------------------- operators


@torch.library.custom_op("gpt2::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, summed, mean and rstd; without a residual, summed is empty."""
    y, summed, mean, rstd = _layer_norm_outputs(x, residual, weight, bias, eps, dtype)
    N, C = mean.numel(), x.shape[-1]
    if N > 0:
        tensors = (x, residual, weight, bias, None if residual is None else summed, y, mean, rstd)
        with common.device_guard(x):
            _forward_kernel[(N,)](*tensors, eps, C=C, **launch_parameters(C))
    return y, summed, mean, rstd


@_layer_norm.register_fake
def _layer_norm_outputs(x, residual, weight, bias, eps, dtype):
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    summed = x.new_empty(0) if residual is None else torch.empty_like(residual)
    return torch.empty_like(x, dtype=dtype), summed, mean, torch.empty_like(mean)


@torch.library.custom_op("gpt2::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return dx in the dtype of x and, if `dtype` is another, in that one too; dweight; dbias."""
    dx = _empty_dx(x, dtype)
    N, C = mean.numel(), x.shape[-1]
    programs, launch = backward_launch_parameters(N, C, common.architecture(x))
    dweight_parts = x.new_empty(programs, C, dtype=torch.float32)
    dbias_parts = torch.empty_like(dweight_parts)
    if N > 0:
        outputs = (dx[0], dx[1] if len(dx) == 2 else None, dweight_parts, dbias_parts)
        with common.device_guard(x):
            _backward_kernel[(programs,)](dy, dsummed, x, weight, mean, rstd, *outputs, N, C=C, **launch)
    return dx, dweight_parts.sum(0).to(weight.dtype), dbias_parts.sum(0).to(weight.dtype)


@_backward.register_fake
def _backward_outputs(dy, dsummed, x, weight, mean, rstd, dtype):
    return _empty_dx(x, dtype), torch.empty_like(weight), torch.empty_like(weight)


def _empty_dx(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(x, dtype=each) for each in dict.fromkeys((x.dtype, dtype))]


common.forbid_double_backward(_backward)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the last layer norm's summed is unused: allocate no zero gradient for it
    (x, residual, weight, *_), (_, summed, *statistics) = inputs, output
    ctx.x_dtype, ctx.alone = x.dtype, residual is None
    ctx.save_for_backward(x if ctx.alone else summed, weight, *statistics)


def _gradient(ctx, dy, dsummed, _dmean, _drstd):
    common.refuse_tangents(dy, dsummed)
    x, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dsummed = None if dsummed is None or ctx.alone else dsummed.contiguous()
    dx, dweight, dbias = _backward(dy, dsummed, x, weight, mean, rstd, ctx.x_dtype)
    return dx[-1], None if ctx.alone else dx[0], dweight, dbias, None, None


_layer_norm.register_autograd(_gradient, setup_context=_save)


# ------------------------------------------------------------------------------- public


def unsupported(C: int) -> str:
    """Return why the kernels cannot do rows of C elements, or "" if they can."""
    return "" if 1 <= C <= MAX_C else f"the layer norm kernel takes rows of 1 to {MAX_C} elements, and a row has {C}"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """
    Normalize x over its last dimension; differentiable in x, weight and bias.

    x:            (..., C), float32, float16 or bfloat16; copied unless contiguous
    weight, bias: (C,), any of these dtypes
    Return y: (..., C), in autocast's dtype if that is enabled, else in that of x; every sum is in float32.
    Raise ValueError for other dtypes and shapes, mixed devices, or C above 8,192.
    """
    _check(weight=weight, bias=bias, x=x)
    return _layer_norm(x.contiguous(), None, weight.contiguous(), bias.contiguous(), eps, common.autocast_dtype(x))[0]


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """
    Fused residual add + LayerNorm: one pass over memory; differentiable in all four tensors.

    x, residual:  (..., C), float32, float16 or bfloat16, not necessarily the same; copied unless contiguous
    weight, bias: (C,), any of these dtypes
    Return y: (..., C), in autocast's dtype if that is enabled, else in that of residual;
            residual + x: (..., C), in the dtype of residual.
    Raise ValueError for other dtypes and shapes, mixed devices, or C above 8,192.
    """
    _check(weight=weight, bias=bias, x=x, residual=residual)
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have one shape, got {tuple(x.shape)} and {tuple(residual.shape)}")
    tensors = (x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous())
    return _layer_norm(*tensors, eps, common.autocast_dtype(residual))[:2]


def _check(weight: Tensor, bias: Tensor, x: Tensor, **others: Tensor) -> None:
    common.check_tensors(x=x, weight=weight, bias=bias, **others)
    C = x.shape[-1]
    if reason := unsupported(C):
        raise ValueError(reason)
    if weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(f"weight and bias must be ({C},), got {tuple(weight.shape)} and {tuple(bias.shape)}")
