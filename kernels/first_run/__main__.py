"""
The first quarter of an hour on a new GPU, as one command.

    python -m kernels.first_run                              everything; stops after 15 minutes
    python -m kernels.first_run --only machine kernels       some parts, of machine, kernels, training, bench
    python -m kernels.first_run --questions FILE             HellaSwag's questions, if they cannot be downloaded
    python -m kernels.first_run --tiny                       a rehearsal on a CPU: the default without a GPU

Every check is one line: pass, FAIL, skip with its reason, or a figure, which has no limit to pass. A failure does not
stop the rest; the exit status is then 1. All lines go into one JSON file, to attach to a bug report.

Each family of kernels, each training run and the bench is a process of its own: a kernel that crashes ruins the CUDA
context of its process. Training is train_gpt2.py, on Python's own documentation, which needs no download.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import kernels
from kernels import machine
from kernels.bench import operations
from kernels.command_line import exit_on_error, parse_options
from kernels.common import architecture
from kernels.first_run import families
from kernels.first_run.findings import ROOT, Findings, first_line
from kernels.gpus import GPU, named_gpu
from kernels.report import __main__ as report
from kernels.report import roofline
from kernels.report.shapes import PRESETS, Shape

PARTS = ("machine", "kernels", "training", "bench")
MINUTES = 15
SAME_MEMORY = 0.1  # of the plan's prediction
RUN = "--warmup-steps 5 --eval-every 0 --sample-tokens 0 --hellaswag-every 0 --checkpoint-every 4 --keep 1"
BIG = "--batch-tokens 65536 --eval-tokens 65536 --max-steps 20 --device cuda --micro-batch"
TINY = (
    "--n-layer 1 --n-head 2 --n-embd 32 --block-size 8 --batch-tokens 16 --eval-tokens 8 --max-steps 8 "
    "--dtype float32 --device cpu --no-compile --micro-batch 1"
)


@dataclasses.dataclass
class Options:
    """Check a new GPU in a quarter of an hour, and write what was found to a file."""

    only: tuple[str, ...] = PARTS  # the parts to do
    tiny: bool = dataclasses.field(default_factory=lambda: not torch.cuda.is_available())  # tiny shapes on a CPU
    questions: str = ""  # a file of HellaSwag's questions; default: its validation set, downloaded if missing
    json: Path = Path("first_run.json")  # the file to attach to a bug report
    families: str = ""  # only check the kernels of these families, in this process


def about_machine() -> dict:
    """Return what a bug report needs first."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    about = {"python": platform.python_version(), "system": platform.platform(), "CPUs": os.cpu_count()}
    about |= {"driver": machine.driver_version(), "CUDA": torch.version.cuda or torch.version.hip}
    for package in ("torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[package] = importlib.metadata.version(package)
    with contextlib.suppress(OSError):
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        about["commit"] = found.stdout.strip()
    return about | {"GPUs": [f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB" for gpu in gpus]}


def check_machine(findings: Findings) -> None:
    for name, reason in (("PyTorch sees the GPU", machine.unseen_gpu()), ("can launch", machine.missing_for_triton())):
        findings.attempt("machine", name, lambda reason=reason: ("FAIL", reason) if reason else ("pass", "yes"))
    for name, value in findings.about.items():
        text = "; ".join(value) if isinstance(value, list) else str(value or "")
        findings.attempt("machine", name, lambda text=text: ("figure", text or "none"))


# --------------------------------------------------------------------------- training


class Training:
    """Short runs of train_gpt2.py, each in a process of its own, and what they must have in common."""

    def __init__(self, findings: Findings, options: Options, folder: Path):
        self.findings, self.options, self.folder = findings, options, folder
        self.logs: dict[str, list[dict]] = {}  # run -> its steps
        self.tiny, self.triton = options.tiny, "cross_entropy" if options.tiny else "all"
        self.gpu = None if self.tiny else torch.cuda.get_device_properties(0)
        self.options_of_all = ["gpt2-124m", "--data", str(folder / "data"), *RUN.split()]
        self.options_of_all += (
            TINY.split() if self.tiny else [*BIG.split(), "16" if self.gpu.total_memory > 3e10 else "4"]
        )

    def check(self) -> None:
        attempt = self.attempt
        attempt("prepare the data", self.prepare)
        attempt("kernels off", self.run, "off", "none")
        attempt("kernels on", self.run, "on", self.triton)
        attempt("on and off have the same losses", lambda: families.same_losses(*self.figures("on", "off")))
        attempt("killed and resumed", self.killed, "on")
        if not self.tiny:  # whose runs are not compiled
            attempt("not compiled", self.run, "eager", self.triton, "--no-compile")
            attempt("compiled or not, the same losses", lambda: families.same_losses(*self.figures("on", "eager")))
            attempt("not compiled, killed and resumed", self.killed, "eager", "--no-compile")
        attempt("peak memory against the plan", self.memory)
        attempt("speed against the model", self.speed)
        attempt("two ranks", self.two_ranks)
        attempt("HellaSwag, 100 questions", self.hellaswag)

    def attempt(self, name: str, function, *given) -> None:
        self.findings.attempt("training", name, function, *given)

    def start(self, *words: str, timeout: float = 240, watch=None, processes: int = 1) -> str:
        """Run a Python command of the repository; `watch` as in Findings.run."""
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(several if processes > 1 else []), *words]
        variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.tiny else {}
        return self.findings.run(command, timeout, watch, **variables)

    def prepare(self) -> tuple[str, str]:
        words = ["-m", "data.pydocs", "--out", str(self.folder / "data")]
        return "pass", self.start(*words, *(["--tokenizer", "gpt2"] if not self.tiny else []))

    def run(self, name: str, choice: str, *more: str, **how) -> tuple[str, str]:
        """Train, or resume, and read the log."""
        out = self.folder / name
        words = [*self.options_of_all, "--out-dir", str(out), "--kernels", choice, *more]
        self.start("train_gpt2.py", *words, **how)
        self.logs[name] = steps = read_log(out)
        rate = statistics.median(step["tokens_per_s"] for step in steps[len(steps) // 2 :])
        return "figure", f"loss {steps[-1]['loss']:.4f} after {len(steps)} steps, {rate:,.0f} tokens/s"

    def figures(self, *names: str, figure: str = "loss") -> list[list[float]]:
        """Return a column of the log of each of these runs."""
        if missing := [name for name in names if name not in self.logs]:
            raise RuntimeError(f"the run {missing[0]!r} has failed")
        return [[step[figure] for step in self.logs[name]] for name in names]

    def memory(self) -> tuple[str, str]:
        """Compare the peak of the run that is not compiled with what --plan predicts for it."""
        (found,) = self.figures("on" if self.tiny else "eager", figure="memory_gb")
        plan = self.start("train_gpt2.py", *self.options_of_all, "--kernels", self.triton, "--plan")
        size, unit = re.search(r"^ *total +([\d.,]+) (GB|MB|kB)", plan, re.MULTILINE).groups()
        planned = float(size.replace(",", "")) * {"GB": 1, "MB": 1e-3, "kB": 1e-6}[unit]
        text = f"{max(found):.3g} GB, the plan says {planned:.3g}"
        if self.tiny:
            return "figure", f"{text}; on a CPU, the peak is the process's, with Python and PyTorch"
        return "pass" if abs(max(found) / planned - 1) <= SAME_MEMORY else "FAIL", text

    def speed(self) -> tuple[str, str]:
        """Compare a step of the compiled run with the least time that counted traffic allows."""
        (milliseconds,) = self.figures("on", figure="ms")
        gpu = None if self.tiny else named_gpu(self.gpu.name)
        if gpu is None:
            return "skip", "kernels/gpus.py has no row for this device"
        least = least_milliseconds(PRESETS["gpt2-124m"], architecture(torch.empty(0, device="cuda")), gpu)
        found = statistics.median(milliseconds[len(milliseconds) // 2 :])
        return "figure", f"{found:.1f} ms per step, at least {least:.1f} by the model: ratio {found / least:.2f}"

    def killed(self, alone: str, *more: str) -> tuple[str, str]:
        """SIGKILL a run after its first checkpoint, resume it, and compare its log with that of the run left alone."""
        name = f"{alone}, killed"
        self.figures(alone)
        self.run(name, self.triton, *more, watch=lambda: len(read_log(self.folder / name)) >= 5)
        steps = len(self.logs[name])
        self.run(name, self.triton, *more)
        for figure in ("loss", "grad_norm"):
            resumed, expected = self.figures(name, alone, figure=figure)
            if resumed != expected:
                first = next(i for i, (a, b) in enumerate(zip(resumed, expected, strict=True), 1) if a != b)
                return "FAIL", f"killed after step {steps}: other bits of the {figure} from step {first} on"
        return "pass", f"killed after step {steps}: all losses and gradient norms have the same bits"

    def two_ranks(self) -> tuple[str, str]:
        if not self.tiny and torch.cuda.device_count() < 2:
            return "skip", "this machine has one GPU"
        self.run("two", self.triton, processes=2)
        return families.same_losses(*self.figures("two", "on"))

    def hellaswag(self) -> tuple[str, str]:
        """Score the run on the first 100 questions of --questions, of the validation set at hand, or of a download."""
        self.figures("on")
        path = Path(self.options.questions or ROOT / "datasets/hellaswag/hellaswag_val.jsonl")
        if not path.exists():
            if self.options.questions:
                raise RuntimeError(f"{path} does not exist")
            try:
                code = "from training.hellaswag import prepare_if_missing; prepare_if_missing()"
                self.start("-c", code, timeout=60)
            except RuntimeError as error:
                return "skip", f"no questions: {first_line(error)}; --questions FILE names a copy"
        questions = path.read_text(encoding="utf-8").splitlines(keepends=True)[:100]
        (self.folder / "questions.jsonl").write_text("".join(questions), encoding="utf-8")
        words = ["--model", str(self.folder / "on"), "--input", str(self.folder / "questions.jsonl")]
        score = self.start("-m", "training.hellaswag", *words, *(["--device", "cpu"] if self.tiny else []))
        return "figure", score.splitlines()[-1].partition(": ")[2]


def least_milliseconds(shape: Shape, architecture: str, gpu: GPU) -> float:
    """Return the least time of a compiled step with every kernel on."""
    counted = report.count(shape, [architecture])[architecture]
    return roofline.step(counted, shape, gpu, set(kernels.FAMILIES), compiled=True)["total"]


def read_log(folder: Path) -> list[dict]:
    """Return the complete lines of a run's log.jsonl, none if there is no log yet."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# --------------------------------------------------------------------------- the bench


def check_bench(findings: Findings, tiny: bool, folder: Path) -> None:
    """Add a line per operation, with its time, PyTorch's, and the fraction of the roofline."""
    file, rows = folder / "bench.json", []
    words = ["--device", "cpu", "--repeats", "1", "--shape", "B=1", "T=8"] if tiny else ["--repeats", "20"]

    def bench() -> tuple[str, str]:
        findings.run([sys.executable, "-m", "kernels.bench", *words, "--json", str(file)], timeout=300)
        rows.extend(json.loads(file.read_text(encoding="utf-8"))["rows"])
        findings.about["bench"] = rows
        return "pass", f"{len(rows)} rows"

    def launches() -> tuple[str, str]:
        if tiny:
            return "skip", "no GPU waits for this machine's launches"
        printed = findings.run([sys.executable, "-m", "kernels.bench", "--launches"], timeout=240)
        return "figure", printed.splitlines()[-1]

    findings.attempt("bench", "launches of an eager micro-step", launches)
    findings.attempt("bench", "python -m kernels.bench", bench)
    findings.attempt("bench", "the GPU timed, not Python", timed_ahead, rows)
    for operation in dict.fromkeys(row["operation"] for row in rows):
        own = [row for row in rows if row["operation"] == operation and "both_ms" in row]
        times = [f"{row['version']} {row['both_ms']:.3f} ms" for row in own]
        times += [f"{row['roofline']:.0%} of the roofline" for row in own[:1] if row.get("roofline")]
        findings.attempt("bench", operation, lambda times=times: ("figure", ", ".join(times)))


def timed_ahead(rows: list[dict]) -> tuple[str, str]:
    """Report the bench's rows whose time may be Python's, and those whose launch outlasts their work."""
    if not any("queued" in row for row in rows):
        return "skip", "no row was timed on a GPU"
    doubted = operations.doubts(rows)
    return ("figure", "; ".join(doubted)) if doubted else ("pass", "in every row")


# --------------------------------------------------------------------------- command line


def check_kernels(findings: Findings, tiny: bool, folder: Path) -> None:
    """Check every family in a process of its own, at tiny shapes all in one; its lines become lines of ours."""
    for names in ("all",) if tiny else kernels.FAMILIES:
        file = folder / f"{names}.json"
        command = [sys.executable, "-m", "kernels.first_run", "--families", names, "--json", str(file)]
        variables, ended = {"TRITON_INTERPRET": "1"} if tiny else {}, ""
        try:
            findings.run([*command, "--tiny" if tiny else "--no-tiny"], timeout=240, **variables)
        except RuntimeError as error:
            ended = first_line(error)
        lines = json.loads(file.read_text(encoding="utf-8"))["lines"] if file.exists() else []
        for line in lines:
            findings.add(line)
        if ended and all(
            line["status"] != "FAIL" for line in lines
        ):  # not the failure of a check: a crash, or too slow
            findings.attempt("kernels", names, lambda ended=ended: ("FAIL", ended))


def run(options: Options) -> int:
    """Do the parts, each on its own. Return the exit status: 1 if a check has failed."""
    if unknown := [part for part in options.only if part not in PARTS]:
        raise ValueError(f"--only {unknown[0]}: use some of {' '.join(PARTS)}")
    chosen = kernels.families(options.families) if options.families else ()
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError(machine.unseen_gpu() or "no GPU is present: --tiny rehearses on a CPU")
    findings = Findings(options.json, about_machine(), MINUTES)
    if chosen:
        families.check(findings, chosen, options.tiny)
        return 1 if findings.failed() else 0
    place = options.json.resolve().parent  # checkpoints need some GB: not the folder for temporary files
    with tempfile.TemporaryDirectory(prefix=".first_run.", dir=place) as name:
        folder = Path(name)
        if "machine" in options.only:
            check_machine(findings)
        if "kernels" in options.only:
            check_kernels(findings, options.tiny, folder)
        if "training" in options.only:
            Training(findings, options, folder).check()
        if "bench" in options.only:
            check_bench(findings, options.tiny, folder)
    failed = findings.failed()
    print(f"{len(findings.lines)} lines, {len(failed)} failed{': ' * bool(failed)}{'; '.join(failed)}; {options.json}")
    return 1 if failed else 0


def main(words: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the process at work, too
    with exit_on_error():
        raise SystemExit(run(parse_options(Options, words, "python -m kernels.first_run")))


if __name__ == "__main__":
    main()
