"""Draw a run's curves, loss.png, with values to compare: counted n-grams, published models, random guessing."""

import math
from pathlib import Path

import numpy as np

from data.files import atomic_write
from data.shards import Split
from training.expected import MARGIN, Expected

GPT2_124M = "OpenAI's GPT-2 (124M)"
# GPT-2 (124M)'s loss in nats per token on a validation shard, as build-nanogpt (FineWeb-Edu) and llm.c (FineWeb)
# publish it. Keys: FOLDER/FILE of a shard that data.fineweb made, or FILE of a ready-made one.
PUBLISHED_LOSSES = {
    "fineweb-edu-10B/val_00000_000.npy": 3.2924,
    "finewebedu_val_000000.bin": 3.2924,
    "fineweb_val_000000.bin": 3.425,
}
HELLASWAG_CHANCE = 1 / 4
# acc_norm on all 10,042 questions. GPT-2: the released weights, scored the same way by llm.c's dev/data/hellaswag.py.
# GPT-3: as its authors report it, zero-shot, for their smallest model: https://arxiv.org/abs/2005.14165, table H.1.
HELLASWAG_GPT2_124M = 0.2955
HELLASWAG_GPT3_124M = 0.337
HELLASWAG = {GPT2_124M: HELLASWAG_GPT2_124M, "GPT-3 (124M)": HELLASWAG_GPT3_124M}
RANDOM = "guessing at random"


def reference_losses(split: Split) -> dict[str, float]:
    """Return losses to compare a model with, in nats per token: from counting the training text, and published ones."""
    names = {"unigram": "token frequencies", "bigram": "bigrams counted", "trigram": "trigrams counted"}
    losses = {RANDOM: math.log(split.vocab_size)}
    losses |= {names[name]: split.baselines[name] for name in names if name in split.baselines}
    first = split.shards[0].path
    shard = first.name if first.suffix == ".bin" else f"{first.parent.name}/{first.name}"
    if shard in PUBLISHED_LOSSES and split.tokenizer_spec == {"type": "gpt2"}:
        losses[GPT2_124M] = PUBLISHED_LOSSES[shard]
    return losses


def draw(
    records: list[dict],
    path: Path,
    title: str,
    losses: dict[str, float],
    scores: dict[str, float],
    expected: Expected | None = None,
) -> None:
    """
    Draw the lines of a log against tokens seen, into the PNG `path`.

    losses, scores: what to compare the loss and HellaSwag's accuracy with, by name
    expected:       the band of validation losses of runs that ended well
    """
    from matplotlib.figure import Figure  # imported late: it takes half a second
    from matplotlib.ticker import EngFormatter

    metric, (tokens, accuracies) = EngFormatter(sep=""), _curve(records, "hellaswag_acc_norm")
    figure = Figure(figsize=(9, 9 if accuracies else 5.5), layout="constrained")
    panels = figure.subplots(2 if accuracies else 1, squeeze=False, sharex=True)[:, 0]
    panels[0].set(ylabel="loss, nats per token")
    panels[0].set_title(title, parse_math=False)  # of a folder, whose name may hold $
    _draw_losses(panels[0], records, losses, expected)
    if accuracies:
        panels[1].plot(tokens, accuracies, "o-", color="C1", markersize=4)
        panels[1].set(title=f"HellaSwag: {accuracies[-1]:.4f} at the end", ylabel="acc_norm")
        draw_levels(panels[1], {RANDOM: HELLASWAG_CHANCE, **scores})
    for axes in panels:
        axes.xaxis.set_major_formatter(lambda tokens, _: metric(tokens).replace("G", "B"))  # 5M, 10B
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    panels[-1].set(xlabel="tokens")
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _draw_losses(axes, records: list[dict], references: dict[str, float], expected: Expected | None) -> None:
    tokens, losses = _curve(records, "loss")
    top = 1.04 * max([*references.values(), losses[0]])
    losses = [min(loss, top) for loss in losses]  # a spike must not flatten the rest
    axes.plot(tokens, losses, color="C0", linewidth=0.7, alpha=0.3)
    axes.plot(tokens, smoothed(losses), color="C0", linewidth=1.8, label="training, smoothed")
    tokens, losses = _curve(records, "val_loss")
    if losses:
        low = losses.index(min(losses))
        axes.plot(tokens, losses, "o-", color="C1", markersize=3, label="validation")
        axes.plot(tokens[low], losses[low], "o", color="C3", label=f"lowest validation: {losses[low]:.3f}")
    if expected:
        band = np.array([point for point in expected.points if point[0] <= records[-1]["tokens"]]).reshape(-1, 2)
        if len(band):
            low, high = band[:, 1] - MARGIN, band[:, 1] + MARGIN
            axes.fill_between(band[:, 0], low, high, color="C2", alpha=0.25, label="runs that ended well")
    draw_levels(axes, references)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.94), framealpha=1, edgecolor="white", fontsize="small")


def draw_levels(axes, levels: dict[str, float]) -> None:
    """Draw a horizontal line per level, named at its right end; names that would overlap move apart."""
    for value in levels.values():
        axes.axhline(value, color="gray", linewidth=0.8, linestyle="--", zorder=0)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    place = -1.0
    style = {"xycoords": "axes fraction", "textcoords": "offset points", "color": "dimgray", "fontsize": "small"}
    for name, value in sorted(levels.items(), key=lambda level: level[1]):
        place = max(place + 0.045, (value - low) / (high - low))
        axes.annotate(f"{name} {value:.4g}", (1, place), xytext=(4, 0), va="center", **style)


def smoothed(losses: list[float]) -> list[float]:
    """Return a centered moving average over up to a 50th of the losses on either side, fewer at the steep start."""
    sums, n = np.cumsum([0.0, *losses]), len(losses)
    reach = max(1, n // 50)
    spans = ((max(0, i - reach), min(n, i + min(i, reach) + 1)) for i in range(n))
    return [float(sums[end] - sums[first]) / (end - first) for first, end in spans]


def _curve(records: list[dict], name: str) -> tuple[list[float], list[float]]:
    found = [record for record in records if name in record]
    return [record["tokens"] for record in found], [record[name] for record in found]
