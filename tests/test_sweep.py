"""training/sweep.py: grids, run with the real training script in small."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs
from matplotlib.figure import Figure

import train_gpt2
from data.files import UserError, lock
from data.shards import write_dataset
from data.tokenizer import CharTokenizer
from training import sweep

SCRIPT = Path(train_gpt2.__file__)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random, tokenizer = np.random.default_rng(0), CharTokenizer.train("abcdefgh", documents=False)
    write_dataset(folder, tokenizer, {"train": [random.integers(8, size=4000)], "val": [random.integers(8, size=500)]})
    return folder


def command(dataset, out_dir, **options):
    small = {"n_layer": 1, "n_embd": 16, "block_size": 16, "batch_tokens": 64, "micro_batch": "auto", "lr": 1e-3}
    brief = {"max_steps": 6, "warmup_steps": 2, "eval_every": 3, "eval_tokens": 64, "sample_every": 0}
    return runs.command(dataset, out_dir, **small | brief | {"optimizer": "adamw"} | options)


# ---------------------------------------------------------------------------------------------------------------- grid


def test_a_grid_is_every_combination_with_the_last_option_fastest():
    found = sweep.expand(["laptop", "--seed=1"], ["--lr=1e-4,0.0003", "n-layer=4,6"], train_gpt2.parse)
    assert [run.name for run in found] == [f"lr={lr},n_layer={n}" for lr in (0.0001, 0.0003) for n in (4, 6)]
    assert found[1].columns == {"lr": 1e-4, "n_layer": 6}
    assert found[1].arguments == ["laptop", "--seed=1", "--lr=1e-4", "--n-layer=6"]
    for run in found:
        assert run.config == train_gpt2.parse(run.arguments)
        assert {name: getattr(run.config, name) for name in run.columns} == run.columns


def test_the_grid_wins_over_the_command_line_switches_take_true_and_false_and_paths_make_one_folder():
    (run,) = sweep.expand(["laptop", "--lr=1"], ["lr=1e-3"], train_gpt2.parse)
    assert run.config.lr == 1e-3
    on, off = sweep.expand(["laptop"], ["shuffle=true,False"], train_gpt2.parse)
    assert (on.config.shuffle, off.config.shuffle) == (True, False)
    assert (on.name, off.name) == ("shuffle=true", "shuffle=false")
    (run,) = sweep.expand(["laptop"], ["data=a/b"], train_gpt2.parse)
    assert run.name == "data=a_b" and run.config.data == "a/b"


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--sweep"], "--sweep needs an option and its values"),
        (["--sweep", "lr"], "lr has no value, or an empty one: write for example lr=1e-4,3e-4"),
        (["--sweep", "lr=1,,2"], "lr=1,,2 has no value, or an empty one"),
        (["--sweep", "learning_rate=1"], "--learning-rate"),
        (["--sweep", "lr=1e-3", "--lr=1e-4,1"], "has lr twice"),
        (["--sweep", "lr=1e-3,0.001"], "has the run lr=0.001 twice"),
        (["--sweep", "lr=1e-3,fast"], "fast"),
        (["--sweep", "n_layer=2", "n_embd=192,100"], "run --n-layer=2 --n-embd=100: --n-embd 100 is not divisible"),
        (["--sweep", "lr=-1"], "run --lr=-1: --lr is -1.0, but must be above 0"),
        (["--sweep", "compile=yes"], "the values of compile are true and false"),
        (["--sweep", "out_dir=a,b"], "a sweep cannot vary --out-dir"),
        (["--resume=never", "--sweep", "lr=1"], "leave --resume out"),
        (["--plan", "--find-lr"], "--plan and --find-lr are commands of their own: give one of them"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_named_before_anything_runs(tmp_path, capsys, words, complaint):
    with pytest.raises(SystemExit) as end:
        train_gpt2.main(["shakespeare-char", "--out-dir", str(tmp_path / "out"), *words])
    shown = capsys.readouterr().err
    assert end.value.code == 2 and complaint in " ".join(shown.split()), shown
    assert not (tmp_path / "out").exists()


def test_the_words_after_sweep_are_taken_out_of_the_command_line():
    grid = ["lr=1,2", "--n-layer=4,6"]
    line = ["laptop", "--seed", "3", "--sweep", *grid, "--n-head=2", "--out-dir", "x", "--no-compile"]
    assert sweep.take_grid(line) == (["laptop", "--seed", "3", "--n-head=2", "--out-dir", "x", "--no-compile"], grid)
    assert sweep.take_grid(["laptop", "--sweep=lr=1,2", "n_layer=3"]) == (["laptop"], ["lr=1,2", "n_layer=3"])
    assert sweep.take_grid(["laptop", "--out-dir", "x"]) == (["laptop", "--out-dir", "x"], None)


def test_the_folder_is_out_dir_or_one_beside_the_preset_s_run():
    assert str(sweep.choose_folder(["laptop", "--out_dir=x/y"], "x/y", "sweep")) == "x/y"
    assert sweep.choose_folder(["laptop", "--lr", "1"], "runs/laptop", "sweep").as_posix() == "runs/laptop-sweep"


# ------------------------------------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def swept(dataset, tmp_path_factory):
    """A sweep of two runs, the first of which diverges, and how it ended."""
    out = tmp_path_factory.mktemp("runs") / "sweep"
    with pytest.raises(UserError) as failure:
        sweep.train_grid(SCRIPT, command(dataset, out), ["lr=1e12,1e-3"], train_gpt2.parse)
    return out, str(failure.value)


def test_a_run_that_fails_is_named_and_the_others_continue(swept):
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


def test_finished_runs_are_skipped_and_must_have_been_made_with_the_same_options(dataset, swept, capfd):
    out, _ = swept
    assert sweep.train_grid(out / "no_script.py", command(dataset, out), ["--lr=0.001"], train_gpt2.parse) == 0
    assert "[1/1] lr=0.001: done before" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"holds a sweep made with --weight-decay 0.3 \(now 0.2\): use another --out"):
        sweep.train_grid(SCRIPT, command(dataset, out, weight_decay=0.2), ["lr=1e-3"], train_gpt2.parse)
    without_effect = command(dataset, out, keep=1)
    assert sweep.train_grid(SCRIPT, without_effect, ["lr=1e-3"], train_gpt2.parse) == 0


def test_a_busy_folder_and_torchrun_are_refused(dataset, swept, tmp_path, monkeypatch):
    out, _ = swept
    with lock(out / ".lock"), pytest.raises(UserError, match="another process is writing to"):
        sweep.train_grid(SCRIPT, command(dataset, out), ["lr=1e-3"], train_gpt2.parse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        sweep.train_grid(SCRIPT, command(dataset, tmp_path / "new"), ["lr=1e-3"], train_gpt2.parse)
    assert not (tmp_path / "new").exists()


def test_ctrl_c_lets_the_run_save_ends_the_sweep_and_the_same_command_resumes(dataset, tmp_path):
    arguments = command(dataset, tmp_path, batch_tokens=4096, max_steps=30, eval_every=0)
    start = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments, "--sweep", "lr=1e-3,1e-2"], **start)
    log = tmp_path / "lr=0.001" / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground group
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 130 and "not finished" in shown and "the same command resumes" in shown
    done = log.read_bytes().count(b"\n")
    assert 3 <= done < 30
    assert max(path.name for path in log.parent.glob("checkpoints/*.pt")) == f"step_{done:06d}.pt"
    assert not (tmp_path / "lr=0.01").exists()

    assert sweep.train_grid(SCRIPT, arguments, ["lr=1e-3"], train_gpt2.parse) == 0
    assert [json.loads(line)["step"] for line in log.read_text("utf-8").splitlines()] == [*range(1, 31)]


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_a_run_has_its_own_process_group_so_that_ctrl_c_reaches_it_once():
    program = "import os; os.write(2, b'%d' % os.getpgrp())"
    with sweep.SignalRelay() as relay, relay.start([sys.executable, "-c", program]) as child:
        assert int(child.stderr.read()) == child.pid != os.getpgrp()


@pytest.mark.parametrize(
    "status, tail, reason",
    [
        (2, "warning: x\nerror: no data\n\r 10%|#\r\n", "error: no data"),
        (1, 'Traceback:\n  File "x"\nKeyError: 3\n', "KeyError: 3"),
        (-9, "error: before\n", "ended by signal 9"),
        (143, "", "ended by signal 15"),
        (3, "", "exit status 3"),
    ],
)
def test_why_a_process_ended_is_its_error_line_or_its_last(status, tail, reason):
    assert sweep._reason(status, tail) == reason


# ------------------------------------------------------------------------------------------------------------- results


def made_up(dataset, *losses, **columns):
    """A run of three steps with these validation losses, one per step."""
    config = train_gpt2.Config(data=str(dataset), max_steps=3)
    records = [{"step": i, "tokens": 10 * i, "loss": x, "ms": 1.0, "val_loss": x} for i, x in enumerate(losses, 1)]
    return sweep.SweepRun(",".join(f"{n}={v}" for n, v in columns.items()), columns, [], config, records)


def panels(*runs):
    sweep.draw(figure := Figure(), runs)
    return figure.axes


def test_the_lowest_loss_is_told_apart_from_the_last(dataset):
    table = sweep.table([made_up(dataset, 2.0, 1.5, 1.8, lr=1.0), made_up(dataset, 2.0, 1.9, 1.7, lr=2.0)])
    assert "| 1.800    | 1.500, 2 " in table and "| 1.700    | 1.700, 3 " in table
    assert "lowest validation loss at the end: 1.7000, lr=2.0" in table


def test_a_curve_for_every_run_and_a_line_for_every_reference_within_reach(dataset):
    axes, *_ = panels(made_up(dataset, 1.2, 1.1, 1.0, lr=0.1), made_up(dataset, 1.3, 1.2, lr=1.0))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["lr=0.1: 1.000", "lr=1.0: 1.200, not finished"]
    assert not axes.texts  # all references are near ln 8 = 2.08, far above
    (axes,) = panels(made_up(dataset, 3.2, 2.5, 2.0, lr=0.1))
    known = sweep.references([made_up(dataset)])
    assert {text.get_text() for text in axes.texts} == {f"{name} {nats:.4g}" for name, nats in known.items()}
    assert len(known) == 4
    axes, _ = panels(made_up(dataset, 2.0, 1.9, 1.8, lr=0.1), made_up(dataset, 50.0, 40.0, 30.0, lr=9.0))
    assert axes.get_ylim()[1] == pytest.approx(max(known.values()) + 0.5)


def test_the_last_loss_is_drawn_against_the_option_with_most_values(dataset):
    rates, losses = [1e-4, 1e-3, 1e-2], {4: [3.0, 2.0, 2.5], 6: [2.9, 1.9, 2.4]}
    runs = [made_up(dataset, 4, 3, losses[n][i], lr=lr, n_layer=n) for i, lr in enumerate(rates) for n in losses]
    _, panel = panels(*reversed(runs))
    assert panel.get_xlabel() == "lr" and panel.get_xscale() == "log"
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert lines == {f"n_layer={n}": [[lr, loss] for lr, loss in zip(rates, losses[n], strict=True)] for n in losses}


def test_options_without_numbers_have_no_second_panel_and_unfinished_runs_no_point(dataset):
    assert len(panels(made_up(dataset, 3, 2, 1, optimizer="adamw"), made_up(dataset, 3, 2, 2, optimizer="muon"))) == 1
    assert len(panels(made_up(dataset, 3, 2, 1, lr=0.1))) == 1
    runs = [made_up(dataset, *losses, n_layer=n) for n, losses in ((1, (3, 2, 1)), (2, (3, 2)), (3, (4, 3, 2)))]
    _, panel = panels(*runs)
    assert panel.lines[0].get_xdata().tolist() == [1, 3] and panel.get_xscale() == "linear"
