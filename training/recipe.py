"""
The recipe, part by part (train_gpt2.py PRESET --recipe): the same GPT-2 for fewer tokens, from a tuned AdamW on.

    python train_gpt2.py laptop --recipe --data datasets/mine --max-steps 1000 --eval-every 50

A rung is the last kept rung plus one part. Its rates are tuned on the first of three seeds, by factors, until the
neighbors on both sides are worse; then the other seeds follow. Its gain is how far its final validation loss is below
that of the last kept rung, at equal tokens, seed by seed. A part whose mean gain is under twice the gain's spread over
the seeds is refused: the next rung does without it.

The table also has the tokens after which a run passes the final loss of the tuned AdamW. A run that passes has not yet
reached the end of its schedule, so this understates the gain; the last rung is the full recipe in half the steps.

A run is a folder, as in a sweep, and the folders are the only state: the same command resumes. After every run, the
table recipe.md and the picture recipe.png (validation loss against tokens, a line per rung) are written again.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from data.files import UserError, as_flag, atomic_write, lock
from data.streams import best_effort
from training.run import read_log
from training.sweep import (
    Parse,
    SignalRelay,
    SweepRun,
    check_folder,
    check_start,
    choose_folder,
    parse_run,
    train_one,
)  # fmt: skip

SEEDS = 3
FACTORS = {"lr": 1.5, "adamw_lr": 1.5, "weight_decay": 3.0, "warmup_steps": 3.0}  # between neighbors when tuning


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the recipe: its title, the options that it sets, and those that are tuned with it."""

    name: str
    title: str
    options: dict[str, object]
    tunes: tuple[str, ...] = ("lr",)


EMA, HALF = "ema", "half"


def parts(steps: int) -> list[Part]:
    """Return the ladder for runs of so many steps."""
    start = {"weight_decay": 0.1, "warmup_steps": max(1, steps // 25)}
    adamw = {"optimizer": "adamw", "zero_init": False, "ema": 0, "lr": 1e-2} | start
    muon = {"optimizer": "muon", "lr": 1.5e-2, "adamw_lr": 1.5e-2} | start
    linear, options = {"schedule": "linear", "min_lr": 0.0}, ("lr", "weight_decay", "warmup_steps")
    return [
        Part("cosine", "AdamW, cosine to a tenth", adamw | {"schedule": "cosine", "min_lr": None}),
        Part("linear", "AdamW tuned, linear to 0", linear, options),
        Part("muon", "Muon", muon, ("adamw_lr", *options)),
        Part("zero-init", "c_proj starts at 0", {"zero_init": True}),
        Part(EMA, "weights averaged", {"ema": max(1, steps // 20)}, ()),
        Part(HALF, "all of it, half the tokens", {"max_steps": steps // 2}, ()),
    ]


@dataclasses.dataclass
class Rung:
    """A part, and a run per seed with the options of all kept parts up to it, its own at their best."""

    part: Part
    options: dict[str, object]
    runs: list[SweepRun]
    gains: list[float]  # nats per token and seed, over the last rung that was kept; [] if there is none to compare with

    @property
    def losses(self) -> list[float]:
        return [run.val_loss for run in self.runs]

    @property
    def kept(self) -> bool:
        """Return whether the mean gain is at least twice its spread over the seeds."""
        return not self.gains or statistics.fmean(self.gains) >= 2 * statistics.stdev(self.gains)


# ------------------------------------------------------------------------------------------------------------ the climb


class Climb:
    """
    The ladder as a function of the runs that exist: `rungs` that are complete, and `missing` runs that come next.

    make: (part, options) -> the run with these options, its records read from its folder if it exists
    Raise UserError if a run failed, unless it only tried a rate: then another rate is taken.
    """

    def __init__(self, steps: int, seed: int, make: Callable[[Part, dict], SweepRun]):
        self.make, self.seeds = make, range(seed, seed + SEEDS)
        self.rungs, self.missing = [], []
        below, options = None, {}
        for part in parts(steps):
            added = part.options
            if part.name == EMA:  # an average does what a rate of 0 at the end does, from a larger rate
                added = added | {"min_lr": float(f"{0.3 * options['lr']:.2g}")}
            if part.name == HALF:
                halves = {name: options[name] for name in ("warmup_steps", "ema") if options[name]}
                added = added | {name: max(1, value // 2) for name, value in halves.items()}
            tuned = self._tune(part, options | added)
            runs = tuned and self._finished(part, [tuned | {"seed": seed} for seed in self.seeds])
            if not runs:
                return
            if failed := [run for run in runs if run.error]:
                raise UserError(f"{failed[0].name} failed: {failed[0].error}")
            rung = Rung(part, tuned, runs, [])
            if below and part.name != HALF:
                rung.gains = [old - new for old, new in zip(below.losses, rung.losses, strict=True)]
            self.rungs.append(rung)
            if rung.kept:
                below, options = rung, tuned

    def _finished(self, part: Part, wanted: list[dict]) -> list[SweepRun] | None:
        """Return these runs, or None, and then they are in `missing`, if some have yet to be trained."""
        runs = [self.make(part, options) for options in wanted]
        self.missing = [run for run in runs if run.val_loss is None and not run.error]
        return None if self.missing else runs

    def _tune(self, part: Part, options: dict) -> dict | None:
        """Return the options with those that the part tunes at their best on the first seed; None if runs are missing.

        One option is tuned after the other, until a round changes nothing.
        """
        start, before = options, None
        while options and options != before:
            before = options
            for name in part.tunes:
                options = options and self._climb(part, options, name, start[name])
        return options

    def _climb(self, part: Part, options: dict, name: str, start) -> dict | None:
        """Return the options with one of them at a value whose neighbors are worse; None if runs are missing."""
        power = 0
        while scaled(name, start, power) != options[name]:  # the grid is the same in every round
            power += 1 if scaled(name, start, power) < options[name] else -1
        while True:
            values = [scaled(name, start, power + shift) for shift in (0, 1, -1)]
            wanted = [options | {name: value, "seed": self.seeds[0]} for value in dict.fromkeys(values)]
            runs = self._finished(part, wanted)
            if runs is None:
                return None
            losses = [float("inf") if run.error else run.val_loss for run in runs]
            best = losses.index(min(losses))
            options = options | {name: values[best]}
            if best == 0:
                return options
            power += 1 if best == 1 else -1


def scaled(name: str, value, power: int):
    """Return an option's value times its factor to a power, to two digits."""
    exact = value * FACTORS[name] ** power
    return max(1, round(exact)) if isinstance(value, int) else float(f"{exact:.2g}")


def climb(script: Path, arguments: list[str], parse: Parse) -> int:
    """
    Train the ladder and print the table. Return 0, or 128 + the signal that ended it early.

    script, arguments, parse: as for sweep.train_grid
    """
    words = [word for word in arguments if word != "--recipe"]
    base = parse(words)
    folder = choose_folder(words, base.out_dir, "recipe")
    check_start({base.data}, "recipe")

    def make(part: Part, options: dict) -> SweepRun:
        run = read_run(folder, words, parse, part, options)
        check_folder([run], folder, "recipe")  # also of runs that are finished: their losses are this recipe's
        run.error = errors.get(run.name, "")
        return run

    errors = {}
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"another process is writing to {folder}: wait for it, or use --out-dir"):
        with SignalRelay() as relay:
            while (state := Climb(base.max_steps, base.seed, make)).missing and not relay.signal:
                run = state.missing[0]
                print(run.name, flush=True)
                train_one(script, run, folder / run.name, relay)
                errors[run.name] = run.error
                report(state.rungs, folder)
        print(report(state.rungs, folder))
        if relay.signal and state.missing:
            print("stopped; the same command resumes")
            return 128 + relay.signal
    return 0


def read_run(folder: Path, arguments: list[str], parse: Parse, part: Part, options: dict) -> SweepRun:
    """Return the run of a part with these options, and what its folder has of it."""
    columns = {name: options[name] for name in (*FACTORS, "seed") if name in options}
    words = [*arguments, *(as_word(name, value) for name, value in options.items())]
    name = ",".join([part.name, *(f"{name}={value}" for name, value in columns.items())])
    return SweepRun(name, columns, words, parse_run(parse, words, f"--recipe, {part.name}"), read_log(folder / name))


def as_word(name: str, value) -> str:
    """Return an option as it is typed."""
    if isinstance(value, bool):
        return as_flag(name) if value else as_flag(f"no_{name}")
    return f"{as_flag(name)}={value}"


# -------------------------------------------------------------------------------------------------------------- results


def tokens_to(loss: float, run: SweepRun) -> float:
    """Return the tokens after which a run's validation loss passes `loss`, interpolated; inf if it never does."""
    points = [(record["tokens"], record["val_loss"]) for record in run.val_records]
    if points and points[0][1] <= loss:
        return points[0][0]
    for (t0, high), (t1, low) in itertools.pairwise(points):
        if low <= loss:
            return t0 + (t1 - t0) * (high - loss) / (high - low)
    return float("inf")


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def baseline(rungs: list[Rung]) -> Rung:
    return [rung for rung in rungs if rung.kept and rung.options["optimizer"] == "adamw"][-1]


def table(rungs: list[Rung]) -> str:
    """Return a Markdown table of the complete rungs."""
    rows = [["part", "lr", "AdamW's lr", "decay", "validation loss", "gain", "tokens to AdamW's loss", "kept"]]
    for rung in rungs:
        options, base = rung.options, baseline(rungs)
        goal, whole = statistics.fmean(base.losses), base.runs[0].records[-1]["tokens"]
        fractions = [tokens_to(goal, run) / whole for run in rung.runs]
        row = [rung.part.title, f"{options['lr']:g}", f"{options.get('adamw_lr', options['lr']):g}"]
        row += [f"{options['weight_decay']:g}", spread(rung.losses)]
        row += [spread(rung.gains) if rung.gains else "", "" if max(fractions) > 1 else spread(fractions)]
        rows.append([*row, "yes" if rung.kept else "no"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines += [
        "",
        f"mean and standard deviation of {SEEDS} seeds; losses in nats per token; tokens: as a fraction of those",
    ]
    return "\n".join([*lines, "of AdamW's last kept rung, up to the point at which its mean loss is passed"])


def report(rungs: list[Rung], folder: Path) -> str:
    """Write recipe.md and recipe.png. Return the table."""
    from matplotlib.figure import Figure  # imported late: it takes half a second

    text, figure = table(rungs), Figure(figsize=(8, 5.5), layout="constrained")
    with best_effort(f"{folder} lacks the newest recipe.md and recipe.png"):
        atomic_write(folder / "recipe.md", lambda file: file.write(f"{text}\n".encode()))
        draw(figure.subplots(), rungs)
        atomic_write(folder / "recipe.png", lambda file: figure.savefig(file, format="png", dpi=120))
    return text


def draw(axes, rungs: list[Rung]) -> None:
    """Draw each rung's validation loss against tokens, the mean of its seeds, and the baseline's final loss."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    for i, rung in enumerate(rungs):
        tokens = [record["tokens"] for record in rung.runs[0].val_records]
        curves = [[record["val_loss"] for record in run.val_records] for run in rung.runs]
        means = [statistics.fmean(losses) for losses in zip(*curves, strict=True)]
        label = f"{rung.part.title}: {means[-1]:.3f}" + ("" if rung.kept else ", refused")
        style = "-" if rung.kept else ":"
        axes.plot(tokens, means, style, color=colormaps["tab10"](i % 10), linewidth=1.2, label=label)
    if rungs:
        axes.axhline(statistics.fmean(baseline(rungs).losses), color="gray", linewidth=0.8, linestyle="--", zorder=0)
        axes.legend(fontsize="small")
    axes.set(xlabel="tokens", ylabel="validation loss, nats per token, mean of the seeds")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
