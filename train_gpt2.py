"""
Train a GPT-2: one script from a laptop's two cores to several machines of eight GPUs.

    python train_gpt2.py laptop                                              minutes on two CPU cores, no download
    python train_gpt2.py shakespeare-char                                    the 10.8M-parameter character GPT
    torchrun --standalone --nproc_per_node=8 train_gpt2.py gpt2-124m         GPT-2 (124M)
    python train_gpt2.py laptop --help                                       every option, with its default

A run is a folder, --out-dir: config.json, log.jsonl (a line a step), loss.png, samples.txt, checkpoints/. The same
command goes on where an interrupted run stopped, with the same bits as if it had never been interrupted.

The file reads in this order: options, presets, pure functions, one step and its validation, how a run begins, the loop.
"""

from training import startup

if __name__ == "__main__":
    startup.begin()  # before torch is imported, which takes seconds and reads what it sets

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import data
import kernels
import model as gpt
from data import files, shards, tokenizer
from data.files import UserError, as_flag
from data.loader import Loader, evaluation_windows, read_windows
from training import devices, diagnostics, find_lr, hellaswag, plan, sweep, weights
from training.distributed import Distributed, Mode
from training.optimizer import learning_rate, make_optimizers
from training.pace import Pace, matmul_speed
from training.run import Run, StopRequest, find_checkpoint, profiler, reference_losses, restarted_in

# ------------------------------------------------------------------------------------------------------------ options


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a GPT-2."""

    data: str = "fineweb-edu-10B"  # pydocs, shakespeare-char, shakespeare-gpt2, fineweb-edu-..., a folder of shards
    out_dir: str = "runs/gpt2-124m"  # folder of the run
    n_layer: int = 12  # blocks; 0 leaves a bigram model
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # channels
    block_size: int = 1024  # tokens a sequence
    dropout: float = 0.0  # share of activations dropped in training
    batch_tokens: int = 524_288  # tokens an optimizer step, over all processes and micro-steps
    micro_batch: int | Literal["auto"] = "auto"  # sequences held at once; auto: all a GPU holds, 16,384 tokens on a CPU
    max_steps: int = 19_073  # optimizer steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices; AdamW for the rest
    lr: float = 6e-4  # peak learning rate
    adamw_lr: float | None = None  # under muon, the peak rate of what AdamW trains; default: --lr
    min_lr: float | None = None  # learning rate of the last step; default: a tenth of --lr
    warmup_steps: int = 715  # steps over which the learning rate rises
    schedule: Literal["cosine", "linear"] = "cosine"  # from the peak to --min-lr; linear: flat at first
    decay_fraction: float = 0.67  # linear: fraction of the steps, the last ones, over which it falls
    zero_init: bool = False  # start every block as the identity: both c_proj at 0
    weight_decay: float = 0.1  # on matrices; biases and layer norms never decay
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    seed: int = 1337  # of initialisation, order of the data, dropout and samples
    shuffle: bool = True  # a new order of the sequences in every epoch; without it, the order on disk
    eval_every: int = 250  # steps between validations; 0: only at the end
    eval_tokens: int = 10_485_760  # validation tokens, the same every time; all there are where they are fewer
    hellaswag_every: int = 1000  # steps between HellaSwag evaluations, and at the end; 0: never
    hellaswag_input: str = ""  # a file of questions in HellaSwag's format; none: its validation set, a download
    sample_every: int = 1000  # steps between samples; 0: only at the end
    checkpoint_every: int = 1000  # steps between checkpoints; one is always written at the end
    keep: int = 3  # checkpoints kept, the newest
    resume: str = "auto"  # auto: go on with --out-dir; never: start afresh, its old run moved aside; or a checkpoint
    init_from: str = ""  # weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a run, a Hugging Face folder
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 where it is fast
    kernels: str = "auto"  # all, none, or a list of layernorm,gelu,attention,cross_entropy; auto: what runs on a GPU
    compile: bool = True  # torch.compile the model
    parallel: Mode = "ddp"  # among processes; zero1: share optimizer state; fsdp: weights and gradients too
    check: bool = False  # check the token ids of every batch before they are used: slower, for debugging
    diagnose: int = 0  # steps between diagnoses of every layer, into log.jsonl and diagnostics.png; 0: none
    plan: bool = False  # train nothing: print the memory, time, money and disk that the run would take
    find_lr: bool = False  # train nothing to keep: sweep the learning rate, find_lr.png, and suggest one
    sweep: tuple[str, ...] = ()  # train a grid of runs: --sweep lr=1e-4,3e-4 n_layer=4,6
    ladder: bool = False  # train from a bigram to a small GPT, one dimension at a time, on tiny shakespeare
    profile: bool = False  # write a torch.profiler trace of steps 6 to 8 to trace.json
    wandb: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # log to TensorBoard too

    def __post_init__(self):
        with files.as_user_error():
            self.shape(vocab_size=1)
            families = () if self.kernels == "auto" else kernels.families(self.kernels)
        above_zero = ["block_size", "batch_tokens", "micro_batch", "max_steps", "lr", "adamw_lr", "eval_tokens"]
        above_zero += ["checkpoint_every", "keep"]
        zero_or_more = ["warmup_steps", "eval_every", "sample_every", "hellaswag_every", "seed", "diagnose", "min_lr"]
        zero_or_more += ["decay_fraction", "weight_decay", "grad_clip"]
        files.check_numbers(dataclasses.asdict(self), above_zero, zero_or_more)
        self.sequences_per_rank(processes=1)
        if self.dropout and "attention" in families:
            raise UserError("the Triton attention has no dropout: use --dropout 0, or --kernels without attention")
        if self.diagnose and self.parallel != "ddp":
            raise UserError(
                f"--diagnose needs every weight on one process, which --parallel {self.parallel} shares out"
            )
        if self.adamw_lr is not None and self.optimizer == "adamw":
            raise UserError("--adamw-lr is for --optimizer muon, which leaves some parameters to AdamW: use --lr")
        if self.decay_fraction > 1:
            raise UserError(f"--decay-fraction is {self.decay_fraction}, but must be at most 1")
        if self.parallel == "fsdp" and self.optimizer == "muon":
            raise UserError("--optimizer muon needs whole matrices, which --parallel fsdp cuts: use zero1 or ddp")

    def sequences_per_rank(self, processes: int) -> int:
        """Sequences in one process's share of a step's batch; UserError where the batch cannot be shared evenly."""
        multiple = self.block_size * processes * (1 if self.micro_batch == "auto" else self.micro_batch)
        if self.batch_tokens % multiple:
            raise UserError(
                f"--batch-tokens {self.batch_tokens} cannot be cut evenly into {processes} process(es), --micro-batch "
                f"{self.micro_batch} and sequences of {self.block_size}: it must be a multiple of {multiple}"
            )
        return self.batch_tokens // self.block_size // processes

    def shape(self, vocab_size: int) -> gpt.GPTConfig:
        return gpt.GPTConfig(self.n_layer, self.n_head, self.n_embd, self.block_size, vocab_size, self.dropout)


# ------------------------------------------------------------------------------------------------------------ presets

# fmt: off
LAPTOP = Config(
    data="pydocs", out_dir="runs/laptop", n_layer=4, n_head=6, n_embd=192, block_size=128, batch_tokens=16 * 128,
    micro_batch=16, max_steps=1100, optimizer="muon", lr=4e-3, weight_decay=0.3, warmup_steps=100, eval_every=100,
    eval_tokens=48_896, hellaswag_every=0, sample_every=500, checkpoint_every=500, compile=False,
)
CHARACTERS = Config(
    data="shakespeare-char", out_dir="runs/shakespeare-char", n_layer=6, n_head=6, n_embd=384, block_size=256,
    dropout=0.2, batch_tokens=64 * 256, max_steps=5000, lr=1e-3, warmup_steps=100, eval_tokens=111_360,
    hellaswag_every=0,
)
# fmt: on


PRESETS = {  # learning rates of the GPT-2 sizes: GPT-3's table 2.1, https://arxiv.org/abs/2005.14165
    "laptop": ("a small GPT in minutes on two CPU cores, no download", LAPTOP),
    "shakespeare-char": ("the 10.8M-parameter character GPT on tiny shakespeare", CHARACTERS),
    "gpt2-124m": ("GPT-2, 10 billion tokens", Config()),
    "gpt2-350m": ("GPT-2 medium", Config(out_dir="runs/gpt2-350m", n_layer=24, n_head=16, n_embd=1024, lr=3e-4)),
    "gpt2-774m": ("GPT-2 large", Config(out_dir="runs/gpt2-774m", n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4)),
    "gpt2-1558m": ("GPT-2 XL", Config(out_dir="runs/gpt2-1558m", n_layer=48, n_head=25, n_embd=1600, lr=2e-4)),
}

# ----------------------------------------------------------------------------------------------------- pure functions


def seed_dropout(*numbers: int) -> None:
    """Make torch's randomness depend on these numbers alone: a resumed run needs no saved random state."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


# ------------------------------------------------------------------------------------------------- one step, validated


@dataclasses.dataclass
class Trainer:
    """What a step works with. `model` is what trains (compiled, DDP); `raw_model` is the same weights, neither."""

    config: Config
    raw_model: gpt.GPT
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    micro_batch: int  # sequences
    ranks: Distributed = Distributed()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def train_step(trainer: Trainer, inputs: Tensor, targets: Tensor, step: int) -> tuple[float, float]:
    """
    One optimizer step over this process's share of the batch, in micro-steps.

    inputs, targets: (sequences, block_size) int64
    Returns the mean loss over processes and micro-steps, in nats per token, and the gradient's norm before clipping.
    Raises UserError, with the weights as they were, when either is not finite.
    """
    config, ranks = trainer.config, trainer.ranks
    seed_dropout(config.seed, step, ranks.rank)
    micro_batches = list(zip(inputs.split(trainer.micro_batch), targets.split(trainer.micro_batch), strict=True))
    loss_sum = torch.zeros((), device=trainer.device)
    for micro_step, (x, y) in enumerate(micro_batches, start=1):
        ranks.set_grad_sync(trainer.model, enabled=micro_step == len(micro_batches))
        with trainer.autocast():
            loss = trainer.model(x, y) / len(micro_batches)
        loss.backward()
        loss_sum += loss.detach()
    mean_loss = (ranks.sum(loss_sum) / ranks.world_size).item()
    grad_norm = ranks.item(nn.utils.clip_grad_norm_(trainer.raw_model.parameters(), config.grad_clip or math.inf))
    if not math.isfinite(mean_loss + grad_norm):
        raise UserError(
            f"step {step} has loss {mean_loss} and gradient norm {grad_norm}: stopped before the update, and the "
            f"checkpoints in {config.out_dir} stay as they are; lower --lr, or raise --warmup-steps"
        )
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config) * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


@torch.no_grad()
def validate(trainer: Trainer, split: shards.Split) -> float:
    """Mean loss in nats per token over --eval-tokens of the split: the same tokens whatever the batch or world size."""
    block_size = trainer.config.block_size
    starts = evaluation_windows(split, block_size, trainer.config.eval_tokens)
    ranks, size = trainer.ranks, trainer.micro_batch
    mine = starts[ranks.rank :: ranks.world_size]
    trainer.raw_model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64)
    for first in range(0, math.ceil(len(starts) / ranks.world_size), size):
        windows = mine[first : first + size]
        some = windows if len(windows) else starts[:1]  # under fsdp all processes call the model equally often
        inputs, targets = (t.to(trainer.device) for t in read_windows(split, some, block_size))
        with trainer.autocast():
            loss_sum += trainer.raw_model(inputs, targets).item() * len(windows)
    trainer.raw_model.train()
    return ranks.sum(loss_sum.to(trainer.device, torch.float32)).item() / len(starts)


# -------------------------------------------------------------------------------------------------------- beginning


def choose_micro_batch(trainer: Trainer, sequences: int) -> int:
    """--micro-batch auto: the largest divisor of `sequences`, a process's share of the batch, that memory holds."""
    # held aside: AdamW's two moments, and of several processes a second copy of the gradients; fsdp cuts later
    copies = 2 if trainer.ranks.world_size == 1 else 3
    block_size = trainer.config.block_size
    largest = devices.largest_micro_batch(trainer.raw_model, block_size, sequences, copies, trainer.autocast)
    least = -trainer.ranks.all_reduce_max(-largest)
    if least == 0:
        raise UserError("not one sequence fits in memory: lower --block-size, or with fsdp give --micro-batch 1")
    return least


def starting_point(config: Config, split: shards.Split) -> dict | None:
    """The checkpoint to go on from, if there is one; UserError where its model, tokens or batch order is another."""
    path, checkpoint = find_checkpoint(Path(config.out_dir), config.resume)
    if checkpoint is None:
        return None
    there, here = checkpoint["run"], dataclasses.asdict(config)
    fixed = ["n_layer", "n_head", "n_embd", "block_size", "optimizer", "batch_tokens", "seed", "shuffle"]
    differs = [f"{as_flag(name)} {there[name]} there, {here[name]} here" for name in fixed if there[name] != here[name]]
    if checkpoint["tokenizer"] != split.tokenizer_spec:
        differs.append(f"--data {there['data']} there, {config.data} with another vocabulary here")
    if differs:
        raise UserError(
            f"{path} is of another run ({'; '.join(differs)}): give the options that it was made with, another "
            "--out-dir, or --resume never"
        )
    return checkpoint


def set_up(config: Config, ranks: Distributed):
    """What the loop needs: trainer, loader, validation split, tokenizer, and the checkpoint to go on from or None."""
    sequences = config.sequences_per_rank(ranks.world_size)
    device = devices.choose_device(config.device, ranks.local_rank)
    dtype = devices.choose_dtype(config.dtype, device)
    with files.as_user_error():
        say = print if ranks.rank == 0 else lambda sentence: None
        ops = kernels.select(config.kernels, device, config.dropout, config.n_embd, config.n_head, say)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    train_split, val_split = (shards.open_split(data.dataset_dir(config.data), name) for name in ("train", "val"))
    for split in (train_split, val_split):
        split.verify(ranks.rank, ranks.world_size)
    evaluation_windows(val_split, config.block_size, config.eval_tokens)  # too short a split fails here, early
    order = {"seed": config.seed, "shuffle": config.shuffle, "rank": ranks.rank, "world_size": ranks.world_size}
    loader = Loader(
        train_split, config.block_size, sequences * ranks.world_size, device=device, check=config.check, **order
    )
    checkpoint = starting_point(config, train_split)
    for what, number in [
        ("--data", int(train_split.fingerprint[:12], 16)),
        ("checkpoint", checkpoint["step"] if checkpoint else 0),
    ]:
        if ranks.disagree(number):
            raise UserError(f"the processes see different files for {what}: they must share it, or hold equal copies")

    torch.manual_seed(config.seed)
    raw_model = gpt.GPT(config.shape(train_split.vocab_size), ops)
    if config.zero_init:
        raw_model.zero_projections()
    if checkpoint:
        raw_model.load_state_dict(checkpoint["model"])
    elif config.init_from:
        weights.init_from(raw_model, config.init_from, train_split.tokenizer_spec)
    raw_model.to(device)
    trainer = Trainer(config, raw_model, raw_model, [], device, dtype, config.micro_batch, ranks)
    if config.micro_batch == "auto":  # a run that goes on keeps its size, and so its bits
        before = checkpoint["micro_batch"] if checkpoint else sequences + 1
        trainer.micro_batch = choose_micro_batch(trainer, sequences) if sequences % before else before
    ranks.shard(raw_model, list(raw_model.transformer.h))
    trainer.optimizers = make_optimizers(raw_model, config, ranks, dtype)
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizers"] if checkpoint else (), strict=False):
        ranks.load_optimizer_state(optimizer, state)
    trainer.model = ranks.replicate(torch.compile(raw_model) if config.compile else raw_model)
    return trainer, loader, val_split, tokenizer.from_spec(train_split.tokenizer_spec), checkpoint


# --------------------------------------------------------------------------------------------------------------- main


def sample(trainer: Trainer, run: Run | None, tokens: tokenizer.Tokenizer, step: int, length: int = 300) -> None:
    """Adds to samples.txt `length` tokens that begin as a document does, drawn with the same seed every time."""
    model, ranks = trainer.raw_model, trainer.ranks
    weights = ranks.gather_full(model.state_dict()) if ranks.mode == "fsdp" else None
    if run is None:
        return
    if weights:
        model = gpt.GPT(model.config, model.ops).to(trainer.device)
        model.load_state_dict(weights)
    with trainer.autocast():
        run.sample(step, gpt.sample_text(model, tokens, length, trainer.config.seed))


def save(trainer: Trainer, run: Run | None, tokens: tokenizer.Tokenizer, step: int) -> None:
    """A checkpoint and the pictures. What is random depends on seed and step alone: there is no state of it to save."""
    checkpoint = {
        "step": step,
        "model": trainer.ranks.gather_full(trainer.raw_model.state_dict()),
        "optimizers": [trainer.ranks.optimizer_state(optimizer) for optimizer in trainer.optimizers],
        "config": dataclasses.asdict(trainer.raw_model.config),
        "tokenizer": tokens.spec(),
        "run": dataclasses.asdict(trainer.config),
        "micro_batch": trainer.micro_batch,
    }
    if run:
        run.save(checkpoint, trainer.config.keep)
        run.draw()


def start_run(trainer: Trainer, val_split: shards.Split, step: int):
    """The run's folder, behind a few lines that say what is about to be trained; on the first process alone."""
    config, shape, device, ranks = trainer.config, trainer.raw_model.config, trainer.device, trainer.ranks
    if ranks.rank > 0:
        return contextlib.nullcontext()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{trainer.raw_model.parameter_count() / 1e6:.2f}M parameters, vocabulary of {shape.vocab_size:,} tokens")
    print(f"{ranks.world_size} x {device.type} ({name}), {str(trainer.dtype).removeprefix('torch.')}")
    print(f"{config.batch_tokens:,} tokens a step, {trainer.micro_batch} sequences a micro-step; into {config.out_dir}")
    afresh = config.resume == "never" and not restarted_in(Path(config.out_dir))
    flops = config.batch_tokens * trainer.raw_model.flops_per_token() / ranks.world_size
    pace = Pace(config.max_steps - step, flops, matmul_speed(device))
    return Run(Path(config.out_dir), dataclasses.asdict(config), step, reference_losses(val_split), afresh, pace)


def run_step(trainer: Trainer, loader: Loader, watch: diagnostics.Diagnostics, step: int) -> dict:
    """One step with its batch, measured: the line of log.jsonl, ms and tokens_per_s without what --diagnose takes."""
    config, peak = trainer.config, devices.peak_flops(trainer.device)
    began = time.perf_counter()
    inputs, targets = loader.batch(step - 1)
    diagnosed = trainer.ranks.rank == 0 and config.diagnose and (step == 1 or step % config.diagnose == 0)
    with watch.watching(inputs, targets) if diagnosed else contextlib.nullcontext({}) as found:
        loss, grad_norm = train_step(trainer, inputs, targets, step)
    seconds = time.perf_counter() - began - found.get("ms", 0.0) / 1000
    for sentence in watch.new_warnings(found) if found else ():
        tqdm.write(f"warning: step {step}: {sentence}", file=sys.stderr)
    tokens_per_s = config.batch_tokens / seconds
    return {
        "step": step,
        "tokens": step * config.batch_tokens,
        "loss": loss,
        "lr": learning_rate(step, config),
        "grad_norm": grad_norm,
        "ms": round(seconds * 1000, 3),
        "tokens_per_s": round(tokens_per_s, 1),
        "mfu": tokens_per_s * trainer.raw_model.flops_per_token() / (peak * trainer.ranks.world_size) if peak else None,
    } | ({"diagnostics": found} if found else {})


def train(config: Config, ranks: Distributed) -> int:
    """A run, or the rest of one. Returns the exit status: 0, or 128 + the signal that ended it early."""
    trainer, loader, val_split, tokens, checkpoint = set_up(config, ranks)
    first, last = checkpoint["step"] if checkpoint else 0, config.max_steps
    del checkpoint  # gigabytes
    if first >= last:
        if ranks.rank == 0:
            print(f"{config.out_dir} has done its {first} steps: raise --max-steps, or use --resume never")
        return 0
    questions = []
    if config.hellaswag_every:
        questions = hellaswag.questions_for(config.hellaswag_input, tokens, config.block_size, ranks)
    watch = diagnostics.Diagnostics(trainer.raw_model, trainer.optimizers, trainer.autocast)
    trace = profiler(config.out_dir) if config.profile and ranks.rank == 0 else contextlib.nullcontext()
    stopping = 0
    with start_run(trainer, val_split, first) as run, StopRequest() as stop, trace as profiling:
        for step in range(first + 1, last + 1):
            record = run_step(trainer, loader, watch, step)
            if due(step, config.eval_every, last):
                record["val_loss"] = validate(trainer, val_split)
            if questions and due(step, config.hellaswag_every, last):
                record |= hellaswag.scores(trainer.raw_model, questions, trainer.device, ranks, trainer.autocast)
            stopping = ranks.all_reduce_max(stop.signal)  # all processes stop after the same step
            if run:
                run.log(record)
            if stopping or due(step, config.checkpoint_every, last):
                save(trainer, run, tokens, step)
            if due(step, config.sample_every, last):
                sample(trainer, run, tokens, step)
            if profiling:
                profiling.step()
            if stopping:
                break
    if run:
        run.finish()
    return 128 + stopping if stopping else 0


def find_learning_rate(config: Config, ranks: Distributed) -> int:
    """--find-lr: a sweep over weights that are thrown away, into find_lr.png and a line that suggests a rate."""
    trainer, loader, *_ = set_up(dataclasses.replace(config, resume="never"), ranks)

    def loss_at(rate: float, step: int) -> float:
        trainer.config = dataclasses.replace(config, lr=rate, min_lr=rate, warmup_steps=0)
        return train_step(trainer, *loader.batch(step - 1), step)[0]

    find_lr.run_finder(loss_at, Path(config.out_dir), quiet=ranks.rank > 0)
    return 0


def run(config: Config) -> int:
    """Prepare the data, join the other processes, and train, or sweep the learning rate. Returns the exit status."""
    ranks = Distributed.from_env(config.parallel)
    data.prepare_if_missing(config.data)  # before they form a group: whoever waits inside one runs out of time
    shards.open_split(data.dataset_dir(config.data), "train")  # what is wrong with it is said before the next download
    if config.hellaswag_every and not config.find_lr:
        hellaswag.prepare_if_missing(config.hellaswag_input)
    with (
        ranks.process_group(gpus=torch.cuda.is_available() and config.device != "cpu"),
        devices.explain_out_of_memory(),
    ):
        return find_learning_rate(config, ranks) if config.find_lr else train(config, ranks)


def show_plan(config: Config) -> int:
    """--plan: what a run with these options would take, for as many GPUs as torchrun starts processes."""
    vocab_size = 50257  # FineWeb-Edu's tokens are GPT-2's: nothing to prepare
    if config.data not in data.DATASETS or not config.data.startswith("fineweb"):
        data.prepare_if_missing(config.data)
        vocab_size = shards.open_split(data.dataset_dir(config.data), "train").vocab_size
    dist = Distributed.from_env(config.parallel)
    if dist.rank == 0:
        print(plan.report(config, vocab_size, dist.world_size))
    return 0


def parse(arguments: list[str]) -> Config:
    return tyro.extras.overridable_config_cli(PRESETS, prog="train_gpt2.py", args=arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command line, sys.argv by default; under torchrun, one process of several. Ends with SystemExit."""
    sys.stdout.reconfigure(errors="replace")  # where a terminal lacks a character of a sample
    with files.exit_on_user_error():
        startup.end()
        arguments, grid = sweep.take_grid(sys.argv[1:] if arguments is None else arguments)
        config = files.parse_options(lambda: parse(arguments))
        alone = [as_flag(name) for name in ("plan", "find_lr", "ladder") if getattr(config, name)]
        if len(alone) + (grid is not None) > 1:
            raise UserError(f"{' and '.join(alone)} and --sweep are commands of their own: give one of them")
        if config.plan:
            status = show_plan(config)
        elif grid is not None:
            status = sweep.train_grid(Path(__file__), arguments, grid, parse)
        elif config.ladder:
            status = sweep.climb_ladder(Path(__file__), arguments, parse)
        else:
            status = run(config)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
