"""FineWeb-Edu: `python -m data.fineweb` turns 10, 100 or 350 billion tokens of educational web pages into shards.

The pages are streamed from the Hugging Face Hub through `datasets`, tokenized by parallel processes and written as
shards; the pages themselves never reach the disk. --input takes your own files instead: Parquet, .jsonl and .csv with a
`text` column, one document per row, and .txt, one document per file; .gz and .zst are decompressed. Each document
becomes the end-of-text token and then its own tokens; empty documents are left out.

The same command resumes after any interruption: finished groups of files (groups.py) stay, an unfinished one is done
again, and the shards get the same bytes.

Several machines write into one folder, each with its files (--files 0:7 and --files 7:14); the last to finish writes
meta.json. Without a common folder, copy all into one and repeat the command without --files.
"""

import json
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from data.documents import Batch, local_files, read_batches
from data.encode import encode_in_order
from data.files import UserError, run_script, writing
from data.groups import check_same, check_space, finish, group_files, read_progress, select_groups, write_group
from data.hub import PRETOKENIZED, check_cache, download_shards, hub_files
from data.tokenizer import load, token_dtype

MOST_SHARD_TOKENS = 10**10


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
        input: Parquet, .jsonl, .csv or .txt files of your own in place of FineWeb-Edu.
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
    if shard_tokens > MOST_SHARD_TOKENS:
        raise UserError(f"--shard-tokens is {shard_tokens}: at most {MOST_SHARD_TOKENS}, since memory holds a shard")
    chosen = load(tokenizer)
    if chosen.eot is None:
        raise UserError(f"--tokenizer {tokenizer} has no end-of-text token, which documents need")
    sources = local_files(input or ())  # a wrong name is reported before a folder is made
    if not input or any(file.kind == ".parquet" for file in sources):
        check_cache()
    folder = folder or Path("datasets", "fineweb-edu-" + name.removeprefix("sample-").removesuffix("T"))
    with made(folder), writing(folder, shared=files is not None):
        finished = read_progress(folder)
        if not finished and (folder / "meta.json").exists():
            raise UserError(f"{folder} holds another dataset: give another folder with --out, or delete it")
        inputs = {"name": None if input else name, "shard_tokens": shard_tokens, "tokenizer": chosen.spec()}
        if not input:
            # All groups are read from the commit with which the first one began.
            revision = next((progress.inputs.get("revision") for progress in finished.values()), None)
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


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make the folder, unless it exists; remove a new one again if an error leaves nothing in it."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if new:
                folder.rmdir()
        raise


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


def main() -> None:
    run_script(prepare, prog="python -m data.fineweb")


if __name__ == "__main__":
    main()
