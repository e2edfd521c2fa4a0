"""data/chat.py, and what training and sampling make of it: dialogues, of which only the responses count."""

import io
import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import command, train

import sample
import train_gpt2
from data import chat, shards
from data.files import UserError
from data.loader import IGNORED, Loader, evaluation_windows, read_windows
from data.text import training_documents
from data.tokenizer import choose
from training import setup
from training.diagnostics.measure import measure_predictions
from training.distributed import Distributed

WORDS = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
random.Random(0).shuffle(WORDS)


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of reversed words, a dialogue each; every tenth is held out."""
    folder = tmp_path_factory.mktemp("chat")
    file = write(folder / "words.jsonl", *({"prompt": word, "response": word[::-1]} for word in WORDS))
    chat.prepare(file, folder, "char")
    return folder


def test_only_responses_and_their_ends_are_scored():
    tokenizer = choose("char", "User: hi?\nAssistant: yes no", documents=True)
    ids, scored = chat.encode(tokenizer, ["hi?", "yes", "no?", "no"])
    assert tokenizer.decode(ids[scored]) == " yes\n no\n"  # as a character tokenizer shows the end of text
    assert tokenizer.decode(ids[~scored]) == "User: hi?\nAssistant:User: no?\nAssistant:"


def test_a_dataset_carries_its_marks_into_the_targets(folder):
    split = shards.open_split(folder, "train")
    split.verify()
    tokens, marks = np.load(folder / "train_000000.npy"), np.load(folder / "train_000000.scored.npy")
    assert split.partly_scored and split.baselines == {} and 0 < marks.mean() < 0.4
    inputs, targets = read_windows(split, [0, 31], 60)
    for row, start in enumerate((0, 31)):
        assert inputs[row].tolist() == tokens[start : start + 60].tolist()
        assert targets[row].tolist() == np.where(marks, tokens.astype(int), IGNORED)[start + 1 : start + 61].tolist()
    assert Loader(split, 60, 4, seed=1).batch(0)[0].min() >= 0


def test_corrupt_marks_are_found(folder, tmp_path):
    words = folder / "words.jsonl"
    chat.prepare(words, tmp_path, "char")
    path = tmp_path / "train_000000.scored.npy"
    marks = np.load(path)
    before = shards.open_split(tmp_path, "train").fingerprint
    np.save(path, ~marks)
    with pytest.raises(UserError, match="train_000000.scored.npy is corrupt"):
        shards.open_split(tmp_path, "train").verify()
    for content, complaint in ((marks[1:], "holds bool"), (marks.astype(np.uint8), "holds uint8")):
        np.save(path, content)
        with pytest.raises(UserError, match=complaint):
            shards.open_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match="scored.npy is missing"):
        shards.open_split(tmp_path, "train")
    write(tmp_path / "other.jsonl", {"turns": ["ab", "c"]}, {"prompt": "a", "response": "bc"})
    chat.prepare(tmp_path / "other.jsonl", tmp_path, "char")
    assert shards.open_split(tmp_path, "train").fingerprint != before


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        '{"prompt": "a"}',
        '{"prompt": "a", "response": 1}',
        '{"turns": ["a"]}',
        '{"turns": "ab"}',
        "[" * 99999,
    ],
    ids=range(7),
)
def test_a_line_that_is_no_dialogue_is_named(tmp_path, line):
    file = tmp_path / "x.jsonl"
    file.write_text(f'{{"prompt": "a", "response": "b"}}\n\n{line}\n', "utf-8")
    with pytest.raises(UserError, match=r"x.jsonl, line 3, is no dialogue: it needs a prompt and a response"):
        chat.prepare(file, tmp_path / "out", "char")
    assert not (tmp_path / "out").exists()


def test_one_dialogue_is_too_few(tmp_path):
    with pytest.raises(UserError, match="has 1 dialogues: give at least two"):
        chat.prepare(write(tmp_path / "x.jsonl", {"prompt": "a", "response": "b"}), tmp_path / "out", "char")


def test_the_loss_is_the_mean_over_scored_tokens_whatever_the_micro_batches(folder, tmp_path):
    # sequences of 8 tokens: some micro-batches of one have no scored token at all
    words = command(folder, tmp_path / "run", block_size=8, batch_tokens=64, micro_batch=1, eval_tokens=400)
    config, dist = train_gpt2.parse(words), Distributed()
    data = setup.open_data(config, dist)
    trainer = train_gpt2.make_trainer(config, data, dist)

    def by_hand(inputs, targets):
        return F.cross_entropy(trainer.raw_model(inputs).flatten(0, 1), targets.flatten()).item()

    inputs, targets = data.loader.batch(0)
    assert (targets == IGNORED).all(1).any()
    expected = by_hand(inputs, targets)
    loss, *_ = train_gpt2.train_step(trainer, inputs, targets, step=1)
    assert abs(loss - expected) < 1e-6
    windows = read_windows(data.val_split, evaluation_windows(data.val_split, 8, 400), 8)
    expected = by_hand(*windows)
    assert abs(train_gpt2.validate(trainer, data.val_split) - expected) < 1e-6


def test_a_batch_without_a_response_changes_nothing_but_is_no_error(folder, tmp_path):
    config, dist = train_gpt2.parse(command(folder, tmp_path / "run", optimizer="adamw", weight_decay=0)), Distributed()
    trainer = train_gpt2.make_trainer(config, setup.open_data(config, dist), dist)
    before = [p.clone() for p in trainer.raw_model.parameters()]
    inputs = torch.zeros(8, 32, dtype=torch.int64)
    assert train_gpt2.train_step(trainer, inputs, torch.full_like(inputs, IGNORED), step=1)[:2] == (0.0, 0.0)
    assert all(torch.equal(*pair) for pair in zip(before, trainer.raw_model.parameters(), strict=True))


def test_validation_tokens_without_a_response_are_refused_before_the_first_step(tmp_path):
    dialogues = [{"prompt": "long " * 20, "response": "short"}] * 2
    chat.prepare(write(tmp_path / "x.jsonl", *dialogues), tmp_path / "data", "char")
    config = train_gpt2.parse(command(tmp_path / "data", tmp_path / "run", eval_tokens=32))
    with pytest.raises(UserError, match="val split of .* has no response in its first --eval-tokens"):
        setup.open_data(config, Distributed())


def test_training_documents_are_whole_dialogues(tmp_path):
    chat.prepare(write(tmp_path / "x.jsonl", *[{"prompt": "a?", "response": "b"}] * 2), tmp_path, "char")
    assert "User: a?\nAssistant: b" in training_documents(tmp_path)


def test_a_tokenizer_that_cannot_end_a_response_is_refused(tmp_path):
    spec = choose("char", "User: a\nAssistant: b", documents=False).spec()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    file = write(tmp_path / "x.jsonl", *[{"prompt": "a", "response": "b"}] * 2)
    with pytest.raises(UserError, match="has no end-of-text token"):
        chat.prepare(file, tmp_path / "out", str(tmp_path / "tokenizer.json"))


def test_a_diagnosis_is_of_the_responses():
    hidden, wte = torch.randn(2, 4, 8), torch.randn(5, 8)
    targets = torch.tensor([[IGNORED, 1, 2, IGNORED], [IGNORED, IGNORED, 4, 0]])
    found = measure_predictions(hidden, wte, targets)
    expected = F.cross_entropy((hidden @ wte.T).flatten(0, 1), targets.flatten()).item()
    assert found["loss"] == pytest.approx(expected, rel=6e-3)
    assert found["loss_by_position"][0] is None  # no target counts there


def test_a_tiny_gpt_learns_to_reverse_words_that_it_has_not_seen(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    options = {"n_embd": 64, "n_head": 4, "batch_tokens": 2048, "micro_batch": 64, "lr": 1e-2, "max_steps": 250}
    rare = {"eval_every": 0, "sample_every": 0, "checkpoint_every": 1000, "min_lr": 0}
    assert not train(folder, run, **options, **rare)
    held_out = WORDS[9::10]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{word}\n" for word in held_out)))
    sample.main([str(run), "--chat", "--temperature", "0"])
    answers = capsys.readouterr().out.splitlines()
    right = sum(answer == word[::-1] for answer, word in zip(answers, held_out, strict=True))
    assert right >= 0.9 * len(held_out), (right, answers[:5], held_out[:5])
