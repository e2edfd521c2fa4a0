"""Muon against PyTorch's and against the singular values it promises; groups, schedule, and Muon among ranks."""

import dataclasses
import functools
import itertools

import pytest
import torch
from runs import command, curve, finished, ranks, train, weights
from torch.utils._python_dispatch import TorchDispatchMode

import model as gpt
import train_gpt2
from training import optimizer
from training.checkpoint import newest_checkpoint, save_checkpoint
from training.distributed import Distributed
from training.optimizer import Muon, orthogonalize


def matrices(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(muon, parameters, steps):
    """Take steps with random gradients, the same for the same parameters and steps."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        muon.step()


def tiny(n_layer=2):
    return gpt.GPT(gpt.GPTConfig(n_layer, n_head=2, n_embd=32, block_size=16, vocab_size=64))


SHAPES = [(48, 16), (16, 16), (64, 16), (16, 64), (16, 16), (16, 64)]


def test_without_the_split_it_is_pytorchs_muon(monkeypatch):
    """PyTorch's converts to bfloat16 inside its iteration: it is kept from that, and then both compute in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    mine, theirs = matrices(*SHAPES), matrices(*SHAPES)
    take_steps(Muon(mine, lr=0.02, weight_decay=0.3), mine, range(5))
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    take_steps(reference, theirs, range(5))
    for a, b, before in zip(mine, theirs, matrices(*SHAPES), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert (a - before).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one_and_singular_vectors_stay(dtype):
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(5, 48, 48, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(5, 96, 48, dtype=torch.float64))
    s = torch.rand(5, 48, dtype=torch.float64) * 0.9 + 0.1  # divided by the norm: from 0.02 to 0.3
    for scale in (1e-6, 1.0, 1e6):
        found = orthogonalize((scale * u * s[:, None] @ v.mT).float(), dtype)
        assert found.dtype == torch.float32
        core = u.mT @ found.double() @ v
        new, margin = core.diagonal(dim1=1, dim2=2), 0.005 if dtype == torch.float32 else 0.05
        assert 0.675 - margin < new.min() and new.max() < 1.135 + margin
        assert (core - torch.diag_embed(new)).abs().max() < margin


@pytest.mark.parametrize("columns", [31, 32, 64, 128])
def test_short_and_long_matrices_take_the_same_iteration_whatever_their_singular_values(columns):
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(1, n, 16, dtype=torch.float64))[0] for n in (16, columns))
    X = u * torch.logspace(0, -7, 16, dtype=torch.float64) @ v.mT
    found, (a, b, c) = orthogonalize(X.float(), torch.float32), optimizer.NEWTON_SCHULZ
    X = X / X.norm()
    for _ in range(optimizer.ITERATIONS):
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    assert (found - X).abs().max() < 5e-4


def test_tf32_resolves_the_small_singular_values_of_long_matrices(monkeypatch):
    """A GPU's, on which the product of the small matrices diverges: what is multiplied keeps 10 bits of mantissa."""

    def rounded(x):
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(1, n, 16))[0] for n in (16, 64))
    X = u * torch.logspace(0, -5, 16) @ v.mT
    exact, bmm, baddbmm = orthogonalize(X, torch.float32), torch.bmm, torch.baddbmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(rounded(a), rounded(b)))
    monkeypatch.setattr(torch, "baddbmm", lambda x, a, b, **factors: baddbmm(x, rounded(a), rounded(b), **factors))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert (orthogonalize(X, torch.float32) - exact).norm() < 0.01 * exact.norm()


def test_a_gradient_of_zero_moves_nothing():
    (p,) = matrices((16, 32))
    p.grad, before = torch.zeros_like(p), p.detach().clone()
    Muon([p], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p, before)


def test_a_matrix_that_is_split_moves_like_its_parts():
    (whole,) = matrices((48, 16))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    split = Muon([{"params": [whole], "split": 3}], lr=0.02, weight_decay=0.1)
    apart = Muon(parts, lr=0.02, weight_decay=0.1)
    for seed in range(3):
        whole.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(seed))
        for part, gradient in zip(parts, whole.grad.chunk(3), strict=True):
            part.grad = gradient
        split.step()
        apart.step()
    assert torch.equal(whole.detach(), torch.cat([part.detach() for part in parts]))


def test_queries_keys_and_values_are_orthogonalized_apart():
    def after_a_step(other_keys):
        torch.manual_seed(0)
        model, config = tiny(), train_gpt2.Config(optimizer="muon", lr=0.02)
        muon, _ = optimizer.make_optimizers(model, config, Distributed(), torch.float32)
        model(*torch.randint(64, (2, 4, 16))).backward()
        weight = model.transformer.h[0].attn.c_attn.weight
        if other_keys:
            weight.grad[32:64] = 100 * weight.grad[32:64].flip(0)
        muon.step()
        return weight.detach().chunk(3)

    (q, k, v), (other_q, other_k, other_v) = after_a_step(False), after_a_step(True)
    assert torch.equal(q, other_q) and torch.equal(v, other_v) and not torch.allclose(k, other_k, atol=1e-3)


class DtypesSeen(TorchDispatchMode):
    """Collects the dtypes of every tensor that an operation within takes or gives."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves([args, kwargs, result])
        self.dtypes |= {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return result


def test_it_multiplies_bfloat16_only_if_the_run_does_and_the_hardware_can(monkeypatch):
    def dtypes_of_a_step(dtype):
        model = tiny(1)
        muon, _ = optimizer.make_optimizers(model, train_gpt2.Config(optimizer="muon"), Distributed(), dtype)
        model(*torch.randint(64, (2, 4, 16))).backward()
        with DtypesSeen() as seen:
            muon.step()
        return torch.bfloat16 in seen.dtypes

    for capable, run, expected in [
        (True, torch.bfloat16, True),
        (True, torch.float32, False),
        (False, torch.bfloat16, False),
        (False, torch.float32, False),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", functools.partial(dict, avx512_bf16=capable))
        assert dtypes_of_a_step(run) is expected, (capable, run)


# -------------------------------------------------------------------------------------------------------------- ranks


def test_two_ranks_train_as_one_and_resume_in_another_mode(dataset, tmp_path):
    """Two ranks of ddp, then two of zero1 from their checkpoint, then one process from that of zero1."""
    constant = {"optimizer": "muon", "lr": 0.01, "min_lr": 0.01, "warmup_steps": 0, "micro_batch": 4, "eval_every": 3}
    out = tmp_path / "several"
    assert train(dataset, tmp_path / "alone", max_steps=9, **constant) == 0
    for mode, steps in (("ddp", 3), ("zero1", 6)):
        for process in ranks(2, [*command(dataset, out, max_steps=steps, **constant), "--parallel", mode]):
            finished(process)
        held = newest_checkpoint(out)[1]
        assert held["step"] == steps and [len(each["state"]) for each in held["optimizers"]] == [8, 20]
    assert train(dataset, out, max_steps=9, **constant) == 0
    for name in ("loss", "grad_norm", "val_loss"):
        assert curve(out, name) == pytest.approx(curve(tmp_path / "alone", name), abs=2e-5), name
    for (name, a), b in zip(weights(out).items(), weights(tmp_path / "alone").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)


# ------------------------------------------------------------------------------------------------ groups and schedule


def test_only_matrices_decay():
    model = tiny()
    decay, rest = optimizer.parameter_groups(model.parameters(), 0.1)
    assert decay["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decay["params"])
    assert rest["weight_decay"] == 0.0 and all(p.dim() == 1 for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_learning_rate_warms_up_from_above_zero_and_ends_at_a_tenth():
    config = train_gpt2.Config(lr=1.0, warmup_steps=10, max_steps=110)
    rates = [optimizer.learning_rate(step, config) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[59] == pytest.approx(0.55)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.1)
    flat = train_gpt2.Config(lr=1.0, min_lr=1.0, warmup_steps=0, max_steps=3)
    assert [optimizer.learning_rate(step, flat) for step in (1, 2, 3)] == [1.0, 1.0, 1.0]


def test_the_linear_schedule_is_flat_after_the_warmup_then_falls_to_the_last_step():
    linear = {"min_lr": 0.0, "schedule": "linear", "decay_fraction": 0.5}
    config = train_gpt2.Config(lr=1.0, warmup_steps=10, max_steps=110, **linear)
    rates = [optimizer.learning_rate(step, config) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.1) and rates[9:55] == [1.0] * 46
    assert rates[82] == pytest.approx(27 / 55) and rates[109] == 0.0
    assert optimizer.mean_learning_rate(config) == pytest.approx(sum(rates) / 110) == pytest.approx(0.70, abs=0.01)
    falls = [a - b for a, b in itertools.pairwise(rates[54:])]
    assert falls == pytest.approx([1 / 55] * 55)
    all_of_it = dataclasses.replace(config, decay_fraction=1.0)  # no flat part: it falls from the end of the warmup on
    assert [optimizer.learning_rate(step, all_of_it) for step in (10, 60, 110)] == pytest.approx([1.0, 0.5, 0.0])


def test_adamw_lr_is_the_rate_of_what_muon_leaves_to_adamw():
    config = train_gpt2.Config(optimizer="muon", lr=0.02, adamw_lr=0.005)
    model = tiny()
    muon, adamw = optimizer.make_optimizers(model, config, Distributed(), torch.float32)
    assert {group["lr_ratio"] for group in muon.param_groups} == {1.0}
    assert {group["lr_ratio"] for group in adamw.param_groups} == {0.25}
    config = dataclasses.replace(config, optimizer="adamw")
    (alone,) = optimizer.make_optimizers(model, config, Distributed(), torch.float32)
    assert {group["lr_ratio"] for group in alone.param_groups} == {1.0}


def test_zero_init_makes_every_block_the_identity():
    model = tiny()
    x = torch.randn(1, 5, 32)
    assert not model.transformer.h[0](x, None, None)[0].eq(0).all()
    model.zero_projections()
    for block in model.transformer.h:
        branch, residual = block(x, None, None)
        assert branch.eq(0).all() and torch.equal(residual, x)


def test_the_average_of_the_weights_is_plain_at_first_and_then_exponential():
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    found = []
    for step, weight in enumerate((1.0, 3.0, 5.0, 9.0, 9.0), start=1):
        model.weight.data.fill_(weight)
        optimizer.update_average(average, model, step, horizon=3)
        found.append(average.weight.item())
    assert found == pytest.approx([1, 2, 3, 5, 19 / 3])


def test_ema_changes_what_is_validated_and_saved_and_not_the_training(dataset, tmp_path, capsys):
    options = {"max_steps": 4, "checkpoint_every": 4, "eval_every": 1, "sample_every": 0, "min_lr": 2e-3}
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    assert train(dataset, plain, **options) == train(dataset, averaged, ema=3, **options) == 0
    assert curve(plain) == curve(averaged)
    same = [curve(plain, "val_loss")[step] == loss for step, loss in curve(averaged, "val_loss").items()]
    assert same == [True, False, False, False]
    path, end = newest_checkpoint(averaged)
    for name, trained in weights(plain).items():
        assert torch.equal(trained, end["training"][name]) and not torch.equal(trained, end["model"][name])
    end["model"]["transformer.wte.weight"] = end["model"]["transformer.wte.weight"][:, 1:].clone()
    save_checkpoint(path, end)
    assert train(dataset, averaged, ema=3, **options | {"max_steps": 5}) == 2
    assert "is not a checkpoint of this model" in capsys.readouterr().err
