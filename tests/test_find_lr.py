"""The learning-rate finder: what it suggests where the answer is known, when it stops, and what it refuses."""

import math
import random
import re

import pytest
from runs import curve, train

from data.files import UserError
from training import find_lr


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
    flat, steep = (find_lr.find(quadratic(curvature), 1e-6, 10.0, 300).suggestion for curvature in (10.0, 1000.0))
    assert 30 < flat / steep < 300


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_loss_that_diverges_ends_the_sweep_and_is_no_part_of_it(broken):
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
    assert plain == pytest.approx(10**-2.5 / find_lr.MEAN_RATE, rel=0.1)
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
    assert find_lr.find_valley([5.0, 1.1, 1.3, 1.19, 1.0, 1.1, 1.21, 1.1]) == (3, 4, 5)
    assert find_lr.find_valley([5.0, 1.1, 1.0, 1.1]) == (1, 2, 3)


def test_smoothing_does_not_lag():
    smooth = find_lr.smooth_both_ways([7 - i / 20 for i in range(200)], 200)
    for i in range(60, 140):
        assert smooth[i] == pytest.approx(7 - i / 20, abs=0.01)


@pytest.mark.parametrize(
    "step, words",
    [
        (lambda rate: 4.0, "fell by 0.000 nats"),
        (lambda rate: math.inf, "diverged at a learning rate of 1.0e-05 already"),
        (lambda rate: 4.0 + 1e6 * rate, "diverged|fell by"),
    ],
)
def test_a_sweep_that_can_tell_nothing_is_refused_with_a_sentence(step, words):
    with pytest.raises(UserError, match=words):
        find_lr.find(step)


def test_the_picture_marks_the_minimum_also_when_the_loss_explodes(tmp_path):
    result = find_lr.find(quadratic(), 1e-6, 10.0, 300)
    assert result.smooth[result.lowest] == min(result.smooth)
    assert result.suggestion == pytest.approx(result.rates[result.lowest] / find_lr.MEAN_RATE, rel=0.05)
    flat = find_lr.find(quadratic(), 1e-6, 10.0, 300, mean_rate=1.0)  # a schedule that never falls
    assert flat.suggestion == pytest.approx(result.rates[result.lowest], rel=0.05)
    find_lr.draw(result, tmp_path / "find_lr.png", "a bowl")
    assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["find_lr.png"]


# ------------------------------------------------------------------------------------------------------- a small GPT


def test_a_small_gpt_trains_better_at_the_suggestion_than_nine_times_below_or_above(dataset, tmp_path, capsys):
    options = {"eval_tokens": 4096, "batch_tokens": 512, "max_steps": 100, "warmup_steps": 10, "eval_every": 0}
    assert train(dataset, tmp_path / "swept", "--find-lr", **options) == 0
    assert [path.name for path in (tmp_path / "swept").iterdir()] == ["find_lr.png"]
    rate = float(re.search(r"^--lr (\S+): the smoothed loss is lowest", capsys.readouterr().out, re.MULTILINE)[1])
    losses = {}
    for lr in (rate / 9, rate, rate * 9):
        assert train(dataset, tmp_path / str(lr), lr=lr, checkpoint_every=100, **options) == 0
        losses[lr] = curve(tmp_path / str(lr), "val_loss")[100]
    assert min(losses, key=losses.get) == rate, losses


def test_a_step_that_diverges_ends_the_command_with_a_suggestion_and_other_ranks_write_nothing(tmp_path, capsys):
    def loss_at(rate, step):
        assert step == 1 + round(40 * math.log10(rate / 1e-5) * 199 / 200)
        if rate > 0.1:
            raise UserError("loss inf")
        return 3 + (math.log10(rate) + 2.5) ** 2 / 4

    find_lr.run_finder(loss_at, tmp_path / "one", quiet=False, adamw_ratio=2.0)
    find_lr.run_finder(loss_at, tmp_path / "other", quiet=True)
    assert "--lr 0.0059 --adamw-lr 0.0118: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("**/*.png")] == ["find_lr.png"] and not (tmp_path / "other").exists()
