"""
Several runs, one after another, for every combination of some options' values.

    --sweep lr=1e-4,3e-4,1e-3 n_layer=4,6     six runs, in the folders lr=0.0001,n_layer=4 and so on

Every command line is parsed before the first run starts. A run is a child process with a folder of its own inside
--out-dir, and these folders are the only state: the same command skips the runs whose log has reached
--max-steps, resumes the one that was interrupted and retries those that failed. Ctrl-C is passed on to the run in
progress, which saves and ends. If a run fails, its error goes into the table and the others continue. Written after
every run:

    sweep.md     a table: options, steps, parameters, training and validation loss per run
    sweep.png    the validation losses
"""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data import shards
from data.corpora import dataset_dir, prepare_if_missing
from data.files import UserError, as_flag, atomic_write, lock, parse_options
from data.outside import read_json
from data.streams import best_effort
from model import GPT
from training.curves import draw_levels, reference_losses
from training.distributed import env_number
from training.run import StopRequest, read_log

Parse = Callable[[list[str]], object]  # a command line -> train_gpt2.Config
RESERVED = {"out_dir", "resume", "sweep", "ladder", "recipe", "plan", "find_lr"}  # a run of a sweep cannot choose these
# options that do not affect the losses: a finished run stays valid when they change
WITHOUT_EFFECT = RESERVED | {
    "keep", "checkpoint_every", "sample_every", "sample_tokens", "hellaswag_every", "hellaswag_input", "diagnose",
    "profile", "wandb", "tensorboard",
}  # fmt: skip


@dataclasses.dataclass
class SweepRun:
    """One run of a sweep: its folder's name, its options in the table, its command line, how it went."""

    name: str
    columns: dict[str, object]
    arguments: list[str]  # without --out-dir
    config: object  # the parsed arguments
    records: list[dict] = dataclasses.field(default_factory=list)  # log.jsonl
    error: str = ""

    @property
    def val_records(self) -> list[dict]:
        return [record for record in self.records if "val_loss" in record]

    @property
    def val_loss(self) -> float | None:
        """Validation loss at the last step, in nats per token; None unless the run has finished."""
        return next((r["val_loss"] for r in self.val_records if r["step"] >= self.config.max_steps), None)

    @property
    def train_loss(self) -> float:
        """Mean over the last tenth of the steps: the loss of a single step is noisy."""
        last = [record["loss"] for record in self.records[-max(1, len(self.records) // 10) :]]
        return sum(last) / len(last)


# ------------------------------------------------------------------------------------------------------- command lines


def train_grid(script: Path, arguments: list[str], grid: Sequence[str], parse: Parse) -> int:
    """
    Train every combination of the grid and print the table. Return 0, or 128 + the signal that ended it early.

    script:    the training script, called as `python SCRIPT ARGUMENTS --NAME=VALUE ... --out-dir=...`
    arguments: its command line, without --sweep
    grid:      the words after --sweep: "lr=1e-4,3e-4", also "--lr=..." and hyphens for underscores
    Raise UserError, before anything runs, for an impossible option or value; at the end, if a run failed.
    """
    folder = choose_folder(arguments, parse(arguments).out_dir, "sweep")
    return train_all(script, expand(arguments, grid, parse), folder, "sweep")


def take_grid(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """
    Split a command line into the part without --sweep, and the words after --sweep (None without --sweep).

    The grid ends at the next option, but --lr=1e-4,3e-4, with a comma, belongs to it.
    """
    rest, grid, taking = [], None, False
    for word in arguments:
        if word == "--sweep" or word.startswith("--sweep="):
            taking = True
            grid = (grid or []) + ([word.removeprefix("--sweep=")] if "=" in word else [])
        elif taking and (not word.startswith("-") or re.fullmatch(r"--[\w-]+=.*,.*", word)):
            grid.append(word)
        else:
            taking = False
            rest.append(word)
    return rest, grid


def expand(arguments: list[str], grid: Sequence[str], parse: Parse) -> list[SweepRun]:
    """Return the runs of a grid, parsed, the last option varying fastest."""
    runs = {}
    for words in itertools.product(*_read_grid(grid, parse(arguments))):
        config = parse_run(parse, [*arguments, *words], f"--sweep, run {' '.join(words)}")
        columns = {name: getattr(config, name) for name in _given(words)}
        # named by parsed values: 1e-3 and 0.001 share a folder, and 2e-3 typed later finds its own
        texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in columns.values()]
        name = re.sub(r"[^\w.+,=-]", "_", ",".join(map("=".join, zip(columns, texts, strict=True))))
        if name in runs:
            raise UserError(f"--sweep has the run {name} twice: give every value once")
        runs[name] = SweepRun(name, columns, [*arguments, *words], config)
    return [*runs.values()]


def _read_grid(grid: Sequence[str], base) -> list[list[str]]:
    """Return for every option the words that set it on a command line, one per value."""
    options = {}
    for item in grid:
        name, _, values = item.removeprefix("--").partition("=")
        name, values = name.replace("-", "_"), values.split(",")
        if not all(values):
            raise UserError(f"--sweep {item} has no value, or an empty one: write for example lr=1e-4,3e-4")
        if name in RESERVED:
            raise UserError(f"--sweep {item}: a sweep cannot vary {as_flag(name)}")
        if name in options:
            raise UserError(f"--sweep has {name} twice: give all its values at once, {name}=A,B,C")
        words = {value: f"{as_flag(name)}={value}" for value in values}
        if isinstance(getattr(base, name, None), bool):
            switches = {"true": as_flag(name), "false": as_flag(f"no_{name}")}
            if not {value.lower() for value in values} <= switches.keys():
                raise UserError(f"--sweep {item}: the values of {name} are true and false")
            words = {value: switches[value.lower()] for value in values}
        options[name] = [words[value] for value in values]
    if not options:
        raise UserError("--sweep needs an option and its values, for example --sweep lr=1e-4,3e-4 n_layer=4,6")
    return [*options.values()]


def parse_run(parse: Parse, arguments: list[str], what: str):
    try:
        return parse_options(lambda: parse(arguments))
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _given(arguments: Sequence[str]) -> list[str]:
    """Return the names of the options on a command line."""
    words = (word.partition("=")[0] for word in arguments if word.startswith("--"))
    return [word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in words]


def choose_folder(arguments: list[str], out_dir: str, what: str) -> Path:
    """Return --out-dir if given, else a folder beside the preset's own run. UserError for --resume."""
    if "resume" in _given(arguments):
        raise UserError(f"--{what} resumes its own runs: leave --resume out, or give another --out-dir")
    return Path(out_dir if "out_dir" in _given(arguments) else f"{out_dir}-{what}")


# ------------------------------------------------------------------------------------------------------------- running


def train_all(script: Path, runs: list[SweepRun], folder: Path, what: str) -> int:
    """Train the unfinished runs into `folder` and report after each; result and errors as for train_grid."""
    check_folder(runs, folder, what)
    check_start({run.config.data for run in runs}, what)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"another process is writing to {folder}: wait for it, or use --out-dir"):
        for run in runs:
            run.records = read_log(folder / run.name)
        with SignalRelay() as relay:
            for i, run in enumerate(runs, start=1):
                if relay.signal:
                    break
                print(f"[{i}/{len(runs)}] {run.name}{': done before' if run.val_loss is not None else ''}", flush=True)
                checkpoint = folder / run.name / "checkpoints" / f"step_{run.config.max_steps:06d}.pt"
                if run.val_loss is None or not checkpoint.exists():
                    train_one(script, run, folder / run.name, relay)
                    report(runs, folder, what)
        print(f"\n{report(runs, folder, what)}\n{folder} holds {what}.md, {what}.png and a folder for each run")
        if relay.signal and any(run.val_loss is None for run in runs):
            print("stopped; the same command resumes")
            return 128 + relay.signal
    if failed := [run.name for run in runs if run.error]:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed ({'; '.join(failed)}): {folder / what}.md says why")
    return 0


def check_start(datasets: set[str], what: str) -> None:
    """Prepare the datasets, once and while messages are still shown. UserError if one is missing, or for torchrun."""
    if env_number("WORLD_SIZE", 1) > 1:
        raise UserError(f"--{what} starts one process per run: call python train_gpt2.py, without torchrun")
    for name in datasets:
        prepare_if_missing(name)
        shards.open_split(dataset_dir(name), "train")


def check_folder(runs: list[SweepRun], folder: Path, what: str) -> None:
    """Raise UserError if the folder holds anything but this sweep's runs, made with these options."""
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a single run: give --{what} another folder with --out-dir")
    for run in runs:
        path = folder / run.name / "config.json"
        if not path.exists():
            continue
        old = read_json(path, hint=f": remove {path.parent}, or use another --out-dir")
        new = json.loads(json.dumps(dataclasses.asdict(run.config)))
        changed = [name for name in new if name not in WITHOUT_EFFECT and new[name] != old.get(name, new[name])]
        if changed:
            options = ", ".join(f"{as_flag(name)} {old[name]} (now {new[name]})" for name in changed)
            raise UserError(f"{folder} holds a {what} made with {options}: use another --out-dir, {folder}-2")


class SignalRelay(StopRequest):
    """
    Pass each signal on to `child` as SIGTERM; `signal` is the first.

    The child has a process group of its own: if Ctrl-C reached it twice, from the terminal and from this process, it
    would exit at once instead of saving.
    """

    def __enter__(self) -> "SignalRelay":
        self.child = None
        return super().__enter__()

    def start(self, command: list[str]) -> subprocess.Popen:
        """Start the child: no input, its standard output dropped, its standard error a pipe."""
        own_group = {"process_group": 0} if os.name == "posix" else {}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self.child = subprocess.Popen(command, **pipes, **own_group)
        if self.signal:  # it came while the process started
            self.child.terminate()
        return self.child

    def receive(self, number: int, _frame) -> None:
        self.signal = self.signal or number
        if self.child is not None and os.name == "posix":  # on Windows the terminal signals both
            self.child.terminate()


def train_one(script: Path, run: SweepRun, folder: Path, relay: SignalRelay) -> None:
    """Train one run, showing its progress bar, and store its records and error in `run`."""
    child, tail = relay.start([sys.executable, str(script), *run.arguments, f"--out-dir={folder}"]), b""
    with child:
        while content := os.read(child.stderr.fileno(), 1 << 16):
            sys.stderr.write(content.decode(errors="replace"))
            sys.stderr.flush()
            tail = (tail + content)[-10_000:]
    run.records = read_log(folder)
    if child.returncode and not relay.signal:
        run.error = _reason(child.returncode, tail.decode(errors="replace"))


def _reason(status: int, tail: str) -> str:
    """Return why a process ended, given the end of its standard error: its `error:` line, else the last line."""
    if status < 0 or status > 128:
        return f"ended by signal {status % 128 if status > 0 else -status}"
    lines = [line.strip() for line in re.split(r"[\r\n]+", tail) if line.strip()] or [f"exit status {status}"]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


# ------------------------------------------------------------------------------------------------------------- results


def report(runs: list[SweepRun], folder: Path, what: str) -> str:
    """Write the table and the picture. Return the table."""
    from matplotlib.figure import Figure

    text, figure = table(runs), Figure(layout="constrained")
    with best_effort(f"{folder} lacks the newest {what}.md and {what}.png"):
        atomic_write(folder / f"{what}.md", lambda file: file.write(f"{text}\n".encode()))
        draw(figure, runs)
        atomic_write(folder / f"{what}.png", lambda file: figure.savefig(file, format="png", dpi=120))
    return text


def references(runs: list[SweepRun]) -> dict[str, float]:
    """Return named losses to compare with, in nats per token; {} unless all runs read the same dataset."""
    datasets = {run.config.data for run in runs}
    return reference_losses(shards.open_split(dataset_dir(datasets.pop()), "val")) if len(datasets) == 1 else {}


def table(runs: list[SweepRun]) -> str:
    """Return a Markdown table, aligned for a terminal, then errors, losses to compare with, and the best run."""
    rows = [[*runs[0].columns, "steps", "parameters", "train loss", "val loss", "lowest, at step", "minutes"]]
    rows += [[str(value) for value in run.columns.values()] + _results(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    notes = [f"{run.name}: {run.error}" for run in runs if run.error]
    if known := references(runs):
        notes.append("to compare with: " + ", ".join(f"{name} {nats:.3f}" for name, nats in known.items()))
    if done := [run for run in runs if run.val_loss is not None]:
        best = min(done, key=lambda run: run.val_loss)
        notes.append(f"lowest validation loss at the end: {best.val_loss:.4f}, {best.name}")
    notes.append("losses in nats per token; train loss: mean over the last tenth of the steps; minutes: of steps alone")
    return "\n".join([*("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows), "", *notes])


def _results(run: SweepRun) -> list[str]:
    records = run.records
    lowest = min(run.val_records, key=lambda record: record["val_loss"], default=None)
    unfinished = "failed" if run.error else "not finished"
    with torch.device("meta"):  # shapes without memory
        model = GPT(run.config.shape(shards.open_split(dataset_dir(run.config.data), "val").vocab_size))
    return [
        f"{records[-1]['step']:,}" if records else "0",
        f"{model.parameter_count():,}",
        f"{run.train_loss:.3f}" if records else "",
        unfinished if run.val_loss is None else f"{run.val_loss:.3f}",
        f"{lowest['val_loss']:.3f}, {lowest['step']:,}" if lowest else "",
        f"{sum(record['ms'] for record in records) / 60_000:.1f}",
    ]


def draw(figure, runs: list[SweepRun]) -> None:
    """Draw validation losses against tokens; beside them the last ones against the swept number with most values."""
    values = {name: {run.columns[name] for run in runs} for name in runs[0].columns}
    numeric = [n for n, found in values.items() if len(found) > 1 and all(type(v) in (int, float) for v in found)]
    panels = figure.subplots(1, 2 if numeric else 1, squeeze=False)[0]
    figure.set_size_inches(7.5 * len(panels), 5)
    draw_curves(panels[0], runs)
    if numeric:
        draw_against(panels[1], runs, max(numeric, key=lambda name: len(values[name])))
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


def draw_curves(axes, runs: list[SweepRun]) -> None:
    """Draw every run's validation loss against tokens, and the losses to compare with that are not far above."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    shown = [run for run in runs if run.val_records]
    for i, run in enumerate(shown):
        tokens, losses = zip(*((r["tokens"], r["val_loss"]) for r in run.val_records), strict=True)
        color = colormaps["tab10"](i) if len(shown) <= 10 else colormaps["viridis"](i / len(shown))
        state = "" if run.val_loss is not None else ", failed" if run.error else ", not finished"
        label = f"{run.name}: {losses[-1]:.3f}{state}"
        axes.plot(tokens, losses, "o-", markersize=3, linewidth=1, color=color, label=label)
    known, (low, high) = references(runs), axes.get_ylim()
    if known and high > max(known.values()) + 0.5:  # one bad run must not flatten the rest
        high = max(known.values()) + 0.5
        axes.set_ylim(top=high)
    draw_levels(axes, {name: nats for name, nats in known.items() if nats <= high + 0.1 * (high - low)})
    axes.set(xlabel="tokens", ylabel="validation loss, nats per token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_against(axes, runs: list[SweepRun], x: str) -> None:
    """Draw the last validation loss against option x, a line for each combination of the other options."""
    lines = {}
    for run in runs:
        if run.val_loss is not None:
            others = ",".join(f"{name}={value}" for name, value in run.columns.items() if name != x)
            lines.setdefault(others or None, []).append((run.columns[x], run.val_loss))
    for others, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=others)
    values = sorted(run.columns[x] for run in runs)
    if values[0] > 0 and values[-1] >= 8 * values[0]:
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel="validation loss at the end, nats per token")
