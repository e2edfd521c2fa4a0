"""Checkpoints: what is written, every kind of damage, which one a run resumes from, and who may resume at all."""

import gc
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.files import UserError
from training import checkpoint
from training.checkpoint import checkpoints, find_checkpoint, load_checkpoint, newest_checkpoint
from training.distributed import Distributed
from training.run import Run

PYTHON = "from training import checkpoint; print(checkpoint.launch_name(), end='')"


def saved(step, weight):
    rest = {"optimizers": [], "config": {}, "tokenizer": {}, "run": {}, "micro_batch": 1}
    return {"step": step, "model": {"weight": weight}} | rest


def written(folder, step, keep=1, **config):
    """The checkpoint of a run that has just written it."""
    with Run(folder, {"max_steps": 9} | config, step, {}) as run:
        run.save(saved(step, torch.full((3,), float(step))), keep)
    return checkpoints(folder)[0]


def found(folder, resume):
    return (find_checkpoint(folder, resume, Distributed())[1] or {"step": 0})["step"]


def test_checkpoints_come_back_and_only_the_newest_are_kept(tmp_path):
    with Run(tmp_path, {"max_steps": 9}, 0, {}) as run:
        for step in (1, 2, 999_000, 1_000_000):
            run.save(saved(step, torch.full((3,), float(step))), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_1000000.pt", "step_999000.pt"]
    path, newest = newest_checkpoint(tmp_path)
    assert path == checkpoints(tmp_path)[0] and newest["model"]["weight"].tolist() == [1e6] * 3
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4  # two files and their sha256


def test_every_kind_of_damage_is_found(tmp_path):
    path = written(tmp_path, 1)
    intact = path.read_bytes()
    for damaged in (intact[:-1], intact + b"x", b"", intact[:900] + bytes([intact[900] ^ 4]) + intact[901:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is corrupt: its sha256"):
            load_checkpoint(path)
        with pytest.raises(UserError, match="--resume never"):
            newest_checkpoint(tmp_path)
    path.write_bytes(intact)
    assert load_checkpoint(path)["step"] == 1
    sha256 = path.with_name(path.name + ".sha256")
    sha256.write_text("another", encoding="utf-8")
    assert load_checkpoint(path, verify=False)["step"] == 1  # only one rank of a machine hashes
    with pytest.raises(UserError, match="corrupt"):
        load_checkpoint(path)
    sha256.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)
    for other in ({"weight": torch.zeros(1)}, [1]):
        torch.save(other, path)
        sha256.write_text(hashlib.sha256(path.read_bytes()).hexdigest(), encoding="utf-8")
        with pytest.raises(UserError, match="is not a checkpoint of train_gpt2.py"):
            load_checkpoint(path)
    sha256.unlink()
    with pytest.raises(UserError, match="sha256, .*written beside it, is missing"):
        load_checkpoint(path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(UserError, match="after step 3 are not finite"):
        checkpoint.save_checkpoint(tmp_path / "step_000003.pt", saved(3, torch.tensor([1.0, float("nan")])))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_runs_no_code_when_it_is_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))

    path = tmp_path / "step_000001.pt"
    torch.save({"model": Evil()}, path)
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest(), encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_mapped_from_the_file_until_training_has_its_copies(tmp_path):
    def mapped():
        return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")

    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    path = tmp_path / "step_000001.pt"
    checkpoint.save_checkpoint(path, saved(1, parameter.detach()) | {"optimizers": [optimizer.state_dict()]})
    loaded = load_checkpoint(path)
    assert mapped()
    Distributed().load_optimizer_state(optimizer, loaded["optimizers"][0])
    del loaded
    gc.collect()
    assert not mapped() and optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.1] * 3)


def test_a_restart_resumes_only_what_the_same_launch_wrote(tmp_path, monkeypatch):
    written(tmp_path, 3)
    assert found(tmp_path, "never") == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    assert found(tmp_path, "never") == 0  # another launch wrote it
    written(tmp_path, 4)
    assert found(tmp_path, "never") == 4


def test_launches_without_an_id_are_told_apart(tmp_path, monkeypatch):
    """torchrun calls every one of them "none"."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    written(tmp_path, 4)
    assert found(tmp_path, "never") == 4
    name = subprocess.run([sys.executable, "-c", PYTHON], capture_output=True, text=True, check=True).stdout
    (tmp_path / ".launch").write_text(name, encoding="utf-8")
    assert name and found(tmp_path, "never") == 0


def test_a_run_that_started_with_another_s_checkpoint_resumes_its_own(tmp_path):
    source = written(tmp_path / "other", 2)
    assert found(tmp_path / "run", str(source)) == 2
    written(tmp_path / "run", 5, resume=str(source))
    assert found(tmp_path / "run", str(source)) == 5
    for config in ("{}", "damaged", "[]"):
        (tmp_path / "other" / "config.json").write_text(config, encoding="utf-8")
        with pytest.raises(UserError, match="did not start with --resume"):
            found(tmp_path / "other", str(checkpoints(tmp_path / "run")[0]))


def test_a_checkpoint_that_has_done_all_steps_is_no_start_of_a_new_run(tmp_path):
    source = written(tmp_path / "other", 6)
    with pytest.raises(UserError, match="has done 6 steps: --max-steps is 6, but must be above"):
        checkpoint.check_resume(tmp_path / "new", str(source), max_steps=6)
    checkpoint.check_resume(tmp_path / "new", str(source), max_steps=7)
    checkpoint.check_resume(tmp_path / "other", str(source), max_steps=6)  # its own run says that it has finished
    with pytest.raises(UserError, match="nothing.pt cannot be read"):
        checkpoint.check_resume(tmp_path / "new", str(Path("nothing.pt")), max_steps=6)
