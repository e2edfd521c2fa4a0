"""Training: what a step computes, exact resume after every kind of interruption, and each mistake a person can make."""

import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from hellaswag_questions import write_questions
from runs import assert_same_run, command, curve, limit_files, start, train, wait_for_step, weights

import train_gpt2
from data import pydocs, shards, text, tokenizer
from data.files import as_flag
from model import GPT, GPTConfig
from training import optimizer
from training.checkpoint import checkpoints, load_checkpoint, newest_checkpoint
from training.expected import first_losses
from training.run import read_log

# -------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_all_its_files_and_learns(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=30, lr=1e-2, checkpoint_every=4) == 0
    log = read_log(out)
    assert [record["step"] for record in log] == list(range(1, 31))
    assert [record["tokens"] for record in log] == [256 * step for step in range(1, 31)]
    assert abs(log[0]["loss"] - math.log(104)) < 0.2
    assert log[-1]["loss"] < log[0]["loss"] - 1.0
    assert set(curve(out, "val_loss")) == {*range(5, 31, 5)}
    assert {"loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu"} <= set(log[0])
    assert json.loads((out / "config.json").read_text())["n_embd"] == 32
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "samples.txt").read_text().count("steps\n") == 5
    kept = [path.name for path in sorted((out / "checkpoints").glob("*.pt"))]
    assert kept == [f"step_{step:06d}.pt" for step in (24, 28, 30)]
    printed = capsys.readouterr().out
    assert "validation loss" in printed and "30 steps of 256 tokens" in printed


def test_the_same_seed_gives_the_same_bits_and_another_seed_or_order_does_not(dataset, tmp_path):
    runs = {"a": {"seed": 1}, "b": {"seed": 1}, "c": {"seed": 2}, "d": {"seed": 1}}
    for name, options in runs.items():
        assert train(dataset, tmp_path / name, *["--no-shuffle"] * (name == "d"), dropout=0.1, **options) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert curve(tmp_path / "a") != curve(tmp_path / "c")
    assert curve(tmp_path / "a") != curve(tmp_path / "d")


def test_hellaswag_is_scored_when_due_and_drawn(dataset, tmp_path, capsys):
    questions = write_questions(tmp_path / "questions.jsonl")
    out, options = tmp_path / "run", {"hellaswag_every": 5, "hellaswag_input": questions}
    assert train(dataset, out, **options) == 0
    assert set(curve(out, "hellaswag_acc")) == set(curve(out, "hellaswag_acc_norm")) == {5, 10, 12}
    assert all(20 * score == round(20 * score) for score in curve(out, "hellaswag_acc_norm").values())
    assert "HellaSwag acc_norm" in capsys.readouterr().out
    assert train(dataset, tmp_path / "without") == 0
    assert curve(tmp_path / "without") == curve(out)  # looking changes nothing
    questions.write_text("{}\n", encoding="utf-8")
    assert "line 1: not a HellaSwag question" in refused(capsys, dataset, tmp_path / "new", **options)


def test_two_micro_batches_are_one_big_batch(dataset, tmp_path):
    for micro_batch in (8, 4, 1):
        assert train(dataset, tmp_path / str(micro_batch), micro_batch=micro_batch, optimizer="adamw") == 0
    for micro_batch in (4, 1):
        for name in ("loss", "val_loss", "grad_norm"):
            small, big = curve(tmp_path / str(micro_batch), name), curve(tmp_path / "8", name)
            assert small == pytest.approx(big, abs=1e-6 if name != "grad_norm" else 1e-5), name


def test_validation_takes_the_same_tokens_whatever_the_batch(dataset, tmp_path):
    batches = {"a": {}, "b": {"batch_tokens": 32, "micro_batch": 1}, "c": {"batch_tokens": 96 * 32}}
    for name, options in batches.items():
        assert train(dataset, tmp_path / name, max_steps=1, lr=1e-12, warmup_steps=0, **options) == 0
    a, b, c = (curve(tmp_path / name, "val_loss")[1] for name in "abc")
    assert a == pytest.approx(b, abs=1e-6) and a == pytest.approx(c, abs=1e-6)


# ----------------------------------------------------------------------------------------------------- pure functions


def test_presets_are_the_published_ones():
    presets = {name: config for name, (_, config) in train_gpt2.PRESETS.items()}
    c = presets["gpt2-124m"]
    assert (c.batch_tokens, c.block_size, c.max_steps, c.warmup_steps) == (524_288, 1024, 18_795, 715)
    assert (c.lr, c.weight_decay, optimizer.BETAS, c.grad_clip) == (6e-4, 0.1, (0.9, 0.95), 1.0)
    c = presets["shakespeare-char"]
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.dropout) == (6, 6, 384, 256, 0.2)
    assert c.batch_tokens == 64 * 256
    for size in ("124m", "350m", "774m", "1558m"):
        plain, quick = presets[f"gpt2-{size}"], presets[f"gpt2-{size}-fast"]
        assert quick.shape(50257) == plain.shape(50257) and quick.out_dir == f"runs/gpt2-{size}-fast"
        assert (quick.max_steps, quick.batch_tokens, quick.optimizer, quick.zero_init) == (6400, 524_288, "muon", True)
    assert (presets["gpt2-124m-fast"].lr, presets["gpt2-1558m-fast"].lr) == (3.6e-3, 2.5e-3)
    assert (presets["gpt2-124m-fast"].weight_decay, presets["gpt2-1558m-fast"].weight_decay) == (0.15, 0.05)
    counts = {"124m": 124_439_808, "350m": 354_823_168, "774m": 774_030_080, "1558m": 1_557_611_200}
    for size, count in counts.items():
        with torch.device("meta"):
            model = GPT(presets[f"gpt2-{size}"].shape(50257))
        assert model.parameter_count() == count and model.config.n_embd == 64 * model.config.n_head


def test_auto_micro_batch_divides_the_batch_on_a_cpu(dataset, tmp_path, capsys):
    assert train(dataset, tmp_path / "run", batch_tokens=256 * 5, micro_batch="auto", max_steps=2) == 0
    assert "40 sequences per micro-step" in capsys.readouterr().out
    assert train(dataset, tmp_path / "big", batch_tokens=1000 * 32, micro_batch="auto", max_steps=1) == 0
    assert "500 sequences per micro-step" in capsys.readouterr().out  # 16,000 tokens


# ------------------------------------------------------------------------------------------------------- interruptions


FORTY = {"max_steps": 40, "dropout": 0.1, "checkpoint_every": 10, "keep": 5}  # dropout: so that random numbers count


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """Forty steps without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train(dataset, out, **FORTY) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(dataset, tmp_path, straight, number):
    out = tmp_path / "run"
    process = start(command(dataset, out, **FORTY))
    wait_for_step(process, out, 20)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + number, errors
    stopped_at = newest_checkpoint(out)[1]["step"]
    assert f"stopped at {stopped_at} of 40: the same command resumes" in shown
    assert errors.count("\nstopping once this step is done and saved; a second time exits at once\n") == 1
    assert stopped_at == read_log(out)[-1]["step"] and 20 <= stopped_at < 40
    assert train(dataset, out, **FORTY) == 0
    assert_same_run(straight, out)


def test_a_second_signal_exits_at_once(dataset, tmp_path):
    out = tmp_path / "run"
    process = start(command(dataset, out, batch_tokens=2**21, micro_batch=512))  # a step takes half a minute
    wait_for_step(process, out, 0)
    for _ in range(2):
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - sent < 10.0
    assert not read_log(out) and not list((out / "checkpoints").glob("*.pt"))  # the step in flight was not finished


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(dataset, tmp_path, straight):
    out = tmp_path / "run"
    process = start(command(dataset, out, **FORTY))
    wait_for_step(process, out, 25)
    process.kill()
    process.communicate()
    assert newest_checkpoint(out)[1]["step"] >= 20
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 26, "lo')  # as a kill in the middle of a line leaves it
    (out / "checkpoints" / ".step_000030.pt.0a1b2c3d.tmp").write_bytes(b"half a checkpoint")
    assert train(dataset, out, **FORTY) == 0
    assert_same_run(straight, out)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(dataset, tmp_path, straight, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, **FORTY) == 0
    newest, before = sorted((out / "checkpoints").glob("*.pt"), reverse=True)[:2]
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    before.write_bytes(before.read_bytes()[:-100])
    assert train(dataset, out, **FORTY) == 0
    warnings = capsys.readouterr().err
    assert f"{newest} is corrupt" in warnings and f"{before} is corrupt" in warnings
    assert_same_run(straight, out)
    for path in (out / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes() + b"x")
    assert "--resume never starts fresh" in refused(capsys, dataset, out, max_steps=41)
    assert len(read_log(out)) == 40


def test_a_finished_run_says_so_can_go_on_longer_and_is_moved_by_resume_never(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    for max_steps in (4, 4, 6):
        assert train(dataset, out, max_steps=max_steps) == 0
    printed = capsys.readouterr().out
    assert printed.count("has done its 4 steps: raise --max-steps, or use --resume never") == 1
    assert [record["step"] for record in read_log(out)] == [1, 2, 3, 4, 5, 6]
    old = (out / "log.jsonl").read_bytes()
    for number in (1, 2):
        assert train(dataset, out, max_steps=2, resume="never") == 0
        assert len(read_log(out)) == 2
        assert (tmp_path / f"run.{number}").is_dir()
    assert (tmp_path / "run.1" / "log.jsonl").read_bytes() == old


def test_a_run_that_goes_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(dataset, tmp_path):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=8, checkpoint_every=2) == 0
    assert train(dataset, out, max_steps=6, keep=1, resume=out / "checkpoints" / "step_000004.pt") == 0
    assert [path.name for path in (out / "checkpoints").glob("*.pt")] == ["step_000006.pt"]
    assert load_checkpoint(out / "checkpoints" / "step_000008.pt.old")["step"] == 8  # set aside, not lost
    assert [record["step"] for record in read_log(out)] == [1, 2, 3, 4, 5, 6]


def test_two_runs_cannot_write_to_one_folder(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    process = start(command(dataset, out, max_steps=100_000))
    wait_for_step(process, out, 2)
    assert "another process is writing" in refused(capsys, dataset, out)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM


def test_out_of_memory_is_an_error_line_on_a_cpu_too(dataset, tmp_path, capsys):
    message = refused(capsys, dataset, tmp_path / "run", n_embd=4_000_000, n_head=1)
    assert "the model takes at least" in message and "lower --n-layer" in message


def test_resume_from_a_named_checkpoint(dataset, tmp_path, straight):
    checkpoint = straight / "checkpoints" / "step_000020.pt"
    assert train(dataset, tmp_path / "run", max_steps=22, dropout=0.1, resume=checkpoint) == 0
    assert [record["step"] for record in read_log(tmp_path / "run")] == [21, 22]
    assert curve(tmp_path / "run")[21] == curve(straight)[21]


def test_init_from_takes_the_weights_of_a_run_also_at_a_shorter_block(dataset, tmp_path, straight):
    assert train(dataset, tmp_path / "a", init_from=straight, max_steps=1, lr=1e-9, block_size=16) == 0
    assert curve(tmp_path / "a")[1] < curve(straight)[1] - 0.5


# --------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *args, **options) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert train(*args, **options) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and errors.rstrip().endswith(lines[0]) and "Traceback" not in errors, errors
    return lines[0]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"n_embd": 33}, "--n-embd 33 is not divisible by --n-head 2"),
        ({"batch_tokens": 250}, "--batch-tokens 250 does not divide evenly .* must be a multiple of 256"),
        ({"micro_batch": 3}, "--micro-batch 3 .* must be a multiple of 96"),
        ({"micro_batch": 0}, "--micro-batch is 0, but must be above 0"),
        ({"micro_batch": "many"}, "--micro-batch"),
        ({"max_steps": 0}, "--max-steps is 0, but must be above 0"),
        ({"lr": -1}, "--lr is -1.0, but must be above 0"),
        ({"lr": "fast"}, "--lr.*'fast'"),
        ({"lr": "nan"}, "--lr is nan, but must be above 0"),
        ({"dropout": 1.5}, "--dropout is 1.5"),
        ({"lr": "inf"}, "--lr is inf"),
        ({"min_lr": -1}, "--min-lr is -1.0"),
        ({"min_lr": 1}, "--min-lr 1.0 is above --lr 0.004"),
        ({"n_layer": 10**9}, "the model takes at least"),
        ({"batch_tokens": 32 * 10**12}, "a step.s batch takes at least"),
        ({"min_lr": "nan"}, "--min-lr is nan"),
        ({"seed": 10**30}, "--seed is 10"),
        ({"device": "meta"}, "--device meta cannot be used"),
        ({"kernels": " attention", "dropout": 0.1}, "the Triton attention has no dropout"),
        ({"no_such_option": 1}, "--no-such-option"),
        ({"kernels": "layernorm,gelo"}, "'layernorm,gelo': use all, none, or a comma-separated list of layernorm"),
        ({"kernels": "all", "dropout": 0.1}, "the Triton attention has no dropout"),
        ({"device": "bogus"}, "--device bogus cannot be used"),
        ({"hellaswag_every": 5, "hellaswag_input": "no/such.jsonl"}, "no/such.jsonl"),
        ({"optimizer": "muon", "n_layer": 0}, "--n-layer 0 has none: use adamw"),
        ({"optimizer": "muon", "parallel": "fsdp"}, "--optimizer muon needs full matrices"),
        ({"ema": 9, "parallel": "fsdp", "optimizer": "adamw"}, "--ema averages full weights"),
        ({"diagnose": 5, "parallel": "zero1"}, "--diagnose needs all weights on one rank"),
        ({"parallel": "zero1"}, "--parallel zero1 needs several processes"),
        ({"parallel": "fsdp", "optimizer": "adamw"}, "--parallel fsdp needs several processes"),
        ({"max_step": 5}, "did you mean --max-steps"),
        ({"resume": "no/such.pt"}, "no/such.pt cannot be read"),
        ({"init_from": "no/such/model"}, "--init-from no/such/model: use one of gpt2"),
        ({"init_from": "gpt3"}, "gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
    ],
)
def test_a_wrong_option_is_named_before_any_data_is_prepared(tmp_path, capsys, options, expected):
    assert re.search(expected, refused(capsys, "pydocs", tmp_path / "run", **options))
    assert not (tmp_path / "run").exists() and not Path("datasets").exists()


def test_data_that_does_not_suffice_is_named(dataset, tmp_path, capsys):
    assert "there is no dataset in no/such" in refused(capsys, "no/such", tmp_path / "run")
    long = {"block_size": 65536, "batch_tokens": 65536, "micro_batch": 1}
    assert "lower --block-size or give more text" in refused(capsys, dataset, tmp_path / "run", **long)
    folder, tokens = tmp_path / "dataset", tokenizer.CharTokenizer.train("abc", documents=False)
    shards.write_dataset(folder, tokens, {"train": [tokens.encode("abc" * 100)], "val": [tokens.encode("abc" * 10)]})
    assert re.search(r"val split .* 30 tokens.* --block-size 32", refused(capsys, folder, tmp_path / "run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_triton_without_a_gpu_names_the_way_out(dataset, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = start(command(dataset, tmp_path / "run", kernels="all"), env=environment)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert "--kernels none" in errors and "TRITON_INTERPRET=1" in errors


def test_a_damaged_shard_is_named(tmp_path, capsys):
    folder = tmp_path / "dataset"
    pydocs.prepare(folder)
    shard = folder / "train_000000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    assert "train_000000.npy" in refused(capsys, folder, tmp_path / "run")
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert "sha256" in refused(capsys, folder, tmp_path / "run")
    shard.write_bytes(whole)
    assert train(folder, tmp_path / "run", max_steps=1) == 0


def test_an_output_folder_that_cannot_be_written_is_named(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in refused(capsys, dataset, tmp_path / "file" / "run")


def test_a_full_disk_is_named_and_leaves_nothing_half_written(dataset, tmp_path):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=4) == 0
    process = start(command(dataset, out, max_steps=8), preexec_fn=limit_files(100_000))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors and re.search(r"^error: .*(too large|space)", errors, re.MULTILINE), errors
    assert [path.name for path in (out / "checkpoints").glob("*.pt")] == ["step_000004.pt"]
    assert not list(out.rglob("*.tmp")) and not list(out.rglob(".*.tmp"))
    assert train(dataset, out, max_steps=8) == 0


def test_a_checkpoint_of_another_shape_is_refused(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=1) == 0
    before = (out / "log.jsonl").read_bytes()
    message = refused(capsys, dataset, out, n_layer=3, max_steps=2)
    assert "--n-layer 2 (now 3)" in message and "--resume never" in message
    for name, value in [("optimizer", "adamw"), ("seed", 7), ("batch_tokens", 512), ("block_size", 16)]:
        assert f"{as_flag(name)} " in refused(capsys, dataset, out, max_steps=2, **{name: value})
    other = tmp_path / "other"
    (tmp_path / "text").write_text("another text, of fewer characters\n" * 100, encoding="utf-8")
    text.prepare([tmp_path / "text"], other)
    assert "another vocabulary" in refused(capsys, other, out, max_steps=2)
    assert "has another tokenizer" in refused(capsys, other, tmp_path / "new", init_from=out)
    (tmp_path / "text").write_text("".join(map(chr, range(1000, 1104))) * 10, encoding="utf-8")  # 104 other characters
    text.prepare([tmp_path / "text"], other)
    assert "has another tokenizer" in refused(capsys, other, tmp_path / "new", init_from=out)
    assert (out / "log.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=4) == 0
    good = (out / "checkpoints" / "step_000004.pt").read_bytes()
    message = refused(capsys, dataset, out, max_steps=30, lr=1e15, optimizer="muon", grad_clip=0)
    assert re.search(r"step \d+ has loss .*(nan|inf).*checkpoints in .* unchanged", message)
    assert (out / "checkpoints" / "step_000004.pt").read_bytes() == good
    assert newest_checkpoint(out)[1]["step"] < int(re.search(r"step (\d+)", message)[1])
    for tensor in weights(out).values():
        assert tensor.isfinite().all()


def test_services_that_are_not_installed_are_named(dataset, tmp_path, capsys):
    if not importlib.util.find_spec("wandb"):
        assert "pip install wandb" in refused(capsys, dataset, tmp_path / "run", "--wandb")
    if not importlib.util.find_spec("tensorboard"):
        assert "pip install tensorboard" in refused(capsys, dataset, tmp_path / "run", "--tensorboard")


def test_a_plan_is_printed_and_nothing_is_trained(dataset, tmp_path, capsys):
    assert train(dataset, tmp_path / "run", "--plan") == 0
    printed = capsys.readouterr().out
    count = GPT(GPTConfig(2, 2, 32, 32, 104)).parameter_count()
    assert f"{count:,} parameters" in printed and "H100" in printed
    assert not (tmp_path / "run").exists()


def test_profile_writes_a_trace_of_a_short_run_too_and_without_samples_none_is_named(dataset, tmp_path, capsys):
    assert train(dataset, tmp_path / "run", "--profile", max_steps=3, sample_tokens=0) == 0
    assert "run holds loss.png, log.jsonl and checkpoints\n" in capsys.readouterr().out
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_a_warmup_that_never_ends_is_a_warning(dataset, tmp_path, capsys):
    for warmup_steps in (1, 2):
        assert train(dataset, tmp_path / "run", max_steps=2, warmup_steps=warmup_steps, resume="never") == 0
        warned = "--warmup-steps 2 is not below --max-steps 2: the learning rate never falls" in capsys.readouterr().err
        assert warned == (warmup_steps == 2)


def test_the_dropout_mask_is_a_function_of_seed_step_rank_and_micro_batch(dataset, tmp_path):
    for micro_batch in (8, 4):
        assert train(dataset, tmp_path / str(micro_batch), micro_batch=micro_batch, dropout=0.5, max_steps=3) == 0
    assert curve(tmp_path / "8")[1] != pytest.approx(curve(tmp_path / "4")[1], abs=1e-5)


def test_the_character_preset_starts_as_random_weights_do_and_learns_at_its_own_size(dataset, tmp_path):
    options = ["--max-steps", "4", "--batch-tokens", "512", "--eval-tokens", "512", "--no-compile", "--dropout", "0"]
    options += ["--sample-tokens", "20", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        train_gpt2.main(["shakespeare-char", "--data", str(dataset), "--out-dir", str(tmp_path / "run"), *options])
    losses = curve(tmp_path / "run")
    low, high = first_losses(train_gpt2.PRESETS["shakespeare-char"][1].shape(104), identity=True)
    assert end.value.code == 0 and low < losses[1] < high and losses[4] < losses[1]


@pytest.mark.skipif(" " in torch.__file__, reason="PyTorch passes its own path to the C++ compiler without quotes")
def test_compiled_training_also_validates_samples_and_saves_under_the_plain_names(dataset, tmp_path):
    options = {"max_steps": 3, "n_layer": 1, "eval_every": 1, "sample_every": 1}
    assert train(dataset, tmp_path / "plain", **options) == 0
    assert train(dataset, tmp_path / "compiled", "--compile", **options) == 0
    for name in ("loss", "val_loss"):
        compiled, plain = curve(tmp_path / "compiled", name), curve(tmp_path / "plain", name)
        assert compiled == pytest.approx(plain, abs=1e-3), name
    assert list(weights(tmp_path / "compiled")) == list(weights(tmp_path / "plain"))


def test_another_text_under_the_same_name_is_refused_and_an_option_of_a_newer_version_has_its_default(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    for words in ("the cat sat ", "sat the cat "):
        (tmp_path / "text").write_text(words * 200, encoding="utf-8")
        text.prepare([tmp_path / "text"], data)
        if not out.exists():
            assert train(data, out, max_steps=2) == 0
    assert "prepared anew from another text" in refused(capsys, data, out, max_steps=3)
    (tmp_path / "text").write_text("the cat sat " * 200, encoding="utf-8")
    text.prepare([tmp_path / "text"], data)
    change(out, lambda held: (held["run"].pop("shuffle"), held.pop("data")))  # as older versions wrote it
    assert train(data, out, max_steps=3) == 0


def change(out, alter):
    """Alter the newest checkpoint of a run, and give it the right sha256."""
    path = checkpoints(out)[0]
    held = torch.load(path, weights_only=True)
    alter(held)
    torch.save(held, path)
    Path(f"{path}.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest(), encoding="utf-8")


def test_an_optimizer_s_state_that_does_not_fit_is_refused_before_it_corrupts_the_memory(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=1, optimizer="adamw") == 0
    intact = checkpoints(out)[0].read_bytes()

    def moments(value):
        return lambda held: held["optimizers"][0]["state"][0].update(exp_avg=value)

    for alter in (
        moments(torch.zeros(2)),
        moments(torch.full((104, 32), math.nan)),
        moments(None),
        lambda held: held.update(optimizers=[]),
        lambda held: held["optimizers"][0].update(state={}),
        lambda held: held.update(step=7),
        lambda held: held["model"].popitem(),
    ):
        checkpoints(out)[0].write_bytes(intact)
        change(out, alter)
        message = refused(capsys, dataset, out, max_steps=2, optimizer="adamw")
        assert "step_000001.pt is not a checkpoint of this model" in message or "can be read" in message


def test_a_run_that_was_killed_after_its_last_checkpoint_gets_its_end(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=4) == 0
    picture = (out / "loss.png").read_bytes()
    (out / "loss.png").unlink()
    (out / ".loss.png.0a1b2c3d.tmp").write_bytes(b"half")
    (out / "checkpoints" / "step_000002.pt.sha256").write_text("orphan", encoding="utf-8")
    capsys.readouterr()
    assert train(dataset, out, max_steps=4) == 0
    assert "validation loss" in capsys.readouterr().out and (out / "loss.png").read_bytes() == picture
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step_000004.pt", "step_000004.pt.sha256"}
    assert not list(out.glob(".*.tmp"))


def test_a_checkpoint_of_the_run_itself_is_the_start_only_once(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=8, checkpoint_every=2) == 0
    start_at = out / "checkpoints" / "step_000004.pt"
    for last in (6, 7):
        assert train(dataset, out, max_steps=last, keep=1, resume=start_at) == 0
    printed = capsys.readouterr().out
    assert [printed.count(f"resuming {out} after step {step}") for step in (4, 6)] == [1, 1]
