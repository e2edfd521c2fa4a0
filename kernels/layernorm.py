"""
Layer normalisation over the last dimension, alone or behind the residual addition; forward and backward.

For one row x of C numbers, with gain w and offset b:

    mean = sum(x) / C
    rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)          reciprocal standard deviation
    xhat = (x - mean) * rstd
    y    = w * xhat + b

Given dy = dL/dy, and writing dxhat = w * dy and avg() for the average over the C columns:

    dx = rstd * (dxhat - avg(dxhat) - xhat * avg(dxhat * xhat))
    dw = sum over rows of dy * xhat
    db = sum over rows of dy

With the residual, summed = residual + x takes the place of x above, is a second output, and its own gradient
joins in: dresidual = dx + dsummed, the same numbers for both terms of the sum.

Saved: x (or summed), mean and rstd, two numbers a row; the backward rebuilds xhat from them.
Bytes: each input is read once and each output written once. Under autocast (x, y bfloat16; the stream float32) a number
costs 6 bytes alone and 12 with the residual; back, 10 alone and 16 with it. The partial sums of dw and db add at most
8 / ROWS bytes.

Compiled, not timed, float32 stream, bfloat16 branch. Registers a thread, bytes of spill, instructions a number (in the
backward those of its loop), barriers in the program; sm_80 unless named, the others are within 30 registers and 7 %:

    kernel, C, warps a row           registers   spill   instructions   barriers
    forward, 768, 1                         72       0           15.1          0   kept (alone: 64, 10.0)
    forward, 1280, 1                        86       0              -          0   kept; 2 warps spill 8 bytes on sm_90
    backward, 768, 1                       186       0           19.6          0   kept (alone: 148, 18.8)
    backward, 768, 2                       128       0           27.6         18
    backward, 1024, 1                      217       0           18.1          0   kept
    backward, 1024, 2                      140       0           19.1         18   kept on sm_120
    backward, 1280, 2                      223       0           24.8         30   kept
    backward, 1280, 4                      128       0           33.5         18   twice the warps, no more rows
    backward, 1600, 1                      255     376           24.1          0
    backward, 1600, 2                      254       0           21.9         30   kept
    backward, 1600, 2, sm_120              255      56           23.8         30
    backward, 1600, 4, sm_120              150       0           26.2         18   kept
    backward, 1999, 2                       32    2816           77.6         22
    backward, 1999, 8                      119       0           36.8         10   kept; odd C above 4,096 still spill

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common import (
    architecture,
    autocast_dtype,
    check_tensors,
    device_guard,
    for_architecture,
    forbid_double_backward,
    tl,
    triton,
)

MAX_C = 8192  # past this a row no longer fits into the registers of eight warps
ROWS = 16  # a backward program takes at least this many rows, so that its partial dw and db stay small beside them
LAUNCH = {  # GPU -> of the backward: numbers that a warp takes at most, and warps in flight, 8 on a multiprocessor
    "sm_80": (1024, 8 * 108),  # of an A100, an H100, a B200, an RTX 5090: fixed for a GPU, so that bits are too
    "sm_90": (1024, 8 * 132),
    "sm_100": (1024, 8 * 148),
    "sm_120": (768, 8 * 170),
}


def launch_parameters(C: int) -> dict[str, int]:
    """
    Of the forward: a row in one block, and a warp for 1,280 numbers, 40 a thread, so that GPT-2's rows up to there need
    no barrier; only 8 a thread where rows are not aligned to 16 bytes.
    """
    return {"BLOCK_C": triton.next_power_of_2(C), "num_warps": _warps(C, 1280)}


def backward_launch_parameters(N: int, C: int, gpu: str) -> tuple[int, dict[str, int]]:
    """Of the backward, which holds sums beside a row: how many programs share the rows, and the same."""
    elements_per_warp, warps_in_flight = for_architecture(LAUNCH, gpu)
    num_warps = _warps(C, elements_per_warp)
    programs = min(triton.cdiv(N, ROWS), max(1, warps_in_flight // num_warps))
    return programs, {"BLOCK_C": triton.next_power_of_2(C), "num_warps": num_warps}


def _warps(C: int, elements_per_warp: int) -> int:
    return triton.next_power_of_2(triton.cdiv(C, elements_per_warp if C % 8 == 0 else 256))


# ------------------------------------------------------------------------------ PyTorch


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's own layer norm. x: (..., C); weight, bias: (C,). Returns y: (..., C)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual: (..., C). Returns the layer norm of residual + x, and residual + x itself: both (..., C)."""
    residual = residual + x
    return F.layer_norm(residual, weight.shape, weight, bias, eps), residual


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The forward maths above, in the dtype it is given: in float64, the exact answer of the tests."""
    centred = x - x.mean(dim=-1, keepdim=True)
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return weight * (centred * rstd) + bias


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
        x = summed.to(tl.float32)  # as rounded: what the backward will read
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)

    mean = tl.sum(x, axis=0) / C
    centred = tl.where(mask, x - mean, 0.0)  # columns past C must not enter the variance
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
    y = weight * (centred * rstd) + bias

    tl.store(y_ptr + row * C + cols, y, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    dy_ptr,  # in  (N, C)
    dsummed_ptr,  # in  (N, C), or None
    x_ptr,  # in  (N, C): x, or summed
    weight_ptr,  # in  (C,)
    mean_ptr,  # in  (N,)
    rstd_ptr,  # in  (N,)
    dx_ptr,  # out (N, C)
    dx_narrow_ptr,  # out (N, C) in the dtype of the other term of the sum, or None
    dweight_parts_ptr,  # out (programs, C) float32
    dbias_parts_ptr,  # out (programs, C) float32
    N,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program of P: rows p, p + P, p + 2P, ... of dx, and what they add to dw and db."""
    program = tl.program_id(0).to(tl.int64)  # makes row, too, an int64
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
        dxhat = weight * dy  # 0 past C, and so in both sums
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
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _layer_norm_outputs(x, weight, bias, eps, dtype)
    _launch_forward(x, None, weight, bias, None, y, mean, rstd, eps)
    return y, mean, rstd


@_layer_norm.register_fake
def _layer_norm_outputs(x, weight, bias, eps, dtype):
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), mean, torch.empty_like(mean)


@torch.library.custom_op("gpt2::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, summed, mean, rstd = _add_layer_norm_outputs(x, residual, weight, bias, eps, dtype)
    _launch_forward(x, residual, weight, bias, summed, y, mean, rstd, eps)
    return y, summed, mean, rstd


@_add_layer_norm.register_fake
def _add_layer_norm_outputs(x, residual, weight, bias, eps, dtype):
    y, mean, rstd = _layer_norm_outputs(x, weight, bias, eps, dtype)
    return y, torch.empty_like(residual), mean, rstd


def _launch_forward(x, residual, weight, bias, summed, y, mean, rstd, eps):
    N, C = mean.numel(), x.shape[-1]
    if N == 0:
        return
    with device_guard(x):
        _forward_kernel[(N,)](x, residual, weight, bias, summed, y, mean, rstd, eps, C=C, **launch_parameters(C))


@torch.library.custom_op("gpt2::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """dx in the dtype of x and, where `dtype` is another, in that one too; dweight; dbias."""
    dx, dweight, dbias = _backward_outputs(dy, dsummed, x, weight, mean, rstd, dtype)
    N, C = mean.numel(), x.shape[-1]
    programs, launch = backward_launch_parameters(N, C, architecture(x))
    dweight_parts = x.new_empty(programs, C, dtype=torch.float32)
    dbias_parts = torch.empty_like(dweight_parts)
    if N > 0:
        second = dx[1] if len(dx) == 2 else None
        with device_guard(x):
            _backward_kernel[(programs,)](
                dy, dsummed, x, weight, mean, rstd, dx[0], second, dweight_parts, dbias_parts, N, C=C, **launch
            )
    dweight.copy_(dweight_parts.sum(0))
    dbias.copy_(dbias_parts.sum(0))
    return dx, dweight, dbias


@_backward.register_fake
def _backward_outputs(dy, dsummed, x, weight, mean, rstd, dtype):
    dx = [torch.empty_like(x, dtype=each) for each in dict.fromkeys((x.dtype, dtype))]
    return dx, torch.empty_like(weight), torch.empty_like(weight)


forbid_double_backward(_backward)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # mean and rstd have no gradient: no zeros for them
    x, weight = inputs[:2]
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)


def _gradient(ctx, dy, _dmean, _drstd):
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy.contiguous(), None, x, weight, mean, rstd, x.dtype)
    return dx[0], dweight, dbias, None, None


def _add_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # behind the last layer norm nobody uses summed: no zeros to write and read
    x, _, weight = inputs[:3]
    _, summed, mean, rstd = output
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(summed, weight, mean, rstd)


def _add_gradient(ctx, dy, dsummed, _dmean, _drstd):
    summed, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(summed) if dy is None else dy.contiguous()
    dsummed = None if dsummed is None else dsummed.contiguous()
    dx, dweight, dbias = _backward(dy, dsummed, summed, weight, mean, rstd, ctx.x_dtype)
    return dx[-1], dx[0], dweight, dbias, None, None


_layer_norm.register_autograd(_gradient, setup_context=_save)
_add_layer_norm.register_autograd(_add_gradient, setup_context=_add_save)


# ------------------------------------------------------------------------------- public


def unsupported(C: int) -> str:
    """Return why the kernels cannot do rows of C elements, or "" if they can."""
    return "" if 1 <= C <= MAX_C else f"the layer norm kernel takes rows of 1 to {MAX_C} elements, and a row has {C}"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """
    Layer norm of x over its last dimension; differentiable in x, weight and bias.

    x:            (..., C), float32, float16 or bfloat16; copied if not contiguous
    weight, bias: (C,), any of these dtypes
    Returns y: (..., C), in the dtype of autocast where it is on, else that of x; every sum is taken in float32.
    Raises ValueError for other dtypes and shapes, mixed devices, or C above 8,192.
    """
    _check(weight=weight, bias=bias, x=x)
    y, _, _ = _layer_norm(x.contiguous(), weight.contiguous(), bias.contiguous(), eps, autocast_dtype(x))
    return y


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """
    The residual addition and the layer norm of its sum in one pass; differentiable in all four tensors.

    x, residual:  (..., C), float32, float16 or bfloat16, not necessarily the same; copied if not contiguous
    weight, bias: (C,), any of these dtypes
    Returns y: (..., C), in the dtype of autocast where it is on, else that of residual;
            residual + x: (..., C), dtype of residual.
    Raises ValueError for other dtypes and shapes, mixed devices, or C above 8,192.
    """
    _check(weight=weight, bias=bias, x=x, residual=residual)
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have one shape, got {tuple(x.shape)} and {tuple(residual.shape)}")
    tensors = (x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous())
    y, summed, _, _ = _add_layer_norm(*tensors, eps, autocast_dtype(residual))
    return y, summed


def _check(weight: Tensor, bias: Tensor, x: Tensor, **others: Tensor) -> None:
    check_tensors(x=x, weight=weight, bias=bias, **others)
    C = x.shape[-1]
    if reason := unsupported(C):
        raise ValueError(reason)
    if weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(f"weight and bias must be ({C},), got {tuple(weight.shape)} and {tuple(bias.shape)}")
