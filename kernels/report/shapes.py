"""
The operations of a training step: their sizes, arguments and number of calls.

kernels/ imports nothing outside itself, so PRESETS repeats the shapes of train_gpt2.py; a test keeps them equal.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import VOCAB_MULTIPLE, Ops
from kernels.embedding import embedding


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a micro-step on one GPU: B sequences, T tokens, C channels, H heads, L layers, V vocabulary."""

    B: int
    T: int
    C: int
    H: int
    L: int
    V: int

    @property
    def N(self) -> int:
        """The number of tokens, which are the rows of every matrix."""
        return self.B * self.T

    @property
    def W(self) -> int:
        """The width of the logits in memory."""
        return math.ceil(self.V / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def __str__(self) -> str:
        return " ".join(f"{letter}={number}" for letter, number in dataclasses.asdict(self).items())


PRESETS = {  # the first two have the vocabularies of their texts; 65,536 tokens are an eighth of GPT-2's step
    "laptop": Shape(16, 128, 128, 4, 4, 104),
    "shakespeare-char": Shape(64, 256, 384, 6, 6, 65),
    "gpt2-124m": Shape(64, 1024, 768, 12, 12, 50257),
    "gpt2-350m": Shape(64, 1024, 1024, 16, 24, 50257),
    "gpt2-774m": Shape(64, 1024, 1280, 20, 36, 50257),
    "gpt2-1558m": Shape(64, 1024, 1600, 25, 48, 50257),
}


def parse_shape(preset: str, changes: Iterable[str]) -> Shape:
    """Return the preset's shape with changes like "T=2048". Raise ValueError for an unknown letter or a bad number."""
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: use one of {', '.join(PRESETS)}")
    sizes = dataclasses.asdict(PRESETS[preset])
    for change in changes:
        letter, _, number = change.partition("=")
        if letter not in sizes or not number.isdigit() or int(number) < 1:
            raise ValueError(f"--shape {change}: use a letter of {', '.join(sizes)} and a number, such as T=2048")
        sizes[letter] = int(number)
    if sizes["C"] % sizes["H"]:
        raise ValueError(f"--shape: C={sizes['C']} is not divisible by H={sizes['H']}")
    return Shape(**sizes)


def calls_per_step(shape: Shape) -> dict[str, int]:
    """Return the calls per operation in a micro-step. The stream's last sum has no gradient; it is counted as one."""
    return {
        "layer_norm": 1,
        "add_layer_norm": 2 * shape.L,
        "linear_gelu": shape.L,
        "causal_attention": shape.L,
        "linear_cross_entropy": 1,
        "cross_entropy": 0,  # only called if the logits are wanted too
    }


def arguments(operation: str, shape: Shape, branch: torch.dtype, device: str) -> tuple[list, list[bool]]:
    """
    Return the arguments of an operation as in training, and which of its outputs receive a gradient.

    branch: dtype of the results of matrix products; the residual stream and all parameters are float32
    """
    B, T, C, H, N = shape.B, shape.T, shape.C, shape.H, shape.N

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device, requires_grad=True)

    if operation == "layer_norm":
        return [normal(B, T, C), normal(C), normal(C), 1e-5], [True]
    if operation == "add_layer_norm":
        return [normal(B, T, C, dtype=branch), normal(B, T, C), normal(C), normal(C), 1e-5], [True, True]
    if operation == "linear_gelu":
        return [normal(B, T, C, dtype=branch), normal(4 * C, C), normal(4 * C)], [True]
    if operation == "causal_attention":
        return [normal(B, T, 3 * C, dtype=branch), H, 0.0, normal(3 * C)], [True]
    targets = torch.randint(0, shape.V, (N,), device=device)
    if operation == "cross_entropy":
        return [normal(N, shape.W, dtype=branch), targets, shape.V], [True]
    return [normal(N, C, dtype=branch), normal(shape.W, C), targets, shape.V], [True]


def blocks(ops: Ops, shape: Shape, device: str) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Return the parameters of L blocks and a head, and their loss on one batch: the operations as in model.py."""
    generator, C = torch.Generator().manual_seed(2), shape.C

    def normal(*size: int) -> nn.Parameter:
        return nn.Parameter((0.1 * torch.randn(size, generator=generator)).to(device))

    def linear(rows: int, cols: int) -> tuple[nn.Parameter, nn.Parameter]:
        return normal(rows, cols), normal(rows)

    wte, wpe, last_norm = normal(shape.W, C), normal(shape.T, C), (normal(C), normal(C))
    layers = [
        {"norm_1": (normal(C), normal(C)), "qkv": linear(3 * C, C), "proj": linear(C, C)}
        | {"norm_2": (normal(C), normal(C)), "fc": linear(4 * C, C), "out": linear(C, 4 * C)}
        for _ in range(shape.L)
    ]
    tokens = torch.randint(0, shape.V, (shape.B, shape.T + 1), generator=generator).to(device)

    def forward() -> Tensor:
        x, stream = embedding(wte, tokens[:, :-1]) + wpe, None
        for layer in layers:
            norm_1, (qkv, bias) = layer["norm_1"], layer["qkv"]
            if stream is None:
                stream, x = x, ops.layer_norm(x, *norm_1, 1e-5)
            else:
                x, stream = ops.add_layer_norm(x, stream, *norm_1, 1e-5)
            x = F.linear(ops.causal_attention(F.linear(x, qkv, bias.detach()), shape.H, 0.0, bias), *layer["proj"])
            x, stream = ops.add_layer_norm(x, stream, *layer["norm_2"], 1e-5)
            x = F.linear(ops.linear_gelu(x, *layer["fc"]), *layer["out"])
        x, _ = ops.add_layer_norm(x, stream, *last_norm, 1e-5)
        return ops.linear_cross_entropy(x.flatten(0, 1), wte, tokens[:, 1:].flatten(), shape.V)

    pairs = [pair for layer in layers for pair in layer.values()]
    return [wte, wpe, *(each for pair in (*pairs, last_norm) for each in pair)], forward


def forward_and_backward(function, operation_arguments: list, differentiable: list[bool], autocast) -> None:
    """Run an operation and take the gradients of all its tensors."""
    with autocast:
        outputs = function(*operation_arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [output for output, wanted in zip(outputs, differentiable, strict=True) if wanted]
    leaves = [a for a in operation_arguments if isinstance(a, Tensor) and a.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
