"""Shared by the commands of kernels/: options, errors on one line, tables."""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterator
from typing import TypeVar

import tyro

from kernels import startup

T = TypeVar("T")


def parse_options(options: type[T], words: list[str] | None, prog: str) -> T:
    """Return the dataclass filled from these words, sys.argv's if None. Raise ValueError for what it does not know."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(options, args=words, prog=prog)
    except SystemExit as stop:
        if stop.code in (None, 0):  # --help
            raise
    # tyro draws a box: a title, a rule or the message, more rules and hints
    lines = [line.strip("│| ") for line in shown.getvalue().splitlines()[1:]]
    sections = itertools.groupby(lines, lambda line: any(map(str.isalnum, line)))
    message = next((" ".join(section) for text, section in sections if text), "these options are wrong")
    raise ValueError(f"{message} (--help shows every option)")


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a ValueError, an OSError or a lack of memory into one line `error: ...` and exit status 2, Ctrl-C into 130.

    If the reader of standard output is gone, as after `| head`, exit silently with the status of SIGPIPE.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  until the process ends
    try:
        try:
            startup.end()
            yield
        finally:
            _flush()
        return
    except BrokenPipeError:
        raise SystemExit(141) from None
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.strerror and error.filename is not None
        message, status = f"{error.strerror}: {error.filename}" if named else str(error), 2
    except MemoryError:
        message, status = "out of memory", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)


def _flush() -> None:
    """Flush standard output now, to notice a closed pipe or a full disk before the interpreter exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would flush again
        raise


def table(title: str, rows: list[dict]) -> str:
    """Format rows, whose keys are the header; the first column is aligned left, the others right."""
    cells = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join(["", title, "", lines[0], "-" * len(lines[0]), *lines[1:]])
