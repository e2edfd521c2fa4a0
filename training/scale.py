"""
Model: what data parallelism costs on 1 to 512 GPUs, at a fixed batch. Nothing here was timed.

A step of DDP on n GPUs, g = 8 a node, m = n / g nodes, P parameters in float32:

    compute    tokens per GPU x FLOPs per token / (MFU x peak); AdamW after it, at the bandwidth of the memory
    all-reduce hierarchical: reduce-scatter in the node, all-reduce of each GPU's share between the nodes, all-gather:
               a GPU sends 2 (g-1)/g x 4P bytes over NVLink and 2 (m-1)/m x 4P/g over its network port. One flat ring
               would send 2 (n-1)/n x 4P over every link of it
    overlap    gradients leave in DDP's buckets (1 MiB, then 25 MiB) in the order in which the backward makes them, one
               bucket after the other, while the last micro-step's backward goes on. wte is tied to the head: its
               gradient is whole only when the backward ends, so that its bucket is never hidden

`exposed` plays that out, bucket by bucket. Two terms come close: what does not fit beside the backward, or the last
bucket: max(all buckets - time from the first one to the end, last bucket). The head's products belong to the forward,
where kernels/cross_entropy.py makes its gradients. A link gives LINK_SHARE of its rate and LATENCY a hop; a tree of
log2(m) hops between nodes. Left out: launches, which count at a thousand tokens a GPU; stragglers; the share of a GPU's
multiprocessors that NCCL takes; slower products at small sizes.

Sources: ring all-reduce and its factor: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
         buckets: Li et al., "PyTorch Distributed", 2020, https://arxiv.org/abs/2006.15704
         FSDP: Zhao et al., 2023, https://arxiv.org/abs/2304.11277
"""

import dataclasses
import math

from kernels.gpus import GPUS
from kernels.report import roofline
from kernels.report.shapes import PRESETS, Shape
from training import memory, plan

NODE = 8  # GPUs of a machine, joined by NVLink
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes: DistributedDataParallel's defaults
# NCCL's own maintainer: about 20 % of NVLink is protocol, https://github.com/NVIDIA/nccl-tests/issues/212; on A100s
# 232 of 300 GB/s in a node and 86 of 100 between two are reported, https://github.com/NVIDIA/nccl-tests/issues/175
LINK_SHARE = {"nvlink": 0.8, "network": 0.85}
LATENCY = 5e-6  # seconds a hop: an assumption
BATCH_TOKENS = 524_288
MODELS = ("gpt2-124m", "gpt2-1558m")
LINKS = ("ring", "nvlink", "network")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs and the links of each, bytes/s in one direction, as data sheets have them."""

    gpu: str
    nvlink: float
    network: float
    net: str

    @property
    def label(self) -> str:
        return f"{self.gpu}, NVLink {self.nvlink / 1e9:.0f} GB/s, {self.net} {self.network / 1e9:.3g} GB/s a GPU"


CLUSTERS = (
    # NVLink 3: 600 GB/s both ways, https://www.nvidia.com/en-us/data-center/a100/; DGX A100: a 200 Gb/s port for each
    Cluster("A100", 300e9, 25e9, "InfiniBand"),
    # NVLink 4: 900 GB/s both ways, https://www.nvidia.com/en-us/data-center/h100/; DGX H100: 400 Gb/s for each
    Cluster("H100", 450e9, 50e9, "InfiniBand"),
    # 100 Gb/s of Ethernet for the whole node
    Cluster("A100", 300e9, 100e9 / 8 / NODE, "Ethernet"),
)


# ------------------------------------------------------------------------ communication


def nodes(n: int) -> int:
    return math.ceil(n / NODE)


def sent(size: float, n: int) -> tuple[float, float]:
    """Bytes that a GPU sends over NVLink and over its network port to all-reduce `size` bytes over n GPUs."""
    g, m = min(n, NODE), nodes(n)
    return 2 * (g - 1) / g * size, 2 * (m - 1) / m * size / g


def all_reduce_seconds(size: float, n: int, cluster: Cluster) -> float:
    """Of `size` bytes: the three phases one after the other, and their hops."""
    g, m = min(n, NODE), nodes(n)
    inside, between = sent(size, n)
    hops = 2 * (g - 1) + 2 * math.ceil(math.log2(m))
    rates = cluster.nvlink * LINK_SHARE["nvlink"], cluster.network * LINK_SHARE["network"]
    return inside / rates[0] + between / rates[1] + hops * LATENCY


def backward_order(shape: Shape) -> list[tuple[str, int, float]]:
    """(name, numbers, FLOPs per token of the backward until its gradient is whole) in the order of arrival."""
    sizes, arrivals, done = memory.parameter_shapes(shape), [], 0.0
    names = [name for name in sizes if name.startswith(("h.", "ln_f"))]
    for name in [*reversed(names), "wpe.weight", "wte.weight"]:
        numbers = math.prod(sizes[name])
        if name.endswith("c_attn.bias"):
            done += 8 * shape.C * shape.T  # attention's own products lie before its projection's
        if name.startswith("h.") and len(sizes[name]) == 2:
            done += 4 * numbers
        arrivals.append((name, numbers, done))
    return arrivals


def buckets(shape: Shape) -> list[tuple[int, float]]:
    """(bytes, share of the backward done when its last gradient is there) of DDP's buckets, in the order they leave."""
    arrivals = backward_order(shape)
    whole = arrivals[-1][2]
    found, size, limit = [], 0, FIRST_BUCKET
    for i, (_, numbers, done) in enumerate(arrivals):
        size += 4 * numbers
        if size >= limit or i == len(arrivals) - 1:
            found.append((size, done / whole if whole else 1.0))
            size, limit = 0, BUCKET
    return found


# --------------------------------------------------------------------------- simulation


def exposed(ready: list[float], seconds: list[float], end: float) -> float:
    """Simulation: seconds past `end` until one link has carried all buckets, each at once or behind the one before."""
    free = 0.0
    for at, takes in zip(ready, seconds, strict=True):
        free = max(free, at) + takes
    return max(0.0, free - end)


def exposed_estimate(ready: list[float], seconds: list[float], end: float) -> float:
    """Closed form: all buckets less the time from the first to the end, or the last bucket alone; never above."""
    return max(0.0, sum(seconds) - (end - ready[0]), seconds[-1] - (end - ready[-1]))


# --------------------------------------------------------------------------------- a step


@dataclasses.dataclass(frozen=True)
class Change:
    """What a run does differently: bytes of a number on the wire, tokens of a step, and the mode."""

    label: str
    gradient_bytes: int = 4
    batch_tokens: int = BATCH_TOKENS
    fsdp: bool = False


CHANGES = (
    Change("DDP as it is"),
    Change("bfloat16 gradients", 2),
    Change("4 times the batch", 4, 4 * BATCH_TOKENS),
    Change("both", 2, 4 * BATCH_TOKENS),
    Change("FSDP in bfloat16", 2, BATCH_TOKENS, True),
)


def step(shape: Shape, n: int, cluster: Cluster, mfu: float, change: Change = CHANGES[0]) -> dict[str, float]:
    """
    Model of one step on n GPUs: milliseconds of its parts, bytes on the links, efficiency against one GPU.

    MFU is that of forward and backward, without AdamW and communication.
    """
    gpu, flops = GPUS[cluster.gpu], roofline.flops_per_token(shape)
    tokens = change.batch_tokens / n
    compute, adamw = tokens * flops / (mfu * gpu.flops), roofline.adamw_seconds(shape, gpu)
    if change.fsdp:
        adamw /= n
    micro_steps = micro_steps_of(shape, n, cluster.gpu, change)
    backward_flops = backward_order(shape)[-1][2]
    backward = compute / micro_steps * backward_flops / flops  # of the last micro-step: only then gradients leave
    parts = buckets(shape)
    size = sum(b for b, _ in parts) * change.gradient_bytes / 4
    if n == 1:
        communication = waiting = estimate = 0.0
    elif change.fsdp:
        communication, waiting = fsdp_seconds(shape, n, cluster, compute, micro_steps)
        estimate = waiting
    else:
        seconds = [all_reduce_seconds(b * change.gradient_bytes / 4, n, cluster) for b, _ in parts]
        ready = [share * backward for _, share in parts]
        communication = sum(seconds)
        waiting = exposed(ready, seconds, backward)
        estimate = exposed_estimate(ready, seconds, backward)
    total = compute + adamw + waiting
    alone = BATCH_TOKENS * flops / (mfu * gpu.flops) + roofline.adamw_seconds(shape, gpu)  # a step on one GPU
    ms = {"compute": compute, "backward": backward, "adamw": adamw, "communication": communication}
    ms |= {"exposed": waiting, "estimate": estimate, "total": total}
    inside, between = sent(size, n)
    return {name: 1e3 * value for name, value in ms.items()} | {
        "tokens": tokens,
        "micro_steps": micro_steps,
        "ring_bytes": 2 * (n - 1) / n * size,
        "nvlink_bytes": inside,
        "network_bytes": between,
        "hidden": 1 - waiting / communication if communication else 1.0,
        "efficiency": alone / BATCH_TOKENS * change.batch_tokens / (n * total),
        "tokens_per_s": change.batch_tokens / total,
    }


def micro_steps_of(shape: Shape, n: int, gpu: str, change: Change) -> int:
    """With the largest micro-batch that fits."""
    sizes = (shape.L, shape.H, shape.C, shape.T, shape.V, change.batch_tokens, 1)
    job = plan.Job(*sizes, world_size=n, parallel="fsdp" if change.fsdp else "ddp")
    return job.sequences // max(1, job.largest_micro_batch(gpu))


def fsdp_seconds(shape: Shape, n: int, cluster: Cluster, compute: float, micro_steps: int) -> tuple[float, float]:
    """
    FSDP's communication in bfloat16, all of it and what is not hidden: a gather in the forward and one in the backward
    of every micro-step and a reduce-scatter behind it, half an all-reduce each. wte's gather opens the step and its
    reduce-scatter ends it; the rest runs beside forward and backward.
    """
    sizes = memory.parameter_shapes(shape)
    ends = 2 * sum(math.prod(size) for name, size in sizes.items() if not name.startswith("h."))
    block = 2 * sum(math.prod(size) for name, size in sizes.items() if name.startswith("h.0."))
    half = all_reduce_seconds(block, n, cluster) / 2
    edges = all_reduce_seconds(ends, n, cluster) / 2
    rest = shape.L * half * 3 * micro_steps
    return rest + 2 * edges, max(0.0, rest - compute) + 2 * edges


def first_below(shape: Shape, cluster: Cluster, mfu: float, efficiency: float) -> int | None:
    """The fewest GPUs, of 2 to 512 in powers of two, at which DDP's efficiency is below that."""
    counts = [2**i for i in range(1, 10)]
    return next((n for n in counts if step(shape, n, cluster, mfu)["efficiency"] < efficiency), None)


# ----------------------------------------------------------------------------------- text


def report(mfu: float) -> str:
    """The tables of --scale: 124M and 1558M on 1, 8, 64 and 512 GPUs, where DDP stops scaling, what to change."""
    text = [
        f"Scale (model, nothing timed): {BATCH_TOKENS:,} tokens a step, MFU {mfu:.0%} of forward and backward",
        f"Links at {LINK_SHARE['nvlink']:.0%} (NVLink) and {LINK_SHARE['network']:.0%} (network) of their rate, "
        f"{LATENCY * 1e6:.0f} microseconds a hop; nodes of {NODE} GPUs",
        "ring: bytes a GPU sends in one flat ring; NVLink, network: of the hierarchical one; times in ms",
        "hidden: share of the communication beside the backward; exposed: the rest, bucket by bucket",
        "Without torch.compile: a compiled backward hands over all gradients at its end, and hides nothing",
    ]
    for preset in MODELS:
        text += scale_tables(preset, mfu)
    rows = []
    for preset in MODELS:
        for cluster in CLUSTERS:
            found = [first_below(PRESETS[preset], cluster, mfu, e) for e in (0.9, 0.75, 0.5)]
            rows.append([f"{preset}, {cluster.gpu} {cluster.net}", *(str(n or "above 512") for n in found)])
    text += ["", "Where DDP stops scaling (model): the first of 2, 4, 8 ... 512 GPUs with an efficiency below"]
    text += [plan.table(["", "90 %", "75 %", "50 %"], rows)]
    text += ["", "What to change (model): efficiency, ms a step; I: InfiniBand, E: Ethernet"]
    text += [change_table(preset, mfu) + "\n" for preset in MODELS]
    return "\n".join(text).rstrip()


def scale_tables(preset: str, mfu: float) -> list[str]:
    """Of one model: a table for each cluster; the one whose nodes are those of another only where they differ."""
    shape, parts = PRESETS[preset], buckets(PRESETS[preset])
    size, last = sum(b for b, _ in parts), parts[-1][0]
    text = [
        "",
        f"{preset}: {plan.amount(size)} of gradients in {len(parts)} buckets; "
        f"{last / size:.0%} in the last, with wte, never hidden",
    ]
    head = ["GPUs", "tokens", "ring", "NVLink", "network", "compute", "AdamW", "comm", "hidden", "exposed"]
    head += ["step", "eff."]
    for cluster in CLUSTERS:
        counts = (64, 512) if cluster.net == "Ethernet" else (1, 8, 64, 512)
        rows = [scale_row(n, step(shape, n, cluster, mfu)) for n in counts]
        text += ["", f"{preset}, {cluster.label}", plan.table(head, rows)]
    return text


def scale_row(n: int, found: dict[str, float]) -> list[str]:
    row = [f"{n}", f"{found['tokens']:,.0f}", *(plan.amount(found[f"{link}_bytes"]) for link in LINKS)]
    row += [plan.few(found[part]) for part in ("compute", "adamw", "communication")]
    row += [f"{found['hidden']:.0%}" if n > 1 else "-", plan.few(found["exposed"])]
    return [*row, plan.few(found["total"]), f"{found['efficiency']:.0%}"]


def change_table(preset: str, mfu: float) -> str:
    head = [preset, *(f"{n}, {c.gpu} {c.net[0]}" for n in (64, 512) for c in CLUSTERS)]
    rows = []
    for change in CHANGES:
        found = [step(PRESETS[preset], n, c, mfu, change) for n in (64, 512) for c in CLUSTERS]
        rows.append([change.label, *(f"{f['efficiency']:.0%} {f['total']:,.0f}" for f in found)])
    return plan.table(head, rows)
