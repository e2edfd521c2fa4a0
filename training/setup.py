"""
Start a run: check that its options fit together, open its data, open its folder.

`config` is train_gpt2.Config, `trainer` its Trainer.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from data import shards
from data.corpora import dataset_dir
from data.files import UserError, as_user_error, check_numbers, identity
from data.loader import IGNORED, Loader, evaluation_windows, read_windows
from data.tokenizer import Tokenizer, from_spec
from kernels import Ops, families, select
from training import curves, devices, header, hellaswag, weights
from training.checkpoint import check_resume, checkpoints, restarted_in, step_of
from training.distributed import Distributed
from training.expected import expected_losses, first_losses
from training.pace import Pace, matmul_speed
from training.run import Run, require


def check_config(config) -> None:
    """Raise UserError for options that are out of range or exclude each other. config: train_gpt2.Config"""
    above_zero = ["block_size", "batch_tokens", "micro_batch", "max_steps", "lr", "eval_tokens"]
    above_zero += ["adamw_lr", "checkpoint_every", "keep"]
    zero_or_more = ["warmup_steps", "eval_every", "sample_every", "sample_tokens", "hellaswag_every", "seed"]
    zero_or_more += ["diagnose", "min_lr", "decay_fraction", "weight_decay", "grad_clip", "ema"]
    check_numbers(dataclasses.asdict(config), above_zero, zero_or_more)
    with as_user_error():
        config.shape(vocab_size=1)
        chosen = () if config.kernels == "auto" else families(config.kernels)
    config.sequences_per_rank(world_size=1)
    muon, mode = config.optimizer == "muon", config.parallel
    if config.dropout and "attention" in chosen:
        message = "the Triton attention has no dropout: use --dropout 0, or other --kernels"
    elif muon and config.n_layer == 0:
        message = "--optimizer muon trains blocks, and --n-layer 0 has none: use adamw"
    elif muon and mode == "fsdp":
        message = "--optimizer muon needs full matrices, not --parallel fsdp: use zero1 or ddp"
    elif config.ema and mode == "fsdp":
        message = "--ema averages full weights, not those of --parallel fsdp: use zero1 or ddp"
    elif config.decay_fraction > 1:
        message = f"--decay-fraction is {config.decay_fraction}, but must be at most 1"
    elif config.min_lr is not None and config.min_lr > config.lr:
        message = f"--min-lr {config.min_lr} is above --lr {config.lr}: it is the rate of the end"
    elif not config.out_dir or not config.data:
        message = "--data and --out-dir need a name: an unset variable?"
    elif config.diagnose and mode != "ddp":
        message = f"--diagnose needs all weights on one rank, not --parallel {mode}: use ddp"
    else:
        return
    raise UserError(message)


def check_options(config, dist: Distributed) -> None:
    """Raise UserError now for what would fail only after the data, many GB, is prepared."""
    config.sequences_per_rank(dist.world_size)
    device = devices.choose_device(config.device, dist)
    devices.check_machine(config, device, dist)
    with as_user_error():
        choose_ops(config, device, say=lambda sentence: None)
    folder, source = Path(config.out_dir), config.init_from
    if folder.is_file():
        raise UserError(f"--out-dir {folder} is a file: give the name of a folder, such as runs/{folder.stem}")
    check_resume(folder, config.resume, config.max_steps)
    if source and not (source in weights.RELEASES or Path(source).exists() or checkpoints(folder)):
        names = ", ".join(weights.RELEASES)
        raise UserError(f"--init-from {source}: use one of {names}, or the folder of a model")
    for name in ("wandb", "tensorboard"):
        if getattr(config, name):
            require(name)
    if config.hellaswag_every and config.hellaswag_input and not config.find_lr:
        hellaswag.read_questions(Path(config.hellaswag_input))


def choose_ops(config, device: torch.device, say: Callable) -> Ops:
    """Return the operations of --kernels; `say` is told what auto leaves to PyTorch on a GPU."""
    return select(config.kernels, device, config.dropout, config.n_embd, config.n_head, say)


@dataclasses.dataclass
class Data:
    """The data of a run: batches to train on, a split to validate on, their tokenizer and hash."""

    loader: Loader
    val_split: shards.Split
    tokenizer: Tokenizer
    fingerprint: str


def open_data(config, dist: Distributed) -> Data:
    """Open and verify the dataset; UserError if it is corrupt or differs between ranks."""
    folder = dataset_dir(config.data)
    train_split, val_split = (shards.open_split(folder, name) for name in ("train", "val"))
    windows = evaluation_windows(val_split, config.block_size, config.eval_tokens)  # long enough?
    targets = (read_windows(val_split, [start], config.block_size)[1] for start in windows)
    if val_split.partly_scored and not any((each != IGNORED).any() for each in targets):
        raise UserError(
            f"{val_split.label} has no response in its first --eval-tokens: raise it, or give more dialogues"
        )
    differ = dist.disagree(int(train_split.fingerprint[:7] + val_split.fingerprint[:7], 16))
    sums = []
    if not differ:  # ranks that see the same folder of the same machine share its files
        part, parts = dist.among_equals(identity(folder))
        for split in (train_split, val_split):
            sums += split.verify(part, parts)
        differ, sums = dist.differing(sums)
    if differ:
        raise UserError(f"the ranks see different files in {folder}: share it, or copy it to all")
    if train_split.note and dist.rank == 0:
        print(f"note: {train_split.note}")
    content = f"{train_split.fingerprint} {val_split.fingerprint} {sums}".encode()
    size = config.sequences_per_rank(dist.world_size) * dist.world_size
    device = devices.choose_device(config.device, dist)
    order = config.seed, dist.rank, dist.world_size, device, config.shuffle
    loader = Loader(train_split, config.block_size, size, *order)
    tokenizer = from_spec(train_split.tokenizer_spec)
    return Data(loader, val_split, tokenizer, hashlib.sha256(content).hexdigest())


def open_run(trainer, data: Data, step: int):
    """Print what will be trained and return its Run; a null context on ranks other than 0."""
    config, model, device, dist = trainer.config, trainer.raw_model, trainer.device, trainer.dist
    if dist.rank > 0:
        return contextlib.nullcontext()
    speed = matmul_speed(device)
    print(header.describe(trainer, data, step, speed), flush=True)
    if config.warmup_steps >= config.max_steps:
        warmup = f"--warmup-steps {config.warmup_steps} is not below --max-steps {config.max_steps}"
        print(f"warning: {warmup}: the learning rate never falls", file=sys.stderr)
    folder = Path(config.out_dir)
    fresh = config.resume == "never" and not restarted_in(folder)
    references = curves.reference_losses(data.val_split)
    flops = config.batch_tokens * model.flops_per_token() / dist.world_size
    pace = Pace(config.max_steps - step, flops, speed)
    expected = expected_losses(data.val_split, model.config)
    identity = config.zero_init or config.n_layer == 0
    first = None if config.init_from else first_losses(model.config, identity)
    return Run(folder, dataclasses.asdict(config), step, references, fresh, pace, expected, first)


def complete(config, data: Data, step: int) -> None:
    """Say that all steps are done, after what a kill may have prevented: plots and the summary."""
    folder, references = Path(config.out_dir), curves.reference_losses(data.val_split)
    if [step_of(path) for path in checkpoints(folder)[:1]] == [step]:  # else newer ones were moved aside
        expected = expected_losses(data.val_split, config.shape(data.val_split.vocab_size))
        with Run(folder, dataclasses.asdict(config), step, references, expected=expected) as run:
            run.draw()
        run.finish()
    print(f"{folder} has done its {step} steps: raise --max-steps, or use --resume never")
