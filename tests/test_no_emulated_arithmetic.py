"""A run in float32 computes in float32 everywhere: a CPU that only emulates bfloat16 is ten times slower with it."""

import pytest
import torch
from runs import command
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train_gpt2

HALF = (torch.bfloat16, torch.float16)


class RefuseHalf(TorchDispatchMode):
    """Raise AssertionError at the first operation with a bfloat16 or float16 tensor; count the others."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves([args, kwargs, result]) if isinstance(leaf, torch.Tensor)]
        assert not any(t.dtype in HALF for t in tensors), f"{func} computes in half precision"
        self.operations.add(func.overloadpacket.__name__)
        return result


def run(preset, dataset, out, *flags, **options):
    """Run the command line of a tiny run of a preset in this process. Return the names of its operations."""
    arguments = [preset, *command(dataset, out, "--no-compile", *flags, **options)[1:]]
    with RefuseHalf() as seen, pytest.raises(SystemExit) as end:
        train_gpt2.main(arguments)
    assert end.value.code == 0
    return seen.operations


@pytest.mark.parametrize("preset", ["laptop", "shakespeare-char"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_evaluation_diagnostics_and_samples(dataset, tmp_path, preset, optimizer):
    due = {"max_steps": 2, "eval_every": 1, "sample_every": 1, "diagnose": 1}
    operations = run(preset, dataset, tmp_path / "run", optimizer=optimizer, **due)
    assert {"embedding", "_fused_adamw_"} <= operations and ("baddbmm" in operations) == (optimizer == "muon")
    with RefuseHalf() as seen:
        sample.main([str(tmp_path / "run"), "--max-new-tokens", "3", "--device", "cpu"])
    assert "mm" in seen.operations


def test_the_learning_rate_finder(dataset, tmp_path):
    run("laptop", dataset, tmp_path / "run", "--find-lr")
    assert (tmp_path / "run" / "find_lr.png").exists()


@pytest.mark.parametrize("dtype", HALF)
def test_it_notices_half_precision(dtype):
    with RefuseHalf(), pytest.raises(AssertionError, match="half precision"):
        torch.ones(2, 2).to(dtype)


def test_it_notices_an_optimizer_that_converts():
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.eye(4)
    with RefuseHalf(), pytest.raises(AssertionError, match="half precision"):
        torch.optim.Muon([p]).step()
