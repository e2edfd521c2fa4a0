"""The learning-rate finder: what it suggests where the answer is known, when it stops, and what it refuses."""

import dataclasses
import math
import random
import re

import pytest

import train_gpt2
from data import pydocs
from data.files import UserError
from training import find_lr
from training.distributed import Distributed


def quadratic(curvature=100.0):
    """A step of noisy gradient descent on a bowl, which explodes at rates above 2 / curvature."""
    noise, position = random.Random(1), [3.0]

    def step(rate):
        loss = curvature * position[0] ** 2 / 2 + 1.0
        position[0] -= rate * curvature * (position[0] + noise.gauss(0, 0.1))
        return loss

    return step


def test_the_suggestion_for_a_bowl_lies_below_the_rate_that_explodes_and_high_enough_to_get_down():
    result = find_lr.find(quadratic(), 1e-6, 10.0, 300)
    assert 1e-4 < result.suggestion < 2e-2
    assert result.valley[0] < result.suggestion < result.valley[1] < 4e-2
    assert result.rates[-1] < 1.0  # it stopped when the loss exploded
    for number in (result.valley[0], result.valley[1]):
        assert f"{number:.1e}" in result.reason


def test_the_suggestion_scales_with_the_problem():
    ratio = (
        find_lr.find(quadratic(10.0), 1e-6, 10.0, 300).suggestion
        / find_lr.find(quadratic(1000.0), 1e-6, 10.0, 300).suggestion
    )
    assert 30 < ratio < 300


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_loss_that_breaks_down_ends_the_sweep_and_is_no_part_of_it(broken):
    asked = []

    def step(rate):
        asked.append(rate)
        return broken if rate > 0.1 else 5 - max(0.0, math.log10(rate) + 4)

    result = find_lr.find(step)
    assert len(asked) == len(result.losses) + 1 == len(result.rates) + 1
    assert all(map(math.isfinite, result.losses)) and result.rates[-1] <= 0.1
    assert "may be better" in result.reason  # it still fell at the end


def test_rates_grow_by_a_constant_factor_from_low_to_high():
    rates = find_lr.find(lambda rate: 9 + (math.log10(rate) + 3) ** 2, 1e-5, 1e-1, 81).rates
    assert rates[0] == 1e-5 and rates[-1] == pytest.approx(0.1)
    for a, b in zip(rates, rates[1:], strict=False):
        assert b / a == pytest.approx(10 ** (4 / 80))


def test_noise_of_the_loss_moves_the_suggestion_little():
    def curve(rate):
        return 3 + (math.log10(rate) + 2.5) ** 2 / 4

    plain = find_lr.find(curve).suggestion
    assert plain == pytest.approx(10**-2.5 / find_lr.PEAK_SHARE, rel=0.1)
    for seed in range(20):
        noise = random.Random(seed)
        noisy = find_lr.find(lambda rate, noise=noise: curve(rate) + noise.gauss(0, 0.1)).suggestion
        assert max(plain / noisy, noisy / plain) < 2


def test_the_step_that_explodes_does_not_reach_back_to_the_valley():
    def curve(rate, explosion):
        return explosion if rate > 0.05 else 3 + (math.log10(rate) + 2.5) ** 2 / 4

    exploded, stopped = (find_lr.find(lambda rate, e=e: curve(rate, e)) for e in (1e9, math.inf))
    assert exploded.suggestion == pytest.approx(stopped.suggestion, rel=0.2)
    assert exploded.valley == pytest.approx(stopped.valley, rel=0.5)


def test_the_valley_is_what_lies_within_a_twentieth_of_the_fall_around_the_lowest_point():
    assert find_lr.valley([5.0, 1.1, 1.3, 1.19, 1.0, 1.1, 1.21, 1.1]) == (3, 4, 5)
    assert find_lr.valley([5.0, 1.1, 1.0, 1.1]) == (1, 2, 3)


def test_smoothing_does_not_lag_and_the_slope_is_per_tenfold_rate():
    x = [i / 40 for i in range(200)]  # log10 of rates
    smooth = find_lr.smoothed([7 - 2 * v for v in x], 200)
    slopes = find_lr.derivative(x, smooth)
    for i in range(60, 140):
        assert smooth[i] == pytest.approx(7 - 2 * x[i], abs=0.01)
        assert slopes[i] == pytest.approx(-2, abs=0.02)
    assert find_lr.derivative([0.0, 1.0, 3.0], [1.0, 2.0, 8.0]) == [1.0, 7 / 3, 3.0]


@pytest.mark.parametrize(
    "step, options, words",
    [
        (lambda rate: 4.0, {}, "fell by 0.000 nats"),
        (lambda rate: math.inf, {}, "broke down at a learning rate of 1.0e-05 already"),
        (lambda rate: 4.0 + 1e6 * rate, {}, "broke down|fell by"),
        (lambda rate: 4.0, {"low": 0.0}, "are no range"),
        (lambda rate: 4.0, {"low": 1.0, "high": 0.1}, "are no range"),
        (lambda rate: 4.0, {"high": math.nan}, "are no range"),
        (lambda rate: 4.0, {"high": math.inf}, "are no range"),
        (lambda rate: 4.0, {"steps": 5}, "too short"),
    ],
)
def test_a_sweep_that_can_tell_nothing_is_refused_with_a_sentence(step, options, words):
    with pytest.raises(UserError, match=words):
        find_lr.find(step, **options)


def test_the_picture_is_a_png_also_where_the_loss_explodes(tmp_path):
    result = find_lr.find(quadratic(), 1e-6, 10.0, 300)
    find_lr.draw(result, tmp_path / "find_lr.png", "a bowl")
    assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["find_lr.png"]


# ------------------------------------------------------------------------------------------------------- a small GPT


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "pydocs"
    pydocs.prepare(folder)
    # fmt: off
    return dataclasses.replace(
        train_gpt2.LAPTOP, data=str(folder), n_layer=2, n_head=2, n_embd=32, block_size=32, batch_tokens=256,
        micro_batch=8, eval_tokens=4096, dtype="float32", max_steps=100, warmup_steps=10,
    )
    # fmt: on


def trained(config):
    """Validation loss after a whole run."""
    trainer, loader, val_split, *_ = train_gpt2.set_up(config, Distributed())
    for step in range(1, config.max_steps + 1):
        train_gpt2.train_step(trainer, *loader.batch(step - 1), step)
    return train_gpt2.validate(trainer, val_split)


def test_a_small_gpt_trains_better_at_the_suggestion_than_nine_times_below_or_above(config, tmp_path, capsys):
    out = tmp_path / "runs" / "swept"
    train_gpt2.run(dataclasses.replace(config, find_lr=True, out_dir=str(out)))
    assert [path.name for path in out.iterdir()] == ["find_lr.png"]
    rate = float(re.search(r"^--lr (\S+): the smoothed loss is lowest", capsys.readouterr().out, re.MULTILINE)[1])
    losses = {lr: trained(dataclasses.replace(config, lr=lr)) for lr in (rate / 9, rate, rate * 9)}
    assert min(losses, key=losses.get) == rate, losses


def test_a_step_that_breaks_down_ends_the_command_with_a_suggestion_and_other_processes_write_nothing(tmp_path, capsys):
    def loss_at(rate, step):
        assert step == 1 + round(40 * math.log10(rate / 1e-5) * 199 / 200)
        if rate > 0.1:
            raise UserError("loss inf")
        return 3 + (math.log10(rate) + 2.5) ** 2 / 4

    find_lr.run(loss_at, UserError, tmp_path / "one", quiet=False)
    find_lr.run(loss_at, UserError, tmp_path / "other", quiet=True)
    assert "--lr 0.005" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("**/*.png")] == ["find_lr.png"] and not (tmp_path / "other").exists()
