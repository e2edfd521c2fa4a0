"""
Rows of a weight by their index, with a gradient that has the same bits every time; not switchable.

    y = weight[tokens]
    dweight[row] = sum of dy over the tokens that are `row`

PyTorch's own backward on a GPU sorts the tokens and adds in a fixed order, in float32. torch.compile would replace it
by atomic additions, whose order changes from run to run. As a custom operator it stays the same call, compiled or not.

Source of the order: aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu of PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import common


@torch.library.custom_op("gpt2::embedding", mutates_args=())
def _embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, weight)


@_embedding.register_fake
def _embedding_output(weight, tokens):
    return weight.new_empty(*tokens.shape, weight.shape[1])


@torch.library.custom_op("gpt2::embedding_backward", mutates_args=())
def _backward(dy: Tensor, tokens: Tensor, rows: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, tokens, rows, -1, False)


@_backward.register_fake
def _backward_output(dy, tokens, rows):
    return dy.new_empty(rows, dy.shape[-1])


common.forbid_double_backward(_backward)


def _save(ctx, inputs, output):
    weight, tokens = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(tokens)


def _gradient(ctx, dy):
    return _backward(dy, *ctx.saved_tensors, ctx.rows), None


_embedding.register_autograd(_gradient, setup_context=_save)


def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """Return weight[tokens]: (..., C), differentiable in weight. weight: (rows, C); tokens: (...) int64."""
    return _embedding(weight, tokens)
