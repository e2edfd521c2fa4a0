"""The hardware that a run takes: its device, dtype and peak, and the micro-batch that its memory holds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from data.files import UserError
from kernels.gpus import named_gpu
from training import devices
from training.distributed import Distributed

PEAKS = {"A100-SXM4-80GB": 312e12, "A10G": 70e12, "H100 PCIe": 756e12, "H100 80GB HBM3": 989e12, "L40S": 362e12}


@pytest.mark.parametrize("name, peak", PEAKS.items())
def test_the_peak_of_a_gpu_is_found_by_its_name(name, peak):
    assert named_gpu(f"NVIDIA {name}").flops == peak and named_gpu("NVIDIA GeForce GT 710") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--device cuda:0 cannot be used: .*--device auto"):
        devices.choose_device("cuda")


def test_one_gpu_for_all_ranks_is_refused():
    with pytest.raises(UserError, match="--device cuda:1 would put every rank on one GPU: use --device cuda"):
        devices.choose_device("cuda:1", Distributed(rank=1, local_rank=1, world_size=2))


def refusing(above, error):
    """An attempt that raises `error` above a size, and the list of what was tried."""
    tried = []

    def attempt(n):
        tried.append(n)
        if n > above:
            raise error

    return attempt, tried


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), ValueError("98,304 heads are more than 65,535")]
)
def test_a_refused_micro_batch_leads_to_the_next_one(error):
    attempt, tried = refusing(3, error)
    assert devices.largest_that_fits([12, 6, 4, 3, 2, 1], attempt) == 3 and tried == [12, 6, 4, 3]


def test_if_no_micro_batch_runs_memory_is_0_and_any_other_reason_is_raised():
    assert devices.largest_that_fits([8, 4], refusing(0, torch.OutOfMemoryError("out of memory"))[0]) == 0
    with pytest.raises(RuntimeError, match="a bug"):
        devices.largest_that_fits([8, 4], refusing(0, RuntimeError("a bug"))[0])


def test_the_peak_memory_of_a_cpu_is_that_of_the_process():
    before = devices.peak_memory(torch.device("cpu"))
    held = torch.ones(50_000_000)  # 200 MB
    assert devices.peak_memory(torch.device("cpu")) >= max(before, 4 * held.numel()) > 50_000_000


def test_a_compiled_model_has_the_gradient_of_the_code_as_it_is_now_not_that_of_a_cached_graph(tmp_path):
    (tmp_path / "kernels").mkdir()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        shutil.copyfile(path, tmp_path / "kernels" / path.name)  # not its mode: a checkout may be read-only
    code = """
import os, sys, torch._inductor.compile_fx  # once for both
from pathlib import Path

def gradient():
    "In a process of its own: that of GELU's input."
    from kernels.gelu import linear_gelu
    from training.devices import compiled
    model = torch.nn.Linear(4, 8)
    model.forward = lambda x: linear_gelu(x, model.weight.detach(), model.bias.detach())
    x = torch.ones(1, 4, requires_grad=True)
    torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
    y = compiled(model)(x)
    print(torch.autograd.grad(y, x, torch.ones_like(y))[0][0, 0].item(), flush=True)

file = Path(sys.path[1], "kernels", "gelu.py")
for replaced in ("dy.contiguous()", "2 * dy.contiguous()"):
    file.write_text(file.read_text().replace("dy.contiguous()", replaced))
    if os.fork() == 0:
        gradient()
        os._exit(0)
    os.wait()
"""
    (tmp_path / "site").symlink_to(Path(torch.__file__).parents[1])  # inductor's linker takes no path with a space
    paths = os.pathsep.join([str(tmp_path), str(tmp_path / "site"), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.count("\n") == 2, done.stderr
    first, second = map(float, done.stdout.split())
    assert second == 2 * first != 0, done.stderr
