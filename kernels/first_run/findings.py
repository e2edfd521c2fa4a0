"""Collect findings: a line per check, on the terminal and in one JSON file; and run the processes that find them."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Findings:
    """
    The lines so far. The JSON file is complete after every line.

    about:   what the file says of the machine
    minutes: the time after which processes are stopped and no more are started
    """

    def __init__(self, path: Path, about: dict, minutes: float):
        self.path, self.about, self.lines, self.minutes = path, about, [], minutes
        self.end = time.monotonic() + 60 * minutes
        self.write()

    def attempt(self, part: str, check: str, function: Callable[..., tuple[str, str]], *given) -> None:
        """Add the line of a check: function(*given) returns its status and text; an exception is a failure."""
        began = time.monotonic()
        try:
            status, text = function(*given)
        except Exception as error:  # whatever goes wrong is what the user came to find
            status, text = "FAIL", first_line(error)
        self.add({"part": part, "check": check, "status": status, "text": text, "seconds": time.monotonic() - began})

    def add(self, line: dict) -> None:
        """Print a line, in one write, and store it."""
        self.lines.append(line)
        shown = f"{line['status']:<6}  {line['part']:<8}  {line['check']}: {line['text']}"
        print(f"{shown} ({line['seconds']:.1f} s)", flush=True)
        self.write()

    def write(self) -> None:
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        part.write_text(json.dumps(self.about | {"lines": self.lines}, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)

    def failed(self) -> list[str]:
        return [line["check"] for line in self.lines if line["status"] == "FAIL"]

    def run(self, command: list[str], timeout: float, watch: Callable[[], bool] | None = None, **variables: str) -> str:
        """
        Run a process in the repository and return what it printed. watch: SIGKILL it as soon as this returns true.

        Raise RuntimeError with its error line if it fails, if it takes longer than `timeout` seconds or the time left,
        or if it ends before it is killed.
        """
        deadline = min(time.monotonic() + timeout, self.end)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
        watched = False
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
            try:
                while process.poll() is None and time.monotonic() < deadline and not watched:
                    time.sleep(0.01)
                    watched = watch is not None and watch()
                late = process.poll() is None and not watched
            finally:  # after Ctrl-C too
                kill(process)
            output.seek(0)
            lines = [line for line in output.read().splitlines() if line.strip()]
        if late:
            raise RuntimeError(f"stopped after {timeout:.0f} s, or because {self.minutes:g} minutes were over")
        if process.returncode and not watched:
            last = lines[-1] if lines else f"exit status {process.returncode}"
            raise RuntimeError(next((line for line in lines if line.startswith("error:")), last))
        if watch and not watched:
            raise RuntimeError("it ended before it was to be killed")
        return "\n".join(lines)


def kill(process: subprocess.Popen) -> None:
    """End a process and, under torchrun, the ranks that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
