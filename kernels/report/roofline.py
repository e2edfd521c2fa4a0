"""
The least time that counted traffic allows on a GPU, per kernel and per training step.

A kernel takes at least the longest of: unique bytes / memory bandwidth, tl.dot FLOPs / peak of the tensor cores, other
arithmetic / float32 peak. Rereads are assumed to hit a cache. A training step is the sum of the
kernels (counted) and of the matrix products, the PyTorch versions of the operations, embeddings, bias gradients and
AdamW (modeled: under bfloat16 autocast, each pass at the ceilings of kernels.gpus.GPUS, which no real kernel reaches).
PyTorch's passes are those of its published algorithms if it runs eagerly; compiled, those of the code that inductor
(PyTorch 2.13) generates for this model. Left out: communication, launches.

Sources: Williams, Waterman and Patterson, "Roofline", 2009, https://doi.org/10.1145/1498765.1498785
         Chowdhery et al., "PaLM", 2022, appendix B, for MFU, https://arxiv.org/abs/2204.02311
"""

from pathlib import Path

import numpy as np

from kernels import FAMILIES
from kernels.gpus import GPU, GPUS
from kernels.report.shapes import Shape

FAMILY = {operation: family for family, operations in FAMILIES.items() for operation in operations}
REPRESENTATIVE_GPU = {  # architecture -> the GPU whose ceilings represent it
    "sm_80": "A100",
    "sm_86": "RTX 3090",
    "sm_89": "RTX 4090",
    "sm_90": "H100",
    "sm_100": "B200",
    "sm_120": "RTX 5090",
    "gfx942": "MI300X",
}


def least_seconds(unique_bytes: float, flops: float, gpu: GPU, arithmetic: float = 0) -> tuple[float, str]:
    """Return the least time of one pass, and what bounds it: memory, tensor cores or arithmetic."""
    bounds = ((unique_bytes / gpu.bandwidth, "memory"), (flops / gpu.flops, "tensor"))
    return max(*bounds, (arithmetic / gpu.arithmetic, "arithmetic"), key=lambda bound: bound[0])


def kernel_seconds(kernel: dict, gpu: GPU) -> tuple[float, str]:
    """Return the same for all launches of one counted kernel in one call of its operation."""
    return least_seconds(kernel["unique_bytes"], kernel["flops"], gpu, kernel["arithmetic"])


# --------------------------------------------------------------------------- models


def matmul_seconds(shape: Shape, gpu: GPU) -> float:
    """Model: the products of a step with weights, forward and both gradients, operands and results in bfloat16."""
    N, C, L = shape.N, shape.C, shape.L
    products = [(3 * C, C, L), (C, C, L), (4 * C, C, L), (C, 4 * C, L), (shape.W, C, 1)]  # (n, k, calls)
    return sum(
        3 * calls * least_seconds(2 * (N * k + k * n + N * n), 2 * N * k * n, gpu)[0] for n, k, calls in products
    )


def torch_passes(operation: str, shape: Shape, compiled: bool) -> list[tuple[float, float]]:
    """
    Model: (bytes, FLOPs) per pass of the PyTorch version of an operation, forward and backward.

    Bytes per element: a float32 read or write is 4, a bfloat16 one 2; an addition reads two terms and writes one.
    """
    elements = shape.N * shape.C
    if operation == "causal_attention":  # FlashAttention-2: half of T x T, 2 products forward, 5 backward
        product = shape.N * shape.T * shape.C
        backward = 4 + (8 + 4 + 12) + 6 + 12  # delta; main; round dq, summed in float32; stack three into dqkv
        return [(8 * elements, 2 * product), (backward * elements, 5 * product)]
    if operation == "linear_gelu":  # GELU forward (bias in the matmul epilogue), GELU backward, bias gradient
        return [(each * 4 * elements, 0) for each in (4, 6, 2)]
    if operation == "linear_cross_entropy":
        eager = [6, 8]  # to float32; log_softmax, whose second read of a row is assumed to hit a cache
        eager += [4, 12, 6, 6]  # zeros for nll_loss; log_softmax; to bfloat16; into zeros of the padded width
        return [(each * shape.N * shape.W, 0) for each in ([2, 4] if compiled else eager)]
    passes = {  # the gradients of weight and bias are sums in the same pass if compiled, else in one of their own
        ("layer_norm", True): [6, 10],
        ("layer_norm", False): [8, 6, 6, 12, 8],  # in float32, as autocast asks for; cast, and back; dx; sums
        ("add_layer_norm", True): [12, 14, 6],  # both gradients of the sum are one in float32, cast for the branch
        ("add_layer_norm", False): [10, 8, 6, 6, 12, 8, 12, 6],  # add; the same; add the stream's gradient, cast
    }
    return [(each * elements, 0) for each in passes.get((operation, compiled), ())]


def around_kernels(operation: str, shape: Shape, launches: int) -> float:
    """Model: bytes that PyTorch moves around our kernels: linear_cross_entropy adds up dweight in float32, by chunk."""
    if operation != "linear_cross_entropy":
        return 0.0
    weight, x = shape.W * shape.C, shape.N * shape.C
    return 8 * weight * (launches - 1) + 8 * weight + 12 * x  # and both are scaled at the end


def other_bytes(shape: Shape, triton: set[str]) -> float:
    """Model: bytes of the bias gradients of both c_proj and, unless our attention makes it, c_attn; of embeddings."""
    biases = 2 * ((0 if "attention" in triton else 3) + 1 + 1) * shape.N * shape.C * shape.L
    tokens = (8 + 12 + 4) * shape.N * shape.C  # look up; add to rows of a float32 gradient; sum the positions'
    return biases + tokens + 10 * shape.V * shape.C  # zero that gradient, add the head's


def parameters(shape: Shape) -> int:
    """Return the number of trained parameters, positions included, vocabulary not padded."""
    C = shape.C
    return shape.L * (12 * C * C + 13 * C) + (shape.V + shape.T) * C + 2 * C


def flops_per_token(shape: Shape) -> int:
    """Return training FLOPs per token, as model.py counts them for MFU."""
    return 6 * (parameters(shape) - shape.T * shape.C) + 12 * shape.L * shape.C * shape.T


# --------------------------------------------------------------------------- a step


def step(kernels: list[dict], shape: Shape, gpu: GPU, triton: set[str], compiled: bool) -> dict[str, float]:
    """Return the milliseconds of a step by part, with these families in Triton and the others in PyTorch; and MFU."""
    adamw_bytes = (28 + 8 + 6) * parameters(shape)  # AdamW; the gradient norm and clipping; a bfloat16 copy
    parts = {"matmuls": matmul_seconds(shape, gpu)} | dict.fromkeys(FAMILIES, 0.0)
    parts |= {"other": other_bytes(shape, triton) / gpu.bandwidth, "adamw": adamw_bytes / gpu.bandwidth}
    for operation in dict.fromkeys(kernel["operation"] for kernel in kernels):
        own = [kernel for kernel in kernels if kernel["operation"] == operation]
        if FAMILY[operation] in triton:
            seconds = sum(kernel_seconds(kernel, gpu)[0] for kernel in own)
            seconds += around_kernels(operation, shape, max(kernel["launches"] for kernel in own)) / gpu.bandwidth
        else:
            passes = torch_passes(operation, shape, compiled)
            seconds = sum(least_seconds(moved, flops, gpu)[0] for moved, flops in passes)
        parts[FAMILY[operation]] += own[0]["calls"] * seconds
    parts["total"] = sum(parts.values())
    mfu = flops_per_token(shape) * shape.N / parts["total"] / gpu.flops
    return {name: 1e3 * seconds for name, seconds in parts.items()} | {"mfu": mfu}


def configurations() -> dict[str, tuple[set[str], bool]]:
    """Return the choices to compare: the families in Triton, and whether PyTorch's versions are compiled."""
    every = set(FAMILIES)
    choices = {"all": every, "none": set()} | {f"all but {family}": every - {family} for family in FAMILIES}
    return {name: (families, True) for name, families in choices.items()} | {"none, eager": (set(), False)}


def verdict(steps: dict[str, dict]) -> str:
    """Return what the kernels save of a step of compiled PyTorch, and in which families that is little."""
    ours, theirs = steps["all"], steps["none"]
    saved = {family: (theirs[family] - ours[family]) / theirs["total"] for family in FAMILIES}
    little = [f"{family} ({fraction:+.1%})" for family, fraction in saved.items() if fraction < 0.01]
    total = 1 - ours["total"] / theirs["total"]
    return f"All kernels save {total:.1%} of a step of compiled PyTorch. Under 1%: {', '.join(little) or 'none'}."


# --------------------------------------------------------------------------- picture


def plot(kernels: dict[str, list[dict]], path: Path, title: str) -> None:
    """
    Draw operations per byte against operations per second, logarithmic: every kernel at the height of its ceiling.

    kernels: by architecture; sm_80 and sm_90 are drawn, or if neither is given the first
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7))
    axes = figure.subplots()
    drawn = [architecture for architecture in ("sm_80", "sm_90") if architecture in kernels] or list(kernels)[:1]
    colors = dict(zip(FAMILIES, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
    reach = np.geomspace(0.4, 1500, 200)
    for architecture, style, marker in zip(drawn, ("-", "--"), ("o", "s"), strict=False):
        name = REPRESENTATIVE_GPU[architecture]
        gpu = GPUS[name]
        label = f"{name}: {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.flops / 1e12:.0f} TFLOP/s in bf16"
        roof = np.minimum(reach * gpu.bandwidth, gpu.flops) / 1e12
        axes.loglog(reach, roof, style, marker=marker, markevery=[], color="black", linewidth=1, label=label, zorder=1)
        label = f"{name}: {gpu.arithmetic / 1e12:.1f} TFLOP/s outside the tensor cores"
        axes.axhline(gpu.arithmetic / 1e12, color="gray", linestyle=style, linewidth=0.7, label=label, zorder=1)
        for kernel in kernels[architecture]:
            color = colors[FAMILY[kernel["operation"]]]
            axes.plot(*point(kernel, gpu), marker, color=color, markersize=8, zorder=3)
    gpu, named = GPUS[REPRESENTATIVE_GPU[drawn[0]]], sorted(kernels[drawn[0]], key=intensity)
    low = [kernel for kernel in named if intensity(kernel) < 30]  # bound by memory on every GPU: named on the left
    places = [(8, y) for y in np.geomspace(0.05, 3.4, len(low))]
    places += [(270, y) for y in np.geomspace(13, 5.5, len(named) - len(low))]
    for kernel, place in zip(named, places, strict=True):
        side, color = "left" if kernel in low else "right", colors[FAMILY[kernel["operation"]]]
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "relpos": (0 if side == "left" else 1, 0.5)}
        style = {"ha": side, "va": "center", "color": color, "fontsize": 11, "arrowprops": line}
        axes.annotate(kernel["name"], point(kernel, gpu), place, **style)
    axes.set(xlabel="operations per byte (counted)", ylabel="TFLOP/s at most (model: data-sheet ceilings)", title=title)
    axes.set(xlim=(0.4, 1500), ylim=(0.03, 2500))
    axes.legend(loc="upper left")
    axes.grid(which="major", alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def intensity(kernel: dict) -> float:
    """Return all operations per byte."""
    return (kernel["flops"] + kernel["arithmetic"]) / kernel["unique_bytes"]


def point(kernel: dict, gpu: GPU) -> tuple[float, float]:
    """Return all operations per byte, and TFLOP/s of all of them at the least time."""
    return intensity(kernel), (kernel["flops"] + kernel["arithmetic"]) / kernel_seconds(kernel, gpu)[0] / 1e12
