"""
A run's folder: what training leaves on disk, and how it is read back; and the signals that end a run early.

    config.json                    the options of the run
    log.jsonl                      a line a step: step, tokens, loss, lr, grad_norm, ms, tokens_per_s, mfu, and
                                   val_loss, hellaswag_acc, hellaswag_acc_norm when they were measured
    loss.png                       the same as a picture
    diagnostics.png                with --diagnose, what goes on in every layer; in log.jsonl under "diagnostics"
    samples.txt                    text that the model wrote
    checkpoints/step_NNNNNN.pt     after NNNNNN steps: torch.save of a dict, read with weights_only=True
    checkpoints/step_NNNNNN.pt.sha256
    checkpoints/step_NNNNNN.pt.old set aside, as the run went on from an earlier one
    trace.json                     with --profile: steps 6 to 8 that this process did
    find_lr.png                    of --find-lr, which leaves nothing else here
    .launch                        torchrun's name for the launch that wrote last: a restart goes on with its own alone

Every file appears whole or not at all, but for log.jsonl and samples.txt, which only grow, and what the profiler, wandb
and TensorBoard write. A checkpoint whose sha256 is
not the one beside it is damaged, and the one before it serves. One process at a time writes to the folder: it holds a
lock on `.lock`, which goes with the process however that ends.
"""

import hashlib
import importlib
import json
import math
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

from data.files import UserError, atomic_write, lock
from data.shards import Split
from training import diagnostics
from training.pace import Pace

# what a checkpoint holds at least
CHECKPOINT_KEYS = {"step", "model", "optimizers", "config", "tokenizer", "run", "micro_batch"}
GPT2_124M = "OpenAI's GPT-2 (124M)"
HELLASWAG_CHANCE = 1 / 4
# acc_norm on all 10,042 questions. GPT-2: the released weights scored as here, by llm.c's dev/data/hellaswag.py. GPT-3:
# as its makers report it, zero-shot, for their smallest model: https://arxiv.org/abs/2005.14165, table H.1.
HELLASWAG_GPT2_124M = 0.2955
HELLASWAG_GPT3_124M = 0.337
# GPT-2 (124M)'s loss, nats per token, on the validation shard of either text, as build-nanogpt and llm.c publish it
PUBLISHED = {"fineweb-edu": 3.2924, "fineweb": 3.425}
HELLASWAG = {GPT2_124M: HELLASWAG_GPT2_124M, "GPT-3 (124M)": HELLASWAG_GPT3_124M}
RANDOM = "guessing at random"
BAR = "{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{}{{postfix}}]"  # the braces are tqdm's, {} is Pace's
SAMPLE_LINE = "-" * 40  # begins each sample in samples.txt


class Run:
    """
    The folder of a run that has done `step` of its steps, and its bar in the terminal.

    config:    the options of train_gpt2.py, of which max_steps, init_from, hellaswag_input, wandb and tensorboard count
    landmarks: validation losses to compare with, named: see reference_losses
    afresh:    moves an older run aside first; else lines of log.jsonl past `step`, lost with a crash, go
    pace:      of the steps to come
    UserError where another process writes to the folder, or the package of a service is missing.
    """

    def __init__(
        self, folder: Path, config: dict, step: int, landmarks: dict[str, float], afresh=False, pace: Pace | None = None
    ):
        self.folder, self.landmarks, self.services = folder, landmarks, []
        self.published = {} if config.get("hellaswag_input") else HELLASWAG  # true of HellaSwag's own questions alone
        self._untrained = not config.get("init_from")
        wandb = config.get("wandb") and _optional("wandb", "wandb")
        tensorboard = config.get("tensorboard") and _optional("torch.utils.tensorboard", "tensorboard")
        busy = f"another process is writing to {folder}: wait for it, or use --out-dir"
        if afresh and folder.exists():
            lock(folder / ".lock", busy).close()  # nobody else's run is moved
            _move_aside(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder / ".lock", busy)
        _clean(folder, step)
        _write_text(folder / ".launch", os.environ.get("TORCHELASTIC_RUN_ID", ""))
        self.records = [record for record in read_log(folder) if record["step"] <= step]
        _write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
        _write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        _cut_samples(folder / "samples.txt", step)
        if wandb:
            self.services.append(_wandb(wandb, config, folder))
        if tensorboard:
            self.services.append(_tensorboard(tensorboard, folder))
        self._pace = pace or Pace(config["max_steps"] - step)
        self._log = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._val = next((f" val {r['val_loss']:.3f}" for r in reversed(self.records) if "val_loss" in r), "")
        seconds = 0.1 if sys.stderr.isatty() else 10.0  # between refreshes: a log file needs few
        self._bar = tqdm(initial=step, total=config["max_steps"], unit="step", mininterval=seconds, dynamic_ncols=True)

    def log(self, record: dict) -> None:
        """A step: a line in log.jsonl, a move of the bar, and to wandb and TensorBoard where they were asked for."""
        if record["step"] == 1 and self._untrained:
            _check_first_loss(record["loss"], self.landmarks[RANDOM])
        self.records.append(record)
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()
        for service in self.services:
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
        self._bar.close()  # ends its line, so that what follows, an error say, begins a new one
        self._log.close()
        self._lock.close()

    def finish(self) -> None:
        """The end in the terminal: what the model writes, the figures, and where the files are."""
        if "val_loss" in self.records[-1] and (self.folder / "samples.txt").exists():
            texts = (self.folder / "samples.txt").read_text(encoding="utf-8")
            print(texts.rpartition(SAMPLE_LINE)[2].partition("\n")[2])
        for name, value in self.summary().items():
            print(f"{name:<26} {value}")
        for name, loss in self.landmarks.items():
            print(f"{'compare: ' + name:<26} {loss:.4f}")
        print(f"{self.folder} holds loss.png, log.jsonl, samples.txt and checkpoints")
        print(f'python sample.py {self.folder} --prompt "..." writes more')

    def summary(self) -> dict[str, str]:
        """What the run came to, named; of val_loss and HellaSwag the last that were measured."""
        last = self.records[-1]
        rates = sorted(record["tokens_per_s"] for record in self.records)
        shares = sorted(record["mfu"] for record in self.records if record["mfu"] is not None)
        minutes, seconds = divmod(round(sum(record["ms"] for record in self.records) / 1000), 60)
        rows = {
            "steps": f"{last['step']:,}",
            "tokens": f"{last['tokens']:,}",
            "time in training steps": f"{minutes // 60} h {minutes % 60} min {seconds} s",
            "tokens/s, median": f"{rates[len(rates) // 2]:,.0f}",
        }
        if shares:
            rows["MFU, median"] = f"{shares[len(shares) // 2]:.1%}"
        if losses := self._curve("val_loss")[1]:
            rows["validation loss"] = (
                f"{losses[-1]:.4f} nats per token, perplexity {math.exp(min(losses[-1], 700)):.2f}"
            )
        if scores := self._curve("hellaswag_acc_norm")[1]:
            published = ", ".join(f"{name} {score}" for name, score in self.published.items())
            rows["HellaSwag acc_norm"] = f"{scores[-1]:.4f}" + (f" (published: {published})" if published else "")
        return rows

    def sample(self, step: int, text: str) -> None:
        """Add a text to samples.txt."""
        with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"{SAMPLE_LINE} after {step} steps\n{text}\n")

    def draw(self) -> None:
        """loss.png: training and validation loss against tokens seen, the landmarks, and HellaSwag where measured."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

        tokens, scores = self._curve("hellaswag_acc_norm")
        figure = Figure(figsize=(8, 8 if scores else 5), layout="constrained")
        panels = figure.subplots(2 if scores else 1, squeeze=False, sharex=True)[:, 0]
        panels[0].set(ylabel="loss, nats per token", title=self.folder.name)
        panels[0].plot(*self._curve("loss"), linewidth=0.6, label="training")
        at, losses = self._curve("val_loss")
        if losses:
            panels[0].plot(at, losses, "o-", markersize=4, label=f"validation: {losses[-1]:.3f} at the end")
        _draw_levels(panels[0], self.landmarks)
        if scores:
            panels[1].set(ylabel="HellaSwag acc_norm")
            panels[1].plot(tokens, scores, "o-", markersize=4, label=f"this run: {scores[-1]:.4f} at the end")
            _draw_levels(panels[1], {RANDOM: HELLASWAG_CHANCE, **self.published})
        for axes in panels:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 5M and not 5 with a 1e6 in the corner
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        panels[-1].set(xlabel="tokens")
        atomic_write(self.folder / "loss.png", lambda file: figure.savefig(file, format="png", dpi=120))
        diagnostics.draw(self.records, self.folder / "diagnostics.png", self.folder.name)

    def _curve(self, name: str) -> tuple[list[float], list[float]]:
        records = [record for record in self.records if name in record]
        return [record["tokens"] for record in records], [record[name] for record in records]

    def save(self, checkpoint: dict, keep: int) -> None:
        """Write a checkpoint, named by its "step", its weights finite; then remove all but the newest `keep`."""
        if not all(tensor.isfinite().all() for tensor in checkpoint["model"].values()):
            raise UserError(f"the weights after step {checkpoint['step']} are not finite: no checkpoint; lower --lr")
        path = self.folder / "checkpoints" / f"step_{checkpoint['step']:06d}.pt"

        def write(file: BinaryIO) -> None:
            hashed = _Hashed(file)
            try:
                torch.save(checkpoint, hashed)
            except RuntimeError as error:
                raise hashed.error or error from None  # torch hides that the disk is full
            _write_text(Path(f"{path}.sha256"), hashed.digest.hexdigest())

        try:
            atomic_write(path, write)
        except OSError as error:
            reason = f"{path} could not be written ({error.strerror})"
            raise UserError(f"{reason}: make room on that disk; the checkpoints before it are whole") from error
        for old in checkpoints(self.folder)[keep:]:
            old.unlink()
            Path(f"{old}.sha256").unlink(missing_ok=True)


class _Hashed:
    """A file that is only written to, and hashed on the way: from memory, so a write gone wrong does not match."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _check_first_loss(loss: float, random: float) -> None:
    """Untrained, every token is as likely as any other: a first loss far from ln V means broken data or weights."""
    if abs(loss - random) > 0.5:
        sentence = f"the first loss is {loss:.3f}, far from {random:.3f}, that of guessing: look at the data"
        tqdm.write(f"warning: {sentence}", file=sys.stderr)


def profiler(folder: str) -> torch.profiler.profile:
    """Records steps 6 to 8 of this process into trace.json, for ui.perfetto.dev; `.step()` ends a step."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(f"{folder}/trace.json"),
    )


def _draw_levels(axes, levels: dict[str, float]) -> None:
    for (name, value), style in zip(
        levels.items(), [":", "-.", "--", (0, (6, 2)), (0, (1, 3)), (0, (9, 3))], strict=False
    ):
        axes.axhline(value, linestyle=style, linewidth=1, color="grey", label=f"{name}: {value:.4g}")


def reference_losses(split: Split) -> dict[str, float]:
    """Losses to compare a model's with, in nats per token: what counting the training text gives, what is published."""
    names = {"unigram": "token frequencies", "bigram": "bigrams counted", "trigram": "trigrams counted"}
    counted = {names[name]: split.baselines[name] for name in names if name in split.baselines}
    first = split.shards[0].path
    place = f"{first.parent.name}/{first.name}"
    known = {GPT2_124M: PUBLISHED["fineweb-edu" if "edu" in place else "fineweb"]}
    known = known if "fineweb" in place and split.tokenizer_spec == {"type": "gpt2"} else {}
    return {RANDOM: math.log(split.vocab_size), **counted, **known}


def _write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode()))


def _move_aside(folder: Path) -> None:
    aside = next(path for i in range(1, 10**6) if not (path := Path(f"{folder}.{i}")).exists())
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder} cannot be moved to {aside} ({error.strerror}): use another --out-dir") from error
    print(f"the run in {folder} is now {aside}")


def _cut_samples(path: Path, step: int) -> None:
    """Leave out the samples of later steps, which this run will write anew."""
    if path.exists():
        texts = re.split(rf"(?m)^(?={SAMPLE_LINE} after \d+ steps$)", path.read_text(encoding="utf-8"))
        kept = [text for text in texts if text and int(text.split(maxsplit=3)[2]) <= step]
        _write_text(path, "".join(kept)) if kept else path.unlink()


def _clean(folder: Path, step: int) -> None:
    """Remove what a kill left half-written; set checkpoints past `step` aside, which this run will write anew."""
    for path in [*folder.glob(".*.tmp"), *(folder / "checkpoints").glob(".*.tmp")]:
        path.unlink()
    for path in checkpoints(folder):
        if _step_of(path) > step:
            path.replace(f"{path}.old")
            if (sidecar := Path(f"{path}.sha256")).exists():
                sidecar.replace(f"{path}.old.sha256")  # so that --resume takes it back


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.jsonl; the last is left out where a kill cut it short."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        records = [json.loads(line) for line in lines]
        [record["step"] + 0 for record in records]
        return records
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away, the checkpoints do not need it") from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    paths = (folder / "checkpoints").glob("step_*.pt")
    return sorted((path for path in paths if path.stem[5:].isdecimal()), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def load_checkpoint(path: Path) -> dict:
    """A checkpoint, its tensors on the CPU; UserError where the file is missing, damaged, or something else."""
    if path.is_file() and not Path(f"{path}.sha256").exists():
        raise UserError(
            f"{path} cannot be checked: {path.name}.sha256, which is written beside it, is missing: copy both"
        )
    try:
        expected = Path(f"{path}.sha256").read_text(encoding="utf-8").strip()
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise UserError(f"{path} is damaged: its sha256 is not the one written beside it")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(checkpoint, dict) or not set(checkpoint) >= CHECKPOINT_KEYS:
        raise UserError(
            f"{path} is no checkpoint of train_gpt2.py: it lacks some of {', '.join(sorted(CHECKPOINT_KEYS))}"
        )
    return checkpoint


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | tuple[None, None]:
    """The newest whole checkpoint of a run behind its path, or two None; UserError where all there are are damaged."""
    paths = checkpoints(folder)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise UserError(f"no checkpoint in {folder} can be read: --resume never starts afresh and moves the run aside")
    return None, None


def restarted_in(folder: Path) -> bool:
    """Whether torchrun has started the processes anew, and those before had begun to write to this folder."""
    begun, launch = folder / ".launch", os.environ.get("TORCHELASTIC_RUN_ID", "")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and begun.exists() and begun.read_text(encoding="utf-8") == launch


def find_checkpoint(folder: Path, resume: str) -> tuple[Path, dict] | tuple[None, None]:
    """The checkpoint that --resume means for a run in `folder`, behind its path; two None where it begins afresh.

    A file of another run begins this one, which then goes on with its own checkpoints. UserError where the folder holds
    a run that did not begin so.
    """
    if resume == "never" and not restarted_in(folder):
        return None, None
    if resume in ("auto", "never"):
        return newest_checkpoint(folder)
    if folder.resolve() in Path(resume).resolve().parents or not checkpoints(folder):
        return Path(resume), load_checkpoint(Path(resume))
    try:
        began_with = json.loads((folder / "config.json").read_text(encoding="utf-8"))["resume"]
    except (OSError, ValueError, KeyError, TypeError):
        began_with = None
    if began_with != resume:
        raise UserError(f"{folder} holds a run that did not begin with --resume {resume}: give another --out-dir")
    return newest_checkpoint(folder)


class StopRequest:
    """Takes SIGINT and SIGTERM: `signal` holds it, for the loop to save and end; a second one exits at once."""

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        self._before = [(number, signal.signal(number, self._receive)) for number in (signal.SIGINT, signal.SIGTERM)]
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number


def _wandb(wandb, config: dict, folder: Path) -> Callable[[dict], None]:
    run = wandb.init(project="gpt2-triton", dir=folder, config=config)
    return lambda record: run.log(record, step=record["step"])


def _tensorboard(tensorboard, folder: Path) -> Callable[[dict], None]:
    writer = tensorboard.SummaryWriter(folder)

    def write(record: dict) -> None:
        for name, value in record.items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return write


def _optional(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--{package} needs a package that is not here: pip install {package}") from error
