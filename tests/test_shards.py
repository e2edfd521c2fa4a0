"""data/shards.py."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from data.files import UserError
from data.shards import open_split, summary, write_dataset
from data.tokenizer import CharTokenizer, from_spec, gpt2

LETTERS = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz", documents=True)


def wide(vocab_size):
    """A tokenizer whose vocabulary has any size, since only the size matters here."""
    return CharTokenizer("".join(chr(0x10000 + i) for i in range(vocab_size)), documents=False)


def counting(folder, n_tokens, shard_tokens=7):
    """The train split 0, 1, 2, ... of a new dataset: a token tells its place."""
    splits = {"train": [np.arange(n_tokens)], "val": [np.arange(5)]}
    write_dataset(folder, wide(max(n_tokens, 5)), splits, shard_tokens)
    return open_split(folder, "train")


def write_bin(path, tokens, magic=20240520, version=1, promised=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if promised is None else promised
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


# ------------------------------------------------------------------------------------------------------- the format


def test_a_dataset_comes_back_as_it_was_written(tmp_path):
    documents = [np.array([26, 0, 1, 2]), np.array([26]), np.array([], int), np.array([26, 25, 24])]
    splits = {"train": iter(documents), "val": documents[:1]}
    meta = write_dataset(tmp_path / "a" / "b", LETTERS, splits, shard_tokens=3)
    assert meta == json.loads((tmp_path / "a" / "b" / "meta.json").read_text())
    train, val = (open_split(tmp_path / "a" / "b", name) for name in ("train", "val"))
    assert train.read(0, train.n_tokens).tolist() == [26, 0, 1, 2, 26, 26, 25, 24]
    assert val.read(0, 4).tolist() == [26, 0, 1, 2]
    assert train.vocab_size == 27 and from_spec(train.tokenizer_spec) == LETTERS
    assert [shard["tokens"] for shard in meta["shards"]["train"]] == [3, 3, 2]
    assert "char tokenizer, vocabulary 27, tokens: 8 train, 4 val" in summary("x", meta)
    train.verify()
    val.verify()


def test_the_files_are_plain_numpy_arrays_with_their_true_checksums(tmp_path):
    counting(tmp_path, 10, shard_tokens=4)
    meta = json.loads((tmp_path / "meta.json").read_text())
    for i, shard in enumerate(meta["shards"]["train"]):
        path = tmp_path / f"train_{i:06d}.npy"
        assert shard["file"] == path.name
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert np.load(path).dtype == np.uint16 and np.load(path).tolist() == [*range(4 * i, min(4 * i + 4, 10))]


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_two_bytes_up_to_65536_tokens_and_four_above(tmp_path, vocab_size, dtype):
    documents = [np.array([0, vocab_size - 1])]
    write_dataset(tmp_path, wide(vocab_size), {"train": documents, "val": documents})
    assert np.load(tmp_path / "train_000000.npy").dtype == dtype
    split = open_split(tmp_path, "train")
    split.verify()
    assert split.read(0, 2).tolist() == [0, vocab_size - 1] and split.read(0, 2).dtype == np.int64


@pytest.mark.parametrize("shard_tokens", [1, 2, 7, 19, 20, 21, 100])
def test_documents_of_any_length_are_cut_into_shards_and_read_across_their_borders(tmp_path, shard_tokens):
    documents = np.split(np.arange(20), [1, 10, 10, 12, 19])
    write_dataset(tmp_path, wide(20), {"train": documents, "val": documents}, shard_tokens)
    split = open_split(tmp_path, "train")
    for start in range(21):
        for count in range(21 - start):
            assert split.read(start, count).tolist() == [*range(start, start + count)]
    for start, count in ((0, 21), (20, 1), (-1, 2), (3, -1)):
        with pytest.raises(IndexError):
            split.read(start, count)


def test_preparing_again_leaves_no_stale_shard_and_other_files_alone(tmp_path):
    counting(tmp_path, 40, shard_tokens=4)
    (tmp_path / ".train_000003.npy.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert counting(tmp_path, 9, shard_tokens=4).n_tokens == 9
    shards = ["train_000000.npy", "train_000001.npy", "train_000002.npy", "val_000000.npy", "val_000001.npy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["meta.json", "notes.txt", *shards])


def test_what_a_killed_preparation_left_is_no_dataset(tmp_path):
    program = """
import os, signal, sys
import numpy as np
from data.shards import write_dataset
from data.tokenizer import CharTokenizer
def documents():
    for i in range(5):
        yield np.full(10, i)
    os.kill(os.getpid(), signal.SIGKILL)
tokenizer = CharTokenizer("abcdefgh", False)
write_dataset(sys.argv[1], tokenizer, {"train": documents(), "val": documents()}, shard_tokens=20)
"""
    counting(tmp_path, 30)
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "train_000001.npy").exists()
    with pytest.raises(UserError, match="there is no dataset in .*prepare text"):
        open_split(tmp_path, "train")
    (tmp_path / ".meta.json.01234567.tmp").write_text("{")
    assert counting(tmp_path, 30).n_tokens == 30
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("documents, complaint", [([], "train split .* empty"), ([np.array([3, 27])], "3 to 27")])
def test_no_dataset_is_made_of_nothing_or_of_ids_past_the_vocabulary(tmp_path, documents, complaint):
    with pytest.raises(UserError, match=complaint):
        write_dataset(tmp_path, LETTERS, {"train": documents, "val": [np.array([1])]})
    assert not (tmp_path / "meta.json").exists()


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_a_flipped_bit_is_named(tmp_path):
    splits = {"train": [np.arange(50)], "val": [np.arange(9)]}
    write_dataset(tmp_path, wide(50), splits, 20, command="python -m data.x")
    path = tmp_path / "train_000001.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    split = open_split(tmp_path, "train")
    with pytest.raises(UserError, match="train_000001.npy is corrupt .*`python -m data.x`"):
        split.verify()
    open_split(tmp_path, "val").verify()


def test_the_processes_share_the_work_of_verifying(tmp_path):
    counting(tmp_path, 50, shard_tokens=10)
    (tmp_path / "train_000003.npy").write_bytes((tmp_path / "train_000004.npy").read_bytes())
    split = open_split(tmp_path, "train")
    for part, parts in ((0, 2), (2, 4), (0, 5), (7, 8)):
        split.verify(part, parts)
    for part, parts in ((1, 2), (3, 4), (3, 5), (0, 1), (3, 8)):
        with pytest.raises(UserError, match="train_000003"):
            split.verify(part, parts)


def test_a_truncated_shard_and_any_flipped_bit_of_a_header_are_data_errors(tmp_path):
    counting(tmp_path, 10)
    path = tmp_path / "train_000000.npy"
    whole = path.read_bytes()
    for kept in (0, 60, 127, 128, 140):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="train_000000.npy is truncated .*prepare the dataset again"):
            open_split(tmp_path, "train")
    for bit in range(0, 128 * 8, 5):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="train_000000.npy"):
            open_split(tmp_path, "train").verify()


def test_a_missing_shard_and_one_of_another_kind_are_named(tmp_path):
    counting(tmp_path, 10)
    path = tmp_path / "train_000001.npy"
    for tokens in (np.arange(4, dtype="<u2"), np.arange(3, dtype="<u4"), np.zeros((3, 1), "<u2")):
        np.save(path, tokens)
        with pytest.raises(UserError, match=r"train_000001.npy holds .*, but meta.json says uint16 \(3,\)"):
            open_split(tmp_path, "train")
    with open(path, "wb") as file:
        np.savez(file, tokens)
    with pytest.raises(UserError, match="train_000001.npy is truncated or not a .npy file"):
        open_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match="train_000001.npy is missing"):
        open_split(tmp_path, "train")


def test_bytes_behind_a_shard_and_an_id_past_the_vocabulary_are_named(tmp_path):
    split = counting(tmp_path, 10, shard_tokens=10)
    path = tmp_path / "meta.json"
    fewer = path.read_text().replace('"vocab_size": 10', '"vocab_size": 9')
    path.write_text(fewer)
    with pytest.raises(UserError, match="vocab_size is 9, but its tokenizer has 10 tokens"):
        open_split(tmp_path, "train")
    path.write_text(fewer.replace(r"\ud800\udc09", ""))
    with pytest.raises(UserError, match="train_000000.npy holds token id 9, but the vocabulary is 9"):
        open_split(tmp_path, "train").verify()
    with open(tmp_path / "train_000000.npy", "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="train_000000.npy has 152 bytes, but 148 are expected"):
        split.verify()


HEAD = '{"format": 1, "tokenizer": {}, "vocab_size": '


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "\xff", '{"format": 1}', HEAD + '"many", "shards": {}}', HEAD + '9, "shards": []}']
    + [HEAD + '9, "shards": {"train": [{"file": "x"}]}}', HEAD + '9, "shards": {"train": 3}}'],
)
def test_a_damaged_meta_json_is_named(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="meta.json is corrupt: .*prepare the dataset again"):
        open_split(tmp_path, "train")


def test_a_later_format_an_unknown_split_and_a_folder_without_a_dataset_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"there is no dataset in .*: give one of pydocs, .* or prepare text"):
            open_split(folder, "train")
    counting(tmp_path, 10)
    with pytest.raises(UserError, match="no 'test' split, only .'train', 'val'."):
        open_split(tmp_path, "test")
    path = tmp_path / "meta.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, this version reads format 1"):
        open_split(tmp_path, "train")


def test_the_fingerprint_tells_datasets_apart(tmp_path):
    one = counting(tmp_path / "1", 30, 7).fingerprint
    assert one == counting(tmp_path / "2", 30, 7).fingerprint
    assert one != counting(tmp_path / "3", 30, 8).fingerprint
    documents = {"train": [np.array([*range(29), 0])], "val": [np.arange(5)]}
    write_dataset(tmp_path / "4", wide(30), documents, shard_tokens=7)
    assert one != open_split(tmp_path / "4", "train").fingerprint


# -------------------------------------------------------------------------------------------------------- .bin shards


def test_a_shard_that_is_cut_short_while_it_is_read_is_an_error_not_a_signal(tmp_path):
    split = counting(tmp_path, 10_000, shard_tokens=10_000)
    os.truncate(split.shards[0].path, 200)
    with pytest.raises(UserError, match="train_000000.npy was cut short while it was read"):
        split.read(5_000, 10)


def test_files_of_nanogpt_and_build_nanogpt_are_read_as_gpt2s_tokens_and_pickles_are_not(tmp_path):
    tokens = np.array([0, 7, 50256], np.uint16)
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
        opened = open_split(tmp_path, split)
        assert opened.read(0, 3).tolist() == tokens.tolist() and opened.verify() and "GPT-2" in opened.note
    (tmp_path / "meta.pkl").write_bytes(b"pickled")
    with pytest.raises(UserError, match="a tokenizer of their own, in a pickle"):
        open_split(tmp_path, "train")
    for folder, name in (("build", "edufineweb_train_000001"), ("ours", "train_000001")):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / f"{name}.npy", tokens)
    assert open_split(tmp_path / "build", "train").read(0, 3).tolist() == tokens.tolist()
    with pytest.raises(UserError, match="no .npy file in .* has 'val' in its name"):
        open_split(tmp_path / "build", "val")
    with pytest.raises(UserError, match="there is no dataset"):  # an unfinished one
        open_split(tmp_path / "ours", "train")


def test_bin_shards_are_read_in_the_order_of_their_names(tmp_path):
    write_bin(tmp_path / "fineweb_train_000002.bin", [5, 50256])
    write_bin(tmp_path / "fineweb_train_000001.bin", [1, 2, 3])
    write_bin(tmp_path / "fineweb_val_000000.bin", [9])
    train = open_split(tmp_path, "train")
    train.verify()
    assert train.read(0, 5).tolist() == [1, 2, 3, 5, 50256] and train.baselines == {}
    assert open_split(tmp_path, "val").read(0, 1).tolist() == [9]
    assert train.vocab_size == 50257 and from_spec(train.tokenizer_spec) == gpt2()


def test_a_bad_bin_shard_is_named(tmp_path):
    path = tmp_path / "x_train_0.bin"
    for magic, version in ((20240519, 1), (20240520, 2)):
        write_bin(path, [1, 2], magic, version)
        with pytest.raises(UserError, match=rf"x_train_0.bin is not a token shard: bad .* \[{magic}, {version}"):
            open_split(tmp_path, "train")
    for promised in (1, 3, 0, -1):
        write_bin(path, [1, 2], promised=promised)
        with pytest.raises(UserError, match=f"truncated: 2 tokens, but its header says {promised}"):
            open_split(tmp_path, "train")
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="not a token shard"):
        open_split(tmp_path, "train")
    write_bin(path, [50257])
    with pytest.raises(UserError, match="x_train_0.bin holds token id 50257, but the vocabulary is 50257"):
        open_split(tmp_path, "train").verify()
    with pytest.raises(UserError, match="'val' in its name"):
        open_split(tmp_path, "val")
