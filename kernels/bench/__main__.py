"""
Time the kernels on and off, on the GPU at hand.

    python -m kernels.bench                            every operation: Triton, and every rival of kernels.bench.rivals
    python -m kernels.bench --train --steps 50         a training run per useful choice of --kernels
    python -m kernels.bench --ladder                   from float32 to all optimizations; without a GPU, a model
    python -m kernels.bench --launches                 Python's time to launch an eager micro-step; needs no GPU
    python -m kernels.bench --device cpu               PyTorch alone, at the shapes of the laptop preset
    python -m kernels.bench --train -- --data FOLDER   what follows -- goes to train_gpt2.py

Operations: the median time that the GPU takes for forward and for backward, and that Python takes to launch both.
GB/s and TFLOP/s are the compulsory bytes and the FLOPs, as kernels.report counts them, over the time of both
directions; roofline is the fraction of the roofline's speed.

On a CPU, Triton's kernels run only in the interpreter (TRITON_INTERPRET=1), at a tiny shape: proof that they run, not a
speed.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from kernels.bench import ladder, launches
from kernels.bench.operations import doubts, time_operations
from kernels.bench.rivals import first_line
from kernels.bench.training import time_training
from kernels.command_line import exit_on_error, parse_options, table
from kernels.gpus import GPUS, named_gpu
from kernels.report import __main__ as report
from kernels.report.shapes import Shape, parse_shape


@dataclasses.dataclass
class Options:
    """Time the kernels on and off, on the GPU at hand. What follows -- goes to train_gpt2.py."""

    train: bool = False  # time training runs instead of single operations
    ladder: bool = False  # time one optimization on top of another instead
    launches: bool = False  # time what Python takes to launch a micro-step instead, against the GPU's least time
    preset: str | None = None  # preset of the shapes; default: gpt2-124m on a GPU, laptop on a CPU
    shape: tuple[str, ...] = ()  # sizes other than the preset's, such as T=2048: letters B T C H L V
    device: str = "cuda"  # cuda, cuda:1, cpu
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on a GPU that has it, else float32
    compile: bool = dataclasses.field(default_factory=torch.cuda.is_available)  # time torch.compile too
    repeats: int = 50  # timed runs of an operation
    steps: int = 30  # optimizer steps of a training run
    json: Path | None = None  # write all figures to this file
    plot: Path | None = None  # draw a bar per row to this file


# --------------------------------------------------------------------------- output


def format_cell(name: str, value: object) -> str:
    """Format a fraction as a percentage, a number by its size, None as nothing."""
    if value is None:
        return ""
    if name in ("roofline", "mfu", "queued"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
    return str(value)


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Draw a bar per row: milliseconds of both directions of a version, or tokens per second of a run or a rung."""
    from matplotlib.figure import Figure

    training = "tokens_per_s" in rows[0]
    rows = [row for row in rows if "not a speed" not in row.get("version", "") and (training or "both_ms" in row)]
    labels = [f"{row['operation']}: {row['version']}" for row in rows if not training]
    labels += [row.get("rung") or f"{row['kernels']}{', compiled' * row['compile']}" for row in rows if training]
    values = [row["tokens_per_s" if training else "both_ms"] for row in rows]
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(rows)))
    axes = figure.subplots()
    bars = axes.barh(
        labels, values, color=["tab:orange" if "triton" in label.lower() else "tab:blue" for label in labels]
    )
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
    if options.ladder and options.device == "cuda" and not torch.cuda.is_available():
        shape, name = parse_shape(options.preset or "gpt2-124m", options.shape), "A100"
        rows = ladder.modeled(shape, GPUS[name], report.count(shape, ["sm_80"])["sm_80"])
        show(
            options,
            rows,
            shape,
            name,
            f"{name}, {shape}: model, from counted traffic and data sheets; nothing was timed",
        )
        return
    if options.launches:
        given = parse_shape(options.preset or "gpt2-124m", ("B=8", *options.shape))
        present = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        name = present if named_gpu(present) else "A100"
        gpu = named_gpu(name)
        counted = report.count(given, [gpu.architecture])[gpu.architecture]
        found = launches.measure(given, options.repeats)
        rows, verdict = launches.compare(found, counted, given, gpu, name)
        title = f"Launches of a micro-step, Python's microseconds: timed; {given} on {name}: model"
        show(options, rows, given, found["processor"], title)
        print(f"\n{verdict}")
        return
    device = find_device(options.device)
    on_gpu = device.type == "cuda"
    options.preset = options.preset or ("gpt2-124m" if on_gpu else "laptop")
    shape = parse_shape(options.preset, options.shape)
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    if options.ladder or options.train:
        time_runs = ladder.measured if options.ladder else time_training
        rows = time_runs(options.preset, options.steps, options.compile, rest, str(device))
        show(options, rows, shape, name, f"{options.preset}, {options.steps} steps on {name}")
    else:
        rows = time_operations(shape, device, options.dtype, options.compile, options.repeats)
        show(options, rows, shape, name, f"{options.preset} on {name}: {shape}")
        for sentence in doubts(rows):
            print(sentence, file=sys.stderr)


def show(options: Options, rows: list[dict], shape: Shape, name: str, title: str) -> None:
    """Print a table of the rows; write the files that were asked for. name: of the device."""
    columns = max(rows, key=len)
    print(table(title, [{name: format_cell(name, row.get(name)) for name in columns} for row in rows]))
    if options.json:
        figures = {"device": name, "preset": options.preset, "shape": dataclasses.asdict(shape), "rows": rows}
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if options.plot:
        plot(rows, options.plot, title)


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    end = words.index("--") if "--" in words else len(words)
    with exit_on_error():
        run(parse_options(Options, words[:end], "python -m kernels.bench"), words[end + 1 :])


if __name__ == "__main__":
    main()
