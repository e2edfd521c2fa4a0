"""
tokenizer.json: a tokenizer of ours in the words of Hugging Face's tokenizers library.

That library cuts a text into words (pre_tokenizer), looks the words up or merges their pieces (model), and knows some
tokens by their spelling alone (added_tokens). Its BPE wants the merges, pairs in order, where tiktoken keeps only the
tokens with their ranks: `merges` finds the pairs.
"""

import re

import tiktoken

from data.files import UserError
from data.tokenizer import END_OF_TEXT, BytePairTokenizer, CharTokenizer, Tokenizer, spelled


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """
    The content of a tokenizer.json that gives the ids of `tokenizer` for every text without special tokens.

    (A special token's spelling in a text becomes that token in Hugging Face's libraries, and stays text in ours.)
    UserError where the format has no words for it.
    """
    if isinstance(tokenizer, CharTokenizer):
        model, split, decoder, special = _characters(tokenizer)
    elif isinstance(tokenizer, BytePairTokenizer):
        model, split, decoder, special = _byte_pairs(tokenizer._encoding)
    else:
        raise UserError(f"the {tokenizer.name} tokenizer cannot be written as a tokenizer.json")
    clash = next((text for text in special if text in model["vocab"]), None)
    if clash is not None:
        raise UserError(f"the {tokenizer.name} tokenizer has two tokens spelled {clash!r}: a tokenizer.json holds one")
    model["vocab"] |= special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in sorted(special.items(), key=_id)],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _characters(tokenizer: CharTokenizer) -> tuple[dict, dict, dict, dict[str, int]]:
    """Model, pre-tokenizer, decoder, special tokens: every character is a word. One that it lacks is an error."""
    vocab = {character: i for i, character in enumerate(tokenizer.characters)}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    special = {} if tokenizer.eot is None else {END_OF_TEXT: tokenizer.eot}
    return {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}, split, {"type": "Fuse"}, special


def _byte_pairs(encoding: tiktoken.Encoding) -> tuple[dict, dict, dict, dict[str, int]]:
    """Model, pre-tokenizer, decoder, special tokens: tokens spelled with a character a byte, and the merges."""
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks, pattern = encoding._mergeable_ranks, encoding._pat_str
    pairs = merges(ranks)
    bytes_to_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = bytes_to_text  # brings GPT-2's pattern along, without which a pattern of its own comes first
    if pattern != r50k_pat_str:
        words = {"type": "Split", "pattern": {"Regex": _oniguruma(pattern)}, "behavior": "Isolated", "invert": False}
        split = {"type": "Sequence", "pretokenizers": [words, bytes_to_text | {"use_regex": False}]}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": None in pairs.values(),  # a word that is a token as it stands, as tiktoken looks for it too
        "vocab": vocabulary(encoding),
        "merges": [[spelled(left), spelled(right)] for left, right in filter(None, pairs.values())],
    }
    return model, split, bytes_to_text, dict(encoding._special_tokens)


def _oniguruma(pattern: str) -> str:
    """
    The pattern for Oniguruma, where a + behind {1,3} means "once or more" and does not forbid to go back.

    At the end of an alternative there is nothing to go back for, and the + can go; UserError where it stands elsewhere.
    """
    same = re.sub(r"(\{\d+(?:,\d*)?\})\+(?=[|)]|$)", r"\1", pattern)
    if re.search(r"\{\d+(?:,\d*)?\}\+", same):
        raise UserError(f"a tokenizer.json cannot hold the pattern {pattern}: write (?>x{{1,3}}) for x{{1,3}}+ there")
    return same


def merges(ranks: dict[bytes, int]) -> dict[bytes, tuple[bytes, bytes] | None]:
    """
    In order of rank, each token of several bytes and the pair that it is merged from.

    ranks: bytes -> id, lower ids merged first. The pair is what merging by lower ids alone makes of the token's bytes;
    None where more than two pieces remain, for then no merge makes the token: it only stands for a whole word.
    """
    pairs = {}
    for token, rank in sorted(ranks.items(), key=_id):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:], strict=False)]
            best = min(joined)
            if best >= rank:
                break
            where = joined.index(best)  # the leftmost of equals, as in encoding
            parts[where : where + 2] = [parts[where] + parts[where + 1]]
        if len(token) > 1:
            pairs[token] = tuple(parts) if len(parts) == 2 else None
    return pairs


def vocabulary(encoding: tiktoken.Encoding) -> dict[str, int]:
    """Spelling -> id of all tokens but the special ones, in order."""
    return {spelled(token): i for token, i in sorted(encoding._mergeable_ranks.items(), key=_id)}


def _id(item: tuple) -> int:
    return item[1]
