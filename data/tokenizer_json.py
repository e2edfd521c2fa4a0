"""tokenizer.json: one of our tokenizers in the format of Hugging Face's `tokenizers` library, which writes it.

That library splits text into words (pre-tokenizer), looks the words up or merges their bytes (model), and recognizes
special tokens by their spelling. Its BPE needs the merges, as ordered pairs; tiktoken keeps only tokens with their
ranks, so `merges` recovers the pairs.
"""

import heapq
import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data.files import UserError
from data.tokenizer import END_OF_TEXT, PATTERNS, BytePairTokenizer, CharTokenizer, Tokenizer, bytes_to_unicode


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Return the content of a tokenizer.json that gives the ids of `tokenizer` for every text without special tokens.

    (The spelling of a special token in a text becomes that token in Hugging Face's libraries, and stays text in ours.)
    Raise UserError if the format cannot express the tokenizer.
    """
    if isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
    elif isinstance(tokenizer, BytePairTokenizer) and tokenizer.encoding._pat_str in PATTERNS.values():
        ranks = tokenizer.encoding._mergeable_ranks
        vocabulary = {bytes_to_unicode(token): i for token, i in ranks.items()}
    else:
        raise UserError(f"the {tokenizer.name} tokenizer cannot be written as a tokenizer.json")
    if END_OF_TEXT in vocabulary:
        raise UserError(
            f"the {tokenizer.name} tokenizer has two tokens spelled {END_OF_TEXT!r}: a tokenizer.json holds one"
        )
    if tokenizer.eot is not None:
        vocabulary[END_OF_TEXT] = tokenizer.eot
    if isinstance(tokenizer, CharTokenizer):
        # <unk> is not in the vocabulary, so an unknown character is an error
        theirs = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        theirs.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        theirs.decoder = decoders.Fuse()
    else:
        pairs = merges(ranks)
        spelled = [tuple(map(bytes_to_unicode, pair)) for pair in pairs.values() if pair]
        # A word that is a token stays one even if no merge makes it, as in tiktoken.
        theirs = tokenizers.Tokenizer(models.BPE(vocabulary, spelled, ignore_merges=None in pairs.values()))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pattern
        theirs.decoder = decoders.ByteLevel()
        if tokenizer.encoding._pat_str == PATTERNS["gpt4"]:
            # In Oniguruma a + after {1,3} means "once or more"; at the end of an alternative it can be left out.
            words = tokenizers.Regex(PATTERNS["gpt4"].replace("{1,3}+", "{1,3}"))
            of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), of_bytes])
    if tokenizer.eot is not None:
        theirs.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return json.loads(theirs.to_str())


def merges(ranks: dict[bytes, int]) -> dict[bytes, tuple[bytes, bytes] | None]:
    """Return, in order of rank, each token of several bytes and the pair that it is merged from.

    ranks: bytes -> id, lower ids merged first. The pair is what merging by lower ids alone makes of the token's bytes;
    None if more than two pieces remain: no merge makes the token, which only matches a full word.
    """
    tokens = sorted(ranks.items(), key=lambda item: item[1])
    return {token: _last_merge(token, rank, ranks) for token, rank in tokens if len(token) > 1}


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Merge the bytes of a token by ids below `rank` until two pieces remain; return those, or None if more do."""
    # The end of the piece that begins at a byte, and the start of the one before it. A heap, since tokens may be long.
    ends, before, pieces = list(range(1, len(token) + 1)), list(range(-1, len(token))), len(token)
    heap = [(ranks.get(token[i : i + 2], rank), i, i + 1, i + 2) for i in range(len(token) - 1)]
    heapq.heapify(heap)
    while pieces > 2:
        best, start, middle, end = heapq.heappop(heap)  # the leftmost of equals, as in encoding
        if best >= rank:
            return None
        if (ends[start], ends[middle]) != (middle, end):  # merged with others since
            continue
        ends[start], ends[middle], before[end] = end, 0, start
        pieces -= 1
        for left in (before[start], start):
            if left >= 0 and (right := ends[left]) < len(token):
                heapq.heappush(heap, (ranks.get(token[left : ends[right]], rank), left, right, ends[right]))
    return token[: ends[0]], token[ends[0] :]
