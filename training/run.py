"""
The run folder: what training writes and how it is read back; and the signals that end a run early.

    config.json                    the options of the run
    log.jsonl                      a line per step: step, tokens, loss, lr, grad_norm, ms, tokens_per_s, mfu, memory_gb,
                                   and if measured val_loss, hellaswag_acc, hellaswag_acc_norm, diagnostics
    loss.png                       the same as a picture
    diagnostics.png                with --diagnose: what happens in every layer
    distributions.png              with --diagnose: histograms of the newest diagnosis
    samples.txt                    text that the model wrote
    checkpoints/step_NNNNNN.pt     after NNNNNN steps: torch.save of a dict, read with weights_only=True
    checkpoints/step_NNNNNN.pt.sha256
    checkpoints/step_NNNNNN.pt.old set aside when the run resumed from an earlier one
    trace.json                     with --profile: a few steps of this process
    find_lr.png                    with --find-lr, which writes nothing else
    .launch                        the torchrun launch that wrote last: a restart resumes what its own launch wrote

Files appear atomically, except log.jsonl and samples.txt, which only grow, and what the profiler, wandb and TensorBoard
write. A checkpoint that does not match its sha256 is corrupt, and the one before it is used. One process at a time
writes to the folder: it holds a lock on `.lock`, which ends with the process.
"""

import importlib
import json
import math
import os
import re
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from data.files import UserError, atomic_write, lock
from training import curves, diagnostics, distributions
from training.checkpoint import checkpoints, launch_name, save_checkpoint, step_of
from training.pace import Pace

BAR = "{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{}{{postfix}}]"  # the braces are tqdm's, {} is Pace's
OVERFITTING = 0.03  # nats per token that the last validation loss may lie above the lowest
SAMPLE_LINE = "-" * 40  # begins each sample in samples.txt


class Run:
    """
    The folder of a run that has done `step` of its steps, and its progress bar in the terminal.

    config:     the options of train_gpt2.py; used are max_steps, init_from, hellaswag_input, wandb and tensorboard
    references: validation losses to compare with, by name: see curves.reference_losses
    fresh:      move an older run out of the way first; otherwise lines of log.jsonl past `step` are dropped
    pace:       estimates the time that the remaining steps take
    Raise UserError if another process writes to the folder, or the package of a service is missing.
    """

    def __init__(
        self, folder: Path, config: dict, step: int, references: dict[str, float], fresh=False, pace: Pace | None = None
    ):
        self.folder, self.references = folder, references
        self.published = {} if config.get("hellaswag_input") else curves.HELLASWAG  # for HellaSwag's own questions only
        self._untrained = not config.get("init_from")
        busy = f"another process is writing to {folder}: wait for it, or use --out-dir"
        if fresh and folder.exists():
            lock(folder / ".lock", busy).close()  # a live run is never moved
            _move_away(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder / ".lock", busy)
        _clean(folder, step)
        _write_text(folder / ".launch", launch_name())
        self.records = [record for record in read_log(folder) if record["step"] <= step]
        _write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
        _write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        _drop_samples(folder / "samples.txt", step)
        self._services, self._max_steps = _services(config, folder), config["max_steps"]
        self._log = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._pace, self._sample = pace or Pace(config["max_steps"] - step), None
        self._val = next((f" val {r['val_loss']:.3f}" for r in reversed(self.records) if "val_loss" in r), "")
        seconds = 0.1 if sys.stderr.isatty() else 10.0  # between refreshes: a log file needs few
        self._bar = tqdm(initial=step, total=config["max_steps"], unit="step", mininterval=seconds, dynamic_ncols=True)

    def log(self, record: dict) -> None:
        """Log a step: a line in log.jsonl, the bar, and wandb and TensorBoard if enabled."""
        if record["step"] == 1 and self._untrained:
            random = self.references[curves.RANDOM]
            if abs(record["loss"] - random) > 0.5:  # to an untrained model every token is equally likely
                first = f"the first loss is {record['loss']:.3f}, far from {random:.3f}, that of guessing"
                tqdm.write(f"warning: {first}: look at the data", file=sys.stderr)
        self.records.append(record)
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()
        for service in self._services:
            service({name: value for name, value in record.items() if isinstance(value, int | float)})
        if "val_loss" in record:
            self._val = f" val {record['val_loss']:.3f}"
        mfu = "" if record["mfu"] is None else f" MFU {record['mfu']:.1%}"
        rate = f"{record['tokens_per_s']:,.0f} tokens/s"
        self._pace.add(record["ms"] / 1000)
        if warning := self._pace.warning():
            tqdm.write(f"warning: {warning}", file=sys.stderr)
        self._bar.bar_format = BAR.format(self._pace.remaining())
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}{self._val} {rate}{mfu}", refresh=False)
        self._bar.update()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()  # ends its line, so that what follows, such as an error, starts a new one
        self._log.close()
        self._lock.close()

    def finish(self) -> None:
        """Print the last sample, the summary and what the folder holds."""
        if self._sample is not None:
            print(self._sample)
        for name, value in self.summary().items():
            print(f"{name:<26} {value}")
        for name, loss in self.references.items():
            print(f"{'compare: ' + name:<26} {loss:.4f}")
        print(f"{self.folder} holds loss.png, log.jsonl, samples.txt and checkpoints")
        print(f'python sample.py {self.folder} --prompt "..." writes more')

    def summary(self) -> dict[str, str]:
        """Return the run's figures by name, with a verdict if the model overfits."""
        last, losses = self.records[-1], [record["loss"] for record in self.records]
        minutes, seconds = divmod(round(sum(record["ms"] for record in self.records) / 1000), 60)
        tail = losses[-max(1, len(losses) // 10) :]

        def measured(name: str) -> list:
            return [record[name] for record in self.records if record.get(name) is not None]

        rows = {
            "steps": f"{last['step']:,}",
            "tokens": f"{last['tokens']:,}",
            "time in training steps": f"{minutes // 60} h {minutes % 60} min {seconds} s",
            "tokens/s, median": f"{statistics.median(measured('tokens_per_s')):,.0f}",
        }
        if last["step"] < self._max_steps:
            rows["steps"] += f" of {self._max_steps:,}: the same command resumes"
        if mfu := measured("mfu"):
            rows["MFU, median"] = f"{statistics.median(mfu):.1%}"
        if memory := measured("memory_gb"):
            rows["peak memory"] = f"{max(memory):.2f} GB"
        rows["training loss"] = f"{statistics.fmean(tail):.4f} nats per token, mean of the last {len(tail):,} step(s)"
        if validated := measured("val_loss"):
            loss, lowest = validated[-1], min(validated)
            step = next(record["step"] for record in self.records if record.get("val_loss") == lowest)
            rows["validation loss"] = f"{loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.2f}"
            rows["lowest validation loss"] = f"{lowest:.4f} after step {step:,}"
            if loss >= lowest + OVERFITTING:
                risen = f"the validation loss has risen by {loss - lowest:.3f} since step {step:,}"
                cure = "train for fewer steps, on more text, or with more --dropout or --weight-decay"
                rows["overfitting"] = f"{risen}: {cure}"
        if scores := measured("hellaswag_acc_norm"):
            published = ", ".join(f"{name} {score}" for name, score in self.published.items())
            rows["HellaSwag acc_norm"] = f"{scores[-1]:.4f}" + (f" (published: {published})" if published else "")
        return rows

    def sample(self, step: int, text: str) -> None:
        """Add a text to samples.txt."""
        self._sample = text
        with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"{SAMPLE_LINE} after {step} steps\n{text}\n")

    def draw(self) -> None:
        """Draw loss.png, and diagnostics.png if layers were diagnosed."""
        curves.draw(self.records, self.folder / "loss.png", self.folder.name, self.references, self.published)
        diagnostics.draw(self.records, self.folder / "diagnostics.png", self.folder.name)
        distributions.draw(self.records, self.folder / "distributions.png", self.folder.name)

    def save(self, checkpoint: dict, keep: int) -> None:
        """Write a checkpoint, named by its "step"; then remove all but the newest `keep`."""
        save_checkpoint(self.folder / "checkpoints" / f"step_{checkpoint['step']:06d}.pt", checkpoint)
        for old in checkpoints(self.folder)[keep:]:
            old.unlink()
            Path(f"{old}.sha256").unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- the folder


def _write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode()))


def _move_away(folder: Path) -> None:
    target = next(path for i in range(1, 10**6) if not (path := Path(f"{folder}.{i}")).exists())
    try:
        folder.rename(target)
    except OSError as error:
        raise UserError(f"{folder} cannot be moved to {target} ({error.strerror}): use another --out-dir") from error
    print(f"the old run in {folder} was moved to {target}")


def _drop_samples(path: Path, step: int) -> None:
    """Remove the samples of later steps, which this run will write again."""
    if path.exists():
        texts = re.split(rf"(?m)^(?={SAMPLE_LINE} after \d+ steps$)", path.read_text(encoding="utf-8"))
        kept = [text for text in texts if text and int(text.split(maxsplit=3)[2]) <= step]
        _write_text(path, "".join(kept)) if kept else path.unlink()


def _clean(folder: Path, step: int) -> None:
    """Remove what a kill left half-written; rename checkpoints past `step`, which this run will write again."""
    for path in [*folder.glob(".*.tmp"), *(folder / "checkpoints").glob(".*.tmp")]:
        path.unlink()
    for path in checkpoints(folder):
        if step_of(path) > step:
            path.replace(f"{path}.old")
            if (sidecar := Path(f"{path}.sha256")).exists():
                sidecar.replace(f"{path}.old.sha256")  # so that --resume can read it


def read_log(folder: Path) -> list[dict]:
    """Return the lines of a run's log.jsonl, without a last one that a kill truncated."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        records = [json.loads(line) for line in lines]
        if not all(isinstance(record["step"], int) for record in records):
            raise TypeError("a step that is not a number")
        return records
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is corrupt ({error}): move it away, the checkpoints do not need it") from error


# -------------------------------------------------------------------------------------------- signals, trace, services


class StopRequest:
    """Catch SIGINT and SIGTERM in `signal`, for the loop to save and stop; a second one exits at once."""

    numbers = signal.SIGINT, signal.SIGTERM

    def __enter__(self) -> "StopRequest":
        self.signal, self._before = 0, [(number, signal.signal(number, self.receive)) for number in self.numbers]
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number


def profiler(folder: str, steps: int) -> torch.profiler.profile:
    """Record steps 6 to 8 of this process, the last three of fewer, into trace.json; `.step()` ends a step."""
    active, before = min(3, steps), min(5, max(0, steps - 3))
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=before - min(1, before), warmup=min(1, before), active=active, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(f"{folder}/trace.json"),
    )


def require(package: str):
    """Return the module of wandb or tensorboard; raise UserError if it is not installed."""
    try:
        return importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(package, package))
    except ImportError as error:
        raise UserError(f"--{package} needs a package that is not installed: pip install {package}") from error


def _services(config: dict, folder: Path) -> list[Callable[[dict], None]]:
    """Return one function per enabled service, which logs the numbers of a step."""
    found = []
    if config.get("wandb"):
        run = require("wandb").init(project="gpt2-triton", dir=folder, config=config)
        found.append(lambda record: run.log(record, step=record["step"]))
    if config.get("tensorboard"):
        writer = require("tensorboard").SummaryWriter(folder)

        def write(record: dict) -> None:
            for name, value in record.items():
                writer.add_scalar(name, value, record["step"])
            writer.flush()

        found.append(write)
    return found
