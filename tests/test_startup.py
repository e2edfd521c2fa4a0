"""startup.py: what it sets is there before torch is loaded, and the user's own values win."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.startup import SPIN_COUNT

ROOT = Path(__file__).parents[1]
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def seen_by_torch(folder, script, **environment):
    """The two variables at the moment when `script` imports torch: a module of that name in `folder` prints them."""
    printing = f"import os\nprint(*(os.environ.get(name) for name in {VARIABLES}))\nraise SystemExit\n"
    (folder / "torch.py").write_text(printing, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = inherited | {"PYTHONPATH": str(folder)} | environment
    done = subprocess.run([sys.executable, ROOT / script], env=environment, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize("script", ["train_gpt2.py"])
def test_threads_spin_for_a_limited_time_unless_the_user_chose_otherwise(script, tmp_path):
    assert seen_by_torch(tmp_path, script) == [str(SPIN_COUNT), "None"]
    assert seen_by_torch(tmp_path, script, GOMP_SPINCOUNT="7") == ["7", "None"]
    assert seen_by_torch(tmp_path, script, OMP_WAIT_POLICY="active") == ["None", "active"]
