"""
The learning-rate finder (train_gpt2.py --find-lr): which rate to give --lr, from one short sweep.

A model with fresh weights trains for a few hundred steps while the rate grows from step to step by a constant factor,
from far too low to far too high. At first the loss hardly moves, then it falls, stays low for a while, and rises again
where steps become too long. The optimizer is never reset on the way: its moments are part of what a rate does.

The loss of a single step is noisy. It is smoothed by two exponential averages, both corrected for their start, one from
each end, so that their lags cancel; the derivative is of that curve, in nats per tenfold rate.

The suggestion is the geometric middle of the foot of the curve, which reaches from the rate at which a tenth of the
fall is still to come to the rate with the lowest loss. Below it steps are too short, above it they undo what was
learnt; and a run that stays near its peak for long wants less than a sweep that only passes by. Why not a single point:
the lowest one wanders along a flat valley with the noise, and that of steepest fall, a common choice with plain SGD,
comes far too early here: steps of AdamW and Muon are as long as the rate says, whatever the gradient, and most of the
fall is what any rate achieves at the start of training.
Source: L. Smith, "Cyclical Learning Rates for Training Neural Networks", 2015, https://arxiv.org/abs/1506.01186.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import DataError, write_whole

LOW, HIGH, STEPS = 1e-5, 1.0, 200  # 40 steps for every factor of ten
EXPLODED = 4.0  # times the lowest smoothed loss: higher rates can tell nothing more
WINDOW = 20  # the averages reach over this fraction of the sweep, a quarter of a factor of ten
FOOT = 0.1  # share of the fall; see above
LEAST_FALL = 0.1  # nats: with less, nothing was learnt at any rate


@dataclass(frozen=True)
class Result:
    """A sweep: at every rate the loss, smoothed too, in nats per token, and its slope in nats per tenfold rate."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    slopes: list[float]
    foot: tuple[float, float]  # its lowest and highest rate
    suggestion: float
    reason: str


def find(step_with_lr: Callable[[float], float], low: float = LOW, high: float = HIGH, steps: int = STEPS) -> Result:
    """
    Sweep the learning rate from low to high, and suggest one.

    step_with_lr: trains one step at a rate and returns its loss, in nats per token; inf or nan where it broke down
    DataError for a range that is none, or where the losses tell nothing: they never fell, or broke down at once.
    """
    if not 0 < low < high < math.inf:
        raise DataError(f"the learning rates from {low:g} to {high:g} are no range: give two above 0, the lower first")
    if steps < 2 * WINDOW:
        raise DataError(f"a sweep of {steps} steps is too short: give at least {2 * WINDOW}")
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
        raise DataError(f"the loss broke down at a learning rate of {rate:.1e} already: look at data and weights")
    return suggest(rates, losses, steps)


def suggest(rates: list[float], losses: list[float], steps: int) -> Result:
    """The Result of a sweep of `steps` steps, of which these are all that were done. DataError as in find."""
    smooth = smoothed([min(loss, 2 * losses[0]) for loss in losses], steps)  # one that explodes would smear far back
    slopes = derivative([math.log10(rate) for rate in rates], smooth)
    first, lowest = foot(smooth)
    fall = max(smooth[:lowest], default=smooth[0]) - smooth[lowest]
    if fall < LEAST_FALL:
        raise DataError(
            f"the loss fell by {fall:.3f} nats at most between the learning rates {rates[0]:.1e} and {rates[-1]:.1e}, "
            "which says nothing: sweep a wider range, or look at the data"
        )
    suggestion = float(f"{math.sqrt(rates[first] * rates[lowest]):.1e}")
    reason = (
        f"the smoothed loss fell from {smooth[0]:.2f} to {smooth[lowest]:.2f} nats per token, the last {FOOT:.0%} of it"
        f" between the rates {rates[first]:.1e} and {rates[lowest]:.1e}, and this is their middle"
    )
    if lowest == len(smooth) - 1:
        reason += "; the loss was still falling where the sweep ended, so that a higher rate may be better"
    return Result(rates, losses, smooth, slopes, (rates[first], rates[lowest]), suggestion, reason)


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


def foot(smooth: list[float]) -> tuple[int, int]:
    """Where FOOT of the fall is still to come, and where the curve is lowest."""
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    limit, first = smooth[lowest] + FOOT * (smooth[0] - smooth[lowest]), lowest
    while first > 0 and smooth[first - 1] <= limit:
        first -= 1
    return first, lowest


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
    """The sweep as a picture, the PNG `path`: loss and its slope against the rate, the foot, the suggestion."""
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
        axis.axvspan(*result.foot, color="tab:green", alpha=0.12, label="foot of the fall")
        axis.axvline(result.suggestion, color="tab:green", label=f"suggestion: {result.suggestion:g}")
        axis.grid(alpha=0.3)
    above.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))
