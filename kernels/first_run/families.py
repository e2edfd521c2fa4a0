"""
Check each family of kernels on the device at hand: every operation against the exact math, then a block that trains.

The rule of accuracy is the tests': a result, and each gradient, may be at most twice as wrong as PyTorch's own
operation in the same dtype, plus one rounding step, both measured against the plain math in float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from kernels.first_run.findings import Findings
from kernels.report.roofline import FAMILY
from kernels.report.shapes import Shape, arguments, blocks

SHAPES = (Shape(2, 1024, 768, 12, 1, 50257), Shape(2, 1000, 768, 12, 1, 50257), Shape(3, 77, 320, 5, 1, 1001))
TINY_SHAPES = (Shape(1, 9, 32, 2, 1, 60),)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SAME_LOSS = 2e-2  # nats per token, between two choices of --kernels in bfloat16


def check(findings: Findings, families: tuple[str, ...], tiny: bool) -> None:
    """Add the lines of these families. tiny: on a CPU, in float32: Triton's interpreter does bfloat16 wrong."""
    device, backend = ("cpu", "aot_eager") if tiny else ("cuda", "inductor")
    shapes, dtypes = (TINY_SHAPES, (torch.float32,)) if tiny else (SHAPES, DTYPES)
    for family in families:
        ops = kernels.select(family, device)
        for operation in kernels.FAMILIES[family]:
            for dtype in dtypes:
                for shape in shapes:
                    name = f"{operation}, {str(dtype).removeprefix('torch.')}, B={shape.B} T={shape.T} C={shape.C}"
                    given = getattr(ops, operation), operation, shape, dtype, device
                    findings.attempt("kernels", name, accuracy, *given)
        for name, compiled in (("trains a block as PyTorch does", ""), ("the same in one compiled graph", backend)):
            findings.attempt("kernels", f"{family} {name}", trains, family, shapes[-1], device, compiled)


# --------------------------------------------------------------------------- one operation


def accuracy(function: Callable, operation: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[str, str]:
    """Compare `function`, a version of an operation, with the exact math. Run it twice: the bits must be the same."""
    torch.manual_seed(0)
    given, _ = arguments(operation, shape, dtype, device)
    if operation != "add_layer_norm":  # whose stream and parameters stay float32, as in training
        given = converted(given, dtype)
    ours, again = results(function, given), results(function, given)
    theirs = results(getattr(kernels.select("none"), operation), given)
    right = results(lambda *doubles: exact(operation, *doubles), converted(given, torch.float64))
    worst = 0.0
    for mine, stock, ideal in zip(ours, theirs, right, strict=True):
        step = torch.finfo(mine.dtype).eps
        allowed = 2 * max(relative_error(stock, ideal), step / 2 if mine.numel() == 1 else 0.0) + step
        error = relative_error(mine, ideal) / allowed
        worst = max(worst, error if math.isfinite(error) else math.inf)
    same = all(map(torch.equal, ours, again))
    text = f"the largest error is {worst:.2f} of what is allowed" + ("" if same else "; other bits the second time")
    return "pass" if worst <= 1 and same else "FAIL", text


def converted(given: list, dtype: torch.dtype) -> list:
    """Return the arguments with every floating-point tensor as a new leaf of this dtype."""
    floats = [isinstance(a, Tensor) and a.is_floating_point() for a in given]
    return [a.detach().to(dtype).requires_grad_() if f else a for a, f in zip(given, floats, strict=True)]


def results(function: Callable, given: list) -> list[Tensor]:
    """Return all outputs, and the gradients of all leaves for random upstream gradients, the same at every call."""
    outputs = function(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
    leaves = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def exact(operation: str, *given):
    """Return an operation's outputs by the plain math of its kernel file, in the dtype of its arguments."""
    if operation == "add_layer_norm":
        x, residual, *rest = given
        return kernels.layernorm.layer_norm_reference(residual + x, *rest), residual + x
    if operation == "linear_cross_entropy":
        x, weight, *rest = given
        return kernels.cross_entropy.cross_entropy_reference(x @ weight.T, *rest)
    return getattr(kernels.MODULES[FAMILY[operation]], f"{operation}_reference")(*given)


def relative_error(result: Tensor, right: Tensor) -> float:
    return ((result.double() - right).norm() / (right.norm() or 1.0)).item()


# --------------------------------------------------------------------------- a block that trains


def trains(family: str, shape: Shape, device: str, compiled: str) -> tuple[str, str]:
    """Compare three steps of a block with this family in Triton, compiled by a backend or not, with PyTorch's."""
    ours = block_losses(kernels.select(family, device), shape, device, compiled)
    theirs = block_losses(kernels.select("none"), shape, device)
    status, text = same_losses(ours, theirs)
    return status if ours[-1] < ours[0] else "FAIL", text


def block_losses(ops: kernels.Ops, shape: Shape, device: str, compiled: str = "", steps: int = 3) -> list[float]:
    """Return the losses of blocks and a head that train on one batch."""
    parameters, forward = blocks(ops, shape, device)
    torch._dynamo.reset()
    model = torch.compile(forward, fullgraph=True, backend=compiled) if compiled else forward
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(steps):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_losses(found: list[float], expected: list[float], tolerance: float = SAME_LOSS) -> tuple[str, str]:
    """Compare the losses of two runs of equal length."""
    apart = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    apart = max(apart) if all(map(math.isfinite, apart)) else math.inf
    text = f"losses {found[0]:.4f} to {found[-1]:.4f}, at most {apart:.1e} apart (allowed: {tolerance:.0e})"
    return "pass" if apart <= tolerance else "FAIL", text
