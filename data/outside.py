"""What comes from outside, checked once and in one place: files that people, disks and other programs have changed."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.files import UserError

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes -> kind; no text begins so


@contextmanager
def open_bytes(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to read bytes; .gz and .zst, which their first bytes tell, are decompressed as they are read.

    A pipe that nobody writes to is empty. Raise OSError, which names the file, if it cannot be read, or later, if it
    is corrupt.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        first = file.peek(4)[:4]
        kind = next((kind for mark, kind in COMPRESSED.items() if first.startswith(mark)), None)
        if kind is None:
            yield file
            return
        import pyarrow  # here, not above, since few files are compressed

        try:
            with pyarrow.CompressedInputStream(file, kind) as decompressed:
                yield decompressed
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(errno.EIO, f"corrupt {kind} data ({error})", str(path)) from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file as `open` does, but do not wait until somebody opens the other end of a pipe."""
    nonblocking = getattr(os, "O_NONBLOCK", 0)  # Windows has none
    descriptor = os.open(path, flags | nonblocking)
    if nonblocking:
        os.set_blocking(descriptor, True)
    return descriptor


def read_json(path: Path, shape=dict, hint: str = "") -> dict:
    """Return the content of a JSON file that has the `shape` that `check_shape` asks for. Raise UserError otherwise.

    hint: ends the message: what to do about it
    """
    try:
        return parse_json(path, shape)
    except ValueError as error:
        raise UserError(f"{path} is corrupt: {error}{hint}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}{hint}") from None


def parse_json(path: Path, shape=dict):
    """Return the content as `read_json` does, but raise ValueError or OSError."""
    if path.is_fifo():  # which would wait for a writer
        raise ValueError("it is a pipe")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    check_shape(content, shape)
    return content


def check_shape(value, shape, name: str = "") -> None:
    """Raise ValueError, naming the field, unless a value from outside has a shape.

    shape: {field: shape, ...}, a field that ends in ? may be missing; [shape], a list of any length; (shape, ...), one
        of several; a range of integers; float, a finite number; None; else a type
    """
    name = name or "it"
    if isinstance(shape, dict):
        check_shape(value, dict, name)
        for field, part in shape.items():
            key, path = field.removesuffix("?"), f"{name}.{field.removesuffix('?')}".removeprefix("it.")
            if key in value:
                check_shape(value[key], part, path)
            elif key == field:
                raise ValueError(f"{path} is missing")
    elif isinstance(shape, list):
        check_shape(value, list, name)
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{name}[{i}]")
    elif isinstance(shape, tuple):
        if not any(_has_shape(value, each) for each in shape):
            check_shape(value, shape[0], name)
    elif isinstance(shape, range):
        if type(value) is not int or value not in shape:
            raise ValueError(f"{name} is {_brief(value)}, not a whole number from {shape[0]} to {shape[-1]}")
    elif shape is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} is {_brief(value)}, not a finite number")
    elif shape is None and value is not None or shape is not None and not isinstance(value, shape):
        kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", None: "null"}
        raise ValueError(f"{name} is {_brief(value)}, not {kinds.get(shape) or shape.__name__}")


def _has_shape(value, shape) -> bool:
    try:
        check_shape(value, shape)
    except ValueError:
        return False
    return True


def _brief(value) -> str:
    """Return a value as an error message shows it; a container, which may be endless, by its type alone."""
    return type(value).__name__ if isinstance(value, dict | list) else repr(value)[:60]
