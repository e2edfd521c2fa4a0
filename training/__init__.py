"""Everything around a training step: devices, processes, the run folder, diagnostics, experiments."""

import sys

from data import startup

if sys.argv[:1] == ["-m"]:  # `python -m` imports this first
    startup.begin(torch=True)
