"""The documents of Parquet, .jsonl and .txt files, here or at the Hugging Face Hub, streamed in batches."""

import glob
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data.files import UserError

BYTES_PER_TOKEN = {".parquet": 2.9, ".jsonl": 4.5, ".txt": 4.5}  # of English, to estimate disk space and time
BATCH_CHARACTERS = 300_000  # per task of a tokenizer process, about 15 ms


class File(NamedTuple):
    """A file of documents: where `datasets` finds it, its name and its bytes."""

    place: str
    name: str
    bytes: int

    @property
    def tokens(self) -> int:
        """About how many tokens it holds."""
        return int(self.bytes / BYTES_PER_TOKEN[Path(self.name).suffix])


class Batch(NamedTuple):
    """How many documents a batch holds, how many empty ones were left out, and whether it is its group's last."""

    documents: int
    empty: int
    last: bool


def local_files(paths: Sequence[Path]) -> list[File]:
    """Return the files of --input. Raise UserError if one is missing or of an unknown kind."""
    for path in paths:
        if path.suffix not in BYTES_PER_TOKEN:
            raise UserError(f"--input {path} is of an unknown kind: its name must end in .parquet, .jsonl or .txt")
        if not path.is_file():
            raise UserError(f"--input {path} does not exist: give the names of .parquet, .jsonl or .txt files")
    return [File(glob.escape(str(path.absolute())), path.name, path.stat().st_size) for path in paths]


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
    row, kind = 0, Path(file.name).suffix
    try:
        for text in itertools.chain.from_iterable(_columns(file.place, kind)):
            if kind != ".parquet" and row == 0:
                text = text.removeprefix("\ufeff")
            if kind == ".jsonl":
                text = json.loads(text)["text"] if text.strip() else None
            if not isinstance(text, str | None):
                raise ValueError('"text" is not a string')
            yield text
            row += 1
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        hint = "mend it and repeat the same command, which resumes, or start again without it"
        if file.place.startswith("hf://"):
            hint = "when the network is back, repeat the same command, which resumes"
        raise UserError(f"cannot read {file.name} past row {row} ({reason}): {hint}") from None


def _columns(place: str, kind: str) -> Iterator[list[str | None]]:
    """Yield the rows of a file, as many at a time as `datasets` reads: a row group of Parquet, 10 MB of lines."""
    from datasets import load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it logs an error as well as raising it
    # Lines are parsed here: the JSON reader of `datasets` gives up if a later line has another set of keys.
    builder = "parquet" if kind == ".parquet" else "text"
    options = {".parquet": {"columns": ["text"]}, ".jsonl": {}, ".txt": {"sample_by": "document"}}[kind]
    rows = load_dataset(builder, data_files=[place], split="train", streaming=True, **options).with_format("arrow")

    def read(part) -> list[str | None]:
        return [text for table in part.iter(batch_size=1000) for text in table["text"].to_pylist()]

    if kind != ".parquet":
        yield from (table["text"].to_pylist() for table in rows.iter(batch_size=1000))
        return
    # One row group at a time. Read as one, the file would be decoded as fast as it arrives, and fill the memory if
    # tokenizing is slower. From the Hub, reading several in parallel hides the latency of each.
    rows = rows.reshard()
    with ThreadPoolExecutor(ahead := 8 if place.startswith("hf://") else 2) as readers:
        row_groups = deque()
        for i in range(rows.num_shards):
            row_groups.append(readers.submit(read, rows.shard(rows.num_shards, i)))
            if len(row_groups) > ahead:
                yield row_groups.popleft().result()
        while row_groups:
            yield row_groups.popleft().result()
