"""Everything around a training step: devices, processes, the run folder, diagnostics, experiments."""

import sys

from data import startup

# a command of this package, after `python -m`, imports this first; another package's keeps its own signals
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].startswith(("training.", "-mtraining.")):
    startup.begin(torch=True)
