"""
Causal self-attention from the packed projection; forward and backward.

    s = q @ k.T / sqrt(D)                  D channels a head; keys after the query are left out
    y = softmax(s) @ v

Source: Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------ PyTorch


def causal_attention_torch(qkv: Tensor, n_head: int, dropout_p: float) -> Tensor:
    """qkv: (B, T, 3C), queries, keys and values side by side. Returns y: (B, T, C)."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        y = _written_out(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), dropout_p).view(q.shape)
    else:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C)


def _written_out(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Two matrix products on (B * H, T, D): in bfloat16 on a CPU, twice as fast as the fused call and its backward."""
    T, D = q.shape[-2:]
    future = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.baddbmm(future.expand(len(q), T, T), q, k.transpose(1, 2), alpha=1 / math.sqrt(D))
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v
