"""
The first seconds of a script, before torch is imported: the scripts import this module first, and it imports no torch.

Between parallel regions, OpenMP threads spin, by default for milliseconds, and take a core from other work.
GOMP_SPINCOUNT bounds the wait, in loops, after which a thread sleeps; libgomp, which PyTorch uses on Linux, reads it
when it is loaded. Other OpenMP libraries ignore it.
"""

import os
import signal
import sys

SPIN_COUNT = 3_000  # loops


def begin() -> None:
    """Prepare a process that runs a script: bound the spinning, say that PyTorch loads, let Ctrl-C end the imports."""
    os.environ.pop("MPLBACKEND", None)  # of a notebook, which no picture needs, and which may not exist here
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    for descriptor in range(3):  # a file opened later must not get a closed one's number, and what is printed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("loading PyTorch ...", file=sys.stderr, flush=True)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupted)


def end() -> None:
    """Restore Python's Ctrl-C handling, once all is imported and KeyboardInterrupt is caught."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(_number: int, _frame) -> None:
    """Exit at once: inside a library's import, KeyboardInterrupt would print a traceback or be swallowed."""
    try:
        os.write(2, b"error: interrupted\n")
    finally:  # also if its reader is gone
        os._exit(130)
