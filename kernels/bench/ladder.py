"""
The ladder of optimizations: from a plain GPT to all that this repository does, one step at a time.

A measured rung is a short training run of the preset. A modeled rung, which needs no GPU, is the step of
kernels.report's roofline, extended by what lower rungs do: products in float32 or TF32, and attention that writes its
(T, T) matrices. The model has no rung for the padded vocabulary: what a width that is no multiple of 8 costs is only
measured.
"""

import dataclasses

from kernels import FAMILIES
from kernels.bench.training import small_dataset, train
from kernels.gpus import GPU
from kernels.report import roofline
from kernels.report.shapes import Shape

PLAIN = """
import torch, kernels
for backend in {backends}:
    getattr(torch.backends.cuda, f"enable_{{backend}}_sdp")(False)
kernels.VOCAB_MULTIPLE = {multiple}
"""


@dataclasses.dataclass(frozen=True)
class Rung:
    """What is switched on, beyond a GPT in float32 with attention in plain matrix products."""

    name: str = "float32"
    tf32: bool = False
    bfloat16: bool = False
    compile: bool = False
    flash: bool = False  # SDPA's fused backends; before it, MATH
    kernels: tuple[str, ...] = ()  # families in Triton
    padded: bool = False  # the vocabulary, to a multiple of VOCAB_MULTIPLE


def rungs(on_gpu: bool, compiled: bool) -> list[Rung]:
    """Return the rungs from the bottom up: all on a GPU; on a CPU those that it can climb, torch.compile if wanted."""
    steps = [{"name": "+ TF32", "tf32": True}, {"name": "+ bfloat16", "bfloat16": True}] if on_gpu else []
    steps += [{"name": "+ torch.compile", "compile": True}] if compiled else []
    steps += [{"name": "+ flash attention", "flash": True}]
    families = list(FAMILIES) if on_gpu else []
    steps += [{"name": f"+ Triton: {f}", "kernels": (*families[:i], f)} for i, f in enumerate(families)]
    climbed = [Rung()]
    for step in [*steps, {"name": "+ padded vocabulary", "padded": True}]:
        climbed.append(dataclasses.replace(climbed[-1], **step))
    return climbed


def compared(rows: list[dict]) -> list[dict]:
    """Return the rows with two columns more: the speed over that of the first row, and of the row before."""
    speeds = [row["tokens_per_s"] for row in rows]
    ratios = zip(rows, speeds, [speeds[0], *speeds], strict=False)
    return [row | {"times": speed / speeds[0], "over_last": speed / before} for row, speed, before in ratios]


# --------------------------------------------------------------------------- measured


def measured(preset: str, steps: int, compiled: bool, rest: list[str], device: str) -> list[dict]:
    """Return a row per rung: a training run."""
    rows = []
    with small_dataset(preset, rest) as data:
        for rung in rungs(device.startswith("cuda"), compiled):
            backends = () if rung.flash else ("flash", "mem_efficient", "cudnn")
            setup = PLAIN.format(backends=backends, multiple="kernels.VOCAB_MULTIPLE" if rung.padded else 1)
            options = ["--dtype", "bfloat16" if rung.bfloat16 else "float32", "--tf32" if rung.tf32 else "--no-tf32"]
            options += ["--compile" if rung.compile else "--no-compile", "--kernels", ",".join(rung.kernels) or "none"]
            rows.append({"rung": rung.name, **train(preset, [*options, *data, *rest], steps, device, setup)})
    return compared(rows)


# --------------------------------------------------------------------------- modeled


def modeled(shape: Shape, gpu: GPU, counted: list[dict]) -> list[dict]:
    """Return a row per rung but the last: the least time of a step. counted: of the kernels, as kernels.report does."""
    rows = []
    for rung in rungs(on_gpu=True, compiled=True)[:-1]:
        seconds = least_seconds_of_step(rung, shape, gpu, counted)
        mfu = roofline.flops_per_token(shape) * shape.N / seconds / gpu.flops
        rows.append({"rung": rung.name, "tokens_per_s": shape.N / seconds, "mfu": mfu})
    return compared(rows)


def least_seconds_of_step(rung: Rung, shape: Shape, gpu: GPU, counted: list[dict]) -> float:
    """Model: the step of roofline.step, with what this rung does otherwise in place of its parts."""
    parts = roofline.step(counted, shape, gpu, set(rung.kernels), rung.compile)
    milliseconds = parts["total"]
    rate = gpu.flops if rung.bfloat16 else gpu.flops / 2 if rung.tf32 else gpu.arithmetic
    bandwidth = gpu.bandwidth if rung.bfloat16 else gpu.bandwidth / 2  # for what is counted as 2 bytes per element
    slower = dataclasses.replace(gpu, flops=rate, bandwidth=bandwidth)
    milliseconds += 1e3 * roofline.matmul_seconds(shape, slower) - parts["matmuls"]
    if not rung.bfloat16:
        milliseconds += 1e3 * sum(float32_passes(shape)) / gpu.bandwidth
        milliseconds -= sum(parts[family] for family in ("layernorm", "gelu", "cross_entropy"))
        milliseconds += 1e3 * 10 * shape.L * shape.N * shape.C / gpu.bandwidth  # bias gradients: 4 bytes, not 2
    if not rung.flash:
        milliseconds += 1e3 * shape.L * attention_in_products(shape, slower, rung.compile) - parts["attention"]
    return milliseconds / 1e3


def float32_passes(shape: Shape) -> list[float]:
    """Model: bytes of layer norm, GELU and cross-entropy in eager float32, a term per pass, forward then backward."""
    elements, logits = shape.N * shape.C, shape.N * shape.W
    norm = [8, 12, 8]  # normalize; dx; sums of dweight and dbias
    add = [12, 12]  # the residual sum; the sum of both gradients
    gelu = [8, 12, 4]  # forward; backward; sum of dbias
    loss = [8, 4, 12]  # log_softmax; zeros for nll_loss; log_softmax backward
    passes = [(2 * shape.L + 1) * elements * each for each in norm] + [2 * shape.L * elements * each for each in add]
    return passes + [shape.L * 4 * elements * each for each in gelu] + [logits * each for each in loss]


def attention_in_products(shape: Shape, gpu: GPU, compiled: bool) -> float:
    """Model: seconds of attention by SDPA's MATH backend: six full products and the passes over (T, T) between."""
    scores, flops = 2 * shape.N * shape.H * shape.T, 2 * shape.N * shape.T * shape.C
    passes = 2 + 3 if compiled else 2 + 2 + 3  # mask, softmax forward, softmax backward: reads and writes
    return 6 * roofline.least_seconds(scores, flops, gpu)[0] + passes * scores / gpu.bandwidth
