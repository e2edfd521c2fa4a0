"""
Prepare the process before torch is imported: the scripts import this module first, and it imports no torch.

Between two parallel regions the threads of OpenMP spin, by default for milliseconds, and take a core from whatever else
wants to run. GOMP_SPINCOUNT bounds the wait, in loops, after which a thread sleeps; libgomp, which PyTorch uses on
Linux, reads it when it is loaded. Other OpenMP libraries ignore it.
"""

import os

SPIN_COUNT = 3_000  # loops


def limit_spinning() -> None:
    """Set GOMP_SPINCOUNT, unless the user has set it or OMP_WAIT_POLICY."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


limit_spinning()
