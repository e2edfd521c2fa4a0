"""pace.py: the time that a run still takes, and the warning about steps that are far too slow."""

import pytest
import torch

from training import pace, progress
from training.pace import Pace
from training.run import Run


@pytest.fixture
def clock(monkeypatch):
    """A list whose only element is the time that pace.py sees."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


def steps(pace, clock, count, seconds, between=0.0):
    for _ in range(count):
        clock[0] += seconds + between
        pace.add(seconds)


def test_the_estimate_appears_after_ten_steps_and_leaves_out_a_slow_first_one(clock):
    run = Pace(steps=1010)
    steps(run, clock, 9, 0.1)
    assert run.remaining() == "?"
    steps(run, clock, 1, 30.0)  # a compilation
    assert run.remaining() == "01:40"  # 1,000 steps of 0.1 s


def test_the_estimate_counts_what_happens_between_steps(clock):
    run = Pace(steps=200)
    steps(run, clock, 100, 0.1)
    assert run.remaining() == "00:10"
    clock[0] += 5.0  # a validation
    assert run.remaining() == "00:15"
    steps(run, clock, 100, 0.1)
    assert run.remaining() == "00:00"


def test_the_estimate_follows_a_machine_that_slows_down(clock):
    run = Pace(steps=100_000)
    steps(run, clock, 1000, 0.1)
    steps(run, clock, 50, 0.4)
    assert run.remaining() == "10:59:40"


def test_a_step_far_slower_than_the_matrix_products_is_a_warning_once(clock):
    run = Pace(steps=100, flops=25e9, speed=140e9)  # 0.18 s
    steps(run, clock, 9, 3.3)
    assert run.warning() is None
    steps(run, clock, 1, 3.3)
    assert run.warning().startswith("a step takes 3.30 s, 18 times its matrix products") and "--dtype" in run.warning()
    steps(run, clock, 1, 3.3)
    assert run.warning() is None


@pytest.mark.parametrize(
    ("flops", "speed", "seconds"),  # slow, but not far too slow; not on a CPU; a tiny model
    [(25e9, 140e9, 1.8), (25e9, None, 99.0), (1e6, 140e9, 0.09)],
)
def test_other_steps_are_no_warning(clock, flops, speed, seconds):
    run = Pace(steps=100, flops=flops, speed=speed)
    steps(run, clock, 10, seconds)
    assert run.warning() is None


def test_the_speed_of_a_cpu_is_measured_in_milliseconds_and_is_plausible():
    assert 1e8 < pace.matmul_speed(torch.device("cpu")) < 1e15
    assert pace.matmul_speed(torch.device("meta")) is None


def test_a_run_shows_both(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    record = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 1, "tokens_per_s": 1.0, "mfu": None, "ms": 3e5}
    pace = Pace(steps=20, flops=1e9, speed=1e9)
    with Run(tmp_path / "run", {"max_steps": 20}, 0, {"guessing at random": 1.0}, pace=pace) as run:
        for step in range(1, 12):
            run.log({"step": step, **record})
    shown = capsys.readouterr().err
    assert shown.count("warning: a step takes 300.00 s, 300 times its matrix products") == 1
    assert "step 11 of 20, 45:00 left" in shown
