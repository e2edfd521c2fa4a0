"""
The least time that counted traffic allows on a GPU, and what a training step adds up to.

A kernel takes at least the longest of: bytes touched / memory bandwidth, tl.dot FLOPs / peak of the tensor cores, other
arithmetic / float32 peak. Bytes that are read again are taken to come from a cache. A training step adds up, one after
the other: the kernels (counted); the matrix products, the PyTorch versions of the operations and AdamW (modelled, from
their published algorithms, run eagerly under bfloat16 autocast, each pass at the ceilings above). Left out: embeddings,
communication, launches. Ceilings are those of the data sheets, in kernels.gpus.GPUS: no real kernel reaches them.

Sources: Williams, Waterman and Patterson, "Roofline", 2009, https://doi.org/10.1145/1498765.1498785
         Chowdhery et al., "PaLM", 2022, appendix B, for MFU, https://arxiv.org/abs/2204.02311
"""

from kernels import FAMILIES
from kernels.gpus import GPU, GPUS
from kernels.report.shapes import Shape

FAMILY = {operation: family for family, operations in FAMILIES.items() for operation in operations}
TYPICAL = {  # architecture -> the GPU whose ceilings stand for it
    "sm_80": "A100",
    "sm_86": "RTX 3090",
    "sm_89": "RTX 4090",
    "sm_90": "H100",
    "sm_100": "B200",
    "sm_120": "RTX 5090",
    "gfx942": "MI300X",
}


def least_seconds(touched: float, flops: float, gpu: GPU, arithmetic: float = 0) -> tuple[float, str]:
    """The least time of one pass, and what bounds it: memory, tensor cores or arithmetic."""
    bounds = {
        "memory": touched / gpu.bandwidth,
        "tensor": flops / gpu.flops,
        "arithmetic": arithmetic / gpu.arithmetic,
    }
    bound = max(bounds, key=bounds.get)
    return bounds[bound], bound


def kernel_seconds(kernel: dict, gpu: GPU) -> tuple[float, str]:
    """The same for all launches of one counted kernel in one call of its operation."""
    return least_seconds(kernel["touched"], kernel["flops"], gpu, kernel["arithmetic"])


# --------------------------------------------------------------------------- models


def matmul_seconds(shape: Shape, gpu: GPU) -> float:
    """Model: the products of a step with weights, forward and both gradients, operands and results in bfloat16."""
    N, C = shape.N, shape.C
    seconds = 0.0
    for n, k, calls in [
        (3 * C, C, shape.L),
        (C, C, shape.L),
        (4 * C, C, shape.L),
        (C, 4 * C, shape.L),
        (shape.W, C, 1),
    ]:
        seconds += 3 * calls * least_seconds(2 * (N * k + k * n + N * n), 2 * N * k * n, gpu)[0]
    return seconds


def torch_passes(operation: str, shape: Shape) -> list[tuple[float, float]]:
    """
    Model: (bytes, FLOPs) of each pass of the PyTorch version of an operation, forward and backward, run eagerly.

    Bytes a number: a float32 read or write is 4, a bfloat16 one 2; an addition reads two terms and writes one.
    """
    numbers = shape.N * shape.C
    if operation in ("layer_norm", "add_layer_norm"):
        forward = [8, 6]  # normalise in float32, which autocast asks for; cast for the product
        backward = [6, 12, 8]  # cast back; dx from dy and x; dweight and dbias from dy and x again
        if operation == "add_layer_norm":
            forward, backward = [10, *forward], [*backward, 12, 6]  # add; add the stream's gradient, cast the branch's
        return [(each * numbers, 0) for each in forward + backward]
    if operation == "linear_gelu":
        return [
            (each * 4 * numbers, 0) for each in (4, 6, 2)
        ]  # GELU; its gradient; dbias; the bias rides on the product
    if operation == "causal_attention":  # FlashAttention-2: half of T x T, 2 products forward, 5 backward
        product = shape.N * shape.T * shape.C
        delta, main, dq, stack = (
            4,
            8 + 4 + 12,
            6,
            12,
        )  # dq is summed in float32 and then rounded; then one dqkv of three
        return [(8 * numbers, 2 * product), ((delta + main + dq + stack) * numbers, 5 * product)]
    if operation == "linear_cross_entropy":
        forward = [6, 8]  # to float32; log_softmax, whose second reading of a row is taken to hit a cache
        backward = [4, 12, 6, 6]  # zeros for nll_loss; log_softmax; to bfloat16; into zeros of the padded width
        return [(each * shape.N * shape.W, 0) for each in forward + backward]
    return []


def around_kernels(operation: str, shape: Shape, launches: int) -> float:
    """Model: bytes that PyTorch moves beside our kernels. linear_cross_entropy: float32 dweight, a sum a chunk."""
    if operation != "linear_cross_entropy":
        return 0.0
    weight, x = shape.W * shape.C, shape.N * shape.C
    return 8 * weight * (launches - 1) + 8 * weight + 12 * x  # and both are scaled at the end


def parameters(shape: Shape) -> int:
    """Trained numbers, positions included, vocabulary not padded."""
    C = shape.C
    return shape.L * (12 * C * C + 13 * C) + (shape.V + shape.T) * C + 2 * C


def adamw_seconds(shape: Shape, gpu: GPU) -> float:
    """Model: 28 bytes a parameter for AdamW, 8 for the norm of the gradient and its clipping, 6 for a bfloat16 copy."""
    return least_seconds(42 * parameters(shape), 0, gpu)[0]


def flops_per_token(shape: Shape) -> int:
    """Of training, as model.py counts them for MFU."""
    return 6 * (parameters(shape) - shape.T * shape.C) + 12 * shape.L * shape.C * shape.T


# --------------------------------------------------------------------------- a step


def step(kernels: list[dict], shape: Shape, gpu: GPU, triton: set[str]) -> dict[str, float]:
    """Milliseconds of a step's parts with these families in Triton and the others in PyTorch; their total; MFU."""
    parts = (
        {"matmuls": matmul_seconds(shape, gpu)} | dict.fromkeys(FAMILIES, 0.0) | {"adamw": adamw_seconds(shape, gpu)}
    )
    for operation in dict.fromkeys(kernel["operation"] for kernel in kernels):
        own = [kernel for kernel in kernels if kernel["operation"] == operation]
        if FAMILY[operation] in triton:
            seconds = sum(kernel_seconds(kernel, gpu)[0] for kernel in own)
            seconds += around_kernels(operation, shape, max(kernel["launches"] for kernel in own)) / gpu.bandwidth
        else:
            seconds = sum(least_seconds(touched, flops, gpu)[0] for touched, flops in torch_passes(operation, shape))
        parts[FAMILY[operation]] += own[0]["calls"] * seconds
    total = sum(parts.values())
    milliseconds = {name: 1e3 * seconds for name, seconds in (parts | {"total": total}).items()}
    return milliseconds | {"mfu": flops_per_token(shape) * shape.N / total / gpu.flops}


def configurations() -> dict[str, set[str]]:
    """All families, none, and each left out."""
    every = set(FAMILIES)
    return {"all": every, "none": set()} | {f"all but {family}": every - {family} for family in FAMILIES}


# --------------------------------------------------------------------------- picture


def plot(kernels: dict[str, list[dict]], path: str, title: str) -> None:
    """
    Operations a byte against operations a second, logarithmic: every kernel as high as its ceilings let it get.

    kernels: by architecture; drawn are an A100 and an H100, or whichever single GPU there is
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(11, 7.5))
    drawn = [architecture for architecture in ("sm_80", "sm_90") if architecture in kernels] or list(kernels)[:1]
    reach = np.logspace(-0.4, 3.4, 200)
    for architecture, colour in zip(drawn, ("tab:blue", "tab:orange"), strict=False):
        name, own = TYPICAL[architecture], kernels[architecture]
        gpu = GPUS[name]
        label = f"{name}: {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.flops / 1e12:.0f} TFLOP/s in bf16"
        axes.loglog(reach, np.minimum(reach * gpu.bandwidth, gpu.flops) / 1e12, color=colour, label=label)
        label = f"{name}: {gpu.arithmetic / 1e12:.1f} TFLOP/s outside the tensor cores"
        axes.axhline(gpu.arithmetic / 1e12, color=colour, linestyle=":", linewidth=1, label=label)
        axes.loglog([intensity(kernel) for kernel in own], [rate(kernel, gpu) for kernel in own], "o", color=colour)
    labelled = sorted(kernels[drawn[0]], key=intensity)
    places = spread([np.log10(intensity(kernel)) for kernel in labelled], apart=0.085)
    for kernel, place in zip(labelled, places, strict=True):
        point, below = (intensity(kernel), rate(kernel, GPUS[TYPICAL[drawn[0]]])), (10**place, 0.5)
        axes.annotate(
            kernel["name"], point, below, rotation=90, fontsize=9, ha="center", va="top",
            arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.6},
        )  # fmt: skip
    axes.set(xlabel="operations a byte (counted)", ylabel="TFLOP/s at most (model: data-sheet ceilings)", title=title)
    axes.set(xlim=(reach[0], reach[-1]), ylim=(0.004, 2000))
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(which="major", alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def intensity(kernel: dict) -> float:
    return (kernel["flops"] + kernel["arithmetic"]) / kernel["touched"]


def rate(kernel: dict, gpu: GPU) -> float:
    """TFLOP/s of all operations together, at the least time."""
    return (kernel["flops"] + kernel["arithmetic"]) / kernel_seconds(kernel, gpu)[0] / 1e12


def spread(places: list[float], apart: float) -> list[float]:
    """The sorted places, moved so that neighbours are at least `apart`: groups around their own middle."""
    groups = [[place] for place in places]
    while True:
        middles = [sum(group) / len(group) for group in groups]
        for i in range(len(groups) - 1):
            if middles[i + 1] - middles[i] < apart * (len(groups[i]) + len(groups[i + 1])) / 2:
                groups[i : i + 2] = [groups[i] + groups[i + 1]]
                break
        else:
            return [
                middle + apart * (n - (len(group) - 1) / 2)
                for middle, group in zip(middles, groups, strict=True)
                for n in range(len(group))
            ]
