"""training/expected.py: the band of losses, the warning above it, and which runs have one."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_curves import dataset_like_fineweb

from data.shards import open_split, write_dataset
from data.tokenizer import CharTokenizer, gpt2
from model import GPT, GPTConfig
from train_gpt2 import PRESETS
from training import curves
from training.expected import FINEWEB, LAPTOP, MARGIN, SHAKESPEARE, SHARDS, Expected, expected_losses, first_losses
from training.run import Run

RANDOM = {"guessing at random": 4.0}
BAND = Expected([(100, 5.0), (200, 4.0), (400, 3.0)])


def test_a_loss_is_interpolated_and_judged_from_the_first_point_on():
    assert [BAND.loss(tokens) for tokens in (99, 100, 150, 300, 400, 900)] == [None, 5.0, 4.5, 3.5, 3.0, 3.0]
    assert BAND.warning(99, 9.0) == "" and BAND.warning(150, 4.5 + MARGIN - 0.01) == "" and BAND.warning(150, 1.0) == ""
    assert BAND.warning(150, 4.7).startswith(
        "validation 4.70 after 150 tokens: runs that end at 3.00 have 4.40 to 4.60 there; compare --lr"
    )


@pytest.mark.parametrize("preset, vocab_size", [("laptop", 97), ("gpt2-124m", 50257), ("gpt2-124m-fast", 50257)])
def test_random_weights_have_the_first_loss_of_their_preset_and_other_targets_do_not(preset, vocab_size):
    """Blocks at zero do not count, and hardly when random: one serves for all."""
    config = PRESETS[preset][1]
    shape = dataclasses.replace(config.shape(vocab_size), n_layer=1, block_size=64)
    model = GPT(shape).requires_grad_(False)
    if config.zero_init:
        model.zero_projections()
    low, high = first_losses(shape, config.zero_init)
    tokens = torch.randint(vocab_size, (1, 65))
    repeated = torch.where(torch.rand(1, 64) < 0.2, tokens[:, :-1], tokens[:, 1:])
    for targets in (tokens[:, 1:], repeated):
        assert low < model(tokens[:, :-1], targets) < high
    assert model(tokens[:, :-1], tokens[:, :-1]) < low  # targets that are not shifted
    for p in model.parameters():
        p.mul_(10)
    assert model(tokens[:, :-1], tokens[:, 1:]) > high


def test_the_first_loss_of_blocks_at_zero_allows_for_dropout_and_for_any_width():
    torch.manual_seed(0)
    shape = GPTConfig(1, n_head=2, n_embd=768, block_size=64, vocab_size=97, dropout=0.3)
    model, tokens = GPT(shape).requires_grad_(False), torch.randint(97, (4, 65))
    model.zero_projections()
    low, high = first_losses(shape, identity=True)
    assert low < model(tokens[:, :-1], tokens[:, 1:]) < high
    assert all(map(math.isfinite, first_losses(dataclasses.replace(shape, n_embd=65536), identity=True)))


def test_a_run_warns_once_when_it_is_first_above_the_band(tmp_path, capsys):
    step = {"loss": 4.0, "mfu": None, "tokens_per_s": 1.0, "ms": 1.0}
    with Run(tmp_path, {"max_steps": 9}, 0, RANDOM, expected=BAND) as run:
        for i, loss in enumerate((6.0, 4.9, 4.7, 4.8), start=1):
            run.log(step | {"step": i, "tokens": 50 * i, "val_loss": loss})
    shown = capsys.readouterr().err
    assert shown.count("runs that end at 3.00") == 1 and "validation 4.70 after 150 tokens" in shown
    with Run(tmp_path, {"max_steps": 9}, 4, RANDOM, expected=BAND) as run:  # resumed: it was said before
        run.log(step | {"step": 5, "tokens": 250, "val_loss": 5.0})
    assert "runs that end at" not in capsys.readouterr().err


def test_curves_fall_and_presets_have_a_band(tmp_path):
    for curve in (FINEWEB, LAPTOP, SHAKESPEARE):
        assert curve == sorted(curve) == sorted(curve, key=lambda point: -point[1])
    split = dataset_like_fineweb(tmp_path / "fineweb-edu-10B", gpt2())
    gpt2_124m = GPTConfig()
    assert expected_losses(split, gpt2_124m).loss(1.31e9) == pytest.approx(3.555)
    assert expected_losses(split, GPTConfig(n_layer=4, n_head=4, n_embd=128)) is None
    assert expected_losses(dataset_like_fineweb(tmp_path / "mine", gpt2()), gpt2_124m) is None
    assert {shift for model, curve, shift in SHARDS.values() if curve is FINEWEB} == {0.0, -0.21}


@pytest.mark.parametrize(
    "name, layers, channels, curve", [("pydocs", 4, 128, LAPTOP), ("shakespeare-char", 6, 384, SHAKESPEARE)]
)
def test_the_band_of_a_preset_is_for_its_characters(tmp_path, name, layers, channels, curve):
    characters = CharTokenizer("abcde", documents=False)
    write_dataset(tmp_path / name, characters, {part: [np.arange(5).repeat(20)] for part in ("train", "val")})
    split = open_split(tmp_path / name, "val")
    assert expected_losses(split, GPTConfig(n_layer=layers, n_head=4, n_embd=channels, vocab_size=5)).points == curve
    assert expected_losses(split, GPTConfig(n_layer=layers, n_head=4, n_embd=channels // 2, vocab_size=5)) is None
    assert expected_losses(dataset_like_fineweb(tmp_path / "fineweb-edu-10B", characters), GPTConfig()) is None


def test_the_band_is_drawn_as_far_as_the_run_has_come(tmp_path):
    def drawn(tokens, expected):
        records = [{"step": 1, "tokens": 10, "loss": 6.0}, {"step": 2, "tokens": tokens, "loss": 5.0, "val_loss": 5.0}]
        curves.draw(records, tmp_path / "loss.png", "run", {"random": 7.0}, {}, expected)
        return (tmp_path / "loss.png").read_bytes()

    assert drawn(250, BAND) != drawn(250, None)
    assert drawn(50, BAND) == drawn(50, None)  # it begins later
