"""training/cells.py: runs one after another, with the real training script in small."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro
from matplotlib.figure import Figure

import model as gpt
import train_gpt2
from data.files import UserError
from data.shards import write_dataset
from data.tokenizer import CharTokenizer
from training import cells, sweep

SCRIPT = Path(train_gpt2.__file__)
TOKENIZER = CharTokenizer.train("abcdefgh", documents=False)


def parse(arguments):
    return tyro.extras.overridable_config_cli(train_gpt2.PRESETS, args=arguments)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    write_dataset(folder, TOKENIZER, {"train": [random.integers(8, size=4000)], "val": [random.integers(8, size=500)]})
    return folder


def command(dataset, out_dir, *flags, **options):
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_tokens": 64, "micro_batch": "auto"}
    brief = {"max_steps": 6, "warmup_steps": 2, "eval_every": 3, "eval_tokens": 64, "sample_every": 0, "lr": 1e-3}
    options = {
        "data": dataset,
        "out_dir": out_dir,
        "optimizer": "adamw",
        "dtype": "float32",
        **small,
        **brief,
    } | options
    return ["laptop", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()), *flags]


@pytest.fixture(scope="module")
def swept(dataset, tmp_path_factory):
    """A sweep of two cells, the first of which diverges, and how it ended."""
    out = tmp_path_factory.mktemp("runs") / "sweep"
    with pytest.raises(UserError) as failure:
        sweep.run(SCRIPT, command(dataset, out), ["lr=1e12,1e-3"], parse)
    return out, str(failure.value)


def test_a_cell_that_fails_is_named_and_the_others_go_on(swept):
    out, failure = swept
    assert failure.startswith("1 of 2 runs failed (lr=1000000000000.0)") and str(out / "sweep.md") in failure
    lines = (out / "sweep.md").read_text("utf-8").splitlines()
    columns = [[entry.strip() for entry in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert columns[0] == ["lr", "steps", "parameters", "train loss", "val loss", "lowest, at step", "minutes"]
    assert columns[2][4] == "failed"
    records = [json.loads(line) for line in (out / "lr=0.001" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert columns[3][:2] == ["0.001", "6"] and columns[3][4] == f"{records[-1]['val_loss']:.3f}"
    assert columns[3][3] == f"{records[-1]['loss']:.3f}"
    assert any(line.startswith("lr=1000000000000.0: error: step 2 has loss") for line in lines)
    assert any(line.startswith("to compare with: guessing at random 2.079, token frequencies 2.0") for line in lines)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_skipped(dataset, swept, capfd):
    out, _ = swept
    assert sweep.run(out / "no_script.py", command(dataset, out), ["--lr=0.001"], parse) == 0
    assert "[1/1] lr=0.001: done before" in capfd.readouterr().out


def test_a_cell_made_with_other_options_is_not_taken_for_this_one(dataset, swept):
    out, _ = swept
    with pytest.raises(
        UserError, match=r"other options \(--weight-decay 0.3 there, 0.2 here\): give another --out-dir"
    ):
        sweep.run(SCRIPT, command(dataset, out, weight_decay=0.2), ["lr=1e-3"], parse)
    assert sweep.run(SCRIPT, command(dataset, out, keep=1), ["lr=1e-3"], parse) == 0  # changes no loss


def test_a_folder_that_another_sweep_uses_is_refused(dataset, swept):
    out, _ = swept
    from data.files import lock

    with lock(out / ".lock"), pytest.raises(UserError, match="another process is writing to"):
        sweep.run(SCRIPT, command(dataset, out), ["lr=1e-3"], parse)


def test_torchrun_and_resume_are_refused(dataset, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="leave --resume out"):
        sweep.run(SCRIPT, command(dataset, tmp_path / "new", "--resume=never"), ["lr=1e-3"], parse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        sweep.run(SCRIPT, command(dataset, tmp_path / "new"), ["lr=1e-3"], parse)
    assert not (tmp_path / "new").exists()


def test_ctrl_c_lets_the_cell_save_ends_the_sweep_and_the_same_command_goes_on(dataset, tmp_path):
    program = """
import sys
from training import sweep
from tests.test_cells import SCRIPT, parse
raise SystemExit(sweep.run(SCRIPT, sys.argv[1:], ["lr=1e-3,1e-2"], parse))
"""
    arguments = command(dataset, tmp_path, batch_tokens=8192, max_steps=60, eval_every=0)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    start = {"env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], **start)
    log = tmp_path / "lr=0.001" / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground group
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "not finished" in shown and "the same command goes on" in shown
    done = log.read_bytes().count(b"\n")
    assert 3 <= done < 60
    assert [path.name for path in log.parent.glob("checkpoints/*.pt")] == [f"step_{done:06d}.pt"]
    assert not (tmp_path / "lr=0.01").exists()

    assert sweep.run(SCRIPT, arguments, ["lr=1e-3"], parse) == 0
    assert [json.loads(line)["step"] for line in log.read_text("utf-8").splitlines()] == [*range(1, 61)]


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_a_cell_has_its_own_process_group_so_that_ctrl_c_reaches_it_once():
    with (
        cells.Relay() as relay,
        relay.start([sys.executable, "-c", "import os; os.write(2, b'%d' % os.getpgrp())"]) as child,
    ):
        assert int(child.stderr.read()) == child.pid != os.getpgrp()


def test_why_a_process_ended_is_its_error_line_or_its_last():
    assert cells._reason(2, "warning: x\nerror: no data\n\r 10%|#\r\n") == "error: no data"
    assert cells._reason(1, 'Traceback:\n  File "x"\nKeyError: 3\n') == "KeyError: 3"
    assert cells._reason(-9, "error: before\n") == "ended by signal 9"
    assert cells._reason(143, "") == "ended by signal 15"
    assert cells._reason(3, "") == "exit status 3"


@pytest.mark.parametrize("sizes", [(0, 1, 8, 4), (1, 2, 8, 16), (3, 4, 32, 8)])
def test_parameters_are_counted_as_the_model_counts_them(dataset, sizes):
    names = ("n_layer", "n_head", "n_embd", "block_size")
    config = train_gpt2.Config(data=str(dataset), **dict(zip(names, sizes, strict=True)))
    assert cells.parameter_count(config) == gpt.GPT(config.shape(vocab_size=8)).parameter_count()


def test_without_a_dataset_there_is_nothing_to_compare_with_and_no_count(tmp_path):
    config = train_gpt2.Config(data=str(tmp_path / "nothing"))
    cell = cells.Cell("a", {"lr": 1.0}, [], config)
    assert cells.parameter_count(config) is None and cells.landmarks_of([cell]) == {}
    row = cells.table([cell]).splitlines()[2]
    assert [entry.strip() for entry in row.split("|")[1:-1]] == ["1.0", "0", "", "", "not finished", "", "0.0"]


def made_up(config, *losses, **columns):
    """A cell with a validation a step."""
    records = [
        {"step": i, "tokens": 10 * i, "loss": x, "ms": 1.0, "val_loss": x} for i, x in enumerate(losses, start=1)
    ]
    return cells.Cell(",".join(f"{n}={v}" for n, v in columns.items()), columns, [], config, records)


def test_the_lowest_loss_is_told_apart_from_the_last(dataset):
    config = train_gpt2.Config(data=str(dataset), max_steps=3)
    table = cells.table([made_up(config, 2.0, 1.5, 1.8, lr=1.0), made_up(config, 2.0, 1.9, 1.7, lr=2.0)])
    assert "| 1.800    | 1.500, 2 " in table and "| 1.700    | 1.700, 3 " in table
    assert "lowest validation loss at the end: 1.7000, lr=2.0" in table


def test_a_curve_for_every_cell_and_a_line_for_every_landmark_within_reach(dataset):
    config = train_gpt2.Config(data=str(dataset), max_steps=3)
    axes = Figure().add_subplot()
    cells.draw_curves(axes, [made_up(config, 1.2, 1.1, 1.0, lr=0.1), made_up(config, 1.3, 1.2, lr=1.0)])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["lr=0.1: 1.000", "lr=1.0: 1.200, not finished"]
    assert not axes.texts  # all landmarks are near ln 8 = 2.08, far above
    axes = Figure().add_subplot()
    cells.draw_curves(axes, [made_up(config, 3.2, 2.5, 2.0, lr=0.1)])
    assert {text.get_text() for text in axes.texts} == set(cells.landmarks_of([made_up(config, lr=1.0)]))
    assert len(axes.texts) == 4
    axes = Figure().add_subplot()
    cells.draw_curves(axes, [made_up(config, 2.0, 1.9, 1.8, lr=0.1), made_up(config, 50.0, 40.0, 30.0, lr=9.0)])
    assert axes.get_ylim()[1] == pytest.approx(max(text.xy[1] for text in axes.texts) + 0.5)
