"""Many documents to token ids, fast: `encode_documents` in one process, `encode_in_order` in several.

GPT-2 cuts a text into words (with the space before them), numbers, ... and then encodes each. Cutting takes three
quarters of the time, because one alternative of the pattern looks ahead:

    '(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|\\s+(?!\\S)|\\s

For k white-space characters before a word, `\\s+(?!\\S)` takes the first k - 1. A pattern without look-ahead runs on
an automaton, several times faster, but cannot say that. PATTERN leaves the alternative out, so that white space inside
a text becomes pieces of one character, which is the same for k = 1 and 2. A text with a longer run is cut by hand,
before its first k - 1 characters and after them: a piece begins or ends there anyway, so the ids of the parts, joined,
are the ids of the text.
"""

import functools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiktoken

from data.files import UserError
from data.tokenizer import PATTERNS, BytePairTokenizer, Tokenizer, from_spec, token_dtype

Label = TypeVar("Label")

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s"
# What \s means to tiktoken: Unicode's White_Space. Python's \s has four control characters more, RE2's only six in all.
WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
RUN = re.compile(f"[{WHITE_SPACE}]{{3,}}+")


def encode_documents(texts: Sequence[str], spec: str) -> np.ndarray:
    """Return all documents in one array, (n,) of token_dtype: for each, the end-of-text token and then its ids.

    The ids are those of the tokenizer whose `spec()` is the JSON `spec`; "<|endoftext|>" inside a text is text.
    """
    tokenizer, automaton = _tokenizers(spec)
    eot = np.array([tokenizer.eot], token_dtype(tokenizer.vocab_size))
    try:
        runs = pc.match_substring_regex(pa.array(texts, pa.large_string()), f"[{WHITE_SPACE}]{{3}}").to_pylist()
    except UnicodeEncodeError:  # a lone surrogate somewhere
        automaton = None
    parts = [eot[:0]]
    if automaton is None:
        for text in texts:
            parts += [eot, tokenizer.encode(text)]
    else:
        for text, has_run in zip(texts, runs, strict=True):
            parts.append(eot)
            parts.extend(map(automaton.encode, _cut_runs(text) if has_run else (text,)))
    return np.concatenate(parts)


def encode_in_order(
    batches: Iterable[tuple[Label, Sequence[str]]], processes: int, spec: str
) -> Iterator[tuple[Label, np.ndarray]]:
    """Yield (label, encode_documents(texts, spec)) for each (label, texts), in order, from several processes.

    `batches` is read in this process, a few ahead. Raise UserError if a process dies. Ctrl-C is for this process
    alone; the others end with it, also when it is killed.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (spec,))
    batches, ahead, failure = iter(batches), deque(), None
    try:
        while failure is None or ahead:
            # Enough ahead that no process waits, few enough to hold in memory.
            while failure is None and len(ahead) < 2 * processes + 2:
                try:
                    label, texts = next(batches)
                    ahead.append((label, pool.submit(encode_documents, texts, spec)))
                except Exception as error:  # raised after what was read before it
                    failure = error
            if ahead:
                label, future = ahead.popleft()
                yield label, future.result()
        if not isinstance(failure, StopIteration):
            raise failure
    except BrokenProcessPool:
        raise UserError(
            "a tokenizer process died (out of memory?): repeat the same command, which resumes, with fewer --processes "
            "if need be"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@functools.cache
def _tokenizers(spec: str) -> tuple[Tokenizer, BytePairTokenizer | None]:
    """The tokenizer of a spec, and the same with PATTERN in place of GPT-2's; None if it cuts in another way."""
    tokenizer = from_spec(json.loads(spec))
    if not isinstance(tokenizer, BytePairTokenizer) or tokenizer.encoding._pat_str != PATTERNS["gpt2"]:
        return tokenizer, None
    # A special token is kept: without any, the search for special tokens would stop at every character.
    special, ranks = tokenizer.encoding._special_tokens, tokenizer.encoding._mergeable_ranks
    automaton = tiktoken.Encoding("automaton", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return tokenizer, BytePairTokenizer(automaton, tokenizer.spec())


def _cut_runs(text: str) -> Iterator[str]:
    """The text cut before the first k - 1 characters of each run of k > 2 inside it, and after them."""
    start = 0
    for run in RUN.finditer(text):
        if run.end() < len(text):  # the pattern itself takes the white space that ends a text as one piece
            yield text[start : run.start()]
            yield text[run.start() : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def _start_worker(spec: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizers(spec)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work forever."""
    with suppress(Exception):
        multiprocessing.parent_process().join()
    os._exit(1)
