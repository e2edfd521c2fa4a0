"""The picture of all diagnoses, diagnostics.png: a panel for each figure of a record, and the warnings."""

import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from data.files import atomic_write
from training.diagnostics.alarms import KINDS, USUAL_UPDATE
from training.diagnostics.measure import DEAD, FOCUSED

MAX_DRAWN = 200  # diagnoses, evenly chosen: more lines tell no more and take long
PANELS = {  # in reading order: name in a record -> title, horizontal axis, and the vertical scale, shared by its name
    "update_ratio": ("update / weight, log10", "step", "ratio"),
    "gradient_ratio": ("gradient / weight, log10", "step", "ratio"),
    "gradient_std": ("gradient: standard deviation", "step", "log gradient"),
    "gradient_mean": ("gradient: mean", "step", "gradient"),
    "gelu_mean": ("GELU output: mean", "step", "mean"),
    "attention_mean": ("attention output: mean", "step", "mean"),
    "gelu_std": ("GELU output: standard deviation", "step", "std"),
    "attention_std": ("attention output: standard deviation", "step", "std"),
    "gelu_dead": (f"GELU inputs on the dead side (< {DEAD:g})", "step", "fraction"),
    "attention_focused": (f"attention on one key (entropy < {FOCUSED:g} nats)", "step", "fraction"),
    "attention_entropy": ("attention entropy / its maximum", "step", "fraction"),
    "residual": ("residual stream: RMS by depth", "layers passed", "log residual"),
    "entropy": ("predictions: entropy and loss, nats", "step", "nats"),
    "loss_by_position": ("loss by position in the block, nats", "position", "nats"),
    "logit_std": ("logits: standard deviation", "step", "logits"),
}


def draw(records: list[dict], path: str | Path, title: str = "") -> None:
    """Draw the diagnoses in `records`, lines of log.jsonl, as the PNG `path`; nothing if there are none."""
    from matplotlib.figure import Figure

    records = [record for record in records if "diagnostics" in record]
    if not records:
        return
    text = _warnings_text(records)
    if len(records) > MAX_DRAWN:
        records = [records[round(i * (len(records) - 1) / (MAX_DRAWN - 1))] for i in range(MAX_DRAWN)]
    steps, found = [record["step"] for record in records], [record["diagnostics"] for record in records]
    axes, scales = (figure := Figure(figsize=(18, 14), layout="constrained")).subplots(4, 4).flat, {}
    for axis, (name, (label, x, scale)) in zip(axes, PANELS.items(), strict=False):
        _draw_panel(axis, steps, found, name, x)
        axis.set(title=label, xlabel=x, yscale="log" if scale.startswith("log ") else "linear")
        axis.grid(alpha=0.3)
        if scale in scales:
            axis.sharey(scales[scale])
            axis.autoscale(axis="y")
        scales.setdefault(scale, axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    scales["fraction"].set_ylim(-0.03, 1.03)
    axes[15].set(title="warnings")
    axes[15].axis("off")
    axes[15].text(0, 0.98, text or "none", va="top", fontsize=9, color="darkred" if text else "darkgreen")
    figure.suptitle(title, parse_math=False)  # of a folder, whose name may hold $
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=80))


def _draw_panel(axis, steps: list[int], found: list[dict], name: str, x: str) -> None:
    """Draw a line per layer over the steps, or a line per step over depth or position; dark lines come first."""
    from matplotlib import colormaps

    rows, per_kind = (
        np.array([_layers(record.get(name, [])) for record in found]),
        isinstance(found[-1].get(name), dict),
    )
    if x == "step":
        at, lines, colors, last = steps, rows.T, colormaps["viridis"], rows.shape[1] - 1
        names = {0: "layer 0", last: f"layer {last}"} if per_kind or isinstance(found[-1].get(name), list) else {}
        if name == "entropy":
            lines, names = [*lines, np.array([record["loss"] for record in found], float)], {0: "entropy", 1: "loss"}
    else:
        at, lines, colors = np.arange(rows.shape[1]) / (2 if name == "residual" else 1), rows, colormaps["plasma"]
        names = {i: f"step {steps[i]:,}" for i in (0, len(steps) - 1)}
    for i, line in enumerate(lines):
        color = colors(0.9 * i / max(1, len(lines) - 1))
        axis.plot(at, line, "o-", color=color, markersize=3, linewidth=1.2, label=names.get(i))
    for kind, style in {"wte": "--", "wpe": ":"}.items() if per_kind else ():
        line = np.array([record[name][kind][0] for record in found], float)
        axis.plot(steps, line, style, color="gray", linewidth=1.2, label=kind)
    if name == "update_ratio":
        axis.axhline(USUAL_UPDATE, color="red", linestyle="--", linewidth=1, label="usual: 1e-3")
    if name == "residual":
        axis.xaxis.get_major_locator().set_params(integer=True)
    if name == "loss_by_position":
        axis.set_xticks(at, ["0", "1", *(f"{2**i}+" for i in range(1, len(at) - 1))][: len(at)], fontsize=8)


def _warnings_text(records: list[dict]) -> str:
    """Return the newest sentence of every kind of warning, after the steps that gave it."""
    texts = defaultdict(list)
    for record in records:
        for kind, sentence in record["diagnostics"]["warnings"].items():
            texts[kind].append((record["step"], sentence))
    lines = []
    for (first, _), *_, (last, sentence) in ([cases[0], *cases] for cases in texts.values()):
        when = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        lines.append(textwrap.fill(f"{when}: {sentence}", 52))
    return "\n\n".join(lines)


def _layers(values: dict | list | float | None) -> np.ndarray:
    """Return one number per layer, nan if unknown: as it is, or the median over a layer's kinds of matrices."""
    if not isinstance(values, dict):
        return np.array(values, float, ndmin=1)
    kinds = torch.from_numpy(np.array([values[kind] for kind in KINDS], float))  # (kinds, layers)
    return kinds.nanquantile(0.5, dim=0).numpy() if kinds.numel() else np.empty(0)
