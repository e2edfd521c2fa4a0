"""FineWeb-Edu: `python -m data.fineweb` turns 10, 100 or 350 billion tokens of educational web pages into shards.

The pages are streamed from the Hugging Face Hub through `datasets`, tokenized by parallel processes and written as
shards; the pages themselves never reach the disk. --input takes your own files instead: Parquet and .jsonl with a
`text` column, one document per row, and .txt, one document per file. Each document becomes the end-of-text token and
then its own tokens; empty documents are left out.

Consecutive files form a group once they hold about a shard of tokens; each file of FineWeb-Edu, with 700 million
tokens, is a group of its own. Group 3 becomes train_00003_000.npy, train_00003_001.npy, ... and then
progress_00003.json, which lists them. The first shard of group 0 is the validation split. The same command resumes
after any interruption: finished groups stay, an unfinished one is done again, and the shards get the same bytes.

Several machines write into one folder, each with its files (--files 0:7 and --files 7:14); the last to finish writes
meta.json. Without a common folder, copy all into one and repeat the command without --files.
"""

import errno
import glob
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from data.encode import encode_in_order
from data.files import UserError, atomic_write, run_script, writing
from data.outside import read_json
from data.shards import ENTRIES, clear_dataset, cut, map_bin, summary, write_meta, write_shard
from data.tokenizer import from_spec, gpt2, load, token_dtype

HUB_DATASET = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = {  # name -> a repository of .bin shards on the Hub, the folder for them
    "fineweb-edu": ("kjj0/finewebedu10B-gpt2", Path("datasets/fineweb-edu-10B")),
    "fineweb": ("kjj0/fineweb10B-gpt2", Path("datasets/fineweb-10B")),
}
BYTES_PER_TOKEN = {".parquet": 2.9, ".jsonl": 4.5, ".txt": 4.5}  # of English, to estimate disk space and time
BATCH_CHARACTERS = 300_000  # per task of a tokenizer process, about 15 ms
WITHOUT_NETWORK = "without network, give files of your own with --input FILES --out FOLDER"


def prepare(
    name: Literal["sample-10BT", "sample-100BT", "sample-350BT"] = "sample-10BT",
    folder: Annotated[Path | None, tyro.conf.arg(name="out", metavar="FOLDER")] = None,
    input: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="FILES")] = None,
    files: Annotated[str | None, tyro.conf.arg(metavar="FIRST:END")] = None,
    pretokenized: Literal["fineweb-edu", "fineweb"] | None = None,
    processes: int | None = None,
    shard_tokens: int = 100_000_000,
    tokenizer: Annotated[str, tyro.conf.arg(metavar="gpt2|FILE")] = "gpt2",
) -> str:
    """Prepare FineWeb-Edu, or text files of your own, as token shards.

    Return a one-line summary. Raise UserError if the text cannot be downloaded or read, if the disk is too small, or
    if the folder holds something else. Finished files are kept, and the same command resumes.

    Args:
        name: How much of FineWeb-Edu, in billions of tokens.
        folder: The folder to write, by default datasets/fineweb-edu-10B and the like.
        input: Parquet, .jsonl or .txt files of your own in place of FineWeb-Edu.
        files: The files that this machine prepares if several share the folder, counted from 0, such as 0:7.
        pretokenized: Download 10 billion tokens that are ready, of FineWeb-Edu or of the classic FineWeb.
        processes: How many processes tokenize, by default one per CPU core, at most 16.
        shard_tokens: Tokens per shard.
        tokenizer: GPT-2's tokens, or those of a file that holds a tokenizer.
    """
    if pretokenized:
        if input or files:
            raise UserError("--pretokenized downloads shards that are ready: it goes with --out alone")
        return download_shards(pretokenized, folder or PRETOKENIZED[pretokenized][1])
    if input is not None and not input:
        raise UserError("--input needs FILES: an empty pattern or variable?")
    if input and folder is None:
        raise UserError("--input needs --out FOLDER, the folder to write")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, 16) if processes is None else processes
    for option, value in {"--processes": processes, "--shard-tokens": shard_tokens}.items():
        if value < 1:
            raise UserError(f"{option} is {value}: it must be 1 or more")
    chosen = load(tokenizer)
    if chosen.eot is None:
        raise UserError(f"--tokenizer {tokenizer} has no end-of-text token, which documents need")
    sources = local_files(input or ())  # a wrong name is reported before a folder is made
    check_cache()
    folder = folder or Path("datasets", "fineweb-edu-" + name.removeprefix("sample-").removesuffix("T"))
    with made(folder), writing(folder, shared=files is not None):
        finished = read_progress(folder)
        if not finished and (folder / "meta.json").exists():
            raise UserError(f"{folder} holds another dataset: give another folder with --out, or delete it")
        inputs = {"name": None if input else name, "shard_tokens": shard_tokens, "tokenizer": chosen.spec()}
        if not input:
            # All groups are read from the commit with which the first one began.
            revision = next((progress.inputs["revision"] for progress in finished.values()), None)
            inputs["revision"], sources = hub_files(name, revision)
        groups = group_files(sources, shard_tokens)
        check_same(folder, inputs, groups, finished)
        pending = [i for i in select_groups(groups, files) if i not in finished]
        for path in folder.iterdir():  # what a killed process left
            if (match := re.fullmatch(r"\.?(?:train|val)_(\d{5})_.*", path.name)) and int(match[1]) in pending:
                path.unlink()
        tokens = sum(file.tokens for i in pending for file in groups[i])
        check_space(folder, tokens * token_dtype(chosen.vocab_size).itemsize)
        batches = read_batches(groups[i] for i in pending)
        # Closed now, so that the processes and the progress bar have ended when an error is shown.
        with (
            closing(encode_in_order(batches, processes, json.dumps(chosen.spec()))) as encoded,
            closing(show_progress(encoded, tokens)) as shown,
        ):
            for i in pending:
                write_group(folder, i, inputs, groups[i], shown)
        source = ["--input", *input] if input else ["--name", name]
        options = ["--shard-tokens", shard_tokens] if shard_tokens != 100_000_000 else []
        options += ["--tokenizer", tokenizer] if tokenizer != "gpt2" else []
        command = shlex.join(map(str, ["python", "-m", "data.fineweb", *source, "--out", folder, *options]))
        return finish(folder, inputs, groups, command)


# -------------------------------------------------------------------------------------------------------- reading text


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


def check_cache() -> None:
    """Raise UserError unless the cache of `datasets`, which it also needs for local files, can be written."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    try:
        Path(home).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = f"the cache of Hugging Face's libraries cannot be written ({error.strerror}: {error.filename})"
        raise UserError(f"{cause}: set HF_HOME to a folder that can") from None


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make the folder, unless it exists; remove a new one again if an error leaves nothing in it."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except UserError:
        with suppress(OSError):
            if new:
                folder.rmdir()
        raise


def hub_files(name: str, revision: str | None) -> tuple[str, list[File]]:
    """Return the commit (the newest if None) and the files of a FineWeb-Edu sample; UserError without network."""
    from huggingface_hub import HfApi

    path = f"sample/{name.removeprefix('sample-')}"
    with _hub_errors(f"list the files of {HUB_DATASET}"):
        revision = revision or HfApi().dataset_info(HUB_DATASET).sha
        tree = HfApi().list_repo_tree(HUB_DATASET, path, repo_type="dataset", revision=revision, recursive=True)
        listing = sorted((entry.path, entry.size) for entry in tree if entry.path.endswith(".parquet"))
    if not listing:
        raise UserError(f"{HUB_DATASET} no longer has Parquet files in {path}: {WITHOUT_NETWORK}")
    return revision, [File(f"hf://datasets/{HUB_DATASET}@{revision}/{file}", file, size) for file, size in listing]


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


# ------------------------------------------------------------------------------------------------- groups and progress


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
            finished[int(path.stem.removeprefix("progress_"))] = progress = Progress(**content)
            itemsize = token_dtype(from_spec(progress.inputs["tokenizer"]).vocab_size).itemsize
        except (ValueError, TypeError, UserError) as error:
            raise UserError(f"{path} is corrupt ({error}){hint}") from None
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
            split = "val" if i == j == 0 else "train"
            entries[split].append(write_shard(folder / f"{split}_{i:05d}_{j:03d}.npy", tokens))
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


def show_progress(encoded: Iterator[tuple[Batch, np.ndarray]], total: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Pass on what comes, and show the tokens so far of about `total`, tokens/s, documents/s and the time left."""
    from tqdm import tqdm

    begun, documents = time.monotonic(), 0
    with tqdm(total=total, unit=" tokens", unit_scale=True, mininterval=1) as bar:
        for batch, tokens in encoded:
            documents += batch.documents
            rate = documents / max(time.monotonic() - begun, 1e-3)
            bar.set_postfix_str(f"{documents:,} documents, {rate:,.0f}/s", refresh=False)
            bar.update(len(tokens))
            yield batch, tokens


# -------------------------------------------------------------------------------------------------------- ready shards


def download_shards(name: str, folder: Path) -> str:
    """Download the shards of PRETOKENIZED that `folder` lacks and check them against the Hub's sha256.

    Return a one-line summary; raise UserError without network. The folder is a dataset once all shards are intact.
    """
    from huggingface_hub import HfApi, snapshot_download

    repository = PRETOKENIZED[name][0]
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        if (folder / "meta.json").exists() or read_progress(folder):
            raise UserError(f"{folder} holds another dataset: give another folder with --out, or delete it")
        with _hub_errors(f"list the files of {repository}"):
            info = HfApi().dataset_info(repository, files_metadata=True)
        shards = {folder / entry.rfilename: entry for entry in info.siblings if entry.rfilename.endswith(".bin")}
        check_space(folder, sum(entry.size for path, entry in shards.items() if not path.exists()))
        with _hub_errors(f"download {repository}"):
            options = {"repo_type": "dataset", "revision": info.sha, "allow_patterns": "*.bin"}
            snapshot_download(repository, local_dir=folder, **options)
        entries = {"train": [], "val": []}
        for path, entry in sorted(shards.items()):
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != entry.lfs.sha256:
                path.unlink()
                raise UserError(f"{path.name} of {repository} arrived corrupt (sha256): repeat the same command")
            tokens = len(map_bin(path).tokens)
            entries["val" if "val" in path.name else "train"].append(
                {"file": path.name, "tokens": tokens, "sha256": sha256}
            )
        command = shlex.join(["python", "-m", "data.fineweb", "--pretokenized", name, "--out", str(folder)])
        meta = write_meta(folder, gpt2(), entries, command)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        return summary(folder, meta)


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
