"""Your own text: `python -m data.text FILES --out FOLDER` makes a dataset of any UTF-8 files.

Each file is a document, or with --lines each line. Empty documents are skipped. If there are several, each follows an
end-of-text token. Validation gets the last tenth of the documents if there are at least ten, else the last tenth of the
characters. Lines are shuffled first, with a fixed seed, since lists are often sorted; files keep their order. All the
text is held in memory at once.
"""

import json
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from data import dataset_dir
from data.files import UserError, run_script
from data.shards import open_split, summary, write_dataset
from data.tokenizer import choose, encode_documents, from_spec

MOST_DOCUMENT_TOKENS = 100_000_000  # most that training_documents holds in memory, as text


def prepare(
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILES")],
    folder: Annotated[Path, tyro.conf.arg(name="out", metavar="FOLDER")],
    tokenizer: Annotated[str, tyro.conf.arg(metavar="char|gpt2|FILE")] = "char",
    lines: bool = False,
) -> str:
    """Prepare a dataset of your own text files.

    Return a one-line summary. Raise UserError, and keep an older dataset in the folder, if a file cannot be read or is
    not UTF-8, or if there is no text.

    Args:
        files: Text files in UTF-8.
        folder: The folder to write.
        tokenizer: Characters, GPT-2's tokens, or those of a file or folder that holds a tokenizer.
        lines: One document per line instead of one per file.
    """
    documents = read_documents(files, lines)
    chosen = choose(tokenizer, "".join(documents), documents=len(documents) > 1)
    splits = dict(zip(("train", "val"), split_documents(documents), strict=True))
    # Encoded before anything is written, since a tokenizer may lack a character of the text.
    for split, texts in splits.items():
        encoded = encode_documents(chosen, texts) if len(documents) > 1 else map(chosen.encode, texts)
        splits[split] = list(encoded)
    named = [*files] if len(files) < 5 else [files[0], "..."]
    options = ["--out", folder, "--tokenizer", tokenizer] + ["--lines"] * lines
    command = "python -m data.text " + shlex.join(map(str, [*named, *options]))
    return summary(folder, write_dataset(folder, chosen, splits, command=command))


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file without byte order mark, \\r\\n as \\n. Raise UserError with the offset of an invalid byte."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give the names of text files") from None
    try:
        return content.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, content[error.start], error.start) from None


def not_utf8(path: str | Path, byte: int, offset: int) -> UserError:
    """Return the error for a file that is not UTF-8, with its first invalid byte."""
    what = f"byte 0x{byte:02x} at offset {offset}"
    return UserError(f"{path} is not UTF-8: {what}: convert it, for example with `iconv -f latin1 -t utf-8`")


def read_documents(files: Sequence[str | Path], lines: bool) -> list[str]:
    """Return the documents of the files, without empty ones, lines shuffled. Raise UserError if none is left."""
    documents = [read_text(path) for path in files]
    if lines:
        documents = [line for text in documents for line in text.split("\n")]
    documents = [document for document in documents if document.strip()]
    if sum(map(len, documents)) < 2:
        raise UserError(f"there is no text in {', '.join(map(str, files)) or 'no files'}: give files that hold some")
    if lines:
        random.Random(0).shuffle(documents)
    return documents


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (train, val), neither empty: the last tenth of ten or more documents, else of the characters.

    A document that spans the cut becomes two.
    """
    if len(documents) >= 10:
        cut = len(documents) - len(documents) // 10
        return documents[:cut], documents[cut:]
    cut = max(1, int(0.9 * sum(map(len, documents))))
    train, val = [], []
    for document in documents:
        train.append(document[: max(cut, 0)])
        val.append(document[max(cut, 0) :])
        cut -= len(document)
    return [text for text in train if text], [text for text in val if text]


def documents_of(run: str | Path) -> set[str]:
    """Return the documents that a run was trained on. run: its folder or one of its checkpoints.

    Raise UserError if it is not a run, or if its training text is missing, has no documents, or is too large.
    """
    folder = Path(run).parents[1] if Path(run).is_file() else Path(run)
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run} is not a run of train_gpt2.py: there is no training text to compare with") from None
    return training_documents(dataset_dir(data))


def training_documents(folder: str | Path) -> set[str]:
    """Return the documents of a dataset's train split, which end-of-text tokens separate."""
    split = open_split(folder, "train")
    tokenizer = from_spec(split.tokenizer_spec)
    if tokenizer.eot is None:
        raise UserError(f"{split.label} is one text, without documents: prepare it with several files, or --lines")
    if split.n_tokens > MOST_DOCUMENT_TOKENS:
        raise UserError(f"{split.label} has {split.n_tokens:,} tokens, too many to compare a sample with each document")
    tokens = split.read(0, split.n_tokens)
    pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
    return {tokenizer.decode(piece[piece != tokenizer.eot]) for piece in pieces if len(piece)}


def main() -> None:
    run_script(prepare, prog="python -m data.text")


if __name__ == "__main__":
    main()
