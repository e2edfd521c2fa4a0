"""
Histograms of a diagnosed step (train_gpt2.py --diagnose N), and their picture, distributions.png.

A record's "histograms" holds, for each kind below, the fraction of all elements in each of BINS equal bins, a list per
layer. Elements outside the range are counted in the first or last bin; zeros, whose log10 is infinite, in the first.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.files import atomic_write

BINS = 40
KINDS = {  # name in a record -> what is counted, and the range
    "gelu": ("GELU outputs", (-0.2, 4.0)),
    "gradient": ("|gradient| of the matrices, log10", (-9.0, 1.0)),
    "update_ratio": ("|update| / RMS(weight) of the matrices, log10", (-7.0, 1.0)),
}


def histogram(kind: str, values: Tensor) -> Tensor:
    """Return the count in each bin, (BINS,) float32, of values of any shape, which may not be finite."""
    low, high = KINDS[kind][1]
    finite = values.float().nan_to_num(nan=low).clamp(low, high)
    return torch.histc(finite, BINS, low, high)


def fractions(counts: Tensor) -> list[float]:
    """Return the bins' fractions of all elements, to four decimals."""
    return [round(part, 4) for part in (counts / counts.sum().clamp(min=1)).tolist()]


def draw(records: list[dict], path: str | Path, title: str = "") -> None:
    """
    Draw the newest diagnosis in `records`, lines of log.jsonl, as the PNG `path`; nothing if there is none.

    If the learning rate of the last step is 0, at which nothing moves, draw the diagnosis before it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = [record for record in records if "histograms" in record.get("diagnostics", {})]
    if not found:
        return
    moving = [record for record in found if record["diagnostics"].get("schedule")]
    step, diagnosis = (moving or found)[-1]["step"], (moving or found)[-1]["diagnostics"]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, (kind, (label, (low, high))) in zip(figure.subplots(1, len(KINDS)), KINDS.items(), strict=True):
        layers = diagnosis["histograms"].get(kind, [])
        centers = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
        for i, parts in enumerate(layers):
            name = f"layer {i}" if i in (0, len(layers) - 1) else None
            if kind == "gelu" and (dead := diagnosis["gelu_dead_units"][i]):
                name = f"layer {i}: {dead:.0%} of its units dead for every token"
            axes.plot(centers, parts, color=colormaps["viridis"](0.9 * i / max(1, len(layers) - 1)), label=name)
        axes.set(title=label, ylabel="fraction of all", yscale="log" if kind == "gelu" else "linear")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle(f"{title} step {step:,}".strip())
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))
