"""
A dry run: what a training run would take, from its options alone. Nothing is trained, no GPU is needed.

    python -m training.plan --preset gpt2-124m --gpus 8                        parameters, memory, time, cost, disk
    python -m training.plan --preset gpt2-1558m --gpus 64 --parallel fsdp      the same, another way to share
    python -m training.plan --all                                              a line for every preset
    python -m training.plan --scale                                            1, 8, 64 and 512 GPUs: training/scale.py

Parameters and FLOPs are exact. Memory is a model, checked against measurements on a CPU: training/memory.py. Time is
arithmetic: tokens/s = MFU x peak FLOP/s x GPUs / FLOPs per token, for an MFU that you give; validation, samples and
checkpoints take time besides. `train_gpt2.py ... --plan` prints the same for the options that it is given.
"""

import argparse
import dataclasses
import sys

from data.files import UserError
from kernels import FAMILIES, families
from kernels.gpus import GPUS
from kernels.report import roofline
from kernels.report.shapes import PRESETS, Shape
from training import memory

RUNS = {  # preset -> tokens a step, steps, optimizer, dropout, tokens of its data (None: as many as it trains on)
    "laptop": (2_048, 1_100, "muon", 0.0, None),
    "shakespeare-char": (16_384, 5_000, "adamw", 0.2, 1_115_394),
    "gpt2-124m": (524_288, 19_073, "adamw", 0.0, None),
    "gpt2-350m": (524_288, 19_073, "adamw", 0.0, None),
    "gpt2-774m": (524_288, 19_073, "adamw", 0.0, None),
    "gpt2-1558m": (524_288, 19_073, "adamw", 0.0, None),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """The options of a run that decide what it takes. UserError, in the words of the command line, where they clash."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    batch_tokens: int  # a step, over all GPUs
    max_steps: int
    micro_batch: int | str = "auto"  # sequences on a GPU at once; "auto": the most that fit
    world_size: int = 1  # GPUs
    parallel: str = "ddp"  # of memory.MODES
    optimizer: str = "adamw"  # or muon
    dtype: str = "bfloat16"  # or float32
    kernels: str = "all"  # families in Triton, as for kernels.select
    dropout: float = 0.0
    keep: int = 3  # checkpoints
    data_tokens: int | None = None  # on disk; None: as many as are trained on
    name: str = ""

    def __post_init__(self):
        for field in ("n_head", "n_embd", "block_size", "vocab_size", "batch_tokens", "max_steps", "world_size"):
            option = "gpus" if field == "world_size" else field.replace("_", "-")
            if getattr(self, field) < 1:
                raise UserError(f"--{option} is {getattr(self, field)}, but must be at least 1")
        if self.micro_batch != "auto" and self.micro_batch < 1:
            raise UserError(f"--micro-batch is {self.micro_batch}, but must be at least 1, or auto")
        if self.parallel not in memory.MODES:
            raise UserError(f"--parallel {self.parallel}: use one of {', '.join(memory.MODES)}")
        multiple = self.block_size * self.world_size * (1 if self.micro_batch == "auto" else self.micro_batch)
        if self.batch_tokens % multiple:
            raise UserError(
                f"--batch-tokens {self.batch_tokens} cannot be cut evenly among {self.world_size} GPUs, --micro-batch "
                f"{self.micro_batch} and sequences of {self.block_size}: it must be a multiple of {multiple}"
            )

    @classmethod
    def of_options(cls, options: dict, vocab_size: int, world_size: int) -> "Job":
        """The job of train_gpt2.py's options: auto stands for what a GPU would get."""
        chosen = {field.name: options[field.name] for field in dataclasses.fields(cls) if field.name in options}
        chosen["dtype"] = chosen["dtype"].replace("auto", "bfloat16")
        chosen["kernels"] = chosen["kernels"].replace("auto", "all")
        return cls(vocab_size=vocab_size, world_size=world_size, **chosen)

    def shape(self, micro_batch: int = 1) -> Shape:
        return Shape(micro_batch, self.block_size, self.n_embd, self.n_head, self.n_layer, self.vocab_size)

    @property
    def sequences(self) -> int:
        """Of a step, on one GPU."""
        return self.batch_tokens // self.block_size // self.world_size

    def memory(self, micro_batch: int) -> dict[str, int]:
        """Bytes on one GPU by what they are: memory.per_gpu."""
        return memory.per_gpu(
            self.shape(micro_batch),
            4 if self.dtype == "float32" else 2,
            "cross_entropy" in families(self.kernels),
            self.optimizer,
            self.parallel,
            self.world_size,
            self.sequences // micro_batch,
            self.dropout > 0,
        )

    def largest_micro_batch(self, gpu: str) -> int:
        """The largest divisor of `sequences` whose memory fits the GPU; 0 when one sequence does not."""
        divisors = [n for n in range(self.sequences, 0, -1) if self.sequences % n == 0]
        return next((n for n in divisors if sum(self.memory(n).values()) <= room(gpu)), 0)

    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: the weights and the whole optimizer state, in float32, however they are shared."""
        shape = self.shape()
        return 4 * memory.numbers(shape) + memory.optimizer_bytes(shape, self.optimizer)

    def data_bytes(self) -> int:
        """Of the shards: 2 bytes a token, 4 for more than 65,536 ids."""
        tokens = self.batch_tokens * self.max_steps if self.data_tokens is None else self.data_tokens
        return tokens * (2 if self.vocab_size <= 65_536 else 4)


def room(gpu: str) -> float:
    """Bytes of a GPU's memory that the model's count may fill."""
    return (1 - memory.SPARE) * 1e9 * memory.GIGABYTES[gpu]


def of_preset(preset: str, **changes) -> Job:
    """The job of a preset of train_gpt2.py, with changes. UserError for another name."""
    if preset not in RUNS:
        raise UserError(f"--preset {preset}: use one of {', '.join(RUNS)}")
    s, (batch_tokens, max_steps, optimizer, dropout, data_tokens) = PRESETS[preset], RUNS[preset]
    options = {"n_layer": s.L, "n_head": s.H, "n_embd": s.C, "block_size": s.T, "vocab_size": s.V, "name": preset}
    options |= {"batch_tokens": batch_tokens, "max_steps": max_steps, "optimizer": optimizer, "dropout": dropout}
    return Job(**(options | {"data_tokens": data_tokens} | changes))


def check_gpus(gpus: list[str], mfu: float, price: float) -> None:
    unknown = [name for name in gpus if name not in GPUS or name not in memory.GIGABYTES]
    if unknown or not gpus:
        raise UserError(f"--gpu {' '.join(unknown)}: use some of {', '.join(GPUS)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu}, but must be above 0 and at most 1")
    if not 0 <= price < 1e6:
        raise UserError(f"--price is {price}, but must be 0 or more, for a GPU and hour")


def time_and_cost(job: Job, gpu: str, mfu: float, price: float) -> dict[str, float]:
    """Model: tokens_per_s of all GPUs, ms a step, hours, and cost of the run."""
    tokens_per_s = mfu * GPUS[gpu].flops * job.world_size / roofline.flops_per_token(job.shape())
    hours = job.batch_tokens * job.max_steps / tokens_per_s / 3600
    ms = 1e3 * job.batch_tokens / tokens_per_s
    return {"tokens_per_s": tokens_per_s, "ms": ms, "hours": hours, "cost": hours * job.world_size * price}


# --------------------------------------------------------------------------- text


def amount(size: float) -> str:
    """Bytes, in the decimal unit that reads best."""
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * each:
            return f"{few(size / each)} {unit}"
    return f"{size:.0f} B"


def count(number: float) -> str:
    """124M, 1.56B: a number of things in three digits."""
    return f"{few(number / 1e9)}B" if number >= 0.9995e9 else f"{few(number / 1e6)}M"


def duration(hours: float) -> str:
    """In the unit that reads best, two or three digits."""
    for unit, each, least in (("days", 24, 48), ("h", 1, 0.5), ("min", 1 / 60, 0.03), ("s", 1 / 3600, 0)):
        if hours >= least:
            return f"{few(hours / each)} {unit}"


def few(number: float) -> str:
    """Three digits of a number, at most two of them behind the point."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, ["-" * w for w in widths], *rows]
    ]
    return "\n".join("  " + line.rstrip() for line in lines)


def memory_text(job: Job, micro_batch: int) -> str:
    """The memory on one GPU, row by row."""
    rows, micro_steps = job.memory(micro_batch), job.sequences // micro_batch
    tokens = micro_batch * job.block_size
    notes = {
        "weights": "float32",
        "gradients": "float32; views into DDP's buckets" if job.parallel != "fsdp" else "float32",
        "second copy of the gradients": "what micro-steps add up, beside what is reduced",
        "gathered by FSDP": "whole: embeddings, two blocks; their gradients",
        "optimizer state": f"{job.optimizer}, float32" + ", of the fullest rank" * (job.parallel == "zero1"),
        "copies for autocast": "the matrices in bfloat16, through forward and backward",
        "activations, ends": "around the blocks: tokens, the last layer norm",
    }
    if job.world_size == 1:
        notes["gradients"] = "float32"
    if job.n_layer:
        a_block = rows["activations, blocks"] / job.n_layer
        notes["activations, blocks"] = (
            f"{amount(a_block)} each: {a_block / tokens / job.n_embd:.1f} bytes a token and channel"
        )
    notes |= {name: "what is live there on top" for name in rows if name.startswith("peak")}
    lines = [f"  {name:<30}{amount(size):>10}   {notes.get(name, '')}".rstrip() for name, size in rows.items()]
    return "\n".join(
        [
            f"Memory of one GPU (model): micro-batch of {micro_batch} sequences, {micro_steps} micro-step(s) a step, "
            f"{job.dtype}",
            *lines,
            f"  {'total':<30}{amount(sum(rows.values())):>10}   without torch.compile, which may keep less",
            f"  Not counted: CUDA context, NCCL, fragmentation; {memory.SPARE:.0%} of a GPU's memory is left free",
        ]
    )


def chosen_micro_batch(job: Job, gpus: list[str]) -> int:
    """What all of these GPUs hold, or what was asked for; UserError where not even one sequence fits."""
    if job.micro_batch != "auto":
        return job.micro_batch
    most = {gpu: job.largest_micro_batch(gpu) for gpu in gpus}
    worst = min(most, key=most.get)
    if most[worst] == 0:
        needed = amount(sum(job.memory(1).values()))
        raise UserError(
            f"one sequence needs {needed} on each of {job.world_size} GPU(s) with --parallel {job.parallel}, and "
            f"{worst} has {memory.GIGABYTES[worst]} GB: use more --gpus with --parallel zero1 or fsdp, or another --gpu"
        )
    return most[worst]


def plan(job: Job, gpus: list[str] | tuple[str, ...] = ("A100", "H100"), mfu: float = 0.4, price: float = 2.0) -> str:
    """
    All that the run would take, as text of at most 100 columns.

    gpus:  names of kernels.gpus.GPUS to plan for
    mfu:   share of the bfloat16 peak that the run is taken to reach, 0 to 1
    price: of a GPU for an hour, in any currency
    Raises UserError, a sentence for the command line.
    """
    check_gpus(list(gpus), mfu, price)
    micro_batch, shape, tokens = chosen_micro_batch(job, list(gpus)), job.shape(), job.batch_tokens * job.max_steps
    flops = roofline.flops_per_token(shape)
    rows = []
    for gpu in gpus:
        most, t = job.largest_micro_batch(gpu), time_and_cost(job, gpu, mfu, price)
        fits = "yes" if sum(job.memory(micro_batch).values()) <= room(gpu) else "NO"
        rows.append([gpu, f"{memory.GIGABYTES[gpu]} GB", fits, f"{most}", f"{t['tokens_per_s']:,.0f}"])
        rows[-1] += [few(t["ms"]), duration(t["hours"]), few(t["hours"] * job.world_size), few(t["cost"])]
    checkpoint = job.checkpoint_bytes()
    width = 2 if job.vocab_size <= 65_536 else 4
    return "\n".join(
        [
            f"{job.name + ': ' if job.name else ''}{shape.L} layers, {shape.H} heads, {shape.C} channels, "
            f"{shape.T:,} tokens a sequence, vocabulary of {shape.V:,}",
            f"{roofline.parameters(shape):,} parameters, {flops / 1e6:,.1f}M FLOPs a token to train",
            f"{job.max_steps:,} steps of {job.batch_tokens:,} tokens: {tokens / 1e9:,.3f}B tokens, "
            f"{flops * tokens:.3g} FLOPs",
            f"{job.world_size} GPU(s), --parallel {job.parallel}, --optimizer {job.optimizer}, --kernels {job.kernels}",
            "",
            memory_text(job, micro_batch),
            "",
            f"Time and cost (model): MFU {mfu:.0%}, a price of {price:g} for a GPU and hour",
            table(["GPU", "memory", "fits", "most seqs", "tokens/s", "ms/step", "time", "GPU hours", "cost"], rows),
            "",
            f"Disk: data {amount(job.data_bytes())}, {width} bytes a token"
            f"{', if none comes twice' if job.data_tokens is None else ''}",
            f"      checkpoints {amount((job.keep + 1) * checkpoint)}: {job.keep} kept and one being written, "
            f"{amount(checkpoint)} each",
        ]
    )


def every_preset(gpus: list[str], world_size: int, mfu: float, price: float, parallel: str) -> str:
    """A line for each preset: the laptop's and the characters' on one GPU, the others on world_size."""
    check_gpus(gpus, mfu, price)
    both = "/".join(gpus)
    head = ["preset", "params", "FLOPs/t", "tokens", "GPUs", "seqs", "memory", f"time {both}", "cost", "data"]
    rows = []
    for preset in RUNS:
        n = world_size if preset.startswith("gpt2") else 1
        job = of_preset(preset, world_size=n, parallel=parallel if n > 1 else "ddp")
        most, shape = min(job.largest_micro_batch(gpu) for gpu in gpus), job.shape()
        times = [time_and_cost(job, gpu, mfu, price) for gpu in gpus]
        row = [preset, count(roofline.parameters(shape)), count(roofline.flops_per_token(shape))]
        row += [count(job.batch_tokens * job.max_steps), f"{n}", f"{most or 'none'}"]
        row += [amount(sum(job.memory(most or 1).values())), "/".join(duration(t["hours"]) for t in times)]
        rows.append([*row, "/".join(few(t["cost"]) for t in times), amount(job.data_bytes())])
    title = f"Model: MFU {mfu:.0%} (small models reach less), {price:g} for a GPU and hour, --parallel {parallel}"
    return "\n".join(
        [
            title,
            "FLOPs/t: for a token; seqs: the largest micro-batch that fits all of these GPUs; memory: of one",
            "",
            table(head, rows),
        ]
    )


# ------------------------------------------------------------------- command line


def options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.plan", description="What a training run would take: memory, time, cost, disk. No GPU."
    )
    parser.error = lambda message: fail(f"{message} (--help shows every option)")
    parser.add_argument("--preset", default="gpt2-124m", help=f"one of {', '.join(RUNS)}")
    parser.add_argument(
        "--all", action="store_true", help="a line for every preset; takes --gpus --gpu --mfu --price --parallel"
    )
    parser.add_argument("--scale", action="store_true", help="1, 8, 64 and 512 GPUs, on paper; takes --mfu")
    parser.add_argument("--gpus", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--gpu", nargs="+", default=["A100", "H100"], metavar="NAME", help=f"of {', '.join(GPUS)}")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak reached (default 0.4)")
    parser.add_argument("--price", type=float, default=2.0, help="of a GPU for an hour (default 2.0)")
    parser.add_argument("--micro-batch", default="auto", help="sequences on a GPU at once; auto: the most that fit")
    parser.add_argument("--batch-tokens", type=int, help="tokens a step, over all GPUs")
    parser.add_argument("--max-steps", type=int, help="steps")
    parser.add_argument("--block-size", type=int, help="tokens a sequence")
    parser.add_argument("--parallel", default="ddp", help=f"one of {', '.join(memory.MODES)}")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), help="the preset's, when not given")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    parser.add_argument("--kernels", default="all", help=f"in Triton: all, none, or a list of {','.join(FAMILIES)}")
    return parser.parse_args(words)


def fail(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def run(chosen: argparse.Namespace) -> str:
    if chosen.scale:
        from training import scale  # here: it builds on this module

        check_gpus(chosen.gpu, chosen.mfu, chosen.price)
        return scale.report(chosen.mfu)
    if chosen.all:
        return every_preset(chosen.gpu, chosen.gpus, chosen.mfu, chosen.price, chosen.parallel)
    micro_batch = chosen.micro_batch
    if micro_batch != "auto":
        if not micro_batch.isdecimal():
            raise UserError(f"--micro-batch {micro_batch}: use a number of sequences, or auto")
        micro_batch = int(micro_batch)
    named = ("batch_tokens", "max_steps", "block_size", "optimizer")
    changes = {name: getattr(chosen, name) for name in named if getattr(chosen, name) is not None}
    changes |= {"parallel": chosen.parallel, "dtype": chosen.dtype, "kernels": chosen.kernels}
    job = of_preset(chosen.preset, micro_batch=micro_batch, world_size=chosen.gpus, **changes)
    return plan(job, chosen.gpu, chosen.mfu, chosen.price)


def main(words: list[str] | None = None) -> None:
    try:
        print(run(options(words)))
    except (UserError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
