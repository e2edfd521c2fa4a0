"""
Layer normalisation over the last dimension, alone or behind the residual addition; forward and backward.

For one row x of C numbers, with gain w and offset b:

    mean = sum(x) / C
    rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)          reciprocal standard deviation
    xhat = (x - mean) * rstd
    y    = w * xhat + b

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
"""

import torch.nn.functional as F
from torch import Tensor

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
