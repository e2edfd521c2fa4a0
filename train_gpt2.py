"""
Train a GPT-2: one script from a laptop's two cores to several machines of eight GPUs.

    python train_gpt2.py laptop                                      minutes on two CPU cores
    python train_gpt2.py shakespeare-char                            a character GPT, 10.8M weights
    torchrun --standalone --nproc_per_node=8 train_gpt2.py gpt2-124m GPT-2 (124M)
    python train_gpt2.py laptop --help                               every option, with its default

A run is a folder, --out-dir: config.json, log.jsonl (a line per step), loss.png, samples.txt,
checkpoints/. The same command resumes an interrupted run, bit for bit as if nothing had happened.

In reading order: options, presets, one training step, validation, how a run starts, the loop.
"""

from data import startup

if __name__ == "__main__":
    startup.begin(torch=True)  # before torch, which takes seconds and reads what this sets

import contextlib
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import shards
from data.corpora import FINEWEB_TOKENS, dataset_dir, prepare_if_missing
from data.files import UserError, as_flag, as_user_error, exit_on_user_error
from data.loader import count_scored, evaluation_windows, read_windows
from data.streams import lasting_streams
from model import GPT, GPTConfig, sample_text
from training import command_line, devices, header, hellaswag, recipe, setup, weights
from training import find_lr as lr_finder
from training import plan as planner
from training import sweep as sweeps
from training.checkpoint import fitting, starting_point
from training.diagnostics.measure import Diagnostics
from training.distributed import Distributed, Mode, ended_at_once
from training.ladder import climb as road
from training.optimizer import (
    learning_rate,
    make_optimizers,
    mean_learning_rate,
    update_average,
)
from training.run import Run, StopRequest, profiler
from training.setup import Data

# ---------------------------------------------------------------------------------------- options


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a GPT-2."""

    # data
    data: str = "fineweb-edu-10B"  # pydocs, shakespeare-char, fineweb-edu-..., a folder of shards
    out_dir: str = "runs/gpt2-124m"  # folder of the run

    # model
    n_layer: int = 12  # blocks; 0: a bigram model
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels
    block_size: int = 1024  # tokens per sequence
    dropout: float = 0.0  # probability; masks depend on seed, step, rank and --micro-batch

    # batch and steps
    batch_tokens: int = 524_288  # tokens per optimizer step, over all ranks and micro-steps
    micro_batch: int | Literal["auto"] = "auto"  # sequences at once; auto: as many as memory holds
    max_steps: int = 18_795  # optimizer steps; 18,795 are one pass over FineWeb-Edu's 10B sample
    seed: int = 1337  # of initialization, data order, dropout and samples
    shuffle: bool = True  # new order of sequences in every epoch; else the order on disk

    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: the blocks' matrices; rest: AdamW
    lr: float = 6e-4  # peak learning rate
    adamw_lr: float | None = None  # with muon: peak rate of AdamW's parameters; default: --lr
    min_lr: float | None = None  # learning rate at the last step; default: a tenth of --lr
    warmup_steps: int = 715  # steps over which the learning rate rises
    schedule: Literal["cosine", "linear"] = "cosine"  # from --lr to --min-lr; linear: flat at first
    decay_fraction: float = 0.67  # last fraction of the steps, in which the linear schedule falls
    zero_init: bool = False  # start every block as the identity: both c_proj at 0
    weight_decay: float = 0.1  # of matrices; biases and LayerNorms never decay
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema: int = 0  # steps to average weights over, for validation, samples and export; 0: off

    # evaluation
    eval_every: int = 250  # steps between validations; 0: only at the end
    eval_tokens: int = 10_485_760  # validation tokens, the same every time; at most the split
    hellaswag_every: int = 1000  # steps between HellaSwag evaluations, and at the end; 0: never
    hellaswag_input: str = ""  # questions in HellaSwag's format; default: its validation set
    sample_every: int = 1000  # steps between samples; 0: only at the end
    sample_tokens: int = 300  # tokens of a sample; 0: no samples

    # run
    checkpoint_every: int = 1000  # steps between checkpoints; the last step always writes one
    keep: int = 3  # newest checkpoints to keep
    resume: str = "auto"  # auto: if --out-dir has a run; never: move it aside; or a checkpoint
    init_from: str = ""  # weights and shape of gpt2 ..., a run, or a Hugging Face folder
    diagnose: int = 0  # steps between diagnoses of every layer (diagnostics.png); 0: off
    profile: bool = False  # write a torch.profiler trace of steps 6 to 8 to trace.json
    wandb: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # log to TensorBoard too

    # hardware
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; auto: bfloat16 if fast
    tf32: bool = True  # on a GPU, PyTorch's float32 matrix products in TF32 (10-bit mantissa)
    kernels: str = "auto"  # all, none, auto (all on GPU), or layernorm,gelu,attention,cross_entropy
    compile: bool = True  # torch.compile the model
    parallel: Mode = "ddp"  # zero1: shard the optimizer state; fsdp: weights and gradients too

    # other commands, instead of training
    plan: bool = False  # only print the memory, time, cost and disk space of the run
    find_lr: bool = False  # only try learning rates, draw find_lr.png and suggest one
    sweep: tuple[str, ...] = ()  # train a grid of runs: --sweep lr=1e-4,3e-4 n_layer=4,6
    recipe: bool = False  # train a ladder of recipes, from AdamW up, part by part
    ladder: bool = False  # climb from a neuron to GPT-2 beside published losses; without a preset

    def __post_init__(self):
        setup.check_config(self)

    def sequences_per_rank(self, world_size: int) -> int:
        """Return the sequences per rank and step; UserError if the batch does not divide evenly."""
        micro_batch = 1 if self.micro_batch == "auto" else self.micro_batch
        if self.batch_tokens % (multiple := self.block_size * world_size * micro_batch):
            nearest = max(1, round(self.batch_tokens / multiple)) * multiple
            micro = f"--micro-batch {self.micro_batch} and " if micro_batch > 1 else ""
            raise UserError(
                f"--batch-tokens {self.batch_tokens} does not divide evenly into {world_size} "
                f"process(es), {micro}sequences of {self.block_size}: it must be a multiple of "
                f"{multiple}, such as {nearest}"
            )
        return self.batch_tokens // self.block_size // world_size

    def shape(self, vocab_size: int) -> GPTConfig:
        sizes = self.n_layer, self.n_head, self.n_embd, self.block_size
        return GPTConfig(*sizes, vocab_size, self.dropout)


# ---------------------------------------------------------------------------------------- presets

# fmt: off
LAPTOP = Config(
    data="pydocs", out_dir="runs/laptop", n_layer=4, n_head=4, n_embd=128, block_size=128,
    batch_tokens=16 * 128, micro_batch=16, max_steps=700, optimizer="muon", lr=1e-2, adamw_lr=2e-2,
    min_lr=0.0, warmup_steps=20, schedule="linear", zero_init=True, weight_decay=0.5,
    eval_every=100, eval_tokens=48_896, hellaswag_every=0, sample_every=350, checkpoint_every=350,
    compile=False,
)
CHARACTERS = Config(
    data="shakespeare-char", out_dir="runs/shakespeare-char", n_layer=6, n_head=6, n_embd=384,
    block_size=256, dropout=0.2, batch_tokens=64 * 256, max_steps=1000, optimizer="muon", lr=5e-3,
    min_lr=0.0, warmup_steps=20, schedule="linear", zero_init=True, weight_decay=0.4,
    eval_every=100, eval_tokens=111_360, hellaswag_every=0, sample_every=250, checkpoint_every=250,
)
# GPT-2's sizes have the learning rates of GPT-3's table 2.1, https://arxiv.org/abs/2005.14165, and
# train on FineWeb-Edu's sample-10BT once: of 9,953,989,344 GPT-2 tokens with end-of-text,
# 9,853,989,344 remain after the validation shard, 18,795 steps of 524,288.
MEDIUM = Config(out_dir="runs/gpt2-350m", n_layer=24, n_head=16, n_embd=1024, lr=3e-4)
LARGE = Config(out_dir="runs/gpt2-774m", n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4)
XL = Config(out_dir="runs/gpt2-1558m", n_layer=48, n_head=25, n_embd=1600, lr=2e-4)
# fmt: on


def fast(size: Config) -> Config:
    """Return a preset for the same model and fewer tokens, by the recipe of training/README.md."""
    narrow = 768 / size.n_embd  # wider matrices take smaller steps and decay less
    rates = {"lr": 3.6e-3 * narrow**0.5, "adamw_lr": 3e-3 * narrow**0.5}
    rates["weight_decay"] = 0.15 * narrow**1.5
    return dataclasses.replace(
        size,
        out_dir=f"{size.out_dir}-fast",
        max_steps=6400,
        optimizer="muon",
        warmup_steps=50,
        schedule="linear",
        min_lr=0.0,
        zero_init=True,
        **{name: float(f"{value:.2g}") for name, value in rates.items()},
    )


PRESETS = {
    "laptop": ("a small GPT in minutes on two CPU cores, no download", LAPTOP),
    "shakespeare-char": ("the 10.8M-parameter character GPT on tiny shakespeare", CHARACTERS),
    "gpt2-124m": ("GPT-2 on 10 billion tokens", Config()),
    "gpt2-350m": ("GPT-2 medium", MEDIUM),
    "gpt2-774m": ("GPT-2 large", LARGE),
    "gpt2-1558m": ("GPT-2 XL", XL),
    "gpt2-124m-fast": ("GPT-2 on 3.4 billion tokens", fast(Config())),
    "gpt2-350m-fast": ("GPT-2 medium on as many", fast(MEDIUM)),
    "gpt2-774m-fast": ("GPT-2 large", fast(LARGE)),
    "gpt2-1558m-fast": ("GPT-2 XL", fast(XL)),
}


# --------------------------------------------------------------------------- one step, validation


@dataclasses.dataclass
class Trainer:
    """
    State for a training step.

    `model` may be compiled and wrapped in DDP; `raw_model` is the unwrapped module with the same
    weights. `average` has those of --ema, if on.
    """

    config: Config
    raw_model: GPT
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    micro_batch: int  # sequences
    dist: Distributed = Distributed()
    partly_scored: bool = False  # some targets are IGNORED
    average: GPT | None = None

    @property
    def result(self) -> GPT:
        """The model that a run is for: validated, sampled from, exported."""
        return self.average or self.raw_model

    def autocast(self):
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)


def seed_dropout(*numbers: int) -> None:
    """Make torch's randomness a function of these numbers: a resumed run needs no saved state."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def train_step(
    trainer: Trainer, inputs: Tensor, targets: Tensor, step: int, stop: bool = False
) -> tuple[float, float, bool]:
    """
    Do one optimizer step on this rank's sequences, in micro-steps.

    inputs, targets: (sequences, block_size) int64
    stop:            this rank was asked to stop after the step
    Return the mean loss over ranks and micro-steps in nats per token, the gradient norm before
    clipping, and whether any rank was asked to stop. Raise UserError, with the weights unchanged,
    if loss or norm is not finite.
    """
    config, dist, size = trainer.config, trainer.dist, trainer.micro_batch
    seed_dropout(config.seed, step, dist.rank)
    micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    # backward sums gradients: dividing makes the sum the mean over the full batch
    divisors = [len(micro_batches)] * len(micro_batches)
    if trainer.partly_scored:  # the mean over scored tokens, of which some micro-batches have more
        counts = [count_scored(y) for _, y in micro_batches]
        mean = dist.sum(sum(counts).float()).clamp(min=1) / dist.world_size  # 0 / 0 is nan
        divisors = [mean / count for count in counts]  # infinite for none, whose loss is 0
    loss_sum = torch.zeros((), device=trainer.device)
    for micro_step, ((x, y), divisor) in enumerate(zip(micro_batches, divisors, strict=True), 1):
        # gradients accumulate on each rank: one all-reduce, in the last backward, is enough
        dist.set_grad_sync(trainer.model, enabled=micro_step == len(micro_batches))
        with trainer.autocast():
            loss = trainer.model(x, y) / divisor
        loss.backward()
        loss_sum += loss.detach()  # no .item(): it would wait for the GPU in every micro-step
    # one all-reduce carries both; a fill, since a copy from the host would wait
    loss_sum, stops = dist.sum(torch.stack([loss_sum, torch.full_like(loss_sum, stop)]))
    parameters = trainer.raw_model.parameters()
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
    # the step's only wait, before the update: if one is not finite, the weights stay intact
    mean_loss, grad_norm, stops = dist.floats(loss_sum / dist.world_size, grad_norm, stops)
    if not math.isfinite(mean_loss) or not math.isfinite(grad_norm):
        raise UserError(
            f"step {step} has loss {mean_loss} and gradient norm {grad_norm}: stopped before the "
            f"update, checkpoints in {config.out_dir} unchanged; lower --lr or raise --warmup-steps"
        )
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config) * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if trainer.average:
        update_average(trainer.average, trainer.raw_model, step, config.ema)
    return mean_loss, grad_norm, stops > 0


@torch.no_grad()
def validate(trainer: Trainer, split: shards.Split) -> float:
    """
    Return the mean loss in nats per token over the first --eval-tokens of the split.

    The tokens are the same for any batch size and number of ranks.
    """
    block_size, size, dist = trainer.config.block_size, trainer.micro_batch, trainer.dist
    starts = evaluation_windows(split, block_size, trainer.config.eval_tokens)
    mine = starts[dist.rank :: dist.world_size]
    trainer.result.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, and of their weights
    for first in range(0, math.ceil(len(starts) / dist.world_size), size):
        windows = mine[first : first + size]
        read = windows if len(windows) else starts[:1]  # fsdp: all ranks must call it equally often
        batch = read_windows(split, read, block_size)
        inputs, targets = (tensor.to(trainer.device) for tensor in batch)
        weight = len(windows)
        if trainer.partly_scored:
            weight = count_scored(targets).item() if weight else 0
        with trainer.autocast():
            loss = trainer.result(inputs, targets).item()
        sums += torch.tensor([loss * weight, weight])
    trainer.result.train()
    loss_sum, weight_sum = dist.sum(sums.to(trainer.device, torch.float32)).tolist()
    return loss_sum / weight_sum


# --------------------------------------------------------------------------------- starting a run


def make_trainer(
    config: Config, data: Data, dist: Distributed, checkpoint: dict | None = None
) -> Trainer:
    """Build the model and its optimizers: random, from --init-from, or from a checkpoint."""
    device, split = data.loader.device, data.loader.split
    dtype = devices.choose_dtype(config.dtype, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.manual_seed(config.seed)
    ops = setup.choose_ops(config, device, print if dist.rank == 0 else lambda sentence: None)
    raw_model = GPT(config.shape(split.vocab_size), ops)
    if config.zero_init:
        raw_model.zero_projections()
    if checkpoint:
        with fitting(checkpoint["path"], "this model"):
            raw_model.load_state_dict(checkpoint.get("training", checkpoint["model"]))
    elif config.init_from:
        weights.init_from(raw_model, config.init_from, split.tokenizer_spec)
    raw_model.to(device)
    trainer = Trainer(
        config, raw_model, raw_model, [], device, dtype, 0, dist, split.partly_scored
    )
    if config.ema:
        trainer.average = GPT(raw_model.config, ops).to(device).requires_grad_(False)
        trainer.average.load_state_dict(raw_model.state_dict())
        if checkpoint:
            with fitting(checkpoint["path"], "this model"):
                trainer.average.load_state_dict(checkpoint["model"])
    plan = planner.Plan(config, split.vocab_size, dist.world_size)
    trainer.micro_batch = devices.choose_micro_batch(
        config, raw_model, dist, plan, trainer.autocast, checkpoint and checkpoint["micro_batch"]
    )
    dist.shard(raw_model, list(raw_model.transformer.h))
    trainer.optimizers = make_optimizers(raw_model, config, dist, dtype)
    if checkpoint:
        with fitting(checkpoint["path"], "this model"):
            for each, state in zip(trainer.optimizers, checkpoint["optimizers"], strict=True):
                dist.load_optimizer_state(each, state)
    trainer.model = dist.replicate(devices.compiled(raw_model) if config.compile else raw_model)
    return trainer


# --------------------------------------------------------------------------------------- the loop


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def sample(trainer: Trainer, run: Run | None, data: Data, step: int) -> None:
    """Append --sample-tokens of text to samples.txt, drawn with the same seed every time."""
    model, dist, length = trainer.result, trainer.dist, trainer.config.sample_tokens
    if length == 0:
        return
    full = dist.gather_full(model.state_dict()) if dist.mode == "fsdp" else None
    if run is None:
        return
    if full:
        model = GPT(model.config, model.ops).to(trainer.device)
        model.load_state_dict(full)
    with trainer.autocast():
        run.sample(step, sample_text(model, data.tokenizer, length, trainer.config.seed))


def save(trainer: Trainer, run: Run | None, data: Data, step: int) -> None:
    """Write a checkpoint and the plots. No RNG state: randomness depends on seed and step."""
    checkpoint = {
        "step": step,
        "model": trainer.dist.gather_full(trainer.result.state_dict()),
        "optimizers": [trainer.dist.optimizer_state(each) for each in trainer.optimizers],
        "config": dataclasses.asdict(trainer.raw_model.config),
        "tokenizer": data.tokenizer.spec(),
        "run": dataclasses.asdict(trainer.config),
        "micro_batch": trainer.micro_batch,
        "data": data.fingerprint,
    }
    if trainer.average:
        checkpoint["training"] = trainer.raw_model.state_dict()
    if run:
        run.save(checkpoint, trainer.config.keep)
        run.draw()


def run_step(
    trainer: Trainer, data: Data, watch: Diagnostics, step: int, stop: bool
) -> tuple[dict, bool]:
    """
    Do a step. Return its record for log.jsonl, with times that exclude --diagnose, and whether any
    rank was asked to stop, as this one by `stop`.
    """
    config, dist, peak = trainer.config, trainer.dist, devices.peak_flops(trainer.device)
    began = time.perf_counter()
    inputs, targets = data.loader.batch(step - 1)
    diagnosed = config.diagnose and (step == 1 or step % config.diagnose == 0) and dist.rank == 0
    watching = watch.watching(inputs, targets) if diagnosed else contextlib.nullcontext({})
    with watching as found:
        loss, grad_norm, stop = train_step(trainer, inputs, targets, step, stop)
    seconds = time.perf_counter() - began - found.get("ms", 0.0) / 1000
    for sentence in watch.new_warnings(found) if found else ():
        tqdm.write(f"warning: step {step}: {sentence}", file=sys.stderr)
    tokens_per_s = config.batch_tokens / seconds
    flops = tokens_per_s * trainer.raw_model.flops_per_token()
    memory = devices.peak_memory(trainer.device)
    record = {
        "step": step,
        "tokens": step * config.batch_tokens,
        "loss": loss,
        "lr": learning_rate(step, config),
        "grad_norm": grad_norm,
        "ms": round(seconds * 1000, 3),
        "tokens_per_s": round(tokens_per_s, 1),
        "mfu": flops / (peak * dist.world_size) if peak else None,
        "memory_gb": round(memory / 1e9, 3) if memory else None,
    } | ({"diagnostics": found} if found else {})
    return record, stop


def train(config: Config, dist: Distributed) -> int:
    """Train, or resume. Return the exit status: 0, or 128 + the signal that ended it early."""
    data = setup.open_data(config, dist)
    checkpoint = starting_point(config, data.tokenizer.spec(), dist, data.fingerprint)
    first, last = checkpoint["step"] if checkpoint else 0, config.max_steps
    if first >= last:
        if dist.rank == 0:
            setup.complete(config, data, first)
        return 0
    if checkpoint and dist.rank == 0:
        print(header.resumed(config, checkpoint))
    trainer = make_trainer(config, data, dist, checkpoint)
    del checkpoint  # it memory-maps a file that --keep may delete
    questions = []
    if config.hellaswag_every:
        file, tokens = config.hellaswag_input, data.tokenizer
        questions = hellaswag.questions_for(file, tokens, config.block_size, dist)
    watch = Diagnostics(trainer.raw_model, trainer.optimizers, trainer.autocast)
    profiled = config.profile and dist.rank == 0
    trace = profiler(config.out_dir, last - first) if profiled else contextlib.nullcontext()
    stopping = 0
    with setup.open_run(trainer, data, first) as run, StopRequest() as stop, trace as profiling:
        doing = run.doing if run else lambda what: None  # what takes time between two steps
        for step in range(first + 1, last + 1):
            record, agreed = run_step(trainer, data, watch, step, stop.signal > 0)
            if due(step, config.eval_every, last):
                doing("validating")
                record["val_loss"] = validate(trainer, data.val_split)
            if questions and due(step, config.hellaswag_every, last):
                doing("HellaSwag")
                record |= hellaswag.scores(
                    trainer.result, questions, trainer.device, dist, trainer.autocast
                )
            if agreed or dist.world_size == 1:  # all ranks stop after the same step
                stopping = dist.all_reduce_max(stop.signal)
            if run:
                run.log(record)
            if due(step, config.sample_every, last):  # before saving: a kill may come between
                doing("sampling")
                sample(trainer, run, data, step)
            if stopping or due(step, config.checkpoint_every, last):
                doing("saving")
                save(trainer, run, data, step)
            if profiling:
                profiling.step()
            if stopping:
                break
    if run:
        run.finish()
    return 128 + stopping if stopping else 0


# --------------------------------------------------------------------------------------- commands


def find_learning_rate(config: Config, dist: Distributed) -> int:
    """--find-lr: try learning rates on weights that are thrown away, and suggest one."""
    data = setup.open_data(config, dist)
    trainer = make_trainer(config, data, dist)

    def loss_at(rate: float, step: int) -> float:
        trainer.config = dataclasses.replace(config, lr=rate, min_lr=rate, warmup_steps=0)
        return train_step(trainer, *data.loader.batch(step - 1), step)[0]

    # AdamW comes last, and its rate keeps its distance from Muon's during the sweep
    ratio = trainer.optimizers[-1].param_groups[0]["lr_ratio"]
    mean_rate = mean_learning_rate(config) / config.lr
    lr_finder.run_finder(loss_at, Path(config.out_dir), dist.rank > 0, ratio, mean_rate)
    return 0


def launch(config: Config) -> int:
    """Check options, prepare the data, join the other ranks, train. Return the exit status."""
    dist = Distributed.from_env(config.parallel)
    setup.check_options(config, dist)
    # before the ranks join: those that wait in a collective would time out
    prepare_if_missing(config.data)
    shards.open_split(dataset_dir(config.data), "train")  # fail early on a wrong folder
    if config.hellaswag_every and not config.find_lr:
        hellaswag.prepare_if_missing(config.hellaswag_input)
    gpus = torch.cuda.is_available() and config.device != "cpu"
    with lasting_streams(), dist.process_group(gpus), devices.explain_out_of_memory():
        status = find_learning_rate(config, dist) if config.find_lr else train(config, dist)
    dist.end_process(status)
    return status


def show_plan(config: Config) -> int:
    """--plan: print what a run would need, with one GPU per process of torchrun."""
    dist = Distributed.from_env(config.parallel, joining=False)
    n_tokens, vocab_size = FINEWEB_TOKENS.get(config.data), 50257  # GPT-2's
    if n_tokens is None:
        prepare_if_missing(config.data)
        splits = [shards.open_split(dataset_dir(config.data), name) for name in ("train", "val")]
        n_tokens, vocab_size = sum(split.n_tokens for split in splits), splits[0].vocab_size
    if dist.rank == 0:
        with as_user_error():
            print(planner.report(config, vocab_size, dist.world_size, n_tokens))
    return 0


def parse(arguments: list[str]) -> Config:
    return command_line.parse(arguments, PRESETS)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, sys.argv by default; one rank of several under torchrun."""
    with ended_at_once(), exit_on_user_error():
        arguments = sys.argv[1:] if arguments is None else arguments
        if "--ladder" in arguments:
            raise SystemExit(road.main([word for word in arguments if word != "--ladder"]))
        arguments, grid = sweeps.take_grid(arguments)
        if not arguments or {"-h", "--help"} & set(arguments):
            if os.environ.get("RANK", "0") == "0":
                print(command_line.show(arguments, PRESETS))
            return
        arguments = command_line.read_words(arguments, PRESETS)
        config = parse(arguments)
        command_line.check_warmup(arguments, config)
        chosen = [as_flag(name) for name in ("plan", "find_lr", "recipe") if getattr(config, name)]
        chosen += ["--sweep"] if grid is not None else []
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} are commands of their own: give one of them")
        if config.plan:
            status = show_plan(config)
        elif grid is not None:
            status = sweeps.train_grid(Path(__file__), arguments, grid, parse)
        elif config.recipe:
            status = recipe.climb(Path(__file__), arguments, parse)
        else:
            status = launch(config)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
