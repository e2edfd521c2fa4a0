"""Measure a training step: activations, gradients, updates, predictions."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.diagnostics import distributions
from training.diagnostics.alarms import KINDS, find_warnings

SEQUENCES = 16  # of the batch, for the activations
ATTENTION_SEQUENCES, ATTENTION_QUERIES = 4, 64  # for the entropy, which needs a row of weights per query
FIRST_QUERY = 8  # queries that see fewer keys say little about focus
DEAD, FOCUSED = -3.0, 0.1  # see gelu_dead and attention_focused above


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
