"""Many documents to GPT-2's token ids, quickly: `encode_documents` in one process, `encode_in_order` in several.

GPT-2 first cuts a text into pieces (a word with the space before it, a number, ...) and then encodes each piece. Three
quarters of the time goes into the cutting, because one alternative of the pattern looks ahead:

    '(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|\\s+(?!\\S)|\\s

Of a run of k white-space characters in front of a word, `\\s+(?!\\S)` takes the first k - 1. A regular expression
without look-ahead runs on an automaton, several times faster, but cannot say that. PATTERN leaves the alternative out,
and all white space inside a text becomes pieces of one character. For runs of one or two characters that is the same. A
text with a longer run is cut by hand, in front of its first k - 1 characters and behind them: there a piece begins or
ends anyway, so the ids of the parts, put together, are the ids of the whole.
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

from data.files import UserError
from data.tokenizer import Tokenizer, from_spec, gpt2, token_dtype

Label = TypeVar("Label")

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s"
# What tiktoken's \s means: Unicode's White_Space. Python's \s has four control characters more, RE2's only six at all.
WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
RUN = re.compile(f"[{WHITE_SPACE}]{{3,}}+")


def encode_documents(texts: Sequence[str], spec: str = "") -> np.ndarray:
    """All documents in one array, (n,) uint16: for each, the end-of-text token and then its ids.

    The same ids as `tokenizer.gpt2().encode` gives, or, not as fast, the tokenizer whose `spec()` is the JSON `spec`;
    "<|endoftext|>" in a text is text.
    """
    if spec:
        tokenizer = _tokenizer(spec)
        pieces = [np.insert(tokenizer.encode(text), 0, tokenizer.eot) for text in texts]
        return np.concatenate(pieces) if pieces else np.empty(0, token_dtype(tokenizer.vocab_size))
    import pyarrow as pa
    import pyarrow.compute as pc

    eot = np.array([gpt2().eot], token_dtype(gpt2().vocab_size))
    try:
        runs = pc.match_substring_regex(pa.array(texts, pa.large_string()), f"[{WHITE_SPACE}]{{3}}").to_pylist()
    except UnicodeEncodeError:  # a lone surrogate somewhere
        return np.concatenate([part for text in texts for part in (eot, gpt2().encode(text))])
    parts = []
    for text, has_run in zip(texts, runs, strict=True):
        parts.append(eot)
        parts.extend(_encode(part) for part in (_cut_runs(text) if has_run else (text,)))
    return np.concatenate(parts) if parts else eot[:0]


def encode_in_order(
    batches: Iterable[tuple[Label, Sequence[str]]], processes: int, spec: str = ""
) -> Iterator[tuple[Label, np.ndarray]]:
    """For each (label, texts), in order, (label, encode_documents(texts, spec)), computed by `processes` processes.

    `batches` is read in this process, a few batches ahead. UserError when a process dies. Ctrl-C is for this process
    alone; the others end with it, also when it is killed.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_start_worker)
    batches, ahead, failure = iter(batches), deque(), None
    try:
        while failure is None or ahead:
            # Enough ahead that nobody waits, few enough to hold in memory.
            while failure is None and len(ahead) < 2 * processes + 2:
                try:
                    label, texts = next(batches)
                    ahead.append((label, pool.submit(encode_documents, texts, spec)))
                except Exception as error:  # after what was read before it
                    failure = error
            if ahead:
                label, future = ahead.popleft()
                yield label, future.result()
        if not isinstance(failure, StopIteration):
            raise failure
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenizes has died, perhaps for want of memory: repeat the same command, which goes on "
            "where it stopped, if need be with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@functools.cache
def _tokenizer(spec: str) -> Tokenizer:
    return from_spec(json.loads(spec))


@functools.cache
def _encoding():
    """GPT-2's tiktoken.Encoding with PATTERN in place of its own."""
    import tiktoken

    stock = gpt2()._encoding
    # With no special token at all, the search for them would stop at every character.
    special, ranks = stock._special_tokens, stock._mergeable_ranks
    return tiktoken.Encoding("gpt2-automaton", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _encode(text: str) -> np.ndarray:
    return _encoding().encode_to_numpy(text, disallowed_special=()).astype(token_dtype(gpt2().vocab_size))


def _cut_runs(text: str) -> Iterator[str]:
    """The text cut in front of the first k - 1 characters of each run of k > 2 inside it, and behind them."""
    start = 0
    for run in RUN.finditer(text):
        if run.end() < len(text):  # the pattern itself takes the white space that ends a text as one piece
            yield text[start : run.start()]
            yield text[run.start() : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoding()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    with suppress(Exception):
        multiprocessing.parent_process().join()
    os._exit(1)
