"""The first seconds of a command of kernels, before torch is imported."""

import os
import signal
import sys


def is_command_of(package: str) -> bool:
    """Return whether `python -m` is about to run a module of the package: it imports the package first."""
    if sys.argv[:1] != ["-m"]:  # which Python replaces by the path once it has found the module
        return False
    return sys.orig_argv[-len(sys.argv)].startswith((f"{package}.", f"-m{package}."))  # -mNAME is one word


def begin() -> None:
    """Let Ctrl-C end the imports with one line: in a library it would be a traceback, or be swallowed."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupted)
    sys.excepthook = _failed


def end() -> None:
    """Restore what `begin` changed, once all is imported."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.excepthook is _failed:
        sys.excepthook = sys.__excepthook__


def _interrupted(_number: int, _frame) -> None:
    _exit("interrupted", 130)


def _failed(kind: type, error: BaseException, trace) -> None:
    if isinstance(error, MemoryError) or "failed to map segment" in str(error):
        _exit("out of memory", 2)
    sys.__excepthook__(kind, error, trace)


def _exit(message: str, status: int) -> None:
    try:
        os.write(2, f"error: {message}\n".encode())
    finally:  # also if its reader is gone
        os._exit(status)
