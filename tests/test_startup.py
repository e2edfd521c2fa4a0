"""data/startup.py and kernels/startup.py: the first seconds of a command, until all is imported."""

import os
import random
import signal
import subprocess
import sys

import pytest
from runs import ROOT

from data.startup import SPIN_COUNT

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
COMMANDS = {"train_gpt2.py": [ROOT / "train_gpt2.py"], "sample.py": [ROOT / "sample.py"]}
COMMANDS |= {"training.hellaswag": ["-m", "training.hellaswag"]}
SCRIPTS = pytest.mark.parametrize("script", list(COMMANDS))
OTHERS = [f"data.{name}" for name in ("text", "fineweb", "shakespeare", "pydocs", "bpe", "chat")]
OTHERS += ["training.ladder", "kernels.report", "kernels.bench", "kernels.first_run"]
COMMANDS |= {name: ["-m", name] for name in OTHERS}
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs the signals and terminals of POSIX")
SLOW = """import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:  # as some libraries do
    pass
"""


def start(folder, script, torch, **options):
    """Start the script with a module in place of torch, whose import runs the code `torch`."""
    (folder / "torch.py").write_text(torch, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *COMMANDS[script]], env=environment, text=True, **options)


@SCRIPTS
def test_threads_spin_for_a_limited_time_unless_the_user_chose_otherwise(script, tmp_path):
    def seen(**environment):
        printing = f"import os\nprint(*(os.environ.get(name) for name in {VARIABLES}))\nraise SystemExit\n"
        return start(tmp_path, script, printing, env=environment).communicate(timeout=60)[0].split()

    assert seen() == [str(SPIN_COUNT), "None"]
    assert seen(GOMP_SPINCOUNT="7") == ["7", "None"]
    assert seen(OMP_WAIT_POLICY="active") == ["None", "active"]


@POSIX
@pytest.mark.parametrize("script", COMMANDS)
def test_ctrl_c_at_a_random_moment_is_one_line_whatever_the_command(script):
    command = [sys.executable, "-X", "importtime", *COMMANDS[script], *([] if script.endswith(".py") else ["--help"])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines, before = iter(process.stderr), random.choice([5, 20, 80, 200])
    while "| " in (line := next(lines)) and not line.rstrip().endswith("startup"):  # ours, at the head of each command
        pass
    for _ in range(before):
        next(lines)
    process.send_signal(signal.SIGINT)
    said = [line for line in lines if not line.startswith("import time:")]
    assert process.wait(timeout=30) == 130 and said == ["error: interrupted\n"]


@POSIX
@pytest.mark.parametrize("script", ["train_gpt2.py", "data.text", "kernels.report"])
def test_too_little_memory_for_the_imports_is_one_line(script, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('x.so: failed to map segment from shared object')", "utf-8")
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *COMMANDS[script]], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("error: out of memory"), done.stderr.count("\n")) == (2, True, 1)


@POSIX
@SCRIPTS
def test_ctrl_c_during_a_slow_import_is_one_line_even_if_the_import_swallows_exceptions(script, tmp_path):
    process = start(tmp_path, script, SLOW)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "error: interrupted\n") and process.returncode == 130


@POSIX
@pytest.mark.parametrize("module", ["dataclasses", "torch._C", "tyro"])
def test_ctrl_c_at_any_moment_of_the_imports_is_one_line(module):
    command = [sys.executable, "-X", "importtime", ROOT / "train_gpt2.py", "laptop"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == module:
            break
    process.send_signal(signal.SIGINT)
    said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait(timeout=30) == 130 and said == ["error: interrupted\n"]


@POSIX
@SCRIPTS
def test_a_terminal_is_told_that_pytorch_loads_before_it_does_and_nobody_else(script, tmp_path):
    ours, theirs = os.openpty()
    with os.fdopen(ours) as terminal:
        process = start(tmp_path, script, SLOW, stderr=theirs)
        assert terminal.readline() == "loading PyTorch ...\n"
        process.kill()
        process.communicate()
        process = start(tmp_path, script, "raise SystemExit", stderr=theirs, env={"RANK": "1"})
        assert process.wait(timeout=60) == 0
        os.write(theirs, b"nothing before this\n")
        assert terminal.readline() == "nothing before this\n"
        os.close(theirs)
    assert start(tmp_path, script, "raise SystemExit").communicate(timeout=60) == ("", "")


@POSIX
@pytest.mark.parametrize("library", ["data.shards", "training.optimizer", "kernels"])
def test_ctrl_c_in_the_command_of_another_package_is_that_packages_to_handle(library, tmp_path):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text(f"import {library}\n", encoding="utf-8")
    caught = "from signal import *\ntry:\n    raise_signal(SIGINT)\nexcept KeyboardInterrupt:\n    print('saved')\n"
    (package / "__main__.py").write_text(caught, encoding="utf-8")
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "mine"]
    assert subprocess.check_output(command, env=variables, text=True, timeout=60) == "saved\n"
