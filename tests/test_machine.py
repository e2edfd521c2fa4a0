"""What the machine must have: a compiler, Python.h, a driver; each lack is one sentence before anything is done."""

import os
import subprocess
import sys

import pytest
import torch
from runs import SCRIPT

import kernels
from data.files import UserError
from kernels import common, machine
from train_gpt2 import Config
from training import devices
from training.distributed import Distributed

linux = pytest.mark.skipif(sys.platform != "linux", reason="checked on Linux")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
NO_COMPILER = "Triton needs a C compiler, and gcc or clang is not in PATH"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without a compiler and without Python.h: a folder for each."""
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
    common._missing_for_triton.cache_clear()
    yield tmp_path
    common._missing_for_triton.cache_clear()


@linux
def test_a_c_compiler_and_python_h_are_missed_one_after_the_other(bare, monkeypatch):
    assert machine.missing_for_triton().startswith(NO_COMPILER)
    monkeypatch.setenv("CC", "/no/such/cc")
    assert "/no/such/cc is not in PATH" in machine.missing_for_triton()
    monkeypatch.delenv("CC")
    (bare / "bin/clang").touch(mode=0o755)
    assert machine.missing_for_triton().startswith(f"Triton needs Python.h, and {bare}/include lacks it")
    (bare / "Python.h").touch()
    monkeypatch.setenv("CPATH", f"/elsewhere:{bare}")
    assert machine.missing_for_triton() == ""


@linux
def test_without_a_compiler_a_gpu_gets_pytorch_or_an_error_never_a_failing_launch(bare, monkeypatch):
    monkeypatch.setattr(common.triton.knobs.runtime, "interpret", False)
    said = []
    ops = kernels.select("auto", "cuda", say=said.append)
    assert ops == kernels.select("none") and len(said) == 1 and NO_COMPILER in said[0]
    with pytest.raises(ValueError, match=f"--kernels all asks for Triton kernels, but {NO_COMPILER}"):
        kernels.select("all", "cuda")
    with pytest.raises(UserError, match=f"--compile on a GPU is done by Triton, but {NO_COMPILER}"):
        devices.check_machine(Config(), torch.device("cuda"), Distributed())
    devices.check_machine(Config(compile=False), torch.device("cuda"), Distributed())


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with one GPU that PyTorch, as if built for CUDA 13.0, does not find. Yields a function: its driver."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(version):
        folder = tmp_path / "proc/driver/nvidia"
        folder.mkdir(parents=True, exist_ok=True)
        line = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sat Sep 23 10:55:16 UTC 2023\n"
        (folder / "version").write_text(line, encoding="utf-8")

    return install


@no_gpu
def test_a_gpu_that_pytorch_does_not_find_is_an_error_that_names_the_driver(system, monkeypatch):
    assert "(driver unknown)" in machine.unseen_gpu()
    system("535.161.08")
    needed = "is built for CUDA 13.0 and needs NVIDIA's driver 580 or newer, but this machine has 535.161.08"
    with pytest.raises(UserError, match=f"{needed}.*--device cpu"):
        devices.choose_device("auto")
    assert devices.choose_device("cpu").type == "cpu"  # the way to mean it
    system("580.65.06")
    assert "cannot use this machine's GPU (driver 580.65.06)" in machine.unseen_gpu()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert devices.choose_device("auto").type in ("cpu", "mps")


@no_gpu
def test_ranks_that_find_no_gpu_for_a_gpt2_say_so_before_data_is_prepared():
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    started = [sys.executable, SCRIPT, "gpt2-124m"]
    done = subprocess.run(started, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: torchrun started 8 processes, but PyTorch finds no GPU: ")
    two = Distributed(world_size=2)
    for config in (Config(device="cpu"), Config(n_embd=96)):  # the way to mean it, and a model that is meant for CPUs
        devices.check_machine(config, torch.device("cpu"), two)
