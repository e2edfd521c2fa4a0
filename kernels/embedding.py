"""
Rows of a weight by their index, with a gradient that has the same bits every time; not switchable.

    y = weight[tokens]
    dweight[row] = sum of dy over the tokens that are `row`

PyTorch's own backward on a GPU sorts the tokens once and adds the rows of each in order, in float32: ten at a time in
parallel, then these partial sums, so that a frequent token makes no long tail. torch.compile would replace it by atomic
additions, whose order changes from run to run. As a custom operator it stays the same call, compiled or not. It is not
a family of --kernels: there is no Triton version, and PyTorch's operations need the same order.

Adding the head's gradient of the tied weight in the same pass would save zeroing this one and reading it again, 8 bytes
per element of the weight if compiled: 0.31 GB, at least 0.15 ms of an A100's 217 per step of GPT-2 (124M). Autograd
adds the two itself, after both backward passes; to do it here, the head's weight would have to pass through this
operator, whose backward would write into a gradient that others may hold.

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


def _save(ctx, inputs, output):
    weight, tokens = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(tokens)


def _gradient(ctx, dy):
    if common.has_tangent(dy):  # custom_op has no rule for it: it would get lost
        return torch.ops.aten.embedding_dense_backward(dy, *ctx.saved_tensors, ctx.rows, -1, False), None
    return _backward(dy, *ctx.saved_tensors, ctx.rows), None


def _save_tokens(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _second_gradient(ctx, ddweight):  # both are linear: each is the other's gradient
    return embedding(ddweight, *ctx.saved_tensors), None, None


_embedding.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_second_gradient, setup_context=_save_tokens)


def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """Return weight[tokens]: (..., C), differentiable in weight. weight: (rows, C); tokens: (...) int64."""
    if common.has_tangent(weight):  # as above
        return F.embedding(tokens, weight)
    return _embedding(weight, tokens)
