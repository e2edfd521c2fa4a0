"""Diagnostics: every figure against one computed another way, no trace in the training, and warnings only when due."""

import dataclasses
import json
import math

import matplotlib.figure
import pytest
import torch
import torch.nn.functional as F
from accuracy import interpreted

import kernels
import train_gpt2
from model import GPT, GPTConfig
from training import setup
from training.diagnostics import alarms, measure, panels
from training.diagnostics.measure import Diagnostics
from training.distributed import Distributed
from training.run import read_log

V, T = 300, 32


def small(n_layer=2, block_size=T, **options):
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer, 2, 32, block_size, V, **options))


def batch(sequences=4, length=T):
    tokens = torch.randint(V, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def step(model, optimizers, inputs, targets):
    model(inputs, targets).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def diagnosed(model, optimizers, inputs, targets):
    with Diagnostics(model, optimizers).watching(inputs, targets) as found:
        step(model, optimizers, inputs, targets)
    return found


def close(found, expected):
    """To the three digits that are kept."""
    return found == pytest.approx(float(expected), rel=6e-3, abs=1e-9)


# ------------------------------------------------------------------------------------------------ the figures are right


def test_gradients_and_updates_are_those_of_the_step():
    model, (inputs, targets) = small(), batch()
    model(inputs, targets).backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    found = diagnosed(model, [optimizer], inputs, targets)
    places = {"wte": "wte", "wpe": "wpe"} | {kind: f"h.{{}}.{path}" for kind, path in alarms.KINDS.items()}
    assert set(places) == set(found["update_ratio"])
    for kind, place in places.items():
        for layer in range(2 if "{}" in place else 1):
            name = f"transformer.{place.format(layer)}.weight"
            weight, gradient = before[name]
            rows = slice(V if kind == "wte" else None)  # the padding is no part of the vocabulary
            update = dict(model.named_parameters())[name].detach() - weight
            weight, gradient, update = weight[rows], gradient[rows], update[rows]
            assert close(found["gradient_mean"][kind][layer], gradient.mean()), name
            assert close(found["gradient_std"][kind][layer], gradient.std()), name
            assert close(found["gradient_ratio"][kind][layer], (gradient.norm() / weight.norm()).log10()), name
            assert close(found["update_ratio"][kind][layer], (update.norm() / weight.norm()).log10()), name
    assert found["schedule"] == 1.0


def test_activations_are_those_of_the_model():
    model, (inputs, targets) = small(), batch()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.bias.uniform_(-6, 2)  # so that some units are dead
            block.attn.c_attn.weight.mul_(40)  # and some queries have chosen their key
        found = measure.measure_activations(model, inputs, targets)
        stream = model.transformer.wte(inputs) + model.transformer.wpe(torch.arange(T))
        streams = [stream]
        for layer, block in enumerate(model.transformer.h):
            norm = lambda x, ln: F.layer_norm(x, (32,), ln.weight, ln.bias)  # noqa: E731
            qkv = block.attn.c_attn(norm(stream, block.ln_1))
            branch = block.attn(norm(stream, block.ln_1), None)
            streams.append(stream := stream + branch)
            z = block.mlp.c_fc(norm(stream, block.ln_2))
            streams.append(stream := stream + block.mlp(norm(stream, block.ln_2)))
            gelu = F.gelu(z, approximate="tanh")
            assert close(found["gelu_mean"][layer], gelu.mean()) and close(found["gelu_std"][layer], gelu.std())
            assert 0.1 < found["gelu_dead"][layer] < 0.9
            assert close(found["gelu_dead"][layer], (z < -3).float().mean())
            assert close(found["attention_mean"][layer], branch.mean())
            assert close(found["attention_std"][layer], branch.std())
            q, k, _ = qkv.view(4, T, 3, 2, 16).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            entropy = torch.distributions.Categorical(logits=scores[:, :, 8:]).entropy()
            assert close(found["attention_entropy"][layer], (entropy / torch.arange(9, T + 1).log()).mean())
            assert 0.05 < found["attention_focused"][layer] < 0.95
            assert close(found["attention_focused"][layer], (entropy < 0.1).float().mean())
        for place, x in enumerate(streams):
            assert close(found["residual"][place], x.square().mean(-1).sqrt().median())
        assert len(found["residual"]) == len(streams) == 5


def test_predictions_are_those_of_the_model():
    model, (inputs, targets) = small(), batch(length=21)
    with torch.no_grad():
        found, logits = measure.measure_activations(model, inputs, targets), model(inputs)
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(0)
    bins = [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 21)]
    assert measure.position_bins(21) == bins
    assert found["loss_by_position"] == pytest.approx([loss[a:b].mean().item() for a, b in bins], rel=6e-3)
    assert close(found["loss"], loss.mean()) and close(found["logit_std"], logits.std(-1).mean())
    assert close(found["entropy"], torch.distributions.Categorical(logits=logits).entropy().mean())


@pytest.mark.parametrize("n_layer, length", [(0, T), (1, 1), (1, 2), (12, 9)])
def test_models_without_layers_and_blocks_of_a_token_or_two_have_records_and_pictures_too(tmp_path, n_layer, length):
    model, (inputs, targets) = small(n_layer, length), batch(3, length)
    found = diagnosed(model, [torch.optim.AdamW(model.parameters(), lr=1e-4)], inputs, targets)
    histograms = found.pop("histograms")
    assert len(json.dumps(found, allow_nan=False)) < 4000 and not found["warnings"]
    assert len(json.dumps(histograms, allow_nan=False)) < 1000 * max(1, n_layer)
    if length in (1, T):  # a picture takes a second
        panels.draw([{"step": 1, "diagnostics": found}], tmp_path / "diagnostics.png")
        assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------- training is as without


@pytest.fixture
def configured(dataset, tmp_path):
    """Return the options of a small run in tmp_path, with changes."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_tokens": 512, "micro_batch": 8}
    steps = {"max_steps": 100, "warmup_steps": 10, "eval_tokens": 640, "schedule": "cosine"}
    steps |= {"adamw_lr": None, "min_lr": None, "zero_init": False, "weight_decay": 0.3}
    options = {"data": str(dataset), "out_dir": str(tmp_path), "device": "cpu", "dtype": "float32"}
    return lambda **changes: dataclasses.replace(train_gpt2.LAPTOP, **(sizes | steps | options | changes))


def set_up(config):
    data = setup.open_data(config, Distributed())
    return train_gpt2.make_trainer(config, data, Distributed()), data.loader


def run(config, steps, due=lambda step: True, spoil=lambda model: None):
    """Train for some steps; the trainer and the records of the steps that are due."""
    trainer, loader = set_up(config)
    spoil(trainer.raw_model)
    records, diagnose = [], Diagnostics(trainer.raw_model, trainer.optimizers, trainer.autocast)
    for step in range(1, steps + 1):
        inputs, targets = loader.batch(step - 1)
        if due(step):
            with diagnose.watching(inputs, targets) as found:
                train_gpt2.train_step(trainer, inputs, targets, step)
            records.append({"step": step, "diagnostics": json.loads(json.dumps(found, allow_nan=False))})
        else:
            train_gpt2.train_step(trainer, inputs, targets, step)
    return trainer, records


def assert_no_hooks(trainer):
    assert not any(module._forward_hooks for module in trainer.raw_model.modules())
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in trainer.optimizers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_diagnosed_run_has_the_same_bits_as_one_that_is_not(configured, dtype):
    config = configured(dropout=0.2, dtype=dtype)
    (with_it, records), (without, none) = run(config, 4), run(config, 4, due=lambda step: False)
    assert len(records) == 4 and not none
    expected = without.raw_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in with_it.raw_model.state_dict().items())
    assert with_it.raw_model.training
    assert_no_hooks(with_it)


def test_a_step_that_fails_leaves_no_hook_behind(configured):
    trainer, loader = set_up(configured())
    with pytest.raises(KeyError), Diagnostics(trainer.raw_model, trainer.optimizers).watching(*loader.batch(0)):
        raise KeyError
    assert_no_hooks(trainer)


def test_a_compiled_model_is_not_compiled_again():
    model, graphs = small(), []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    optimizers, (inputs, targets) = [torch.optim.AdamW(model.parameters(), lr=1e-3)], batch()
    for number in range(4):
        if number % 2:
            with Diagnostics(model, optimizers).watching(inputs, targets) as found:
                step(compiled, optimizers, inputs, targets)
            assert found["update_ratio"]["c_fc"][1] is not None
        else:
            step(compiled, optimizers, inputs, targets)
        if number == 0:
            compiled_once = len(graphs)
    assert len(graphs) == compiled_once > 0


@interpreted
def test_triton_kernels_are_diagnosed_like_pytorchs():
    plain, triton = small(1), GPT(small(1).config, kernels.select("all"))
    triton.load_state_dict(plain.state_dict())
    inputs, targets = batch(1)
    ours, theirs = (measure.measure_activations(model, inputs, targets) for model in (triton, plain))
    (ours["gelu"],), (theirs["gelu"],) = (found.pop("histograms")["gelu"] for found in (ours, theirs))
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=2e-2, abs=1e-5), name


@pytest.mark.parametrize("every, steps", [(3, [1, 3, 6]), (0, [])])
def test_the_command_diagnoses_the_first_and_every_nth_step(configured, tmp_path, every, steps):
    train_gpt2.launch(configured(diagnose=every, max_steps=7))
    assert [record["step"] for record in read_log(tmp_path) if "diagnostics" in record] == steps
    assert (tmp_path / "diagnostics.png").exists() == bool(steps)


# ------------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize("optimizer, lr, zero_init", [("muon", 1.6e-2, 0), ("adamw", 8e-3, 0), ("muon", 1e-2, 1)])
def test_a_healthy_run_gives_no_warning(configured, optimizer, lr, zero_init):
    _, records = run(
        configured(optimizer=optimizer, lr=lr, zero_init=bool(zero_init)), 60, due=lambda step: step % 6 == 1
    )
    assert [record["diagnostics"]["warnings"] for record in records] == [{}] * 10


@pytest.mark.parametrize("optimizer, lr", [("muon", 0.8), ("adamw", 0.4)])
def test_a_learning_rate_a_hundred_times_too_high_is_flagged_during_a_warmup_too(configured, optimizer, lr):
    config = configured(optimizer=optimizer, lr=lr)
    _, records = run(config, 30, due=lambda step: step in (10, 20, 30))
    assert all(record["diagnostics"]["warnings"] for record in records)
    _, records = run(dataclasses.replace(config, warmup_steps=100), 1)
    said = records[0]["diagnostics"]["warnings"]["updates"]
    assert said.startswith("at the peak of the schedule layer") and said.endswith("the learning rate is too high")


def changed(ending, change):
    def spoil(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(ending):
                    change(parameter)

    return spoil


@pytest.mark.parametrize(
    "ending, change, kind, words",
    [
        ("c_proj.weight", lambda p: p.mul_(30), "residual", "makes the residual stream"),
        ("wte.weight", lambda p: p.mul_(50), "guessing", "is worse than a random guess"),
        ("wte.weight", lambda p: p.mul_(50), "confidence", "confident and wrong"),
        ("c_attn.weight", lambda p: p.mul_(100), "attention", "queries look at one key (2 of 2 layers)"),
        ("h.1.mlp.c_fc.bias", lambda p: p.fill_(-9), "gelu", "100% of layer 1's GELU inputs are on the dead side"),
        ("h.1.mlp.c_proj.weight", lambda p: p.zero_(), "gradients", "layer 1's c_fc gets no gradient"),
        ("h.0.attn.c_proj.weight", lambda p: p.zero_(), "gradients", "layer 0's c_attn gets no gradient"),
    ],
)
def test_a_bad_initialization_is_flagged_at_the_first_step(configured, ending, change, kind, words):
    _, records = run(configured(n_embd=128), 1, spoil=changed(ending, change))
    assert words in records[0]["diagnostics"]["warnings"][kind]


@pytest.fixture(scope="module")
def healthy():
    """A record without a warning."""
    model, (inputs, targets) = small(), batch()
    return diagnosed(model, [torch.optim.AdamW(model.parameters(), lr=1e-4)], inputs, targets)


@pytest.mark.parametrize(
    "kind, name, still_well, no_longer",
    [
        ("updates", "update_ratio", {"c_fc": [-2.0, -4.4]}, {"c_fc": [-2.0, -4.6]}),
        ("updates", "update_ratio", {"c_fc": [-2.0, -0.4]}, {"c_fc": [-2.0, -0.2]}),
        ("gradients", "gradient_std", {"c_fc": [1e-6, 9e-4]}, {"c_fc": [1e-6, 1.1e-3]}),
        ("gelu", "gelu_dead", [0.0, 0.45], [0.0, 0.55]),
        ("attention", "attention_focused", [0.85, None], [0.95, None]),
        ("residual", "residual", [0.1, 0.1, 0.5, 0.5, 0.5], [0.1, 0.1, 0.7, 0.7, 0.7]),
        ("guessing", "loss", math.log(V) + 0.4, math.log(V) + 0.6),
        ("confidence", "entropy", math.log(V) - 0.8, math.log(V) - 1.2),
        ("position", "loss_by_position", [6.0, 5.0, 5.9], [6.0, 5.0, 6.1]),
        ("not_finite", "residual", [0.1, 0.1], [0.1, None]),
        ("not_finite", "entropy", 5.0, None),
    ],
)
def test_each_warning_has_its_threshold(healthy, kind, name, still_well, no_longer):
    assert not healthy["warnings"]
    assert kind not in alarms.find_warnings(healthy | {name: still_well}, V)
    assert kind in alarms.find_warnings(healthy | {name: no_longer}, V)


def test_a_position_that_predicts_its_own_token_is_well_as_long_as_no_block_adds_anything(healthy):
    wide = healthy | {"loss": 11.6, "entropy": 6.4, "residual": [0.03, 0.03, 0.03]}
    assert not alarms.find_warnings(wide, V)
    assert {"guessing", "confidence"} <= set(alarms.find_warnings(wide | {"residual": [0.03, 0.03, 0.04]}, V))


def test_a_position_without_a_target_that_counts_is_no_warning(healthy):
    assert not alarms.find_warnings(healthy | {"loss_by_position": [None, 5.0, 5.0]}, V)


def test_a_stream_may_grow_more_once_something_is_learnt(healthy):
    grown = healthy | {"residual": [0.1, 2.0, 2.0]}
    assert "initialize c_proj smaller" in alarms.find_warnings(grown, V)["residual"]
    grown |= {"entropy": 3.0}
    assert "residual" not in alarms.find_warnings(grown, V)
    assert "is drowned out" in alarms.find_warnings(grown | {"residual": [0.1, 4.0]}, V)["residual"]


def test_a_layer_that_is_left_behind_is_named_with_how_far():
    model, (inputs, targets) = small(), batch()
    slow = model.transformer.h[1].mlp.c_fc.weight
    rest = [p for p in model.parameters() if p is not slow]
    optimizers = [torch.optim.AdamW(rest, lr=1e-3, weight_decay=0), torch.optim.AdamW([slow], lr=1e-7, weight_decay=0)]
    said = diagnosed(model, optimizers, inputs, targets)["warnings"]["updates"]
    assert said.startswith("the updates of layer 1's c_fc are ") and said.endswith(" times smaller than usual")
    assert 150 < float(said.split()[-5].replace(",", "")) < 250  # 1e-7 of 0.02 is 5e-6, 200 times below 1e-3


def test_a_low_rate_that_the_schedule_wants_is_no_warning():
    model, (inputs, targets) = small(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    optimizer.param_groups[0] |= {"lr": 3e-7, "lr_ratio": 3.0}  # early in a long warmup, of a rate three times --lr
    found = diagnosed(model, [optimizer], inputs, targets)
    assert found["schedule"] == pytest.approx(1e-4) and "updates" not in found["warnings"]


def lost():
    """The record of a model with a weight that is no number."""
    model, (inputs, targets) = small(1), batch()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    return diagnosed(model, [torch.optim.AdamW(model.parameters())], inputs, targets)


def test_weights_that_are_lost_are_said_to_be_and_the_record_stays_json():
    found = lost()
    assert "not finite" in found["warnings"]["not_finite"]
    json.dumps(found, allow_nan=False)


def test_a_kind_of_warning_is_reported_once():
    diagnose = Diagnostics(small(), [])
    assert diagnose.new_warnings({"warnings": {"gelu": "a"}}) == ["a"]
    assert diagnose.new_warnings({"warnings": {"gelu": "b", "updates": "c"}}) == ["c"]


# -------------------------------------------------------------------------------------------------------------- picture


def test_a_picture_of_a_thousand_diagnoses_shows_some_of_them_and_every_warning(tmp_path, monkeypatch):
    figure = matplotlib.figure.Figure(figsize=(18, 14), layout="constrained")
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda **options: figure)
    model, (inputs, targets) = small(1), batch()
    found = diagnosed(model, [torch.optim.AdamW(model.parameters(), lr=1e-4)], inputs, targets)
    records = [{"step": step, "diagnostics": found} for step in range(1000)]
    records[501] = {"step": 501, "diagnostics": found | {"warnings": {"gelu": "look here"}}}
    records[999] = {"step": 999, "diagnostics": lost()}
    panels.draw(records, tmp_path / "diagnostics.png")
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    axes = {axis.get_title(): axis for axis in figure.axes}
    assert "step 501: look here" in axes["warnings"].texts[0].get_text()
    limits = [axes[f"{what} output: standard deviation"].get_ylim() for what in ("GELU", "attention")]
    assert limits[0] == limits[1]  # panels that compare share their scale
    for name, axis in axes.items():
        for line in axis.lines:
            values = [y for y in line.get_ydata() if math.isfinite(y)]
            low, high = axis.get_ylim()
            assert all(low <= y <= high for y in values), name
            assert len(values) <= panels.MAX_DRAWN
