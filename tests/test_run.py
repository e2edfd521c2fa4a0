"""A run's folder: the log, the picture, the checkpoints and what is wrong with them; and the shared command line."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
import tyro

from data.files import UserError, exit_on_user_error, parse_options
from data.shards import open_split, write_dataset
from data.tokenizer import CharTokenizer, gpt2
from training.run import (
    GPT2_124M,
    Run,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    read_log,
    reference_losses,
)


def record(step, **more):
    return {"step": step, "tokens": 10 * step, "loss": 1 / step, "mfu": None, "tokens_per_s": 5.0, "ms": 2.0} | more


def checkpoint(step, weight):
    return {
        "step": step,
        "model": {"weight": weight},
        "optimizers": [],
        "config": {},
        "tokenizer": {},
        "run": {},
        "micro_batch": 1,
    }


def opened(folder, step=0, landmarks=None, **config):
    return Run(folder, {"max_steps": 9} | config, step, landmarks or {"guessing at random": 1.0})


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "one"


def test_a_log_is_cut_back_to_the_step_that_a_run_goes_on_from(folder):
    with opened(folder, 0, lr=1) as run:
        for step in range(1, 6):
            run.log(record(step))
    with opened(folder, 3, lr=2) as run:
        run.log(record(4, val_loss=0.5))
    assert [r["step"] for r in read_log(folder)] == [1, 2, 3, 4]
    assert read_log(folder)[-1]["val_loss"] == 0.5
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == {"max_steps": 9, "lr": 2}


def test_a_line_that_a_kill_cut_short_is_left_out_and_a_damaged_one_is_named(folder):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 1}\n{"ste', encoding="utf-8")
    assert read_log(folder) == [{"step": 1}]
    for damaged in ('{"step": 1\n{"step": 2}\n', "[]\n", "{}\n"):
        (folder / "log.jsonl").write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match="log.jsonl is damaged"):
            read_log(folder)


def test_samples_of_a_run_that_starts_afresh_replace_the_old_ones(folder):
    for text in ("old", "new"):
        with opened(folder) as run:
            run.sample(1, text)
    with opened(folder, 1) as run:
        run.sample(2, "more \u2603")
    written = (folder / "samples.txt").read_text(encoding="utf-8")
    assert "old" not in written and "new" in written and "more \u2603" in written


def test_checkpoints_come_back_and_only_the_newest_are_kept(folder):
    with opened(folder) as run:
        for step in (1, 2, 999_000, 1_000_000):
            run.save(checkpoint(step, torch.full((3,), float(step))), keep=2)
    assert [path.name for path in checkpoints(folder)] == ["step_1000000.pt", "step_999000.pt"]
    path, newest = newest_checkpoint(folder)
    assert path == checkpoints(folder)[0] and newest["model"]["weight"].tolist() == [1e6] * 3
    assert len(list((folder / "checkpoints").iterdir())) == 4  # two files and their sha256


def test_every_kind_of_damage_to_a_checkpoint_is_found(folder):
    with opened(folder) as run:
        run.save(checkpoint(1, torch.randn(1000)), keep=2)
    path = checkpoints(folder)[0]
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"x", b"", whole[:2000] + bytes([whole[2000] ^ 4]) + whole[2001:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged: its sha256"):
            load_checkpoint(path)
        with pytest.raises(UserError, match="--resume never"):
            newest_checkpoint(folder)
    path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 1
    sha256 = path.with_name(path.name + ".sha256")
    sha256.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)
    for other in ({"weight": torch.zeros(1)}, [1]):
        torch.save(other, path)
        sha256.write_text(hashlib.sha256(path.read_bytes()).hexdigest(), encoding="utf-8")
        with pytest.raises(UserError, match="is no checkpoint of train_gpt2.py"):
            load_checkpoint(path)
    sha256.unlink()
    with pytest.raises(UserError, match="sha256, .*written beside it, is missing"):
        load_checkpoint(path)


def test_weights_that_are_not_finite_are_not_saved(folder):
    with opened(folder) as run, pytest.raises(UserError, match="after step 3 are not finite"):
        run.save(checkpoint(3, torch.tensor([1.0, float("nan")])), keep=2)
    assert newest_checkpoint(folder) == (None, None)


def test_what_a_kill_left_half_written_goes_at_the_next_start(folder):
    (folder / "checkpoints").mkdir(parents=True)
    for path in (folder / "checkpoints" / ".step_000030.pt.0a1b2c3d.tmp", folder / ".loss.png.0a1b2c3d.tmp"):
        path.write_bytes(b"half")
    with opened(folder):
        assert not list(folder.rglob(".*.tmp"))


def test_a_checkpoint_runs_no_code_when_it_is_read(folder):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))

    (folder / "checkpoints").mkdir(parents=True)
    path = folder / "checkpoints" / "step_000001.pt"
    torch.save({"model": Evil()}, path)
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest(), encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)


def test_the_picture_is_drawn_with_what_was_measured(folder):
    pictures = []
    with opened(folder, landmarks={"guessing at random": 4.2}) as run:
        for measured in ({}, {"val_loss": 1.0}, {"hellaswag_acc_norm": 0.3}):
            run.log(record(len(pictures) + 1, **measured))
            run.draw()
            pictures.append((folder / "loss.png").read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and len(set(pictures)) == 3


def test_the_summary_adds_up_the_steps_and_takes_the_last_measurements(folder, capsys):
    with opened(folder, landmarks={"guessing at random": 1.0, "bigrams counted": 2.5}) as run:
        run.log(record(1, ms=40_000.0, tokens_per_s=1.0, mfu=0.2, val_loss=3.0, hellaswag_acc_norm=0.25))
        run.log(record(2, ms=50_000.0, tokens_per_s=2.0, mfu=0.4, val_loss=2.0, hellaswag_acc_norm=0.27))
        run.log(record(3, ms=3_600_000.0, tokens_per_s=9.0, mfu=0.3))
        found = run.summary()
        run.finish()
    assert found["time in training steps"] == "1 h 1 min 30 s" and found["tokens"] == "30"
    assert found["tokens/s, median"] == "2" and found["MFU, median"] == "30.0%"
    assert found["validation loss"] == "2.0000 nats per token, perplexity 7.39"
    assert found["HellaSwag acc_norm"].startswith("0.2700") and "0.2955" in found["HellaSwag acc_norm"]
    assert "bigrams counted" in capsys.readouterr().out


def test_characters_are_compared_with_no_tokens_of_gpt2(tmp_path):
    folder, tokens = tmp_path / "fineweb-mine", np.tile(np.arange(5), 40)
    write_dataset(folder, CharTokenizer("abcde", documents=False), {"train": [tokens], "val": [tokens[:90]]})
    assert GPT2_124M not in reference_losses(open_split(folder, "val"))


def test_a_live_run_is_not_moved_aside_by_one_that_starts_afresh(folder):
    with opened(folder) as run, pytest.raises(UserError, match="another process is writing"):
        run.log(record(1))
        Run(folder, {"max_steps": 9}, 0, {"guessing at random": 1.0}, afresh=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_samples_past_the_step_a_run_goes_on_from_are_left_out(folder):
    with opened(folder) as run:
        for step in (2, 4, 6):
            run.sample(step, f"text {step}")
    with opened(folder, step=5):
        pass
    written = (folder / "samples.txt").read_text(encoding="utf-8")
    assert "text 2" in written and "text 4" in written and "text 6" not in written


def test_a_restart_goes_on_only_with_what_the_same_launch_wrote(folder, monkeypatch):
    with opened(folder) as run:
        run.save(checkpoint(3, torch.zeros(1)), keep=1)
    assert find_checkpoint(folder, "never") == (None, None)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    assert find_checkpoint(folder, "never") == (None, None)  # another launch wrote it
    with opened(folder, step=3) as run:
        run.save(checkpoint(4, torch.zeros(1)), keep=1)
    assert find_checkpoint(folder, "never")[1]["step"] == 4


def test_a_run_that_began_with_another_s_checkpoint_goes_on_with_its_own(folder, tmp_path):
    with opened(tmp_path / "other") as run:
        run.save(checkpoint(2, torch.zeros(1)), keep=1)
    source = str(checkpoints(tmp_path / "other")[0])
    assert find_checkpoint(folder, source)[1]["step"] == 2
    with opened(folder, step=2, resume=source) as run:
        run.save(checkpoint(5, torch.zeros(1)), keep=1)
    assert find_checkpoint(folder, source)[1]["step"] == 5
    for config in ("{}", "damaged", "[]"):
        (tmp_path / "other" / "config.json").write_text(config, encoding="utf-8")
        with pytest.raises(UserError, match="did not begin with --resume"):
            find_checkpoint(tmp_path / "other", str(checkpoints(folder)[0]))


@pytest.mark.parametrize("name, published", [("fineweb-edu-10B", 3.2924), ("fineweb10B", 3.425), ("mine", None)])
def test_landmarks_are_what_the_text_gives_and_what_is_published_for_it(tmp_path, name, published):
    tokens = np.tile(np.arange(5), 40)
    write_dataset(tmp_path / name, gpt2(), {"train": [tokens], "val": [tokens[:90]]})
    found = reference_losses(open_split(tmp_path / name, "val"))
    assert found["guessing at random"] == pytest.approx(math.log(50257))
    assert found["token frequencies"] < found["guessing at random"]
    assert found.get(GPT2_124M) == published


def test_published_scores_stand_beside_hellaswag_s_own_questions_alone(folder):
    for own, file in [(True, ""), (False, "mine.jsonl")]:
        with opened(folder, hellaswag_input=file) as run:
            run.log(record(1, hellaswag_acc_norm=0.3))
            assert ("0.2955" in run.summary()["HellaSwag acc_norm"]) == own


def test_a_first_loss_far_from_that_of_guessing_is_a_warning_in_a_model_without_training(folder, capsys):
    for loss, init_from, warned in [(4.1, "", False), (3.0, "", True), (3.0, "gpt2", False)]:
        with opened(folder, landmarks={"guessing at random": 4.2}, init_from=init_from) as run:
            run.log(record(1) | {"loss": loss})
        said = f"warning: the first loss is {loss:.3f}, far from 4.200" in capsys.readouterr().err
        assert said == warned


def test_tensorboard_gets_every_number(folder):
    pytest.importorskip("tensorboard")
    with opened(folder, tensorboard=True) as run:
        run.log(record(1))
    assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("arguments", [["--count", "x"], ["--cuont", "1"], ["surplus"]])
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(capsys, arguments):
    def script(count: int = 1):
        return count

    with pytest.raises(SystemExit) as end:
        parse_options(lambda: tyro.cli(script, args=arguments))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "['" not in error
    assert arguments[0].removeprefix("--") in error


def test_errors_that_a_user_can_mend_are_one_line_and_others_keep_their_traceback(capsys):
    for error, status in [
        (UserError("two\nlines"), 2),
        (FileNotFoundError(2, "No such file", "x"), 2),
    ]:
        with pytest.raises(SystemExit) as end, exit_on_user_error():
            raise error
        assert end.value.code == status and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        raise ZeroDivisionError
