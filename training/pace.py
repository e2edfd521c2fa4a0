"""A run's speed: the time remaining, and a warning if steps are far slower than the machine allows."""

import statistics
import time

import torch
from tqdm import tqdm

SETTLED = 10  # steps after which there is an estimate: the first ones compile and warm up
SLOW = 10  # times the measured speed of matrix products: a step that takes longer is worth a warning
OVERHEAD = 0.1  # seconds per step always allowed: in a tiny model, matrix products are not the bottleneck


def matmul_speed(device: torch.device) -> float | None:
    """Measure a CPU's float32 matmul FLOP/s, in some milliseconds; None for other devices."""
    if device.type != "cpu":
        return None
    size, best = 512, float("inf")
    a, b = torch.ones(2, size, size)
    for _ in range(6):  # the best one counts: other processes come and go
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


class Pace:
    """
    The clock of a run with `steps` to go.

    flops: floating-point operations of a step in this process
    speed: FLOP/s of matrix products, from matmul_speed; None: no warning
    """

    def __init__(self, steps: int, flops: float = 0.0, speed: float | None = None):
        self.steps, self.flops, self.speed = steps, flops, speed
        self.done, self._in_steps, self._recent = 0, 0.0, []
        self._began = time.perf_counter()

    def add(self, seconds: float) -> None:
        """Record the seconds of a step, without the validation, samples and checkpoints that may follow it."""
        self.done, self._in_steps = self.done + 1, self._in_steps + seconds
        self._recent = [*self._recent[-49:], seconds]

    def elapsed(self) -> str:
        """Return the time since the run began or resumed, "2:05" or "1:02:05"."""
        return tqdm.format_interval(round(time.perf_counter() - self._began))

    def remaining(self) -> str:
        """Return the time still to go, "2:05" or "1:02:05", "?" during the first steps.

        The time between steps counts too, at its mean so far.
        """
        if self.done < SETTLED:
            return "?"
        between = (time.perf_counter() - self._began - self._in_steps) / self.done
        left = (self.steps - self.done) * (statistics.median(self._recent) + max(0.0, between))
        return tqdm.format_interval(round(left))

    def warning(self) -> str | None:
        """Return one sentence after the first steps if they were far slower than the machine's matrix products."""
        if self.done != SETTLED or self.speed is None:
            return None
        seconds, possible = statistics.median(self._recent), self.flops / self.speed
        if seconds < SLOW * possible + OVERHEAD:
            return None
        return (
            f"a step takes {seconds:.2f} s, {seconds / possible:.0f} times its matrix products at this machine's speed "
            f"({self.speed / 1e9:.0f} GFLOP/s): stop other busy processes, leave OMP_NUM_THREADS unset or at "
            "the number of cores, and use --dtype float32 if --dtype was given"
        )
