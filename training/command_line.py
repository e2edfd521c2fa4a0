"""
The command line of train_gpt2.py: words to options, help by groups, and a suggestion for every word that is wrong.

    train_gpt2.py PRESET --option value --option=value --flag --no-flag

The help is read from the source of Config: a line per option, `name: type = default  # help`, below comments that name
the groups. A preset's micro-batch is an upper bound, so that a preset runs on any number of processes that divides its
batch; one that is typed is kept.
"""

import dataclasses
import inspect
import re
import shlex
import textwrap
import typing
from pathlib import Path

import tyro

from data.files import UserError, as_flag, meant, parse_options
from training import weights
from training.distributed import env_number

COLUMNS, LEFT = 100, 28  # of the help, and of its options
COMMAND = ["python", "train_gpt2.py"]
USAGE = "python train_gpt2.py PRESET --option value --flag --no-flag"

OTHER_NAMES = {  # what users of other repositories type -> what to type here
    "learning-rate": "--lr", "max-lr": "--lr", "lr-max": "--lr", "peak-lr": "--lr",
    "max-iters": "--max-steps", "lr-decay-iters": "--max-steps", "num-iterations": "--max-steps",
    "steps": "--max-steps", "iterations": "--max-steps", "num-steps": "--max-steps",
    "epochs": "--max-steps, the optimizer steps", "num-epochs": "--max-steps, the optimizer steps",
    "warmup-iters": "--warmup-steps", "warmup": "--warmup-steps",
    "batch-size": "--batch-tokens for a step's tokens, --micro-batch for the sequences at once",
    "total-batch-size": "--batch-tokens", "device-batch-size": "--micro-batch", "micro-batch-size": "--micro-batch",
    "gradient-accumulation-steps": "--batch-tokens, which --micro-batch divides into micro-steps",
    "grad-accum": "--batch-tokens, which --micro-batch divides into micro-steps",
    "dataset": "--data", "input": "--data", "train-data": "--data", "data-dir": "--data",
    "tokenizer": "--data: the tokenizer is the dataset's, see `python -m data.text --help`",
    "vocab-size": "--data: the vocabulary is the dataset's",
    "eval-interval": "--eval-every", "val-every": "--eval-every", "eval-iters": "--eval-tokens",
    "eval-only": "`python -m training.hellaswag --model RUN`, or `python sample.py RUN`",
    "log-interval": "log.jsonl in --out-dir, which has every step",
    "always-save-checkpoint": "--checkpoint-every", "save-every": "--checkpoint-every",
    "save-interval": "--checkpoint-every", "output-dir": "--out-dir", "output": "--out-dir", "log-dir": "--out-dir",
    "out": "--out-dir", "name": "--out-dir", "run-name": "--out-dir", "checkpoint": "--resume",
    "layers": "--n-layer", "num-layers": "--n-layer", "depth": "--n-layer",
    "heads": "--n-head", "num-heads": "--n-head",
    "d-model": "--n-embd", "hidden-size": "--n-embd", "width": "--n-embd", "embed-dim": "--n-embd",
    "context-length": "--block-size", "seq-len": "--block-size", "sequence-length": "--block-size",
    "wandb-log": "--wandb", "wandb-project": "--wandb", "wandb-run-name": "--wandb",
    "decay-lr": "--min-lr", "beta1": "--lr: AdamW's betas are fixed in training/optimizer.py",
    "beta2": "--lr: AdamW's betas are fixed in training/optimizer.py",
    "bias": "nothing: GPT-2 has its biases", "precision": "--dtype", "bf16": "--dtype bfloat16",
    "fp32": "--dtype float32", "cpu": "--device cpu", "gpu": "--device cuda", "cuda": "--device cuda",
    "gpus": "torchrun --standalone --nproc_per_node=2 in front of train_gpt2.py",
    "num-gpus": "torchrun --standalone --nproc_per_node=2 in front of train_gpt2.py",
    "backend": "--device: NCCL for GPUs, else gloo", "prompt": "`python sample.py RUN --prompt ...`",
    "preset": "the preset's name alone: python train_gpt2.py laptop",
    "config": "the preset's name alone: python train_gpt2.py laptop",
    "model": "the preset's name alone: python train_gpt2.py gpt2-124m",
}  # fmt: skip
OTHER_PRESETS = {
    "gpt2": "gpt2-124m", "gpt2-small": "gpt2-124m", "gpt2-medium": "gpt2-350m", "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m", "shakespeare": "shakespeare-char",
}  # fmt: skip
Presets = dict[str, tuple[str, object]]  # name -> (what it is, its Config)


def read_words(arguments: list[str], presets: Presets) -> list[str]:
    """
    Return a command line as its preset followed by options that exist, spelled --like-this.

    An option may precede the preset. --flag=True and --flag=False, as elsewhere, become --flag and --no-flag.
    Raise UserError for an unknown preset or option, with what was meant.
    """
    defaults = dataclasses.asdict(next(iter(presets.values()))[1])
    words, names, takes_value = [], [], False
    for word in arguments:
        if takes_value:
            words.append(word)
            takes_value = False
            continue
        if not word.startswith("-"):
            if names:
                hint = f"did you mean --{word}?" if word.partition("=")[0].replace("-", "_") in defaults else USAGE
                raise UserError(f"{word!r} belongs to no option: {hint}")
            names.append(word)
            continue
        _, has_value, value = word.partition("=")
        name = known_option(word, defaults, OTHER_NAMES, "python train_gpt2.py laptop")
        switch = isinstance(defaults[name.removeprefix("no_")], bool)
        if switch and has_value and value.lower() in ("true", "false"):
            on = (value.lower() == "true") != (name not in defaults)  # --no-NAME=False is --NAME
            name, has_value = ("" if on else "no_") + (name if name in defaults else name.removeprefix("no_")), ""
        words.append(as_flag(name) + (f"={value}" if has_value else ""))
        takes_value = not switch and not has_value
    known = f"the presets are {', '.join(presets)}"
    if not names:
        raise UserError(f"a preset is missing, as in `{shlex.join([*COMMAND, 'laptop', *words])}`: {known}")
    if names[0] not in presets:
        close = OTHER_PRESETS.get(names[0]) or meant(names[0], presets, 0.5)
        raise UserError(f"there is no preset {names[0]}: {f'did you mean {close}? ' if close else ''}{known}")
    return [names[0], *words]


def known_option(word: str, defaults: dict, others: dict[str, str], command: str) -> str:
    """
    Return the field that a word such as --max-steps=5 or --no-compile names, "no_" before it to switch it off.

    defaults: field -> value. others: names of other repositories -> what to type. Raise UserError if there is none.
    """
    name = word.partition("=")[0].lstrip("-").replace("_", "-")
    field = name.replace("-", "_")
    if field in defaults or isinstance(defaults.get(field.removeprefix("no_")), bool):
        return field
    close = meant(f"--{name}", map(as_flag, defaults))
    hint = f"use {others[name]}" if name in others else f"did you mean {close}?" if close else f"see {command} --help"
    raise UserError(f"there is no option --{name}: {hint}")


def parse(arguments: list[str], presets: Presets):
    """Return the Config of a command line. Raise UserError for what `read_words` refuses, and for a wrong value."""
    words = read_words(arguments, presets)
    preset = presets[words[0]][1]
    typed = {word.partition("=")[0] for word in words}
    shape = _shape_of(_value_of("--init-from", words), presets)
    if typed & {as_flag(name) for name in shape}:
        shape = {}
    elif shape:  # as many tokens per step, in sequences of that size
        if _value_of("--optimizer", words) == "adamw":  # the preset's may not fit the shape
            shape["optimizer"] = "adamw"
        shape["batch_tokens"] = max(1, round(preset.batch_tokens / shape["block_size"])) * shape["block_size"]
    # checked once it fits: with another --batch-tokens, the preset's micro-batch need not divide it
    default = dataclasses.replace(preset, micro_batch="auto", **shape)
    config = parse_options(lambda: tyro.cli(type(preset), default=default, args=words[1:], prog="train_gpt2.py"))
    if as_flag("adamw_lr") in typed and config.adamw_lr is not None and config.optimizer == "adamw":
        raise UserError("--adamw-lr is for --optimizer muon: with adamw, --lr is the only rate, so leave it out")
    if as_flag("micro_batch") in typed or preset.micro_batch == "auto":
        return config
    sequences, rest = divmod(config.batch_tokens, config.block_size * max(1, env_number("WORLD_SIZE", 1)))
    divisors = [n for n in range(1, preset.micro_batch + 1) if sequences % n == 0 and not rest]
    return dataclasses.replace(config, micro_batch=max(divisors, default=1))


def _value_of(flag: str, words: list[str]) -> str:
    """Return the last value of an option on a command line, "" without it."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    values += [value for word, value in zip(words, words[1:], strict=False) if word == flag]
    return values[-1] if values else ""


def _shape_of(model: str, presets: Presets) -> dict[str, int]:
    """Return the options of the shape of --init-from, {} without one that is there."""
    if model in OTHER_PRESETS and not Path(model).exists():
        preset = presets[OTHER_PRESETS[model]][1]
        return {name: getattr(preset, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    return weights.shape_of(model) if model and Path(model).exists() else {}


def check_warmup(arguments: list[str], config) -> None:
    """Raise UserError for a warmup that was typed and exceeds the run; a preset's may, for a run of a few steps."""
    typed = any(word.partition("=")[0] == "--warmup-steps" for word in arguments)
    if typed and config.warmup_steps > config.max_steps:
        longer = f"--warmup-steps {config.warmup_steps} is longer than the run, --max-steps {config.max_steps}"
        raise UserError(f"{longer}: the learning rate would never reach --lr")


# ---------------------------------------------------------------------------------------------------------------- help


def show(arguments: list[str], presets: Presets) -> str:
    """Return what is printed instead of training: the presets, or with --help the options of the one that is named."""
    named = [word for word in arguments if word in presets]
    if not arguments or (not named and set(arguments) <= {"-h", "--help"}):
        return show_presets(presets)
    return show_help(named[0] if named else next(iter(presets)), presets)


def show_presets(presets: Presets) -> str:
    """Return what a command line without words prints: every preset with its command."""
    lines = []
    for name, (text, config) in presets.items():
        start = "torchrun --standalone --nproc_per_node=8" if config.batch_tokens > 100_000 else "python"
        lines += [f"{name}: {text}", f"    {start} train_gpt2.py {name}"]
    return "\n".join([*lines, "", "python train_gpt2.py laptop --help shows every option"])


def show_help(name: str, presets: Presets) -> str:
    """Return the options in groups, with the preset's values, those that differ from Config's own marked."""
    text, preset = presets[name]
    kind, types = type(preset), typing.get_type_hints(type(preset))
    lines = [
        f"usage: python train_gpt2.py {name} [--option value ...]",
        "",
        f"{name}: {text}",
        "* a value of this preset",
    ]
    for line in inspect.getsource(kind).splitlines():
        if group := re.fullmatch(r"    # (.*)", line):
            lines += ["", group[1]]
        elif option := re.fullmatch(r"    (\w+): .* = .*?  # (.*)", line):
            field, value, usual = option[1], getattr(preset, option[1]), getattr(kind(), option[1])
            lines += _option_lines(field, value, types[field], option[2], "*" if value != usual else " ")
    others = ", ".join(other for other in presets if other != name)
    return "\n".join([*lines, "", *textwrap.wrap(f"other presets: {others}", COLUMNS, break_on_hyphens=False)])


def _option_lines(field: str, value, kind, text: str, mark: str) -> list[str]:
    """Return the lines of an option: its value, its choices, what it is."""
    left = f"{mark} {as_flag(field)} {'' if value in (None, ()) else value}"
    if isinstance(value, bool):
        left, text = f"{mark} --[no-]{as_flag(field)[2:]}", f"{text} [{'on' if value else 'off'}]"
    elif typing.get_origin(kind) is typing.Literal:
        text = f"{'|'.join(typing.get_args(kind))}: {text}"
    first, *rest = textwrap.wrap(text, COLUMNS - LEFT - 2)
    head = [f"{left:<{LEFT}}  {first}"] if len(left) <= LEFT else [left, " " * (LEFT + 2) + first]
    return [*head, *(" " * (LEFT + 2) + line for line in rest)]
