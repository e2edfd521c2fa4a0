"""Everything around a training step: devices, processes, the run folder, diagnostics, experiments."""

import sys

from data import startup

# `python -m training.NAME` imports this first; another package's command keeps its own signals
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].startswith(("training.", "-mtraining.")):
    startup.begin(torch=True)
