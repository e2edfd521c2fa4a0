"""data/text.py."""

import json
import sys

import numpy as np
import pytest

from data.files import UserError
from data.shards import open_split
from data.text import documents_of, main, prepare, read_documents, split_documents, training_documents
from data.tokenizer import CharTokenizer, from_spec


def files(folder, *texts):
    paths = [folder / f"{i:02d}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


def decoded(folder, split):
    opened = open_split(folder, split)
    opened.verify()
    return from_spec(opened.tokenizer_spec).decode(opened.read(0, opened.n_tokens))


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_one_file_is_cut_at_nine_tenths_of_its_characters(tmp_path, tokenizer):
    text = "naïve café, 中文 🙂. " * 5
    prepare(files(tmp_path, text), tmp_path / "out", tokenizer)
    train, val = (decoded(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == text and len(train) == int(0.9 * len(text))
    prepare(files(tmp_path, "abcabc", "", " \n"), tmp_path / "out")
    assert open_split(tmp_path / "out", "train").vocab_size == 3  # no end-of-text token for a single document


def test_from_ten_files_on_the_last_tenth_of_them_is_held_out(tmp_path):
    prepare(files(tmp_path, *(f"file {i:02d}" for i in range(21))), tmp_path / "out")
    assert decoded(tmp_path / "out", "val") == "\nfile 19\nfile 20"
    assert decoded(tmp_path / "out", "train") == "".join(f"\nfile {i:02d}" for i in range(19))


def test_documents_are_set_apart_by_gpt2_s_end_of_text_token_and_its_spelling_is_text(tmp_path):
    prepare(files(tmp_path, *["<|endoftext|>"] * 10), tmp_path / "out", "gpt2")
    assert open_split(tmp_path / "out", "val").read(0, 8).tolist() == [50256, 27, 91, 437, 1659, 5239, 91, 29]


def test_few_documents_are_cut_where_nine_tenths_of_the_characters_end():
    assert split_documents(["a" * 50, "b" * 40, "c" * 10]) == (["a" * 50, "b" * 40], ["c" * 10])
    assert split_documents(["a" * 30, "b" * 70]) == (["a" * 30, "b" * 60], ["b" * 10])
    assert split_documents(["a", "b"]) == (["a"], ["b"])
    assert split_documents(["ab"]) == (["a"], ["b"])
    assert split_documents(["a" * 5, "b", "c" * 94]) == (["a" * 5, "b", "c" * 84], ["c" * 10])
    assert split_documents([str(i) for i in range(9)]) == ([str(i) for i in range(8)], ["8"])
    assert split_documents([str(i) for i in range(10)]) == ([str(i) for i in range(9)], ["9"])


def test_lines_are_documents_shuffled_the_same_way_every_time(tmp_path):
    names = [f"name{i:03d}" for i in range(100)]
    paths = files(tmp_path, "\n".join(names[:50]) + "\n\n", "\r\n".join(names[50:]))
    for out in ("a", "b"):
        prepare(paths, tmp_path / out, lines=True)
    assert open_split(tmp_path / "a", "train").fingerprint == open_split(tmp_path / "b", "train").fingerprint
    train, val = decoded(tmp_path / "a", "train").split("\n"), decoded(tmp_path / "a", "val").split("\n")
    assert train[0] == val[0] == "" and (len(train), len(val)) == (91, 11)
    assert sorted(train[1:] + val[1:]) == names
    assert train[1:] != sorted(train[1:]) and sorted(val[1:]) != names[90:]


def test_byte_order_marks_and_carriage_returns_are_gone(tmp_path):
    assert read_documents(files(tmp_path, b"\xef\xbb\xbfa\r\nb\rc"), lines=False) == ["a\nb\rc"]


def test_files_that_cannot_be_read_are_named_with_the_byte_that_is_not_utf8_and_its_offset(tmp_path):
    for content, place in (
        (b"\xef\xbb\xbfcaf\xe9!", "byte 0xe9 at offset 6: .*iconv"),
        ("hello".encode("utf-16"), "byte 0xff at offset 0"),
        ("a🙂".encode()[:-1], "byte 0xf0 at offset 1"),
    ):
        with pytest.raises(UserError, match=f"01.txt is not UTF-8: {place}"):
            prepare(files(tmp_path, "fine", content), tmp_path / "out")
    for path, complaint in ((tmp_path / "nothing", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"cannot read {path}: {complaint}"):
            prepare([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("texts", [[], [""], ["", "\n \n"], ["x"]])
@pytest.mark.parametrize("lines", [True, False])
def test_no_text_is_an_error(tmp_path, texts, lines):
    with pytest.raises(UserError, match="there is no text in"):
        prepare(files(tmp_path, *texts), tmp_path / "out", lines=lines)


def test_a_tokenizer_from_a_file_is_used_and_what_it_lacks_leaves_the_older_dataset(tmp_path):
    spec = tmp_path / "tokenizer.json"
    spec.write_text(json.dumps(CharTokenizer("abcxyz", documents=True).spec()))
    prepare(files(tmp_path, "ab", "cb"), tmp_path / "out", str(spec))
    assert open_split(tmp_path / "out", "train").read(0, 5).tolist() == [6, 0, 1, 6, 2]
    assert open_split(tmp_path / "out", "val").read(0, 2).tolist() == [6, 1]
    with pytest.raises(UserError, match="lacks 'q', first at position 0"):
        prepare(files(tmp_path, "ab", "q"), tmp_path / "out", str(spec))
    assert open_split(tmp_path / "out", "train").n_tokens == 5
    spec.write_text(json.dumps(CharTokenizer("abc", documents=False).spec()))
    with pytest.raises(UserError, match="no end-of-text token, which several documents need"):
        prepare(files(tmp_path, "ab", "cb"), tmp_path / "out", str(spec))


def test_a_damaged_dataset_names_the_command_that_made_it(tmp_path):
    paths = files(tmp_path, "some text of mine")
    out = tmp_path / "my data"
    prepare(paths, out)
    (out / "val_000000.npy").unlink()
    with pytest.raises(UserError, match=f"again with `python -m data.text {paths[0]} --out '{out}' --tokenizer char`"):
        open_split(out, "val")


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_training_documents_come_back_whole_line_breaks_included(tmp_path, tokenizer):
    texts = [f"document {i}\n\nsecond, naïve 🙂 paragraph\n" for i in range(10)]
    prepare(files(tmp_path, *texts), tmp_path / "out", tokenizer)
    assert training_documents(tmp_path / "out") == set(texts[:9])  # the tenth is for validation


def run_on(folder, data):
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "config.json").write_text(json.dumps({"data": str(data)}), encoding="utf-8")
    (folder / "run" / "checkpoints" / "step_000001.pt").touch()
    return folder / "run"


def test_the_documents_of_a_run_are_found_from_its_folder_and_from_a_checkpoint(tmp_path):
    names = ["ada", "bea", "cab", "dee", "eva", "abe", "bab", "ace", "dab", "ebb"]
    prepare(files(tmp_path, "\n".join(names)), tmp_path / "out", lines=True)
    run = run_on(tmp_path, tmp_path / "out")
    for place in (run, run / "checkpoints" / "step_000001.pt"):
        assert len(documents_of(place)) == 9 and documents_of(place) < set(names)


def test_what_samples_cannot_be_compared_with_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="gpt2 is not a run of train_gpt2.py"):
        documents_of("gpt2")
    prepare(files(tmp_path, "a single text"), tmp_path / "one")
    with pytest.raises(UserError, match="is one text, without documents"):
        documents_of(run_on(tmp_path, tmp_path / "one"))
    prepare(files(tmp_path, "a\nb\nc"), tmp_path / "lines", lines=True)
    monkeypatch.setattr("data.text.MOST_DOCUMENT_TOKENS", 3)
    with pytest.raises(UserError, match="tokens, too many to compare"):
        training_documents(tmp_path / "lines")
    with pytest.raises(UserError, match="there is no dataset in"):
        documents_of(run_on(tmp_path / "other", tmp_path / "gone"))


def test_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.text", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    (path,) = files(tmp_path, "\n".join("abcdefghijkl"))
    out = tmp_path / "out"
    line = f"{out}: char tokenizer, vocabulary 13, tokens: 22 train, 2 val\n"
    assert run(path, "--out", out, "--lines") == (0, line, "")
    assert np.load(out / "train_000000.npy")[0] == 12
    (tmp_path / "file").touch()
    for arguments in (["nothing", "--out", out], [path], ["--out", out], [path, "--out", tmp_path / "file"]):
        status, shown, error = run(*arguments)
        assert (status, shown, error.count("\n")) == (2, "", 1) and error.startswith("error: ")
