"""Several processes, by torchrun and gloo: the same losses for any number and mode, and what happens when one fails."""

import json
import os
import signal
import subprocess
import time
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hellaswag_questions import write_questions
from runs import ROOT, assert_same_run, command, curve, finished, ranks, torchrun, train, wait_for_step

from data import fineweb, text
from data.files import UserError
from data.tokenizer import byte_pairs
from model import GPT, GPTConfig
from training.checkpoint import newest_checkpoint
from training.distributed import Distributed, end_with_parent


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Options of a run of twenty steps that also answers twenty questions, twice."""
    questions = write_questions(tmp_path_factory.mktemp("questions") / "questions.jsonl")
    evaluations = {"eval_every": 10, "hellaswag_every": 10, "hellaswag_input": questions}
    return {"max_steps": 20, "optimizer": "adamw", "micro_batch": 2} | evaluations


@pytest.fixture(scope="module")
def alone(dataset, twenty, tmp_path_factory):
    """Twenty steps in a single process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert train(dataset, out, **twenty) == 0
    return out


def test_four_processes_give_the_losses_and_scores_of_one(dataset, tmp_path, twenty, alone):
    out = tmp_path / "four"
    for process in ranks(4, command(dataset, out, **twenty | {"micro_batch": 1})):
        finished(process)
    for name in ("loss", "val_loss", "grad_norm"):
        assert curve(out, name) == pytest.approx(curve(alone, name), abs=1e-5), name
    for name in ("hellaswag_acc", "hellaswag_acc_norm"):
        assert curve(out, name) == curve(alone, name) and set(curve(out, name)) == {10, 20}


def test_a_run_goes_on_in_another_mode_and_with_another_number_of_processes(dataset, tmp_path, twenty, alone):
    """Two processes of zero1, ended by SIGTERM to torchrun as when a job is preempted; then two of fsdp; then one."""
    out, steps = tmp_path / "run", [0]
    arguments = command(dataset, out, checkpoint_every=1000, **twenty)
    for mode in ("zero1", "fsdp"):
        process = torchrun(2, [*arguments, "--parallel", mode])
        wait_for_step(process, out, steps[-1] + 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)
        steps.append(newest_checkpoint(out)[1]["step"])
    assert 0 < steps[1] < steps[2] < 20
    assert train(dataset, out, **twenty) == 0
    for name in ("loss", "grad_norm", "val_loss"):
        assert curve(out, name) == pytest.approx(curve(alone, name), abs=1e-5), name
    assert curve(out, "hellaswag_acc_norm") == curve(alone, "hellaswag_acc_norm")


def test_prepared_trained_killed_and_restarted_a_run_ends_as_if_it_had_been_left_alone(tmp_path):
    """Web pages from a Parquet file become shards; two processes train, evaluate and answer; one of them is killed."""
    pages = [f"{title}\n{page}" for title, page in topics.items()][::4]
    pq.write_table(pa.table({"text": pages}), tmp_path / "pages.parquet")
    (tmp_path / "bpe.json").write_text(json.dumps(byte_pairs("gpt2", [b"th", b"the"]).spec()), encoding="utf-8")
    texts = {"input": (tmp_path / "pages.parquet",), "tokenizer": str(tmp_path / "bpe.json"), "shard_tokens": 20_000}
    fineweb.prepare(folder=tmp_path / "web", processes=2, **texts)
    questions = write_questions(tmp_path / "questions.jsonl")
    evaluations = {"eval_every": 10, "hellaswag_every": 10, "hellaswag_input": questions}
    evaluations |= {"checkpoint_every": 4, "sample_every": 0}
    options = {"max_steps": 24, "optimizer": "muon", "micro_batch": 2, "n_embd": 16} | evaluations
    for rank in ranks(2, command(tmp_path / "web", tmp_path / "left-alone", **options)):
        finished(rank)
    arguments = command(tmp_path / "web", tmp_path / "killed", **options)
    process = torchrun(2, arguments, options=("--max-restarts=1",))
    wait_for_step(process, tmp_path / "killed", 7)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert "lost contact with another rank" in finished(process)
    assert_same_run(tmp_path / "killed", tmp_path / "left-alone")
    for name in ("hellaswag_acc", "hellaswag_acc_norm"):
        assert curve(tmp_path / "killed", name) == curve(tmp_path / "left-alone", name)
    assert set(curve(tmp_path / "killed", "hellaswag_acc_norm")) == {10, 20, 24}


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return sorted(int(line) for line in listed.stdout.split())


def test_a_process_that_dies_brings_the_others_down_within_seconds(dataset, tmp_path):
    out = tmp_path / "run"
    options = {"optimizer": "adamw", "micro_batch": 2, "max_steps": 100_000, "checkpoint_every": 4}
    process = torchrun(2, command(dataset, out, **options))
    wait_for_step(process, out, 5)
    workers, began = children(process.pid), time.monotonic()
    os.kill(workers[-1], signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode != 0 and time.monotonic() - began < 20
    assert newest_checkpoint(out)[1]["step"] >= 4


POISONED = """
import os, sys, torch
sys.path.insert(0, {root!r})
import model, train_gpt2

calls = 0

def poison(module, arguments, output):
    global calls
    calls += isinstance(module, model.MLP) and module.training
    return output * float("nan") if isinstance(module, model.MLP) and calls == 9 else output

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        torch.nn.modules.module.register_module_forward_hook(poison)
    train_gpt2.main()
"""


def test_a_loss_that_is_not_finite_on_one_process_stops_all_at_the_same_step(dataset, tmp_path):
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(root=str(ROOT)), encoding="utf-8")
    options = {"optimizer": "adamw", "micro_batch": 2, "checkpoint_every": 2, "eval_every": 0, "sample_every": 0}
    process = torchrun(2, command(dataset, tmp_path / "run", **options), str(script))
    _, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    # two micro-steps of two layers make the ninth call step 3's; rank 0 prints the error, torchrun repeats both ranks'
    assert f"\n{errors}".count("\nerror: step 3 has loss nan") == 1
    assert errors.count("traceback : error: step 3 has loss nan") == 2
    assert newest_checkpoint(tmp_path / "run")[1]["step"] == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_see_other_data_say_so_before_the_first_step(tmp_path, damaged):
    """Each process in a folder of its own, where the dataset of the same name holds another text, or is damaged."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        source = tmp_path / f"{rank}.txt"
        source.write_text("abcdefg hijk. " * (200 + rank * (not damaged)), encoding="utf-8")
        text.prepare((source,), tmp_path / str(rank) / "mine")
    if damaged:
        with (tmp_path / "1" / "mine" / "train_000000.npy").open("r+b") as file:
            file.seek(1000)
            file.write(bytes(100))
    script = tmp_path / "elsewhere.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt2\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))\n"
        "if __name__ == '__main__':\n    train_gpt2.main()\n",
        encoding="utf-8",
    )
    processes = ranks(2, command("mine", "run", micro_batch=2), str(script))
    errors = "".join(process.communicate(timeout=240)[1] for process in processes)
    said = "train_000000.npy is corrupt" if damaged else "the ranks see different files in"
    assert [process.returncode for process in processes] == [2, 2] and said in errors, errors
    assert not (tmp_path / "0" / "run").exists()


def test_a_state_is_loaded_with_the_options_of_the_optimizer_that_takes_it():
    """AdamW keeps "step" on the CPU unless it is fused: a state saved without must suit one that is."""
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    saved, own = torch.optim.AdamW([weight], lr=0.1), torch.optim.AdamW([weight], lr=0.5, fused=True, weight_decay=0.25)
    saved.step()
    Distributed().load_optimizer_state(own, saved.state_dict())
    assert own.param_groups[0]["fused"] and own.param_groups[0]["lr"] == 0.5
    assert own.param_groups[0]["weight_decay"] == 0.25 and own.state[weight]["step"].item() == 1
    own.step()


def test_ddp_cuts_a_compiled_model_at_its_buckets_so_that_gradients_leave_during_the_backward():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=8, n_embd=512, block_size=8, vocab_size=500))  # 48 MiB, two buckets
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        compiled = torch.compile(model, backend=backend)
        Distributed(world_size=2).replicate(compiled)(tokens, tokens).backward()
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()
    assert len(graphs) > 1


@pytest.mark.parametrize(
    "odd",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "two"},
        {"RANK": "3"},
        {"WORLD_SIZE": "-1"},
        {"WORLD_SIZE": "0"},
        {"RANK": "\u0663"},
    ],
)
def test_variables_of_a_scheduler_without_torchrun_are_named(monkeypatch, odd):
    for name, value in odd.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{[*odd][0]}.* torchrun"):
        Distributed.from_env("ddp")
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "")
    assert Distributed.from_env("ddp") == Distributed()
    monkeypatch.setenv("WORLD_SIZE", "8")  # for --plan
    assert Distributed.from_env("zero1", joining=False).world_size == 8


def test_a_process_ends_once_torchrun_is_gone():
    read, write = os.pipe()
    if (launcher := os.fork()) == 0:
        parent = os.getpid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end_with_parent(parent)
            time.sleep(60)
        os._exit(0)
    os.close(write)
    os.waitpid(launcher, 0)
    began = time.monotonic()
    assert os.read(read, 1) == b"" and time.monotonic() - began < 30  # closed by its end
    os.close(read)
