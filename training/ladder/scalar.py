"""Autograd for single numbers: every operation remembers its inputs and the derivative with respect to each."""

import math
import random
from collections.abc import Callable

# a neuron with two inputs: x1, w1, x2, w2, bias; its output is sqrt(1/2), and the gradients are round numbers
NEURON = (2.0, -3.0, 0.0, 1.0, 6.8813735870195432)
INPUTS = [(2.0, 3.0, -1.0), (3.0, -1.0, 0.5), (0.5, 1.0, 1.0), (1.0, 1.0, -1.0)]
TARGETS = [1.0, -1.0, -1.0, 1.0]


class Value:
    """A number, how it was computed, and after `backward` on a result, that result's derivative with respect to it."""

    def __init__(self, data: float, inputs: tuple["tuple[Value, float]", ...] = ()):
        self.data, self.inputs, self.grad = data, inputs, 0.0  # inputs: (value, local derivative)

    def __add__(self, other: "Value") -> "Value":
        return Value(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other: "Value") -> "Value":
        return Value(self.data * other.data, ((self, other.data), (other, self.data)))

    def __sub__(self, other: "Value") -> "Value":
        return Value(self.data - other.data, ((self, 1.0), (other, -1.0)))

    def square(self) -> "Value":
        return Value(self.data**2, ((self, 2 * self.data),))

    def tanh(self) -> "Value":
        y = math.tanh(self.data)
        return Value(y, ((self, 1 - y * y),))

    def backward(self) -> None:
        """Add d self / d v to the grad of every value v that self was computed from, itself included."""
        order, seen = [], set()

        def visit(value: Value) -> None:
            if value not in seen:
                seen.add(value)
                for source, _ in value.inputs:
                    visit(source)
                order.append(value)

        visit(self)
        self.grad = 1.0
        for value in reversed(order):  # a value comes after everything that was computed from it
            for source, derivative in value.inputs:
                source.grad += derivative * value.grad


def neuron() -> tuple[float, list[float]]:
    """Return the output of tanh(x1 w1 + x2 w2 + b) and its gradients with respect to x1, w1, x2, w2, b."""
    x1, w1, x2, w2, b = values = [*map(Value, NEURON)]
    output = (x1 * w1 + x2 * w2 + b).tanh()
    output.backward()
    return output.data, [value.grad for value in values]


class MLP:
    """Layers of tanh neurons; `parameters` holds weights and biases, uniform in (-1, 1)."""

    def __init__(self, sizes: tuple[int, ...], rng: random.Random):
        def draw() -> Value:
            return Value(rng.uniform(-1, 1))

        shapes = zip(sizes, sizes[1:], strict=False)
        self.layers = [[([draw() for _ in range(n)], draw()) for _ in range(m)] for n, m in shapes]
        self.parameters = [p for layer in self.layers for weights, bias in layer for p in (*weights, bias)]

    def __call__(self, x: tuple[float, ...]) -> list[Value]:
        y = [*map(Value, x)]
        for layer in self.layers:
            y = [sum((w * v for w, v in zip(ws, y, strict=True)), start=bias).tanh() for ws, bias in layer]
        return y


def train_mlp(steps: int, progress: Callable, seed: int = 0) -> tuple[int, float]:
    """Fit four points with 3, 4, 4, 1 units. Return the parameters and the summed squared error of the last step."""
    mlp = MLP((3, 4, 4, 1), random.Random(seed))
    for _ in progress(steps):
        loss = Value(0.0)
        for x, target in zip(INPUTS, TARGETS, strict=True):
            loss = loss + (mlp(x)[0] - Value(target)).square()
        for p in mlp.parameters:
            p.grad = 0.0
        loss.backward()
        for p in mlp.parameters:
            p.data -= 0.05 * p.grad
    return len(mlp.parameters), loss.data
