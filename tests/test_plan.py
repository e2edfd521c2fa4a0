"""training/plan.py: the dry run."""

import dataclasses
import subprocess
import sys

import pytest

import train_gpt2
from kernels.gpus import GPUS
from kernels.report import roofline
from training import memory, plan
from training.plan import Job, UserError, of_preset


def text_of(capsys, *words: str) -> str:
    plan.main(list(words))
    return capsys.readouterr().out


def test_presets_are_those_of_the_training_script():
    assert plan.RUNS.keys() == train_gpt2.PRESETS.keys()
    for name, (_, config) in train_gpt2.PRESETS.items():
        job = of_preset(name)
        for field in ("n_layer", "n_head", "n_embd", "block_size", "batch_tokens", "max_steps"):
            assert getattr(job, field) == getattr(config, field), (name, field)
        for field in ("optimizer", "dropout", "keep"):
            assert getattr(job, field) == getattr(config, field), (name, field)


def test_the_published_run_of_llm_c_comes_out():
    """8 A100s: 300 ms a step, 9.9B tokens in 94 minutes, 1.75M tokens/s; its 52 % leave attention's products out."""
    tokens = 9.9e9
    job = of_preset("gpt2-124m", world_size=8, max_steps=round(tokens / 524_288))
    shape = job.shape()
    mfu = 0.52 * roofline.flops_per_token(shape) / (6 * roofline.parameters(shape))
    assert mfu == pytest.approx(0.596, abs=0.001)
    found = plan.time_and_cost(job, "A100", mfu, price=2.0)
    assert found["ms"] == pytest.approx(300, rel=0.02)
    assert found["hours"] * 60 == pytest.approx(94, rel=0.02)
    assert found["tokens_per_s"] == pytest.approx(1.75e6, rel=0.02)
    assert found["cost"] == pytest.approx(found["hours"] * 16)


def test_the_whole_plan_reads_as_it_should(capsys):
    shown = text_of(capsys, "--preset", "gpt2-124m", "--gpu", "A100", "--mfu", "0.5", "--price", "1.5")
    rows = of_preset("gpt2-124m", world_size=8).memory(64)
    for part in (
        "124,439,808 parameters, 855.2M FLOPs a token",
        "19,073 steps of 524,288 tokens: 10.000B tokens, 8.55e+18 FLOPs",
        "micro-batch of 64 sequences, 1 micro-step(s) a step, bfloat16",
        "36.1 bytes a token and channel",
        f"total                         {plan.amount(sum(rows.values())):>10}",
        "A100 80 GB yes 64 1,459,365 359 1.90 h 15.2 22.8",  # 0.5 x 8 x 312e12 / 855.2e6; 10e9 tokens; 15.2 x 1.5
        "data 20.0 GB, 2 bytes a token, if none comes twice",
        "checkpoints 5.97 GB: 3 kept and one being written, 1.49 GB each",
    ):
        assert " ".join(part.split()) in " ".join(shown.split()), part


@pytest.mark.parametrize("words", [["--preset", name] for name in plan.RUNS] + [["--all"], ["--scale"]], ids=str)
def test_every_output_is_plain_text_of_at_most_100_columns_and_says_model(capsys, words):
    gpus = [] if words[-1] not in ("laptop", "shakespeare-char") else ["--gpus", "1"]
    shown = text_of(capsys, *words, *gpus)
    assert "odel" in shown and shown.isascii()
    assert max(len(line) for line in shown.splitlines()) <= 100
    if words == ["--all"]:
        assert all(f"\n  {name} " in shown for name in plan.RUNS)


def test_the_table_of_presets_says_where_not_one_sequence_fits(capsys):
    lines = text_of(capsys, "--all", "--gpu", "RTX 4090").splitlines()
    seqs = {line.split()[0]: line.split()[5] for line in lines[-6:]}
    assert seqs["gpt2-1558m"] == "none" and int(seqs["gpt2-124m"]) > 1
    assert "37.6 GB" in lines[-1]  # what one would need


@pytest.mark.parametrize("parallel", memory.MODES)
def test_the_largest_micro_batch_fits_and_the_next_one_does_not(parallel):
    job = of_preset("gpt2-1558m", world_size=8, parallel=parallel)
    most = job.largest_micro_batch("A100")
    assert 1 <= most < job.sequences
    assert sum(job.memory(most).values()) <= plan.room("A100") < sum(job.memory(2 * most).values())
    assert plan.room("A100") == pytest.approx(76e9)
    assert f"{most} sequences, {job.sequences // most} micro-step(s)" in plan.plan(job, ["A100"])
    fixed = dataclasses.replace(job, micro_batch=2 * most)
    (row,) = [line for line in plan.plan(fixed, ["A100"]).splitlines() if line.startswith("  A100")]
    assert "NO" in row


def test_what_is_asked_for_changes_what_is_planned():
    whole, job = plan.plan, of_preset("gpt2-124m", world_size=8)
    assert whole(job, ["A100"]) != whole(dataclasses.replace(job, kernels="none"), ["A100"])
    assert "micro-batch of 32 sequences, 2 micro-step(s)" in whole(dataclasses.replace(job, micro_batch=32))
    assert "second copy of the gradients" in whole(dataclasses.replace(job, micro_batch=32))
    assert "copies for autocast" not in whole(dataclasses.replace(job, dtype="float32", micro_batch=8))
    assert "of the fullest rank" in whole(dataclasses.replace(job, parallel="zero1"))
    assert job.data_bytes() == 2 * 524_288 * 19_073
    assert dataclasses.replace(job, vocab_size=65_537).data_bytes() == 4 * 524_288 * 19_073
    assert dataclasses.replace(job, data_tokens=10).data_bytes() == 20
    bigram = of_preset("laptop", n_layer=0, optimizer="adamw")
    assert "0 layers" in whole(bigram, ["L4"])
    assert set(plan.plan(job, list(GPUS)).split()) >= {"MI300X", "B200", "L40S"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--preset", "gpt3"], "--preset gpt3: use one of laptop, "),
        (["--gpu", "A100", "TPU"], "--gpu TPU: use some of B200, "),
        (["--mfu", "40"], "--mfu is 40.0, but must be above 0 and at most 1"),
        (["--mfu", "nan"], "--mfu is nan"),
        (["--price", "-1"], "--price is -1.0"),
        (["--gpus", "0"], "--gpus is 0, but must be at least 1"),
        (["--gpus", "7"], "cannot be cut evenly among 7 GPUs"),
        (["--micro-batch", "48"], "--micro-batch 48 and sequences of 1024: it must be a multiple of 393216"),
        (["--micro-batch", "many"], "--micro-batch many: use a number of sequences, or auto"),
        (["--micro-batch", "0"], "--micro-batch is 0, but must be at least 1, or auto"),
        (["--parallel", "tp"], "--parallel tp: use one of ddp, zero1, fsdp"),
        (["--kernels", "relu"], "use all, none, or a comma-separated list"),
        (["--max-steps", "0"], "--max-steps is 0, but must be at least 1"),
        (["--preset", "gpt2-1558m", "--gpu", "L4"], "one sequence needs 37.6 GB on each of 8 GPU(s)"),
        (["--speed"], "unrecognized arguments: --speed"),
        (["--scale", "--mfu", "0"], "--mfu is 0.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line_that_names_it(capsys, words, said):
    with pytest.raises(SystemExit) as exit:
        plan.main(words)
    out, error = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_job_checks_itself_wherever_it_comes_from():
    with pytest.raises(UserError, match="--n-head is 0"):
        Job(1, 0, 32, 8, 100, 8, 1)


def test_the_command_line_works_as_a_module():
    command = [sys.executable, "-m", "training.plan", "--gpu", "H100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("gpt2-124m: 12 layers"), done.stderr
