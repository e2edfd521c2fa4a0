"""
The first half of the GPT-2 MLP: matrix product, bias, GELU in its tanh form; forward and backward.

    z = x @ weight.T + bias
    u = sqrt(2 / pi) * (z + 0.044715 * z^3)
    y = 0.5 * z * (1 + tanh(u))  =  z * sigmoid(2u)  =  z / (1 + exp(-2u))

The last form keeps its digits when tanh(u) is nearly -1.
Given dy = dL/dy, with s = sigmoid(2u):

    dz    = dy * (s + z * s * (1 - s) * d(2u)/dz)         d(2u)/dz = 2 * sqrt(2 / pi) * (1 + 3 * 0.044715 * z^2)
    dbias = sum over rows of dz
    dx, dweight = dz @ weight, dz.T @ x

The three matrix products are PyTorch's. Between them, one kernel per direction, each one pass over the data.

Saved: x, weight, bias and x @ weight.T; the backward adds the bias again.
Bytes per element, z and y in bfloat16: forward 4 (read, write), backward 6 (two reads, a write), which is the minimum.
The bias is read again for every ROWS rows; the partial sums for dbias add at most a quarter of a byte.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, https://arxiv.org/abs/1606.08415
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import common
from kernels.common import tl, triton

LOG2E = tl.constexpr(math.log2(math.e))
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))  # 2u = LINEAR * z + CUBIC * z^3
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
MIN_ROWS = 16  # a backward program takes at least this many rows, so that its partial dbias is small beside them
ROW_PROGRAMS = {  # GPU -> backward programs per block of columns: with GPT-2's three blocks, 8 per multiprocessor
    "sm_80": 8 * 108 // 3,  # multiprocessors of an A100, an H100, a B200, an RTX 5090
    "sm_90": 8 * 132 // 3,
    "sm_100": 8 * 148 // 3,
    "sm_120": 8 * 170 // 3,
}
LAUNCH = {  # tiles of 4,096 and 2,048 elements: 32 and 16 per thread. Alternatives tried: kernels/README.md
    "forward": {"ROWS": 8, "COLS": 512, "num_warps": 4},
    "backward": {"ROWS": 2, "COLS": 1024, "num_warps": 4},
}

# ------------------------------------------------------------------------------ PyTorch


def linear_gelu_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return gelu_tanh(x @ weight.T + bias): (..., W). x: (..., C); weight: (W, C); bias: (W,)."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the forward above in the dtype it is given: in float64, the exact answer of the tests."""
    z = x @ weight.T + bias
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    return 0.5 * z * (1 + torch.tanh(u))


# ------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(z_ptr, bias_ptr, y_ptr, N, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One program: a tile (ROWS, COLS) of y (N, W) from z (N, W), to which it adds the bias (W,)."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS  # int64: first_row * W passes 2^31 for large batches
    rows = tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    tile = first_row * W + rows[:, None] * W + cols[None, :]
    inside = (rows[:, None] < N - first_row) & (cols[None, :] < W)
    bias = tl.load(bias_ptr + cols, mask=cols < W, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + tile, mask=inside, other=0.0).to(tl.float32) + bias[None, :]

    exp_minus_2u = tl.math.exp2(z * (-LOG2E * LINEAR - LOG2E * CUBIC * z * z))
    tl.store(y_ptr + tile, z / (1.0 + exp_minus_2u), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    dy_ptr, z_ptr, bias_ptr, dz_ptr, dbias_parts_ptr, N, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """
    One program of P per block of columns: every P-th tile (ROWS, COLS) of dz (N, W), from dy and z (N, W) and the bias
    (W,), which is not in z; and the sum over those rows, one row of the float32 partial dbias (P, W).
    """
    program = tl.program_id(0).to(tl.int64)  # so first_row is int64 too
    rows = tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    bias = tl.load(bias_ptr + cols, mask=cols < W, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLS), dtype=tl.float32)
    tile = rows[:, None] * W + cols[None, :]

    for first_row in range(program * ROWS, N, tl.num_programs(0) * ROWS):
        start = first_row * W
        inside = (rows[:, None] < N - first_row) & (cols[None, :] < W)
        z = tl.load(z_ptr + start + tile, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + start + tile, mask=inside, other=0.0).to(tl.float32)  # 0 outside, and so is dz

        z2 = z * z
        # e * s is 1 - s without the cancellation; e stays finite, so that e * s is never inf * 0
        e = tl.math.exp2(tl.minimum(z * (-LOG2E * LINEAR - LOG2E * CUBIC * z2), 126.0))
        s = 1.0 / (1.0 + e)
        dz = dy * (s + z * s * (e * s) * (LINEAR + 3.0 * CUBIC * z2))
        tl.store(dz_ptr + start + tile, dz, mask=inside)
        dbias += dz

    tl.store(dbias_parts_ptr + program * W + cols, tl.sum(dbias, axis=0), mask=cols < W)


# ---------------------------------------------------------------------------- operators


@torch.library.custom_op("gpt2::bias_gelu", mutates_args=())
def _bias_gelu(z: Tensor, bias: Tensor) -> Tensor:
    y, launch, (N, W) = _bias_gelu_outputs(z, bias), LAUNCH["forward"], z.shape
    if z.numel() > 0:
        with common.device_guard(z):
            grid = (triton.cdiv(N, launch["ROWS"]), triton.cdiv(W, launch["COLS"]))
            _forward_kernel[grid](z, bias, y, N, W=W, **launch)
    return y


@_bias_gelu.register_fake
def _bias_gelu_outputs(z, bias):
    return torch.empty_like(z)


@torch.library.custom_op("gpt2::bias_gelu_backward", mutates_args=())
def _backward(dy: Tensor, z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dz, launch, (N, W) = torch.empty_like(z), LAUNCH["backward"], z.shape
    row_programs = min(triton.cdiv(N, MIN_ROWS), common.for_architecture(ROW_PROGRAMS, common.architecture(z)))
    dbias_parts = z.new_empty(row_programs, W, dtype=torch.float32)
    if z.numel() > 0:
        with common.device_guard(z):
            grid = (row_programs, triton.cdiv(W, launch["COLS"]))
            _backward_kernel[grid](dy, z, bias, dz, dbias_parts, N, W=W, **launch)
    return dz, dbias_parts.sum(0).to(bias.dtype)


@_backward.register_fake
def _backward_outputs(dy, z, bias):
    return torch.empty_like(z), torch.empty_like(bias)


common.forbid_double_backward(_backward)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy):
    common.refuse_tangents(dy)
    return _backward(dy.contiguous(), *ctx.saved_tensors)


_bias_gelu.register_autograd(_gradient, setup_context=_save)


# ------------------------------------------------------------------------------- public


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """
    Return gelu_tanh(x @ weight.T + bias); differentiable in x, weight and bias.

    x:      (..., C), float32, float16 or bfloat16
    weight: (W, C), W = 4C in GPT-2, in the dtype of x unless autocast is enabled
    bias:   (W,), any of these dtypes; added in float32
    Return y: (..., W), in the dtype of the matrix product: autocast's if that is enabled, else that of x.
    Raise ValueError for other dtypes and shapes, and for mixed devices.
    """
    common.check_tensors(x=x, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            "weight must be (W, C) and bias (W,) for x (..., C), "
            f"got weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and x {tuple(x.shape)}"
        )
    z = F.linear(x, weight)
    return _bias_gelu(z.reshape(-1, z.shape[-1]), bias.contiguous()).view(z.shape)
