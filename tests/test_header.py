"""training/header.py: what a run says before its first step."""

import pytest
import torch
from runs import train

from training.header import rough_time


@pytest.mark.parametrize(
    "seconds, text",
    [(3, "10 s"), (44, "40 s"), (89, "90 s"), (100, "2 min"), (5000, "83 min"), (9000, "2.5 h"), (200_000, "2.3 days")],
)
def test_a_duration_is_as_rough_as_what_is_known_of_it(seconds, text):
    assert rough_time(seconds) == text


def test_a_run_opens_with_what_will_happen_and_how_long_it_should_take(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=4) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"4 steps of 256 tokens from {dataset} into {out}: about 10 s of training"
    assert rest[0] == "0.03M parameters: 2 layers, 2 heads, 32 channels"
    assert rest[2] == "muon, learning rate 0.004, of AdamW's parameters 0.004, cosine, 3 steps of warmup"
    assert rest[3].startswith(
        f"1 x cpu ({torch.get_num_threads()} threads), float32, 8 sequences per micro-step, Triton"
    )


def test_a_resumed_run_says_after_which_step_and_with_which_other_options(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, max_steps=4) == 0
    capsys.readouterr()
    assert train(dataset, out, max_steps=6, keep=2) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"resuming {out} after step 4, with other options: --max-steps 4 (now 6), --keep 3 (now 2)"
    assert second.startswith("steps 5 to 6 of 256 tokens")
