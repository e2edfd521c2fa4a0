"""The first run: its rehearsal on a CPU, the mistakes that it must find, and that it goes on after a failure."""

import json
import subprocess
import sys
import time

import pytest
import torch
from accuracy import interpreted
from hellaswag_questions import write_questions

import kernels
from kernels.first_run import __main__ as first_run
from kernels.first_run import families
from kernels.first_run.findings import Findings
from kernels.gpus import GPUS
from kernels.report import roofline
from kernels.report.shapes import Shape

SHAPE = Shape(B=1, T=9, C=32, H=2, L=1, V=60)


@pytest.fixture
def rehearsed(tmp_path, monkeypatch, capsys):
    """A function: rehearse some parts on a CPU. Return, by check, its status and text."""

    def rehearse(*parts):
        monkeypatch.chdir(tmp_path)
        questions = write_questions(tmp_path / "questions.jsonl")
        with pytest.raises(SystemExit) as end:
            first_run.main(["--tiny", "--only", *parts, "--questions", str(questions)])
        shown = capsys.readouterr().out
        assert end.value.code == 0, shown
        found = json.loads((tmp_path / "first_run.json").read_text(encoding="utf-8"))
        assert {line["part"] for line in found["lines"]} == set(parts)
        assert len(shown.splitlines()) == len(found["lines"]) + 1 and found["torch"] == torch.__version__
        left = {path.name for path in tmp_path.iterdir()}  # neither checkpoints nor half a file
        assert left == {"first_run.json", "questions.jsonl"}
        return {line["check"]: (line["status"], line["text"]) for line in found["lines"]}

    return rehearse


def test_the_rehearsal_on_a_cpu_checks_and_times_every_operation_and_family(rehearsed):
    texts = rehearsed("machine", "kernels", "bench")
    for operation in (name for operations in kernels.FAMILIES.values() for name in operations):
        assert texts[f"{operation}, float32, B=1 T=9 C=32"][0] == "pass"
        assert "torch" in texts[operation][1]  # its time
    assert texts["the GPU timed, not Python"][0] == "skip"
    for family in kernels.FAMILIES:
        assert texts[f"{family} the same in one compiled graph"][0] == "pass"


def test_the_rehearsal_on_a_cpu_trains_resumes_and_scores(rehearsed):
    texts = rehearsed("training")
    for name in ("on and off have the same losses", "killed and resumed", "two ranks"):
        assert texts[name][0] == "pass"
    assert "same bits" in texts["killed and resumed"][1] and "20 questions" in texts["HellaSwag, 100 questions"][1]


def test_all_parts_are_done_unless_some_are_named():
    assert first_run.Options().only == first_run.PARTS == ("machine", "kernels", "training", "bench")


@interpreted
@pytest.mark.parametrize("operation", ["layer_norm", "add_layer_norm", "linear_cross_entropy"])
def test_a_kernel_that_is_wrong_by_a_little_or_has_other_bits_each_time_fails(operation):
    ours, calls = getattr(kernels.select("all"), operation), []

    def wrong(x, *rest):
        outputs = ours(x, *rest)
        return tuple(o * (1 + 1e-5) for o in outputs) if isinstance(outputs, tuple) else outputs * (1 + 1e-5)

    def unsteady(x, *rest):
        calls.append(x)
        return ours(x + 1e-7 * len(calls), *rest)

    given = operation, SHAPE, torch.float32, "cpu"
    assert families.accuracy(ours, *given)[0] == "pass"
    assert families.accuracy(wrong, *given)[0] == "FAIL"
    assert "other bits the second time" in families.accuracy(unsteady, *given)[1]


def test_times_that_hold_python_s_launches_are_named():
    row = {"operation": "gelu", "version": "torch", "both_ms": 1.0, "launch_ms": 0.5, "queued": 1.0}
    assert first_run.timed_ahead([row]) == ("pass", "in every row")
    status, text = first_run.timed_ahead([row, row | {"queued": 0.25}])
    assert status == "figure" and text.startswith("gelu, torch: only 25% of the runs were queued in time")


def test_runs_whose_losses_differ_or_are_not_finite_fail():
    assert families.same_losses([5.0, 4.0], [5.01, 4.0])[0] == "pass"
    assert families.same_losses([5.0, 4.0], [5.0, 4.03])[0] == "FAIL"
    assert families.same_losses([5.0, float("nan")], [5.0, float("nan")])[0] == "FAIL"


def test_the_least_time_of_a_step_is_that_of_its_matrix_products_and_more():
    gpu = GPUS["A100"]
    products = 1e3 * roofline.matmul_seconds(SHAPE, gpu)
    assert products < first_run.least_milliseconds(SHAPE, "sm_80", gpu) < 100 * products


def test_after_a_failure_the_rest_is_done_and_the_exit_status_is_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CC", "/no/such/cc")
    with pytest.raises(SystemExit) as stop:
        first_run.main(["--tiny", "--only", "machine", "--json", str(tmp_path / "found.json")])
    lines = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["lines"]
    failed = [line for line in lines if line["status"] == "FAIL"]
    assert stop.value.code == 1 and [line["check"] for line in failed] == ["can launch"]
    assert "/no/such/cc is not in PATH" in failed[0]["text"] and lines[-1]["check"] == "GPUs"
    assert "1 failed: can launch" in capsys.readouterr().out


def test_an_exception_is_a_line_and_a_process_that_hangs_is_ended_with_its_children(tmp_path):
    findings = Findings(tmp_path / "found.json", {"driver": "580"}, minutes=15)
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = (
        "import subprocess, sys; print(subprocess.Popen({!r}).pid, file=open('{}', 'w'), flush=True); sys.stdin.read()"
    )
    pid = tmp_path / "pid"
    hangs = [sys.executable, "-c", child.format(sleeper, pid) + "; __import__('time').sleep(600)"]
    fails = [sys.executable, "-c", "raise SystemExit('error: no memory\\nmore')"]
    findings.attempt("training", "hangs", findings.run, hangs, 3)
    findings.attempt("training", "fails", findings.run, fails, 60)
    findings.attempt("training", "ends", findings.run, [sys.executable, "-c", "1"], 60, lambda: False)
    findings.end = time.monotonic()
    findings.attempt("training", "late", findings.run, sleeper, 60)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    texts = [line["text"] for line in found["lines"]]
    assert found["driver"] == "580" and findings.failed() == ["hangs", "fails", "ends", "late"]
    assert "stopped after 3 s" in texts[0] and texts[1] == "RuntimeError: error: no memory"
    assert "ended before it was to be killed" in texts[2] and "because 15 minutes were over" in texts[3]
    state = ["ps", "-o", "stat=", "-p", pid.read_text(encoding="utf-8").strip()]
    assert subprocess.run(state, capture_output=True, text=True).stdout[:1] in ("", "Z")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tiny", "--only", "kernel"], "error: --only kernel: use some of machine kernels training bench"),
        pytest.param(["--no-tiny"], "error: no GPU is present: --tiny rehearses on a CPU", marks=interpreted),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        first_run.main(words)
    assert end.value.code == 2 and capsys.readouterr().err == f"{message}\n" and not list(tmp_path.iterdir())
