"""training/diagnostics/distributions.py: histograms of a diagnosed step."""

import json

import pytest
import torch
from runs import random_model

from training.diagnostics import distributions
from training.diagnostics.measure import Diagnostics


@pytest.mark.parametrize("kind", distributions.KINDS)
def test_every_number_is_counted_once_outliers_at_the_ends(kind):
    low, high = distributions.KINDS[kind][1]
    width = (high - low) / distributions.BINS
    counts = distributions.histogram(
        kind, torch.tensor([low + width / 2, low - 9, -torch.inf, torch.nan, high + 9, high])
    )
    assert counts[0] == 4 and counts[-1] == 2 and counts.sum() == 6
    assert distributions.fractions(counts)[0] == 0.6667


def test_a_diagnosis_holds_the_histograms_of_its_step(tmp_path):
    model = random_model(vocab_size=11, n_layer=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["lr_ratio"] = 1.0
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[:8] = -100.0  # 8 of 64 units never fire
    tokens = torch.randint(11, (2, 8))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with Diagnostics(model, [optimizer]).watching(tokens, tokens) as found:
        model(tokens, tokens).backward()
        optimizer.step()
    assert found["gelu_dead_units"] == [0.0, 0.125, 0.0]
    layers = found["histograms"]
    assert {kind: len(counts) for kind, counts in layers.items()} == dict.fromkeys(distributions.KINDS, 3)
    matrices = [name for name in weights if name.startswith("transformer.h.2.") and weights[name].dim() == 2]
    gradients = torch.cat([model.get_parameter(name).grad.flatten() for name in matrices])
    expected = distributions.fractions(distributions.histogram("gradient", gradients.abs().log10()))
    assert layers["gradient"][2] == expected
    ratios = [model.get_parameter(n).grad.abs() / weights[n].square().mean().sqrt() for n in matrices]
    ratios = torch.cat([ratio.flatten() for ratio in ratios]).log10()
    expected = distributions.fractions(distributions.histogram("update_ratio", ratios))
    assert layers["update_ratio"][2] == pytest.approx(expected, abs=0.003)

    records = [{"step": 1, "diagnostics": {}}, json.loads(json.dumps({"step": 7, "diagnostics": found})), {"step": 8}]
    distributions.draw(records, tmp_path / "x.png", "a run")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    distributions.draw(records[:1], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
