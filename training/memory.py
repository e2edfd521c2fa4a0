"""
Model: the memory that a training step takes on one GPU, counted tensor by tensor from the shapes alone.

Held all the time, float32 (P parameters, the padded rows of wte among them):

    weights 4P, gradients 4P, AdamW 8P (two moments); Muon 4 bytes for each number of the blocks' matrices
    DDP    the gradients are views into its buckets; while micro-steps add up before the all-reduce, a second copy: 4P
    ZeRO-1 as DDP, but the optimizer's state is dealt out, whole tensors at a time, to the rank that has least so far
    FSDP   weights, gradients and state are cut along the first dimension; besides, whole while they are used: the
           embeddings, two blocks of weights (one at work, one on its way) and a block's and the embeddings' gradients,
           which every backward cuts again

In a micro-step (N tokens, C channels, H heads, s bytes a number: 2 under bfloat16 autocast, 4 without):

    a block keeps for its backward   N (8C + 14sC + 4H + 16)   the stream twice in float32; two normalised rows, q k v,
                                                               attention's y, z and gelu(z); lse, means, deviations
    autocast keeps of every matrix   2 bytes a number, until the backward is through
    the head, Triton                 dx, dweight in float32, and one chunk of logits
    the head, PyTorch                log-probabilities in float32, and at its peak two more (N, V) like them

The peak is where the blocks' activations are complete: in the head forward, in the head backward, or in the last
block's backward. Gradients count in full there, as they do from the second micro-step on. Attention is fused in both
versions. Counted as PyTorch runs without torch.compile, which may keep less. Left out: the CUDA context, NCCL's
buffers, cuBLAS's workspace, gaps between blocks of memory: for those SPARE is set aside.
tests/test_memory.py holds this against what autograd, the optimizers, DDP and the allocator really keep on a CPU.
"""

import math

from kernels.cross_entropy import CHUNK_BYTES
from kernels.report.shapes import Shape

MODES = ("ddp", "zero1", "fsdp")  # how processes share a model
SPARE = 0.05  # of a GPU's memory, for what is left out above: an assumption
# 10^9 bytes on the GPUs of kernels.gpus.GPUS: the makers' figures; where no page is named, not looked up: check.
# Drivers show some 5 % more than 10^9 bytes a GB: a margin besides SPARE
GIGABYTES = {
    "B200": 180,  # 192 on other pages: the smaller counts
    "GB200": 186,
    "H200 NVL": 141,
    "H200": 141,  # https://www.nvidia.com/en-us/data-center/h200/
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "H100": 80,  # https://www.nvidia.com/en-us/data-center/h100/
    "A100 SXM4 40GB": 40,
    "A100 PCIE 40GB": 40,
    "A100 80GB PCIe": 80,
    "A100": 80,  # https://www.nvidia.com/en-us/data-center/a100/
    "A40": 48,
    "A10G": 24,
    "A10": 24,
    "L40S": 48,
    "L4": 24,
    "RTX 5090": 32,
    "RTX 4090": 24,
    "RTX 3090": 24,
    "MI300X": 192,
}

# ------------------------------------------------------------------------- parameters


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """All parameters of model.py's GPT by name, in its order; wte with its padded rows."""
    C, shapes = shape.C, {"wte.weight": (shape.W, shape.C), "wpe.weight": (shape.T, shape.C)}
    linears = {"attn.c_attn": 3 * C, "attn.c_proj": C, "mlp.c_fc": 4 * C, "mlp.c_proj": C}
    for layer in range(shape.L):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            rows = linears.get(part, C)
            matrix = (rows, 4 * C if part == "mlp.c_proj" else C)
            shapes |= {f"h.{layer}.{part}.weight": matrix if part in linears else (C,)}
            shapes |= {f"h.{layer}.{part}.bias": (rows,)}
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def _numbers(shapes: dict[str, tuple[int, ...]], world_size: int = 1) -> int:
    """Of these tensors, or of rank 0's share of each, cut along the first dimension."""
    return sum(math.ceil(size[0] / world_size) * math.prod(size[1:]) for size in shapes.values())


def numbers(shape: Shape) -> int:
    """Of all parameters in memory."""
    return _numbers(parameter_shapes(shape))


def _is_hidden(name: str, size: tuple[int, ...]) -> bool:
    """Whether --optimizer muon gives it to Muon."""
    return name.startswith("h.") and len(size) == 2


# -------------------------------------------------------------------------- optimizer


def state_bytes(name: str, size: tuple[int, ...], optimizer: str, numbers: int | None = None) -> int:
    """Of a tensor's optimizer state, or of `numbers` of it: Muon one momentum; AdamW two moments and a step count."""
    numbers = math.prod(size) if numbers is None else numbers
    return 4 * numbers if optimizer == "muon" and _is_hidden(name, size) else 8 * numbers + 4


def optimizer_bytes(shape: Shape, optimizer: str, parallel: str = "ddp", world_size: int = 1) -> int:
    """Of the fullest rank's optimizer state: "adamw" or "muon"."""
    shapes = parameter_shapes(shape)
    if parallel == "fsdp":
        shares = {name: math.ceil(size[0] / world_size) * math.prod(size[1:]) for name, size in shapes.items()}
        return sum(state_bytes(name, size, optimizer, shares[name]) for name, size in shapes.items())
    if parallel == "zero1":
        ranks = deal(shapes, optimizer, world_size)
        return max(sum(state_bytes(name, shapes[name], optimizer) for name in names) for names in ranks)
    return sum(state_bytes(name, size, optimizer) for name, size in shapes.items())


def deal(shapes: dict[str, tuple[int, ...]], optimizer: str, world_size: int) -> list[list[str]]:
    """The names of each rank's tensors, as ZeroRedundancyOptimizer deals them: by group, the largest first."""
    ranks, sizes = [[] for _ in range(world_size)], {}
    hidden = [name for name, size in shapes.items() if optimizer == "muon" and _is_hidden(name, size)]
    qkv = [name for name in hidden if name.endswith("c_attn.weight")]
    single = [name for name in hidden if name not in qkv]
    decaying = [name for name, size in shapes.items() if len(size) >= 2 and name not in hidden]
    rest = [name for name, size in shapes.items() if len(size) < 2]
    for which, group in (("muon", qkv), ("muon", single), ("adamw", decaying), ("adamw", rest)):
        held = sizes.setdefault(which, [0] * world_size)  # two optimizers count apart, the groups of one together
        for name in sorted(group, key=lambda name: -math.prod(shapes[name])):
            rank = held.index(min(held))
            held[rank] += math.prod(shapes[name])
            ranks[rank].append(name)
    return ranks


# ------------------------------------------------------------------------ activations


def block_saved(shape: Shape, number_bytes: int, dropout: bool = False) -> int:
    """Bytes that one block keeps for its backward; with dropout two masks of a byte a number, as on a GPU."""
    C = shape.C
    return shape.N * (8 * C + 14 * number_bytes * C + 4 * shape.H + 16 + 2 * dropout * C)


def ends_saved(shape: Shape, dropout: bool = False) -> int:
    """Bytes kept around the blocks: tokens and targets, positions, and the last norm's stream and statistics."""
    return shape.N * (16 + 4 * shape.C + 8 + dropout * shape.C) + 8 * shape.T


def cast_bytes(shape: Shape, number_bytes: int, triton_head: bool) -> int:
    """Copies of the matrices that autocast keeps until the backward is through; Triton's head drops its own."""
    matrices = 12 * shape.C**2 * shape.L + (0 if triton_head else shape.W * shape.C)
    return 0 if number_bytes == 4 else number_bytes * matrices


def head_saved(shape: Shape, number_bytes: int, triton: bool) -> int:
    """Bytes that the loss keeps for its backward: the gradients it has made already, or x and log-probabilities."""
    x = number_bytes * shape.N * shape.C
    return x + (4 * shape.W * shape.C if triton else 4 * shape.N * shape.V) + 4


def working(shape: Shape, number_bytes: int, triton: bool) -> dict[str, int]:
    """Bytes on top of the blocks' activations at the three places where the peak can be; what the head keeps too."""
    s, N, C, V, W = number_bytes, shape.N, shape.C, shape.V, shape.W
    x = s * N * C
    if triton:
        chunk = min(N, CHUNK_BYTES // s) * W * s
        forward = head_saved(shape, s, True) + x + chunk + (s * W * C if s < 4 else 0)
        scaled = 4 * N * C + (x if s < 4 else 0)  # dx in float32, and as the last norm wants it
        backward = head_saved(shape, s, True) + 4 * W * C + scaled
    else:
        forward = x + N * (s * W + 4 * V) + (4 * N * V if s < 4 else 0)  # logits, log-probabilities; logits in float32
        backward = x + 4 * 3 * N * V  # log-probabilities, their gradient, the logits' gradient
    # a gradient four times as wide; the branch's, where it is another dtype than the stream's, whose own gradient takes
    # the place of what the last norm had kept; a matrix's; and wte's from the head, which waits for the embedding's
    block = N * C * (4 * s + (4 if s < 4 else 0)) + 16 * C * C + 4 * W * C
    return {"head, forward": forward, "head, backward": backward, "last block, backward": block}


# ---------------------------------------------------------------------------- one GPU


def per_gpu(
    shape: Shape,
    number_bytes: int = 2,
    triton_head: bool = True,
    optimizer: str = "adamw",
    parallel: str = "ddp",
    world_size: int = 1,
    micro_steps: int = 1,
    dropout: bool = False,
) -> dict[str, int]:
    """
    Bytes by what they are, in the order of the docstring above; their sum is the peak.

    shape:        of a micro-step on one GPU, shape.B sequences
    number_bytes: of a number in matrix products: 2 for bfloat16, 4 for float32
    """
    shapes = parameter_shapes(shape)
    sharded = parallel == "fsdp" and world_size > 1
    share = 4 * _numbers(shapes, world_size if sharded else 1)
    rows = {"weights": share, "gradients": share, "second copy of the gradients": 0, "gathered by FSDP": 0}
    if sharded:
        block = 4 * _numbers({name: size for name, size in shapes.items() if name.startswith("h.0.")})
        ends = 4 * _numbers({name: size for name, size in shapes.items() if not name.startswith("h.")})
        rows["gathered by FSDP"] = 2 * ends + min(3, 2 * shape.L) * block
    if world_size > 1 and micro_steps > 1 and not sharded:
        rows["second copy of the gradients"] = 4 * _numbers(shapes)
    rows["optimizer state"] = optimizer_bytes(shape, optimizer, parallel if world_size > 1 else "ddp", world_size)
    rows["copies for autocast"] = cast_bytes(shape, number_bytes, triton_head)
    rows["activations, blocks"] = shape.L * block_saved(shape, number_bytes, dropout)
    rows["activations, ends"] = ends_saved(shape, dropout)
    place, most = max(working(shape, number_bytes, triton_head).items(), key=lambda item: item[1])
    rows[f"peak: {place}"] = most
    return {name: size for name, size in rows.items() if size}
