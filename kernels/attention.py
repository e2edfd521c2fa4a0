"""
Causal self-attention from the packed projection; forward and backward.

For one head with queries, keys and values q, k, v, each (T, D):

    s = q @ k.T / sqrt(D)                  D channels per head; keys after the query are masked
    y = softmax(s) @ v
    lse = log(sum(exp(s)))                 per row

The forward loops over blocks of keys, those of the diagonal first. Per row it keeps the largest s so far, the sum of
exp(s - largest) and the sum of exp(s - largest) * v, and rescales both sums when a larger s appears; no (T, T) tensor
ever exists.
Given dy = dL/dy, with p = exp(s - lse) recomputed:

    dv    = p.T @ dy
    dp    = dy @ v.T
    delta = sum over columns of p * dp  =  sum over channels of dy * y
    ds    = p * (dp - delta)
    dq    = ds @ k / sqrt(D)
    dk    = ds.T @ q / sqrt(D)

Two kernels: one sums dq over the keys and writes delta, one sums dk and dv over the queries. That takes seven matrix
products instead of the five of one kernel with atomic additions, and gives the same bits every time. Blocks above the
diagonal are skipped; only those on it are masked. q, k and v are read from the packed projection, and their gradients
written to a packed one: nothing is transposed, copied or concatenated.

The gradient of the bias (3C,) that the projection added to qkv is dqkv summed over B and T, a pass of its own. Here
the dq kernel sums for it: dq; and dy, which gives the sum of dv, as each row of p adds up to 1. The sum of dk is 0, as
softmax ignores what is added to all scores of a row.

Saved: qkv, y and lse.
Elements moved per token, at least: forward 3C in and C out; dq 5C in and C out; dk and dv 4C in and 2C out. Rereads,
of k and v per block of queries and of q and dy per block of keys, should mostly hit the L2 cache.

Source: Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import common
from kernels.common import tl, triton

LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
MAX_HEADS = 65_535  # sequences times heads per launch: CUDA's limit on the second dimension of a grid


class Tile(NamedTuple):
    """The block that a program processes at a time, its warps, and how many blocks of its loop are in flight."""

    queries: int  # BLOCK_Q
    keys: int  # BLOCK_K
    warps: int
    stages: int  # a third only if it costs no spill and no program on a multiprocessor


class Launch(NamedTuple):
    """The tile of a kernel on one GPU. Alternatives tried, with registers and spills: kernels/README.md."""

    even: Tile  # if its blocks divide T: no masks
    ragged: Tile  # if they do not


class Heads(NamedTuple):
    """The heads that a set of launches is for."""

    bits: int  # of the dtype
    max_channels: int  # BLOCK_D at most


LAUNCH = {  # kernel -> heads -> GPU -> launch
    "forward": {
        Heads(bits=16, max_channels=64): {
            "sm_80": Launch(even=Tile(128, 64, 4, 3), ragged=Tile(64, 64, 4, 3)),
            "sm_86": Launch(even=Tile(128, 64, 4, 3), ragged=Tile(64, 64, 4, 2)),
            "sm_90": Launch(even=Tile(128, 64, 8, 3), ragged=Tile(128, 64, 8, 3)),
            "sm_100": Launch(even=Tile(128, 64, 8, 3), ragged=Tile(64, 64, 4, 2)),
            "sm_120": Launch(even=Tile(128, 64, 4, 3), ragged=Tile(64, 64, 4, 2)),
        },
        Heads(bits=16, max_channels=128): {"sm_80": Launch(even=Tile(128, 64, 8, 2), ragged=Tile(128, 32, 8, 2))},
        Heads(bits=32, max_channels=128): {"sm_80": Launch(even=Tile(32, 16, 4, 2), ragged=Tile(32, 16, 4, 2))},
    },
    "backward_dq": {
        Heads(bits=16, max_channels=64): {
            "sm_80": Launch(even=Tile(128, 32, 4, 3), ragged=Tile(64, 32, 4, 2)),
            "sm_90": Launch(even=Tile(128, 64, 8, 3), ragged=Tile(128, 64, 8, 3)),
            "sm_120": Launch(even=Tile(128, 32, 4, 3), ragged=Tile(64, 32, 4, 3)),
        },
        Heads(bits=16, max_channels=128): {"sm_80": Launch(even=Tile(128, 32, 8, 2), ragged=Tile(64, 32, 8, 2))},
        Heads(bits=32, max_channels=128): {"sm_80": Launch(even=Tile(32, 16, 8, 2), ragged=Tile(32, 16, 8, 2))},
    },
    "backward_dkdv": {
        Heads(bits=16, max_channels=64): {
            "sm_80": Launch(even=Tile(32, 128, 4, 3), ragged=Tile(32, 64, 4, 3)),
            "sm_86": Launch(even=Tile(64, 128, 8, 3), ragged=Tile(32, 64, 4, 3)),
            "sm_90": Launch(even=Tile(32, 128, 4, 3), ragged=Tile(64, 64, 4, 3)),
            "sm_100": Launch(even=Tile(64, 128, 8, 2), ragged=Tile(64, 64, 4, 2)),
            "sm_120": Launch(even=Tile(64, 128, 8, 3), ragged=Tile(32, 64, 4, 3)),
        },
        Heads(bits=16, max_channels=128): {
            "sm_80": Launch(even=Tile(32, 128, 8, 2), ragged=Tile(32, 64, 8, 2)),
            "sm_120": Launch(even=Tile(64, 64, 8, 2), ragged=Tile(32, 64, 8, 2)),
        },
        Heads(bits=32, max_channels=128): {"sm_80": Launch(even=Tile(16, 32, 4, 2), ragged=Tile(16, 32, 4, 2))},
    },
}


def launch_parameters(kernel: str, T: int, D: int, dtype: torch.dtype, gpu: str) -> dict[str, int]:
    """Return the constants and options of one kernel of LAUNCH for sequences of T tokens and heads of D channels."""
    BLOCK_D = max(16, triton.next_power_of_2(D))  # tl.dot takes at least 16
    bits = 8 * dtype.itemsize
    fits = [heads for heads in LAUNCH[kernel] if heads.bits == bits and heads.max_channels >= BLOCK_D]
    even, ragged = common.for_architecture(LAUNCH[kernel][fits[0]], gpu)
    tile = even if T % max(even.queries, even.keys) == 0 else ragged
    EVEN = T % max(tile.queries, tile.keys) == 0
    blocks = {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys, "BLOCK_D": BLOCK_D, "EVEN": EVEN}
    return blocks | {"num_warps": tile.warps, "num_stages": tile.stages}


# ------------------------------------------------------------------------------ PyTorch


def causal_attention_torch(qkv: Tensor, n_head: int, dropout_p: float, bias: Tensor | None = None) -> Tensor:
    """qkv: (B, T, 3C), queries, keys and values side by side; bias: (3C,), for its gradient. Return y: (B, T, C)."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    qkv = qkv if bias is None else common.with_gradient_for(bias, qkv)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        qkv = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        y = _written_out(*qkv.reshape(3, B * n_head, T, C // n_head), dropout_p).view(qkv.shape[1:])
    else:
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2) for part in qkv.split(C, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)  # (B, H, T, D)
    return y.transpose(1, 2).reshape(B, T, C)


def _written_out(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Two matrix products on (B * H, T, D): in bfloat16 on a CPU, twice as fast as the fused call and its backward."""
    T, D = q.shape[-2:]
    future = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.baddbmm(future.expand(len(q), T, T), q, k.transpose(1, 2), alpha=1 / math.sqrt(D))
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


def causal_attention_reference(qkv: Tensor, n_head: int, dropout_p: float, bias: Tensor | None = None) -> Tensor:
    """Compute the forward above in the dtype it is given: in float64, the exact answer of the tests. No dropout."""
    qkv = qkv if bias is None else qkv + (bias - bias.detach())
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)
    s = q @ k.transpose(-2, -1) / math.sqrt(C // n_head)
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    return (s.masked_fill(future, float("-inf")).softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, C)


# ------------------------------------------------------------------------------ kernels
#
# In each, program_id(1) is the sequence b and the head h; the rows of a head are 3 * C elements apart in qkv, C in y.
# A tile is addressed as (int64 base of its block) + (offsets that do not change from block to block).
# "(x < limit) | EVEN" is a constant if no mask is needed, and the compiler drops it; likewise for D == BLOCK_D.


@triton.jit
def _add_keys(q, k, v, causal, largest_log2, total, y, scale_log2):
    """Add a block of keys to the running maximum, sum and output of BLOCK_Q queries; causal: None if all keys count."""
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")  # s = qk / sqrt(D); scale_log2 brings it into the exponent
    if causal is not None:
        qk = tl.where(causal, qk, -1e30)  # finite: every row has a key in the first block of the diagonal
    new_largest_log2 = tl.maximum(largest_log2, tl.max(qk, axis=1) * scale_log2)
    p = tl.math.exp2(qk * scale_log2 - new_largest_log2[:, None])
    shrink = tl.math.exp2(largest_log2 - new_largest_log2)
    y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
    return new_largest_log2, total * shrink + tl.sum(p, axis=1), y


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    qkv_ptr,  # in  (B, T, 3, H, D)
    y_ptr,  # out (B, T, H, D)
    lse_ptr,  # out (B, H, T) float32
    scale,  # 1 / sqrt(D)
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program: BLOCK_Q rows of y and lse, for one head of one sequence."""
    T = tl.multiple_of(T, 16) if EVEN else T
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q  # the longest rows first
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    queries, keys, channels = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    real_query = (queries < T - start) | EVEN
    real_channel = (channels < D) | (D == BLOCK_D)
    inside = real_query[:, None] & real_channel[None, :]

    qkv_base = qkv_ptr + b * T * (3 * H * D) + h * D
    q_tile = qkv_base + start.to(tl.int64) * (3 * H * D) + (queries[:, None] * (3 * H * D) + channels[None, :])
    q = tl.load(q_tile, mask=inside, other=0.0)
    k_base = qkv_base + start.to(tl.int64) * (3 * H * D) + H * D
    v_base = k_base + H * D
    key_offsets = keys[:, None] * (3 * H * D) + channels[None, :]
    scale_log2 = scale * LOG2E

    largest_log2 = tl.full((BLOCK_Q,), -1e30, dtype=tl.float32)  # finite: largest - largest must be 0
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    y = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    # the diagonal: keys start + ahead ...; first, as a loop that may run no round keeps ptxas from overlapping wgmma
    for ahead in range(0, BLOCK_Q, BLOCK_K):
        real_key = ((keys < T - start - ahead) | EVEN)[:, None] & real_channel[None, :]
        k = tl.load(k_base + key_offsets, mask=real_key, other=0.0)
        v = tl.load(v_base + key_offsets, mask=real_key, other=0.0)
        causal = queries[:, None] >= (ahead + keys)[None, :]
        largest_log2, total, y = _add_keys(q, k, v, causal, largest_log2, total, y, scale_log2)
        k_base += BLOCK_K * 3 * H * D
        v_base += BLOCK_K * 3 * H * D
    k_base, v_base = qkv_base + H * D, qkv_base + 2 * H * D
    for _ in range(0, start, BLOCK_K):  # keys before the first query: all real, all seen
        k = tl.load(k_base + key_offsets, mask=real_channel[None, :], other=0.0)
        v = tl.load(v_base + key_offsets, mask=real_channel[None, :], other=0.0)
        largest_log2, total, y = _add_keys(q, k, v, None, largest_log2, total, y, scale_log2)
        k_base += BLOCK_K * 3 * H * D
        v_base += BLOCK_K * 3 * H * D

    lse = (largest_log2 + tl.math.log2(total)) * LN2  # a compiled division errs by up to two units
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * T + start + queries, lse, mask=real_query)
    y_tile = y_ptr + (b * T + start) * (H * D) + h * D + (queries[:, None] * (H * D) + channels[None, :])
    tl.store(y_tile, y / total[:, None], mask=inside)


@triton.jit
def _add_dq(q, dy, k, v, causal, lse_log2, delta, dq, scale_log2):
    """Add a block of keys to dq of BLOCK_Q queries; causal: None if all keys count."""
    p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse_log2[:, None])
    if causal is not None:
        p = tl.where(causal, p, 0.0)
    ds = p * (tl.dot(dy, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _store_sum(sum_ptr, x, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the sum of the ROWS of x, from tensor cores: 16 copies of it, the fewest that tl.dot makes, one kept."""
    ones = tl.full((16, ROWS), 1.0, dtype=tl.float32).to(x.dtype)
    total = tl.dot(ones, x, input_precision="ieee")
    copies, channels = tl.arange(0, 16)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(sum_ptr + channels + 0 * copies, total, mask=(copies == 0) & (channels < D))


@triton.jit(do_not_specialize=["T"])
def _backward_dq_kernel(
    qkv_ptr,  # in  (B, T, 3, H, D)
    y_ptr,  # in  (B, T, H, D)
    dy_ptr,  # in  (B, T, H, D)
    lse_ptr,  # in  (B, H, T)
    delta_ptr,  # out (B, H, T) float32
    dqkv_ptr,  # out (B, T, 3, H, D): the first third
    dbias_parts_ptr,  # out (B, H, blocks, 2, D) float32, or None: the sums of dq and dy
    scale,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program: BLOCK_Q rows of dq and delta, for one head of one sequence."""
    T = tl.multiple_of(T, 16) if EVEN else T
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q  # the longest rows first
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    queries, keys, channels = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    real_query = (queries < T - start) | EVEN
    real_channel = (channels < D) | (D == BLOCK_D)
    inside = real_query[:, None] & real_channel[None, :]

    qkv_base = qkv_ptr + b * T * (3 * H * D) + h * D
    q_offsets = start.to(tl.int64) * (3 * H * D) + (queries[:, None] * (3 * H * D) + channels[None, :])
    y_offsets = (b * T + start) * (H * D) + h * D + (queries[:, None] * (H * D) + channels[None, :])
    rows = tl.program_id(1).to(tl.int64) * T + start + queries
    q = tl.load(qkv_base + q_offsets, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + y_offsets, mask=inside, other=0.0)
    y = tl.load(y_ptr + y_offsets, mask=inside, other=0.0)
    lse_log2 = tl.load(lse_ptr + rows, mask=real_query, other=0.0) * LOG2E
    if dy.dtype == tl.float32:  # a product fused with the sum's first shuffle would give its two threads different sums
        delta = tl.sum(tl.fma(dy, y, 0.0), axis=1)
    else:
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    tl.store(delta_ptr + rows, delta, mask=real_query)
    k_base = qkv_base + start.to(tl.int64) * (3 * H * D) + H * D
    v_base = k_base + H * D
    key_offsets = keys[:, None] * (3 * H * D) + channels[None, :]
    scale_log2 = scale * LOG2E

    dq = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    # the diagonal: keys start + ahead ...; first, as a loop that may run no round keeps ptxas from overlapping wgmma
    for ahead in range(0, BLOCK_Q, BLOCK_K):
        real_key = ((keys < T - start - ahead) | EVEN)[:, None] & real_channel[None, :]
        k = tl.load(k_base + key_offsets, mask=real_key, other=0.0)
        v = tl.load(v_base + key_offsets, mask=real_key, other=0.0)
        causal = queries[:, None] >= (ahead + keys)[None, :]
        dq = _add_dq(q, dy, k, v, causal, lse_log2, delta, dq, scale_log2)
        k_base += BLOCK_K * 3 * H * D
        v_base += BLOCK_K * 3 * H * D
    k_base, v_base = qkv_base + H * D, qkv_base + 2 * H * D
    for _ in range(0, start, BLOCK_K):  # keys before the first query: all real, all seen
        k = tl.load(k_base + key_offsets, mask=real_channel[None, :], other=0.0)
        v = tl.load(v_base + key_offsets, mask=real_channel[None, :], other=0.0)
        dq = _add_dq(q, dy, k, v, None, lse_log2, delta, dq, scale_log2)
        k_base += BLOCK_K * 3 * H * D
        v_base += BLOCK_K * 3 * H * D

    dq = (dq * scale).to(q.dtype)
    tl.store(dqkv_ptr + b * T * (3 * H * D) + h * D + q_offsets, dq, mask=inside)
    if dbias_parts_ptr is not None:  # rows past T are 0 in dq and dy
        part = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (2 * D)
        _store_sum(dbias_parts_ptr + part, dq, D, BLOCK_Q, BLOCK_D)
        _store_sum(dbias_parts_ptr + part + D, dy, D, BLOCK_Q, BLOCK_D)


@triton.jit
def _add_dkdv(q, dy, k, v, causal, lse_log2, delta, dk, dv, scale_log2):
    """Add a block of queries to dk and dv of BLOCK_K keys; p and ds are transposed, (BLOCK_K, BLOCK_Q)."""
    p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse_log2[None, :])
    if causal is not None:
        p = tl.where(causal, p, 0.0)
    dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(dy), input_precision="ieee") - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["T"])
def _backward_dkdv_kernel(
    qkv_ptr,  # in  (B, T, 3, H, D)
    dy_ptr,  # in  (B, T, H, D)
    lse_ptr,  # in  (B, H, T)
    delta_ptr,  # in  (B, H, T)
    dqkv_ptr,  # out (B, T, 3, H, D): the second and last third
    scale,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program: BLOCK_K rows of dk and dv, for one head of one sequence."""
    T = tl.multiple_of(T, 16) if EVEN else T
    start = tl.program_id(0) * BLOCK_K  # the first key, and the first query that sees it
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    queries, keys, channels = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    real_channel = (channels < D) | (D == BLOCK_D)
    inside = ((keys < T - start) | EVEN)[:, None] & real_channel[None, :]

    q_base = qkv_ptr + (b * T + start) * (3 * H * D) + h * D
    dy_base = dy_ptr + (b * T + start) * (H * D) + h * D
    row_base = tl.program_id(1).to(tl.int64) * T + start
    lse_base, delta_base = lse_ptr + row_base, delta_ptr + row_base
    key_offsets = keys[:, None] * (3 * H * D) + channels[None, :]
    q_offsets = queries[:, None] * (3 * H * D) + channels[None, :]
    dy_offsets = queries[:, None] * (H * D) + channels[None, :]
    k = tl.load(q_base + H * D + key_offsets, mask=inside, other=0.0)
    v = tl.load(q_base + 2 * H * D + key_offsets, mask=inside, other=0.0)
    scale_log2 = scale * LOG2E

    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for ahead in range(0, BLOCK_K, BLOCK_Q):  # the diagonal: queries start + ahead ...
        real_query = (queries < T - start - ahead) | EVEN
        real = real_query[:, None] & real_channel[None, :]
        q = tl.load(q_base + q_offsets, mask=real, other=0.0)
        dy = tl.load(dy_base + dy_offsets, mask=real, other=0.0)
        # a query past T has q = dy = delta = 0, and so adds p * 0 to dv and p * (0 - 0) to dk
        lse_log2 = tl.load(lse_base + queries, mask=real_query, other=0.0) * LOG2E
        delta = tl.load(delta_base + queries, mask=real_query, other=0.0)
        causal = (ahead + queries)[None, :] >= keys[:, None]
        dk, dv = _add_dkdv(q, dy, k, v, causal, lse_log2, delta, dk, dv, scale_log2)
        q_base += BLOCK_Q * 3 * H * D
        dy_base += BLOCK_Q * H * D
        lse_base += BLOCK_Q
        delta_base += BLOCK_Q
    for first in range(start + BLOCK_K, T, BLOCK_Q):  # queries after the last key: all see all of them
        real_query = (queries < T - first) | EVEN
        real = real_query[:, None] & real_channel[None, :]
        q = tl.load(q_base + q_offsets, mask=real, other=0.0)
        dy = tl.load(dy_base + dy_offsets, mask=real, other=0.0)
        lse_log2 = tl.load(lse_base + queries, mask=real_query, other=0.0) * LOG2E
        delta = tl.load(delta_base + queries, mask=real_query, other=0.0)
        dk, dv = _add_dkdv(q, dy, k, v, None, lse_log2, delta, dk, dv, scale_log2)
        q_base += BLOCK_Q * 3 * H * D
        dy_base += BLOCK_Q * H * D
        lse_base += BLOCK_Q
        delta_base += BLOCK_Q

    dk_base = dqkv_ptr + (b * T + start) * (3 * H * D) + H * D + h * D
    tl.store(dk_base + key_offsets, dk * scale, mask=inside)
    tl.store(dk_base + H * D + key_offsets, dv, mask=inside)


# ---------------------------------------------------------------------------- operators


@torch.library.custom_op("gpt2::causal_attention", mutates_args=())
def _causal_attention(qkv: Tensor, bias: Tensor | None, n_head: int) -> tuple[Tensor, Tensor]:
    y, lse = _causal_attention_outputs(qkv, bias, n_head)
    _launch(_forward_kernel, "forward", (qkv, y, lse), qkv, n_head)
    return y, lse


@_causal_attention.register_fake
def _causal_attention_outputs(qkv, bias, n_head):
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return qkv.new_empty(B, T, C), qkv.new_empty(B, n_head, T, dtype=torch.float32)


@torch.library.custom_op("gpt2::causal_attention_backward", mutates_args=())
def _backward(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, n_head: int, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Return dqkv; and float32 dbias, empty unless wanted."""
    dqkv, dbias = _backward_outputs(dy, qkv, y, lse, n_head, with_bias)
    delta, dbias_parts = torch.empty_like(lse), None
    if with_bias:
        B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3 // n_head
        block = launch_parameters("backward_dq", T, D, qkv.dtype, common.architecture(qkv))["BLOCK_Q"]
        dbias_parts = lse.new_empty(B, n_head, triton.cdiv(T, block), 2, D)
    # first dq: it writes delta
    _launch(_backward_dq_kernel, "backward_dq", (qkv, y, dy, lse, delta, dqkv, dbias_parts), qkv, n_head)
    _launch(_backward_dkdv_kernel, "backward_dkdv", (qkv, dy, lse, delta, dqkv), qkv, n_head)
    if with_bias:
        thirds = dbias.zero_().view(3, n_head, D)
        thirds[::2] = dbias_parts.sum((0, 2)).transpose(0, 1)
    return dqkv, dbias


@_backward.register_fake
def _backward_outputs(dy, qkv, y, lse, n_head, with_bias):
    return torch.empty_like(qkv), lse.new_empty(qkv.shape[2] if with_bias else 0)


def _launch(kernel, name: str, tensors: tuple[Tensor | None, ...], qkv: Tensor, n_head: int) -> None:
    """Launch a kernel on tensors whose first dimension is the sequence, as few times as MAX_HEADS allows."""
    B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3 // n_head
    if qkv.numel() == 0:
        return
    launch = launch_parameters(name, T, D, qkv.dtype, common.architecture(qkv))
    blocks = triton.cdiv(T, launch["BLOCK_K" if name == "backward_dkdv" else "BLOCK_Q"])
    sequences = MAX_HEADS // n_head
    with common.device_guard(qkv):
        for start in range(0, B, sequences):
            part = [None if tensor is None else tensor[start : start + sequences] for tensor in tensors]
            kernel[(blocks, len(part[0]) * n_head)](*part, 1 / math.sqrt(D), T, H=n_head, D=D, **launch)


common.forbid_double_backward(_backward)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # lse has no gradient: allocate no zeros for it
    qkv, bias, ctx.n_head = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qkv, *output)


def _gradient(ctx, dy, _dlse):
    common.refuse_tangents(dy)
    with_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    dqkv, dbias = _backward(dy.contiguous(), *ctx.saved_tensors, ctx.n_head, with_bias)
    return dqkv, dbias.to(ctx.bias_dtype) if with_bias else None, None


_causal_attention.register_autograd(_gradient, setup_context=_save)


# ------------------------------------------------------------------------------- public


def unsupported(D: int | None, dropout_p: float) -> str:
    """Return why the kernels cannot do heads of D channels (None: not checked) with this dropout, or "" if they can."""
    if dropout_p != 0:
        return f"the attention kernel has no dropout, and dropout is {dropout_p}"
    if D is not None and not 16 <= D <= 128:
        return f"the attention kernel takes heads of 16 to 128 channels, and a head has {D}"
    return ""


def causal_attention(qkv: Tensor, n_head: int, dropout_p: float, bias: Tensor | None = None) -> Tensor:
    """
    Return softmax(q @ k.T / sqrt(D)) @ v, each query with the keys up to its own; differentiable in qkv and bias.

    qkv:       (B, T, 3C), queries, keys and values side by side; float32, float16 or bfloat16, cast to autocast's dtype
               if that is enabled; copied unless contiguous
    n_head:    H; C = H * D with D from 16 to 128 channels per head
    dropout_p: 0, since the kernel has no dropout
    bias:      (3C,), which the projection added to qkv, detached: only its gradient is made here; None: no gradient
    Return y: (B, T, C), in the dtype of qkv or of autocast; sums and softmax are in float32.
    Raise ValueError for any other dropout, head size, shape or dtype.
    """
    common.check_tensors(qkv=qkv, bias=qkv if bias is None else bias)
    if qkv.dim() != 3 or qkv.shape[2] % (3 * n_head) != 0:
        raise ValueError(f"qkv must be (B, T, 3C) with C a multiple of n_head {n_head}, got {tuple(qkv.shape)}")
    if reason := unsupported(qkv.shape[2] // (3 * n_head), dropout_p):
        raise ValueError(f"{reason}: leave attention to PyTorch with --kernels layernorm,gelu,cross_entropy")
    if bias is not None and bias.shape != qkv.shape[2:]:
        raise ValueError(f"bias must be ({qkv.shape[2]},), got {tuple(bias.shape)}")
    return _causal_attention(qkv.to(common.autocast_dtype(qkv)).contiguous(), bias, n_head)[0]
