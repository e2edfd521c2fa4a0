"""Shared by all commands: the error that a user can fix, the exit path, command lines, locks and atomic files."""

import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

import tyro

from data import startup
from data.streams import explain, open_streams, printable

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------ errors, command lines


class UserError(Exception):
    """An error that the user can fix: one sentence that names the option or file, its value and the fix."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError, an OSError or a lack of memory into one line `error: ...` and exit status 2, Ctrl-C into 130.

    If the reader of standard output is gone, as after `| head`, exit silently with the status of SIGPIPE. Under
    torchrun one process per machine prints the line, and torchrun ends with it.
    """
    open_streams()
    try:
        with startup.imported():
            try:
                yield
            finally:
                with naming("standard output"):
                    _flush()
        return
    except BrokenPipeError:
        raise SystemExit(141) from None
    except UserError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = explain(error), 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except Exception as error:
        if not startup.out_of_memory(error):
            raise
        message, status = startup.OUT_OF_MEMORY, 2
    line = f"error: {printable(' '.join(message.splitlines()))}"
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's last lines repeat what each rank writes here
        fields = {"message": line, "extraInfo": {"timestamp": int(datetime.now().timestamp())}}
        with suppress(OSError):
            Path(report).write_text(json.dumps({"message": fields}), encoding="utf-8")
    if not report or os.environ.get("LOCAL_RANK") == "0":  # most errors are those of all ranks
        with suppress(OSError):
            sys.stderr.write(f"{line}\n")  # in one write, since ranks share the terminal
            sys.stderr.flush()
    raise SystemExit(status)


def _flush() -> None:
    """Flush standard output now, to notice a closed pipe or a full disk before the interpreter exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would flush again
        raise


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Name `path` in an OSError that names no file, as a failed write does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a ValueError, which kernels and model raise for an option, into a UserError with the same text."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def as_flag(name: str) -> str:
    """Return an option as it is typed: "min_lr" -> "--min-lr"."""
    return f"--{name.replace('_', '-')}"


def meant(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known word that is most similar to one that is not, or ""."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, cutoff)), "")


def parse_options(command_line: Callable[[], T]) -> T:
    """Return what `command_line`, a call of tyro.cli, returns. Raise UserError with tyro's message if it refuses."""
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return command_line()
    except SystemExit as stop:
        if stop.code in (None, 0):  # --help
            raise
    # tyro draws a box: a title, the message, a rule, perhaps a hint, a rule, a pointer to --help.
    lines = [line.strip("│| ") for line in shown.getvalue().splitlines()[1:]]
    sections = [list(part) for text, part in itertools.groupby(lines, lambda line: any(map(str.isalnum, line))) if text]
    message = " ".join(sections[0])
    if message.startswith("Missing value"):
        message += " One that begins with a hyphen is written --option=-value."
    for first, *rest in sections[1:]:
        if first.startswith(("Available", "Unrecognized")):
            message += f". {' '.join([first, *rest])}"
        elif first.startswith(("Perhaps", "Arguments similar")):
            message += f". {first} {rest[0]}"
    raise UserError(f"{message} (--help shows every option)")


def run_script(
    commands: Callable[..., str] | dict[str, Callable[..., str]],
    prog: str,
    description: str = "",
    arguments: list[str] | None = None,  # instead of the command line's
) -> None:
    """Run a data script: print what its function, or that of the subcommand typed, returns for the options typed."""

    def delayed(command):  # so that parsing, whose errors are caught, ends before the command runs
        return functools.wraps(command)(lambda *args, **options: functools.partial(command, *args, **options))

    with exit_on_user_error():
        if empty := [word for word in sys.argv[1:] if word == "" or re.fullmatch(r"--[\w-]+=", word)]:
            raise UserError(f"the command line has an empty value, {empty[0]!r}: an unset variable?")
        if callable(commands):
            description = (commands.__doc__ or description).partition("\n")[0]  # python -OO drops docstrings
            call = functools.partial(tyro.cli, delayed(commands), prog=prog, description=description, args=arguments)
        else:
            cli, functions = tyro.extras.subcommand_cli_from_dict, {k: delayed(v) for k, v in commands.items()}
            call = functools.partial(cli, functions, prog=prog, description=description, args=arguments)
        print(parse_options(call)())


def check_numbers(options: dict, above_zero: Iterable[str], zero_or_more: Iterable[str]) -> None:
    """Raise UserError for a number among the options that is out of range, nan or infinite; other types pass."""
    bounds = dict.fromkeys(zero_or_more, "0 or more") | dict.fromkeys(above_zero, "above 0")
    for name, value in options.items():
        if not isinstance(value, int | float):
            continue
        low = name in bounds and not (value > 0 or value == 0 and bounds[name] == "0 or more")
        if low or not value < 2**63:
            right = bounds[name] if low else "an ordinary number"
            raise UserError(f"{as_flag(name)} is {value}, but must be {right}")


# --------------------------------------------------------------------------------------------------------------- files


def lock(path: Path, refusal: str | None = None) -> TextIO:
    """Return an open file whose lock this process holds until it is closed or the process ends.

    If another process holds it, wait, or with a `refusal` raise UserError with that text. No lock on Windows. A link
    is not followed: it may lead to a file of another user's choice.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError:
        if path.is_symlink():
            raise UserError(f"{path} is a link, which a lock must not be: remove it") from None
        raise
    file = os.fdopen(descriptor, "r+", encoding="utf-8")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            file.close()
            raise UserError(refusal) from None
        except OSError as error:  # a network file system without locks: run without one
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            hint = "is on a file system without locks: start one process at a time"
            print(f"warning: {path.parent} {hint}", file=sys.stderr)
    return file


def identity(folder: Path) -> int:
    """Return a number of 60 bits for a folder as this machine sees it."""
    status = folder.stat()
    name = f"{socket.gethostname()} {status.st_dev} {status.st_ino}"
    return int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)


@contextmanager
def writing(folder: Path, shared: bool = False) -> Iterator[None]:
    """Lock `folder` against other processes that write a dataset to it; with `shared`, admit others that share it.

    Raise UserError if another process has locked it. No lock on Windows.
    """
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot lock a folder
            try:
                fcntl.flock(held, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is writing to {folder}: wait for it or give another folder") from None
        yield
    finally:
        os.close(held)


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Write a file atomically by calling `write(file)`: `path` appears complete, replacing an older one, or not at all.

    The bytes go to a temporary file `.NAME.XXXXXXXX.tmp` in the same folder, which is renamed once they are on the
    disk. An exception removes it; a killed process leaves it, and the next to write `path` removes that.
    """
    path = Path(path)
    with naming(path), temporary(path) as unfinished:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut. Some network file systems cannot; the files are complete."""
    if os.name == "posix":
        held = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(held)
        os.close(held)


@contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[Path]:
    """Give a new file or folder beside `path` to fill and rename; what is left of it, and of killed processes, goes.

    It is locked while its process lives, so that no other takes it for a leftover.
    """
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for other in [entry for entry in path.parent.iterdir() if leftover.fullmatch(entry.name)] if fcntl else ():
        with suppress(OSError):
            held = os.open(other, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(other)
            finally:
                os.close(held)
    held = None
    while held is None:
        own = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        own.mkdir() if folder else own.touch(exist_ok=False)
        if fcntl is None:
            break
        held = os.open(own, os.O_RDONLY)
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        if not own.exists():  # another process removed it before it was locked
            os.close(held)
            held = None
    try:
        yield own
    finally:
        if held is not None:
            os.close(held)
        remove(own)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def download(url: str, sha256: str, what: str, option: str = "--input FILE") -> bytes:
    """Return the file at `url`. Raise UserError, which names `option`, if it fails or has another sha256."""
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
        got = f"{url} sent {len(content)} bytes with sha256 {found}, which is not {what} ({sha256})"
        raise UserError(f"{got}: try again, or give a copy with {option}")
    return content
