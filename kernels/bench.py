"""
Kernels on and off, timed, on the GPU at hand.

    python -m kernels.bench                            every operation: Triton, PyTorch, torch.compile of PyTorch
    python -m kernels.bench --train --steps 50         a training run for every useful choice of --kernels
    python -m kernels.bench --device cpu               PyTorch alone, at the shapes of the laptop preset
    python -m kernels.bench --train -- --data FOLDER   what follows -- goes to train_gpt2.py

Operations: forward and backward are timed apart, with CUDA events, on copies of the arguments that together are four
times the L2 cache, so that no run finds its data there; the median counts. GB/s and TFLOP/s are the bytes and FLOPs
that the operation needs at least, counted by kernels.report, over both directions; the share is that of the roofline's
least time. liger-kernel and flash-attn are timed too where they are installed.

Training: each run is train_gpt2.py in a process of its own, read from its log.jsonl: the median of the steps after the
first ten, or after half of them.

On a CPU, Triton's kernels run only in the interpreter (TRITON_INTERPRET=1), at a tiny shape: that shows that they run;
its time is no speed.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import kernels
from kernels.report import __main__ as report
from kernels.report import roofline
from kernels.report.shapes import PRESETS, Shape, arguments, calls_per_step, parse_shape
from training.devices import choose_device, choose_dtype, named_gpu, out_of_memory

OTHERS = ("liger", "flash-attn")
TINY = Shape(B=1, T=16, C=32, H=1, L=1, V=60)  # for the interpreter


# --------------------------------------------------------------------------- operations


def versions(operation: str, compiled: bool, triton: bool) -> dict:
    """The functions to compare, by name: ours, PyTorch's, compiled PyTorch, and others' where they are installed."""
    stock = getattr(kernels.select("none"), operation)
    found = {"triton": getattr(kernels.select("all", "cuda"), operation)} if triton else {}
    found["torch"] = stock
    if compiled:
        found["torch.compile"] = torch.compile(stock, fullgraph=True)
    for name, package, offered in (("liger", "liger_kernel", liger), ("flash-attn", "flash_attn", flash)):
        if triton and importlib.util.find_spec(package):
            try:
                theirs = offered()
            except ImportError as error:  # built for another PyTorch, most often
                print(f"{package} is left out, it cannot be imported: {first_line(error)}", file=sys.stderr)
                continue
            if operation in theirs:
                found[name] = theirs[operation]
    return found


def flash() -> dict:
    """The operation that flash-attn has. Its function takes (B, T, 3, heads, D) in float16 or bfloat16."""
    from flash_attn import flash_attn_qkvpacked_func

    def causal_attention(qkv, n_head, dropout_p):
        B, T, width = qkv.shape
        packed = qkv.view(B, T, 3, n_head, width // 3 // n_head)
        return flash_attn_qkvpacked_func(packed, dropout_p, causal=True).reshape(B, T, width // 3)

    return {"causal_attention": causal_attention}


def liger() -> dict:
    """The operations that liger-kernel has, called by position as all its versions allow."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def layer_norm(x, weight, bias, eps):
        return LigerLayerNormFunction.apply(x, weight, bias, eps)

    def add_layer_norm(x, residual, weight, bias, eps):
        residual = residual + x
        return LigerLayerNormFunction.apply(residual, weight, bias, eps), residual

    def linear_cross_entropy(x, weight, targets, vocab_size):
        loss = LigerFusedLinearCrossEntropyFunction.apply(x, weight[:vocab_size].to(x.dtype), targets)
        return loss[0] if isinstance(loss, tuple) else loss  # with the z loss and more behind it, or alone

    return {f.__name__: f for f in (layer_norm, add_layer_norm, linear_cross_entropy)}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:100]


def time_operation(
    function, operation: str, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict:
    """Median milliseconds of forward, backward and both, of one version of an operation."""
    first, differentiable = arguments(operation, shape, dtype, str(device))
    copies = [first]
    if device.type == "cuda":
        size = sum(a.numel() * a.element_size() for a in first if isinstance(a, torch.Tensor))
        copies_needed = 4 * torch.cuda.get_device_properties(device).L2_cache_size // size
        copies += [arguments(operation, shape, dtype, str(device))[0] for _ in range(copies_needed)]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    runs = []
    for repeat in range(-3, repeats):  # the first three compile and warm up
        given = copies[repeat % len(copies)]
        marks = [mark(device)]
        with autocast:
            outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [output for output, wanted in zip(outputs, differentiable, strict=True) if wanted]
        if repeat == -3:
            upstream = [torch.ones_like(output) for output in outputs]
        marks.append(mark(device))
        leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
        torch.autograd.grad(outputs, leaves, upstream)
        marks.append(mark(device))
        if repeat >= 0:
            runs.append(marks)
    # read at the end: to wait for the GPU after every run would let its next launch be part of the time
    times = [(between(a, b), between(b, c), between(a, c)) for a, b, c in runs]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return dict(zip(("forward_ms", "backward_ms", "both_ms"), medians, strict=True))


def mark(device: torch.device):
    """A point in time: an event on the GPU, the clock on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    """Milliseconds from one mark to another."""
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def needed(operation: str, shape: Shape, counted: list[dict], gpu) -> dict | None:
    """Bytes, FLOPs and least milliseconds of both directions, matrix products with weights included."""
    own = [kernel for kernel in counted if kernel["operation"] == operation]
    if not own:
        return None
    width = {"linear_gelu": 4 * shape.C, "linear_cross_entropy": shape.W}.get(operation, 0)
    flops = 3 * 2 * shape.N * shape.C * width
    moved = 3 * 2 * (shape.N * (shape.C + width) + shape.C * width) * bool(width)
    seconds = roofline.least_seconds(moved, flops, gpu)[0] if gpu else 0.0
    seconds += sum(roofline.kernel_seconds(kernel, gpu)[0] for kernel in own) if gpu else 0.0
    flops += sum(kernel["flops"] for kernel in own)
    return {"bytes": moved + sum(k["touched"] for k in own), "flops": flops, "least_ms": 1e3 * seconds}


def time_operations(chosen: argparse.Namespace, device: torch.device, shape: Shape) -> list[dict]:
    """A row for every version of every operation."""
    on_gpu = device.type == "cuda"
    interpreted = not on_gpu and os.environ.get("TRITON_INTERPRET") == "1"
    dtype = choose_dtype("auto", device)
    gpu = named_gpu(torch.cuda.get_device_name(device)) if on_gpu else None
    counted = []
    if on_gpu:  # counted in another process, on a CPU, as launched here
        here = kernels.architecture(torch.empty(0, device=device))
        counted = report.count(shape, [here])[here]
    rows = []
    for operation in calls_per_step(shape):
        least = needed(operation, shape, counted, gpu)
        for version, function in versions(operation, chosen.compile, triton=on_gpu).items():
            row = {"operation": operation, "version": version}
            try:
                row |= time_operation(function, operation, shape, device, dtype, chosen.repeats)
            except Exception as error:  # the table goes on without another package, whatever it raises
                if not out_of_memory(error) and version not in OTHERS:
                    raise
                row["version"] += ": out of memory" if out_of_memory(error) else f": {first_line(error)}"
            if least and "both_ms" in row:
                row |= {
                    "gb_per_s": least["bytes"] / row["both_ms"] / 1e6,
                    "tflops": least["flops"] / row["both_ms"] / 1e9,
                }
                row["share"] = least["least_ms"] / row["both_ms"] if gpu else None
            rows.append(row)
        if interpreted:
            function = getattr(kernels.select("all"), operation)
            with np.errstate(all="ignore"):
                times = time_operation(function, operation, TINY, device, torch.float32, repeats=1)
            rows.append({"operation": operation, "version": "triton, interpreted, tiny: not a speed", **times})
        torch._dynamo.reset()
    return rows


# --------------------------------------------------------------------------- training


def useful_choices(triton: bool) -> list[str]:
    """Values of --kernels worth a run: all, none, each family alone, each left out."""
    if not triton:
        return ["none"]
    families = list(kernels.FAMILIES)
    return ["all", "none", *families, *(",".join(f for f in families if f != left) for left in families)]


PEAK = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    if stop.code:
        raise
finally:
    import torch
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    elif os.name == "posix":
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = 0
    print("peak bytes", peak)
"""


def train(choice: str, compiled: bool, chosen: argparse.Namespace, device: torch.device, folder: Path) -> dict:
    """One run of train_gpt2.py. Returns its choice, tokens_per_s, mfu, peak_gb and the loss of its last step."""
    script = Path(__file__).parents[1] / "train_gpt2.py"
    command = [sys.executable, "-c", PEAK, str(script), chosen.preset, "--kernels", choice, "--out-dir", str(folder)]
    command += ["--max-steps", str(chosen.steps), "--compile" if compiled else "--no-compile", "--device", str(device)]
    command += ["--resume", "never", "--eval-every", "0", "--sample-every", "0", "--hellaswag-every", "0"]
    command += ["--eval-tokens", "65536", *chosen.train_options]  # a validation at the end there always is
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        said = next((line for line in lines if line.startswith("error:")), lines[-1])
        raise ValueError(f"train_gpt2.py {chosen.preset} --kernels {choice} stopped: {said.removeprefix('error: ')}")
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "tokens_per_s" in record]
    settled = steps[min(10, len(steps) // 2) :]
    mfu = [record["mfu"] for record in settled if record["mfu"] is not None]
    return {
        "kernels": choice,
        "compile": compiled,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in settled),
        "mfu": statistics.median(mfu) if mfu else None,
        "peak_gb": int(done.stdout.split()[-1]) / 1e9,
        "last_loss": steps[-1]["loss"],
    }


def time_training(chosen: argparse.Namespace, device: torch.device) -> list[dict]:
    rows = []
    for compiled in (False, True) if chosen.compile else (False,):
        for choice in useful_choices(triton=device.type == "cuda"):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(train(choice, compiled, chosen, device, Path(folder, "run")))
    return rows


# --------------------------------------------------------------------------- output


def shown(name: str, value: object) -> str:
    """A figure as words: a share in percent, a number by its size, nothing where there is none."""
    if value is None:
        return ""
    if name in ("share", "mfu"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
    return str(value)


def plot(rows: list[dict], path: str, title: str) -> None:
    """Bars: milliseconds of both directions of every version, or tokens a second of every choice of kernels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    training = "tokens_per_s" in rows[0]
    rows = [row for row in rows if "not a speed" not in row.get("version", "") and (training or "both_ms" in row)]
    if training:
        labels = [f"{row['kernels']}{', compiled' if row['compile'] else ''}" for row in rows]
        values = [row["tokens_per_s"] for row in rows]
    else:
        labels = [f"{row['operation']}: {row['version']}" for row in rows]
        values = [row["both_ms"] for row in rows]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.3 * len(rows)))
    bars = axes.barh(labels, values, color=["tab:orange" if "triton" in label else "tab:blue" for label in labels])
    axes.bar_label(bars, fmt="{:,.0f}" if training else "{:,.2f}", padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="tokens a second" if training else "milliseconds, forward and backward")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


# --------------------------------------------------------------------------- command line


def options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Kernels on and off, timed.")
    parser.error = lambda message: report.fail(f"{message} (--help shows every option)")
    parser.add_argument("--train", action="store_true", help="time training runs instead of single operations")
    parser.add_argument("--preset", help=f"of {', '.join(PRESETS)}; gpt2-124m on a GPU, laptop on a CPU when not given")
    parser.add_argument(
        "--shape", nargs="+", default=[], metavar="T=2048", help="sizes other than the preset's: B T C H L V"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile too; so on a GPU when not given"
    )
    parser.add_argument("--repeats", type=int, default=50, help="timed runs of an operation")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a training run")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw a bar for every row there")
    parser.add_argument("train_options", nargs="*", metavar="-- OPTIONS", help="for train_gpt2.py, behind --train")
    chosen = parser.parse_args(words)
    for name in ("repeats", "steps"):
        if getattr(chosen, name) < 1:
            raise ValueError(f"--{name} is {getattr(chosen, name)}, but must be at least 1")
    return chosen


def run(words: list[str] | None) -> None:
    chosen = options(words)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no GPU here to time: python -m kernels.report needs none, --device cpu times PyTorch alone")
    device = choose_device(chosen.device)
    on_gpu = device.type == "cuda"
    chosen.preset = chosen.preset or ("gpt2-124m" if on_gpu else "laptop")
    chosen.compile = on_gpu if chosen.compile is None else chosen.compile
    shape = parse_shape(chosen.preset, chosen.shape)
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    if chosen.train:
        rows, title = time_training(chosen, device), f"{chosen.preset}, {chosen.steps} steps on {name}"
    else:
        rows = time_operations(chosen, device, shape)
        sizes = " ".join(f"{letter}={number}" for letter, number in dataclasses.asdict(shape).items())
        title = f"{chosen.preset} on {name}: {sizes}"
    header = list(max(rows, key=len))
    print(report.table(title, header, [[shown(name, row.get(name)) for name in header] for row in rows]))
    if chosen.json:
        everything = {"device": name, "preset": chosen.preset, "shape": dataclasses.asdict(shape), "rows": rows}
        Path(chosen.json).write_text(json.dumps(everything, indent=1), encoding="utf-8")
    if chosen.plot:
        plot(rows, chosen.plot, title)


def main(words: list[str] | None = None) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        try:
            run(words)
        except ValueError as error:
            report.fail(str(error))
        except OSError as error:
            report.fail(f"{error.strerror}: {error.filename}")


if __name__ == "__main__":
    main()
