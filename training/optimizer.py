"""
Parameter groups, the learning-rate schedule, AdamW, and Muon for the blocks' matrices.

One step of Muon for a matrix W (n, m), with gradient G, momentum M, learning rate lr and weight decay wd:

    M = mu M + (1 - mu) G                                  mu = 0.95
    U = mu M + (1 - mu) G                                  Nesterov's look ahead
    O = orthogonalize(U)                                   U's singular vectors, every singular value near 1
    W = (1 - lr wd) W - lr 0.2 sqrt(max(n, m)) O           an update of RMS 0.2, about AdamW's: one --lr serves both

c_attn stacks three matrices, for queries, keys and values. Each is orthogonalized alone: together, the largest would
decide how far the others move. --lr is Muon's rate, --adamw-lr that of the parameters that AdamW trains beside it.

Three parts of --muon change this:

    momentum    mu rises from 0.85 to 0.95 in the first tenth of the steps, and falls back in the last fiftieth
    decay       wd falls to zero with the learning rate, spares embeddings, and shrinks an element only if the
                update shrinks it too ("cautious")
    variance    V = 0.95 V + 0.05 (mean square of O over its shorter side); O = O / sqrt(V), at the norm it had

Sources: Jordan et al., "Muon", 2024, https://kellerjordan.github.io/posts/muon; the scale of the update from Liu et
al., "Muon is Scalable for LLM Training", 2025, https://arxiv.org/abs/2502.16982; the variance from Li et al.,
"NorMuon", 2025, https://arxiv.org/abs/2510.05491; cautious decay from Chen et al., "Cautious Weight Decay", 2025,
https://arxiv.org/abs/2510.12402; the schedule of the momentum from https://github.com/KellerJordan/modded-nanogpt.
"""

import collections
import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training import devices
from training.distributed import Distributed

BETAS = (0.9, 0.95)  # AdamW's, from GPT-3
MOMENTUM = (0.85, 0.95)  # Muon's, at the ends of its schedule and between them
MOMENTUM_RISE, MOMENTUM_FALL = 0.1, 0.02  # fractions of the steps
VARIANCE_BETA = 0.95
MUON_PARTS = ("momentum", "decay", "variance")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c: a steep slope at 0 lifts small singular values in few iterations
ITERATIONS = 5  # take singular values from 0.01 up to between 0.68 and 1.14

# ------------------------------------------------------------------------------------------------------- learning rate


def learning_rate(step: int, config) -> float:
    """
    Return the learning rate at step 1 to max_steps: linear warmup to --lr, then decay to --min-lr at the last step.

    cosine decays from the end of the warmup; linear stays flat until the last --decay-fraction of the steps.
    config: the run's options (train_gpt2.Config)
    """
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "linear":
        start = max(config.warmup_steps, config.max_steps * (1 - config.decay_fraction))
    else:
        start = config.warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, config.max_steps - start)))
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return low + (config.lr - low) * left


def mean_learning_rate(config) -> float:
    """Return the mean of `learning_rate` over a run's steps. config: train_gpt2.Config"""
    return sum(learning_rate(step, config) for step in range(1, config.max_steps + 1)) / config.max_steps


def momentum(step: int, max_steps: int) -> float:
    """Return Muon's momentum at step 1 to max_steps: it rises at first and falls at the end."""
    low, high = MOMENTUM
    return low + (high - low) * min(
        1.0, step / (MOMENTUM_RISE * max_steps), (max_steps - step) / (MOMENTUM_FALL * max_steps)
    )


def set_schedules(optimizer: torch.optim.Optimizer, step: int, config) -> None:
    """Set the groups' learning rate, momentum and weight decay for this step. config: train_gpt2.Config"""
    rate, parts = learning_rate(step, config), muon_parts(config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
        if "momentum" in parts and "momentum" in group:
            group["momentum"] = momentum(step, config.max_steps)
        if "decay" in parts and "momentum" in group:
            group["weight_decay"] = config.weight_decay * rate / config.lr


def muon_parts(config) -> tuple[str, ...]:
    """Return the parts that --muon names. config: train_gpt2.Config. Raise ValueError for an unknown one."""
    if config.optimizer != "muon" or config.muon == "none":
        return ()
    parts = MUON_PARTS if config.muon == "all" else tuple(config.muon.split(","))
    if unknown := [part for part in parts if part not in MUON_PARTS]:
        raise ValueError(f"--muon {config.muon}: {unknown[0]!r} is not all, none, or some of {','.join(MUON_PARTS)}")
    return parts


# ---------------------------------------------------------------------------------------------------- parameter groups


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float, lr_ratio: float = 1.0) -> list[dict]:
    """
    Return two groups: matrices decay; biases and layer norms, which set offsets and scales, do not.

    lr_ratio: the groups' learning rate, as a multiple of `learning_rate`'s
    """
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay, "lr_ratio": lr_ratio},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr_ratio": lr_ratio},
    ]


def make_optimizers(model: nn.Module, config, dist: Distributed, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """
    Return AdamW for every parameter; with --optimizer muon, Muon for the blocks' matrices and AdamW for the rest.

    config: the run's options (train_gpt2.Config), which refuses Muon for a model without blocks
    dtype:  of the run's matrix products; Muon takes it unless the hardware only emulates it
    """
    device = next(model.parameters()).device
    adamw = {"lr": config.lr, "betas": BETAS, "fused": device.type in ("cpu", "cuda")}
    if config.optimizer == "adamw":
        groups = parameter_groups(model.parameters(), config.weight_decay)
        return [dist.optimizer(torch.optim.AdamW, groups, **adamw)]
    matrices = {name: p for name, p in model.transformer.h.named_parameters() if p.dim() == 2}
    chosen = {id(p) for p in matrices.values()}
    others = [p for p in model.parameters() if id(p) not in chosen]
    parts = muon_parts(config)
    decay = 0.0 if "decay" in parts else config.weight_decay
    rest = parameter_groups(others, decay, (config.adamw_lr or config.lr) / config.lr)
    hidden = [
        {"params": [p for name, p in matrices.items() if name.endswith("c_attn.weight")], "split": 3, "lr_ratio": 1.0},
        {"params": [p for name, p in matrices.items() if not name.endswith("c_attn.weight")], "lr_ratio": 1.0},
    ]
    fast = dtype if dtype == devices.choose_dtype("auto", device) else torch.float32
    kind = functools.partial(Muon, dtype=fast, cautious="decay" in parts, variance="variance" in parts)
    muon = dist.optimizer(kind, hidden, lr=config.lr, weight_decay=config.weight_decay)
    return [muon, dist.optimizer(torch.optim.AdamW, rest, **adamw)]


# ---------------------------------------------------------------------------------------------------------------- Muon


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update is orthogonalized, for float32 matrices.

    Updates are independent per matrix, so ZeroRedundancyOptimizer can divide matrices and momenta among the ranks.

    params: matrices (n, m), or groups of them; a group's "split" is the number of matrices stacked in each of
            its parameters, (split n, m), 1 by default
    dtype:  of the products in `orthogonalize`: bfloat16 costs little accuracy, and pays off if the hardware has it
    cautious, variance: see the top of this file
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float,
        dtype=torch.float32,
        cautious: bool = False,
        variance: bool = False,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM[1], "split": 1})
        self.dtype, self.cautious, self.variance = dtype, cautious, variance

    @torch.no_grad()
    def step(self, closure=None) -> None:
        # matrices with equal short and long sides share one batched product: the laptop preset makes two batches
        batches = collections.defaultdict(list)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients, mu, split = [p.grad for p in parameters], group["momentum"], group["split"]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    if self.variance:
                        self.state[p]["variance"] = p.new_zeros(long_sides(p, split))
            momenta = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - mu)
            updates = torch._foreach_lerp(gradients, momenta, mu)
            for p, update in zip(parameters, updates, strict=True):
                variances = self.state[p]["variance"].chunk(split) if self.variance else [None] * split
                for weight, u, v in zip(p.chunk(split), update.chunk(split), variances, strict=True):
                    if u.shape[0] >= u.shape[1]:
                        weight, u = weight.T, u.T
                    batches[*u.shape, group["lr"], group["weight_decay"]].append((weight, u, v))
        for (_, long, lr, weight_decay), rows in batches.items():
            weights, updates, variances = zip(*rows, strict=True)
            directions = orthogonalize(torch.stack(updates), self.dtype)
            if self.variance:
                directions = normalize(directions, variances)
            directions = directions.unbind()
            if self.cautious:
                shrinks = [torch.mul(d, w).gt_(0).mul_(w) for d, w in zip(directions, weights, strict=True)]
                torch._foreach_add_(weights, shrinks, alpha=-lr * weight_decay)
            else:
                torch._foreach_mul_(weights, 1 - lr * weight_decay)
            torch._foreach_add_(weights, directions, alpha=-lr * 0.2 * math.sqrt(long))


def long_sides(p: Tensor, split: int) -> int:
    """Return the elements of a parameter's variance: the longer side of each of the matrices stacked in it."""
    return split * max(p.shape[0] // split, p.shape[1])


def normalize(directions: Tensor, variances: list[Tensor]) -> Tensor:
    """
    Divide every column by the root of its mean square, averaged over the steps; each matrix keeps its norm.

    directions: (batch, n, m) float32, n <= m: orthogonal rows, so that only the columns differ in size
    variances:  a running mean (m,) per matrix, which this step joins
    """
    torch._foreach_lerp_(variances, directions.square().mean(1).unbind(), 1 - VARIANCE_BETA)
    scaled = directions * torch.stack(variances).clamp(min=1e-20).rsqrt()[:, None]
    return scaled * (directions.norm(dim=(1, 2), keepdim=True) / scaled.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Bring the singular values of each matrix close to 1 by Newton-Schulz iteration.

    An iteration X <- a X + b (X X^T) X + c (X X^T)^2 X keeps the singular vectors and takes each singular value s to
    a s + b s^3 + c s^5. Divided by its Frobenius norm, a matrix starts with singular values of at most 1.

    matrices: (batch, n, m) float32, n <= m, so that X X^T is the smaller of the two Gram matrices
    dtype:    of the products
    Return (batch, n, m) float32.
    """
    a, b, c = NEWTON_SCHULZ
    X = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)  # a gradient of 0 stays 0
    for _ in range(ITERATIONS):
        gram = torch.bmm(X, X.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, polynomial, X, beta=a)
    return X.float()
