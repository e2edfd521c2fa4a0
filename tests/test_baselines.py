"""data/baselines.py, and how a dataset carries what it measures."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from data import baselines
from data.files import UserError
from data.shards import open_split, write_dataset, write_meta
from data.tokenizer import CharTokenizer

LETTERS = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz", documents=True)


class Tokens:
    """A text in memory that is read as a split is."""

    def __init__(self, tokens):
        self.tokens, self.n_tokens = np.asarray(tokens, np.int64), len(tokens)

    def read(self, start, count):
        assert 0 <= start <= start + count <= self.n_tokens
        return self.tokens[start : start + count]


def by_hand(train, val, n, V):
    """The formula, token by token, with dictionaries."""
    grams = Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
    contexts = Counter(tuple(train[i : i + n - 1]) for i in range(len(train) - n + 1))
    tested = [tuple(val[i : i + n]) for i in range(len(val) - n + 1)]
    return sum(-math.log((grams[g] + 1) / (contexts[g[:-1]] + V)) for g in tested) / len(tested)


@pytest.mark.parametrize("V, piece", [(2, 1), (3, 7), (65, 50), (70_000, 1 << 20), (2_000_000, 64)])
def test_the_counts_are_those_of_the_formula_whatever_the_pieces(monkeypatch, V, piece):
    monkeypatch.setattr(baselines, "PIECE_TOKENS", piece)
    random = np.random.default_rng(0)
    train, val = (np.minimum(random.zipf(1.3, size) - 1, V - 1).tolist() for size in (300, 100))
    found = baselines.measure(Tokens(train), Tokens(val), V)
    assert list(found) == ["uniform", "unigram", "bigram", "trigram", "tokens_counted"]
    for n, name in enumerate(baselines.ORDERS, start=1):
        assert found[name] == pytest.approx(by_hand(train, val, n, V), rel=1e-12)
    assert found["uniform"] == math.log(V) and found["tokens_counted"] == {"train": 300, "val": 100}


def test_the_probabilities_of_all_next_tokens_sum_to_one():
    train, V = [0, 1, 2, 0, 1, 1, 0, 2, 2, 0, 1], 4
    for context in ([0], [2], [3], [0, 1], [3, 3]):
        name = baselines.ORDERS[len(context)]
        losses = [baselines.measure(Tokens(train), Tokens([*context, z]), V)[name] for z in range(V)]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0), context


def test_a_large_dataset_is_counted_in_part_and_says_so(monkeypatch):
    monkeypatch.setattr(baselines, "TRAIN_TOKENS", 40)
    monkeypatch.setattr(baselines, "VAL_TOKENS", 10)
    random = np.random.default_rng(1)
    train, val = random.integers(5, size=100), random.integers(5, size=30)
    found = baselines.measure(Tokens(train), Tokens(val), 5)
    assert found == baselines.measure(Tokens(train[:40]), Tokens(val[:10]), 5)
    assert found["tokens_counted"] == {"train": 40, "val": 10}


def test_what_cannot_be_counted_is_left_out():
    assert "bigram" not in baselines.measure(Tokens([0, 1, 0]), Tokens([1]), 2)
    assert "trigram" not in baselines.measure(Tokens([0, 1]), Tokens([1, 0, 1]), 2)
    assert [*baselines.measure(Tokens([0, 1, 0, 1]), Tokens([1, 0, 1]), 1 << 21)][-2] == "bigram"


def test_a_dataset_carries_its_baselines_and_both_splits_show_them(tmp_path):
    documents = [np.array([26, 0, 1, 2, 0, 1]), np.array([26, 0, 1, 3])]
    meta = write_dataset(tmp_path, LETTERS, {"train": documents, "val": documents[1:]}, shard_tokens=3)
    train, val = (open_split(tmp_path, split) for split in ("train", "val"))
    assert train.baselines == val.baselines == meta["baselines"] == baselines.measure(train, val, 27)
    text = np.concatenate(documents).tolist()
    assert val.baselines["trigram"] == pytest.approx(by_hand(text, documents[1].tolist(), 3, 27))


def test_datasets_without_baselines_are_read_as_before(tmp_path):
    write_dataset(tmp_path, LETTERS, {"train": [np.arange(9)], "val": [np.arange(9)]})
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text("utf-8"))
    del meta["baselines"]
    path.write_text(json.dumps(meta), encoding="utf-8")
    assert open_split(tmp_path, "val").baselines == {}
    path.write_text(json.dumps(meta | {"baselines": 3}), encoding="utf-8")
    with pytest.raises(UserError, match="meta.json is corrupt: baselines is 3.*prepare the dataset again"):
        open_split(tmp_path, "val")


def test_meta_json_is_not_written_over_a_missing_shard(tmp_path):
    meta = write_dataset(tmp_path, LETTERS, {"train": [np.arange(9)], "val": [np.arange(9)]})
    (tmp_path / "meta.json").unlink()
    (tmp_path / "val_000000.npy").unlink()
    with pytest.raises(UserError, match="val_000000.npy is missing"):
        write_meta(tmp_path, LETTERS, meta["shards"])
    assert not (tmp_path / "meta.json").exists()
