"""A byte-level BPE of your own, learned from text: `python -m data.bpe train --vocab-size N FILES --out FOLDER`.

Text is split into words by GPT-2's pattern, or GPT-4's, and every distinct word is taken as its UTF-8 bytes, with its
count. Then the most frequent pair of adjacent tokens is merged into a new token everywhere, again and again. Ties go
to the pair with the smaller left id, then to the one with the smaller right id. Pairs in a
run overlap when they are counted ("aaa" has two of "aa") and are merged from the left. A pair that occurs once is not
merged. These are the rules of the byte-level BPE trainer in Hugging Face's `tokenizers` (min_frequency=2), and the
tests compare the two. Two differences: a file is one text here, while its `train(files)` takes every line as a separate
text (`train_from_iterator` does not); and the two libraries may have different versions of Unicode, so that new letters
are letters to only one of them.

The vocabulary is the 256 bytes, the merges in order, and <|endoftext|> last: N counts them all. `python -m data.bpe
compare` compares several tokenizers, `show` cuts a text into tokens.
"""

import codecs
import heapq
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import regex
import tyro

from data.files import UserError, atomic_write, run_script
from data.outside import open_bytes
from data.text import other_encoding, read_text
from data.tokenizer import BYTE_TO_UNICODE, PATTERNS, TRAINED_FILE, Tokenizer, byte_pairs, choose
from data.tokenizer_json import tokenizer_json

CHUNK_BYTES = 1 << 20  # read at a time
HEAD_BYTES = 1 << 20  # looked at to guess the encoding of a file that is not UTF-8
LOOK_AHEAD = 2  # characters after an apostrophe that decide whether it begins a word: those of 'll
MIN_COUNT = 2  # least occurrences of a pair that is merged
SEPARATOR = 0xFF  # between words: no UTF-8 text has this byte
NOTHING = -1  # id of a position at which no token begins: a separator, or inside a token


# ------------------------------------------------------------------------------------------------------------- counting


def count_words(chunks: Iterable[str], pattern: str) -> Counter[str]:
    """Count each word of a text that comes in chunks, cut anywhere."""
    words_of, counts, rest, fresh = regex.compile(PATTERNS[pattern]).findall, Counter(), "", []
    for chunk in chunks:
        fresh.append(chunk)
        if sum(map(len, fresh)) < len(rest):  # a long word is read again only when the text has doubled
            continue
        text, fresh = "".join([rest, *fresh]), []
        # A word may continue in the next chunk, so the last ones are put back. Trailing white space is one word and is
        # put back entirely. (The words of a text, joined, are the text.)
        words, end, settled = words_of(text), len(text), len(text) - LOOK_AHEAD
        while words and end > settled:
            end -= len(words.pop())
        counts.update(words)
        rest = text[end:]
    counts.update(words_of("".join([rest, *fresh])))
    return counts


def read_chunks(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces, as data.text reads it: without byte order mark, \\r\\n as \\n.

    Raise UserError if it is not UTF-8, OSError if it cannot be read.
    """
    decoder, mark, held, head, size = codecs.getincrementaldecoder("utf-8")(), "\ufeff", "", b"", 0
    with open_bytes(path) as file:
        try:
            while content := file.read(CHUNK_BYTES):
                head, size = head + content[: HEAD_BYTES - len(head)], size + len(content)
                text = held + decoder.decode(content)
                held = "\r" if text.endswith("\r") else ""  # whose \n may begin the next piece
                yield text.removesuffix(held).removeprefix(mark).replace("\r\n", "\n")
                mark = "" if text else mark
            yield held + decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # counted and kept: a pipe and a compressed file have no position to ask for or to go back to
            offset = size - len(error.object) + error.start
            place = f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset}"
            raise other_encoding(path, head + file.read(HEAD_BYTES - len(head)), None, place) from None


# ------------------------------------------------------------------------------------------------------------- learning


def learn(words: Mapping[str, int], n_merges: int) -> list[bytes]:
    """Return the tokens that `n_merges` merges make, in order; fewer if no pair is left that occurs twice.

    words: word -> count. The bytes of all words lie in one array, and each token has its id at its first byte. All
    occurrences of a pair appear at once, with the younger of its two tokens, and afterwards only get fewer. So each
    pair is put on a heap with its positions and its count, and counted again only when it reaches the top: if it has
    lost some, it goes back with the rest.
    """
    tokens = [bytes([byte]) for byte in BYTE_TO_UNICODE]
    ids, weights = _laid_out(words)
    before = np.arange(-1, len(ids) - 1, dtype=_int_dtype(len(ids)))  # the start of the token before a token
    first = np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0)).astype(before.dtype)
    keys = (256 * ids[first] + ids[first + 1]).astype(np.uint16)  # 16 bits are sorted fast
    heap = [(-count, pair >> 8, pair & 255, at) for pair, count, at in _grouped(keys, first, weights)]
    heapq.heapify(heap)
    while heap and len(tokens) < 256 + n_merges:
        noted, left, right, at = heapq.heappop(heap)
        at = at[(ids[at] == left) & (ids[at + len(tokens[left])] == right)]
        count = int(weights[at].sum(dtype=np.int64))
        if count != -noted:
            if count >= MIN_COUNT:
                heapq.heappush(heap, (-count, left, right, at))
            continue
        if left == right:
            at = at[_every_other(before[at[1:]] == at[:-1])]
        new = len(tokens)
        ids[at], ids[at + len(tokens[left])] = new, NOTHING
        tokens.append(tokens[left] + tokens[right])
        after = at + len(tokens[new])
        before[after] = at
        # The new pairs: (new, what follows it), then (what precedes it, new) without (new, new) a second time.
        follows = ids[after] >= 0
        for other, count, starts in _grouped(ids[after[follows]], at[follows], weights):
            heapq.heappush(heap, (-count, new, other, starts))
        front = before[at]
        front = front[(ids[front] >= 0) & (ids[front] != new)]
        for other, count, starts in _grouped(ids[front], front, weights):
            heapq.heappush(heap, (-count, other, new, starts))
    return tokens[256:]


def _laid_out(words: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (n,) int32, each word's bytes followed by NOTHING; and weights (n,), integers, the word's count."""
    id_of_byte = np.full(256, NOTHING, np.int32)
    id_of_byte[[*BYTE_TO_UNICODE]] = np.arange(256)
    id_of_byte[SEPARATOR] = NOTHING
    encoded = [word.encode() + bytes([SEPARATOR]) for word in words]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    counts = np.fromiter(words.values(), _int_dtype(max(words.values(), default=0)), len(encoded))
    return id_of_byte[np.frombuffer(b"".join(encoded), np.uint8)], np.repeat(counts, lengths)


def _int_dtype(most: int) -> type[np.integer]:
    """Return the smaller of int32 and int64 that holds `most`."""
    return np.int32 if most < 1 << 31 else np.int64


def _grouped(keys: np.ndarray, positions: np.ndarray, weights: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (key, sum of the weights, sorted positions) of each distinct key whose sum is at least MIN_COUNT."""
    if not len(keys):
        return
    order = np.argsort(keys, kind="stable")
    keys, positions = keys[order], positions[order]
    edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
    counts = np.add.reduceat(weights[positions], edges[:-1], dtype=np.int64)
    for i in np.flatnonzero(counts >= MIN_COUNT):
        yield int(keys[edges[i]]), int(counts[i]), positions[edges[i] : edges[i + 1]]


def _every_other(joined: np.ndarray) -> np.ndarray:
    """Mark, (n,) bool, the first, third, ... of each run; joined: (n - 1,) whether each next one continues the run."""
    place = np.arange(len(joined) + 1)
    run_start = np.maximum.accumulate(np.where(np.concatenate([[False], joined]), 0, place))
    return (place - run_start) % 2 == 0


# ------------------------------------------------------------------------------------------------------------ commands


def train(
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILES")],
    vocab_size: Annotated[int, tyro.conf.arg(metavar="N")],
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    pattern: Literal["gpt2", "gpt4"] = "gpt2",
) -> str:
    """Learn a byte-level BPE from text files.

    Return a one-line summary; if the text is too small for so many tokens, the vocabulary is smaller and a note on
    stderr says so. Raise UserError if the vocabulary is too small for the bytes, if a file cannot be read or is not
    UTF-8, or if there is no text.

    Args:
        files: Text files in UTF-8.
        vocab_size: Number of tokens: the 256 bytes, the learned ones, and the end of text.
        out: The folder to write: bpe.json, and tokenizer.json for Hugging Face's libraries. A name that ends in .json
            is the file to write instead of bpe.json, alone.
        pattern: The pattern that splits text into words: GPT-2's or GPT-4's.
    """
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size} is too small: the 256 bytes and the end of text make at least 257")
    words = Counter()
    for path in files:  # one by one, since no word spans two files
        words.update(count_words(read_chunks(path), pattern))
    if not any(map(str.strip, words)):
        raise UserError(f"there is no text in {', '.join(map(str, files)) or 'no files'}: give files that hold some")
    path = out if out.suffix == ".json" else out / TRAINED_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_pairs(pattern, learn(words, vocab_size - 257))
    if tokenizer.vocab_size < vocab_size:
        print(
            f"note: this text gives {tokenizer.vocab_size:,} tokens, not {vocab_size:,}: after those no pair occurs "
            "twice; more text gives more",
            file=sys.stderr,
        )
    _write_json(path, tokenizer.spec())
    if path != out:
        _write_json(out / "tokenizer.json", tokenizer_json(tokenizer))
    return f"{path}: {tokenizer.vocab_size:,} tokens, learned from {words.total():,} words, {len(words):,} distinct"


def compare(
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILES")],
    tokenizer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="bytes|char|gpt2|FILE ...")] = (
        "bytes",
        "char",
        "gpt2",
    ),
) -> str:
    """Show the bytes per token of each text file for each tokenizer.

    Return a table, a row per tokenizer. Raise UserError if a file cannot be read, is not UTF-8 or is empty, if there
    is no such tokenizer, or if it lacks a character.

    Args:
        files: Text files in UTF-8, a column each.
        tokenizer: Bytes, characters (those of all the files), GPT-2's tokens, or those of a file or folder that holds
            a tokenizer.
    """
    texts = [read_text(path) for path in files]
    empty = [str(path) for path, text in zip(files, texts, strict=True) if not text]
    if empty or not files:
        raise UserError(f"there is no text in {', '.join(empty) or 'no files'}: give files that hold some")
    rows = [["bytes per token", "vocabulary", *(path.name for path in files)], ["---"] * (2 + len(files))]
    for name in tokenizer:
        chosen = _choose(name, "".join(texts))
        ratios = [len(text.encode()) / len(chosen.encode(text)) for text in texts]
        rows.append([name, f"{chosen.vocab_size:,}", *(f"{ratio:.2f}" for ratio in ratios)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def show(
    text: Annotated[str, tyro.conf.Positional],
    tokenizer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="bytes|char|gpt2|FILE ...")] = ("char", "gpt2"),
) -> str:
    r"""Show a text's tokens.

    Return, for each tokenizer, the number of tokens, the pieces between bars and the ids below. Line breaks, tabs and
    bytes that are no whole character are shown as \n, \t and \xd0. Raise UserError for an empty text or no such
    tokenizer.

    Args:
        text: The text, quoted for the shell.
        tokenizer: Bytes, characters (those of the text), GPT-2's tokens, or those of a file or folder that holds a
            tokenizer.
    """
    if not text:
        raise UserError("the text is empty: give some, in quotes")
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes of the shell that are no UTF-8
    lines = []
    for name in tokenizer:
        chosen = _choose(name, text)
        ids = chosen.encode(text).tolist()
        pieces = [chosen.decode_bytes([i]).decode(errors="backslashreplace") for i in ids]
        pieces = [piece.translate({9: r"\t", 10: r"\n", 13: r"\r"}) for piece in pieces]
        widths = [max(len(piece), len(str(i))) for piece, i in zip(pieces, ids, strict=True)]
        lines.append(f"{name}: {len(ids)} tokens of {len(text.encode())} bytes")
        for row in (pieces, map(str, ids)):
            lines.append(f"|{'|'.join(word.ljust(width) for word, width in zip(row, widths, strict=True))}|")
    return "\n".join(lines)


def _choose(name: str, text: str) -> Tokenizer:
    """Return the tokenizer of that name: "bytes" has no merges, "char" the characters of `text`."""
    return byte_pairs("gpt2", []) if name == "bytes" else choose(name, text, documents=False)


def _write_json(path: Path, content: dict) -> None:
    atomic_write(path, lambda file: file.write(json.dumps(content, ensure_ascii=False, indent=1).encode()))


def main() -> None:
    description = "Learn a byte-level BPE from text, compare tokenizers, or show a text's tokens."
    run_script({"train": train, "compare": compare, "show": show}, prog="python -m data.bpe", description=description)


if __name__ == "__main__":
    main()
