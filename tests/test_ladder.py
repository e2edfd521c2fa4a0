"""training/ladder/: every backward pass by hand, and the quick ladder beside published losses."""

import json
import pydoc_data.topics
import random
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import train_gpt2
from training.ladder import by_hand, climb, names, scalar, shakespeare
from training.ladder.by_hand import BatchNorm, Embedding, Flatten, Linear, Tanh

RNG = np.random.default_rng(0)
TEXT = "\n".join("".join(random.Random(i).choices("abcdefgh", k=2 + i % 5)) for i in range(200))


def draw(*shape):
    return RNG.standard_normal(shape)


def batch_norm(x, gain, bias, axes):
    xhat = (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True) + by_hand.EPS).sqrt()
    return gain * xhat + bias


IDS = RNG.integers(0, 7, (5, 4))
LAYERS = {  # a layer, its input, and the same in PyTorch
    "embedding": (Embedding(draw(7, 3)), IDS, lambda x, table: table[x]),
    "flatten, pairs": (Flatten(2), draw(5, 4, 3), lambda x: x.view(5, 2, 6)),
    "flatten, all": (Flatten(4), draw(5, 4, 3), lambda x: x.view(5, 12)),
    "linear": (Linear(draw(3, 6), draw(6)), draw(5, 4, 3), lambda x, w, b: x @ w + b),
    "linear, no bias": (Linear(draw(3, 6)), draw(5, 3), lambda x, w: x @ w),
    "batch norm": (BatchNorm(draw(3), draw(3)), draw(5, 3), lambda x, g, b: batch_norm(x, g, b, 0)),
    "batch norm, tree": (BatchNorm(draw(3), draw(3)), draw(5, 4, 3), lambda x, g, b: batch_norm(x, g, b, (0, 1))),
    "batch norm, wrong": (BatchNorm(draw(3), draw(3), True), draw(5, 4, 3), lambda x, g, b: batch_norm(x, g, b, 0)),
    "tanh": (Tanh(), draw(5, 3), torch.tanh),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_s_backward_by_hand_is_autograd_s(name):
    layer, x, expected = LAYERS[name]
    inputs = [torch.tensor(value, requires_grad=value.dtype == np.float64) for value in (x, *layer.parameters)]
    y = expected(*inputs)
    dy = draw(*y.shape)
    np.testing.assert_allclose(layer.forward(x, training=True), y.detach(), rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(y, [value for value in inputs if value.requires_grad], torch.from_numpy(dy))
    found = [layer.backward(dy), *layer.gradients]
    for mine, theirs in zip([g for g in found if g is not None], gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)


def test_the_loss_s_gradient_by_hand_is_autograd_s():
    logits, targets = draw(5, 7), RNG.integers(0, 7, 5)
    x = torch.tensor(logits, requires_grad=True)
    expected = F.cross_entropy(x, torch.from_numpy(targets))
    expected.backward()
    loss, gradient = by_hand.cross_entropy(logits, targets)
    assert abs(loss - expected.item()) < 1e-12
    np.testing.assert_allclose(gradient, x.grad, rtol=0, atol=1e-12)


def test_batch_norm_s_running_statistics_approach_those_of_the_data():
    layer, x = BatchNorm(np.ones(3), np.zeros(3)), 2 + 3 * draw(500, 3)
    for _ in range(5000):
        layer.forward(x, training=True)
    np.testing.assert_allclose(layer.forward(x, training=False), layer.forward(x, training=True), atol=0.02)


def test_the_neuron_has_the_published_output_and_gradients():
    output, gradients = scalar.neuron()
    assert round(output, 4) == 0.7071
    assert [round(gradient, 4) for gradient in gradients] == [-1.5, 1.0, 0.5, 0.0, 0.5]


def test_a_value_that_is_used_twice_gets_both_gradients():
    x = scalar.Value(3.0)
    ((x + x) * x - x.square()).backward()
    assert x.grad == 6.0


def test_a_network_of_41_numbers_learns_four_points():
    parameters, loss = scalar.train_mlp(50, range)
    assert parameters == 41 and loss < 0.02


def test_learned_bigrams_become_the_counted_ones():
    few = names.Names(TEXT)
    (_, counted), (_, learned) = names.counted_bigram(few, 0, range), names.learned_bigram(few, 3000, range)
    assert counted < learned < counted + 1e-3


def test_windows_and_rows_hold_the_same_characters():
    few = names.Names("ab\nb")
    inputs, targets = few.windows(["ab", "b"], 2)
    assert inputs.tolist() == [[0, 0], [0, 1], [1, 2], [0, 0], [0, 2]] and targets.tolist() == [1, 2, 0, 2, 0]
    inputs, targets = few.rows(["ab", "b"], 4)
    assert inputs.tolist() == [[0, 1, 2, 0], [0, 2, 0, 0]]
    assert targets.tolist() == [[1, 2, 0, names.IGNORED], [2, 0, names.IGNORED, names.IGNORED]]


def test_a_part_sees_no_later_character():
    torch.manual_seed(0)
    for parts in shakespeare.PARTS.values():
        model, tokens = shakespeare.Parts(11, *parts), torch.randint(11, (2, 8))
        changed = tokens.clone()
        changed[:, 5] = (tokens[:, 5] + 1) % 11
        same = (model(tokens) == model(changed)).all(-1)
        assert same[:, :5].all() and not same[:, 5:].any()


# ------------------------------------------------------------------------------------------------------------ climbing


@pytest.fixture
def options(tmp_path):
    """The command line's words for two small texts and a folder."""
    (tmp_path / "names.txt").write_text(TEXT, "utf-8")
    (tmp_path / "plays.txt").write_text("To be, or not to be: that is the question.\n" * 60, "utf-8")
    files = [f"--names-input={tmp_path / 'names.txt'}", f"--shakespeare-input={tmp_path / 'plays.txt'}"]
    return ["--ladder", "--quick", *files, f"--out-dir={tmp_path / 'out'}"]


LOWER = [
    ("mlp", "scaled-logits"),
    ("scaled-logits", "scaled-tanh"),
    ("scaled-tanh", "wavenet"),
    ("bigram", "four-heads"),
]
ORDERED = sorted({name for pair in LOWER for name in pair})  # the rungs of some seconds


@pytest.fixture(scope="module")
def quick_losses():
    """Losses of the quick ladder on text that every Python has: words of its sources, and its documentation."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = " ".join(path.read_text("utf-8", errors="replace") for path in paths)
    words = names.Names("\n".join(sorted(set(re.findall(r"\b[a-z]{2,12}\b", sources)))))
    data = {"names": words, "shakespeare": "\n".join(pydoc_data.topics.topics.values())[:400_000]}
    rungs = {name: climb.RUNGS[name] for name in ORDERED}
    return {name: rung.train(data[rung.ladder], rung.quick, range)[1] for name, rung in rungs.items()}


@pytest.mark.parametrize("before, after", LOWER)
def test_a_rung_is_below_an_earlier_one_as_published(quick_losses, before, after):
    assert float(climb.RUNGS[after].published) < float(climb.RUNGS[before].published)
    assert quick_losses[after] < quick_losses[before]


def climbed(capsys, *words):
    """Run train_gpt2.py. Return its status, standard output and error."""
    with pytest.raises(SystemExit) as end:
        train_gpt2.main([*words])
    shown = capsys.readouterr()
    return end.value.code, shown.out, shown.err


def test_rungs_are_climbed_once_and_end_in_a_table_and_a_picture(options, tmp_path, capsys):
    status, shown, notes = climbed(capsys, *options, "scalar", "bigram-counted")
    assert not status and "published losses do not belong to it" in notes
    first = json.loads((tmp_path / "out/ladder.json").read_text("utf-8"))
    assert [*first] == ["scalar", "bigram-counted"] and first["scalar"]["loss"] < 0.02
    assert "| bigram-counted | bigrams counted " in shown and "| 2.45 " in shown
    _, shown, _ = climbed(capsys, *options, "scalar", "bigram-learned")
    assert (tmp_path / "out/ladder.md").read_text("utf-8") in shown + "\n"
    assert (tmp_path / "out/ladder.png").read_bytes().startswith(b"\x89PNG")
    later = json.loads((tmp_path / "out/ladder.json").read_text("utf-8"))
    assert [*later] == [*first, "bigram-learned"] and later["scalar"] == first["scalar"]


def test_the_table_and_the_picture_show_the_large_gpt_s_run_if_there_is_one(tmp_path):
    assert "python train_gpt2.py shakespeare-char" in climb.table({})
    climb.GPT_RUN.mkdir(parents=True)
    step = {"tokens": 1, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "ms": 400.0, "tokens_per_s": 1.0, "mfu": None}
    lines = [step | {"step": i} | ({"val_loss": 1.4 + i / 25_000} if i % 1000 == 0 else {}) for i in range(1, 5001)]
    (climb.GPT_RUN / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    assert "| 1.4800 at 2,000, 1.6000 at 5,000 | 2000        |" in climb.table({})
    climb.draw(figure := Figure(), {})
    ours, published = ([*line.get_xdata()] for line in figure.axes[1].lines)
    assert ours == pytest.approx([1.6]) and published == [1.4968, 1.5707]


@pytest.mark.parametrize(
    "content", ["[1]", '{"mlp": 1}', '{"mlp": {"steps": "x", "parameters": 1, "loss": 1, "seconds": 1}}', "[" * 99_999]
)
def test_a_corrupt_state_is_named(options, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ladder.json").write_text(content, "utf-8")
    status, _, notes = climbed(capsys, *options, "scalar")
    assert status == 2 and notes.endswith("ladder.json is corrupt: remove it, or use another --out-dir\n")


def test_an_unknown_rung_is_answered_with_the_known_ones(options, capsys):
    status, _, notes = climbed(capsys, *options, "wavnet")
    assert status == 2 and notes.startswith("error: there is no rung wavnet: the rungs are scalar, bigram-")
