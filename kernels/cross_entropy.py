"""
Cross-entropy of a softmax over the vocabulary, alone or fused with the output head; forward and backward.

For one row of logits and its target t, over the V real columns (padding after V is ignored):

    lse  = log(sum(exp(logits))) = largest + log(sum(exp(logits - largest)))
    loss = lse - logits[t]                 mean over the rows, in nats per token; rows with target -100 are ignored,
                                           and the mean of none is 0, where F.cross_entropy returns nan

Given the gradient of the mean, with n rows counted:

    dlogits = (exp(logits - lse) - [column is t]) * dloss / n        0 in padded columns and ignored rows

The two terms of lse are never added up: at logits of 1e4 the sum would lose the digits that matter.

`cross_entropy` saves its logits and two statistics per row, and writes a new dlogits: the logits belong to the caller
and are never overwritten. The forward reads each logit once; the backward reads it once and writes once.

`linear_cross_entropy` makes its own logits, so it may overwrite them: per chunk of tokens it multiplies x by the
weight, turns the logits into (dlogits * n / dloss) in place, adds to dweight in float32 and stores dx; then it reuses
the chunk. All of it happens in the forward, if a gradient is wanted. Saved are dx and dweight; the backward only
multiplies them by dloss / n. A logit is read twice and written once; the second read, 100 KB after the first, should
come from the L2 cache, with two rows at a time per multiprocessor. Two rows do not fit in registers at once.

Masks stop at the padded width, and columns past V are replaced in registers: a mask at 50,257, like logits that are
not padded to a multiple of 16 columns, would split every access into 16-bit ones.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, https://arxiv.org/abs/1805.02867
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import common
from kernels.common import tl, triton

IGNORE = -100  # rows with this target are ignored: PyTorch's default
CHUNK_BYTES = 2**14  # per column of logits: 8,192 tokens in 16 bits, 4,096 in 32; 824 MB per chunk for GPT-2
VECTOR = tl.constexpr(8)  # neighboring logits share a running maximum: one 128-bit access in 16 bits
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
IGNORE_TARGET = tl.constexpr(IGNORE)
# GPU -> columns at a time, so that two rows fit on a multiprocessor. Alternatives tried: kernels/README.md
BLOCK = {"sm_80": 8192, "sm_86": 4096, "sm_90": 8192, "sm_120": 4096}


def launch_parameters(width: int, gpu: str) -> dict[str, int]:
    """Return, for all three kernels, the block of columns and its warps: 8 elements per thread, each of one thread."""
    block = min(common.for_architecture(BLOCK, gpu), max(256, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": block // 256}


# ------------------------------------------------------------------------------ PyTorch


def cross_entropy_torch(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the mean loss, a float32 scalar in nats per token. logits: (N, >= vocab_size); targets: (N,) int64."""
    total = F.cross_entropy(logits[:, :vocab_size].float(), targets, ignore_index=IGNORE, reduction="sum")
    return total / _rows_counted(targets)


def linear_cross_entropy_torch(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the same for logits x @ weight.T. x: (N, C); weight: (>= vocab_size, C); targets: (N,) int64."""
    return cross_entropy_torch(F.linear(x, weight), targets, vocab_size)


def cross_entropy_reference(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Compute the forward above in the dtype it is given: in float64, the exact answer of the tests."""
    counted = targets != IGNORE
    logits, targets = logits[counted, :vocab_size], targets[counted]
    largest = logits.amax(dim=1, keepdim=True)
    lse = largest + (logits - largest).exp().sum(dim=1, keepdim=True).log()
    return (lse - logits.gather(1, targets[:, None])).sum() / max(1, len(targets))


# ------------------------------------------------------------------------------ kernels


@triton.jit
def _row_statistics(row_ptr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest of the V logits of one row (WIDTH,), and sum(exp(logits - largest))."""
    FULL: tl.constexpr = V // BLOCK * BLOCK  # blocks up to here need no mask
    cols = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full((BLOCK // VECTOR,), -1e30, dtype=tl.float32)  # finite: largest - largest must be 0
    total = tl.zeros((BLOCK // VECTOR,), dtype=tl.float32)
    for start in range(0, FULL, BLOCK):
        # evict_last: the gradient, if it is computed, reads this row again
        logits = tl.load(row_ptr + start + cols, eviction_policy="evict_last").to(tl.float32)
        largest, total = _add_block(logits, largest, total)
    for start in range(FULL, WIDTH, BLOCK):
        logits = tl.load(row_ptr + start + cols, mask=start + cols < WIDTH, other=0.0).to(tl.float32)
        logits = tl.where(start + cols < V, logits, -1e30)  # padded columns must not enter the sum
        largest, total = _add_block(logits, largest, total)
    row_largest = tl.max(largest, axis=0)
    return row_largest, tl.sum(total * tl.math.exp2((largest - row_largest) * LOG2E), axis=0)


@triton.jit
def _add_block(logits, largest, total):
    """Add one more block to the running maximum and sum of each vector."""
    new_largest = tl.maximum(largest, tl.max(logits, axis=1))
    added = tl.sum(tl.math.exp2((logits - new_largest[:, None]) * LOG2E), axis=1)
    return new_largest, total * tl.math.exp2((largest - new_largest) * LOG2E) + added


@triton.jit
def _row_loss(row_ptr, target, largest, total, V: tl.constexpr):
    """Return the loss of one row: 0 if it is ignored, nan for a target out of range, which must not be read."""
    in_range = (target >= 0) & (target < V)
    at_target = tl.load(row_ptr + tl.where(in_range, target, 0)).to(tl.float32)
    loss = (largest - at_target) + tl.math.log2(total) * LN2
    return tl.where(in_range, loss, tl.where(target == IGNORE_TARGET, 0.0, float("nan")))


@triton.jit
def _write_gradient(
    row_ptr,
    drow_ptr,
    target,
    largest,
    total,
    scale,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Write drow = scale * (softmax(row) - [column is target]), 0 past V; IN_PLACE: drow is row itself."""
    FULL: tl.constexpr = V // BLOCK * BLOCK
    in_range = (target >= 0) & (target < V)
    column = tl.where(in_range, target, 0)
    # exp2(-inf) = 0: an ignored row; nan marks a target out of range
    log2_total = tl.where(in_range, tl.math.log2(total), tl.where(target == IGNORE_TARGET, float("inf"), float("nan")))
    at_target = tl.math.exp2((tl.load(row_ptr + column).to(tl.float32) - largest) * LOG2E - log2_total)
    at_target = tl.where(in_range, at_target - 1.0, at_target) * scale
    if IN_PLACE:
        tl.debug_barrier()  # all threads have read row[target] before any of them overwrites it

    cols = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for start in range(0, FULL, BLOCK):
        logits = tl.load(row_ptr + start + cols, eviction_policy="evict_first").to(tl.float32)
        softmax = tl.math.exp2((logits - largest) * LOG2E - log2_total)
        tl.store(drow_ptr + start + cols, softmax * scale, cache_modifier=".cs")
    for start in range(FULL, WIDTH, BLOCK):
        logits = tl.load(row_ptr + start + cols, mask=start + cols < WIDTH, other=0.0).to(tl.float32)
        softmax = tl.math.exp2((logits - largest) * LOG2E - log2_total)
        softmax = tl.where(start + cols < V, softmax, 0.0)
        tl.store(drow_ptr + start + cols, softmax * scale, mask=start + cols < WIDTH)

    tl.debug_barrier()  # after the blocks, overwrite the one element that differs: no test per logit
    tl.store(drow_ptr + column, at_target)


@triton.jit
def _forward_kernel(
    logits_ptr,  # in  (N, WIDTH), rows row_stride apart
    targets_ptr,  # in  (N,) int64
    losses_ptr,  # out (N,) float32
    largest_ptr,  # out (N,) float32, or None without a backward
    total_ptr,  # out (N,) float32, or None
    row_stride,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the loss of one row and, for the backward, its two statistics."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * row_stride passes 2^31 at 42,691 rows of 50,304
    row_ptr = logits_ptr + row * row_stride
    largest, total = _row_statistics(row_ptr, V, WIDTH, BLOCK)
    tl.store(losses_ptr + row, _row_loss(row_ptr, tl.load(targets_ptr + row), largest, total, V))
    if largest_ptr is not None:
        tl.store(largest_ptr + row, largest)
        tl.store(total_ptr + row, total)


@triton.jit
def _backward_kernel(
    logits_ptr,  # in  (N, WIDTH), rows row_stride apart
    targets_ptr,  # in  (N,) int64
    largest_ptr,  # in  (N,)
    total_ptr,  # in  (N,)
    scale_ptr,  # in  (1,): dloss / n
    dlogits_ptr,  # out (N, WIDTH), contiguous
    row_stride,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row of dlogits."""
    row = tl.program_id(0).to(tl.int64)
    target, scale = tl.load(targets_ptr + row), tl.load(scale_ptr)
    largest, total = tl.load(largest_ptr + row), tl.load(total_ptr + row)
    row_ptr, drow_ptr = logits_ptr + row * row_stride, dlogits_ptr + row * WIDTH
    _write_gradient(row_ptr, drow_ptr, target, largest, total, scale, V, WIDTH, BLOCK, False)


@triton.jit
def _in_place_kernel(logits_ptr, targets_ptr, losses_ptr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row's loss (N,), and the gradient of the summed losses, which replaces logits (N, WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * WIDTH
    target = tl.load(targets_ptr + row)
    largest, total = _row_statistics(row_ptr, V, WIDTH, BLOCK)
    tl.store(losses_ptr + row, _row_loss(row_ptr, target, largest, total, V))
    _write_gradient(row_ptr, row_ptr, target, largest, total, 1.0, V, WIDTH, BLOCK, True)


# ---------------------------------------------------------------------------- operators


@torch.library.custom_op("gpt2::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, n, and the two statistics of each row."""
    _, _, largest, total = _cross_entropy_outputs(logits, targets, vocab_size)
    losses = torch.empty_like(largest)
    _launch(_forward_kernel, logits, targets, losses, largest, total, logits.stride(0), V=vocab_size)
    n = _rows_counted(targets)
    return losses.sum() / n, n, largest, total


@_cross_entropy.register_fake
def _cross_entropy_outputs(logits, targets, vocab_size):
    loss = logits.new_empty((), dtype=torch.float32)
    largest = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss), largest, torch.empty_like(largest)


def _launch(kernel, logits: Tensor, *others: Tensor | int | None, V: int) -> None:
    """Launch one program per row of logits, the first argument of every kernel."""
    N, width = logits.shape
    if N > 0:
        with common.device_guard(logits):
            launch = launch_parameters(width, common.architecture(logits))
            kernel[(N,)](logits, *others, V=V, WIDTH=width, **launch)


def _rows_counted(targets: Tensor) -> Tensor:
    """Return n, which stays on the device; at least 1, so that a batch without rows has a loss of 0, not nan."""
    return (targets != IGNORE).sum().clamp(min=1).float()


@torch.library.custom_op("gpt2::cross_entropy_backward", mutates_args=())
def _backward(scale: Tensor, logits: Tensor, targets: Tensor, largest: Tensor, total: Tensor, V: int) -> Tensor:
    dlogits = _backward_outputs(scale, logits, targets, largest, total, V)
    _launch(_backward_kernel, logits, targets, largest, total, scale, dlogits, logits.stride(0), V=V)
    return dlogits


@_backward.register_fake
def _backward_outputs(scale, logits, targets, largest, total, V):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


common.forbid_double_backward(_backward)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # only the loss has a gradient: allocate no zeros for the other outputs
    logits, targets, ctx.vocab_size = inputs
    ctx.save_for_backward(logits, targets, *output[1:])


def _gradient(ctx, dloss, _dn, _dlargest, _dtotal):
    common.refuse_tangents(dloss)
    logits, targets, n, largest, total = ctx.saved_tensors
    return _backward(dloss / n, logits, targets, largest, total, ctx.vocab_size), None, None


_cross_entropy.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("gpt2::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, n, and the gradients of the summed losses, dx and float32 dweight; empty unless wanted."""
    _, _, dx, dweight = _linear_cross_entropy_outputs(x, weight, targets, vocab_size, with_gradient)
    N, width, chunk = len(x), len(weight), CHUNK_BYTES // x.element_size()
    if N == 0:
        dweight.zero_()
    losses, buffer = x.new_empty(N, dtype=torch.float32), x.new_empty(min(N, chunk), width)
    weight = weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            logits = torch.mm(x[rows], weight.T, out=buffer[: rows.stop - start])
            if not with_gradient:
                _launch(_forward_kernel, logits, targets[rows], losses[rows], None, None, width, V=vocab_size)
                continue
            _launch(_in_place_kernel, logits, targets[rows], losses[rows], V=vocab_size)
            torch.mm(logits, weight, out=dx[rows])
            _add_product(dweight, logits.T, x[rows], keep=start > 0)
    n = _rows_counted(targets)
    return losses.sum() / n, n, dx, dweight


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_outputs(x, weight, targets, vocab_size, with_gradient):
    loss = x.new_empty((), dtype=torch.float32)
    dx = torch.empty_like(x) if with_gradient else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if with_gradient else 0, dtype=torch.float32)
    return loss, torch.empty_like(loss), dx, dweight


def _add_product(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """
    Set total = a @ b, plus total if `keep`, accumulated in float32 whatever the dtype of a and b.

    On NVIDIA's GPUs, 16-bit operands are multiplied straight into float32. aten::addmm.dtype_out has no CPU kernel,
    takes a float32 total from PyTorch 2.10 on, and is not documented for AMD GPUs, so those use float32 operands.
    """
    beta = 1 if keep else 0
    if a.is_cuda and not torch.version.hip and a.dtype != torch.float32:
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)


def _linear_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # allocate no zeros the size of dx and dweight
    ctx.weight_dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _linear_gradient(ctx, dloss, _dn, _ddx, _ddweight):
    n, dx, dweight = ctx.saved_tensors
    scale = (dloss / n).view(1)  # not a scalar, which would be rounded to the dtype of dx first
    return (dx * scale).to(dx.dtype), (dweight * scale).to(ctx.weight_dtype), None, None, None


_linear_cross_entropy.register_autograd(_linear_gradient, setup_context=_linear_save)


# ------------------------------------------------------------------------------- public


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """
    Return the mean cross-entropy of the first vocab_size columns; differentiable in logits, which are not changed.

    logits:  (N, W), W >= vocab_size, float32, float16 or bfloat16; copied unless the elements of a row are adjacent
    targets: (N,) int64; rows with -100 are ignored
    Return a float32 scalar in nats per token; 0, with gradients of 0, if no row counts.
    A target out of range makes the loss and the gradient of its row nan.
    Raise ValueError for other dtypes and shapes, and for mixed devices.
    """
    common.check_tensors(logits=logits)
    _check("logits", logits, logits.shape[-1], targets, vocab_size)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return _cross_entropy(logits, targets.contiguous(), vocab_size)[0]


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """
    Return cross_entropy(x @ weight.T, targets, vocab_size), computed in chunks of tokens; differentiable in x, weight.

    x:       (N, C), float32, float16 or bfloat16; cast to autocast's dtype if that is enabled
    weight:  (W, C), W >= vocab_size, any of these dtypes; rows past vocab_size get a gradient of 0
    targets: (N,) int64; rows with -100 are ignored
    Return a float32 scalar in nats per token; 0, with gradients of 0, if no row counts.
    The gradients are computed in the forward, unless torch.no_grad() or the tensors ask for none.
    Raise ValueError for other dtypes and shapes, and for mixed devices.
    """
    common.check_tensors(x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be (N, C) and weight (W, C), got {tuple(x.shape)} and {tuple(weight.shape)}")
    _check("x", x, weight.shape[0], targets, vocab_size)
    with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    x = x.to(common.autocast_dtype(x)).contiguous()
    return _linear_cross_entropy(x, weight.contiguous(), targets.contiguous(), vocab_size, with_gradient)[0]


def _check(name: str, rows: Tensor, width: int, targets: Tensor, vocab_size: int) -> None:
    if rows.dim() != 2 or targets.shape != rows.shape[:1]:
        got = f"got {tuple(rows.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"{name} must be two-dimensional with one target per row, {got}")
    if targets.dtype != torch.int64 or targets.device != rows.device:
        raise ValueError(f"targets must be int64 on {rows.device}, got {targets.dtype} on {targets.device}")
    if not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size is {vocab_size}: use 1 to {width}, the number of columns")
