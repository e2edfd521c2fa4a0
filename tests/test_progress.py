"""training/progress.py: what a terminal and a file see of a run."""

import io
import sys

import pytest

from training import progress
from training.pace import Pace
from training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream) -> str:
    """What twelve steps write to the stream, with a validation after every sixth."""
    monkeypatch.setattr(sys, "stderr", stream)
    bar = Progress(12, 0, Pace(12))
    for step in range(1, 13):
        record = {"step": step, "loss": 2.5, "ms": 1.0, "tokens_per_s": 1000.0, "mfu": None}
        bar.doing("validating")
        bar.step(record | ({"val_loss": 2.25} if step % 6 == 0 else {}))
    bar.doing("saving")
    bar.close()
    return stream.getvalue()


def test_a_terminal_sees_a_bar_and_what_happens_between_steps(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert "12/12" in text and "loss 2.500 val 2.250 1,000 tokens/s" in text
    assert "validating" in text and "saving" in text.split("12/12")[-1]
    assert text.count("step 6: loss 2.500, validation loss 2.2500") == 1


@pytest.mark.parametrize("seconds, lines", [(10.0, 2), (0.0, 12)])
def test_a_file_gets_plain_lines_and_one_per_validation(monkeypatch, seconds, lines):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", seconds)
    text = shown(monkeypatch, io.StringIO())
    assert "\r" not in text and "validating" not in text
    said = text.splitlines()
    assert said[-1] == "step 12: loss 2.500, validation loss 2.2500" and text.count("validation loss") == 2
    assert len(said) == lines + (seconds == 0.0)
    assert seconds or said[0] == "step 1 of 12, ? left: loss 2.500 1,000 tokens/s"
