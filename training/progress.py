"""Show a run's progress: a bar in a terminal, elsewhere a line every few seconds, and a line per validation."""

import sys
import time

from tqdm import tqdm

from training.pace import Pace

BAR = "{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{}{{postfix}}]"  # the braces are tqdm's, {} is Pace's
PLAIN_SECONDS = 10.0  # between lines if standard error is no terminal


class Progress:
    """
    The progress of a run of `steps` steps, of which `step` are done, on standard error.

    pace: estimates the time that the remaining steps take
    val_loss: the last one that is known, in nats per token
    """

    def __init__(self, steps: int, step: int, pace: Pace, val_loss: float | None = None):
        self._steps, self._pace, self._val_loss, self._loss = steps, pace, val_loss, ""
        self._said, self._terminal = time.perf_counter(), sys.stderr.isatty()
        shown = self._terminal and step < steps
        self._bar = tqdm(initial=step, total=steps, unit="step", dynamic_ncols=True, disable=not shown)

    def step(self, record: dict) -> None:
        """Show a step, whose line of log.jsonl this is."""
        self._pace.add(record["ms"] / 1000)
        if warning := self._pace.warning():
            self.say(f"warning: {warning}")
        if "val_loss" in record:
            self._val_loss = record["val_loss"]
            self.say(f"step {record['step']:,}: loss {record['loss']:.3f}, validation loss {self._val_loss:.4f}")
        mfu = "" if record["mfu"] is None else f" MFU {record['mfu']:.1%}"
        val = "" if self._val_loss is None else f" val {self._val_loss:.3f}"
        self._loss = f"loss {record['loss']:.3f}{val} {record['tokens_per_s']:,.0f} tokens/s{mfu}"
        if self._terminal:
            self._bar.bar_format = BAR.format(self._pace.remaining())
            self._bar.set_postfix_str(self._loss, refresh=False)
            self._bar.update()
        elif time.perf_counter() - self._said >= PLAIN_SECONDS and record["step"] < self._steps:
            self.say(f"step {record['step']:,} of {self._steps:,}, {self._pace.remaining()} left: {self._loss}")

    def doing(self, what: str) -> None:
        """Show in the bar what happens between two steps, such as "validating"; "" when it is over."""
        self._bar.set_postfix_str(f"{self._loss} {what}".strip())

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
        self._said = time.perf_counter()

    def close(self) -> None:
        """End the line of the bar, so that what follows starts a new one."""
        self._bar.close()
