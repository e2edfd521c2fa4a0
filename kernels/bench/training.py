"""
Time training runs: each is train_gpt2.py in a process of its own, on a small dataset made for the purpose.

Figures are medians over the steps of its log.jsonl after the first ten, or after the first half.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import kernels

ROOT = Path(__file__).parents[2]
AFTER_SETUP = """
import runpy, sys
{setup}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def useful_choices(triton: bool) -> list[str]:
    """Return the values of --kernels worth a run: all, none, each family alone, each left out."""
    if not triton:
        return ["none"]
    families = list(kernels.FAMILIES)
    return ["all", "none", *families, *(",".join(f for f in families if f != left) for left in families)]


def run(*words: str) -> None:
    """Run Python with these words, in a process that finds this repository. Raise ValueError with its last words."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if line.startswith("error:")), lines[-1]).removeprefix("error: ")
        raise ValueError(reason)


@contextlib.contextmanager
def small_dataset(preset: str, rest: list[str]) -> Iterator[list[str]]:
    """Make a dataset of a few hundred KB, with the preset's tokenizer, for the time of the runs; yield its options."""
    if any(word.partition("=")[0] == "--data" for word in rest):
        yield []
        return
    tokenizer = "gpt2" if preset.startswith("gpt2") else "char"
    with tempfile.TemporaryDirectory() as folder:
        run("-m", "data.pydocs", "--out", folder, "--tokenizer", tokenizer)
        yield ["--data", folder]


def train(preset: str, options: list[str], steps: int, device: str, setup: str = "") -> dict:
    """
    Run train_gpt2.py once, after the Python code `setup`. Return tokens_per_s, mfu, peak_gb, loss of the last step.

    Raise ValueError with its message if it stops.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [str(ROOT / "train_gpt2.py"), preset, "--out-dir", str(out)]
        command += ["--max-steps", str(steps), "--device", device, "--eval-tokens", "8192"]  # it ends with a validation
        command += ["--resume", "never", "--eval-every", "0", "--sample-tokens", "0", "--hellaswag-every", "0"]
        try:
            run(*(["-c", AFTER_SETUP.format(setup=setup)] if setup else []), *command, *options)
        except ValueError as error:
            raise ValueError(f"train_gpt2.py {preset} {' '.join(options)} stopped: {error}") from None
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "tokens_per_s" in record]
    settled = records[min(10, len(records) // 2) :]
    mfu = [record["mfu"] for record in settled if record["mfu"] is not None]
    return {
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in settled),
        "mfu": statistics.median(mfu) if mfu else None,
        "peak_gb": max(record["memory_gb"] or 0.0 for record in records),
        "last_loss": records[-1]["loss"],
    }


def time_training(preset: str, steps: int, compiled: bool, rest: list[str], device: str) -> list[dict]:
    """Return a row per training run: every useful choice of kernels, eager and, if wanted, compiled."""
    rows = []
    with small_dataset(preset, rest) as data:
        for each in (False, True) if compiled else (False,):
            for choice in useful_choices(triton=device.startswith("cuda")):
                options = ["--kernels", choice, "--compile" if each else "--no-compile", *data, *rest]
                rows.append({"kernels": choice, "compile": each, **train(preset, options, steps, device)})
    return rows
