"""
Diagnostics: what goes on inside a GPT while it trains, and what looks wrong about it (train_gpt2.py --diagnose N).

Of a step that is diagnosed, log.jsonl holds a dict "diagnostics". Its lists have an entry a layer, h.0 first, and null
where there is no number; RMS is the root of the mean square:

    update_ratio         log10 of RMS(update) / RMS(weight) of every kind of matrix; the update is all that the step did
    gradient_ratio       log10 of RMS(gradient) / RMS(weight); gradients are as the optimizer sees them, clipped
    gradient_mean, _std  of the same gradients
    gelu_mean, _std      of the GELU's output; gelu_dead: share of its inputs below -3, where its slope is under 0.012
    attention_mean, _std of what attention adds to the residual stream
    attention_entropy    of a query's weights, as a share of the most it can be, ln(keys); mean over heads and queries
    attention_focused    share of (head, query) pairs with an entropy under 0.1 nats: all on one key
    residual             RMS of the residual stream, before every ln_1 and ln_2 and before ln_f: the median over tokens
    logit_std, entropy   of the predictions: the spread over the vocabulary, and nats; means over tokens
    loss                 nats per token, of the same predictions
    loss_by_position     the same at positions 0, 1, 2-3, 4-7, 8-15, ...
    schedule             the learning rate, as a share of its peak
    ms                   what the diagnosis cost
    warnings             kind -> sentence, see `warnings`

Activations come from one more forward pass without gradients, before the step, over a few sequences of its batch, in
the plain model; gradients and updates from hooks around the optimizers' step. A step without diagnosis runs no line of
this. The ratio of update to weight, and pictures like these: A. Karpathy, "Building makemore part 3", 2022.
"""

import contextlib
import math
import statistics
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import atomic_write

SEQUENCES = 16  # of the batch, for the activations: position 0 has no more samples than that
ATTENTION_SEQUENCES, ATTENTION_QUERIES = 4, 64  # for the entropy, which needs a row of weights a query
FIRST_QUERY = 8  # queries that see fewer keys say little about focus
KINDS = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")  # of a layer's matrices
DEAD, FOCUSED = -3.0, 0.1  # see gelu_dead and attention_focused above


# --------------------------------------------------------------------------------------------------------- measuring


class Diagnostics:
    """
    Measures a training step from around it.

    model:      a GPT, the plain module: neither compiled nor wrapped by DDP; its weights are those that train
    optimizers: those that train it; the update is what their `step` does to the matrices
    autocast:   gives the context in which the model computes
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.model, self.optimizers, self.autocast = model, optimizers, autocast
        self._said = set()

    @contextlib.contextmanager
    def watching(self, inputs: Tensor, targets: Tensor) -> Iterator[dict]:
        """
        A context around one training step over this batch; it gives a dict, with the
        activations at once, and with all else when the context ends without an exception.

        inputs, targets: (sequences, T) int64, on the model's device. The step may be interrupted by an exception.
        """
        found, watched = {}, _Updates(self.model)
        began = time.perf_counter()
        found |= activations(self.model, inputs[:SEQUENCES], targets[:SEQUENCES], self.autocast)
        seconds = time.perf_counter() - began
        handles = [o.register_step_pre_hook(watched.before) for o in self.optimizers]
        handles += [o.register_step_post_hook(watched.after) for o in self.optimizers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
        began = time.perf_counter()
        found |= watched.found()
        found["ms"] = round(1000 * (seconds + watched.seconds + time.perf_counter() - began), 1)
        found["warnings"] = warnings(found, self.model.config.vocab_size)

    def news(self, found: dict) -> list[str]:
        """The warnings of a record whose kind is new since this object was made: for the terminal."""
        fresh = {kind: text for kind, text in found["warnings"].items() if kind not in self._said}
        self._said |= set(fresh)
        return list(fresh.values())


def matrices(model: nn.Module) -> dict[str, list[Tensor]]:
    """Kind of matrix -> the weights of that kind, one a layer; the embeddings have one each."""
    layers = model.transformer.h
    return {
        "c_attn": [block.attn.c_attn.weight for block in layers],
        "attn.c_proj": [block.attn.c_proj.weight for block in layers],
        "c_fc": [block.mlp.c_fc.weight for block in layers],
        "mlp.c_proj": [block.mlp.c_proj.weight for block in layers],
        "wte": [model.transformer.wte.weight],
        "wpe": [model.transformer.wpe.weight],
    }


class _Updates:
    """Hooks of the optimizers: gradients and weights right before a step, and what the step changed."""

    def __init__(self, model: nn.Module):
        self.kinds, self.seconds, self.schedule = matrices(model), 0.0, None
        self.rows = {id(p): p.shape[0] for parameters in self.kinds.values() for p in parameters}
        self.rows[id(model.transformer.wte.weight)] = model.config.vocab_size  # what follows is padding
        self.copies, self.stats = {}, defaultdict(dict)  # by the id of the parameter

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, *_) -> None:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            self.schedule = float(group["lr"]) / optimizer.defaults["lr"] if optimizer.defaults["lr"] else None
            for p in group["params"]:
                if id(p) in self.rows and p.grad is not None:
                    gradient, weight = p.grad[: self.rows[id(p)]].float(), torch.linalg.vector_norm(p)
                    self.stats[id(p)] = {
                        "gradient_mean": gradient.mean(),
                        "gradient_std": gradient.std(correction=0),
                        "gradient_ratio": (torch.linalg.vector_norm(gradient) / weight).log10(),
                        "update_ratio": weight,  # until the step is done
                    }
                    self.copies[id(p)] = p.detach().clone()
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, *_) -> None:
        began = time.perf_counter()
        for p in (p for group in optimizer.param_groups for p in group["params"] if id(p) in self.copies):
            update = torch.linalg.vector_norm(self.copies.pop(id(p)).sub_(p))
            self.stats[id(p)]["update_ratio"] = (update / self.stats[id(p)]["update_ratio"]).log10()
        self.seconds += time.perf_counter() - began

    def found(self) -> dict:
        found = {"schedule": self.schedule and float(f"{self.schedule:.3g}")}
        for name in ("update_ratio", "gradient_ratio", "gradient_mean", "gradient_std"):
            nothing = torch.tensor(math.nan)
            values = {
                kind: _numbers([self.stats[id(p)].get(name, nothing) for p in parameters])
                for kind, parameters in self.kinds.items()
            }
            found[name] = values
        return found


@torch.no_grad()
def activations(model: nn.Module, inputs: Tensor, targets: Tensor, autocast: Callable = contextlib.nullcontext) -> dict:
    """The part of a record that a forward pass over inputs and targets, (sequences, T) int64, gives; no dropout."""
    stats = defaultdict(list)

    def attention(name: str, y: Tensor) -> None:
        stats[f"{name}_mean"].append(y.mean())
        stats[f"{name}_std"].append(y.std(correction=0))

    def mlp_hook(mlp: nn.Module, args: tuple, _) -> None:
        z = F.linear(args[0], mlp.c_fc.weight, mlp.c_fc.bias).float()
        stats["gelu_dead"].append((z < DEAD).float().mean())
        attention("gelu", F.gelu(z, approximate="tanh"))

    def attention_hook(_, __, y: Tensor) -> None:
        attention("attention", y.float())

    def entropy_hook(n_head: int, qkv: Tensor) -> None:
        entropy, most = attention_entropy(qkv[:ATTENTION_SEQUENCES], n_head)
        stats["attention_entropy"].append((entropy / most).mean())
        stats["attention_focused"].append((entropy < FOCUSED).float().mean())

    def stream_hook(_, __, output: tuple) -> None:
        stats["residual"].append(output[1].float().square().mean(-1).sqrt().median())

    handles = [model.transformer.ln_f.register_forward_hook(stream_hook)]
    for block in model.transformer.h:
        handles += [norm.register_forward_hook(stream_hook) for norm in (block.ln_1, block.ln_2)]
        handles += [block.mlp.register_forward_hook(mlp_hook), block.attn.register_forward_hook(attention_hook)]
        hook = lambda module, args, qkv, n_head=block.attn.n_head: entropy_hook(n_head, qkv)  # noqa: E731
        handles.append(block.attn.c_attn.register_forward_hook(hook))
    was_training = model.training
    model.eval()
    try:
        with autocast():
            hidden = model.hidden(inputs)
            predictions = predicted(hidden, model.transformer.wte.weight[: model.config.vocab_size], targets)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: _numbers(values) for name, values in stats.items()} | predictions


def attention_entropy(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """
    Entropy of attention weights, in nats, for some of the queries, evenly spread.

    qkv: (B, T, 3C) packed. Returns (B, H, queries) and the most that each query can have, (queries,): ln(keys). Nothing
    where T is too short to say anything: then there are no queries.
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


def predicted(hidden: Tensor, wte: Tensor, targets: Tensor) -> dict:
    """logit_std, entropy, loss, loss_by_position. hidden: (B, T, C), wte: (V, C), targets: (B, T) int64."""
    stds, entropies, losses = [], [], []
    for x, y in zip(hidden, targets, strict=True):  # one sequence at a time: logits are large
        logits = F.linear(x, wte).float()
        log_p = logits.log_softmax(dim=-1)
        stds.append(logits.std(dim=-1, correction=0).mean())
        entropies.append(-(log_p.exp() * log_p).sum(-1).mean())
        losses.append(-log_p.gather(1, y[:, None])[:, 0])
    loss = torch.stack(losses).mean(0)  # (T,)
    bins = [loss[start:end].mean() for start, end in position_bins(len(loss))]
    means = _numbers([torch.stack(values).mean() for values in (stds, entropies, losses)])
    return dict(zip(("logit_std", "entropy", "loss"), means, strict=True)) | {"loss_by_position": _numbers(bins)}


def position_bins(T: int) -> list[tuple[int, int]]:
    """The positions of a block of T, cut at 1, 2, 4, 8, ...: what a context twice as long is worth."""
    edges = [0, *(2**i for i in range(T.bit_length()) if 2**i < T), T]
    return list(zip(edges, edges[1:], strict=False))


def _numbers(values: list[Tensor]) -> list[float | None]:
    """As floats of three digits, in one transfer from the device; None for what is no number."""
    if not values:
        return []
    floats = torch.stack([value.to(values[-1].device) for value in values]).tolist()
    return [float(f"{value:.3g}") if math.isfinite(value) else None for value in floats]


# ---------------------------------------------------------------------------------------------------------- warnings

USUAL_UPDATE = -3.0  # log10 of update / weight: Karpathy's rule of thumb for a step at the peak learning rate
SMALL_UPDATE = -4.5  # 30 times less
LARGE_UPDATE = -0.3  # half of the weight at a step: what was learnt before is gone
PEAK_UPDATE = 0.5  # what it would be at the peak of the schedule: weights grow until then, but not by so much
GRADIENT_SPREAD = 1000.0  # between layers, of the same kind of matrix
MUCH_DEAD = 0.5  # share of a layer's GELU inputs; a unit on the dead side passes next to no gradient
MUCH_FOCUSED = 0.9  # share; entropy collapse: Zhai et al. 2023, https://arxiv.org/abs/2303.06296
GROWTH = 30.0  # of the stream in half a layer; the first MLP of the laptop preset reaches 8
UNTRAINED_GROWTH = 6.0  # the same while nothing is learnt, so from the initialisation; six layers as wide as XL: 4.9
UNTRAINED = 0.9  # share of ln V that the entropy of predictions has when nothing is learnt yet
GUESSING = 0.5  # nats by which the loss may exceed ln V, a uniform guess; fresh and as wide as GPT-2 XL: 0.4
OVERCONFIDENT = 1.0  # nats by which the loss may exceed the entropy: a model that knows what it knows has them equal
LATE_LOSS = 1.0  # nats by which the end of a block, half of it or less, may be worse than as much before it


def warnings(found: dict, vocab_size: int) -> dict[str, str]:
    """What looks wrong in a record, the dict "diagnostics" of a step: kind -> a plain sentence. Empty: nothing does."""
    losses = found["loss_by_position"]
    said = {
        "not_finite": _not_finite(found),
        "updates": _updates(found["update_ratio"], found["schedule"]),
        "gradients": _gradients(found["gradient_std"]),
        "gelu": _share(found, "gelu_dead", MUCH_DEAD, "{:.0%} of layer {}'s GELU inputs are on the dead side"),
        "attention": _share(found, "attention_focused", MUCH_FOCUSED, "{:.0%} of layer {}'s queries look at one key"),
        "residual": _growth(found["residual"], found["entropy"], vocab_size),
    }
    if None not in (found["loss"], found["entropy"], *losses):
        said |= _predictions(found["loss"], found["entropy"], losses, vocab_size)
    return {kind: sentence for kind, sentence in said.items() if sentence}


def _not_finite(found: dict) -> str:
    values = [found["logit_std"], *found["loss_by_position"], *found["residual"]]
    return "activations or predictions are not finite: the weights are lost" if None in values else ""


def _updates(ratios: dict[str, list], schedule: float | None) -> str:
    places = [
        (ratio, i, kind) for kind, layers in ratios.items() for i, ratio in enumerate(layers) if ratio is not None
    ]
    if not places or not schedule:
        return ""
    (low, *lowest), (high, *highest) = min(places), max(places)
    if high > LARGE_UPDATE:
        return f"{_place(*highest)} changes by {10**high:.0%} of its size in one step: the learning rate is too high"
    peak, *highest = max((place for place in places if place[2] in KINDS), default=places[0])
    peak -= math.log10(schedule)
    if peak > PEAK_UPDATE:
        change = f"would change by {10**peak:.0%} of its size in one step"
        return f"at the peak of the schedule {_place(*highest)} {change}: the learning rate is too high"
    low -= math.log10(schedule)
    if low < SMALL_UPDATE:
        times = 10 ** (USUAL_UPDATE - low)
        return f"the updates of {_place(*lowest)} are {times:,.0f} times smaller than its weights warrant"
    return ""


def _gradients(stds: dict[str, list]) -> str:
    for kind, layers in stds.items():
        if any(std == 0 for std in layers):
            return f"{_place(layers.index(0), kind)} gets no gradient at all"
        if layers and None not in layers and max(layers) > GRADIENT_SPREAD * min(layers):
            most, least = layers.index(max(layers)), layers.index(min(layers))
            times = f"{layers[most] / layers[least]:,.0f} times larger than in layer {least}"
            return f"the gradient of {_place(most, kind)} is {times}: gradients vanish or explode on the way"
    return ""


def _share(found: dict, name: str, limit: float, sentence: str) -> str:
    shares = [share or 0.0 for share in found.get(name, [])]
    worst = max(shares, default=0.0)
    others = sum(share > limit for share in shares) - 1
    more = f", and {others} more layer{'s' * (others > 1)} like it" if others > 0 else ""
    return sentence.format(worst, shares.index(worst)) + more if worst > limit else ""


def _growth(residual: list, entropy: float | None, vocab_size: int) -> str:
    if None in residual or entropy is None:
        return ""
    untrained = entropy > UNTRAINED * math.log(vocab_size)
    growths = [after / before if before else 0.0 for before, after in zip(residual, residual[1:], strict=False)]
    worst = max(growths, default=0.0)
    if worst <= (UNTRAINED_GROWTH if untrained else GROWTH):
        return ""
    layer, second = divmod(growths.index(worst), 2)
    remedy = "initialise c_proj smaller" if untrained else "what came before is drowned"
    branch = "MLP" if second else "attention"
    return f"layer {layer}'s {branch} makes the residual stream {worst:.0f} times larger: {remedy}"


def _predictions(loss: float, entropy: float, losses: list[float], vocab_size: int) -> dict[str, str]:
    said, guess = {}, math.log(vocab_size)
    if loss > guess + GUESSING:
        said["guessing"] = f"the loss, {loss:.2f}, is worse than a guess at random, {guess:.2f}"
    if loss > entropy + OVERCONFIDENT:
        said["confidence"] = f"predictions are sure and wrong: loss {loss:.2f}, entropy {entropy:.2f}; logits too large"
    if len(losses) > 1 and losses[-1] > losses[-2] + LATE_LOSS:
        said["position"] = f"the end of a block has loss {losses[-1]:.2f}, its middle {losses[-2]:.2f}: context harms"
    return said


def _place(layer: int, kind: str) -> str:
    return kind if kind in ("wte", "wpe") else f"layer {layer}'s {kind}"


# ------------------------------------------------------------------------------------------------------------ picture

DRAWN = 200  # diagnoses at most, evenly chosen: more lines tell no more and take long
PANELS = {  # in reading order: the name in a record -> what the picture says about it
    "update_ratio": "update / weight, log10",
    "gradient_ratio": "gradient / weight, log10",
    "gradient_std": "gradient: standard deviation",
    "gradient_mean": "gradient: mean",
    "gelu_mean": "GELU output: mean",
    "gelu_std": "GELU output: standard deviation",
    "gelu_dead": f"GELU inputs on the dead side (< {DEAD:g})",
    "residual": "residual stream: RMS by depth",
    "attention_mean": "attention output: mean",
    "attention_std": "attention output: standard deviation",
    "attention_entropy": "attention entropy, share of the most it can be",
    "attention_focused": f"attention on one key (entropy < {FOCUSED:g} nats)",
}
SHARES = ("gelu_dead", "attention_entropy", "attention_focused")  # panels from 0 to 1


def draw(records: list[dict], path: str | Path, title: str = "") -> None:
    """A picture of all diagnoses in `records`, lines of log.jsonl, as the PNG `path`; none where there is none."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    records = [record for record in records if "diagnostics" in record]
    if not records:
        return
    text = _warnings_text(records)
    if len(records) > DRAWN:
        records = [records[round(i * (len(records) - 1) / (DRAWN - 1))] for i in range(DRAWN)]
    steps, found = [record["step"] for record in records], [record["diagnostics"] for record in records]
    by_depth, by_step = colormaps["viridis"], colormaps["plasma"]
    axes = (figure := Figure(figsize=(18, 14), layout="constrained")).subplots(4, 4)
    for axis, (name, label) in zip(axes[:3].flat, PANELS.items(), strict=True):
        if name == "residual":
            _by_depth(axis, steps, found, by_step)
        else:
            _over_steps(axis, steps, found, name, by_depth)
        axis.set_title(label, fontsize=11)
    axes[0, 0].axhline(USUAL_UPDATE, color="red", linestyle="--", linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes[0, 0].annotate("1e-3: usual", (0.99, USUAL_UPDATE), (0, 3), **place, color="red", ha="right", fontsize=9)
    _of_predictions(axes[3], steps, found, by_step)
    axes[3, 3].set_title("warnings", fontsize=11)
    axes[3, 3].axis("off")
    axes[3, 3].text(0, 0.98, text or "none", va="top", fontsize=9, color="darkred" if text else "darkgreen")
    figure.suptitle(title)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=80))


def _over_steps(axis, steps: list[int], found: list[dict], name: str, colours) -> None:
    """A line a layer, dark for the first and bright for the last; dashed: the embeddings."""
    values = [_layers(record[name]) if name in record else [] for record in found]
    n_layer = max(map(len, values))
    for layer in range(n_layer):
        line = [value[layer] if layer < len(value) else math.nan for value in values]
        colour = colours(0.9 * layer / max(1, n_layer - 1))
        labelled = {"label": f"layer {layer}"} if layer in (0, n_layer - 1) else {}
        axis.plot(steps, line, "o-", color=colour, markersize=3, linewidth=1.2, **labelled)
    for kind, style in {"wte": "--", "wpe": ":"}.items():
        if kind in (found[-1].get(name) if isinstance(found[-1].get(name), dict) else {}):
            line = [_float(record[name][kind][0]) for record in found]
            axis.plot(steps, line, style, color="grey", linewidth=1.2, label=kind)
    if name == "gradient_std":
        axis.set_yscale("log")
    if name in SHARES:
        axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


def _by_depth(axis, steps: list[int], found: list[dict], colours) -> None:
    for i, (step, record) in enumerate(zip(steps, found, strict=True)):
        line = [_float(value) for value in record["residual"]]
        ends = {"label": f"step {step:,}"} if i in (0, len(steps) - 1) else {}
        depth = [place / 2 for place in range(len(line))]
        axis.plot(depth, line, "o-", color=colours(0.9 * i / max(1, len(steps) - 1)), markersize=3, **ends)
    axis.set(xlabel="layers passed", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _of_predictions(axes, steps: list[int], found: list[dict], colours) -> None:
    """The last row: spread of the logits, entropy and loss, loss by position."""
    axes[0].plot(steps, [_float(record["logit_std"]) for record in found], "o-", markersize=3)
    axes[0].set_title("logits: standard deviation over the vocabulary", fontsize=11)
    axes[1].plot(steps, [_float(record["entropy"]) for record in found], "o-", markersize=3, label="entropy")
    axes[1].plot(steps, [_float(record["loss"]) for record in found], "o-", markersize=3, label="loss")
    axes[1].set_title("predictions, nats: sure as they are right?", fontsize=11)
    for i, (step, record) in enumerate(zip(steps, found, strict=True)):
        line = [_float(value) for value in record["loss_by_position"]]
        ends = {"label": f"step {step:,}"} if i in (0, len(steps) - 1) else {}
        axes[2].plot(
            range(len(line)), line, "o-", color=colours(0.9 * i / max(1, len(steps) - 1)), markersize=3, **ends
        )
    names = ["0", "1", *(f"{2**i}+" for i in range(1, len(line) - 1))][: len(line)]
    axes[2].set_xticks(range(len(line)), names, fontsize=8)
    axes[2].set_title("loss by position in the block", fontsize=11)
    for axis, label in zip(axes, ("step", "step", "position"), strict=False):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    axes[2].legend(fontsize=8)


def _warnings_text(records: list[dict]) -> str:
    """Of every kind of warning the newest sentence, behind the steps at which it was said."""
    said = defaultdict(list)
    for record in records:
        for kind, sentence in record["diagnostics"]["warnings"].items():
            said[kind].append((record["step"], sentence))
    lines = []
    for cases in said.values():
        when = f"steps {cases[0][0]:,} to {cases[-1][0]:,}" if len(cases) > 1 else f"step {cases[0][0]:,}"
        lines.append(textwrap.fill(f"{when}: {cases[-1][1]}", 52))
    return "\n\n".join(lines)


def _layers(values: dict | list) -> list[float]:
    """One number a layer: as it is, or the median over a layer's kinds of matrices."""
    if isinstance(values, list):
        return [_float(value) for value in values]
    rows = zip(*(values[kind] for kind in KINDS), strict=True)
    return [statistics.median(numbers) if (numbers := [v for v in row if v is not None]) else math.nan for row in rows]


def _float(value: float | None) -> float:
    return math.nan if value is None else value
