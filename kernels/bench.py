"""
Time the kernels on and off, on the GPU at hand.

    python -m kernels.bench                            every operation: Triton, PyTorch, torch.compile of PyTorch
    python -m kernels.bench --train --steps 50         a training run per useful choice of --kernels
    python -m kernels.bench --device cpu               PyTorch alone, at the shapes of the laptop preset
    python -m kernels.bench --train -- --data FOLDER   what follows -- goes to train_gpt2.py

Operations: the median time of forward and of backward, by CUDA events, on copies of the arguments that together exceed
four times the L2 cache, so that no run finds its data cached. GB/s and TFLOP/s are the compulsory bytes and the FLOPs,
as kernels.report counts them, over the time of both directions; roofline is the fraction of the roofline's speed.
liger-kernel and flash-attn are timed too if they are installed.

Training: each run is train_gpt2.py in its own process; figures are medians over the steps of its log.jsonl after the
first ten, or after the first half.

On a CPU, Triton's kernels run only in the interpreter (TRITON_INTERPRET=1), at a tiny shape: proof that they run, not a
speed.
"""

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
import tyro

import kernels
from kernels.common import architecture
from kernels.gpus import GPU, named_gpu
from kernels.report import __main__ as report
from kernels.report import roofline
from kernels.report.shapes import Shape, arguments, calls_per_step, parse_shape

OTHERS = ("liger", "flash-attn")
TINY = Shape(B=1, T=16, C=32, H=1, L=1, V=60)  # for the interpreter


@dataclasses.dataclass
class Options:
    """Time the kernels on and off, on the GPU at hand. What follows -- goes to train_gpt2.py."""

    train: bool = False  # time training runs instead of single operations
    preset: str | None = None  # preset of the shapes; default: gpt2-124m on a GPU, laptop on a CPU
    shape: tuple[str, ...] = ()  # sizes other than the preset's, such as T=2048: letters B T C H L V
    device: str = "cuda"  # cuda, cuda:1, cpu
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on a GPU that has it, else float32
    compile: bool = dataclasses.field(default_factory=torch.cuda.is_available)  # time torch.compile too
    repeats: int = 50  # timed runs of an operation
    steps: int = 30  # optimizer steps of a training run
    json: Path | None = None  # write all figures to this file
    plot: Path | None = None  # draw a bar per row to this file


# --------------------------------------------------------------------------- operations


def versions(operation: str, compiled: bool, triton: bool) -> dict:
    """Return the functions to compare, by name: ours, PyTorch's, compiled PyTorch, and other packages' if installed."""
    stock = getattr(kernels.select("none"), operation)
    found = {"triton": getattr(kernels.select("all", "cuda"), operation)} if triton else {}
    found["torch"] = stock
    if compiled:
        found["torch.compile"] = torch.compile(stock, fullgraph=True)
    for name, package, offered in (("liger", "liger_kernel", liger), ("flash-attn", "flash_attn", flash)):
        if triton and importlib.util.find_spec(package):
            try:
                theirs = offered()
            except ImportError as error:  # most often built for another PyTorch
                print(f"{package} cannot be imported and is left out: {first_line(error)}", file=sys.stderr)
                continue
            if operation in theirs:
                found[name] = theirs[operation]
    return found


def flash() -> dict:
    """Return the operation that flash-attn has; its function takes (B, T, 3, H, D) in float16 or bfloat16."""
    from flash_attn import flash_attn_qkvpacked_func

    def causal_attention(qkv, n_head, dropout_p):
        B, T, width = qkv.shape
        packed = qkv.view(B, T, 3, n_head, width // 3 // n_head)
        return flash_attn_qkvpacked_func(packed, dropout_p, causal=True).reshape(B, T, width // 3)

    return {"causal_attention": causal_attention}


def liger() -> dict:
    """Return the operations that liger-kernel has, called by position, which works with all its versions."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    layer_norm = LigerLayerNormFunction.apply

    def add_layer_norm(x, residual, weight, bias, eps):
        residual = residual + x
        return layer_norm(residual, weight, bias, eps), residual

    def linear_cross_entropy(x, weight, targets, vocab_size):
        loss = LigerFusedLinearCrossEntropyFunction.apply(x, weight[:vocab_size].to(x.dtype), targets)
        return loss[0] if isinstance(loss, tuple) else loss  # a tuple also holds the z loss and more

    found = {"layer_norm": layer_norm, "add_layer_norm": add_layer_norm}
    return found | {"linear_cross_entropy": linear_cross_entropy}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:100]


def time_operation(
    function, operation: str, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, float]:
    """Return the median milliseconds of forward, backward and both, for one version of an operation."""
    first, differentiable = arguments(operation, shape, dtype, str(device))
    copies = [first]
    if device.type == "cuda":
        size = sum(a.nbytes for a in first if isinstance(a, torch.Tensor))
        more = 4 * torch.cuda.get_device_properties(device).L2_cache_size // size
        copies += [arguments(operation, shape, dtype, str(device))[0] for _ in range(more)]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    marks = []
    for repeat in range(-3, repeats):  # the first three compile and warm up
        given = copies[repeat % len(copies)]
        marks.append([mark(device)])
        with autocast:
            outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [output for output, wanted in zip(outputs, differentiable, strict=True) if wanted]
        if repeat == -3:
            upstream = [torch.ones_like(output) for output in outputs]
        marks[-1].append(mark(device))
        leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
        torch.autograd.grad(outputs, leaves, upstream)
        marks[-1].append(mark(device))
    # read at the end: waiting for the GPU after every run would add the next launch to its time
    times = [(between(a, b), between(b, c), between(a, c)) for a, b, c in marks[3:]]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return dict(zip(("forward_ms", "backward_ms", "both_ms"), medians, strict=True))


def mark(device: torch.device):
    """Return a point in time: a CUDA event, or on a CPU the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    """Return the milliseconds from one mark to another."""
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def needed(operation: str, shape: Shape, counted: list[dict], gpu: GPU | None) -> dict | None:
    """Return bytes, FLOPs and least milliseconds of both directions, matrix products with weights included."""
    own = [kernel for kernel in counted if kernel["operation"] == operation]
    if not own:
        return None
    width = {"linear_gelu": 4 * shape.C, "linear_cross_entropy": shape.W}.get(operation, 0)
    flops = 3 * 2 * shape.N * shape.C * width
    moved = 3 * 2 * (shape.N * (shape.C + width) + shape.C * width) if width else 0
    seconds = 0.0
    if gpu:
        seconds = roofline.least_seconds(moved, flops, gpu)[0] + sum(roofline.kernel_seconds(k, gpu)[0] for k in own)
    flops += sum(kernel["flops"] for kernel in own)
    return {"bytes": moved + sum(k["unique_bytes"] for k in own), "flops": flops, "least_ms": 1e3 * seconds}


def time_operations(options: Options, device: torch.device, shape: Shape) -> list[dict]:
    """Return a row per version of every operation."""
    on_gpu = device.type == "cuda"
    interpreted = not on_gpu and os.environ.get("TRITON_INTERPRET") == "1"
    fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = getattr(torch, {"auto": "bfloat16" if fast else "float32"}.get(options.dtype, options.dtype))
    gpu = named_gpu(torch.cuda.get_device_name(device)) if on_gpu else None
    counted = []
    if on_gpu:  # counted in another process, in the interpreter, as launched on this GPU
        name = architecture(torch.empty(0, device=device))
        counted = report.count(shape, [name])[name]
    rows = []
    for operation in calls_per_step(shape):
        least = needed(operation, shape, counted, gpu)
        for version, function in versions(operation, options.compile, triton=on_gpu).items():
            row = {"operation": operation, "version": version}
            try:
                row |= time_operation(function, operation, shape, device, dtype, options.repeats)
            except Exception as error:  # another package may raise anything: the others are still timed
                if version not in OTHERS and "memory" not in str(error):
                    raise
                row["version"] += f": {first_line(error)}"
            if least and "both_ms" in row:
                row["gb_per_s"] = least["bytes"] / row["both_ms"] / 1e6
                row["tflops"] = least["flops"] / row["both_ms"] / 1e9
                row["roofline"] = least["least_ms"] / row["both_ms"] if gpu else None
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
    """Return the values of --kernels worth a run: all, none, each family alone, each left out."""
    if not triton:
        return ["none"]
    families = list(kernels.FAMILIES)
    return ["all", "none", *families, *(",".join(f for f in families if f != left) for left in families)]


def train(choice: str, compiled: bool, options: Options, rest: list[str], device: str, folder: Path) -> dict:
    """Run train_gpt2.py once. Return the choice, tokens_per_s, mfu, peak_gb and the loss of the last step."""
    script = Path(__file__).parents[1] / "train_gpt2.py"
    command = [sys.executable, str(script), options.preset, "--kernels", choice, "--out-dir", str(folder)]
    command += ["--max-steps", str(options.steps), "--compile" if compiled else "--no-compile", "--device", device]
    command += ["--resume", "never", "--eval-every", "0", "--sample-every", "0", "--hellaswag-every", "0"]
    command += ["--eval-tokens", "65536", *rest]  # a run always ends with a validation
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if line.startswith("error:")), lines[-1]).removeprefix("error: ")
        raise ValueError(f"train_gpt2.py {options.preset} --kernels {choice} stopped: {reason}")
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "tokens_per_s" in record]
    settled = steps[min(10, len(steps) // 2) :]
    mfu = [record["mfu"] for record in settled if record["mfu"] is not None]
    return {
        "kernels": choice,
        "compile": compiled,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in settled),
        "mfu": statistics.median(mfu) if mfu else None,
        "peak_gb": max(record["memory_gb"] or 0.0 for record in steps),
        "last_loss": steps[-1]["loss"],
    }


def time_training(options: Options, rest: list[str], device: torch.device) -> list[dict]:
    """Return a row per training run."""
    rows = []
    for compiled in (False, True) if options.compile else (False,):
        for choice in useful_choices(triton=device.type == "cuda"):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(train(choice, compiled, options, rest, str(device), Path(folder, "run")))
    return rows


# --------------------------------------------------------------------------- output


def format_cell(name: str, value: object) -> str:
    """Format a fraction as a percentage, a number by its size, None as nothing."""
    if value is None:
        return ""
    if name in ("roofline", "mfu"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
    return str(value)


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Draw a bar per row: milliseconds of both directions of a version, or tokens per second of a training run."""
    from matplotlib.figure import Figure

    training = "tokens_per_s" in rows[0]
    rows = [row for row in rows if "not a speed" not in row.get("version", "") and (training or "both_ms" in row)]
    labels = [f"{row['operation']}: {row['version']}" for row in rows if not training]
    labels += [f"{row['kernels']}{', compiled' if row['compile'] else ''}" for row in rows if training]
    values = [row["tokens_per_s" if training else "both_ms"] for row in rows]
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(rows)))
    axes = figure.subplots()
    bars = axes.barh(labels, values, color=["tab:orange" if "triton" in label else "tab:blue" for label in labels])
    axes.bar_label(bars, fmt="{:,.0f}" if training else "{:,.2f}", padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="tokens per second" if training else "milliseconds, forward and backward")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120, bbox_inches="tight")


# --------------------------------------------------------------------------- command line


def find_device(name: str) -> torch.device:
    """Return the device of --device. Raise ValueError if it cannot be used."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no GPU to time: python -m kernels.report needs none, --device cpu times PyTorch alone")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from None
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # on which CUDA events are recorded
    return device


def run(options: Options, rest: list[str]) -> None:
    for name in ("repeats", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}, but must be at least 1")
    if options.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype {options.dtype}: use auto, float32 or bfloat16")
    device = find_device(options.device)
    on_gpu = device.type == "cuda"
    options.preset = options.preset or ("gpt2-124m" if on_gpu else "laptop")
    shape = parse_shape(options.preset, options.shape)
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    if options.train:
        rows, title = time_training(options, rest, device), f"{options.preset}, {options.steps} steps on {name}"
    else:
        rows, title = time_operations(options, device, shape), f"{options.preset} on {name}: {shape}"
    columns = max(rows, key=len)
    print(report.table(title, [{name: format_cell(name, row.get(name)) for name in columns} for row in rows]))
    if options.json:
        figures = {"device": name, "preset": options.preset, "shape": dataclasses.asdict(shape), "rows": rows}
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if options.plot:
        plot(rows, options.plot, title)


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    end = words.index("--") if "--" in words else len(words)
    options = tyro.cli(Options, args=words[:end], prog="python -m kernels.bench")
    with contextlib.suppress(KeyboardInterrupt), report.exit_on_error():
        run(options, words[end + 1 :])


if __name__ == "__main__":
    main()
