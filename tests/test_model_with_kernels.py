"""The model on real text with Triton kernels in place of PyTorch's operations: any of them, all of them, compiled."""

import functools
import itertools

import pytest
import torch

import kernels
import model as gpt
from data import pydocs, shards
from data.loader import Loader
from training.optimizer import parameter_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = list(kernels.FAMILIES)
SUBSETS = [",".join(s) or "none" for n in range(5) for s in itertools.combinations(FAMILIES, n)]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pydocs")
    pydocs.prepare(folder)
    return shards.open_split(folder, "train")


def tiny(split, names):
    torch.manual_seed(0)
    config = gpt.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=split.vocab_size)
    return gpt.GPT(config, kernels.select(names, DEVICE)).to(DEVICE)


@pytest.fixture(scope="module")
def losses(split):
    """A function: the loss of each of twenty float32 steps on real text with the named families in Triton."""

    @functools.cache
    def train(names, _repetition=""):
        model, loader = tiny(split, names), Loader(split, 8, 1, seed=1, device=DEVICE)
        optimizer = torch.optim.AdamW(parameter_groups(model.parameters(), 0.1), lr=1e-2)
        curve = []
        for step in range(20):
            loss = model(*loader.batch(step % 5))  # five sequences again and again, so that it learns in twenty steps
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        return curve

    return train


@pytest.mark.parametrize("names", ["all", *FAMILIES])
def test_twenty_steps_follow_those_of_pytorch(losses, names):
    expected = losses("none")
    assert expected[-1] < expected[0] - 0.5  # it learns
    assert losses(names) == pytest.approx(expected, abs=1e-3)
    assert losses(names) != expected  # and it is not PyTorch that was run


def test_twenty_steps_with_kernels_give_the_same_bits_again(losses):
    assert losses("all", "again") == losses("all")


@pytest.mark.parametrize("names", SUBSETS)
def test_every_subset_of_the_families_trains(split, names):
    reference, model = tiny(split, "none"), tiny(split, names)
    inputs, targets = Loader(split, 5, 1, seed=1, device=DEVICE).batch(0)
    expected = reference(inputs, targets)
    loss = model(inputs, targets)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("names", SUBSETS)
def test_the_model_compiles_into_one_graph_with_kernels(split, names):
    torch._dynamo.reset()
    model = tiny(split, names)
    inputs, targets = Loader(split, 8, 1, seed=1, device=DEVICE).batch(0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(inputs, targets)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = model(inputs, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
