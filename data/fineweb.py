"""FineWeb-Edu: `python -m data.fineweb` makes GPT-2 tokens of 10, 100 or 350 billion tokens of educational web pages.

The pages come from the Hugging Face Hub through `datasets`, file by file, as a stream. --input takes your own files:
Parquet and .jsonl with a `text` column, a document a row, and .txt, a document a file. Each document is the end-of-text
token and then its own; empty ones are left out. The first shard is for validation, the others are for training.

The record of resumable.py is progress.json: the same command, repeated, goes on where an interrupted one stopped.

--part 2/8 is the second of eight machines. It takes its share of the files and writes part2of8_train_000000.npy, ...
and the record part2of8.json. Part 1 has the validation shard. In a folder that all parts write to, the last to finish
makes the dataset of them, meta.json. From folders of their own, copy all into one and repeat the command of any part.

--pretokenized downloads ready shards of FineWeb instead, the one that is not selected for education.
"""

import glob
import hashlib
import json
import os
import re
import shlex
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from data.encode import encode_in_order
from data.files import UserError, lock, run_script, writing
from data.resumable import Position, Record, read_record, remove_shards, write_shards
from data.tokenizer import Tokenizer, from_spec, load

# The processes that tokenize import this module too, so data.shards, which imports torch, waits until it is used.

HUB_DATASET = "HuggingFaceFW/fineweb-edu"
HUB_TOKENS = {"sample-10BT": 10**10, "sample-100BT": 10**11, "sample-350BT": 35 * 10**10}
PRETOKENIZED = "kjj0/fineweb10B-gpt2"
BYTES_PER_TOKEN = 4.5  # of English; only the estimates of disk and time rest on it
BATCH_CHARACTERS = 300_000  # what a process tokenizes at a time, in about 15 ms
WITHOUT_NETWORK = (
    "without network, give files of your own with --input FILES --out FOLDER, or copy here what --pretokenized "
    "downloaded elsewhere"
)


def prepare(
    name: Literal["sample-10BT", "sample-100BT", "sample-350BT"] = "sample-10BT",
    folder: Annotated[Path | None, tyro.conf.arg(name="out", metavar="FOLDER")] = None,
    input: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")] = (),
    part: Annotated[str | None, tyro.conf.arg(metavar="K/N")] = None,
    pretokenized: bool = False,
    processes: int | None = None,
    shard_tokens: int = 100_000_000,
    tokenizer: Annotated[str, tyro.conf.arg(metavar="gpt2|FILE")] = "gpt2",
) -> str:
    """Makes a dataset of FineWeb-Edu in GPT-2's tokens, or goes on with one that was interrupted.

    Returns a line that sums it up. UserError when the text cannot be had or read, when the disk is too small or when
    the folder holds something else. What is finished stays, and the same command goes on from there.

    Args:
        name: How much of FineWeb-Edu, in billions of tokens.
        folder: The folder to write; datasets/fineweb-edu-10B or as the name says if not given.
        input: Parquet, .jsonl or .txt files of your own in place of FineWeb-Edu.
        part: This machine's share of the files, for example 2/8.
        pretokenized: Download 10 billion tokens of FineWeb that are ready.
        processes: How many tokenize; one for each CPU core, at most 16, if not given.
        shard_tokens: Tokens in a shard.
        tokenizer: GPT-2's tokens, or those of a file that holds a tokenizer.
    """
    if pretokenized:
        if input or part:
            raise UserError("--pretokenized downloads what is ready: it goes with --out alone")
        return download_shards(folder or Path("datasets/fineweb-10B"))
    if input and folder is None:
        raise UserError("--input needs --out FOLDER, the folder to write")
    processes = min(_cores(), 16) if processes is None else processes
    for option, value in {"--processes": processes, "--shard-tokens": shard_tokens}.items():
        if value < 1:
            raise UserError(f"{option} is {value}: it must be 1 or more")
    chosen = load(tokenizer)
    if chosen.eot is None or chosen.vocab_size > 1 << 16:
        raise UserError(f"--tokenizer {tokenizer} must have an end-of-text token, and 65,536 tokens at most")
    folder = folder or Path("datasets", "fineweb-edu-" + name.removeprefix("sample-").removesuffix("T"))
    k, n = _parse_part(part)
    local_files(input)  # a wrong name is said before a folder is made
    prefix, record_name = ("", "progress.json") if part is None else (f"part{k}of{n}_", f"part{k}of{n}.json")
    folder.mkdir(parents=True, exist_ok=True)
    # Parts may share a folder, so that each has a lock of its own.
    busy = f"another process is writing {record_name} in {folder}: wait for it"
    with lock(folder / f".{record_name}.lock", busy) if part else writing(folder):
        record = read_record(folder / record_name)
        if record is None and (folder / "meta.json").exists():
            raise UserError(f"{folder} holds another dataset: give another folder with --out, or delete it")
        recipe, files = _recipe(None if input else name, input, part, shard_tokens, chosen, record)
        first, end = (k - 1) * len(files) // n, k * len(files) // n
        if record:
            _same(record, recipe, first, folder / record_name)
        record = replace(record, recipe=recipe) if record else Record(recipe)
        if not record.finished:
            remove_shards(folder, record_name, prefix, only_unfinished=bool(record.tokens()))
            share = files[first:end]
            spec = "" if tokenizer == "gpt2" else json.dumps(chosen.spec())
            _check_space(folder, 2 * (sum(file.tokens for file in share) - record.tokens()))
            # Closed here, so that the processes and the progress bar have ended when an error is shown.
            with (
                closing(encode_in_order(read_batches(share, record.position), processes, spec)) as encoded,
                closing(_shown(share, record, encoded)) as shown,
            ):
                record = write_shards(folder / record_name, record, shown, shard_tokens, prefix, val=k == 1)
        source = ["--input", *input] if input else ["--name", name]
        command = shlex.join(map(str, ["python", "-m", "data.fineweb", *source, "--out", folder]))
        command += f" --shard-tokens {shard_tokens}" * (shard_tokens != 100_000_000)
        command += f" --tokenizer {shlex.quote(tokenizer)}" * (tokenizer != "gpt2")
        return _join(folder, record, n, command) if part else _finish(folder, [record], command)


# ------------------------------------------------------------------------------------------------- what is to be read


class File(NamedTuple):
    """One file of documents: where `datasets` finds it, and about how many tokens it holds."""

    place: str
    name: str
    bytes: int
    tokens: int


def local_files(paths: Sequence[Path]) -> list[File]:
    """--input; UserError when a file is missing, of an unknown kind, or a Parquet file without text."""
    files = []
    for path in paths:
        if path.suffix not in (".parquet", ".jsonl", ".txt"):
            raise UserError(f"--input {path} is of no known kind: its name must end in .parquet, .jsonl or .txt")
        if not path.is_file():
            raise UserError(f"--input {path} does not exist: give the names of .parquet, .jsonl or .txt files")
        size = path.stat().st_size
        text_bytes = _parquet_text_bytes(path) if path.suffix == ".parquet" else size
        files.append(File(glob.escape(str(path.absolute())), path.name, size, int(text_bytes / BYTES_PER_TOKEN)))
    return files


def hub_files(name: str, revision: str, listing: Sequence[tuple[str, int]]) -> list[File]:
    """The files of a sample of FineWeb-Edu, from a listing of their (name, bytes) at a commit of the Hub."""
    total = sum(size for _, size in listing)
    place = f"hf://datasets/{HUB_DATASET}@{revision}/"
    return [File(place + file, file, size, HUB_TOKENS[name] * size // total) for file, size in listing]


def list_hub(name: str) -> tuple[str, list[tuple[str, int]]]:
    """The newest commit of FineWeb-Edu and the (name, bytes) of the files of a sample; UserError without network."""
    from huggingface_hub import HfApi

    with _hub_errors(f"list the files of {HUB_DATASET}"):
        revision = HfApi().dataset_info(HUB_DATASET).sha
        folder = f"sample/{name.removeprefix('sample-')}"
        tree = HfApi().list_repo_tree(HUB_DATASET, folder, repo_type="dataset", revision=revision, recursive=True)
        listing = sorted((entry.path, entry.size) for entry in tree if entry.path.endswith(".parquet"))
    if not listing:
        raise UserError(f"{HUB_DATASET} has no Parquet file in {folder} any more: {WITHOUT_NETWORK}")
    return revision, listing


def read_batches(files: Sequence[File], start: Position) -> Iterator[tuple[Position, list[str]]]:
    """(position behind them, some documents), from `start` on; a batch ends with its file at the latest."""
    position = start
    for index in range(start.file, len(files)):
        documents, size = [], 0
        for text in read_rows(files[index], position.row):
            position = position._replace(row=position.row + 1)
            if not text or text.isspace():
                position = position._replace(empty=position.empty + 1)
                continue
            position = position._replace(documents=position.documents + 1)
            documents.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield position, documents
                documents, size = [], 0
        position = position._replace(file=index + 1, row=0)
        yield position, documents


def read_rows(file: File, start: int) -> Iterator[str | None]:
    """The texts of a file from row `start` on; UserError names the file and the row where it is damaged."""
    row, kind = 0, Path(file.name).suffix
    try:
        for column in _columns(file.place, kind):
            skipped = min(max(start - row, 0), len(column))
            row += skipped
            for text in column[skipped:]:
                if row == 0 and kind != ".parquet":
                    text = text.removeprefix("\ufeff")
                yield _text_of_line(text) if kind == ".jsonl" else text
                row += 1
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = "mend it and repeat the same command, which goes on where it stopped, or begin again without it"
        if file.place.startswith("hf://"):
            remedy = "when the network is back, repeat the same command, which goes on where it stopped"
        raise UserError(f"cannot read {file.name} past row {row} ({reason}): {remedy}") from None


def _columns(place: str, kind: str) -> Iterator[list[str | None]]:
    """The rows of a file, as many at a time as `datasets` reads at once: a row group of Parquet, 10 MB of lines."""
    from datasets import load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it logs an error as well as raising it
    # Lines are parsed here: the JSON reader of `datasets` gives up when a later line has another set of keys.
    builder = "parquet" if kind == ".parquet" else "text"
    options = {".parquet": {"columns": ["text"]}, ".jsonl": {}, ".txt": {"sample_by": "document"}}[kind]
    rows = load_dataset(builder, data_files=[place], split="train", streaming=True, **options).with_format("arrow")

    def read(part) -> list[str | None]:
        return [text for table in part.iter(batch_size=1000) for text in table["text"].to_pylist()]

    if kind != ".parquet":
        yield from (table["text"].to_pylist() for table in rows.iter(batch_size=1000))
        return
    # Row group by row group. Read as one, the file would be decoded as fast as it comes, and fill the memory where
    # tokenizing is slower. From the Hub, several at a time hide the time to the first byte of each.
    rows = rows.reshard()
    with ThreadPoolExecutor(ahead := 8 if place.startswith("hf://") else 2) as readers:
        groups = deque()
        for i in range(rows.num_shards):
            groups.append(readers.submit(read, rows.shard(rows.num_shards, i)))
            if len(groups) > ahead:
                yield groups.popleft().result()
        while groups:
            yield groups.popleft().result()


def _text_of_line(line: str) -> str | None:
    if not line.strip():
        return None
    row = json.loads(line)
    if not isinstance(row, dict) or "text" not in row:
        raise ValueError('the line is no object with a "text"')
    if not isinstance(row["text"], str | None):
        raise ValueError('"text" is no string')
    return row["text"]


def _parquet_text_bytes(path: Path) -> int:
    """The bytes of the column `text`, from the end of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.metadata
            if "text" not in schema.names:
                raise UserError(f"--input {path} has no column `text`, only {', '.join(schema.names)}: rename one")
            kind = schema.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise UserError(f"the column `text` of --input {path} holds {kind}: it must hold strings")
            chunks = [
                groups.row_group(i).column(j) for i in range(groups.num_row_groups) for j in range(groups.num_columns)
            ]
            return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == "text")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--input {path} is cut short or no Parquet file ({error}): get it again") from None


# ----------------------------------------------------------------------------------------------- recipe, parts, finish


def _parse_part(part: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", part or "1/1")
    k, n = map(int, match.groups()) if match else (1, 0)
    if k > n:
        raise UserError(f"--part {part} is no part: it must be like 2/8, the second of eight")
    return k, n


def _recipe(
    name: str | None,
    input: Sequence[Path],
    part: str | None,
    shard_tokens: int,
    tokenizer: Tokenizer,
    record: Record | None,
) -> tuple[dict, list[File]]:
    """What the record must agree with, and all files of all parts."""
    if name is None:
        revision, files = None, local_files(input)
    elif record and record.recipe.get("name") == name:  # the commit and the files with which it began
        revision, listing = record.recipe["revision"], record.recipe["files"]
        files = hub_files(name, revision, listing)
    else:
        revision, listing = list_hub(name)
        files = hub_files(name, revision, listing)
    k, n = _parse_part(part)
    if n > len(files):
        raise UserError(f"--part {part} gives each part whole files, and there are {len(files)}: use fewer parts")
    recipe = {"name": name, "revision": revision, "part": part, "shard_tokens": shard_tokens}
    return recipe | {"tokenizer": tokenizer.spec(), "files": [[file.name, file.bytes] for file in files]}, files


def _same(record: Record, recipe: dict, first: int, path: Path) -> None:
    """UserError unless the record at `path` is of this recipe; first: the number of the first file of the share.

    A file that is not read to its end yet may have another length now, so that a damaged one can be mended.
    """
    settled = first + record.position.file
    for key, option in {
        "name": "--name",
        "part": "--part",
        "shard_tokens": "--shard-tokens",
        "tokenizer": "--tokenizer",
        "files": "--input",
    }.items():
        before, now = record.recipe.get(key), recipe[key]
        same = before == now
        before = before["type"] if key == "tokenizer" else before
        if key == "files" and not same:
            same = _names(before) == _names(now) and before[first:settled] == now[first:settled]
            before = f"{len(before)} files"
        if not same:
            raise UserError(
                f"{path} was begun with another {option} ({before or 'none'}): repeat the command as it was, give "
                f"another folder with --out, or delete {path.parent}"
            )


def _names(files: list) -> list[str]:
    return [name for name, _ in files]


def _join(folder: Path, record: Record, n: int, command: str) -> str:
    """Finishes the dataset when all parts are there, else says which are not."""
    records = {k: read_record(folder / f"part{k}of{n}.json") for k in range(1, n + 1)}
    missing = [str(k) for k, other in records.items() if other is None or not other.finished]
    if missing:
        return (
            f"{folder}: part {record.recipe['part']} is finished, {record.tokens():,} tokens; to join the parts, put "
            f"all into one folder and repeat the command of any (still missing here: {', '.join(missing)})"
        )
    for k, other in records.items():
        alike = {"part": None, "files": _names(record.recipe["files"])}
        if other.recipe | alike | {"files": _names(other.recipe["files"])} != record.recipe | alike:
            raise UserError(
                f"part{k}of{n}.json in {folder} was made of other files or options than part {record.recipe['part']}: "
                "prepare it again with the same"
            )
    return _finish(folder, list(records.values()), command)


def _finish(folder: Path, records: list[Record], command: str) -> str:
    from data.shards import summary, write_meta

    shards = {split: [entry for record in records for entry in record.shards[split]] for split in ("train", "val")}
    documents, empty = (sum(getattr(r.position, what) for r in records) for what in ("documents", "empty"))
    if not shards["train"] or not shards["val"]:
        total = sum(record.tokens() for record in records)
        if len(records) == 1:
            remove_shards(folder, "progress.json", "", only_unfinished=False)
        if not total:
            raise UserError(f"there is no text in the files: {empty} rows are empty")
        raise UserError(
            f"all {total:,} tokens fit into one shard, and validation and training need one each: lower "
            f"--shard-tokens, for example to {max(1, total // 10)}"
        )
    meta = write_meta(folder, from_spec(records[0].recipe["tokenizer"]), shards, command)
    return f"{summary(folder, meta)}; {documents:,} documents" + f", {empty:,} empty ones left out" * bool(empty)


# --------------------------------------------------------------------------------------------------- disk and progress


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs about {needed / 1e9:,.3g} GB more and its disk has {free / 1e9:,.3g} GB free: make room, "
            "or give a folder on another disk with --out"
        )


def _shown(
    files: Sequence[File], record: Record, encoded: Iterator[tuple[Position, np.ndarray]]
) -> Iterator[tuple[Position, np.ndarray]]:
    """Passes on what it gets, and shows tokens, tokens/s, documents/s and the time left."""
    import time

    from tqdm import tqdm

    expected = [0, *np.cumsum([file.tokens for file in files])]
    begun, documents, last_file = time.monotonic(), record.position.documents, record.position.file
    with tqdm(total=int(expected[-1]), initial=record.tokens(), unit=" tokens", unit_scale=True, mininterval=1) as bar:
        for position, tokens in encoded:
            rate = (position.documents - documents) / max(time.monotonic() - begun, 1e-3)
            bar.set_postfix_str(f"{position.documents:,} documents, {rate:,.0f}/s", refresh=False)
            bar.update(len(tokens))
            if position.file != last_file:  # what the files so far came to corrects the rest
                last_file, ratio = position.file, bar.n / max(expected[position.file], 1)
                bar.total = int(bar.n + ratio * (expected[-1] - expected[position.file]))
            yield position, tokens


# ---------------------------------------------------------------------------------------------------- ready shards


def download_shards(folder: Path) -> str:
    """Downloads the shards of PRETOKENIZED that are not in `folder` yet, each checked against the Hub's sha256.

    Validation comes last: until all the rest is there, the folder is no dataset. UserError without network.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from tqdm import tqdm

    from data.shards import open_split

    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        if (folder / "meta.json").exists():
            raise UserError(f"{folder} holds another dataset: give another folder with --out, or delete it")
        with _hub_errors(f"list the files of {PRETOKENIZED}"):
            info = HfApi().dataset_info(PRETOKENIZED, files_metadata=True)
        entries = [entry for entry in info.siblings if entry.rfilename.endswith(".bin")]
        entries.sort(key=lambda entry: ("val" in entry.rfilename, entry.rfilename))
        missing = [entry for entry in entries if not (folder / Path(entry.rfilename).name).exists()]
        _check_space(folder, sum(entry.size or 0 for entry in missing))
        for entry in tqdm(missing, unit=" shards"):
            with _hub_errors(f"download {entry.rfilename} of {PRETOKENIZED}"):
                options = {"repo_type": "dataset", "revision": info.sha, "local_dir": folder / ".download"}
                path = Path(hf_hub_download(PRETOKENIZED, entry.rfilename, **options))
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if entry.lfs and found != entry.lfs.sha256:
                path.unlink()
                raise UserError(f"{entry.rfilename} of {PRETOKENIZED} came damaged (sha256): repeat the same command")
            os.replace(path, folder / Path(entry.rfilename).name)
        shutil.rmtree(folder / ".download", ignore_errors=True)
        counts = (f"{open_split(folder, split).n_tokens:,} {split}" for split in ("train", "val"))
        return f"{folder}: GPT-2's tokens of FineWeb, tokens: {', '.join(counts)}"


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of httpx, of huggingface_hub, of the system
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"cannot {what} ({reason}): try again, or {WITHOUT_NETWORK}") from None


def main() -> None:
    run_script(prepare, prog="python -m data.fineweb")


if __name__ == "__main__":
    main()
