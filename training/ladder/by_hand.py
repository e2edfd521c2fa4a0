"""
Layers in NumPy whose backward passes are written by hand.

A layer has `parameters`, arrays; `forward(x, training)` keeps what `backward` needs; `backward(dy)`, given the
gradient of the loss with respect to the output, sets `gradients`, one per parameter, and returns that of the input.
"""

import numpy as np
from numpy import ndarray

MOMENTUM = 0.001  # of BatchNorm's running statistics: small, since batches of 32 are noisy
EPS = 1e-5


class Layer:
    """Hold a layer's parameters, none by default, and their gradients."""

    def __init__(self, *parameters: ndarray):
        self.parameters, self.gradients = [*parameters], []


class Embedding(Layer):
    """table: (V, C); x: (...) int64 -> (..., C)."""

    def forward(self, x: ndarray, training: bool) -> ndarray:
        self.x = x
        return self.parameters[0][x]

    def backward(self, dy: ndarray) -> None:
        V, C = self.parameters[0].shape
        one_hot = (self.x.reshape(-1, 1) == np.arange(V)).astype(dy.dtype)
        self.gradients = [one_hot.T @ dy.reshape(-1, C)]


class Flatten(Layer):
    """(B, T, C) -> (B, T / n, n C), or (B, n C) if n is T: n neighbors become one."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: ndarray, training: bool) -> ndarray:
        self.shape = B, T, C = x.shape
        return x.reshape(B, T // self.n, self.n * C) if self.n < T else x.reshape(B, T * C)

    def backward(self, dy: ndarray) -> ndarray:
        return dy.reshape(self.shape)


class Linear(Layer):
    """y = x @ weight + bias. weight: (n, m); bias: (m,), may be absent; x: (..., n)."""

    def forward(self, x: ndarray, training: bool) -> ndarray:
        self.x, (weight, *bias) = x, self.parameters
        return x @ weight + bias[0] if bias else x @ weight

    def backward(self, dy: ndarray) -> ndarray:
        weight, *bias = self.parameters
        x, rows = self.x.reshape(-1, weight.shape[0]), dy.reshape(-1, weight.shape[1])
        self.gradients = [x.T @ rows, rows.sum(0)][: 1 + len(bias)]
        return dy @ weight.T


class BatchNorm(Layer):
    """
    y = gain * (x - mean) / sqrt(var + EPS) + bias, with the mean and variance of each channel over the batch.

    gain, bias: (C,); x: (B, C) or (B, T, C). Evaluation takes running statistics.
    per_position: average over the batch alone, also in (B, T, C): a published bug, kept to show what it costs
    """

    def __init__(self, gain: ndarray, bias: ndarray, per_position: bool = False):
        super().__init__(gain, bias)
        self.mean, self.var, self.per_position = np.zeros_like(gain), np.ones_like(gain), per_position

    def forward(self, x: ndarray, training: bool) -> ndarray:
        mean, var = self.mean, self.var
        if training:
            self.axes = 0 if self.per_position else tuple(range(x.ndim - 1))
            mean = x.mean(self.axes, keepdims=True)
            self.n = x.size // mean.size
            var = np.square(x - mean).sum(self.axes, keepdims=True) / (self.n - 1)
            self.mean = (1 - MOMENTUM) * self.mean + MOMENTUM * mean
            self.var = (1 - MOMENTUM) * self.var + MOMENTUM * var
        self.rstd = 1 / np.sqrt(var + x.dtype.type(EPS))
        self.xhat = (x - mean) * self.rstd
        gain, bias = self.parameters
        return gain * self.xhat + bias

    def backward(self, dy: ndarray) -> ndarray:
        rows = tuple(range(dy.ndim - 1))
        self.gradients = [(dy * self.xhat).sum(rows), dy.sum(rows)]
        dxhat = self.parameters[0] * dy
        mean = dxhat.mean(self.axes, keepdims=True)
        slope = (dxhat * self.xhat).sum(self.axes, keepdims=True) / (self.n - 1)
        return self.rstd * (dxhat - mean - self.xhat * slope)


class Tanh(Layer):
    """y = tanh(x)."""

    def forward(self, x: ndarray, training: bool) -> ndarray:
        self.y = np.tanh(x)
        return self.y

    def backward(self, dy: ndarray) -> ndarray:
        return dy * (1 - self.y * self.y)


def cross_entropy(logits: ndarray, targets: ndarray) -> tuple[float, ndarray]:
    """Return the mean loss in nats and its gradient with respect to the logits. logits: (B, V); targets: (B,) int64."""
    exp = np.exp(logits - logits.max(1, keepdims=True))
    p, rows = exp / exp.sum(1, keepdims=True), np.arange(len(targets))
    loss = -np.log(p[rows, targets]).mean()
    p[rows, targets] -= 1
    return float(loss), p / len(targets)


def forward(layers: list[Layer], x: ndarray, training: bool = False) -> ndarray:
    for layer in layers:
        x = layer.forward(x, training)
    return x


def descend(layers: list[Layer], x: ndarray, targets: ndarray, lr: float) -> float:
    """Take one step of gradient descent. Return the loss before it. x: (B, T) int64; targets: (B,) int64."""
    loss, dy = cross_entropy(forward(layers, x, training=True), targets)
    for layer in reversed(layers):
        dy = layer.backward(dy)
    for layer in layers:
        for parameter, gradient in zip(layer.parameters, layer.gradients, strict=True):
            parameter -= parameter.dtype.type(lr) * gradient
    return loss
