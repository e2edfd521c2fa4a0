"""The model on real text with Triton kernels in place of PyTorch's operations: any of them, all of them, compiled."""

import functools
import itertools

import pytest
import torch

import kernels
import model as gpt
from data import pydocs, shards

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
    """A function: the loss of each of fifty float32 steps on real text with the named families in Triton."""

    @functools.cache
    def train(names, _repetition=0):
        model, loader = tiny(split, names), shards.Loader(split, 8, 1, seed=1, device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
        curve = []
        for step in range(50):
            loss = model(*loader.batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        return curve

    return train


@pytest.mark.parametrize("names", ["all", *FAMILIES])
def test_fifty_steps_follow_those_of_pytorch(losses, names):
    expected = losses("none")
    assert expected[-1] < expected[0] - 0.5  # it learns
    assert losses(names) == pytest.approx(expected, abs=1e-3)
    assert losses(names) != expected  # and it is not PyTorch that was run


def test_fifty_steps_with_kernels_give_the_same_bits_again(losses):
    assert losses("all", 1) == losses("all", 0)


@pytest.mark.parametrize("names", SUBSETS)
def test_every_subset_of_the_families_trains(split, names):
    reference, model = tiny(split, "none"), tiny(split, names)
    inputs, targets = shards.Loader(split, 5, 1, seed=1, device=DEVICE).batch(0)
    expected = reference(inputs, targets)
    loss = model(inputs, targets)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("names", ["all", *FAMILIES])
def test_the_model_compiles_into_one_graph_with_kernels(split, names):
    torch._dynamo.reset()
    model = tiny(split, names)
    inputs, targets = shards.Loader(split, 8, 1, seed=1, device=DEVICE).batch(0)
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


def kept_for_backward(names: str) -> int:
    """Bytes that one block keeps for its backward under bfloat16 autocast, weights aside."""
    config = gpt.GPTConfig(n_layer=1, n_head=4, n_embd=256, block_size=128)
    block = gpt.Block(config, kernels.select(names, DEVICE)).to(DEVICE)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    x = torch.randn(2, 128, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(2, 128, 256, device=DEVICE, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(DEVICE, torch.bfloat16),
    ):
        block(x, residual, None)
    activations = (t for address, t in kept.items() if address not in weights and t.shape[-2:] not in WEIGHT_SHAPES)
    return sum(tensor.untyped_storage().nbytes() for tensor in activations)


WEIGHT_SHAPES = {(768, 256), (256, 768), (256, 256), (1024, 256), (256, 1024)}  # weights as autocast casts them


def test_a_block_keeps_at_most_three_quarters_of_what_it_keeps_with_pytorch():
    assert kept_for_backward("all") <= 0.75 * kept_for_backward("none")
