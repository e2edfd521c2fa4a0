"""
Diagnostics (train_gpt2.py --diagnose N): what happens inside a GPT while it trains, and what looks wrong.

A diagnosed step adds a dict "diagnostics" to its line in log.jsonl. Its lists have one entry per layer, h.0 first, null
for anything not finite; RMS is the root of the mean square:

    update_ratio         log10 of RMS(update) / RMS(weight) per kind of matrix; the update is the step's total change
    gradient_ratio       log10 of RMS(gradient) / RMS(weight); gradients as the optimizer sees them, clipped
    gradient_mean, _std  of the same gradients
    gelu_mean, _std      of the GELU's output; gelu_dead: fraction of its inputs below -3, whose slope is under 0.012;
                         gelu_dead_units: fraction of its units for which all inputs are
    attention_mean, _std of what attention adds to the residual stream
    attention_entropy    of the attention weights, as a fraction of the maximum ln(keys); mean over heads and queries
    attention_focused    fraction of (head, query) pairs with an entropy under 0.1 nats: all weight on one key
    residual             RMS of the residual stream before every ln_1 and ln_2 and before ln_f: the median over tokens
    logit_std, entropy   of the predictions: spread over the vocabulary, and nats; means over tokens
    loss                 nats per token, of the same predictions
    loss_by_position     the same at positions 0, 1, 2-3, 4-7, 8-15, ...
    histograms           see distributions.py
    schedule             the learning rate as a fraction of its peak
    ms                   what the diagnosis cost
    warnings             kind -> sentence, see find_warnings

Activations come from an extra forward pass before the step, over a few sequences of its batch, in the plain model;
gradients and updates from hooks around the optimizers' step. Steps that are not diagnosed run none of this code.
Source of the update-to-weight ratio and of such pictures: A. Karpathy, "Building makemore part 3", 2022.
"""

import contextlib
import math
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import atomic_write
from training import distributions

SEQUENCES = 16  # of the batch, for the activations
ATTENTION_SEQUENCES, ATTENTION_QUERIES = 4, 64  # for the entropy, which needs a row of weights per query
FIRST_QUERY = 8  # queries that see fewer keys say little about focus
KINDS = {"c_attn": "attn.c_attn", "attn.c_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp.c_proj": "mlp.c_proj"}
DEAD, FOCUSED = -3.0, 0.1  # see gelu_dead and attention_focused above


# ----------------------------------------------------------------------------------------------------------- measuring


class Diagnostics:
    """
    Measure training steps from outside.

    model:      a GPT, the plain module: neither compiled nor wrapped by DDP, with the weights that train
    optimizers: the ones that train it; the update is what their `step` does to the matrices
    autocast:   returns the context in which the model computes
    """

    def __init__(self, model: nn.Module, optimizers: list, autocast: Callable = contextlib.nullcontext):
        self.model, self.optimizers, self.autocast = model, optimizers, autocast
        self._reported = set()

    @contextlib.contextmanager
    def watching(self, inputs: Tensor, targets: Tensor) -> Iterator[dict]:
        """
        Wrap one training step on this batch. Yield a dict with the activations at once, and the rest when the context
        exits without an exception. inputs, targets: (sequences, T) int64, on the model's device.
        """
        began = _now(inputs.device)
        updates = _Updates(self.model)
        found = measure_activations(self.model, inputs[:SEQUENCES], targets[:SEQUENCES], self.autocast)
        seconds = _now(inputs.device) - began
        handles = [o.register_step_pre_hook(updates.before) for o in self.optimizers]
        handles += [o.register_step_post_hook(updates.after) for o in self.optimizers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
        began = _now(inputs.device)
        found |= updates.results()
        found["histograms"] |= updates.histograms()
        found["ms"] = round(1000 * (seconds + updates.seconds + _now(inputs.device) - began), 1)
        found["warnings"] = find_warnings(found, self.model.config.vocab_size)

    def new_warnings(self, found: dict) -> list[str]:
        """Return warnings of kinds that were not returned before, for the terminal."""
        new = {kind: text for kind, text in found["warnings"].items() if kind not in self._reported}
        self._reported |= set(new)
        return list(new.values())


def _now(device: torch.device) -> float:
    """Return the time in seconds, once a GPU has done what is queued, so that a diagnosis does not pay for its step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Updates:
    """Optimizer hooks: gradients and weights right before a step, and what the step changed."""

    def __init__(self, model: nn.Module):
        layers, wte = model.transformer.h, model.transformer.wte.weight
        self.kinds = {kind: [block.get_submodule(path).weight for block in layers] for kind, path in KINDS.items()}
        self.kinds |= {"wte": [wte], "wpe": [model.transformer.wpe.weight]}
        self.rows = {id(p): p.shape[0] for parameters in self.kinds.values() for p in parameters}
        self.device = wte.device
        self.rows[id(wte)] = model.config.vocab_size  # the rest is padding
        self.copies, self.stats, self.counts = {}, defaultdict(dict), defaultdict(dict)  # by the parameter's id
        self.seconds, self.schedule = 0.0, None

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, *_) -> None:
        began = _now(self.device)
        for group in optimizer.param_groups:
            peak = optimizer.defaults["lr"] * group.get("lr_ratio", 1.0)
            self.schedule = float(group["lr"]) / peak if peak else None
            for p in group["params"]:
                if id(p) in self.rows and p.grad is not None:
                    gradient, weight = p.grad[: self.rows[id(p)]].float(), torch.linalg.vector_norm(p)
                    self.stats[id(p)] = {
                        "gradient_mean": gradient.mean(),
                        "gradient_std": gradient.std(correction=0),
                        "gradient_ratio": (torch.linalg.vector_norm(gradient) / weight).log10(),
                        "update_ratio": weight,  # until the step is done
                    }
                    self.counts["gradient"][id(p)] = distributions.histogram("gradient", gradient.abs().log10())
                    self.copies[id(p)] = p.detach().clone()
        self.seconds += _now(self.device) - began

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, *_) -> None:
        began = _now(self.device)
        for p in (p for group in optimizer.param_groups for p in group["params"] if id(p) in self.copies):
            update, weight = self.copies.pop(id(p)).sub_(p), self.stats[id(p)]["update_ratio"]
            ratios = (update.abs() * (p.numel() ** 0.5 / weight)).log10()
            self.counts["update_ratio"][id(p)] = distributions.histogram("update_ratio", ratios)
            self.stats[id(p)]["update_ratio"] = (torch.linalg.vector_norm(update) / weight).log10()
        self.seconds += _now(self.device) - began

    def results(self) -> dict:
        missing = torch.tensor(math.nan)
        return {"schedule": self.schedule and float(f"{self.schedule:.3g}")} | {
            name: {kind: _floats([self.stats[id(p)].get(name, missing) for p in ps]) for kind, ps in self.kinds.items()}
            for name in ("update_ratio", "gradient_ratio", "gradient_mean", "gradient_std")
        }

    def histograms(self) -> dict[str, list[list[float]]]:
        """Return, per kind, a layer's matrices together."""
        layers = [*zip(*(self.kinds[kind] for kind in KINDS), strict=True)]
        return {
            kind: [distributions.fractions(sum(counts[id(p)] for p in ps if id(p) in counts)) for ps in layers]
            for kind, counts in self.counts.items()
        }


@torch.no_grad()
def measure_activations(
    model: nn.Module, inputs: Tensor, targets: Tensor, autocast: Callable = contextlib.nullcontext
) -> dict:
    """Return activation statistics of a forward pass without dropout. inputs, targets: (sequences, T) int64."""
    stats, histograms = defaultdict(list), []

    def add_moments(name: str, y: Tensor) -> None:
        stats[f"{name}_mean"].append(y.mean())
        stats[f"{name}_std"].append(y.std(correction=0))

    def mlp_hook(mlp: nn.Module, args: tuple, _) -> None:
        z = F.linear(args[0], mlp.c_fc.weight, mlp.c_fc.bias).float()
        stats["gelu_dead"].append((z < DEAD).float().mean())
        stats["gelu_dead_units"].append((z < DEAD).flatten(0, -2).all(0).float().mean())
        y = F.gelu(z, approximate="tanh")
        add_moments("gelu", y)
        histograms.append(distributions.fractions(distributions.histogram("gelu", y)))

    def attention_hook(attention: nn.Module, args: tuple, y: Tensor) -> None:
        add_moments("attention", y.float())
        x = args[0][:ATTENTION_SEQUENCES]
        qkv = F.linear(x, attention.c_attn.weight, attention.c_attn.bias)
        entropy, maximum = attention_entropy(qkv, attention.n_head)
        stats["attention_entropy"].append((entropy / maximum).mean())
        stats["attention_focused"].append((entropy < FOCUSED).float().mean())

    def residual_hook(_, __, output: tuple) -> None:
        stats["residual"].append(output[1].float().square().mean(-1).sqrt().median())

    handles = [model.transformer.ln_f.register_forward_hook(residual_hook)]
    for block in model.transformer.h:
        handles += [norm.register_forward_hook(residual_hook) for norm in (block.ln_1, block.ln_2)]
        handles += [block.mlp.register_forward_hook(mlp_hook), block.attn.register_forward_hook(attention_hook)]
    was_training = model.training
    model.eval()
    try:
        with autocast():
            hidden = model.hidden(inputs)
            predictions = measure_predictions(hidden, model.transformer.wte.weight[: model.config.vocab_size], targets)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return (
        {name: _floats(values) for name, values in stats.items()} | predictions | {"histograms": {"gelu": histograms}}
    )


def attention_entropy(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """
    Compute the entropy of attention weights, in nats, for some evenly spread queries.

    qkv: (B, T, 3C) packed
    Return (B, H, queries), and each query's maximum ln(keys), (queries,). No queries if T is below FIRST_QUERY.
    """
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    count = max(0, min(T - FIRST_QUERY, ATTENTION_QUERIES))
    queries = torch.linspace(FIRST_QUERY, T - 1, count, device=qkv.device).long()
    q = qkv[:, queries, :C].float().view(B, count, n_head, C // n_head).transpose(1, 2)  # (B, H, queries, D)
    k = qkv[..., C : 2 * C].float().view(B, T, n_head, C // n_head).transpose(1, 2)
    future = torch.arange(T, device=qkv.device) > queries[:, None]
    scores = q @ k.transpose(2, 3) / math.sqrt(C // n_head)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.special.entr(weights).sum(-1), (queries + 1).log()


def measure_predictions(hidden: Tensor, wte: Tensor, targets: Tensor) -> dict:
    """Return logit_std, entropy, loss, loss_by_position. hidden: (B, T, C), wte: (V, C), targets: (B, T) int64."""
    stds, entropies, losses = [], [], []
    for x, y in zip(hidden, targets, strict=True):  # one sequence at a time: logits are large
        log_p = F.linear(x, wte).float().log_softmax(dim=-1)
        stds.append(log_p.std(dim=-1, correction=0).mean())  # the logits' too: a constant apart
        entropies.append(-(log_p.exp() * log_p).sum(-1).mean())
        losses.append(-log_p.gather(1, y[:, None].clamp(min=0))[:, 0])
    loss, scored, T = torch.stack(losses), targets >= 0, targets.shape[1]  # those that are IGNORED are negative
    means = [torch.stack(stds).mean(), torch.stack(entropies).mean()]
    means += [loss[:, start:end][scored[:, start:end]].mean() for start, end in [(0, T), *position_bins(T)]]
    std, entropy, mean, *bins = _floats(means)
    return {"logit_std": std, "entropy": entropy, "loss": mean, "loss_by_position": bins}


def position_bins(T: int) -> list[tuple[int, int]]:
    """Cut the positions of a block of T at 1, 2, 4, 8, ...: each bin shows what twice the context is worth."""
    edges = [0, *(2**i for i in range(T.bit_length()) if 2**i < T), T]
    return list(zip(edges, edges[1:], strict=False))


def _floats(values: list[Tensor]) -> list[float | None]:
    """Return floats of three digits, in one transfer from the device; None for what is not finite."""
    if not values:
        return []
    floats = torch.stack([value.to(values[-1].device) for value in values]).tolist()
    return [float(f"{value:.3g}") if math.isfinite(value) else None for value in floats]


# ------------------------------------------------------------------------------------------------------------ warnings

USUAL_UPDATE = -3.0  # log10 of update / weight: Karpathy's rule of thumb for a step at the peak learning rate
SMALL_UPDATE = -4.5  # 30 times less
LARGE_UPDATE = -0.3  # half of the weight per step: what was learned before is gone
PEAK_UPDATE = 0.5  # extrapolated to the peak of the schedule: weights grow until then, but not by so much
GRADIENT_SPREAD = 1000.0  # between layers, for the same kind of matrix
MANY_DEAD = 0.5  # fraction of a layer's GELU inputs; a dead unit passes almost no gradient
MANY_FOCUSED = 0.9  # entropy collapse: Zhai et al. 2023, https://arxiv.org/abs/2303.06296
GROWTH = 30.0  # of the residual stream in half a layer; the first MLP of the laptop preset reaches 8
UNTRAINED_GROWTH = 6.0  # the same before anything is learned, so from the initialization; six layers as wide as XL: 4.9
UNTRAINED = 0.9  # entropy of the predictions, as a fraction of ln V, before anything is learned
GUESSING = 0.5  # nats by which the loss may exceed ln V, a uniform guess; fresh and as wide as GPT-2 XL: 0.4
OVERCONFIDENT = 1.0  # nats by which the loss may exceed the entropy; a calibrated model has them equal
LATE_LOSS = 1.0  # nats by which the last bin of positions may be worse than the one before


def find_warnings(found: dict, vocab_size: int) -> dict[str, str]:
    """Return what looks wrong in a record, the dict "diagnostics" of a step: kind -> sentence."""
    texts = {
        "updates": _check_updates(found["update_ratio"], found["schedule"]),
        "gradients": _check_gradients(found["gradient_std"]),
        "gelu": _check_fractions(found.get("gelu_dead"), MANY_DEAD, "GELU inputs are on the dead side"),
        "attention": _check_fractions(found.get("attention_focused"), MANY_FOCUSED, "queries look at one key"),
    }
    losses, loss, entropy, residual = (found[name] for name in ("loss_by_position", "loss", "entropy", "residual"))
    guess = math.log(vocab_size)
    if None in (found["logit_std"], entropy, *residual):
        texts["not_finite"] = "activations or predictions are not finite: the weights are lost"
    if None not in (entropy, *residual):
        texts["residual"] = _check_growth(residual, untrained=entropy > UNTRAINED * guess)
    if None not in (loss, entropy, *losses):
        # --zero-init: before the first step no block adds anything, and a position predicts its own token
        untouched = len(residual) > 1 and len(set(residual)) == 1
        if loss > guess + GUESSING and not untouched:
            texts["guessing"] = f"the loss, {loss:.2f}, is worse than a random guess, {guess:.2f}"
        if loss > entropy + OVERCONFIDENT and not untouched:
            texts["confidence"] = f"predictions are confident and wrong: loss {loss:.2f}, entropy {entropy:.2f}"
        if len(losses) > 1 and losses[-1] > losses[-2] + LATE_LOSS:
            texts["position"] = f"loss {losses[-1]:.2f} at the end of a block, {losses[-2]:.2f} before: context harms"
    return {kind: sentence for kind, sentence in texts.items() if sentence}


def _check_updates(ratios: dict[str, list], schedule: float | None) -> str:
    places = [(x, kind, i) for kind, layers in ratios.items() for i, x in enumerate(layers) if x is not None]
    if not places or not schedule:
        return ""
    (low, *lowest), (high, *highest) = min(places), max(places)
    if high > LARGE_UPDATE:
        return f"{_place(*highest)} changes by {10**high:.0%} of its size in one step: the learning rate is too high"
    peak, *highest = max((place for place in places if place[1] in KINDS), default=places[0])
    peak, low = peak - math.log10(schedule), low - math.log10(schedule)
    if peak > PEAK_UPDATE:
        change = f"would change by {10**peak:.0%} of its size in one step"
        return f"at the peak of the schedule {_place(*highest)} {change}: the learning rate is too high"
    if low < SMALL_UPDATE:
        return f"the updates of {_place(*lowest)} are {10 ** (USUAL_UPDATE - low):,.0f} times smaller than usual"
    return ""


def _check_gradients(stds: dict[str, list]) -> str:
    for kind, layers in stds.items():
        if 0 in layers and any(layers):  # none at all, in no layer: the first step under --zero-init
            return f"{_place(kind, layers.index(0))} gets no gradient at all"
        if layers and None not in layers and (most := max(layers)) > GRADIENT_SPREAD * (least := min(layers)):
            times = f"{most / least:,.0f} times larger than in layer {layers.index(least)}"
            return f"the gradient of {_place(kind, layers.index(most))} is {times}: gradients vanish or explode"
    return ""


def _check_fractions(fractions: list | None, limit: float, what: str) -> str:
    high = {layer: fraction for layer, fraction in enumerate(fractions or []) if (fraction or 0.0) > limit}
    worst = max(high, key=high.get, default=None)
    return f"{high[worst]:.0%} of layer {worst}'s {what} ({len(high)} of {len(fractions)} layers)" if high else ""


def _check_growth(residual: list, untrained: bool) -> str:
    growths = [after / before if before else 0.0 for before, after in zip(residual, residual[1:], strict=False)]
    worst = max(growths, default=0.0)
    if worst <= (UNTRAINED_GROWTH if untrained else GROWTH):
        return ""
    layer, second = divmod(growths.index(worst), 2)
    hint = "initialize c_proj smaller" if untrained else "what came before is drowned out"
    branch = "MLP" if second else "attention"
    return f"layer {layer}'s {branch} makes the residual stream {worst:.0f} times larger: {hint}"


def _place(kind: str, layer: int) -> str:
    return f"layer {layer}'s {kind}" if kind in KINDS else kind


# ------------------------------------------------------------------------------------------------------------- picture

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
