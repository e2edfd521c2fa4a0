"""data/streams.py: closed, full and narrow streams, and what is worth a warning only."""

import os
import subprocess
import sys

import pytest
from runs import ROOT

from data.streams import best_effort, printable

SAYS = """
import sys
from data.files import exit_on_user_error
from data.streams import lasting_streams
with exit_on_user_error(), lasting_streams():
    for stream in (sys.stdout, sys.stderr):
        print("text \\u6587", file=stream, flush=True)
    open("done", "w").close()
"""


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full", "2> /dev/full", "| true", ""])
def test_a_run_that_cannot_speak_still_reaches_its_end(redirection, tmp_path):
    line = f'"$0" -c "$1" {redirection}'
    environment = {"PYTHONIOENCODING": "cp1252"} if not redirection else {}
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), "sh", "-c", line]
    done = subprocess.run([*command, sys.executable, SAYS], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "done").exists() and done.returncode == 0 and "Traceback" not in done.stderr


def test_a_command_of_the_kernels_that_cannot_speak_ends_well():
    line = '"$0" -m kernels.bench --help >&- 2>&-'
    assert subprocess.run(["sh", "-c", line, sys.executable], cwd=ROOT).returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_summary_that_cannot_be_printed_is_an_error_that_says_so():
    with open("/dev/full", "wb") as full:
        program = "from data.files import exit_on_user_error\nwith exit_on_user_error():\n    print(1)"
        command = [sys.executable, "-c", program]
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: No space left on device: standard output: make room")


def test_input_that_is_not_utf8_is_no_error():
    reads = "from data.streams import open_streams; open_streams(); print(ascii(input()))"
    command = [sys.executable, "-X", "utf8", "-c", reads]
    assert subprocess.run(command, input=b"a\xff\n", capture_output=True).stdout == b"'a\\ufffd'\n"


def test_a_failure_of_lesser_value_is_told_once(capsys):
    for _ in range(2):
        with best_effort("no picture of this test"):
            raise ZeroDivisionError("of\nno use")
    assert capsys.readouterr().err == "warning: no picture of this test: ZeroDivisionError: of no use\n"
    with pytest.raises(KeyboardInterrupt), best_effort("an interrupt"):
        raise KeyboardInterrupt


def test_what_a_terminal_would_act_on_is_escaped():
    assert printable("a\x1b[31m \udc80 \u6587 é") == "a\\x1b[31m \\udc80 \u6587 é"
