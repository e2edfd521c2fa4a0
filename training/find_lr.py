"""
The learning-rate finder (train_gpt2.py --find-lr): which rate to give --lr, from one short sweep.

A model, as a run would start it, trains for a few hundred steps while the rate grows from step to step by a constant
factor, from far too low to far too high. At first the loss hardly moves, then it falls, stays low for a while, and
rises again where steps become too long. The optimizer is never reset on the way: its moments are part of what a rate
does.

The loss of a single step is noisy. It is smoothed by two exponential averages, both corrected for their start, one from
each end, so that their lags cancel; the derivative is of that curve, in nats per tenfold rate.

Where the smoothed loss is lowest is the best rate to stay at: below it steps are too short, above it they undo what
was learnt. A run does not stay: --lr is the peak of a schedule whose mean is PEAK_SHARE of it, so the suggestion is
that rate divided by PEAK_SHARE.

A tenth of it, or the rate of steepest fall, are common choices with plain SGD. Both come too early here: steps of AdamW
and Muon are as long as the rate says, whatever the gradient, so that most of the fall is what any rate achieves at the
start of training, and the valley behind it is wide. How wide is told with the suggestion.
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

LOW, HIGH, STEPS = 1e-5, 1.0, 200  # 40 steps for every factor of ten
EXPLODED = 4.0  # times the lowest smoothed loss: higher rates can tell nothing more
WINDOW = 20  # the averages reach over a 20th of the sweep, a quarter of a factor of ten
PEAK_SHARE = 0.55  # the mean of a cosine from 1 to 0.1
VALLEY = 0.05  # share of the fall by which a rate may miss the lowest loss and still do
LEAST_FALL = 0.1  # nats: with less, nothing was learnt at any rate


@dataclass(frozen=True)
class Result:
    """A sweep: at every rate the loss, smoothed too, in nats per token, and its slope in nats per tenfold rate."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    slopes: list[float]
    valley: tuple[float, float]  # its lowest and highest rate
    suggestion: float
    reason: str


def find(step_with_lr: Callable[[float], float], low: float = LOW, high: float = HIGH, steps: int = STEPS) -> Result:
    """
    Sweep the learning rate from low to high, and suggest one.

    step_with_lr: trains one step at a rate and returns its loss, in nats per token; inf or nan where it broke down
    UserError for a range that is none, or where the losses tell nothing: they never fell, or broke down at once.
    """
    if not 0 < low < high < math.inf:
        raise UserError(f"the learning rates from {low:g} to {high:g} are no range: give two above 0, the lower first")
    if steps < 2 * WINDOW:
        raise UserError(f"a sweep of {steps} steps is too short: give at least {2 * WINDOW}")
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
        raise UserError(f"the loss broke down at a learning rate of {rate:.1e} already: look at data and weights")
    return suggest(rates, losses, steps)


def suggest(rates: list[float], losses: list[float], steps: int) -> Result:
    """The Result of a sweep of `steps` steps, of which these are all that were done. UserError as in find."""
    smooth = smoothed([min(loss, 2 * losses[0]) for loss in losses], steps)  # one that explodes would smear far back
    slopes = derivative([math.log10(rate) for rate in rates], smooth)
    first, lowest, last = valley(smooth)
    fall = max(smooth[:lowest], default=smooth[0]) - smooth[lowest]
    if fall < LEAST_FALL:
        raise UserError(
            f"the loss fell by {fall:.3f} nats at most between the learning rates {rates[0]:.1e} and {rates[-1]:.1e}, "
            "which says nothing: look at the data, or take a larger --batch-tokens, whose loss is less noisy"
        )
    suggestion = float(f"{rates[lowest] / PEAK_SHARE:.1e}")
    reason = (
        f"the smoothed loss is lowest at {rates[lowest]:.1e}, {smooth[lowest]:.2f} nats per token, {smooth[0]:.2f} at "
        f"the start, and a run's mean is {PEAK_SHARE} of its peak; from {rates[first]:.1e} to {rates[last]:.1e} the "
        f"loss is within {VALLEY:.0%} of that fall"
    )
    if lowest == len(smooth) - 1:
        reason += "; it was still falling where the sweep ended, so that a higher rate may be better"
    return Result(rates, losses, smooth, slopes, (rates[first], rates[last]), suggestion, reason)


def smoothed(losses: list[float], steps: int) -> list[float]:
    """The mean of two exponential averages, from the left and from the right: what one lags, the other leads."""
    there, back = _Average(steps), _Average(steps)
    right = [back.add(loss) for loss in reversed(losses)]
    return [(there.add(loss) + other) / 2 for loss, other in zip(losses, reversed(right), strict=True)]


def derivative(x: list[float], y: list[float]) -> list[float]:
    """dy/dx at every point, from its two neighbours, or from one at the ends."""
    last = len(x) - 1
    pairs = [(max(i - 1, 0), min(i + 1, last)) for i in range(len(x))]
    return [(y[j] - y[i]) / (x[j] - x[i]) for i, j in pairs]


def valley(smooth: list[float]) -> tuple[int, int, int]:
    """Where the valley begins, is lowest and ends: the points around the lowest within VALLEY of the fall to it."""
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
        """Take in a loss; the average."""
        self.sum = self.keep * self.sum + (1 - self.keep) * loss
        self.weight = self.keep * self.weight + (1 - self.keep)
        return self.sum / self.weight


def draw(result: Result, path: str | Path, title: str = "") -> None:
    """The sweep as a picture, the PNG `path`: loss and its slope against the rate, the valley, the suggestion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    above.plot(result.rates, result.losses, linewidth=0.6, color="tab:blue", alpha=0.5, label="of each step")
    above.plot(result.rates, result.smooth, linewidth=2, color="tab:blue", label="smoothed")
    ceiling = max(result.losses[0], result.smooth[0]) * 1.15
    above.set_ylim(min(result.losses) - 0.05 * ceiling, ceiling)  # where it explodes, it may leave the picture
    above.set(ylabel="loss, nats per token", title=title or "learning-rate finder")
    below.plot(result.rates, result.slopes, color="tab:orange")
    below.set(ylabel="slope, nats per tenfold rate", xlabel="learning rate", xscale="log")
    steepest = -min(result.slopes)
    below.set_ylim(-1.3 * steepest, 1.3 * steepest)
    below.axhline(0, color="grey", linewidth=0.8)
    for axis in (above, below):
        axis.axvspan(*result.valley, color="tab:green", alpha=0.12, label=f"within {VALLEY:.0%} of the fall")
        axis.axvline(result.suggestion, color="tab:green", label=f"suggestion: {result.suggestion:g}")
        axis.grid(alpha=0.3)
    above.legend()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))


def run(loss_at: Callable[[float, int], float], breakdown: type[Exception], folder: Path, quiet: bool) -> None:
    """
    The whole command: a sweep with its bar, find_lr.png in `folder`, and the suggestion in the terminal.

    loss_at: trains step 1, 2, ... at a rate and returns its loss, in nats per token; `breakdown` where there is none
    quiet:   sweep only; for all processes but the first
    """
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # between refreshes: a log file needs few
    with tqdm(total=STEPS, unit="step", mininterval=seconds, disable=quiet, dynamic_ncols=True) as bar:
        numbers = itertools.count(1)

        def step_with_lr(rate: float) -> float:
            bar.update()
            try:
                return loss_at(rate, next(numbers))
            except breakdown:
                return math.inf

        result = find(step_with_lr)
    if not quiet:
        folder.mkdir(parents=True, exist_ok=True)
        draw(result, folder / "find_lr.png", f"{folder.name}: learning rates")
        print(f"--lr {result.suggestion:g}: {result.reason}")
        print(f"{folder / 'find_lr.png'} shows the sweep")
