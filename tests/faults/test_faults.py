"""Run one trial of every kind in torture.py. `make torture` runs them for an hour."""

import os
import subprocess
import sys

import pytest
from runs import ROOT

TORTURE = ROOT / "tests" / "faults" / "torture.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forked")


def test_killed_broken_and_changed_nothing_is_lost_and_nothing_is_said_in_a_traceback():
    options = ["--seconds", "40", "--trials", "1", "--seed", "5"]
    done = subprocess.run([sys.executable, TORTURE, *options], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "wrong: 0" in done.stdout, done.stdout + done.stderr
