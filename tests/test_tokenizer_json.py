"""tokenizer.json: Hugging Face's tokenizers library as the judge, id by id, over awkward texts."""

import hashlib
import json
import random

import pytest
import tiktoken
import tokenizers
from tiktoken_ext.openai_public import r50k_pat_str

from data.files import UserError
from data.tokenizer import PATTERNS, BytePairTokenizer, CharTokenizer, bytes_to_unicode, gpt2
from data.tokenizer_json import merges, tokenizer_json


def awkward_texts():
    some = "Hello, world!  \n\n  x\t y's DON'T   ", "naïve café 日本語 🤖\x00\x7f\u00a0\u3000 \x85 a\x1cb", ""
    rng = random.Random(0)
    alphabet = " \n\r\tabcdeABé日91234'!,.sdmtlre🤖\u00a0"
    lengths = [rng.randrange(1, 60) for _ in range(1000)]
    return [*some, " " * 50 + "\n" * 7 + "a", "aaaa" * 40, *("".join(rng.choices(alphabet, k=n)) for n in lengths)]


TEXTS = awkward_texts()


def judge(tokenizer):
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))


def bpe(ranks, pattern=r50k_pat_str):
    special = {"<|endoftext|>": len(ranks)}
    return BytePairTokenizer(
        tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special), {}
    )


def first_of_gpt2(count):
    return {token: rank for token, rank in gpt2().encoding._mergeable_ranks.items() if rank < count}


CHARACTERS = "".join(sorted(set("".join(TEXTS))))
TOKENIZERS = {
    "gpt2": gpt2,
    "char with documents": lambda: CharTokenizer(CHARACTERS, documents=True),
    "char": lambda: CharTokenizer(CHARACTERS, documents=False),
    "bpe": lambda: bpe(first_of_gpt2(1000)),
    "bpe with GPT-4's pattern": lambda: bpe(first_of_gpt2(1000), PATTERNS["gpt4"]),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_hugging_face_reads_the_same_ids_and_the_same_text(tokenizer):
    ours = tokenizer()
    theirs = judge(ours)
    assert (theirs.get_vocab_size(), theirs.token_to_id("<|endoftext|>")) == (ours.vocab_size, ours.eot)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text).ids == ids and theirs.decode(ids) == ours.decode(ids), repr(text)


def test_merges_of_gpt2_are_openais_file_byte_for_byte():
    pairs = merges(gpt2().encoding._mergeable_ranks).values()
    lines = [f"{bytes_to_unicode(left)} {bytes_to_unicode(right)}" for left, right in pairs]
    digest = hashlib.sha256("\n".join(["#version: 0.2", *lines, ""]).encode()).hexdigest()
    assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def test_a_token_that_no_merge_makes_stands_for_a_whole_word_as_in_tiktoken():
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256, b"aa": 257, b"aaa": 258}
    assert merges(ranks) == {b"abc": None, b"aa": (b"a", b"a"), b"aaa": (b"aa", b"a")}
    ours = bpe(ranks)
    assert ours.encode("abc").tolist() == [256]
    for text in ["abc", "abcabc", "abc abc", "aaaaaaa aaa", "xabc"]:
        assert judge(ours).encode(text).ids == ours.encode(text).tolist()


def test_what_the_format_cannot_hold_and_a_character_without_a_token_are_refused():
    with pytest.raises(Exception, match="UNK"):
        judge(CharTokenizer("ab", documents=False)).encode("abz")
    with pytest.raises(UserError, match="cannot be written as a tokenizer.json"):
        tokenizer_json(bpe(first_of_gpt2(256), r"\p{N}{1,3}+\p{L}|\s|\S"))
    with pytest.raises(UserError, match=r"two tokens spelled '<\|endoftext\|>'"):
        tokenizer_json(bpe(first_of_gpt2(256) | {b"<|endoftext|>": 256}))
