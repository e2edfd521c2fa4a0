"""
Cross-entropy of a softmax over the vocabulary, alone or together with the output head; forward and backward.

For one row of logits and its target t, over the V real columns (padded ones beyond V are left out):

    lse  = log(sum(exp(logits)))
    loss = lse - logits[t]                 mean over the rows, in nats per token; target -100 leaves a row out

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, https://arxiv.org/abs/1805.02867
"""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target with this value adds nothing to the loss: PyTorch's own default

# ------------------------------------------------------------------------------ PyTorch


def cross_entropy_torch(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """logits: (N, >= vocab_size); targets: (N,) int64. Returns the mean loss, a float32 scalar in nats per token."""
    return F.cross_entropy(logits[:, :vocab_size].float(), targets, ignore_index=IGNORE)


def linear_cross_entropy_torch(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """x: (N, C); weight: (>= vocab_size, C); targets: (N,) int64. Returns the mean loss, a float32 scalar."""
    return cross_entropy_torch(F.linear(x, weight), targets, vocab_size)
