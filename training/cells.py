"""Several runs, one after another, in one folder: what a sweep and the ladder are made of.

A run of the list is a cell: a run like any other, in its own process and in a folder of its own. Nothing else is
remembered: a cell whose log reached --max-steps is finished and skipped, one that was interrupted goes on where it
stopped, one that failed is tried again. Ctrl-C goes to the cell that runs, which saves and ends, and the others wait
for the same command; a cell that fails leaves its error in the table, and the others go on.

    WHAT.md     a line a cell: options, steps, parameters, training and validation loss
    WHAT.png    their validation losses
    NAME/       the run of the cell of that name
"""

import codecs
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from data import dataset_dir, prepare_if_missing, shards
from data.files import UserError, as_flag, atomic_write, lock, parse_options
from training.run import read_log, reference_losses

SET_BY_US = {"out_dir", "resume", "sweep", "ladder", "plan", "find_lr"}  # not for a cell to have of its own
# Options that leave the losses of a run as they are: a finished cell stays valid when they change.
WITHOUT_EFFECT = SET_BY_US | {
    "keep", "checkpoint_every", "sample_every", "hellaswag_every", "hellaswag_input", "diagnose", "check",
    "profile", "wandb", "tensorboard",
}  # fmt: skip

Parse = Callable[[list[str]], object]  # a call of tyro.cli: a command line -> the options, a dataclass


@dataclasses.dataclass
class Cell:
    """One run of several: its folder's name, what the table says of it, its command line, and how it went."""

    name: str
    columns: dict[str, object]
    arguments: list[str]  # without --out-dir
    config: object  # what `arguments` parse to
    records: list[dict] = dataclasses.field(default_factory=list)  # of its log.jsonl
    error: str = ""

    @property
    def finished(self) -> bool:
        """The log reached --max-steps, where a run is always validated."""
        return any(record["step"] >= self.config.max_steps for record in self.val_losses)

    @property
    def val_losses(self) -> list[dict]:
        return [record for record in self.records if "val_loss" in record]


# -------------------------------------------------------------------------------------------------------- command lines


def parsed(parse: Parse, arguments: list[str], where: str):
    """What `arguments` parse to; UserError says where the mistake is, tyro's own kind or the options'."""
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return parse_options(lambda: parse(arguments))
    except SystemExit:
        message = shown.getvalue().removeprefix("error:").removesuffix("(--help shows every option)\n").strip()
    except Exception as error:
        message = str(error)
    raise UserError(f"{where}: {message}")


def given(arguments: list[str]) -> set[str]:
    """The names of the options on a command line."""
    words = (word.partition("=")[0] for word in arguments if word.startswith("--"))
    return {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in words}


def chosen_folder(arguments: list[str], out_dir: str, what: str) -> Path:
    """--out-dir; where it was not given, one beside the preset's run, which a sweep must not fill with its cells."""
    if "resume" in given(arguments):
        raise UserError(f"--{what} goes on with its own runs: leave --resume out, or give another --out-dir")
    return Path(out_dir if "out_dir" in given(arguments) else f"{out_dir}-{what}")


# -------------------------------------------------------------------------------------------------------------- running


def run_cells(script: Path, cells: list[Cell], folder: Path, what: str, draw: Callable) -> int:
    """Trains the cells that are not finished into `folder`, rewriting WHAT.md and WHAT.png after each.

    Returns 0, or 128 + the signal that ended it early; UserError when a cell failed, or torchrun started this.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--{what} starts one process a cell: call python train_gpt2.py, without torchrun")
    for name in {cell.config.data for cell in cells}:  # here, where one can see it, and not once in every cell
        prepare_if_missing(name)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"another process is writing to {folder}: wait for it, or use --out-dir"):
        for cell in cells:
            cell.records = _records(cell, folder / cell.name)
        with Relay() as relay:
            for i, cell in enumerate(cells, start=1):
                if relay.signal:
                    break
                print(f"[{i}/{len(cells)}] {cell.name}{': done before' if cell.finished else ''}", flush=True)
                whole = folder / cell.name / "checkpoints" / f"step_{cell.config.max_steps:06d}.pt"
                if not cell.finished or not whole.exists():
                    _run_cell(script, cell, folder / cell.name, relay)
                    _report(cells, folder, what, draw)
        print(f"\n{_report(cells, folder, what, draw)}\n{folder} holds {what}.md, {what}.png and a run in each folder")
        if relay.signal and not all(cell.finished for cell in cells):
            print("stopped; the same command goes on")
            return 128 + relay.signal
    if failed := [cell.name for cell in cells if cell.error]:
        raise UserError(f"{len(failed)} of {len(cells)} runs failed ({'; '.join(failed)}): {folder / what}.md says why")
    return 0


class Relay:
    """Takes SIGINT, SIGTERM and SIGHUP and hands each to the cell that runs; `signal` holds the first.

    The cell has a process group of its own: a Ctrl-C that reached it twice, from the terminal and from here, would end
    it at once instead of letting it save.
    """

    def __enter__(self) -> "Relay":
        self.signal, self.child = 0, None
        numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        heeded = [n for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self._before = [(number, signal.signal(number, self._receive)) for number in heeded]
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def start(self, command: list[str]) -> subprocess.Popen:
        """A process without input, its standard output dropped, its standard error a pipe."""
        own_group = {"process_group": 0} if os.name == "posix" else {}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self.child = subprocess.Popen(command, **pipes, **own_group)
        if self.signal:  # it came while the process began
            self.child.send_signal(self.signal)
        return self.child

    def _receive(self, number: int, _frame) -> None:
        self.signal = self.signal or number
        if self.child is not None and os.name == "posix":  # elsewhere the terminal has told both
            self.child.send_signal(signal.SIGTERM if number == getattr(signal, "SIGHUP", None) else number)


def _run_cell(script: Path, cell: Cell, folder: Path, relay: Relay) -> None:
    """Trains one cell, its progress bar shown as it comes, and leaves its records and error in `cell`."""
    child = relay.start([sys.executable, str(script), *cell.arguments, f"--out-dir={folder}"])
    tail, utf8 = "", codecs.getincrementaldecoder("utf-8")("replace")
    with child:
        while content := os.read(child.stderr.fileno(), 1 << 16):
            text = utf8.decode(content)
            sys.stderr.write(text)
            sys.stderr.flush()
            tail = (tail + text)[-10_000:]
    cell.records = read_log(folder)
    if child.returncode and not relay.signal:
        cell.error = _reason(child.returncode, tail)


def _reason(status: int, tail: str) -> str:
    """Why a process ended with this status, from the end of its standard error: its `error:` line, else the last."""
    if status < 0 or status > 128:
        return f"ended by signal {status % 128 if status > 0 else -status}"
    lines = [line.strip() for line in re.split(r"[\r\n]+", tail) if line.strip()] or [f"exit status {status}"]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


def _records(cell: Cell, folder: Path) -> list[dict]:
    """What a cell has done before; UserError when that was with other options."""
    path = folder / "config.json"
    if not path.exists():
        return []
    try:
        there = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {folder}, or give another --out-dir") from None
    here = json.loads(json.dumps(dataclasses.asdict(cell.config)))
    both = [name for name in here if name in there and name not in WITHOUT_EFFECT]
    if differs := [
        f"{as_flag(name)} {there[name]} there, {here[name]} here" for name in both if there[name] != here[name]
    ]:
        raise UserError(f"{folder} was made with other options ({'; '.join(differs)}): give another --out-dir")
    return read_log(folder)


# -------------------------------------------------------------------------------------------------------------- results


def parameter_count(config) -> int | None:
    """Of the cell's GPT-2, as model.GPT counts them; None where its dataset cannot be read for the vocabulary."""
    try:
        V = shards.open_split(dataset_dir(config.data), "val").vocab_size
    except UserError:
        return None
    C = config.n_embd  # of a block: 12 C^2 in four matrices, 9 C in their biases, 4 C in two layer norms
    return (V + config.block_size) * C + config.n_layer * (12 * C * C + 13 * C) + 2 * C


def landmarks_of(cells: list[Cell]) -> dict[str, float]:
    """The losses to compare with, named, in nats per token; {} where the cells do not read one and the same dataset."""
    names = {cell.config.data for cell in cells}
    try:
        return reference_losses(shards.open_split(dataset_dir(names.pop()), "val")) if len(names) == 1 else {}
    except UserError:
        return {}


def table(cells: list[Cell]) -> str:
    """In Markdown, columns aligned for a terminal; below it errors, losses to compare with, and the best cell."""
    rows = [[*cells[0].columns, "steps", "parameters", "train loss", "val loss", "lowest, at step", "minutes"]]
    rows += [[str(value) for value in cell.columns.values()] + _figures(cell) for cell in cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    notes = [f"{cell.name}: {cell.error}" for cell in cells if cell.error]
    if landmarks := landmarks_of(cells):
        notes.append("to compare with: " + ", ".join(f"{name} {nats:.3f}" for name, nats in landmarks.items()))
    if done := [cell for cell in cells if cell.finished]:
        best = min(done, key=lambda cell: cell.val_losses[-1]["val_loss"])
        notes.append(f"lowest validation loss at the end: {best.val_losses[-1]['val_loss']:.4f}, {best.name}")
    notes.append("losses in nats per token; train loss: mean over the last tenth of the steps; minutes: of steps alone")
    return "\n".join([*lines, "", *notes])


def last_loss(cell: Cell) -> float:
    """The training loss, a mean over the last tenth of its steps: that of one step is noisy."""
    last = [record["loss"] for record in cell.records[-max(1, len(cell.records) // 10) :]]
    return sum(last) / len(last)


def _figures(cell: Cell) -> list[str]:
    records, count = cell.records, parameter_count(cell.config)
    lowest = min(cell.val_losses, key=lambda record: record["val_loss"], default=None)
    unfinished = "failed" if cell.error else "not finished"
    return [
        f"{records[-1]['step']:,}" if records else "0",
        "" if count is None else f"{count:,}",
        f"{last_loss(cell):.3f}" if records else "",
        f"{cell.val_losses[-1]['val_loss']:.3f}" if cell.finished else unfinished,
        f"{lowest['val_loss']:.3f}, {lowest['step']:,}" if lowest else "",
        f"{sum(record['ms'] for record in records) / 60_000:.1f}",
    ]


def _report(cells: list[Cell], folder: Path, what: str, draw: Callable) -> str:
    from matplotlib.figure import Figure

    text, figure = table(cells), Figure(layout="constrained")
    draw(figure, cells)
    atomic_write(folder / f"{what}.md", lambda file: file.write(f"{text}\n".encode()))
    atomic_write(folder / f"{what}.png", lambda file: figure.savefig(file, format="png", dpi=120))
    return text


def draw_curves(axes, cells: list[Cell]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    shown = [cell for cell in cells if cell.val_losses]
    for i, cell in enumerate(shown):
        tokens, losses = zip(*((r["tokens"], r["val_loss"]) for r in cell.val_losses), strict=True)
        colour = colormaps["tab10"](i) if len(shown) <= 10 else colormaps["viridis"](i / len(shown))
        unfinished = "" if cell.finished else ", failed" if cell.error else ", not finished"
        label = f"{cell.name}: {losses[-1]:.3f}{unfinished}"
        axes.plot(tokens, losses, "o-", markersize=3, linewidth=1, color=colour, label=label)
    landmarks = landmarks_of(cells)
    if landmarks and axes.get_ylim()[1] > max(landmarks.values()) + 0.5:  # a stray cell must not flatten the rest
        axes.set_ylim(top=max(landmarks.values()) + 0.5)
    draw_landmarks(axes, landmarks)
    axes.set(xlabel="tokens", ylabel="validation loss, nats per token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(fontsize="small")


def draw_landmarks(axes, landmarks: dict[str, float]) -> None:
    """A dotted line, named, for each that is not far above what is drawn already."""
    low, high = axes.get_ylim()
    for name, nats in landmarks.items():
        if nats <= high + 0.1 * (high - low):
            axes.axhline(nats, linestyle=":", color="grey", linewidth=1)
            place = {"xy": (1, nats), "xycoords": ("axes fraction", "data"), "xytext": (-3, 2)}
            axes.annotate(name, **place, textcoords="offset points", ha="right", fontsize="small", color="grey")
