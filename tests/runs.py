"""Tiny runs for tests: their command lines, in this process and in others, and what they left."""

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import model as gpt
import train_gpt2
from training.checkpoint import newest_checkpoint
from training.run import Run, read_log

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SCRIPT = str(ROOT / "train_gpt2.py")
# fmt: off
TINY = {  # on the CPU also if there is a GPU: the same bits everywhere, and any number of ranks
    "n-layer": 2, "n-head": 2, "n-embd": 32, "block-size": 32, "batch-tokens": 256, "micro-batch": 8, "max-steps": 12,
    "warmup-steps": 3, "eval-every": 5, "eval-tokens": 640, "sample-every": 6, "sample-tokens": 20,
    "checkpoint-every": 100,  # and at the end; each also draws loss.png, which takes longer than these steps
    "device": "cpu", "dtype": "float32",
    "lr": 4e-3, "adamw-lr": None, "min-lr": None, "schedule": "cosine", "weight-decay": 0.3,
}
# fmt: on


def command(dataset, out_dir, *flags, **options):
    """The arguments of a tiny run; options replace those of TINY."""
    options = {"data": dataset, "out-dir": out_dir} | TINY | {k.replace("_", "-"): v for k, v in options.items()}
    options["warmup-steps"] = min(options["warmup-steps"], options["max-steps"])
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["laptop", "--no-zero-init", *flags, *words]


def train(*args, **options) -> int:
    """Run it in this process; the exit status."""
    with pytest.raises(SystemExit) as end:
        train_gpt2.main(command(*args, **options))
    return end.value.code


def start(arguments, **options) -> subprocess.Popen:
    """Run it as a process of its own."""
    script = [sys.executable, str(ROOT / "train_gpt2.py"), *arguments]
    return subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def limit_files(size: int):
    """Return a preexec_fn: no file of the process can grow above `size` bytes, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def torchrun(processes: int, arguments: list[str], script: str = SCRIPT, options: tuple[str, ...] = (), **popen):
    launch = [*TORCHRUN, f"--nproc_per_node={processes}", *options, script, *arguments]
    return subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def ranks(processes: int, arguments: list[str], script: str = SCRIPT) -> list[subprocess.Popen]:
    """Start the ranks of a run without torchrun, whose own start takes seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    command, pipes = [sys.executable, script, *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    places = [os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [subprocess.Popen(command, env=place, text=True, **pipes) for place in places]


def finished(process: subprocess.Popen) -> str:
    """Its stderr, once it has ended well."""
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return errors


def wait_for_step(process, out_dir, step) -> None:
    """Until log.jsonl has reached the step."""
    deadline = time.monotonic() + 240
    while not (out_dir / "log.jsonl").exists() or (out_dir / "log.jsonl").read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def curve(out_dir, name="loss"):
    return {record["step"]: record[name] for record in read_log(out_dir) if name in record}


def weights(out_dir):
    return newest_checkpoint(out_dir)[1]["model"]


def assert_same_run(one, other):
    """Bit for bit: every loss, gradient norm and validation loss, and every final weight."""
    for name in ("loss", "grad_norm", "val_loss", "lr", "tokens"):
        assert curve(one, name) == curve(other, name), name
    for (name, a), b in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.equal(a, b), name


def random_model(vocab_size, seed=0, n_embd=16, **shape):
    """A small GPT whose weights are large enough that it says different things."""
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 4, "block_size": 24} | shape
    model = gpt.GPT(gpt.GPTConfig(n_embd=n_embd, vocab_size=vocab_size, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def save_run(folder, model, tokenizer, **config) -> str:
    """A run's folder, as train_gpt2.py leaves it, whose only checkpoint holds this model."""
    checkpoint = {"step": 1, "model": model.state_dict(), "config": vars(model.config), "tokenizer": tokenizer.spec()}
    with Run(folder, {"max_steps": 1} | config, 0, {}) as run:
        run.save(checkpoint | {"optimizers": [], "run": {}, "micro_batch": 1}, keep=1)
    return str(folder)
