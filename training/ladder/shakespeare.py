"""
The ladder of tiny Shakespeare: what each part of a GPT adds, at 32 channels and 8 characters of context.

model.py is GPT-2 and nothing else, so the systems before it stand here. Source of systems and published losses:
A. Karpathy, "Let's build GPT", 2023, and the code beside it. Weights are drawn as PyTorch draws them by default.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, T, BATCH = 32, 8, 32  # channels, characters of context, sequences
PARTS = {  # name -> heads and blocks, feed-forward layer, residual connections, layer norm
    "one-head": (1, 1, False, False, False),
    "four-heads": (4, 1, False, False, False),
    "feed-forward": (4, 3, True, False, False),
    "residual": (4, 3, True, True, False),
    "layer-norm": (4, 3, True, True, True),
}


class Attention(nn.Module):
    """Causal self-attention; with `project`, a linear layer after it."""

    def __init__(self, heads: int, project: bool):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(C, 3 * C, bias=False)
        self.project = nn.Linear(C, C) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Return (B, T, C)."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and, if asked for, a feed-forward layer (4C wide beside residual connections), norms before both."""

    def __init__(self, heads: int, feed_forward: bool, residual: bool, norm: bool):
        super().__init__()
        self.residual = residual
        wide = [nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C)]
        mlp = wide if residual else [nn.Linear(C, C), nn.ReLU()]
        branches = [[Attention(heads, residual)], mlp if feed_forward else []]
        norms = [nn.LayerNorm(C)] if norm else []
        self.branches = nn.ModuleList(nn.Sequential(*norms, *branch) for branch in branches if branch)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Return (B, T, C)."""
        for branch in self.branches:
            x = x + branch(x) if self.residual else branch(x)
        return x


class Parts(nn.Module):
    """A language model of V characters made of the parts asked for."""

    def __init__(self, V: int, heads: int, blocks: int, feed_forward: bool, residual: bool, norm: bool):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        layers = [Block(heads, feed_forward, residual, norm) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, *([nn.LayerNorm(C)] if norm else []), nn.Linear(C, V))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64. Return logits, (B, T, V)."""
        return self.layers(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]])


def encode(text: str) -> tuple[Tensor, Tensor, int]:
    """Return the first 90% of the text as ids, the rest, and the number of different characters."""
    characters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[c] for c in text])
    n = int(0.9 * len(ids))
    return ids[:n], ids[n:], len(characters)


def train(name: str, text: str, steps: int, progress: Callable) -> tuple[int, float]:
    """Train "bigram" or one of PARTS with AdamW. Return its parameters and its loss on the whole validation text."""
    data, val, V = encode(text)
    generator = torch.Generator().manual_seed(1337)
    with torch.random.fork_rng():
        torch.manual_seed(1337)
        model = nn.Embedding(V, V) if name == "bigram" else Parts(V, *PARTS[name])
    lr = 1e-2 if name == "bigram" else 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    for _ in progress(steps):
        window = data[torch.randint(len(data) - T, (BATCH, 1), generator=generator) + torch.arange(T + 1)]
        loss(model, window).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        windows = val.unfold(0, T + 1, T)
        total = sum(loss(model, part).item() * len(part) for part in windows.split(4096))
    return sum(p.numel() for p in model.parameters()), total / len(windows)


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss in nats per character. windows: (B, T + 1) int64."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
