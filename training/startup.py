"""
The first seconds of a script, before torch is imported: the scripts import this module first, and it imports no torch.

Between two parallel regions the threads of OpenMP spin, by default for milliseconds, and take a core from whatever else
wants to run. GOMP_SPINCOUNT bounds the wait, in loops, after which a thread sleeps; libgomp, which PyTorch uses on
Linux, reads it when it is loaded. Other OpenMP libraries ignore it.
"""

import os
import signal
import sys

SPIN_COUNT = 3_000  # loops


def begin() -> None:
    """Prepare a process that runs a script: bound the spinning, say that PyTorch loads, let Ctrl-C end the imports."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("loading PyTorch ...", file=sys.stderr, flush=True)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupted)


def end() -> None:
    """Give Ctrl-C back to Python, once all is imported and KeyboardInterrupt has somebody to catch it."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(_number: int, _frame) -> None:
    """End at once: a KeyboardInterrupt in the middle of some library's import is a traceback, or is swallowed there."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)
