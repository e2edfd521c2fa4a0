"""
The learning-rate finder (train_gpt2.py --find-lr): suggest a value for --lr from one short sweep.

A fresh model trains for a few hundred steps while the rate grows by a constant factor per step, from far too low to far
too high; the optimizer is never reset, since its moments are part of what a rate does. At first the loss hardly moves,
then it falls, stays low for a while, and rises again when steps become too long. The loss of a single step is noisy, so
two exponential averages smooth it, both corrected for their start at zero, one from each end: their lags cancel.

The rate with the lowest smoothed loss is the best constant rate: below it steps are too short, above it they undo what
was learned. A run's rate is not constant: --lr is the peak of a schedule whose mean is a fraction of it, MEAN_RATE if
nothing else is given. The suggestion is that rate divided by the fraction.

With plain SGD, a tenth of that rate or the rate of steepest fall are common choices. For AdamW and Muon both are too
low: their steps are as long as the rate says, whatever the gradient, so any rate achieves most of the early fall.
Source: L. Smith, "Cyclical Learning Rates for Training Neural Networks", 2015, https://arxiv.org/abs/1506.01186.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.files import UserError, atomic_write
from data.streams import best_effort, printable

LOW, HIGH, STEPS = 1e-5, 1.0, 200  # 40 steps per factor of ten
EXPLODED = 4.0  # times the lowest smoothed loss: stop, higher rates are useless
WINDOW = 20  # the averages reach over a 20th of the sweep, a quarter of a factor of ten
MEAN_RATE = 0.55  # mean of a cosine from 1 to 0.1
VALLEY = 0.05  # fraction of the fall by which a rate may miss the lowest loss and still be good
MIN_FALL = 0.1  # nats: with less, nothing was learned at any rate


@dataclass(frozen=True)
class Result:
    """A sweep: the loss at every rate, and smoothed, in nats per token; the range of good rates; the suggestion."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    lowest: int  # index of the lowest smoothed loss
    valley: tuple[float, float]  # its lowest and highest rate
    suggestion: float
    reason: str


def find(
    step_with_lr: Callable[[float], float],
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    mean_rate: float = MEAN_RATE,
) -> Result:
    """
    Sweep the learning rate from low to high, and suggest one.

    step_with_lr: trains one step at a rate and returns its loss, in nats per token; inf or nan if it diverged
    mean_rate:    mean of a run's schedule over its peak
    Raise UserError if the losses never fell, or diverged at once.
    """
    rates, losses, average, best = [], [], _Average(steps), math.inf
    for step in range(steps):
        rate = low * (high / low) ** (step / (steps - 1))
        loss = step_with_lr(rate)
        if not math.isfinite(loss):
            break
        rates.append(rate)
        losses.append(loss)
        best = min(best, smoothed := average.add(loss))
        if smoothed > EXPLODED * best:
            break
    if len(losses) < 2 * WINDOW:
        raise UserError(f"the loss diverged at a learning rate of {rate:.1e} already: look at the data and the weights")
    smooth = smooth_both_ways([min(loss, 2 * losses[0]) for loss in losses], steps)  # an explosion would smear far back
    first, lowest, last = find_valley(smooth)
    fall = max(smooth[:lowest], default=smooth[0]) - smooth[lowest]
    if fall < MIN_FALL:
        rise = f"the learning rate rose from {rates[0]:.1e} to {rates[-1]:.1e}"
        raise UserError(f"the loss fell by {fall:.3f} nats while {rise}: look at the data, or raise --batch-tokens")
    reason = (
        f"the smoothed loss is lowest at {rates[lowest]:.1e}, {smooth[lowest]:.2f} nats per token, and a run's mean "
        f"rate is {mean_rate:.2f} of its peak; the loss is good from {rates[first]:.1e} to {rates[last]:.1e}"
    )
    if lowest == len(smooth) - 1:
        reason += "; it was still falling at the end, so a higher rate may be better"
    suggestion = float(f"{rates[lowest] / mean_rate:.1e}")
    return Result(rates, losses, smooth, lowest, (rates[first], rates[last]), suggestion, reason)


def smooth_both_ways(losses: list[float], steps: int) -> list[float]:
    """Return the mean of two exponential averages, from the left and from the right: one lags, the other leads."""
    left, right = _Average(steps), _Average(steps)
    backward = [right.add(loss) for loss in reversed(losses)]
    return [(left.add(loss) + other) / 2 for loss, other in zip(losses, reversed(backward), strict=True)]


def find_valley(smooth: list[float]) -> tuple[int, int, int]:
    """Return the first, lowest and last index of the points around the lowest within VALLEY of the fall to it."""
    first = last = lowest = min(range(len(smooth)), key=smooth.__getitem__)
    limit = smooth[lowest] + VALLEY * (smooth[0] - smooth[lowest])
    while first > 0 and smooth[first - 1] <= limit:
        first -= 1
    while last < len(smooth) - 1 and smooth[last + 1] <= limit:
        last += 1
    return first, lowest, last


class _Average:
    """An exponential moving average over a WINDOW-th of a sweep, corrected for its start at zero."""

    def __init__(self, steps: int):
        self.keep, self.sum, self.weight = 1 - WINDOW / steps, 0.0, 0.0

    def add(self, loss: float) -> float:
        """Take in a loss and return the average."""
        self.sum = self.keep * self.sum + (1 - self.keep) * loss
        self.weight = self.keep * self.weight + (1 - self.keep)
        return self.sum / self.weight


def draw(result: Result, path: Path, title: str) -> None:
    """Draw the loss against the rate, its minimum, the valley and the suggestion, as the PNG `path`."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    axes.plot(result.rates, result.losses, linewidth=0.6, color="tab:blue", alpha=0.5, label="each step")
    axes.plot(result.rates, result.smooth, linewidth=2, color="tab:blue", label="smoothed")
    x, y = result.rates[result.lowest], result.smooth[result.lowest]
    axes.plot(x, y, "o", markersize=9, color="tab:red", label=f"lowest: {y:.2f} at {x:.1e}")
    axes.axvspan(*result.valley, color="tab:green", alpha=0.12, label=f"within {VALLEY:.0%} of the fall")
    axes.axvline(result.suggestion, color="tab:green", label=f"suggestion: --lr {result.suggestion:g}")
    ceiling = max(result.losses[0], result.smooth[0]) * 1.15
    axes.set_ylim(min(result.losses) - 0.05 * ceiling, ceiling)  # an explosion may leave the picture
    axes.set(xlabel="learning rate", xscale="log", ylabel="loss, nats per token")
    axes.set_title(title, parse_math=False)  # of a folder, whose name may hold $
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))


def run_finder(
    loss_at: Callable[[float, int], float],
    folder: Path,
    quiet: bool,
    adamw_ratio: float = 1.0,
    mean_rate: float = MEAN_RATE,
) -> None:
    """
    Sweep with a progress bar, draw find_lr.png in `folder`, and print the suggestion.

    loss_at: trains step 1, 2, ... at a rate and returns its loss, in nats per token; UserError if it diverged
    quiet:   sweep only; for every rank but 0
    adamw_ratio: --adamw-lr over --lr, which the sweep keeps: with Muon, both are suggested
    mean_rate: mean of a run's schedule over its peak
    """
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # between refreshes: a log file needs few
    with tqdm(total=STEPS, unit="step", mininterval=seconds, disable=quiet, dynamic_ncols=True) as bar:
        steps = itertools.count(1)

        def step_with_lr(rate: float) -> float:
            bar.update()
            try:
                return loss_at(rate, next(steps))
            except UserError:
                return math.inf

        result = find(step_with_lr, mean_rate=mean_rate)
    if not quiet:
        adamw = f" --adamw-lr {result.suggestion * adamw_ratio:.3g}" if adamw_ratio != 1.0 else ""
        print(f"--lr {result.suggestion:g}{adamw}: {result.reason}")
        with best_effort(f"{folder} has no find_lr.png"):
            folder.mkdir(parents=True, exist_ok=True)
            draw(result, folder / "find_lr.png", f"{printable(folder.name)}: learning rates")
            print(f"{folder / 'find_lr.png'} shows the sweep")
