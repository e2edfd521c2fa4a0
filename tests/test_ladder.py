"""training/ladder.py; how rungs run is in test_cells.py."""

from pathlib import Path

import numpy as np
import pytest
import tyro
from matplotlib.figure import Figure

import model as gpt
import train_gpt2
from data.files import UserError
from data.shards import write_dataset
from data.tokenizer import CharTokenizer
from training import cells, ladder


def parse(arguments):
    return tyro.extras.overridable_config_cli(train_gpt2.PRESETS, args=arguments)


def test_each_rung_changes_one_dimension_from_a_bigram_up_and_can_be_built():
    rungs = ladder.rungs(["laptop"], parse)
    shapes = [[getattr(cell.config, name) for name in ladder.DIMENSIONS] for cell in rungs]
    assert shapes[0][0] == 0
    for before, after in zip(shapes, shapes[1:], strict=False):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert all(b >= a for a, b in zip(before, after, strict=True))
    for cell in rungs:
        assert cell.config.data == "shakespeare-char" and cell.config.max_steps == 2400
        assert gpt.GPT(cell.config.shape(65)).parameter_count() < 1_000_000


def test_options_on_the_command_line_hold_for_every_rung_whichever_the_preset():
    for preset in ("laptop", "gpt2-124m"):
        rungs = ladder.rungs([preset, "--max-steps", "7", "--lr", "1e-3", "--data", "mine"], parse)
        assert {(cell.config.max_steps, cell.config.lr, cell.config.data) for cell in rungs} == {(7, 1e-3, "mine")}


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--n-layer", "3"], "--ladder sets --n-layer itself"),
        (["--block_size=3"], "--ladder sets --block-size itself"),
        (["--micro-batch", "64"], "rung 5-context: --batch-tokens 2048 cannot be cut evenly"),
        (["--resume", "never"], "leave --resume out"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(tmp_path, words, complaint):
    with pytest.raises(UserError, match=complaint):
        ladder.climb(tmp_path / "no_script.py", ["shakespeare-char", "--out-dir", str(tmp_path / "out"), *words], parse)
    assert not (tmp_path / "out").exists()


def test_a_ladder_of_one_rung_is_climbed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ladder, "RUNGS", {"1-bigram": ladder.RUNGS["1-bigram"]})
    text = [np.random.default_rng(0).integers(8, size=3000)]
    write_dataset(tmp_path / "data", CharTokenizer.train("abcdefgh", documents=False), {"train": text, "val": text})
    words = [
        "laptop",
        "--ladder",
        "--data",
        str(tmp_path / "data"),
        "--max-steps",
        "3",
        "--out-dir",
        str(tmp_path / "out"),
    ]
    assert ladder.climb(Path(train_gpt2.__file__), words, parse) == 0
    shown = capfd.readouterr().out
    assert "| no layers: a bigram | 0       | 1      | 32     | 8          | 3     | 576        |" in shown
    assert (tmp_path / "out" / "ladder.md").read_text("utf-8").strip() in shown
    assert (tmp_path / "out" / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_bars_are_the_last_validation_losses_of_the_finished_rungs():
    made = ladder.rungs(["laptop", "--max-steps", "1", "--data", "no such dataset"], parse)
    for cell, loss in zip(made[:3], (2.5, 2.4, 2.2), strict=False):
        cell.records = [{"step": 1, "tokens": 1, "loss": loss - 0.1, "ms": 1.0, "val_loss": loss}]
    ladder.draw(figure := Figure(), made)
    bars = figure.axes[1]
    assert [bar.get_height() for bar in bars.patches] == [2.5, 2.4, 2.2]
    assert [line.get_ydata()[0] for line in bars.lines] == pytest.approx([2.4, 2.3, 2.1])
    assert cells.last_loss(made[0]) == pytest.approx(2.4)
