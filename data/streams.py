"""Standard input, output and error, and what is said on them, whatever the terminal or the system does."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


def explain(error: OSError) -> str:
    """Return one sentence for an error of the system: what happened, to which file, and what helps."""
    message = f"{error.strerror}: {error.filename}" if error.strerror and error.filename is not None else str(error)
    hints = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on that disk, or use another one")
    hints |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files, as with `ulimit -n 4096`")
    return f"{message}: {hints[error.errno]}" if error.errno in hints else message


def printable(text: str) -> str:
    """Escape what a terminal would act on or cannot show: control characters, half of a surrogate pair."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def open_streams() -> None:
    """Make standard input, output and error usable: closed ones lead nowhere, and no character is an error."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # unless startup.begin has taken the descriptor, this opens it, the lowest that is free: else the next file
            # opened would get it, and what is printed
            opened = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(opened, "r" if descriptor == 0 else "w", encoding="utf-8"))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


class Lasting:
    """A stream that ignores that it cannot be written to: a training run does not end because its terminal has."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Ignore, in this block and at the end of the process, that standard output or error cannot be written to."""
    before, lasting = (sys.stdout, sys.stderr), (Lasting(sys.stdout), Lasting(sys.stderr))
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream, name, own in zip(lasting, ("stdout", "stderr"), before, strict=True):
            stream.flush()
            try:
                own.flush()
                setattr(sys, name, own)
            except (OSError, ValueError):  # it stays, since the interpreter flushes as it exits
                pass


warned = set()


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Let a failure of what the run can do without, such as a picture, be a warning, once, instead of its end."""
    try:
        yield
    except Exception as error:
        if what not in warned:
            warned.add(what)
            reason = explain(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            print(f"warning: {what}: {printable(' '.join(reason.split())[:300])}", file=sys.stderr)
