"""
How fast data/fineweb.py tokenizes, against a multiprocessing.Pool over tiktoken's encode_ordinary, taking turns.

    python tests/bench_fineweb.py 240        with 240 MB of text, two processes each, three turns

The text is the docstrings of this Python's standard library, in pieces of a web page's length, over and over, in two
Parquet files. Both sides read them with Hugging Face `datasets` and write shards; each turn is a process of its own.
"""

import ast
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.documents import local_files, read_batches  # noqa: E402
from data.encode import encode_in_order  # noqa: E402
from data.groups import write_group  # noqa: E402
from data.shards import cut, write_shard  # noqa: E402
from data.tokenizer import gpt2  # noqa: E402

PROCESSES, SHARD_TOKENS, PAGE_CHARACTERS, TURNS = 2, 3_000_000, 4_500, 3


def write_corpus(folder: Path, megabytes: float) -> list[Path]:
    pages = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        try:
            nodes = ast.walk(ast.parse(path.read_bytes())) if "site-packages" not in path.parts else ()
            texts = [ast.get_docstring(n) for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        except (SyntaxError, ValueError):  # the library has broken files, to test parsers with
            continue
        text = "\n".join(" ".join(part.split()) for text in texts if text for part in text.split("\n\n"))
        pages += [text[i : i + PAGE_CHARACTERS] for i in range(0, len(text), PAGE_CHARACTERS)]
    pages = [page for page in pages if len(page) > 500]
    order, chosen = random.Random(0), []
    while sum(map(len, chosen)) < megabytes * 1e6:
        chosen += order.sample(pages, len(pages))
    files = [folder / "000.parquet", folder / "001.parquet"]
    for path, part in zip(files, (chosen[::2], chosen[1::2]), strict=True):
        pq.write_table(pa.table({"text": part}), path, row_group_size=1000)
    return files


def load_tokenizer() -> None:
    global encoding
    encoding = gpt2().encoding


def tokenize(text: str) -> np.ndarray:
    return np.array([50256, *encoding.encode_ordinary(text)], np.uint16)


def with_pool(files: list[str], out: Path) -> None:
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True, columns=["text"])
    with multiprocessing.get_context("spawn").Pool(PROCESSES, load_tokenizer) as pool:
        tokens = pool.imap(tokenize, (row["text"] for row in rows), chunksize=16)
        for i, shard in enumerate(cut(tokens, SHARD_TOKENS, gpt2().vocab_size)):
            write_shard(out / f"train_{i:06d}.npy", shard)


def with_fineweb(files: list[str], out: Path) -> None:
    inputs = {"name": None, "shard_tokens": SHARD_TOKENS, "tokenizer": gpt2().spec()}
    group = local_files(list(map(Path, files)))
    encoded = encode_in_order(read_batches([group]), PROCESSES, json.dumps(gpt2().spec()))
    write_group(out, 0, inputs, group, encoded)


SIDES = {"pool": with_pool, "fineweb": with_fineweb}


def one_turn(side: str, files: list[str]) -> None:
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        SIDES[side](files, Path(out))
        seconds = time.perf_counter() - began
        print(sum(np.load(path, mmap_mode="r").size for path in Path(out).glob("*.npy")), seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = write_corpus(Path(folder), float(sys.argv[1]) if len(sys.argv) > 1 else 240)
        rates = {side: [] for side in SIDES}
        for turn in range(1, TURNS + 1):
            for side in SIDES:
                command = [sys.executable, __file__, side, *map(str, files)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                tokens, seconds = done.stdout.split()[-2:]
                rates[side].append(int(tokens) / float(seconds))
                print(f"turn {turn}, {side}: {int(tokens):,} tokens, {rates[side][-1]:,.0f} tokens/s", flush=True)
        ratios = [ours / pool for ours, pool in zip(rates["fineweb"], rates["pool"], strict=True)]
        print(
            f"fineweb / pool: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; median {statistics.median(ratios):.2f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SIDES:
        one_turn(sys.argv[1], sys.argv[2:])
    else:
        main()
