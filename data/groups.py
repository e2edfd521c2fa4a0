"""Groups of files, which data.fineweb finishes one after the other: their shards, and what is left to do.

Consecutive files form a group once they hold about a shard of tokens; each file of FineWeb-Edu, with 700 million
tokens, is a group of its own. Group 3 becomes train_00003_000.npy, train_00003_001.npy, ... and then
progress_00003.json, which lists them. The first shard of group 0 is the validation split.
"""

import errno
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.documents import Batch, File
from data.files import UserError, atomic_write
from data.outside import read_json
from data.shards import ENTRIES, clear_dataset, cut, summary, write_meta, write_shard
from data.tokenizer import from_spec, token_dtype

PROGRESS = {  # the shape of a Progress, in the terms of outside.check_shape
    "inputs": {"tokenizer": {"type": str}},
    "files": list,
    "documents": range(2**62),
    "empty": range(2**62),
    "val": ENTRIES,
    "train": ENTRIES,
}


class Progress(NamedTuple):
    """A finished group, the content of progress_GGGGG.json: what it was made of and the entries of its shards."""

    inputs: dict
    files: list
    documents: int
    empty: int
    val: list
    train: list


def group_files(files: Sequence[File], shard_tokens: int) -> list[list[File]]:
    """Cut the list of files into groups of about `shard_tokens` tokens or more; the last may be smaller."""
    groups, tokens = [], shard_tokens
    for file in files:
        if tokens >= shard_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(file)
        tokens += file.tokens
    return groups


def select_groups(groups: Sequence[Sequence[File]], files: str | None) -> list[int]:
    """Return the groups whose first file is in the range --files, all for None; UserError for a bad range."""
    starts = [0, *itertools.accumulate(map(len, groups))]
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", files or f"0:{starts[-1]}")
    first, end = map(int, match.groups()) if match else (0, 0)
    if not first < end <= starts[-1]:
        half = (starts[-1] + 1) // 2
        raise UserError(f"--files {files} is not a range of the {starts[-1]} files: give FIRST:END, such as 0:{half}")
    return [i for i, start in enumerate(starts[:-1]) if first <= start < end]


def read_progress(folder: Path, verify: bool = False) -> dict[int, Progress]:
    """Return the finished groups. Raise UserError if a progress file or a shard that it lists is not intact.

    verify: compare the shards' sha256 too
    """
    finished = {}
    for path in sorted(folder.glob("progress_*.json")):
        hint = ": delete it and repeat the command"
        content = read_json(path, PROGRESS, hint)
        try:
            i = int(path.stem.removeprefix("progress_"))
            if path.name != f"progress_{i:05d}.json" or i < 0:
                raise ValueError("its name is not that of a group")
            finished[i] = progress = Progress(**content)
            itemsize = token_dtype(from_spec(progress.inputs["tokenizer"]).vocab_size).itemsize
        except (ValueError, TypeError, UserError) as error:
            raise UserError(f"{path} is corrupt ({error}){hint}") from None
        listed = [entry["file"] for entry in progress.val + progress.train]
        present = len([*folder.glob(f"[tv]*_{i:05d}_*.npy")])
        if present > len(listed) or listed != [_shard_name(i, j) for j in range(len(listed))]:
            raise UserError(f"{path} is corrupt (it lists {len(listed)} of {present} shards, or not in order){hint}")
        for entry in progress.val + progress.train:
            shard, size = folder / Path(entry["file"]).name, entry["tokens"] * itemsize
            hint = f"put it back, or delete {path.name} and repeat the command"
            if not shard.is_file() or shard.stat().st_size <= size:  # a header comes first
                raise UserError(f"{shard} is missing or truncated, though {path.name} lists it: {hint}")
            if verify:
                with open(shard, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        raise UserError(f"{shard} is corrupt, its sha256 is not the one in {path.name}: {hint}")
    return finished


def check_same(folder: Path, inputs: dict, groups: Sequence[Sequence[File]], finished: dict[int, Progress]) -> None:
    """Raise UserError if a finished group was made of other inputs or files."""
    for i, progress in finished.items():
        differs = [key for key, value in inputs.items() if progress.inputs.get(key) != value]
        if differs or i >= len(groups) or progress.files != _listing(groups[i]):
            option = differs[0].replace("_", "-") if differs else "input"
            raise UserError(
                f"{folder} was begun with another --{option}: repeat the command as it was, give another folder with "
                "--out, or delete it"
            )


def write_group(
    folder: Path, i: int, inputs: dict, files: Sequence[File], encoded: Iterator[tuple[Batch, np.ndarray]]
) -> None:
    """Write the shards of group i, the next in `encoded`, then its progress file; UserError if the disk is full."""
    batches, entries = [], {"val": [], "train": []}

    def arrays() -> Iterator[np.ndarray]:
        for batch, tokens in encoded:
            batches.append(batch)
            yield tokens
            if batch.last:
                return

    try:
        for j, tokens in enumerate(cut(arrays(), inputs["shard_tokens"], from_spec(inputs["tokenizer"]).vocab_size)):
            name = _shard_name(i, j)
            entries[name.partition("_")[0]].append(write_shard(folder / name, tokens))
        documents, empty = sum(batch.documents for batch in batches), sum(batch.empty for batch in batches)
        progress = Progress(inputs, _listing(files), documents, empty, **entries)
        content = json.dumps(progress._asdict(), indent=1).encode()
        atomic_write(folder / f"progress_{i:05d}.json", lambda file: file.write(content))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of {folder} is full after group {i}: make room and repeat the same command, which resumes"
        ) from None


def finish(folder: Path, inputs: dict, groups: Sequence[Sequence[File]], command: str) -> str:
    """Write meta.json if all groups are finished. Return a summary, or which groups are missing."""
    finished = read_progress(folder, verify=True)  # again, since other machines may have added some
    check_same(folder, inputs, groups, finished)
    done = [finished[i] for i in sorted(finished)]
    documents, empty = sum(progress.documents for progress in done), sum(progress.empty for progress in done)
    entries = [entry for progress in done for entry in progress.val + progress.train]
    shards = {"train": entries[1:], "val": entries[:1]}  # the first: of a later group if group 0 holds no text
    tokens = sum(entry["tokens"] for entry in entries)
    if missing := [files[0].name for i, files in enumerate(groups) if i not in finished]:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        counts = f"{len(done)} of {len(groups)} groups of files are finished, {tokens:,} tokens"
        return f"{folder}: {counts}; still missing: from {some}"
    if not shards["train"]:
        clear_dataset(folder)
        if not tokens:
            raise UserError(f"there is no text in the files: {empty} rows are empty")
        raise UserError(
            f"all {tokens:,} tokens fit into one shard, and validation and training need one each: lower "
            f"--shard-tokens, for example to {max(1, tokens // 10)}"
        )
    meta = write_meta(folder, from_spec(inputs["tokenizer"]), shards, command)
    return f"{summary(folder, meta)}; {documents:,} documents" + (f", {empty:,} empty ones left out" if empty else "")


def _shard_name(group: int, shard: int) -> str:
    return f"{'val' if group == shard == 0 else 'train'}_{group:05d}_{shard:03d}.npy"


def _listing(files: Sequence[File]) -> list[list]:
    return [[file.name, file.bytes] for file in files]


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs about {needed / 1e9:,.3g} GB more and its disk has {free / 1e9:,.3g} GB free: make room, "
            "or give a folder on another disk with --out"
        )
