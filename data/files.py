"""What all commands share: the error that a user can mend, how it is shown, how a command line becomes a call, and how
a file is written whole or not at all."""

import errno
import functools
import hashlib
import io
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

T = TypeVar("T")


class UserError(Exception):
    """Something that the user can mend: one sentence that names the thing, its value and what would be right."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError or an OSError into one line `error: ...` and exit status 2, Ctrl-C into 130."""
    try:
        yield
    except UserError as error:
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


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a ValueError into a UserError with the same text: what kernels and model say of an option that was typed."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def lock(path: Path, refusal: str | None = None) -> TextIO:
    """
    An open file whose lock this process holds until it is closed or the process ends.

    Where another process holds it: waits, or with a `refusal` raises UserError with that text. No lock on Windows.
    """
    file = path.open("w", encoding="utf-8")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            file.close()
            raise UserError(refusal) from None
        except OSError as error:  # a network file system without locks: better none than no run
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(
                f"warning: {path.parent} is on a file system without locks: start one process at a time",
                file=sys.stderr,
            )
    return file


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Nobody else writes a dataset to `folder` meanwhile, UserError for the second; no lock on Windows."""
    if fcntl is None:  # Windows
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot lock a folder
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is writing to {folder}: wait for it or give another folder") from None
        yield
    finally:
        os.close(held)


def as_flag(name: str) -> str:
    """An option as it is typed: "min_lr" -> "--min-lr"."""
    return f"--{name.replace('_', '-')}"


def parse_options(command_line: Callable[[], T]) -> T:
    """What `command_line`, a call of tyro.cli, returns; where tyro draws a box around a mistake, one `error:` line."""
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return command_line()
    except SystemExit as stop:
        if stop.code in (None, 0):  # --help
            raise
    sections = [[]]  # of the box: lines that only draw stand between them
    for line in shown.getvalue().splitlines()[1:]:
        line = line.strip("│|╰╯ ")
        if any(map(str.isalnum, line)):
            sections[-1].append(line)
        elif sections[-1]:
            sections.append([])
    message = sections[0] + [
        line for part in sections[1:] if part[:1] and part[0].startswith("Available") for line in part
    ]
    similar = [line.split()[0] for part in sections[1:] for line in part if re.match("--[a-z]", line)]
    if similar and sections[0][0].startswith("Unrecognized"):
        message.append(f"(perhaps {' or '.join(dict.fromkeys(similar))}?)")
    print("error:", *message, "(--help shows every option)", file=sys.stderr)
    raise SystemExit(2)


def check_numbers(options: dict, above_zero: Iterable[str], zero_or_more: Iterable[str]) -> None:
    """UserError for a number among the options of a command that is out of range, nan or infinite; words pass."""
    bounds = dict.fromkeys(zero_or_more, "0 or more") | dict.fromkeys(above_zero, "above 0")
    for name, value in options.items():
        if not isinstance(value, int | float):
            continue
        low = name in bounds and not (value > 0 or value == 0 and bounds[name] == "0 or more")
        if low or not value < 2**63:
            right = bounds[name] if low else "an ordinary number"
            raise UserError(f"{as_flag(name)} is {value}, but must be {right}")


def run_script(prepare: Callable[..., str], prog: str) -> None:
    """The main of a data script: the command line is the arguments of `prepare`, and what it returns is printed."""
    import tyro

    @functools.wraps(prepare)
    def later(*args, **options):  # so that a mistake on the command line is not mixed up with what prepare prints
        return functools.partial(prepare, *args, **options)

    with exit_on_user_error():
        print(parse_options(lambda: tyro.cli(later, prog=prog, description=prepare.__doc__.splitlines()[0]))())


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
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


def download(url: str, sha256: str, what: str, option: str = "--input FILE") -> bytes:
    """The file at `url`, whole and with that checksum; UserError otherwise, saying that `option` takes a copy."""
    import http.client  # here, not above, since few commands download
    import urllib.request

    try:
        with urllib.request.build_opener().open(url, timeout=30) as response:  # urlopen keeps an older proxy setting
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot download {url} ({reason}): give a copy of it with {option}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"{url} sent {len(content)} bytes with sha256 {found}, which is not {what} ({sha256}): try again, or give "
            f"a copy with {option}"
        )
    return content
