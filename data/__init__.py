"""Data: from text to batches of token ids.

In reading order: tokenizer.py (text <-> ids), shards.py (ids on disk, and the loader that makes batches of them), then
one script a corpus: pydocs.py (inside every CPython), shakespeare.py, text.py (your own files). Each script writes a
dataset, a folder that `shards.open_split` opens.

Here is what all of them share: the error that a user can mend, how it is shown, how a command line becomes a call, and
how a file is written whole or not at all.
"""

import functools
import importlib
import io
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")

DATASETS = {  # name -> the module that prepares it, and how
    "pydocs": ("data.pydocs", {}),
    "shakespeare-char": ("data.shakespeare", {"tokenizer": "char"}),
    "shakespeare-gpt2": ("data.shakespeare", {"tokenizer": "gpt2"}),
}


class DataError(Exception):
    """Something that the user can mend: one sentence that names the thing, its value and what would be right."""


@contextmanager
def clear_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns a DataError, an OSError or one of `kinds` into one line `error: ...` and exit status 2; Ctrl-C into 130."""
    try:
        yield
    except (DataError, *kinds) as error:
        message, status = str(error), 2
    except OSError as error:
        named = error.strerror and error.filename is not None
        message, status = f"{error.strerror}: {error.filename}" if named else str(error), 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    else:
        return
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    raise SystemExit(status)


def folder_of(name: str) -> Path:
    """Where a dataset lies: a name of DATASETS under datasets/, anything else is a folder itself."""
    return Path("datasets", name) if name in DATASETS else Path(name)


def prepare_if_missing(name: str) -> None:
    """Prepare a dataset of DATASETS unless it is there; DataError when it cannot be, without network say."""
    folder = folder_of(name)
    if name in DATASETS and not (folder / "meta.json").exists():
        module, options = DATASETS[name]
        print(importlib.import_module(module).prepare(folder=folder, **options))


def parse_options(command_line: Callable[[], T]) -> T:
    """What `command_line`, a call of tyro.cli, returns; where tyro draws a box around a mistake, one `error:` line."""
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return command_line()
    except SystemExit as stop:
        if stop.code in (None, 0):  # --help
            raise
    lines = [line.strip("│╭╮╰╯─ ") for line in shown.getvalue().splitlines()]
    first_part = lines[1 : lines.index("", 1) if "" in lines[1:] else None]
    print("error:", " ".join(first_part), "(--help shows every option)", file=sys.stderr)
    raise SystemExit(2)


def run_script(prepare: Callable[..., str], prog: str) -> None:
    """The main of a data script: the command line is the arguments of `prepare`, and what it returns is printed."""
    import tyro

    @functools.wraps(prepare)
    def later(*args, **options):  # so that a mistake on the command line is not mixed up with what prepare prints
        return functools.partial(prepare, *args, **options)

    with clear_errors():
        print(parse_options(lambda: tyro.cli(later, prog=prog, description=prepare.__doc__.splitlines()[0]))())


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Makes the file at `path` by calling `write(file)`: it appears whole, replacing any older one, or not at all.

    The bytes go to a temporary file `.NAME.XXXXXXXX.tmp` in the same folder, which takes the name once they are on the
    disk. An exception removes it; a killed process leaves it behind, where nothing reads it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The new name outlives a power cut only once the folder is on the disk too. Some network file systems refuse
        # to sync a folder; the file is whole all the same.
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(folder)
        os.close(folder)
