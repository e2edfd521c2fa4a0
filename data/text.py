"""Your own text: `python -m data.text FILES --out FOLDER` makes a dataset of any text files.

FILES are files, folders, whose text files are taken, and patterns such as 'my/*.txt'. They are read as UTF-8, or as
their byte order mark says, or with --encoding; .gz and .zst are decompressed. Each file is a document, or with --lines
each line, or with --separator each part between separators. Empty documents are skipped. If there are several, each
follows an end-of-text token. Validation gets a tenth of the documents, drawn with a fixed seed, if there are at least
ten, else the last tenth of the characters. Lines are shuffled first, with a fixed seed, since lists are often sorted;
files keep their order. All the text is held in memory at once.
"""

import codecs
import glob
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from charset_normalizer import from_bytes

from data.corpora import dataset_dir
from data.files import UserError, run_script
from data.outside import open_bytes, read_json
from data.shards import open_split, summary, write_dataset
from data.tokenizer import END_OF_TEXT, choose, encode_documents, from_spec

MOST_DOCUMENT_TOKENS = 100_000_000  # most that training_documents holds in memory, as text
MANY_CHARACTERS = 1_000  # a vocabulary above it is worth a note
GUESSES = (  # encodings that are told apart
    "cp1252", "gb18030", "cp932", "big5", "cp949", "euc_jp", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1255", "cp1256",
)  # fmt: skip
CONTROLS = {*map(chr, range(32))} - {*"\t\n\r\f\x1b"}  # characters that no text has
MARKS = {  # byte order mark -> encoding; UTF-32's begins as UTF-16's does
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip


def prepare(
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILES")],
    folder: Annotated[Path, tyro.conf.arg(name="out", metavar="FOLDER")],
    tokenizer: Annotated[str, tyro.conf.arg(metavar="char|gpt2|FILE")] = "char",
    lines: bool = False,
    separator: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "",
    encoding: Annotated[str, tyro.conf.arg(metavar="NAME")] = "",
) -> str:
    """Prepare a dataset of your own text files.

    Return a one-line summary. Raise UserError, and keep an older dataset in the folder, if a file cannot be read or is
    in another encoding, or if there is no text.

    Args:
        files: Text files, folders of them, or patterns.
        folder: The folder to write.
        tokenizer: Characters, GPT-2's tokens, or those of a file or folder that holds a tokenizer.
        lines: One document per line instead of one per file.
        separator: What separates documents inside a file, such as "<|endoftext|>".
        encoding: The files' encoding, such as gbk, shift_jis, cp1252; UTF-8 if not given.
    """
    documents = read_documents(files, lines, encoding, separator)
    chosen = choose(tokenizer, "".join(documents), documents=len(documents) > 1)
    splits = dict(zip(("train", "val"), split_documents(documents), strict=True))
    # Encoded before anything is written, since a tokenizer may lack a character of the text.
    for split, texts in splits.items():
        encoded = encode_documents(chosen, texts) if len(documents) > 1 else map(chosen.encode, texts)
        splits[split] = list(encoded)
    named = [*files] if len(files) < 5 else [files[0], "..."]
    options = ["--out", folder, "--tokenizer", tokenizer] + ["--lines"] * lines
    options += ["--separator", separator] if separator else []
    options += ["--encoding", encoding] if encoding else []
    command = "python -m data.text " + shlex.join(map(str, [*named, *options]))
    meta = write_dataset(folder, chosen, splits, command=command)
    if tokenizer == "char" and chosen.vocab_size > MANY_CHARACTERS:
        learn = shlex.join(map(str, [*named, "--vocab-size", 1000, "--out", f"{folder}-bpe"]))
        many = f"{chosen.vocab_size:,} characters make a large model: byte pairs need fewer tokens in the vocabulary"
        how = f"`python -m data.bpe train {learn}`, then --tokenizer {folder}-bpe here, or --tokenizer gpt2"
        print(f"note: {many}: {how}", file=sys.stderr)
    return summary(folder, meta)


def read_text(path: str | Path, encoding: str | None = None) -> str:
    """Read a text file, without byte order mark, \\r\\n as \\n.

    encoding: name of the encoding; "": UTF-8, or what the byte order mark says; None: the same, for a command without
        the option --encoding
    Raise UserError if the file cannot be read, is binary, or is in another encoding, with a guess which.
    """
    try:
        with open_bytes(path) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}: give the names of text files") from None
    mark, marked = next((item for item in MARKS.items() if content.startswith(item[0])), (b"", "utf-8"))
    try:
        text = content.decode(encoding or marked)
    except UnicodeDecodeError as error:
        place = (
            f"{path} is not {(encoding or marked).upper()}: byte 0x{content[error.start]:02x} at offset {error.start}"
        )
        raise other_encoding(path, content, encoding, place) from None
    except (LookupError, ValueError):  # one that Python lacks, or that is none of text
        known = "utf-8, utf-16, gbk, big5, shift_jis, euc_kr, cp1252, latin1"
        raise UserError(f"--encoding {encoding} is unknown: use one that Python knows, such as {known}") from None
    if 8 * text.count("\0") > len(text):  # UTF-16, or binary
        raise other_encoding(path, content, encoding, f"{path} holds zero bytes")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def other_encoding(path: str | Path, content: bytes, encoding: str | None, place: str) -> UserError:
    """Return the error for a file that is binary, or in an encoding that is guessed."""
    head = content[: content.rfind(b"\n", 0, 1 << 16) + 1] or content[: 1 << 20]
    found = from_bytes(head, cp_isolation=list(GUESSES)).best()
    guess = found.encoding if found else "cp1252"
    if b"\0" in content:  # UTF-16 has it in every other place
        guess = "utf-16-be" if content[::2].count(0) > content[1::2].count(0) else "utf-16-le"
        head = content[: 1 << 16]
    if not _is_text(head, guess):
        tokens = "its folder, if it holds tokens, is what train_gpt2.py --data takes"
        hints = {".bin": tokens, ".npy": tokens, ".parquet": "`python -m data.fineweb --input` reads it"}
        return UserError(f"{path} is a binary file, not text: {hints.get(Path(path).suffix, 'leave it out')}")
    how = f"try --encoding {guess}"
    if encoding is None:
        how = f"try `iconv -f {guess} -t utf-8 {shlex.quote(str(path))} > new.txt`"
    return UserError(f"{place}: {how}, which is a guess")


def note_end_of_text(name: str | Path, count: int) -> None:
    """Say that a text spells the end-of-text token `count` times, if it does: who writes that means the token."""
    if count:
        how = f"`python -m data.text --separator '{END_OF_TEXT}'` makes documents of what it separates"
        print(
            f"note: {END_OF_TEXT} in {name} ({count:,} times) is read as text, not as a token: {how}", file=sys.stderr
        )


def _is_text(content: bytes, encoding: str) -> bool:
    try:
        return not CONTROLS & set(content.decode(encoding))
    except UnicodeDecodeError:
        return False


def find_files(names: Sequence[str | Path]) -> list[tuple[Path, bool]]:
    """Return the files that names mean, each with whether it was named itself, not found in a folder.

    A folder stands for all files below it but hidden ones; a name with *, ? or [] that is no file, for what it matches.
    Raise UserError for a pattern without a match.
    """
    found = []
    for name in map(Path, names):
        matches = [name]
        if not name.exists() and glob.has_magic(str(name)):
            matches = [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
            if not matches:
                raise UserError(f"no file matches {name}: give files, folders or a pattern such as 'my/*.txt'")
        for path in matches:
            if path.is_dir():
                below = (inner for inner in sorted(path.rglob("*")) if inner.is_file())
                found += [(p, False) for p in below if not any(part[0] == "." for part in p.relative_to(path).parts)]
            else:
                found.append((path, True))
    return found


def read_documents(files: Sequence[str | Path], lines: bool, encoding: str = "", separator: str = "") -> list[str]:
    """Return the documents of the files, without empty ones, lines shuffled. Raise UserError if none is left.

    separator: what separates documents inside a file, "" for nothing
    What cannot be read in a folder is left out, with a warning.
    """
    documents, left_out = [], []
    for path, named in find_files(files):
        try:
            documents.append(read_text(path, encoding))
        except UserError as error:
            if named:
                raise
            left_out.append(str(error))
    if left_out:
        more = f"; and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        print(f"warning: {len(left_out)} file(s) left out: {'; '.join(left_out[:5])}{more}", file=sys.stderr)
    if separator:
        documents = [part for text in documents for part in text.split(separator)]
    note_end_of_text(files[0] if len(files) == 1 else "the files", sum(text.count(END_OF_TEXT) for text in documents))
    if lines:
        documents = [line for text in documents for line in text.split("\n")]
    documents = [document for document in documents if document.strip()]
    if sum(map(len, documents)) < 2:
        raise UserError(f"there is no text in {', '.join(map(str, files)) or 'no files'}: give files that hold some")
    if lines:
        random.Random(0).shuffle(documents)
    return documents


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (train, val), neither empty: a tenth of ten or more documents, else the last tenth of the characters.

    The tenth is drawn with a fixed seed, since files are often sorted by name. Of fewer documents, one that spans the
    cut becomes two.
    """
    if len(documents) >= 10:
        held_out = set(random.Random(0).sample(range(len(documents)), len(documents) // 10))
        train = [document for i, document in enumerate(documents) if i not in held_out]
        return train, [documents[i] for i in sorted(held_out)]
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
        data = read_json(folder / "config.json", {"data": str})["data"]
    except UserError:
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
    tokens = np.maximum(tokens, ~tokens)  # ~id: one that does not count in the loss
    pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
    return {tokenizer.decode(piece[piece != tokenizer.eot]) for piece in pieces if len(piece)}


def main() -> None:
    run_script(prepare, prog="python -m data.text")


if __name__ == "__main__":
    main()
