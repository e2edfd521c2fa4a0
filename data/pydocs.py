"""The language topics of `help()`: about 465 KB of English that every CPython carries (`pydoc_data.topics`).

`python -m data.pydocs` makes a dataset from it, with no download: characters, or other tokens. Each topic is one
document. Many topics repeat sections of others ("compound" holds all of "if", "while" and "try"), and a model must not
be tested on what it was trained on. So validation, about a tenth of the text, is every sixth of the topics that
share no paragraph with any other. The text, and with it every count, differs a little between versions of Python.
"""

import importlib
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro

from data.files import UserError, run_script
from data.shards import summary, write_dataset
from data.tokenizer import choose, encode_documents

PARAGRAPH_CHARACTERS = 40  # shorter ones ("See also:") are alike by chance
VALIDATION_STRIDE = 6


def prepare(
    folder: Annotated[Path | None, tyro.conf.arg(name="out", metavar="FOLDER")] = None,
    tokenizer: Annotated[str, tyro.conf.arg(metavar="char|gpt2|FILE")] = "char",
) -> str:
    """Prepare a dataset of the language topics of Python's help().

    Return a one-line summary. Raise UserError if this Python lacks the topics or the tokenizer does not exist.

    Args:
        folder: The folder to write; datasets/pydocs if not given, or datasets/pydocs-TOKENIZER for other tokens.
        tokenizer: Characters, GPT-2's tokens, or those of a file or folder that holds a tokenizer.
    """
    folder = folder or Path("datasets", "pydocs" if tokenizer == "char" else f"pydocs-{Path(tokenizer).stem}")
    topics = read_topics()
    held_out = validation_topics(topics)
    chosen = choose(tokenizer, "".join(topics.values()), documents=True)
    names = {"train": [name for name in topics if name not in held_out], "val": held_out}
    # Encoded before anything is written, since a tokenizer may lack a character of the text.
    splits = {split: [*encode_documents(chosen, [topics[name] for name in names[split]])] for split in names}
    command = "python -m data.pydocs " + shlex.join(["--out", str(folder), "--tokenizer", tokenizer])
    return summary(folder, write_dataset(folder, chosen, splits, command=command))


def read_topics(module: str = "pydoc_data.topics") -> dict[str, str]:
    """Return topic name -> text, sorted by name. Raise UserError if `module` is missing or empty."""
    try:
        topics = dict(sorted(importlib.import_module(module).topics.items()))
    except (ImportError, AttributeError):
        topics = {}
    if not topics:
        raise UserError(
            f"{sys.executable} lacks {module}, the text of Python's help(): use another Python, or your own "
            "text with `python -m data.text FILES --out FOLDER`"
        )
    return topics


def validation_topics(topics: dict[str, str]) -> list[str]:
    """Return the names of the held-out topics: every sixth of those that share no paragraph with another."""
    paragraphs = {name: _paragraphs(text) for name, text in topics.items()}
    seen = Counter(paragraph for found in paragraphs.values() for paragraph in found)
    return [name for name, found in paragraphs.items() if all(seen[p] == 1 for p in found)][::VALIDATION_STRIDE]


def _paragraphs(text: str) -> set[str]:
    """Return the paragraphs of a text with white space normalized, since a repeated section may be indented."""
    even = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in even if len(paragraph) >= PARAGRAPH_CHARACTERS}


def main() -> None:
    run_script(prepare, prog="python -m data.pydocs")


if __name__ == "__main__":
    main()
