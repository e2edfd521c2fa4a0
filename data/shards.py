"""Token shards: the format on disk.

A dataset is a folder. It exists if and only if it holds `meta.json`, which is written last:

    meta.json          {"format": 1, "tokenizer": SPEC, "vocab_size": V, "command": HOW IT WAS PREPARED or null,
                        "shards": {"train": [{"file": ..., "tokens": N, "sha256": ...}, ...], "val": [...]},
                        "baselines": WHAT COUNTING REACHES, see baselines.py, or absent}
    train_000000.npy   one-dimensional, little-endian uint16, or uint32 when V > 65,536
    val_000000.npy

A folder without meta.json may hold the `.bin` shards of llm.c and modded-nanogpt instead: 256 int32 (magic 20240520,
version 1, number of tokens, zeros), then uint16 GPT-2 tokens; `train` or `val` in the file name says the split.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DATASETS, baselines
from data.files import UserError, atomic_write, writing
from data.tokenizer import Tokenizer, token_dtype

BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 1024
GPT2_SPEC, GPT2_VOCAB_SIZE = {"type": "gpt2"}, 50257

# ---------------------------------------------------------------------------------------------------------- writing


def write_dataset(
    folder: str | Path,
    tokenizer: Tokenizer,
    splits: dict[str, Iterable[np.ndarray]],
    shard_tokens: int = 100_000_000,
    command: str | None = None,
) -> dict:
    """Writes {"train": documents, "val": documents} as a dataset, in place of the one in `folder` if there is one.

    documents: 1-D integer arrays of token ids, end-of-text tokens included. They are read one by one and written a
        shard at a time, so that memory holds one shard.
    command: what prepares this dataset again, for error messages.
    Returns what meta.json holds. UserError when a split has no tokens or an id is past the vocabulary, the folder then
    holds no dataset; or when another process is writing to the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        clear_dataset(folder)
        shards = {}
        for split, documents in splits.items():
            pieces = enumerate(_cut(documents, shard_tokens, tokenizer.vocab_size))
            shards[split] = [write_shard(folder / f"{split}_{i:06d}.npy", tokens) for i, tokens in pieces]
            if not shards[split]:
                raise UserError(f"the {split} split of {folder} would be empty: give more text")
        return write_meta(folder, tokenizer, shards, command)


def write_meta(
    folder: str | Path, tokenizer: Tokenizer, shards: dict[str, list[dict]], command: str | None = None
) -> dict:
    """Writes meta.json whole, which makes the shards in `folder` a dataset, in place of an older one; returns it.

    shards: {"train": entries, "val": entries}, each entry what `write_shard` returned, in the order of reading.
    The baselines are counted from the files: under a minute, however large the dataset. UserError when a shard is
    missing or not what its entry says.
    """
    folder, V = Path(folder), tokenizer.vocab_size
    meta = {"format": 1, "tokenizer": tokenizer.spec(), "vocab_size": V, "command": command, "shards": shards}
    if shards.get("train") and shards.get("val"):
        train, val = (_split_of(folder, meta, name, "prepare the dataset again") for name in ("train", "val"))
        meta["baselines"] = baselines.measure(train, val, V)
    atomic_write(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    return meta


def clear_dataset(folder: Path) -> None:
    """Removes a dataset, meta.json first, and what a killed preparation left; other files stay."""
    (folder / "meta.json").unlink(missing_ok=True)
    ours = re.compile(r"(train|val)_\d{6}\.npy|\.((train|val)_\d{6}\.npy|meta\.json)\.[0-9a-f]{8}\.tmp")
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Writes one shard whole or not at all and returns its entry in meta.json; tokens: (n,) uint16 or uint32."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    # Hashed from memory, not read back: a write that went wrong must not get a checksum that fits it.
    digest = hashlib.sha256(header.getvalue())
    digest.update(tokens.data)

    def write(file):
        file.write(header.getvalue())
        file.write(tokens.data)

    atomic_write(path, write)
    return {"file": path.name, "tokens": len(tokens), "sha256": digest.hexdigest()}


def summary(folder: str | Path, meta: dict) -> str:
    """One line for the terminal: the folder, the tokenizer, the vocabulary and the tokens of each split."""
    counts = (f"{sum(s['tokens'] for s in shards):,} {split}" for split, shards in meta["shards"].items())
    kind = meta["tokenizer"]["type"]
    return f"{folder}: {kind} tokenizer, vocabulary {meta['vocab_size']:,}, tokens: {', '.join(counts)}"


def _cut(documents: Iterable[np.ndarray], shard_tokens: int, vocab_size: int) -> Iterator[np.ndarray]:
    """Joins the documents and cuts them into arrays of shard_tokens tokens; the last may be shorter.

    Each array is valid until the next is asked for: they share one buffer.
    """
    shard, used = np.empty(shard_tokens, token_dtype(vocab_size)), 0
    for tokens in documents:
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise UserError(
                f"a document holds ids {tokens.min()} to {tokens.max()}, past the vocabulary of {vocab_size}"
            )
        while len(tokens):
            piece, tokens = np.split(tokens, [shard_tokens - used])
            shard[used : used + len(piece)] = piece
            used += len(piece)
            if used == shard_tokens:
                yield shard
                used = 0
    if used:
        yield shard[:used]


# ---------------------------------------------------------------------------------------------------------- reading


class Shard(NamedTuple):
    """One file of a split. tokens: (n,) uint16 or uint32, memory-mapped; sha256 is None for a .bin file."""

    path: Path
    tokens: np.memmap
    sha256: str | None


class Split:
    """One split of a dataset, read as if its shards were a single array of n_tokens token ids.

    `baselines` is what counting alone reaches on the dataset (see baselines.py), {} where nobody has counted;
    `fingerprint` is a hex string that two processes share when they see the same list of shards (names, lengths,
    checksums where the format has them).
    """

    def __init__(self, label: str, tokenizer_spec: dict, vocab_size: int, shards: list[Shard], remedy: str):
        self.label, self.tokenizer_spec, self.vocab_size = label, tokenizer_spec, vocab_size
        self.shards, self.remedy, self.baselines = shards, remedy, {}
        self.borders = np.cumsum([0] + [len(shard.tokens) for shard in shards])  # shard i holds borders[i:i+2]
        self.n_tokens = int(self.borders[-1])
        listing = [vocab_size] + [[s.path.name, len(s.tokens), s.sha256] for s in shards]
        self.fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start ... start + count - 1 as (count,) int64, across shard borders; IndexError past either end."""
        if not 0 <= start <= start + count <= self.n_tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.label}, which has {self.n_tokens}")
        out, done = np.empty(count, np.int64), 0
        i = int(np.searchsorted(self.borders, start, side="right")) - 1
        while done < count:
            offset = start + done - int(self.borders[i])
            piece = self.shards[i].tokens[offset : offset + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            i += 1
        return out

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads the shards i with i % parts == part and checks size, sha256 and every id; UserError names the damage.

        A .bin file carries no checksum: only its size and its ids are checked.
        """
        for shard in self.shards[part::parts]:
            size, expected = shard.path.stat().st_size, shard.tokens.offset + shard.tokens.nbytes
            if size != expected:
                raise UserError(f"{shard.path} has {size} bytes where {expected} are expected: {self.remedy}")
            if shard.sha256 is not None:
                with open(shard.path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != shard.sha256:
                    sums = f"sha256 {found[:12]}..., {shard.sha256[:12]}... in meta.json"
                    raise UserError(f"{shard.path} is damaged, its checksum differs ({sums}): {self.remedy}")
            if (largest := int(shard.tokens.max())) >= self.vocab_size:
                raise UserError(
                    f"{shard.path} holds token id {largest}, past the vocabulary of {self.vocab_size}: {self.remedy}"
                )


def open_split(folder: str | Path, split: str) -> Split:
    """Opens "train" or "val" of the dataset in `folder`, memory-mapped.

    UserError when there is no dataset or no such split, when meta.json is damaged, or when a shard is missing or not
    what meta.json says (dtype, length). `Split.verify` does the checks that read every byte.
    """
    folder = Path(folder)
    if (folder / "meta.json").exists():
        return _open_npy(folder, split)
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        example = f"`python -m data.pydocs --out {folder}`"
        names = ", ".join(DATASETS)
        raise UserError(f"there is no dataset in {folder}: name one of {names}, or prepare one, as with {example}")
    named = re.compile(rf"(?<![a-z]){split}(?![a-z])")  # "medieval_train_0.bin" is none of val's
    shards = [_map_bin(path) for path in paths if named.search(path.name)]
    if not shards:
        raise UserError(f"no .bin file in {folder} has {split!r} in its name: download those of that split too")
    return Split(f"the {split} split of {folder}", GPT2_SPEC, GPT2_VOCAB_SIZE, shards, "download it again")


def _open_npy(folder: Path, split: str) -> Split:
    path, remedy = folder / "meta.json", "prepare the dataset again"
    try:
        meta = json.loads(path.read_text("utf-8"))
        if command := meta.get("command"):
            remedy += f" with `{command}`"
        number, counted = meta["format"], dict(meta.get("baselines", {}))
        if number != 1:
            raise UserError(f"{path} has format {number}, this version reads format 1: {remedy}")
        opened = _split_of(folder, meta, split, remedy)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from None
    if not opened.shards:
        raise UserError(f"the dataset in {folder} has no {split!r} split, only {sorted(meta['shards'])}: {remedy}")
    opened.baselines = counted
    return opened


def _split_of(folder: Path, meta: dict, split: str, remedy: str) -> Split:
    """A split of the dataset that `meta` describes, perhaps without shards; ValueError, KeyError ... for damage."""
    spec, vocab_size = dict(meta["tokenizer"]), int(meta["vocab_size"])
    entries = [(Path(str(s["file"])).name, int(s["tokens"]), str(s["sha256"])) for s in meta["shards"].get(split, ())]
    shards = [_map_npy(folder / name, n_tokens, sha256, vocab_size, remedy) for name, n_tokens, sha256 in entries]
    return Split(f"the {split} split of {folder}", spec, vocab_size, shards, remedy)


def _map_npy(path: Path, n_tokens: int, sha256: str, vocab_size: int, remedy: str) -> Shard:
    if not path.is_file():
        raise UserError(f"{path} is missing, though meta.json lists it: {remedy}")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy raises ValueError, EOFError, SyntaxError, TokenError, as the damage will have it
        raise UserError(f"{path} is truncated or no .npy file ({type(error).__name__}: {error}): {remedy}") from None
    expected = f"{token_dtype(vocab_size)} ({n_tokens},)"
    if f"{tokens.dtype} {tokens.shape}" != expected:
        raise UserError(f"{path} holds {tokens.dtype} {tokens.shape} where meta.json says {expected}: {remedy}")
    return Shard(path, tokens, sha256)


def _map_bin(path: Path) -> Shard:
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or tuple(header[:2]) != (BIN_MAGIC, BIN_VERSION):
        found = header[:2].tolist()
        raise UserError(
            f"{path} is no token shard: it begins {found}, not [{BIN_MAGIC}, {BIN_VERSION}]: download it again"
        )
    n_tokens, n_bytes = int(header[2]), path.stat().st_size - BIN_HEADER_BYTES
    if n_tokens < 1 or n_bytes != 2 * n_tokens:
        raise UserError(f"{path} is truncated: {n_bytes // 2} of the {n_tokens} tokens it promises: download it again")
    return Shard(path, np.memmap(path, "<u2", mode="r", offset=BIN_HEADER_BYTES, shape=(n_tokens,)), None)
