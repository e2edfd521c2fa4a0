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
    .wandb                         with --wandb: the id of the run there
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
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from data.files import UserError, atomic_write, lock, naming, remove
from data.outside import check_shape
from data.streams import best_effort, printable
from training import curves
from training.checkpoint import checkpoints, launch_name, one_line, save_checkpoint, step_of
from training.diagnostics import distributions, panels
from training.expected import Expected
from training.pace import Pace
from training.progress import Progress

DRAW_SECONDS = 10.0  # between pictures: drawing takes a while
OVERFITTING = 0.03  # nats per token that the last validation loss may lie above the lowest
SAMPLE_LINE = "-" * 40  # begins each sample in samples.txt
OWN = ("config.json", "log.jsonl", "checkpoints")  # a folder that holds one of these is a run
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
RECORD = {  # what is read of a line of log.jsonl, in the terms of outside.check_shape
    "step": range(1, 2**62),
    "tokens": range(1, 2**62),
    "loss": float,
    "ms": float,
    "tokens_per_s": float,
    "mfu?": (float, None),
    "memory_gb?": (float, None),
    "val_loss?": float,
    "hellaswag_acc?": float,
    "hellaswag_acc_norm?": float,
    "diagnostics?": dict,
}


class Run:
    """
    The folder of a run that has done `step` of its steps, and its progress on standard error.

    config:     the options of train_gpt2.py; used are max_steps, hellaswag_input, wandb and tensorboard
    references: validation losses to compare with, by name: see curves.reference_losses
    fresh:      move an older run out of the way first; otherwise lines of log.jsonl past `step` are dropped
    pace:       estimates the time that the remaining steps take
    expected:   the validation losses of runs that ended well: a band in loss.png, and one warning above it
    first:      the least and the largest loss that the first step should have
    Raise UserError if another process writes to the folder, or the package of a service is missing.
    """

    def __init__(
        self,
        folder: Path,
        config: dict,
        step: int,
        references: dict[str, float],
        fresh: bool = False,
        pace: Pace | None = None,
        expected: Expected | None = None,
        first: tuple[float, float] | None = None,
    ):
        self.folder, self.references, self.expected, self._first = folder, references, expected, first
        self.published = {} if config.get("hellaswag_input") else curves.HELLASWAG  # for HellaSwag's own questions only
        busy = f"another process is writing to {folder}: wait for it, or use --out-dir"
        if fresh and any((folder / name).exists() for name in OWN):  # what is not a run is never moved
            lock(folder / ".lock", busy).close()  # a live run is never moved
            _move_away(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder / ".lock", busy)
        self.records = _log_until(folder, step)  # may be an error, so before anything is changed
        _clean(folder, step, config.get("keep", sys.maxsize))
        if step < config["max_steps"]:  # else only the end is missing
            _write_text(folder / ".launch", launch_name())
            _write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
        _write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        with best_effort(f"{folder / 'samples.txt'} stays as it is"):
            _drop_samples(folder / "samples.txt", step)
        self._max_steps, unfinished = config["max_steps"], step < config["max_steps"]
        self._services = _services(config, folder) if unfinished else {}
        self._log = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._sample, self._drawn = None, time.perf_counter()
        self._pace = pace or Pace(config["max_steps"] - step)
        val_loss = next((record["val_loss"] for record in reversed(self.records) if "val_loss" in record), None)
        self._progress = Progress(config["max_steps"], step, self._pace, val_loss)
        self.doing = self._progress.doing

    def log(self, record: dict) -> None:
        """Log a step: a line in log.jsonl, the bar, and wandb and TensorBoard if enabled."""
        if record["step"] == 1 and self._first:
            low, high = self._first
            if not low <= record["loss"] <= high:
                wrong = f"the first loss is {record['loss']:.3f}, not {low:.2f} to {high:.2f} as of random weights"
                self._progress.say(f"warning: {wrong}: look at the data, or at the size of the model")
        self.records.append(record)
        with naming(self.folder / "log.jsonl"):
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
        for name, service in self._services.items():
            with best_effort(f"--{name} lacks some steps"):
                service({name: value for name, value in record.items() if isinstance(value, int | float)})
        self._progress.step(record)
        if "val_loss" in record and self.expected:
            self._warn_above_band()
        if "val_loss" in record and time.perf_counter() - self._drawn > DRAW_SECONDS:
            self.draw()

    def _warn_above_band(self) -> None:
        """Say it when a validation loss is above the band for the first time."""
        found = [self.expected.warning(r["tokens"], r["val_loss"]) for r in self.records if "val_loss" in r]
        if found[-1] and not any(found[:-1]):
            self._progress.say(f"warning: {found[-1]}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self._progress.close()
        with suppress(OSError):  # of a line that log() could not write, which said so
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
        names = [name for name in ("loss.png", "log.jsonl", "samples.txt") if (self.folder / name).exists()]
        print(f"{self.folder} holds {', '.join(names)} and checkpoints")
        print(f'python sample.py {self.folder} --prompt "..." writes more')

    def summary(self) -> dict[str, str]:
        """Return the run's figures by name, with a verdict if the model overfits; none if the log is lost."""
        if not self.records:
            return {}
        last, losses = self.records[-1], [record["loss"] for record in self.records]
        minutes, seconds = divmod(round(sum(record["ms"] for record in self.records) / 1000), 60)
        tail = losses[-max(1, len(losses) // 10) :]

        def measured(name: str) -> list:
            return [record[name] for record in self.records if record.get(name) is not None]

        steps = f"{last['step']:,}"
        if last["step"] < self._max_steps:
            steps = f"stopped at {steps} of {self._max_steps:,}: the same command resumes"
        rows = {
            "steps": steps,
            "tokens": f"{last['tokens']:,}",
            "time in training steps": f"{minutes // 60} h {minutes % 60} min {seconds} s",
            "tokens/s, median": f"{statistics.median(measured('tokens_per_s')):,.0f}",
        }
        if self._pace.done:
            rows["wall time of this start"] = self._pace.elapsed()
        if mfu := measured("mfu"):
            rows["MFU, median"] = f"{statistics.median(mfu):.1%}"
        if memory := measured("memory_gb"):
            rows["peak memory"] = f"{max(memory):.2f} GB"
        rows["training loss"] = f"{statistics.fmean(tail):.4f} nats per token, mean of the last {len(tail):,} step(s)"
        if validated := measured("val_loss"):
            loss, lowest = validated[-1], min(validated)
            step = next(record["step"] for record in self.records if record.get("val_loss") == lowest)
            when = next(record["step"] for record in reversed(self.records) if "val_loss" in record)
            perplexity = math.exp(min(loss, 700))
            rows["validation loss"] = f"{loss:.4f} nats per token after step {when:,}, perplexity {perplexity:.2f}"
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
        path = self.folder / "samples.txt"
        with best_effort(f"no sample of step {step}"), naming(path), path.open("ab") as file:
            file.write(f"{SAMPLE_LINE} after {step} steps\n{text}\n".encode("utf-8", "replace"))

    def draw(self) -> None:
        """Draw loss.png, and diagnostics.png if layers were diagnosed."""
        self._drawn = time.perf_counter()
        if not self.records:
            return
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a folder's name in the title
        title = printable(self.folder.resolve().name)
        with best_effort(f"{self.folder} has no new loss.png"):
            compared = self.references, self.published, self.expected
            curves.draw(self.records, self.folder / "loss.png", title, *compared)
        for module, name in ((panels, "diagnostics.png"), (distributions, "distributions.png")):
            with best_effort(f"{self.folder} has no new {name}"):
                module.draw(self.records, self.folder / name, title)

    def save(self, checkpoint: dict, keep: int) -> None:
        """Write a checkpoint, named by its "step"; then remove all but the newest `keep`."""
        with naming(self.folder / "log.jsonl"):
            os.fsync(self._log.fileno())  # after a power cut the log must reach the checkpoint
        save_checkpoint(self.folder / "checkpoints" / f"step_{checkpoint['step']:06d}.pt", checkpoint)
        _remove_old(self.folder, keep)


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
    """Remove the samples of later steps, which this run will write again; text before the first sample stays."""
    if path.exists():
        content, line = path.read_bytes(), SAMPLE_LINE.encode()  # a kill or a full disk may have cut it anywhere
        last = content.rpartition(b"\n")[2]
        whole = content.removesuffix(last) if line.startswith(last) or last.startswith(line) else content
        pieces = re.split(rb"(?m)^(?=%b after \d+ steps\r?$)" % line, whole)
        found = [(re.match(rb"-+ after (\d{1,18}) steps", piece), piece) for piece in pieces]
        kept = b"".join(piece for header, piece in found if not header or int(header[1]) <= step)
        kept += b"" if kept.endswith(b"\n") or not kept else b"\n"
        if not kept:
            path.unlink()
        elif kept != content:
            atomic_write(path, lambda file: file.write(kept))


def _clean(folder: Path, step: int, keep: int) -> None:
    """Remove what a kill left half-written; rename checkpoints past `step`, which this run will write again."""
    for path in [*folder.iterdir(), *(folder / "checkpoints").iterdir()]:
        if LEFTOVER.fullmatch(path.name):
            remove(path)
    for path in checkpoints(folder):
        if step_of(path) > step:
            path.replace(f"{path}.old")
            if (sidecar := Path(f"{path}.sha256")).exists():
                sidecar.replace(f"{path}.old.sha256")  # so that --resume can read it
    for sidecar in (folder / "checkpoints").glob("step_*.pt.sha256"):
        if not sidecar.with_suffix("").exists():
            sidecar.unlink()
    _remove_old(folder, keep)


def _remove_old(folder: Path, keep: int) -> None:
    for old in checkpoints(folder)[keep:]:
        old.unlink()
        Path(f"{old}.sha256").unlink(missing_ok=True)


def _log_until(folder: Path, step: int) -> list[dict]:
    """Return the log up to the step that a run resumes from; UserError if it has holes or ends before."""
    records = [record for record in read_log(folder) if record["step"] <= step]
    last = records[-1]["step"] if records else 0
    if last < step and any(step_of(path) <= step for path in checkpoints(folder)):
        if records:
            lost = f"{folder / 'log.jsonl'} ends at step {last}, before the checkpoint of step {step}"
            raise UserError(f"{lost}: move it away, the checkpoints do not need it")
        print(f"warning: {folder / 'log.jsonl'} is missing: the log begins at step {step + 1}", file=sys.stderr)
    return records


def read_log(folder: Path) -> list[dict]:
    """Return the lines of a run's log.jsonl, without a last one that a kill truncated; UserError if it is corrupt."""
    path = folder / "log.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            record = json.loads(line)
            check_shape(record, RECORD, f"line {number}")
            if records and record["step"] != records[-1]["step"] + 1:
                raise ValueError(f"line {number} is of step {record['step']}, after step {records[-1]['step']}")
            records.append(record)
        return records
    except (OSError, ValueError, RecursionError) as error:
        cure = "move it away, the checkpoints do not need it"
        raise UserError(f"{path} is corrupt ({one_line(error)}): {cure}") from error


# -------------------------------------------------------------------------------------------- signals, trace, services


class StopRequest:
    """
    Catch SIGINT, SIGTERM and SIGHUP in `signal`, for the loop to save and stop; a second one exits at once.

    Those that are ignored stay so, as SIGHUP under nohup. A thread, such as a notebook's, cannot catch any.
    """

    def __enter__(self) -> "StopRequest":
        self.signal, self._before = 0, []
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows lacks one
            caught = [n for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN]
            self._before = [(number, signal.signal(number, self.receive)) for number in caught]
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if os.environ.get("RANK", "0") == "0":  # unbuffered, since this may interrupt another write
            with suppress(OSError):  # its reader or terminal may have ended by the same signal
                os.write(2, b"\nstopping once this step is done and saved; a second time exits at once\n")


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


def _services(config: dict, folder: Path) -> dict[str, Callable[[dict], None]]:
    """Return one function per enabled service that could begin, which logs the numbers of a step."""
    found = {}
    if config.get("wandb"):
        wandb, known = require("wandb"), folder / ".wandb"
        with best_effort("--wandb could not begin, and the run goes on without it"):
            own = {"id": known.read_text(encoding="utf-8"), "resume": "allow"} if known.exists() else {}
            run = wandb.init(project="gpt2-triton", dir=folder, config=config, **own)
            found["wandb"] = lambda record: run.log(record, step=record["step"])
            _write_text(known, run.id)  # a run that resumes is the same run there
    if config.get("tensorboard"):
        with best_effort("--tensorboard could not begin, and the run goes on without it"):
            writer = require("tensorboard").SummaryWriter(folder)

            def write(record: dict) -> None:
                for name, value in record.items():
                    writer.add_scalar(name, value, record["step"])
                writer.flush()

            found["tensorboard"] = write
    return found
