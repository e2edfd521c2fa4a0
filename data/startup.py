"""
The first seconds of a command, before what takes long is imported. This module imports nothing that does.

Between parallel regions, OpenMP threads spin, by default for milliseconds, and take a core from other work.
GOMP_SPINCOUNT bounds the wait, in loops, after which a thread sleeps; libgomp, which PyTorch uses on Linux, reads it
when it is loaded. Other OpenMP libraries ignore it.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPIN_COUNT = 3_000  # loops
LACK = (  # in the messages of Python, PyTorch and the loader
    "out of memory", "allocate memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc",
    "failed to map segment", "can't start new thread",
)  # fmt: skip
OUT_OF_MEMORY = "out of memory: take smaller sizes, or a machine with more"


def is_command_of(package: str) -> bool:
    """Return whether `python -m` is about to run a module of the package: it imports the package first."""
    if sys.argv[:1] != ["-m"]:  # which Python replaces by the path once it has found the module
        return False
    return sys.orig_argv[-len(sys.argv)].startswith((f"{package}.", f"-m{package}."))  # -mNAME is one word


def begin(torch: bool = False) -> None:
    """Prepare a process for a command: one line if Ctrl-C or a lack of memory ends the imports. torch: it is next."""
    os.environ.pop("MPLBACKEND", None)  # of a notebook, which no picture needs, and which may not exist here
    for descriptor in range(3):  # a file opened later must not get a closed one's number, and what is printed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupted)
    sys.excepthook = _failed
    if torch and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if torch and sys.stderr and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("loading PyTorch ...", file=sys.stderr, flush=True)


@contextmanager
def imported() -> Iterator[None]:
    """Restore what `begin` changed while the command runs, which catches both; Ctrl-C after it comes too late."""
    caught = signal.getsignal(signal.SIGINT) is _interrupted
    sys.excepthook = sys.__excepthook__ if sys.excepthook is _failed else sys.excepthook
    try:
        if caught:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        if caught:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means out of memory, in any wording of Python, PyTorch and the loader."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in LACK)


def _interrupted(_number: int, _frame) -> None:
    """Exit at once: inside a library's import, KeyboardInterrupt would print a traceback or be swallowed."""
    _exit("interrupted", 130)


def _failed(kind: type, error: BaseException, trace) -> None:
    if out_of_memory(error):
        _exit(OUT_OF_MEMORY, 2)
    sys.__excepthook__(kind, error, trace)


def _exit(message: str, status: int) -> None:
    try:
        os.write(2, f"error: {message}\n".encode())
    finally:  # also if its reader is gone
        os._exit(status)
