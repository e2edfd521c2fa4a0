"""Token shards: the format on disk.

A dataset is a folder. It exists if and only if it holds `meta.json`, which is written last:

    meta.json          {"format": 1, "tokenizer": SPEC, "vocab_size": V, "command": HOW IT WAS PREPARED or null,
                        "shards": {"train": [{"file": ..., "tokens": N, "sha256": ...}, ...], "val": [...]},
                        "baselines": LOSSES OF N-GRAM COUNTS, see baselines.py, or absent}
    train_000000.npy   one-dimensional, little-endian uint16, or uint32 if V > 65,536
    val_000000.npy
    train_000000.scored.npy   of dialogues (chat.py): bool, whether a token counts in the loss; named in the shard's
                              entry, "scored": {"file": ..., "sha256": ...}; all tokens do without it

Folders that other programs wrote are datasets too, of GPT-2's tokens as uint16; `train` or `val` in a file's name gives
the split:

    *.bin                           llm.c, modded-nanogpt: 256 int32 (magic 20240520, version 1, number of tokens,
                                    zeros), then the tokens
    train.bin, val.bin              nanoGPT: the tokens alone; of a character tokenizer if meta.pkl lies beside them,
                                    which is not read: it is a pickle
    NAME_train_NNNNNN.npy           build-nanogpt; without a NAME it is an unfinished dataset of ours
"""

import hashlib
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import baselines
from data.corpora import DATASETS
from data.files import UserError, atomic_write, meant, writing
from data.outside import read_json
from data.tokenizer import Tokenizer, from_spec, token_dtype

BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 1024
GPT2_SPEC, GPT2_VOCAB_SIZE = {"type": "gpt2"}, 50257
# what meta.json holds, in the terms of outside.check_shape; of baselines, only the losses are read
SCORED = {"file": str, "sha256": str}
ENTRIES = [{"file": str, "tokens": range(1, 2**48), "sha256": str, "scored?": SCORED}]
META = {
    "format": range(1, 2),
    "tokenizer": {"type": str},
    "vocab_size": range(1, 2**31),
    "command?": (str, None),
    "shards": {"train?": ENTRIES, "val?": ENTRIES},
    "baselines?": {f"{name}?": float for name in ("uniform", *baselines.ORDERS)},
}

# ------------------------------------------------------------------------------------------------------------- writing


def write_dataset(
    folder: str | Path,
    tokenizer: Tokenizer,
    splits: dict[str, Iterable[np.ndarray]],
    shard_tokens: int = 100_000_000,
    command: str | None = None,
    scored: dict[str, Iterable[np.ndarray]] | None = None,
) -> dict:
    """Write {"train": documents, "val": documents} as a dataset, in place of an older one in `folder`.

    documents: 1-D integer arrays of token ids, end-of-text tokens included, read one by one, so that memory holds one
        shard
    command: what prepares this dataset again, for error messages
    scored: for each of the documents, 1-D bool: the tokens that count in the loss; None: all of them
    Return the content of meta.json. Raise UserError, and leave no dataset, if a split has no tokens or an id is not in
    the vocabulary; raise it too if another process is writing to the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        clear_dataset(folder)
        shards = {}
        for split, documents in splits.items():
            pieces = enumerate(cut(documents, shard_tokens, tokenizer.vocab_size))
            shards[split] = [write_shard(folder / f"{split}_{i:06d}.npy", tokens) for i, tokens in pieces]
            if not shards[split]:
                raise UserError(f"the {split} split of {folder} would be empty: give more text")
            for shard, marks in zip(shards[split], cut(scored[split], shard_tokens, 2) if scored else (), strict=False):
                path = folder / shard["file"].replace(".npy", ".scored.npy")
                entry = write_shard(path, marks.astype(bool))
                shard["scored"] = {"file": entry["file"], "sha256": entry["sha256"]}
        return write_meta(folder, tokenizer, shards, command)


def write_meta(
    folder: str | Path, tokenizer: Tokenizer, shards: dict[str, list[dict]], command: str | None = None
) -> dict:
    """Write meta.json, which makes the shards in `folder` a dataset, and return its content.

    shards: {"train": entries, "val": entries}, each entry what `write_shard` returned, in reading order
    The baselines are counted from the files, in under a minute for any size. Raise UserError if a shard is missing or
    does not match its entry.
    """
    folder, V = Path(folder), tokenizer.vocab_size
    meta = {"format": 1, "tokenizer": tokenizer.spec(), "vocab_size": V, "command": command, "shards": shards}
    if shards.get("train") and shards.get("val") and "scored" not in shards["train"][0]:  # counts are of all tokens
        train, val = (_split_from_meta(folder, meta, name, "prepare the dataset again") for name in ("train", "val"))
        meta["baselines"] = baselines.measure(train, val, V)
    atomic_write(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    return meta


def clear_dataset(folder: Path) -> None:
    """Remove a dataset, meta.json first, and what an interrupted preparation left; other files stay."""
    (folder / "meta.json").unlink(missing_ok=True)
    ours = re.compile(
        r"(train|val)_[\d_]+(\.scored)?\.npy|progress_\d+\.json|\.(train|val|progress|meta).*\.[0-9a-f]{8}\.tmp"
    )
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write one shard atomically and return its entry in meta.json; tokens: (n,) uint16 or uint32."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    # Hashed from memory, not read back: a corrupt write must not get a matching checksum.
    digest = hashlib.sha256(header.getvalue())
    digest.update(tokens.data)

    def write(file):
        file.write(header.getvalue())
        file.write(tokens.data)

    atomic_write(path, write)
    return {"file": path.name, "tokens": len(tokens), "sha256": digest.hexdigest()}


def summary(folder: str | Path, meta: dict) -> str:
    """Return one line for the terminal: the folder, the tokenizer, the vocabulary and the tokens of each split."""
    counts = (f"{sum(s['tokens'] for s in shards):,} {split}" for split, shards in meta["shards"].items())
    kind = meta["tokenizer"]["type"]
    return f"{folder}: {kind} tokenizer, vocabulary {meta['vocab_size']:,}, tokens: {', '.join(counts)}"


def cut(documents: Iterable[np.ndarray], shard_tokens: int, vocab_size: int) -> Iterator[np.ndarray]:
    """Join the documents and cut them into arrays of shard_tokens tokens; the last may be shorter.

    Each array is valid until the next is requested: they share one buffer. Raise UserError for an id that is not in
    the vocabulary.
    """
    shard, used = np.empty(shard_tokens, token_dtype(vocab_size)), 0
    for tokens in documents:
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            ids = f"{tokens.min()} to {tokens.max()}"
            raise UserError(f"a document holds ids {ids}, but the vocabulary is {vocab_size}")
        while len(tokens):
            piece, tokens = np.split(tokens, [shard_tokens - used])
            shard[used : used + len(piece)] = piece
            used += len(piece)
            if used == shard_tokens:
                yield shard
                used = 0
    if used:
        yield shard[:used]


# ------------------------------------------------------------------------------------------------------------- reading


class Shard(NamedTuple):
    """One file of a split. tokens: (n,) uint16 or uint32, memory-mapped; sha256 is None without meta.json.

    scored: (n,) bool, with its own path and sha256, or None if all tokens count in the loss
    """

    path: Path
    tokens: np.memmap
    sha256: str | None
    scored: "Shard | None" = None


def _files(shards: list[Shard]) -> list[Shard]:
    return [file for shard in shards for file in (shard, shard.scored) if file]


class Split:
    """One split of a dataset, read as if its shards were a single array of n_tokens token ids.

    `baselines` holds the losses of n-gram counts (see baselines.py), or {}. `fingerprint` is a hex string that is equal
    in two processes if they see the same list of shards (names, lengths, checksums). `note` says what was taken for
    granted about the files, for the terminal.
    """

    note = ""

    def __init__(self, label: str, tokenizer_spec: dict, vocab_size: int, shards: list[Shard], hint: str):
        self.label, self.tokenizer_spec, self.vocab_size = label, tokenizer_spec, vocab_size
        self.shards, self.hint, self.baselines = shards, hint, {}
        self.borders = np.cumsum([0] + [len(shard.tokens) for shard in shards])  # shard i holds borders[i:i+2]
        self.n_tokens = int(self.borders[-1])
        self.partly_scored = any(shard.scored for shard in shards)
        listing = [vocab_size] + [[s.path.name, len(s.tokens), s.sha256] for s in _files(shards)]
        self.fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count) as (count,) int64, across shard borders; IndexError past either end.

        A token that does not count in the loss is returned as ~id, which is negative.
        """
        if not 0 <= start <= start + count <= self.n_tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.label}, which has {self.n_tokens}")
        out, done = np.empty(count, np.int64), 0
        i = int(np.searchsorted(self.borders, start, side="right")) - 1
        while done < count:
            offset = start + done - int(self.borders[i])
            for path, tokens, *_ in _files([self.shards[i]]):
                if tokens._mmap.size() < tokens.offset + tokens.nbytes:  # reading past the end would kill the process
                    raise UserError(f"{path} was cut short while it was read: {self.hint}")
            piece = self.shards[i].tokens[offset : offset + count - done]
            out[done : done + len(piece)] = piece
            if scored := self.shards[i].scored:
                out[done : done + len(piece)] ^= scored.tokens[offset : offset + len(piece)].astype(np.int64) - 1
            done += len(piece)
            i += 1
        return out

    def verify(self, part: int = 0, parts: int = 1) -> list[int | None]:
        """Check size, sha256 and every id of the shards i with i % parts == part; raise UserError for a corrupt one.

        Without meta.json there is no sha256 to compare with. Return the first 60 bits of each shard's sha256, None for
        those that were not read.
        """
        files = _files(self.shards)
        found: list[int | None] = [None] * len(files)
        for i, shard in list(enumerate(files))[part::parts]:
            size, expected = shard.path.stat().st_size, shard.tokens.offset + shard.tokens.nbytes
            if size != expected:
                raise UserError(f"{shard.path} has {size} bytes, but {expected} are expected: {self.hint}")
            with open(shard.path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found[i] = int(sha256[:15], 16)
            if shard.sha256 is not None and sha256 != shard.sha256:
                sums = f"sha256 {sha256[:12]}..., in meta.json {shard.sha256[:12]}..."
                raise UserError(f"{shard.path} is corrupt ({sums}): {self.hint}")
            if (largest := int(shard.tokens.max())) >= self.vocab_size:
                raise UserError(
                    f"{shard.path} holds token id {largest}, but the vocabulary is {self.vocab_size}: {self.hint}"
                )
        return found


def open_split(folder: str | Path, split: str) -> Split:
    """Open "train" or "val" of the dataset in `folder`, memory-mapped.

    Raise UserError if there is no dataset or no such split, if meta.json is corrupt, or if a shard is missing or does
    not match it (dtype, length). `Split.verify` does the checks that read every byte.
    """
    folder = Path(folder)
    if (folder / "meta.json").exists():
        return _open_with_meta(folder, split)
    if (folder / "train.bin").is_file() and not _has_header(folder / "train.bin"):
        return _open_nanogpt(folder, split)
    names = sorted(path.name for path in folder.glob("*.bin") if path.is_file())
    names = names or sorted(
        path.name for path in folder.glob("*.npy") if path.is_file() and re.search(r"._(train|val)_\d+", path.name)
    )
    if not names:
        raise _no_dataset(folder)
    named = re.compile(rf"(?<![a-z]){split}(?![a-z])")  # "medieval_train_0.bin" is not a val shard
    paths = [folder / name for name in names if named.search(name)]
    if not paths:
        raise UserError(f"no {names[0][-4:]} file in {folder} has {split!r} in its name: add those of that split too")
    shards = [map_bin(path) if path.suffix == ".bin" else _map_build_nanogpt(path) for path in paths]
    return Split(f"the {split} split of {folder}", GPT2_SPEC, GPT2_VOCAB_SIZE, shards, "get the file again")


def _open_nanogpt(folder: Path, split: str) -> Split:
    """Open train.bin or val.bin of nanoGPT, whose tokens have no header."""
    path, own = folder / f"{split}.bin", "`python -m data.text FILES --out FOLDER` makes a dataset of the same text"
    if (folder / "meta.pkl").exists():
        raise UserError(f"{folder} holds nanoGPT's files with a tokenizer of their own, in a pickle: {own}")
    if not path.is_file() or not (size := path.stat().st_size) or size % 2:
        raise UserError(f"{path}, which nanoGPT fills with uint16 tokens, is missing, empty or cut short: {own}")
    shard = Shard(path, np.memmap(path, "<u2", mode="r"), None)
    opened = Split(f"the {split} split of {folder}", GPT2_SPEC, GPT2_VOCAB_SIZE, [shard], own)
    opened.note = f"{folder} holds nanoGPT's files, which do not name their tokenizer: taken as GPT-2's tokens"
    return opened


def _map_build_nanogpt(path: Path) -> Shard:
    tokens = _map_npy(path, "get the file again")
    if str(tokens.dtype) != "uint16" or tokens.ndim != 1 or not len(tokens):
        found = f"{tokens.dtype} {tokens.shape}"
        raise UserError(f"{path} holds {found}, not a row of uint16 tokens as build-nanogpt writes them")
    return Shard(path, tokens, None)


def _no_dataset(folder: Path) -> UserError:
    """Return the error for a folder without a dataset: with the command that makes one of what is there."""
    if (folder / "checkpoints").is_dir():
        return UserError(
            f"{folder} is a run, not a dataset: use --init-from {folder} to start from its weights, and --data DATASET"
        )
    if folder.is_file() and folder.suffix in (".npy", ".bin"):
        return UserError(f"{folder} is a file: --data takes the folder of its shards, {folder.parent}")
    files = [folder] if folder.is_file() else sorted(folder.glob("[!.]*"))
    files = [path for path in files if path.is_file() and path.suffix not in (".npy", ".bin")]
    rows = [path for path in files if re.search(r"\.(parquet|jsonl?)(\.gz|\.zst)?$", path.name.lower())]
    if files:
        out = Path("datasets", folder.stem if folder.is_file() else folder.resolve().name)
        out = f"{out}-tokens" if out.exists() else out
        how = shlex.join(["data.fineweb", "--input", *map(str, rows)] if rows else ["data.text", str(folder)])
        command = f"`python -m {how} --out {shlex.quote(str(out))}`"
        return UserError(f"{folder} holds no tokens yet: prepare it first with {command}, then use --data {out}")
    known = [*DATASETS, *(str(path.parent) for path in sorted(Path("datasets").glob("*/meta.json")))]
    close = meant(str(folder), known)
    hint = f"did you mean {close}? " if close else ""
    return UserError(
        f"there is no dataset in {folder}: {hint}give one of {', '.join(DATASETS)}, or prepare text of your own with "
        f"`python -m data.text FILES --out {folder}`"
    )


def _open_with_meta(folder: Path, split: str) -> Split:
    hint = ": prepare the dataset again"
    meta = read_json(folder / "meta.json", hint=hint)
    if isinstance(command := meta.get("command"), str):
        hint += f" with `{command}`"
    if type(version := meta.get("format")) is int and version > 1:
        raise UserError(f"{folder / 'meta.json'} has format {version}, this version reads format 1{hint}")
    meta = read_json(folder / "meta.json", META, hint)
    opened = _split_from_meta(folder, meta, split, hint.removeprefix(": "))
    if not opened.shards:
        raise UserError(f"the dataset in {folder} has no {split!r} split, only {sorted(meta['shards'])}{hint}")
    try:
        size = from_spec(meta["tokenizer"]).vocab_size
    except UserError as error:
        raise UserError(f"{folder / 'meta.json'} is corrupt: {error}{hint}") from None
    if size != opened.vocab_size:
        sizes = f"vocab_size is {opened.vocab_size}, but its tokenizer has {size} tokens"
        raise UserError(f"{folder / 'meta.json'} is corrupt: {sizes}{hint}")
    opened.baselines = meta.get("baselines", {})
    return opened


def _split_from_meta(folder: Path, meta: dict, split: str, hint: str) -> Split:
    """Return the split that `meta`, which has the shape META, describes, perhaps without shards."""
    vocab_size, shards = meta["vocab_size"], []
    for entry in meta["shards"].get(split, ()):
        path, n_tokens, sha256 = folder / Path(entry["file"]).name, entry["tokens"], entry["sha256"]
        if not path.is_file():
            raise UserError(f"{path} is missing, though meta.json lists it: {hint}")
        tokens = map_bin(path, hint).tokens if path.suffix == ".bin" else _map_npy(path, hint)
        expected = f"{token_dtype(vocab_size)} ({n_tokens},)"
        if f"{tokens.dtype} {tokens.shape}" != expected:
            raise UserError(f"{path} holds {tokens.dtype} {tokens.shape}, but meta.json says {expected}: {hint}")
        shards.append(Shard(path, tokens, sha256, _map_scored(folder, entry, n_tokens, hint)))
    return Split(f"the {split} split of {folder}", meta["tokenizer"], vocab_size, shards, hint)


def _map_scored(folder: Path, entry: dict, n_tokens: int, hint: str) -> Shard | None:
    if "scored" not in entry:
        return None
    path = folder / Path(entry["scored"]["file"]).name
    if not path.is_file():
        raise UserError(f"{path} is missing, though meta.json lists it: {hint}")
    scored = _map_npy(path, hint)
    if scored.dtype != bool or scored.shape != (n_tokens,):
        raise UserError(f"{path} holds {scored.dtype} {scored.shape}, not bool ({n_tokens},): {hint}")
    return Shard(path, scored, entry["scored"]["sha256"])


def _map_npy(path: Path, hint: str) -> np.memmap:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # ValueError, EOFError, SyntaxError, TokenError: numpy raises any of them
        raise UserError(f"{path} is truncated or not a .npy file ({type(error).__name__}: {error}): {hint}") from None


def _has_header(path: Path) -> bool:
    return tuple(np.fromfile(path, "<i4", 2)) == (BIN_MAGIC, BIN_VERSION)


def map_bin(path: Path, hint: str = "get the file again") -> Shard:
    """Memory-map a .bin shard. Raise UserError, with `hint` at its end, if it is truncated or not a shard."""
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or tuple(header[:2]) != (BIN_MAGIC, BIN_VERSION):
        hint += ", or name it train.bin or val.bin if nanoGPT wrote it"
        raise UserError(f"{path} is not a token shard: bad magic/version {header[:2].tolist()}: {hint}")
    n_tokens, n_bytes = int(header[2]), path.stat().st_size - BIN_HEADER_BYTES
    if n_tokens < 1 or n_bytes != 2 * n_tokens:
        raise UserError(f"{path} is truncated: {n_bytes // 2} tokens, but its header says {n_tokens}: {hint}")
    return Shard(path, np.memmap(path, "<u2", mode="r", offset=BIN_HEADER_BYTES, shape=(n_tokens,)), None)
