"""The losses of n-gram counts, as baselines for a model.

An n-gram is n tokens in a row. With c(...) the count in the training text, V the vocabulary size, and add-one
smoothing so that nothing is impossible:

    P(z | context) = (c(context, z) + 1) / (c(context) + V)

The context is empty (unigram), the previous token (bigram) or the previous two (trigram), and c(context) counts its
occurrences that a token follows. The baseline is the mean of -ln P over the n-grams of the validation text, in nats
per token, end-of-text tokens included; `uniform`, guessing at random, is ln V. With a vocabulary as large as GPT-2's,
most trigrams of the validation text are unseen, add-one gives them about 1 / V, and the trigram is worse than the
bigram.

Only the n-grams of the validation text are looked up, and the training text is read in pieces, so memory does not grow
with V^n or with the training text. For a large dataset, only the first `tokens_counted` tokens are counted.
"""

import math

import numpy as np

ORDERS = ("unigram", "bigram", "trigram")
TRAIN_TOKENS = 50_000_000  # counted at most: with the validation tokens, under a minute on one core
VAL_TOKENS = 2_000_000
PIECE_TOKENS = 1 << 20


def measure(train, val, vocab_size: int) -> dict:
    """Return the baselines of a dataset: {"uniform", "unigram", "bigram", "trigram": nats per token, "tokens_counted"}.

    train, val: objects with n_tokens and read(start, count), as shards.Split. An order is left out if a split has
    fewer than n tokens or V^n does not fit into 64 bits.
    """
    n_train, n_val = min(train.n_tokens, TRAIN_TOKENS), min(val.n_tokens, VAL_TOKENS)
    found = {"uniform": math.log(vocab_size)}
    text = val.read(0, n_val)
    for n, name in enumerate(ORDERS, start=1):
        if min(n_train, n_val) >= n and vocab_size**n < 2**63:
            found[name] = _loss(train, n_train, text, n, vocab_size)
    return found | {"tokens_counted": {"train": n_train, "val": n_val}}


def _loss(train, n_train: int, text: np.ndarray, n: int, V: int) -> float:
    """Return the mean of -ln P over the n-grams of `text`, (m,) int64, from the first n_train training tokens."""
    ngrams, times = np.unique(_ngrams(text, n, V), return_counts=True)
    contexts, context_of = np.unique(ngrams // V, return_inverse=True)
    ngram_counts, context_counts = np.zeros(len(ngrams)), np.zeros(len(contexts))
    for start in range(0, n_train - n + 1, PIECE_TOKENS):
        piece = train.read(start, min(PIECE_TOKENS + n - 1, n_train - start))
        seen, count = np.unique(_ngrams(piece, n, V), return_counts=True)
        ngram_counts += _look_up(ngrams, seen, count)
        context_counts += _look_up(contexts, seen // V, count)
    nats = np.log(context_counts[context_of] + V) - np.log(ngram_counts + 1)
    return float(times @ nats / times.sum())


def _ngrams(tokens: np.ndarray, n: int, V: int) -> np.ndarray:
    """Pack every n-gram of (m,) int64 tokens into one integer, with its tokens as digits in base V: (m - n + 1,)."""
    packed = tokens[: len(tokens) - n + 1]
    for i in range(1, n):
        packed = packed * V + tokens[i : len(tokens) - n + 1 + i]
    return packed


def _look_up(wanted: np.ndarray, seen: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return how often each integer of `wanted`, sorted, is in `seen`, whose i-th element counts count[i] times."""
    place = np.minimum(np.searchsorted(wanted, seen), len(wanted) - 1)
    hit = wanted[place] == seen
    return np.bincount(place[hit], weights=count[hit], minlength=len(wanted))
