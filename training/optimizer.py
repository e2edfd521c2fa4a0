"""
Parameter groups, the learning-rate schedule, AdamW, and Muon for the blocks' matrices.

One step of Muon for a matrix W (n, m), with gradient G, momentum M, learning rate lr and weight decay wd:

    M = 0.95 M + 0.05 G
    U = 0.95 M + 0.05 G                                    Nesterov's look ahead
    O = orthogonalize(U)                                   U's singular vectors, every singular value near 1
    W = (1 - lr wd) W - lr 0.2 sqrt(max(n, m)) O           an update of RMS 0.2, about AdamW's: one --lr serves both

c_attn stacks three matrices, for queries, keys and values. Each is orthogonalized alone: together, the largest would
decide how far the others move. --lr is Muon's rate, --adamw-lr that of the parameters that AdamW trains beside it.

Sources: Jordan et al., "Muon", 2024, https://kellerjordan.github.io/posts/muon; the scale of the update from Liu et
al., "Muon is Scalable for LLM Training", 2025, https://arxiv.org/abs/2502.16982.
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
MOMENTUM = 0.95  # Muon's
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
    rest = parameter_groups(others, config.weight_decay, (config.adamw_lr or config.lr) / config.lr)
    hidden = [
        {"params": [p for name, p in matrices.items() if name.endswith("c_attn.weight")], "split": 3, "lr_ratio": 1.0},
        {"params": [p for name, p in matrices.items() if not name.endswith("c_attn.weight")], "lr_ratio": 1.0},
    ]
    fast = dtype if dtype == devices.choose_dtype("auto", device) else torch.float32
    muon = dist.optimizer(functools.partial(Muon, dtype=fast), hidden, lr=config.lr, weight_decay=config.weight_decay)
    return [muon, dist.optimizer(torch.optim.AdamW, rest, **adamw)]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, horizon: int) -> None:
    """
    Move the exponential average of a model's weights to those after `step`; up to step `horizon`, the plain average.

    While --min-lr is above 0, single steps are noise: their average is better than the last of them.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 / min(step, horizon))


# ---------------------------------------------------------------------------------------------------------------- Muon


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update is orthogonalized, for float32 matrices.

    Updates are independent per matrix, so ZeroRedundancyOptimizer can divide matrices and momenta among the ranks.

    params: matrices (n, m), or groups of them; a group's "split" is the number of matrices stacked in each of
            its parameters, (split n, m), 1 by default
    dtype:  of the products in `orthogonalize`: bfloat16 costs little accuracy, and pays off if the hardware has it
    """

    def __init__(self, params, lr: float, weight_decay: float, dtype: torch.dtype = torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "split": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        # matrices with equal short and long sides share one batched product: the laptop preset makes two batches
        batches = collections.defaultdict(list)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(parameters, updates, strict=True):
                for weight, u in zip(p.chunk(group["split"]), update.chunk(group["split"]), strict=True):
                    tall = u.shape[0] > u.shape[1]
                    pair = (weight.T, u.T) if tall else (weight, u)
                    batches[*pair[0].shape, group["lr"]].append(pair)
        for (_, long, lr), pairs in batches.items():
            weights, updates = zip(*pairs, strict=True)
            directions = orthogonalize(torch.stack(updates), self.dtype)
            torch._foreach_add_(weights, directions.unbind(), alpha=-lr * 0.2 * math.sqrt(long))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Bring the singular values of each matrix close to 1 by Newton-Schulz iteration.

    An iteration X <- a X + b (X X^T) X + c (X X^T)^2 X keeps the singular vectors and takes each singular value s to
    a s + b s^3 + c s^5. Divided by its Frobenius norm, a matrix starts with singular values of at most 1.

    Long matrices take the same product of five small matrices P = a + b X X^T + c (X X^T)^2 and X in another order: the
    small ones first. Only in float32, since X X^T in bfloat16 or TF32 does not resolve small singular values.

    matrices: (batch, n, m) float32, n <= m, so that X X^T is the smaller of the two Gram matrices
    dtype:    of the products
    Return (batch, n, m) float32.
    """
    a, b, c = NEWTON_SCHULZ
    X = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)  # a gradient of 0 stays 0
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"  # neither bfloat16 nor TF32
    if exact and X.shape[2] >= 2 * X.shape[1]:
        gram = torch.bmm(X, X.mT)
        product = torch.eye(X.shape[1], device=X.device).expand_as(gram)
        for _ in range(ITERATIONS):
            P = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            P.diagonal(dim1=1, dim2=2).add_(a)
            product = torch.bmm(P, product)
            gram = torch.bmm(torch.bmm(P, gram), P)  # of the next X, P X
        return torch.bmm(product, X)
    for _ in range(ITERATIONS):
        gram = torch.bmm(X, X.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, polynomial, X, beta=a)
    return X.float()
