"""A run's folder: the log, the samples, the summary, and who may write to it."""

import json
import math
import os
import signal

import pytest
import torch

from data.files import UserError
from training.run import Run, StopRequest, profiler, read_log


def record(step, **more):
    return {"step": step, "tokens": 10 * step, "loss": 1 / step, "mfu": None, "tokens_per_s": 5.0, "ms": 2.0} | more


def opened(folder, step=0, references=None, fresh=False, **config):
    return Run(folder, {"max_steps": 9} | config, step, references or {"guessing at random": 1.0}, fresh)


def saved(step):
    rest = {"optimizers": [], "config": {}, "tokenizer": {}, "run": {}, "micro_batch": 1}
    return {"step": step, "model": {"weight": torch.ones(1)}} | rest


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "one"


def test_a_log_is_cut_back_to_the_step_that_a_run_resumes_from(folder):
    with opened(folder, 0, lr=1) as run:
        for step in range(1, 6):
            run.log(record(step))
    with opened(folder, 3, lr=2) as run:
        run.log(record(4, val_loss=0.5))
    assert [r["step"] for r in read_log(folder)] == [1, 2, 3, 4]
    assert read_log(folder)[-1]["val_loss"] == 0.5
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == {"max_steps": 9, "lr": 2}


def test_a_line_that_a_kill_cut_short_is_left_out_and_a_corrupt_one_is_named(folder):
    folder.mkdir(parents=True)
    first, second, third = (json.dumps(record(step)) + "\n" for step in (1, 2, 3))
    path = folder / "log.jsonl"
    path.write_text(f'{first}{{"ste', encoding="utf-8")
    assert read_log(folder) == [record(1)]
    wrong = (json.dumps(record(2) | change) + "\n" for change in ({"ms": "fast"}, {"tokens": None}, {"loss": math.inf}))
    doubled, holed, reversed_, deep = first + first, first + third, second + first, "[" * 100_000 + "\n"
    for damaged in ("[]\n", "{}\n", '{"step": 1}\n', "\xff\n", doubled, holed, reversed_, deep, *wrong):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match="log.jsonl is corrupt"):
            read_log(folder)


def test_samples_past_the_step_that_a_run_resumes_from_are_dropped(folder):
    with opened(folder) as run:
        for step in (2, 4, 6):
            run.sample(step, f"text {step} \u2603\n{'-' * 60}\nbelow {step}")
    with opened(folder, step=5) as run:
        run.sample(8, "text 8")
    written = (folder / "samples.txt").read_text(encoding="utf-8")
    assert "text 2 \u2603" in written and "text 6" not in written and "below 6" not in written
    assert "text 4" in written and "below 4" in written and "text 8" in written
    with opened(folder):
        assert not (folder / "samples.txt").exists()


def test_what_a_kill_left_half_written_goes_at_the_next_start(folder):
    (folder / "checkpoints").mkdir(parents=True)
    for path in (folder / "checkpoints" / ".step_000030.pt.0a1b2c3d.tmp", folder / ".loss.png.0a1b2c3d.tmp"):
        path.write_bytes(b"half")
    with opened(folder):
        assert not list(folder.rglob(".*.tmp"))


def test_the_summary_adds_up_the_steps_and_takes_the_last_measurements(folder, capsys):
    with opened(folder, references={"guessing at random": 1.0, "bigrams counted": 2.5}) as run:
        run.log(record(1, ms=40_000.0, tokens_per_s=1.0, mfu=0.2, val_loss=3.0, hellaswag_acc_norm=0.25))
        run.log(record(2, ms=50_000.0, tokens_per_s=2.0, mfu=0.4, val_loss=2.0, hellaswag_acc_norm=0.27))
        run.log(record(3, ms=3_600_000.0, tokens_per_s=9.0, mfu=0.3))
        found = run.summary()
        run.finish()
    assert found["time in training steps"] == "1 h 1 min 30 s" and found["tokens"] == "30"
    assert found["tokens/s, median"] == "2" and found["MFU, median"] == "30.0%"
    assert found["validation loss"] == "2.0000 nats per token after step 2, perplexity 7.39"
    assert found["HellaSwag acc_norm"].startswith("0.2700") and "0.2955" in found["HellaSwag acc_norm"]
    assert "bigrams counted" in capsys.readouterr().out


@pytest.mark.parametrize("last, overfits", [(2.02, False), (2.04, True)])
def test_the_summary_judges_the_run(folder, last, overfits):
    with opened(folder) as run:
        for step in range(1, 31):
            validated = {10: {"val_loss": 2.5}, 20: {"val_loss": 2.0}, 30: {"val_loss": last}}.get(step, {})
            run.log(record(step, memory_gb=step / 10) | {"loss": 40.0 - step} | validated)
        found = run.summary()
    assert found["training loss"] == "11.0000 nats per token, mean of the last 3 step(s)"
    assert found["lowest validation loss"] == "2.0000 after step 20" and found["peak memory"] == "3.00 GB"
    assert ("overfitting" in found) == overfits
    assert not overfits or "has risen by 0.040 since step 20" in found["overfitting"]


def test_a_live_run_is_not_moved_by_one_that_starts_fresh(folder):
    with opened(folder) as run, pytest.raises(UserError, match="another process is writing"):
        run.log(record(1))
        Run(folder, {"max_steps": 9}, 0, {"guessing at random": 1.0}, fresh=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_published_scores_are_compared_with_hellaswag_s_own_questions_only(folder):
    for own, file in [(True, ""), (False, "mine.jsonl")]:
        with opened(folder, hellaswag_input=file) as run:
            run.log(record(1, hellaswag_acc_norm=0.3))
            assert ("0.2955" in run.summary()["HellaSwag acc_norm"]) == own


def test_a_first_loss_that_random_weights_do_not_have_is_a_warning(folder, capsys):
    for loss, first, warned in [(4.1, (3.7, 4.7), False), (3.0, (3.7, 4.7), True), (3.0, None, False)]:
        with Run(folder, {"max_steps": 9}, 0, {}, first=first) as run:
            run.log(record(1) | {"loss": loss})
            run.log(record(2) | {"loss": 9.0})
        shown = capsys.readouterr().err
        assert ("warning: the first loss is 3.000, not 3.70 to 4.70" in shown) == warned and shown.count("first") <= 1


def test_tensorboard_gets_every_number(folder):
    pytest.importorskip("tensorboard")
    with opened(folder, tensorboard=True) as run:
        run.log(record(1))
    assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 20])
def test_a_trace_is_written_for_any_number_of_steps(tmp_path, steps):
    with profiler(str(tmp_path), steps) as profiling:
        for _ in range(steps):
            torch.ones(2) + 1
            profiling.step()
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "aten::add" for event in events) == min(3, steps)


def test_samples_that_were_cut_or_written_by_hand_are_no_obstacle(folder):
    with opened(folder) as run:
        run.sample(2, "two")
    path = folder / "samples.txt"
    path.write_bytes(
        b"my notes\n" + path.read_bytes() + b"---------------------------------------- after 4 steps\n\xe6\x97"
    )
    with opened(folder, step=4):
        assert path.read_bytes().startswith(b"my notes\n-") and path.read_bytes().endswith(b"steps\n\xe6\x97\n")
    with opened(folder, step=3):
        assert b"after 4" not in path.read_bytes() and b"two" in path.read_bytes()


def test_a_kill_at_any_byte_of_a_sample_leaves_nothing_of_it(folder):
    path = folder / "samples.txt"
    with opened(folder) as run:
        run.sample(2, "two")
        before = path.read_bytes()
        run.sample(40, "forty")
    whole = path.read_bytes()
    for cut in range(len(before), len(whole) + 1):
        path.write_bytes(whole[:cut])
        with opened(folder, step=39):
            assert path.read_bytes() == before, cut


def test_what_matters_less_than_training_ends_as_a_warning_once(folder, capsys, monkeypatch):
    monkeypatch.setattr("data.streams.warned", set())
    with opened(folder) as run:
        (folder / "loss.png").mkdir()
        (folder / "samples.txt").mkdir()
        for step in (1, 2):
            run.log(record(step))
            run.sample(step, "text")
            run.draw()
        run.finish()
    said = capsys.readouterr()
    assert said.err.count("has no new loss.png") == 1 and "no sample of step 1" in said.err


@pytest.mark.parametrize("name", ["a$b$c \\frac", "a\nb", "\u6587", os.fsdecode(b"\xff"), "x" * 200])
def test_any_name_of_a_folder_can_be_a_title(tmp_path, capsys, name):
    with opened(tmp_path / name) as run:
        run.log(record(1))
        run.draw()
    assert (tmp_path / name / "loss.png").exists() and "no new loss.png" not in capsys.readouterr().err


def test_only_a_run_is_moved_and_only_what_is_ours_is_removed(folder):
    folder.mkdir(parents=True)
    for name in ("thesis.tex", ".notes.tmp"):
        (folder / name).write_text("mine", encoding="utf-8")
    with opened(folder, fresh=True):
        assert {path.name for path in folder.iterdir()} >= {"thesis.tex", ".notes.tmp", "config.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(folder / "thesis.tex")
    with pytest.raises(UserError, match="is a link, which a lock must not be"):
        opened(folder)
    assert (folder / "thesis.tex").read_text(encoding="utf-8") == "mine"


def test_a_lost_log_is_a_warning_and_one_that_ends_too_early_an_error(folder, capsys):
    with opened(folder) as run:
        run.log(record(1))
        run.log(record(2))
        run.save(saved(2), keep=1)
    path = folder / "log.jsonl"
    path.write_text(json.dumps(record(1)) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="ends at step 1, before the checkpoint of step 2: move it away"):
        opened(folder, step=2)
    path.unlink()
    with opened(folder, step=2):
        assert "the log begins at step 3" in capsys.readouterr().err


def test_a_signal_that_ended_the_reader_of_standard_error_too_still_lets_the_run_save():
    reader, writer = os.pipe()
    os.close(reader)  # as Ctrl-C does to tee in `python train_gpt2.py laptop 2>&1 | tee log`
    with StopRequest() as stop:
        kept = os.dup(2)
        os.dup2(writer, 2)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(writer)
    assert stop.signal == signal.SIGINT
