"""data/text.py."""

import gzip
import json
import re
import sys
import zlib

import numpy as np
import pytest

from data.files import UserError
from data.shards import open_split
from data.text import documents_of, main, prepare, read_documents, read_text, split_documents, training_documents
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


def test_from_ten_files_on_a_fair_tenth_of_them_is_held_out_and_order_is_kept(tmp_path):
    texts = [f"\nfile {i:02d}" for i in range(40)]
    paths = files(tmp_path, *(text[1:] for text in texts))
    for out in ("a", "b"):
        prepare(paths, tmp_path / out)
    train, val = decoded(tmp_path / "a", "train"), decoded(tmp_path / "a", "val")
    held_out = [text for text in texts if text in val]
    assert len(held_out) == 4 and val == "".join(held_out) and val == decoded(tmp_path / "b", "val")
    assert train == "".join(text for text in texts if text not in held_out)
    assert min(held_out) < texts[20] < max(held_out)


def test_documents_are_set_apart_by_gpt2_s_end_of_text_token_and_its_spelling_is_text(tmp_path):
    prepare(files(tmp_path, *["<|endoftext|>"] * 10), tmp_path / "out", "gpt2")
    assert open_split(tmp_path / "out", "val").read(0, 8).tolist() == [50256, 27, 91, 437, 1659, 5239, 91, 29]


def test_documents_inside_a_file_are_split_at_a_separator_and_without_it_a_note_says_so(tmp_path, capsys):
    (path,) = files(tmp_path, "<|endoftext|>".join(["one", "two\n", " ", "three"]))
    prepare([path], tmp_path / "out", "gpt2", separator="<|endoftext|>")
    assert open_split(tmp_path / "out", "train").read(0, 4).tolist() == [50256, 505, 50256, 11545]
    assert "--separator '<|endoftext|>'`" in open_split(tmp_path / "out", "val").hint
    assert capsys.readouterr().err == ""
    prepare([path], tmp_path / "out", "gpt2")
    assert f"note: <|endoftext|> in {path} (3 times) is read as text, not as a token" in capsys.readouterr().err


def test_few_documents_are_cut_where_nine_tenths_of_the_characters_end():
    assert split_documents(["a" * 50, "b" * 40, "c" * 10]) == (["a" * 50, "b" * 40], ["c" * 10])
    assert split_documents(["a" * 30, "b" * 70]) == (["a" * 30, "b" * 60], ["b" * 10])
    assert split_documents(["a", "b"]) == (["a"], ["b"])
    assert split_documents(["ab"]) == (["a"], ["b"])
    assert split_documents(["a" * 5, "b", "c" * 94]) == (["a" * 5, "b", "c" * 84], ["c" * 10])
    assert split_documents([str(i) for i in range(9)]) == ([str(i) for i in range(8)], ["8"])
    train, val = split_documents([str(i) for i in range(10)])
    assert len(val) == 1 and sorted(train + val) == [str(i) for i in range(10)]


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


TEXTS = {
    "gbk": "我叫李明，今天天气很好，我们去公园散步吧。\n" * 9,
    "shift_jis": "これは日本語の文章です。今日は天気がいいですね。\n" * 9,
    "cp1252": "El niño comió mañana; ¿qué pasó? El corazón está aquí.\n" * 9,
    "cp1251": "Привет, как дела? Это русский текст для проверки.\n" * 9,
    "utf-16-le": "plain words\n" * 9,
    "utf-16": "naïve café, 中文 🙂\n",
    "utf-32": "naïve café, 中文 🙂\n",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_text_in_another_encoding_is_read_with_its_name_and_the_message_guesses_one_that_reads_it(tmp_path, encoding):
    (path,) = files(tmp_path, TEXTS[encoding].encode(encoding))
    assert read_text(path, encoding) == TEXTS[encoding]
    if encoding in ("utf-16", "utf-32"):  # with a byte order mark
        assert read_text(path) == TEXTS[encoding]
        return
    with pytest.raises(UserError) as refusal:
        prepare([path], tmp_path / "out")
    guess = re.search(r"try --encoding (\S+), which is a guess$", str(refusal.value))[1]
    prepare([path], tmp_path / "out", encoding=guess)
    assert decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val") == TEXTS[encoding]
    assert f"--encoding {guess}`" in open_split(tmp_path / "out", "val").hint
    with pytest.raises(UserError, match=r"try `iconv -f \S+ -t utf-8 \S+ > new.txt`, which is a guess"):
        read_text(path)


def test_compressed_text_is_read_and_tokens_are_told_what_they_are(tmp_path):
    (path,) = files(tmp_path, gzip.compress("naïve\r\n".encode()))
    assert read_text(path) == "naïve\n"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cannot read .*00.txt: corrupt gzip data \\(Truncated"):
        read_text(path)
    np.arange(20_000, dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(
        UserError, match="train.bin is a binary file, not text: its folder, if it holds tokens, is what"
    ):
        read_text(tmp_path / "train.bin")
    with pytest.raises(UserError, match=f"train.bin is a file: --data takes the folder of its shards, {tmp_path}"):
        open_split(tmp_path / "train.bin", "train")


def test_files_that_cannot_be_read_are_named_with_the_first_wrong_byte_and_its_offset(tmp_path):
    for content, complaint in (
        (
            b"\xef\xbb\xbfna\xefve caf\xe9, d\xe9j\xe0!\n",
            "is not UTF-8: byte 0xef at offset 5: try --encoding",
        ),
        (bytes(range(256)) * 4, "is a binary file, not text: leave it out"),
        (b"PNG\0\0\0\1", "is a binary file"),
        (zlib.compress(bytes(range(256))).replace(b"\0", b"\n"), "is a binary file"),
    ):
        with pytest.raises(UserError, match=f"01.txt {complaint}"):
            prepare(files(tmp_path, "fine", content), tmp_path / "out")
    for encoding in ("klingon", "rot13", "undefined", "\0", "\udcff"):
        with pytest.raises(UserError, match=f"--encoding {encoding} is unknown: use one that Python knows"):
            prepare(files(tmp_path, "fine"), tmp_path / "out", encoding=encoding)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}/nothing: No such file"):
        prepare([tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(UserError, match="no file matches .*/\\*.text: give files, folders or a pattern"):
        prepare([tmp_path / "*.text"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_and_a_pattern_stand_for_their_text_files_and_what_is_left_out_is_named(tmp_path, capsys):
    folder = tmp_path / "my"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, content in {"b.txt": b"bb", "sub/a.md": b"aa", ".git/x": b"hidden", "c.png": b"\x89PNG\0\1\0\0"}.items():
        (folder / name).write_bytes(content)
    assert read_documents([folder], lines=False) == ["bb", "aa"]
    assert (
        capsys.readouterr().err
        == f"warning: 1 file(s) left out: {folder}/c.png is a binary file, not text: leave it out\n"
    )
    assert read_documents([f"{folder}/*.txt", f"{folder}/**/*.md"], lines=False) == ["bb", "aa"]
    with pytest.raises(UserError, match="c.png is a binary file"):
        read_documents([folder / "c.png"], lines=False)


def test_a_large_vocabulary_of_characters_is_noted_once_with_the_way_to_a_smaller_one(tmp_path, capsys):
    (path,) = files(tmp_path, "".join(map(chr, range(0x4E00, 0x4E00 + 1200))))
    prepare([path], tmp_path / "out")
    note = capsys.readouterr().err
    assert note.startswith("note: 1,200 characters") and "python -m data.bpe train" in note and note.count("\n") == 1
    prepare(files(tmp_path, "few"), tmp_path / "out")
    assert capsys.readouterr().err == ""


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
    known = training_documents(tmp_path / "out")
    assert known < set(texts) and len(known) == 9  # one is for validation


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
