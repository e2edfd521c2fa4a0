"""
What a training run would take (train_gpt2.py --plan): parameters, FLOPs, memory, time, cost, disk. No GPU is needed.

Parameters and FLOPs are counted by the model itself, built without memory on the meta device. Time is arithmetic:
tokens/s = MFU x peak FLOP/s x GPUs / FLOPs per token; validation, samples and checkpoints come on top. Memory is a
model, which tests/test_plan.py compares with what autograd, the optimizers, DDP, FSDP and the allocator keep on a CPU.

Always held, in float32 (P parameters, the padded rows of wte included):

    weights 4P, gradients 4P, AdamW 8P (two moments); Muon 4 bytes per element of the blocks' matrices
    DDP    gradients are views into its buckets; a second copy, 4P, while micro-steps accumulate before the all-reduce
    ZeRO-1 as DDP, but each tensor's optimizer state goes to the rank with the least so far
    FSDP   weights, gradients and state are sharded along the first dimension. While in use, gathered: the embeddings
           and their gradient, two blocks of weights (one at work, one prefetched), and the gradients of two blocks (one
           at work, one being reduced)

In a micro-step (N tokens, C channels, H heads, s bytes per element: 2 under bfloat16 autocast, else 4):

    saved per block     N (8C + 14sC + 4H + 16)   the residual stream twice in float32; two normalized rows, qkv,
                                                  attention's output, z and gelu(z); lse, means, deviations
    autocast            2 bytes per element of every matrix, until the backward is done
    the head, Triton    dx, dweight in float32, and one chunk of logits
    the head, PyTorch   log-probabilities in float32, and at its peak two more (N, V) like them

The peak is reached when all blocks' activations are held: in the head's forward, in its backward, or in the backward of
the last block. On one GPU or with FSDP, gradients of a single micro-step do not exist before: they take the place of
activations as the backward proceeds, and if they are larger than those, its end is the peak. So may Muon's update be,
which holds the blocks' matrices several times. Attention is fused in both versions; torch.compile may keep less.
RESERVED_FRACTION is set aside for the CUDA context, NCCL's buffers, cuBLAS's workspace and fragmentation, which are not
counted.

Communication of DDP on n GPUs, g per machine, m = n / g machines, is a hierarchical all-reduce: a GPU sends
2 (g-1)/g x 4P bytes over NVLink and 2 (m-1)/m x 4P/g over its network port. Gradients leave in buckets while the last
micro-step's backward runs, wte's last of all, since it is tied to the head. What stays visible is closely
max(all buckets - backward, last bucket). torch.compile cuts the model at the buckets, so it is the same.

Sources: ring all-reduce: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
         buckets: Li et al., "PyTorch Distributed", 2020, https://arxiv.org/abs/2006.15704
         FSDP: Zhao et al., 2023, https://arxiv.org/abs/2304.11277
"""

import dataclasses
import functools
import math

import torch

from kernels import FAMILIES, check_shape, families, unsupported
from kernels.cross_entropy import CHUNK_BYTES
from kernels.gpus import GPU, GPUS
from model import GPT
from training.distributed import Distributed
from training.optimizer import Muon, make_optimizers

PLANNED = ("A100", "H100", "RTX 4090")  # names in GPUS; the first one's memory decides --micro-batch auto
MFU, PRICE = 0.4, 2.0  # assumptions: fraction of the peak that a run reaches; per GPU and hour, in any currency
RESERVED_FRACTION = 0.05  # of a GPU's memory, for what the model leaves out: an assumption
MACHINE = 8  # GPUs, joined by NVLink
# bytes/s per GPU in one direction, NVLink and network: data sheets of the A100 and H100; DGX A100 and H100 have a port
# of 200 and 400 Gb/s per GPU
LINKS = {"A100": (300e9, 25e9), "H100": (450e9, 50e9)}
# fractions of those rates that are reached: https://github.com/NVIDIA/nccl-tests/issues/212 and /175
LINK_FRACTIONS = (0.8, 0.85)
LATENCY = 5e-6  # seconds per hop: an assumption
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    A run's options and what they need.

    config: train_gpt2.Config, already validated; auto means what a GPU would get
    """

    config: object
    vocab_size: int
    world_size: int = 1  # GPUs

    @functools.cached_property
    def model(self) -> GPT:
        with torch.device("meta"):  # shapes without memory
            return GPT(self.config.shape(self.vocab_size))

    @property
    def families(self) -> tuple[str, ...]:
        """The kernel families in Triton; auto leaves to PyTorch what its kernels cannot run."""
        c = self.config
        if c.kernels != "auto":
            check_shape(families(c.kernels), c.n_embd, c.n_head, c.dropout)
            return families(c.kernels)
        return tuple(name for name in FAMILIES if name not in unsupported(c.n_embd, c.n_head, c.dropout))

    @property
    def element_bytes(self) -> int:
        """Bytes per element in matrix products."""
        return 4 if self.config.dtype == "float32" else 2

    @property
    def sequences(self) -> int:
        """Sequences per step on one GPU."""
        return self.config.sequences_per_rank(self.world_size)

    # -------------------------------------------------------------------------------------------------------- memory

    def state_bytes(self) -> dict[torch.nn.Parameter, int]:
        """Return the bytes of optimizer state per parameter: Muon's momentum, or AdamW's two moments and step count."""
        return {
            p: 4 * p.numel() if isinstance(optimizer, Muon) else 8 * p.numel() + 4
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }

    def optimizer_bytes(self) -> int:
        """Return the bytes of optimizer state on a rank that holds the most; not for fsdp."""
        state, ranks = self.state_bytes(), [self.model.parameters()]
        ranks = self.zero1_ranks() if self.config.parallel == "zero1" else ranks
        return max(sum(state[p] for p in rank) for rank in ranks)

    def update_bytes(self) -> int:
        """
        Return the bytes that the optimizer's update takes on top, at most; AdamW's is fused, and takes none.

        Muon's: all updates, and the directions of attention's matrices, in float32; of the MLP's, two thirds of all,
        what `orthogonalize` is given, X, results in float32, and Gram matrices of a quarter: two, in float32 four.
        """
        muon = [each for each in self._optimizers if isinstance(each, Muon)]
        matrices = {p for each in muon for group in each.param_groups for p in group["params"]}
        ranks = self.zero1_ranks() if self.config.parallel == "zero1" else [matrices]
        most = max(sum(p.numel() for p in rank if p in matrices) for rank in ranks)
        return most * (3 * 4 + 4 + 2 * (4 + self.element_bytes + 4 + (4 if self.element_bytes == 4 else 1))) // 3

    @functools.cached_property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return make_optimizers(self.model, self.config, Distributed(), torch.float32)

    def zero1_ranks(self) -> list[list[torch.nn.Parameter]]:
        """Return each rank's parameters as ZeroRedundancyOptimizer deals them: group by group, the largest first."""
        ranks = [[] for _ in range(self.world_size)]
        for optimizer in self._optimizers:
            held = [0] * self.world_size
            for group in optimizer.param_groups:
                for p in sorted(group["params"], key=lambda p: -p.numel()):
                    rank = held.index(min(held))
                    held[rank] += p.numel()
                    ranks[rank].append(p)
        return ranks

    def memory(self, micro_batch: int) -> dict[str, int]:
        """Return bytes on one GPU by purpose; their sum is the peak."""
        c, world_size, parameters = self.config, self.world_size, list(self.model.parameters())
        full, micro_steps = 4 * elements(parameters), self.sequences // micro_batch
        if c.parallel == "fsdp":
            sharded = 4 * elements(parameters, world_size)
            rows = {"weights": sharded, "gradients": sharded}
            rows["embeddings, gathered"] = self._block_and_end_bytes()[1]
            rows["optimizer state"] = 2 * sharded + 4 * len(parameters)  # AdamW: Muon is refused
        else:
            rows = {"weights": full, "gradients": full}
            if world_size > 1 and micro_steps > 1:
                rows["second copy of the gradients"] = full
            if c.ema:
                rows["average of the weights"] = full
            rows["optimizer state"] = self.optimizer_bytes()
        held = {name: size for name, size in rows.items() if not name.startswith("second")}  # all along
        C, N, s, dropout = c.n_embd, micro_batch * c.block_size, self.element_bytes, c.dropout > 0
        matrices = 12 * C * C * c.n_layer + (0 if "cross_entropy" in self.families else self._width * C)
        rows["copies for autocast"] = s * matrices if s < 4 else 0  # Triton's head drops its own
        rows["activations, blocks"] = c.n_layer * self.block_bytes(micro_batch)
        # tokens and targets, positions, and the last norm's stream and statistics
        rows["activations, ends"] = N * (16 + 4 * C + 8 + C * dropout) + 8 * c.block_size
        end = held | {"peak: embeddings, backward": 8 * self._width * C}  # both gradients of wte, and their sum
        update = held | {"peak: Muon's update": self.update_bytes()}
        if (world_size == 1 or c.parallel == "fsdp") and micro_steps == 1:
            del rows["gradients"]
        place, most = max(self.working_bytes(micro_batch).items(), key=lambda item: item[1])
        rows[f"peak: {place}"] = most
        rows = max(rows, end, update, key=lambda each: sum(each.values()))
        return {name: size for name, size in rows.items() if size}

    def block_bytes(self, micro_batch: int) -> int:
        """Return what a block keeps for its backward; dropout's masks have a byte per element."""
        c, s = self.config, self.element_bytes
        per_token = 8 * c.n_embd + 14 * s * c.n_embd + 4 * c.n_head + 16 + 2 * c.n_embd * (c.dropout > 0)
        return micro_batch * c.block_size * per_token

    def head_bytes(self, micro_batch: int) -> int:
        """Return what the loss keeps for its backward: Triton's gradients, or x and the log-probabilities."""
        N, C = micro_batch * self.config.block_size, self.config.n_embd
        kept = 4 * self._width * C if "cross_entropy" in self.families else 4 * N * self.vocab_size
        return self.element_bytes * N * C + kept + 4

    def working_bytes(self, micro_batch: int) -> dict[str, int]:
        """Return bytes on top of the activations at the places that can be the peak, with FSDP's blocks."""
        s, C, V, W = self.element_bytes, self.config.n_embd, self.vocab_size, self._width
        N = micro_batch * self.config.block_size
        x, half = s * N * C, s < 4
        if "cross_entropy" in self.families:
            chunk = min(N, CHUNK_BYTES // s) * W * s
            forward = self.head_bytes(micro_batch) + x + chunk + (s * W * C if half else 0)
            scaled = 4 * N * C + (x if half else 0)  # dx in float32, and in the dtype that the last norm wants
            backward = self.head_bytes(micro_batch) + 4 * W * C + scaled
        else:
            forward = x + N * (s * W + 4 * V) + (4 * N * V if half else 0)  # logits, log-probabilities, float32 logits
            backward = x + 4 * 3 * N * V  # log-probabilities, their gradient, the logits' gradient
        # a gradient four times as wide; the branch's, if its dtype is not the stream's, whose own gradient takes the
        # place of what the last norm kept; a matrix's; and wte's from the head, which waits for the embedding's
        block = N * C * (4 * s + (4 if half else 0)) + 4 * W * C
        places = {"head, forward": forward, "head, backward": backward, "last block, backward": block + 16 * C * C}
        if self.config.parallel == "fsdp":
            L, full = self.config.n_layer, self._block_and_end_bytes()[0] // max(1, self.config.n_layer)
            places["head, backward"] += full * (L > 0)
            places["last block, backward"] = block + min(L + 1, 3) * full
            places["block before the last, backward"] = block + min(L + 1, 4) * full - self.block_bytes(micro_batch)
        return places

    def largest_micro_batch(self, gpu: GPU) -> int:
        """Return the largest divisor of `sequences` that fits the GPU's memory, 0 if not even one sequence does."""
        divisors = [n for n in range(self.sequences, 0, -1) if self.sequences % n == 0]
        return next((n for n in divisors if self.fits(n, gpu.memory)), 0)

    def fits(self, micro_batch: int, memory: float) -> bool:
        """Return whether a micro-batch fits in a GPU's memory, in bytes."""
        return sum(self.memory(micro_batch).values()) <= (1 - RESERVED_FRACTION) * memory

    @property
    def _width(self) -> int:
        return self.model.config.padded_vocab_size

    def _block_and_end_bytes(self) -> tuple[int, int]:
        """Return the float32 bytes of all blocks, and of what surrounds them: wte, wpe, ln_f."""
        blocks = 4 * elements(self.model.transformer.h.parameters())
        return blocks, 4 * elements(self.model.parameters()) - blocks

    # ---------------------------------------------------------------------------------------- time, communication, disk

    def step_seconds(self, gpu: GPU) -> float:
        """Return the seconds of a step at an MFU of MFU. TF32 products are half as fast as bfloat16."""
        peak = gpu.flops if self.element_bytes == 2 else gpu.flops / 2 if self.config.tf32 else gpu.arithmetic
        return self.config.batch_tokens * self.model.flops_per_token() / (MFU * peak * self.world_size)

    def communication(self, name: str, micro_batch: int) -> dict[str, float]:
        """
        Return what sharing a step's work costs on GPUs of that name (in LINKS).

        nvlink, network: bytes that a GPU sends to all-reduce the gradients once
        seconds, exposed: of communication per step, and of those the part that is not hidden by computing
        efficiency: speed per GPU, compared with a single GPU
        """
        n, gpu, c = self.world_size, GPUS[name], self.config
        g, m = min(n, MACHINE), math.ceil(n / MACHINE)
        blocks, ends = self._block_and_end_bytes()
        shares = 2 * (g - 1) / g, 2 * (m - 1) / m / g  # of the bytes: those sent over NVLink, over the network
        rates = [rate * fraction for rate, fraction in zip(LINKS[name], LINK_FRACTIONS, strict=True)]
        hops = 2 * (g - 1) + 2 * math.ceil(math.log2(m))

        def all_reduce(size: float, messages: int = 1) -> float:
            return size * (shares[0] / rates[0] + shares[1] / rates[1]) + messages * hops * LATENCY

        compute, micro_steps = self.step_seconds(gpu), self.sequences // micro_batch
        update = 42 * elements(self.model.parameters()) / gpu.bandwidth  # bytes that AdamW, clipping and casts move
        if c.parallel == "fsdp":  # per block and micro-step two gathers and a reduce-scatter: half an all-reduce each
            hidden = 1.5 * micro_steps * all_reduce(blocks, c.n_layer)
            last = all_reduce(ends)  # gathered when the step begins, reduced when it ends
            seconds, exposed = hidden + last, max(0.0, hidden - compute) + last
        else:
            # the last micro-step's backward; the head's part belongs to the forward, if its kernel is Triton's
            flops = c.n_layer * (48 * c.n_embd**2 + 8 * c.n_embd * c.block_size)
            backward = compute / micro_steps * flops / self.model.flops_per_token()
            buckets, size = 2, 0  # the first, of 1 MiB, and the last, with wte
            for p in reversed(list(self.model.transformer.h.parameters())):
                size += 4 * p.numel()
                if size >= BUCKET_BYTES:
                    buckets, size = buckets + 1, 0
            seconds = all_reduce(blocks + ends, buckets)
            exposed = max(seconds - backward, all_reduce(ends))
            if c.parallel == "zero1":  # every rank broadcasts the weights that it has updated
                weights = all_reduce(blocks + ends) / 2
                seconds, exposed = seconds + weights, exposed + weights
        total = compute + (update if c.parallel == "ddp" else update / n) + exposed
        return {
            "nvlink": shares[0] * (blocks + ends), "network": shares[1] * (blocks + ends), "seconds": seconds,
            "exposed": exposed, "efficiency": (compute + update / n) / total,
        }  # fmt: skip

    def checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint: weights, their average and optimizer state in float32, unsharded."""
        copies = 2 if self.config.ema else 1
        return 4 * copies * elements(self.model.parameters()) + sum(self.state_bytes().values())


def elements(parameters, world_size: int = 1) -> int:
    """Count the elements of these tensors, or of rank 0's shards, cut along the first dimension."""
    return sum(math.ceil(p.shape[0] / world_size) * math.prod(p.shape[1:]) for p in parameters)


# ---------------------------------------------------------------------------------------------------------------- text


def format_bytes(size: float) -> str:
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * each:
            return f"{format_3sig(size / each)} {unit}"
    return f"{size:.0f} B"


def format_hours(hours: float) -> str:
    for unit, each, least in (("days", 24, 48), ("h", 1, 0.5), ("min", 1 / 60, 0.03), ("s", 1 / 3600, 0)):
        if hours >= least:
            return f"{format_3sig(hours / each)} {unit}"


def format_3sig(number: float) -> str:
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def format_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return lines, the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in lines]


def report(config, vocab_size: int, world_size: int, data_tokens: int) -> str:
    """Return everything that the run would take, as text of at most 100 columns."""
    plan, c = Plan(config, vocab_size, world_size), config
    micro_batch = c.micro_batch if c.micro_batch != "auto" else plan.largest_micro_batch(GPUS[PLANNED[0]]) or 1
    flops, tokens, memory = plan.model.flops_per_token(), c.batch_tokens * c.max_steps, plan.memory(micro_batch)
    dtype = "bfloat16" if plan.element_bytes == 2 else "float32" + (" (TF32)" if c.tf32 else "")
    lines = [
        f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, {c.block_size:,} tokens per sequence, vocabulary "
        f"of {vocab_size:,}",
        f"{plan.model.parameter_count():,} parameters, {flops / 1e6:,.1f}M FLOPs per token to train",
        f"{c.max_steps:,} steps of {c.batch_tokens:,} tokens: {tokens / 1e9:,.3f}B tokens, {flops * tokens:.3g} FLOPs",
        f"{world_size} GPU(s), --parallel {c.parallel}, --optimizer {c.optimizer}, --dtype {dtype}",
        f"--kernels {','.join(plan.families) or 'none'}",
        "",
        f"Memory of one GPU (model): micro-batch of {micro_batch} sequences, {plan.sequences // micro_batch} "
        "micro-step(s) per step",
    ]
    lines += [f"  {name:<30}{format_bytes(size):>10}" for name, size in memory.items()]
    lines += [
        f"  {'total':<30}{format_bytes(sum(memory.values())):>10}   without torch.compile, which may keep less",
        f"  Not counted: CUDA context, NCCL, fragmentation; {RESERVED_FRACTION:.0%} of a GPU's memory is left free",
        "",
        f"Time and cost (model): MFU {MFU:.0%}, {PRICE:g} per GPU and hour; most: the largest micro-batch that fits",
    ]
    rows = []
    for name in PLANNED:
        gpu, seconds = GPUS[name], plan.step_seconds(GPUS[name])
        hours = seconds * c.max_steps / 3600
        row = [name, f"{gpu.memory / 1e9:.0f} GB", "yes" if plan.fits(micro_batch, gpu.memory) else "NO"]
        row += [f"{plan.largest_micro_batch(gpu) or 'none'}", f"{c.batch_tokens / seconds:,.0f}"]
        row += [format_3sig(1e3 * seconds), format_hours(hours), format_3sig(hours * world_size)]
        rows.append([*row, format_3sig(hours * world_size * PRICE)])
    lines += format_table(["GPU", "memory", "fits", "most", "tokens/s", "ms/step", "time", "GPU hours", "cost"], rows)
    if world_size > 1:
        rows = []
        for name in LINKS:
            found = plan.communication(name, micro_batch)
            row = [name, format_bytes(found["nvlink"]), format_bytes(found["network"])]
            row += [format_3sig(1e3 * found["seconds"]), format_3sig(1e3 * found["exposed"])]
            rows.append([*row, f"{found['efficiency']:.0%}"])
        lines += ["", f"Communication per step (model, not in the times above): machines of {MACHINE} GPUs"]
        lines += format_table(["GPU", "NVLink", "network", "ms", "of it exposed", "efficiency"], rows)
    token_bytes, checkpoint = 2 if vocab_size <= 65_536 else 4, plan.checkpoint_bytes()
    lines += [
        "",
        f"Disk: data {format_bytes(data_tokens * token_bytes)}, {token_bytes} bytes per token",
        f"      checkpoints {format_bytes((c.keep + 1) * checkpoint)}: {c.keep} kept and one being written, "
        f"{format_bytes(checkpoint)} each",
    ]
    return "\n".join(lines)
