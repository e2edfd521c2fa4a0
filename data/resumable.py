"""Shards that take hours to write: whatever stops the writing, the same command goes on and ends with the same bytes.

Beside the shards lies a record, a JSON file, written whole after each of them. It says of what the shards are made, up
to which row they hold the text, and keeps the tokens of those rows that no shard holds yet. A shard without its entry
in the record is written again.
"""

import base64
import errno
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import UserError, atomic_write

# The processes that tokenize import this module too, so data.shards, which imports torch, waits until it is used.

DTYPE = np.dtype("<u2")  # of GPT-2's tokens


class Position(NamedTuple):
    """How far reading came: the next row and its file, and how many documents and empty rows come before it."""

    file: int = 0
    row: int = 0
    documents: int = 0
    empty: int = 0


@dataclass(frozen=True)
class Record:
    """recipe: what must be the same when the command is repeated, JSON types; leftover: tokens in base64."""

    recipe: dict
    position: Position = Position()
    leftover: str = ""
    shards: dict[str, list[dict]] = field(default_factory=lambda: {"train": [], "val": []})
    finished: bool = False

    def tokens(self) -> int:
        """How many tokens the finished shards hold."""
        return sum(shard["tokens"] for split in self.shards.values() for shard in split)

    def save(self, path: Path) -> None:
        """Writes the record whole."""
        atomic_write(path, lambda file: file.write(json.dumps(asdict(self), indent=1).encode()))


def read_record(path: Path) -> Record | None:
    """The record at `path`, or None; UserError when it is damaged, or when a shard that it lists is not there whole."""
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text("utf-8"))
        record = Record(**{**saved, "position": Position(*saved["position"])})
        base64.b64decode(record.leftover, validate=True)
        listed = [(path.parent / s["file"], int(s["tokens"])) for split in record.shards.values() for s in split]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete {path.parent} to start again") from None
    for shard, tokens in listed:
        if not shard.is_file() or shard.stat().st_size <= tokens * DTYPE.itemsize:  # a header comes first
            raise UserError(
                f"{shard} is missing or cut short, though {path.name} lists it: put it back, or delete {path.parent} "
                "to start again"
            )
    return record


def remove_shards(folder: Path, record_name: str, prefix: str, only_unfinished: bool) -> None:
    """Removes what a killed process left half-written, and without `only_unfinished` shards and record too."""
    shard = rf"{re.escape(prefix)}(train|val)_\d{{6}}\.npy"
    ours = rf"\.({shard}|{re.escape(record_name)})\.[0-9a-f]{{8}}\.tmp"
    if not only_unfinished:
        (folder / record_name).unlink(missing_ok=True)  # first: a record without its shards would be an error
        ours += f"|{shard}"
    for path in folder.iterdir():
        if re.fullmatch(ours, path.name):
            path.unlink(missing_ok=True)


def write_shards(
    path: Path,
    record: Record,
    encoded: Iterable[tuple[Position, np.ndarray]],
    shard_tokens: int,
    prefix: str,
    val: bool,
) -> Record:
    """Writes the shards of `encoded` behind those of the record at `path`, and returns the finished record.

    encoded: (position behind the documents, their tokens (n,) uint16), from record.position on
    prefix: begins the name of each shard; val: whether the first shard is the validation shard
    """
    from data.shards import write_shard

    def write(tokens: np.ndarray, position: Position, rest: np.ndarray) -> Record:
        split = "val" if val and not record.shards["val"] else "train"
        number = len(record.shards[split])
        try:
            entry = write_shard(path.parent / f"{prefix}{split}_{number:06d}.npy", tokens)
            shards = record.shards | {split: [*record.shards[split], entry]}
            leftover = base64.b64encode(rest.tobytes()).decode()
            written = replace(record, position=position, leftover=leftover, shards=shards)
            written.save(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk of {path.parent} is full after {record.tokens():,} tokens: make room and repeat the same "
                "command, which goes on from there"
            ) from None
        return written

    buffer, used = np.empty(shard_tokens, DTYPE), 0
    position, tokens = record.position, np.frombuffer(base64.b64decode(record.leftover), DTYPE)
    encoded = iter(encoded)
    while True:
        while len(tokens):
            piece, tokens = np.split(tokens, [shard_tokens - used])
            buffer[used : used + len(piece)] = piece
            used += len(piece)
            if used == shard_tokens:
                record, used = write(buffer, position, tokens), 0
        try:
            position, tokens = next(encoded)
        except StopIteration:
            break
    if used:
        record = write(buffer[:used], position, tokens)
    record = replace(record, position=position, leftover="", finished=True)
    record.save(path)
    return record
