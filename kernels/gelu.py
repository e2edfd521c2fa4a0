"""
The first half of a GPT-2 feed-forward layer: matrix product, bias, GELU in its tanh form; forward and backward.

    u = sqrt(2 / pi) * (z + 0.044715 * z^3)      z = x @ weight.T + bias
    y = 0.5 * z * (1 + tanh(u))

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, https://arxiv.org/abs/1606.08415
"""

import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------ PyTorch


def linear_gelu_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: (..., C); weight: (4C, C); bias: (4C,). Returns gelu_tanh(x @ weight.T + bias): (..., 4C)."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
