"""data/files.py."""

import os
import subprocess
import sys
from typing import Literal

import pytest
import tyro
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from data.files import UserError, atomic_write, exit_on_user_error, parse_options, run_script

PRINTS = """
import sys
from data.files import exit_on_user_error
with exit_on_user_error():
    for i in range(5 if "exit" in sys.argv else 100_000):
        print(i)
    raise SystemExit(0)
"""


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
    (tmp_path / "plain").touch()  # whose permissions are those of any new file
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "error, line, status",
    [
        (UserError("this is wrong:\ndo that"), "error: this is wrong: do that\n", 2),
        (FileNotFoundError(2, "No such file or directory", "there"), "error: No such file or directory: there\n", 2),
        (
            OSError(28, "No space left on device", "log"),
            "error: No space left on device: log: make room on that disk, or use another one\n",
            2,
        ),
        (KeyboardInterrupt(), "error: interrupted\n", 130),
    ],
)
def test_an_error_is_one_line_and_a_status(capsys, error, line, status):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise error
    assert stop.value.code == status and capsys.readouterr().err == line
    with pytest.raises(ZeroDivisionError), exit_on_user_error():  # a mistake of our own keeps its traceback
        raise ZeroDivisionError


def test_a_script_takes_its_command_line_from_its_function(capsys, monkeypatch):
    def prepare(folder: str, lines: bool = False) -> str:
        """Prepares."""
        print("note", file=sys.stderr)
        return f"{folder} {lines}"

    monkeypatch.setattr(sys, "argv", ["x", "--folder", "here", "--lines"])
    run_script(prepare, "x")
    assert capsys.readouterr() == ("here True\n", "note\n")
    monkeypatch.setattr(sys, "argv", ["x", "--folder", "here", "--line"])
    with pytest.raises(SystemExit) as stop:
        run_script(prepare, "x")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--count", "x"], "error: Error parsing --count: invalid literal for int() with base 10: 'x' (--help shows"),
        (["--cuont", "1"], "error: Unrecognized options: --cuont, 1. Perhaps you meant: --count INT (--help shows"),
        (["surplus"], "error: Unrecognized options: surplus (--help shows every option)\n"),
        (["--kind", "c"], "error: invalid choice 'c' for argument '--kind'. Expected one of ('a', 'b'). (--help shows"),
        (
            ["--count"],
            "error: Missing value for argument '--count'. Expected 1 values. One that begins with a hyphen is",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_with_tyro_s_message(capsys, arguments, message):
    def script(count: int = 1, kind: Literal["a", "b"] = "a"):
        return count

    with pytest.raises(SystemExit) as end, exit_on_user_error():
        parse_options(lambda: tyro.cli(script, args=arguments))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(message) and error.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a pipe of the system")
@pytest.mark.parametrize("arguments", [["-m", "data.text", "--help"], ["-c", PRINTS], ["-c", PRINTS, "exit"]])
def test_a_reader_that_is_gone_ends_a_command_without_a_word(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("rank, shown", [("0", "error: too small: use 8\n"), ("1", "")])
def test_under_torchrun_one_rank_prints_the_error_and_each_leaves_it_for_torchruns_last_lines(
    tmp_path, monkeypatch, capsys, rank, shown
):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        raise UserError("too small: use 8")
    assert end.value.code == 2 and capsys.readouterr().err == shown
    failure = ProcessFailure(int(rank), 1, 2, str(tmp_path / "error.json"))  # what torchrun makes of it
    assert (
        "traceback : error: too small: use 8\n" in ChildFailedError("train_gpt2.py", {int(rank): failure}).format_msg()
    )
