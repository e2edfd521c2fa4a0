"""data/bpe.py. The judge is Hugging Face's `tokenizers`: its trainer, and its reading of our tokenizer.json."""

import gzip
import inspect
import itertools
import json
import random
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from tiktoken_ext import openai_public
from tokenizers import models, pre_tokenizers, trainers

from data import pydocs, shakespeare
from data.bpe import compare, count_words, learn, main, read_chunks, show, train
from data.files import UserError
from data.pydocs import read_topics
from data.shards import open_split
from data.text import prepare, read_text
from data.tokenizer import PATTERNS, byte_pairs, bytes_to_unicode, from_spec, gpt2, load
from data.tokenizer_json import merges

ROOT = Path(__file__).parents[1]
RUSSIAN = (ROOT / "tests" / "texts" / "russian.txt").read_text(encoding="utf-8")
CODE = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")
AWKWARD = (
    "I'll it's DON'T 'twas 'l ''  x\t\ty \n\n z\n  \n\n12345 a1b2 --==>\n\n\n  (x)[0]: "
    "日本語、中文。🙂👩\u200d🚀 e\u0301\u00a0\u3000 \x00\x1f\n"
)
TIES = "ab cd ef gh ba dc fe hg\n" * 3 + "aaaa aaa aaaaaa bbbbbbb abababab\n" * 2


def judged(texts, n_merges, pattern="gpt2"):
    """The tokens that Hugging Face's trainer learns from the texts, with bytes spelled as characters."""
    judge = tokenizers.Tokenizer(models.BPE())
    if pattern == "gpt2":
        judge.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # brings GPT-2's pattern along
    else:  # a + behind {1,3} is "once or more" there
        words = tokenizers.Regex(PATTERNS["gpt4"].replace("{1,3}+", "{1,3}"))
        of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        judge.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), of_bytes])
    options = {"vocab_size": 256 + n_merges, "min_frequency": 2, "show_progress": False}
    options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    judge.train_from_iterator(texts, trainers.BpeTrainer(**options))
    vocabulary = judge.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)[256:]


def learned(texts, n_merges, pattern="gpt2"):
    words = sum((count_words([text], pattern) for text in texts), Counter())
    return [bytes_to_unicode(token) for token in learn(words, n_merges)]


@pytest.fixture(scope="module")
def english():
    return "\n\n".join(read_topics().values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of 600 tokens, and the command's answer."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text(CODE + RUSSIAN, encoding="utf-8")
    line = train((folder / "a.txt",), 600, folder / "tokenizer")
    assert line.startswith(f"{folder}/tokenizer/bpe.json: 600 tokens, learned from ")
    assert sorted(path.name for path in (folder / "tokenizer").iterdir()) == ["bpe.json", "tokenizer.json"]
    return folder / "tokenizer"


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_the_merges_are_those_of_hugging_face_s_trainer(pattern, english):
    for texts, n_merges in (([english], 3839), ([CODE, RUSSIAN, AWKWARD * 2], 3000), ([TIES], 100), ([AWKWARD], 100)):
        ours, theirs = learned(texts, n_merges, pattern), judged(texts, n_merges, pattern)
        assert ours == theirs and len(ours) > 5


def test_ties_go_to_the_smaller_ids_as_in_hugging_face_s_trainer():
    """Random words over two or three letters: nearly every merge is a tie, and runs of one letter overlap."""
    rng = random.Random(0)
    for letters in ("ab", "é ", "aaab", "abc"):
        for _ in range(20):
            text = "".join(rng.choice(letters) for _ in range(300))
            assert learned([text], 200) == judged([text], 200)


def test_a_pair_is_merged_only_if_it_occurs_twice():
    assert learn(Counter({"abc": 1}), 10) == [] and learn(Counter(), 10) == []
    assert learn(Counter({"abc": 2}), 10) == [b"ab", b"abc"]
    assert learn(Counter({"aaa": 1}), 10) == [b"aa"]  # which occurs twice, though once is all that is merged
    assert learn(Counter({"abc": 2}), 0) == []


def test_more_merges_begin_with_the_same_ones_and_counts_past_32_bits_are_counted(english):
    words = count_words([english], "gpt2")
    assert learn(words, 500)[:100] == learn(words, 100)
    assert learn(Counter({"ab": 2**33, "cd": 2**33 + 1, "ce": 2**40}), 3) == [b"ce", b"cd", b"ab"]
    assert learn(Counter({"xab": 2**31 - 1, "yab": 2**31 - 1, "cd": 2**31}), 2) == [b"ab", b"cd"]


# ------------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_words_are_counted_the_same_however_the_text_is_cut(pattern):
    text = (AWKWARD + TIES + RUSSIAN[:200] + "\n        \n \n\t" + "don't we'll 'LL\r\n\r\n" * 3 + " " * 30) * 2
    whole = Counter(regex.findall(PATTERNS[pattern], text))
    for size in (1, 2, 3, 5, 7, 64, 1000, len(text)):
        assert count_words((text[i : i + size] for i in range(0, len(text), size)), pattern) == whole
    rng = random.Random(0)
    for _ in range(100):
        cuts = sorted(rng.sample(range(len(text)), 8))
        chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert count_words(chunks, pattern) == whole


def test_text_without_blanks_and_its_long_tokens_take_no_quadratic_time():
    begun = time.process_time()
    assert count_words(itertools.repeat("a" * 256, 2048), "gpt2") == {"a" * 2**19: 1}  # quadratic: half a minute
    spelled = [b"a" * 2**k for k in range(1, 17)]
    tokenizer = byte_pairs("gpt2", spelled)
    assert from_spec(tokenizer.spec()) == tokenizer
    assert merges(tokenizer.encoding._mergeable_ranks) == {token: (token[: len(token) // 2],) * 2 for token in spelled}
    assert time.process_time() - begun < 5


def test_the_patterns_are_those_of_tiktoken():
    assert PATTERNS["gpt4"] in inspect.getsource(openai_public.cl100k_base)
    assert PATTERNS["gpt2"] == openai_public.r50k_pat_str


def test_the_words_of_a_text_are_the_text():
    every = "".join(map(chr, itertools.chain(range(0xD800), range(0xE000, 0x20000))))
    for pattern in ("gpt2", "gpt4"):
        assert "".join(regex.findall(PATTERNS[pattern], every)) == every


def peak_bytes(call, *arguments):
    tracemalloc.start()
    call(*arguments)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_memory_does_not_grow_with_the_text_and_is_fifty_bytes_a_byte_of_different_words():
    short, long = (peak_bytes(count_words, itertools.repeat(CODE * 10, times), "gpt2") for times in (3, 16))
    assert long < 1.2 * short
    rng = random.Random(0)
    words = {"".join(rng.choices("etaoinshrdlu", k=30)): 2 for _ in range(10_000)}
    assert peak_bytes(learn, words, 300) < 50 * 31 * len(words) and len(learn(words, 300)) == 300


def test_a_file_is_read_in_pieces_as_data_text_reads_it_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    for content in (AWKWARD, "\ufeffx\r\ny\r\r\n\ufeff\r", "\r\n\r\r\n\r", "\ufeff\ufeff", "\r", ""):
        path.write_bytes(content.encode())
        for size in (1, 2, 3, 4, 100):
            monkeypatch.setattr("data.bpe.CHUNK_BYTES", size)
            assert "".join(read_chunks(path)) == read_text(path)


def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path, monkeypatch):
    path = tmp_path / "latin.txt"
    for content, place in ((b"caf\xe9 au lait", "0xe9 at offset 3"), (b"0123456789\xe4 \xb8", "0xe4 at offset 10")):
        path.write_bytes(content)
        for size in (1, 4, 100):
            monkeypatch.setattr("data.bpe.CHUNK_BYTES", size)
            for read in (read_text, lambda path: [*read_chunks(path)]):
                with pytest.raises(UserError, match=f"latin.txt is not UTF-8: byte {place}: try `iconv"):
                    read(path)
    path.write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=f"latin.txt is not UTF-8: byte {place}: try `iconv"):
        [*read_chunks(path)]


# ------------------------------------------------------------------------------------------------- the tokenizer itself


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_hugging_face_reads_tokenizer_json_and_gives_the_same_ids(pattern, tmp_path):
    (tmp_path / "a.txt").write_text(CODE + RUSSIAN + TIES, encoding="utf-8")
    train((tmp_path / "a.txt",), 1000, tmp_path / "out", pattern)
    ours, theirs = load(str(tmp_path / "out")), tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert ours.vocab_size == theirs.get_vocab_size() == 1000 and theirs.token_to_id("<|endoftext|>") == ours.eot == 999
    for text in (CODE, RUSSIAN, AWKWARD, TIES, Path(__file__).read_text(encoding="utf-8"), "x" * 3000, "123456 " * 9):
        text = text.replace("<|endoftext|>", "")
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text).ids and ours.decode(ids) == text == theirs.decode(ids)


def test_text_becomes_the_tokens_that_training_left(folder):
    """Merging the training text by the learned pairs, one after another, gives what tiktoken's encoder gives."""
    tokenizer = load(str(folder))
    text = CODE[:2000]
    expected = []
    for word in regex.findall(PATTERNS["gpt2"], text):
        parts = [bytes([byte]) for byte in word.encode()]
        for i in range(256, tokenizer.eot):
            token, place = tokenizer.decode_bytes([i]), 0
            while place < len(parts) - 1:
                if parts[place] + parts[place + 1] == token:
                    parts[place : place + 2] = [token]
                place += 1
        expected += parts
    assert [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)] == expected


def test_any_text_round_trips(folder):
    scripts = "".join(chr(i) for i in range(0x30000) if unicodedata.category(chr(i)) not in ("Cs", "Cn"))
    for tokenizer in (load(str(folder)), gpt2(), byte_pairs("gpt4", [])):
        for text in ("", RUSSIAN, AWKWARD, scripts[::7]):
            ids = tokenizer.encode(text)
            assert ids.dtype == np.uint16 and tokenizer.decode_bytes(ids) == text.encode()


def test_its_description_makes_it_again_and_its_last_id_is_the_end_of_text(folder):
    tokenizer = load(str(folder))
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("bpe", 600, 599)
    assert tokenizer.decode([599]) == "<|endoftext|>" and 599 not in tokenizer.encode("a<|endoftext|>b")
    spec = json.loads((folder / "bpe.json").read_text(encoding="utf-8"))
    assert spec == tokenizer.spec() and from_spec(json.loads(json.dumps(spec))) == tokenizer
    assert load(str(folder / "bpe.json")) == tokenizer
    assert tokenizer != byte_pairs("gpt4", [tokenizer.decode_bytes([i]) for i in range(256, 599)])
    with pytest.raises(UserError, match="tokenizer.json holds no tokenizer: .*: bpe.json beside it does"):
        load(str(folder / "tokenizer.json"))  # Hugging Face's file in place of ours


def test_every_data_script_takes_it(folder, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(CODE, encoding="utf-8")
    for name, line in (
        ("shakespeare", shakespeare.prepare(tmp_path / "shakespeare", path, str(folder))),
        ("pydocs", pydocs.prepare(tmp_path / "pydocs", str(folder / "bpe.json"))),
        ("lines", prepare((path,), tmp_path / "lines", str(folder), lines=True)),
    ):
        assert line.startswith(f"{tmp_path / name}: bpe tokenizer, vocabulary 600, tokens: ")
        assert from_spec(open_split(tmp_path / name, "val").tokenizer_spec) == load(str(folder))
    opened = open_split(tmp_path / "shakespeare", "train")
    assert CODE.startswith(load(str(folder)).decode(opened.read(0, opened.n_tokens)))
    assert open_split(tmp_path / "pydocs", "train").read(0, 1) == [599]


def test_a_damaged_description_is_named(folder):
    good = {"type": "bpe", "pattern": "gpt2", "tokens": "ab abc"}
    assert from_spec(good).encode("abcab").tolist() == [257, 256]
    for change, complaint in (
        ({"pattern": "gpt3"}, "needs a pattern, gpt2 or gpt4"),
        ({"pattern": ["gpt2"]}, "needs a pattern, gpt2 or gpt4"),
        ({"tokens": ["ab"]}, "needs a pattern, gpt2 or gpt4, and tokens, a text"),
        ({"tokens": None}, "needs a pattern, gpt2 or gpt4, and tokens, a text"),
        ({"tokens": "ab €"}, "'€' spells no token"),
        ({"tokens": "ab abcd"}, "'abcd' is not a new token made of two earlier ones"),
        ({"tokens": "abc ab"}, "'abc' is not a new token"),
        ({"tokens": "ab ab"}, "'ab' is not a new token"),
        ({"tokens": "ab a"}, "'a' is not a new token"),
    ):
        with pytest.raises(UserError, match="the spec of the BPE tokenizer is corrupt: .*" + complaint):
            from_spec(good | change)


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_train_command_writes_one_file_if_asked(tmp_path, capsys, monkeypatch):
    (path := tmp_path / "a.txt").write_text(CODE, encoding="utf-8")
    out = tmp_path / "other" / "mine.json"
    monkeypatch.setattr(sys, "argv", ["bpe", "train", "--vocab-size", "300", str(path), "--out", str(out)])
    main()
    assert "300 tokens" in capsys.readouterr().out and load(str(out)).vocab_size == 300
    assert [*out.parent.iterdir()] == [out]


def test_a_text_that_is_too_small_gives_a_smaller_vocabulary_and_a_note(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abc\n", encoding="utf-8")
    assert ": 259 tokens, learned from 3 words, 3 distinct" in train((tmp_path / "a.txt",), 4096, tmp_path / "out")
    assert "note: this text gives 259 tokens, not 4,096" in capsys.readouterr().err
    train((tmp_path / "a.txt",), 259, tmp_path / "out")
    assert capsys.readouterr().err == "" and load(str(tmp_path / "out")).eot == 258
    train((tmp_path / "a.txt",), 257, tmp_path / "out")
    assert load(str(tmp_path / "out")).encode("abc").tolist() == [64, 65, 66]


def test_what_cannot_be_trained_on_is_named_and_nothing_is_written(tmp_path):
    (tmp_path / "good.txt").write_text(CODE, encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for names, vocab_size, complaint in (
        (["good"], 256, "--vocab-size 256 is too small: .* at least 257"),
        (["good"], -1, "--vocab-size -1 is too small"),
        (["empty"], 300, "there is no text in .*empty.txt"),
        (["empty", "blank"], 300, "there is no text in .*empty.txt, .*blank.txt"),
        ([], 300, "there is no text in no files"),
        (["good", "latin"], 300, "latin.txt is not UTF-8"),
    ):
        with pytest.raises(UserError, match=complaint):
            train(tuple(tmp_path / f"{name}.txt" for name in names), vocab_size, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        train((tmp_path / "none.txt",), 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    for arguments, complaint in (
        (["train", "--vocab-size", "200", "README.md", "--out", tmp_path / "out"], "--vocab-size 200 is too small"),
        (["train", "--vocab-size", "300", tmp_path / "none.txt", "--out", tmp_path / "out"], "none.txt"),
        (["learn"], "train, compare, show"),
        (["show", ""], "an empty value"),
        (["train", "--vocab-siez", "300"], "Unrecognized options: --vocab-siez"),
    ):
        command = [sys.executable, "-m", "data.bpe", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and complaint in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_compare_prints_the_bytes_a_token_of_each_tokenizer_on_each_file(folder, tmp_path):
    (tmp_path / "code.txt").write_text(CODE, encoding="utf-8")
    files = (tmp_path / "code.txt", ROOT / "tests" / "texts" / "russian.txt")
    head, rule, *rows = compare(files, ("bytes", "char", "gpt2", str(folder))).splitlines()
    assert head == "| bytes per token | vocabulary | code.txt | russian.txt |" and set(rule) == {"|", " ", "-"}
    assert rows.pop(0) == "| bytes | 257 | 1.00 | 1.00 |"
    for row, tokenizer in zip(rows, (None, gpt2(), load(str(folder))), strict=True):
        name, vocabulary, *ratios = row.strip("| ").split(" | ")
        for text, ratio in zip((CODE, RUSSIAN), ratios, strict=True):
            tokens = tokenizer.encode(text) if tokenizer else text
            assert ratio == f"{len(text.encode()) / len(tokens):.2f}"
        assert vocabulary == f"{tokenizer.vocab_size if tokenizer else len(set(CODE + RUSSIAN)):,}"
    (tmp_path / "empty.txt").touch()
    for files in ((), (tmp_path / "empty.txt",), (tmp_path / "code.txt", tmp_path / "empty.txt")):
        with pytest.raises(UserError, match=f"there is no text in {tmp_path / 'empty.txt' if files else 'no files'}"):
            compare(files)


def test_show_puts_bars_between_tokens_and_escapes_what_is_no_character():
    with pytest.raises(UserError, match="the text is empty"):
        show("")
    assert "\ufffd" in show("a\udcff")  # a byte of the shell that is no UTF-8
    assert show("127 + 677 = 804", ("gpt2",)).splitlines() == [
        "gpt2: 7 tokens of 15 bytes",
        "|127  | +  | 6 |77  | = | 8 |04  |",
        "|16799|1343|718|3324|796|807|3023|",
    ]
    assert show("мир\n", ("char", "bytes")).splitlines() == [
        "char: 4 tokens of 7 bytes",
        "|м|и|р|\\n|",
        "|2|1|3|0 |",
        "bytes: 7 tokens of 7 bytes",
        r"|\xd0|\xbc|\xd0|\xb8|\xd1|\x80|\n |",
        "|140 |120 |140 |116 |141 |222 |198|",
    ]
