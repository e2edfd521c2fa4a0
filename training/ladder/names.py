"""
The ladder of names: 32,033 names, a character at a time, from counted bigrams to GPT-2.

Sources of systems and published losses: A. Karpathy, "Neural Networks: Zero to Hero", 2022 (micrograd and makemore,
parts 1 to 5). The MLP: Bengio et al., "A Neural Probabilistic Language Model", 2003. The tree of convolutions: van den
Oord et al., "WaveNet", 2016. Weights are drawn by other generators than theirs, so the last digits differ.
"""

import functools
import random
from collections.abc import Callable

import numpy as np
import torch
from numpy import ndarray

from model import GPT, GPTConfig
from training.ladder import by_hand
from training.ladder.by_hand import BatchNorm, Embedding, Flatten, Linear, Tanh

URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
BATCH = 32
IGNORED = -100  # target of a position after the end of a name, which GPT's loss leaves out


class Names:
    """The names, encoded: id 0 begins and ends each; train, dev: 80% and the next 10% of them, shuffled."""

    def __init__(self, text: str):
        self.words = text.split()
        characters = "." + "".join(sorted(set("".join(self.words))))
        self.vocab_size, self.ids = len(characters), {c: i for i, c in enumerate(characters)}
        shuffled = self.words[:]
        random.Random(42).shuffle(shuffled)
        n, m = int(0.8 * len(shuffled)), int(0.9 * len(shuffled))
        self.train, self.dev = shuffled[:n], shuffled[n:m]

    def windows(self, words: list[str], block: int) -> tuple[ndarray, ndarray]:
        """Return every character's context and the character itself: (N, block) and (N,) int64."""
        inputs, targets = [], []
        for word in words:
            ids = [0] * block + [self.ids[c] for c in word] + [0]
            inputs += [ids[i : i + block] for i in range(len(word) + 1)]
            targets += ids[block:]
        return np.array(inputs), np.array(targets)

    def rows(self, words: list[str], block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, (names, block) int64, a name each."""
        inputs = torch.zeros(len(words), block, dtype=torch.int64)
        targets = torch.full((len(words), block), IGNORED)
        for row, word in enumerate(words):
            ids = torch.tensor([self.ids[c] for c in word])
            inputs[row, 1 : len(word) + 1] = targets[row, : len(word)] = ids
            targets[row, len(word)] = 0
        return inputs, targets


# ------------------------------------------------------------------------------------------------------------- bigrams


def bigram_counts(names: Names) -> ndarray:
    """Return how often character j follows i, (V, V), over all names."""
    inputs, targets = names.windows(names.words, 1)
    counts = np.zeros((names.vocab_size, names.vocab_size))
    np.add.at(counts, (inputs[:, 0], targets), 1)
    return counts


def counted_bigram(names: Names, steps: int, progress: Callable) -> tuple[int, float]:
    """Return the parameters and loss of the counts' frequencies, without smoothing."""
    counts = bigram_counts(names)
    p = counts / counts.sum(1, keepdims=True)
    seen = counts > 0
    return counts.size, float(-(counts[seen] * np.log(p[seen])).sum() / counts.sum())


def learned_bigram(names: Names, steps: int, progress: Callable) -> tuple[int, float]:
    """Return the parameters and loss of a table of logits after gradient descent on all bigrams at once."""
    counts, logits = bigram_counts(names), np.random.default_rng(0).standard_normal((names.vocab_size,) * 2)
    for _ in progress(steps):
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        loss = float(-(counts * np.log(p)).sum() / counts.sum())
        logits -= 50.0 * (counts.sum(1, keepdims=True) * p - counts) / counts.sum()
    return logits.size, loss


# ------------------------------------------------------------------------------------------- networks trained by hand


def mlp(rng: np.random.Generator, V: int, block: int, scales: tuple[float, ...], norm: bool = False) -> list:
    """Return Bengio's MLP: 10 channels, 200 hidden units. scales: of w1, b1, w2 and b2 at the start."""
    w1, b1, w2, b2 = (np.float32(scale) for scale in scales)
    draw, C, H = functools.partial(rng.standard_normal, dtype=np.float32), 10, 200
    first = [w1 * draw((block * C, H))] if norm else [w1 * draw((block * C, H)), b1 * draw(H)]
    batch_norm = [BatchNorm(np.ones(H, np.float32), np.zeros(H, np.float32))] if norm else []
    last = Linear(w2 * draw((H, V)), b2 * draw(V))
    return [Embedding(draw((V, C))), Flatten(block), Linear(*first), *batch_norm, Tanh(), last]


def wavenet(rng: np.random.Generator, V: int, C: int, H: int, per_position: bool = False) -> list:
    """Return a tree over 8 characters, pairs first. C: channels of a character, H: of inner nodes."""
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    layers = [Embedding(draw((V, C)))]
    for n in (2 * C, 2 * H, 2 * H):
        norm = BatchNorm(np.ones(H, np.float32), np.zeros(H, np.float32), per_position)
        layers += [Flatten(2), Linear(draw((n, H)) * np.float32(n**-0.5)), norm, Tanh()]
    return [*layers, Linear(draw((H, V)) * np.float32(0.1 * H**-0.5), np.zeros(V, np.float32))]


RAW, LOGITS, TANH = (1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 0.01, 0.0), (0.2, 0.01, 0.01, 0.0)


def kaiming(block: int) -> tuple[float, ...]:
    """Return scales that keep the variance through tanh: gain 5/3 over the root of the inputs."""
    return 5 / 3 / (10 * block) ** 0.5, 0.0, 0.01, 0.0


NETWORKS = {  # name -> characters of context, and how to build it from a generator and V
    "mlp": (3, lambda rng, V: mlp(rng, V, 3, RAW)),
    "scaled-logits": (3, lambda rng, V: mlp(rng, V, 3, LOGITS)),
    "scaled-tanh": (3, lambda rng, V: mlp(rng, V, 3, TANH)),
    "batch-norm": (3, lambda rng, V: mlp(rng, V, 3, kaiming(3), norm=True)),
    "context-8": (8, lambda rng, V: mlp(rng, V, 8, kaiming(8), norm=True)),
    "wavenet-wrong": (8, lambda rng, V: wavenet(rng, V, 10, 68, per_position=True)),
    "wavenet": (8, lambda rng, V: wavenet(rng, V, 10, 68)),
    "wavenet-wide": (8, lambda rng, V: wavenet(rng, V, 24, 128)),
}


def network(name: str, names: Names, steps: int, progress: Callable) -> tuple[int, float]:
    """Train NETWORKS[name]; the rate falls from 0.1 to 0.01 for the last quarter. Return parameters and dev loss."""
    block, build = NETWORKS[name]
    rng = np.random.default_rng(0)
    layers = build(rng, names.vocab_size)
    inputs, targets = names.windows(names.train, block)
    for step in progress(steps):
        chosen = rng.integers(0, len(inputs), BATCH)
        by_hand.descend(layers, inputs[chosen], targets[chosen], 0.1 if step < 0.75 * steps else 0.01)
    inputs, targets = names.windows(names.dev, block)
    loss, _ = by_hand.cross_entropy(by_hand.forward(layers, inputs), targets)
    return sum(p.size for layer in layers for p in layer.parameters), loss


# ----------------------------------------------------------------------------------------------------------------- GPT


def gpt(names: Names, steps: int, progress: Callable) -> tuple[int, float]:
    """Train model.py's GPT, 4 layers x 64 channels, a name per sequence. Return its parameters and dev loss."""
    generator, block = torch.Generator().manual_seed(0), 1 + max(map(len, names.words))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=64, block_size=block, vocab_size=names.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100, 1.0 - step / steps))
    inputs, targets = names.rows(names.train, block)
    for _ in progress(steps):
        chosen = torch.randint(len(inputs), (BATCH,), generator=generator)
        model(inputs[chosen], targets[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return model.parameter_count(), model(*names.rows(names.dev, block)).item()
