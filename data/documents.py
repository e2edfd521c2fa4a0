"""The documents of files, here or at the Hugging Face Hub, streamed in batches.

A row of Parquet, JSON lines or CSV is a document, the one in its `text` field; a .txt file is one document. JSON lines,
CSV and .txt may be compressed, as .gz or .zst.
"""

import csv
import glob
import io
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data.files import UserError
from data.outside import open_bytes
from data.text import note_end_of_text, read_text
from data.tokenizer import END_OF_TEXT

KINDS = ".parquet, .jsonl, .json, .csv or .txt, or all but the first with .gz or .zst after it"
BATCH_CHARACTERS = 300_000  # per task of a tokenizer process, about 15 ms


class File(NamedTuple):
    """A file of documents: its path or its address at the Hub, its name and its bytes."""

    place: str
    name: str
    bytes: int

    @property
    def kind(self) -> str:
        """The ending that says how it is read, in lower case; "" for an unknown one."""
        match = re.search(r"(\.parquet$|\.jsonl?|\.csv|\.txt)(\.gz|\.zst)?$", self.name.lower())
        return match[1] if match else ""

    @property
    def tokens(self) -> int:
        """About how many tokens of English it holds, to estimate disk space and time."""
        compressed = not self.name.lower().endswith(self.kind)
        bytes_per_token = 2.9 if self.kind == ".parquet" else 1.6 if compressed else 4.5
        return int(self.bytes / bytes_per_token)


class Batch(NamedTuple):
    """How many documents a batch holds, how many empty ones were left out, and whether it is its group's last."""

    documents: int
    empty: int
    last: bool


def local_files(paths: Sequence[Path]) -> list[File]:
    """Return the files of --input. Raise UserError if one is missing or of an unknown kind."""
    found = []
    for path in paths:
        if not File(str(path), path.name, 0).kind:
            raise UserError(f"--input {path} is of an unknown kind: its name must end in {KINDS}")
        if not path.is_file():
            raise UserError(f"--input {path} does not exist: give the names of {KINDS} files")
        found.append(File(str(path.absolute()), path.name, path.stat().st_size))
    return found


def read_batches(groups: Iterable[Sequence[File]]) -> Iterator[tuple[Batch, list[str]]]:
    """Yield the documents of each group of files in batches, the last of them perhaps empty."""
    for files in groups:
        texts, size, empty = [], 0, 0
        for text in itertools.chain.from_iterable(map(read_rows, files)):
            if not text or text.isspace():
                empty += 1
                continue
            texts.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield Batch(len(texts), empty, last=False), texts
                texts, size, empty = [], 0, 0
        yield Batch(len(texts), empty, last=True), texts


def read_rows(file: File) -> Iterator[str | None]:
    """Yield the texts of a file. Raise UserError with the file and the row if it is corrupt."""
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".txt": _whole_text}
    row = 0
    try:
        for text in readers.get(file.kind, _json_rows)(file.place):
            if not isinstance(text, str | None):
                raise ValueError('"text" is not a string')
            yield text
            row += 1
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        hint = "mend it and repeat the same command, which resumes, or start again without it"
        if file.place.startswith("hf://"):
            hint = "when the network is back, repeat the same command, which resumes"
        raise UserError(f"cannot read {file.name} past row {row} ({reason}): {hint}") from None


@contextmanager
def _lines(path: str, newline: str) -> Iterator[io.TextIOWrapper]:
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as lines:
        yield lines


def _json_rows(path: str) -> Iterator:
    # Not the JSON reader of `datasets`, which gives up if a later line has another set of keys.
    with _lines(path, "\n") as lines:
        for number, line in enumerate(lines):
            if number == 0 and line.startswith("["):
                raise ValueError('it is one array: write one object {"text": ...} per line instead')
            yield json.loads(line)["text"] if line.strip() else None


def _csv_rows(path: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KB of the default
    with _lines(path, "") as lines:
        rows = csv.reader(lines, strict=True)
        header = next(rows, [])
        if "text" not in header:
            raise ValueError(f'no column is named "text" among {", ".join(header)}')
        for row in filter(None, rows):
            if len(row) != len(header):
                raise ValueError(f"the row has {len(row)} fields, the header {len(header)}")
            yield row[header.index("text")]


def _whole_text(path: str) -> Iterator[str]:
    text = read_text(path)
    note_end_of_text(path, text.count(END_OF_TEXT))
    yield text


def _parquet_rows(place: str) -> Iterator[str | None]:
    """Yield the column `text`, read as `datasets` does, from the Hub too."""
    from datasets import load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it logs an error as well as raising it
    at_hub = place.startswith("hf://")
    files = [place if at_hub else glob.escape(place)]
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True, columns=["text"])

    def read(part) -> list[str | None]:
        return [text for table in part.iter(batch_size=1000) for text in table["text"].to_pylist()]

    # One row group at a time. Read as one, the file would be decoded as fast as it arrives, and fill the memory if
    # tokenizing is slower. From the Hub, reading several in parallel hides the latency of each.
    rows = rows.with_format("arrow").reshard()
    with ThreadPoolExecutor(ahead := 8 if at_hub else 2) as readers:
        row_groups = deque()
        for i in range(rows.num_shards):
            row_groups.append(readers.submit(read, rows.shard(rows.num_shards, i)))
            if len(row_groups) > ahead:
                yield from row_groups.popleft().result()
        while row_groups:
            yield from row_groups.popleft().result()
