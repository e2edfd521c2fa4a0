"""Tiny Shakespeare: 1.1 MB of plays, as characters (65 of them) or as GPT-2's tokens (338,025).

`python -m data.shakespeare` downloads the text and checks its sha256; `--input FILE` reads your own copy, with a note
if it differs. The first 90% of the characters are for training, the rest for validation, cut before tokenizing.
"""

import hashlib
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from data.files import UserError, download, run_script
from data.shards import summary, write_dataset
from data.text import read_text, split_documents
from data.tokenizer import choose

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(
    folder: Annotated[Path | None, tyro.conf.arg(name="out", metavar="FOLDER")] = None,
    input: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    tokenizer: Annotated[str, tyro.conf.arg(metavar="char|gpt2|FILE")] = "char",
    url: tyro.conf.Suppress[str] = URL,
) -> str:
    """Prepare a dataset of tiny Shakespeare.

    Return a one-line summary. Raise UserError, and keep an older dataset in the folder, if the download fails or
    differs, or if the file cannot be read, is not UTF-8 or is empty.

    Args:
        folder: The folder to write; datasets/shakespeare-TOKENIZER if not given.
        input: A file to read instead of the download.
        tokenizer: Characters, GPT-2's tokens, or those of a file or folder that holds a tokenizer.
    """
    folder = folder or Path("datasets", f"shakespeare-{Path(tokenizer).stem}")
    if input is None:
        text = download(url, SHA256, "tiny Shakespeare", "python -m data.shakespeare --input FILE").decode()
    else:
        text = read_input(input)
    chosen = choose(tokenizer, text, documents=False)
    train, val = split_documents([text])
    splits = {"train": [chosen.encode(*train)], "val": [chosen.encode(*val)]}
    options = ["--out", folder, "--tokenizer", tokenizer] + (["--input", input] if input else [])
    command = "python -m data.shakespeare " + shlex.join(map(str, options))
    return summary(folder, write_dataset(folder, chosen, splits, command=command))


def read_input(path: Path) -> str:
    """Return the text of a local copy, with a note on stderr if it is not the original."""
    text = read_text(path)
    if len(text.strip()) < 2:
        raise UserError(f"{path} is empty: --input takes a copy of {URL}")
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        print(f"note: {path} is not the original tiny Shakespeare; continuing with it", file=sys.stderr)
    return text


def main() -> None:
    run_script(prepare, prog="python -m data.shakespeare")


if __name__ == "__main__":
    main()
