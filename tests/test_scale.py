"""training/scale.py: what data parallelism costs, on paper; its parts against PyTorch and against slower arithmetic."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist

import model
from kernels.report import roofline
from kernels.report.shapes import PRESETS, Shape
from training import memory, scale

SMALL = Shape(1, 16, 32, 2, 3, 300)
EVERY = [(preset, cluster, n) for preset in scale.MODELS for cluster in scale.CLUSTERS for n in (8, 16, 64, 256, 512)]


def test_gradients_arrive_in_the_order_of_the_model_s_backward():
    gpt, arrived = model.GPT(model.GPTConfig(SMALL.L, SMALL.H, SMALL.C, SMALL.T, SMALL.V)), []
    for name, parameter in gpt.named_parameters():
        name = name.removeprefix("transformer.")
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    tokens = torch.zeros(1, SMALL.T, dtype=torch.int64)
    gpt(tokens, tokens).backward()

    def by_layer(names):  # within a layer norm or a linear layer the order is PyTorch's affair
        return [name.rpartition(".")[0] for name in names]

    ours = [name for name, _, _ in scale.backward_order(SMALL)]
    assert list(dict.fromkeys(by_layer(ours))) == list(dict.fromkeys(by_layer(arrived)))
    assert arrived[-1] == "wte.weight"  # tied: whole only at the very end


@pytest.mark.parametrize(
    "shape", [PRESETS["gpt2-124m"], PRESETS["gpt2-350m"], Shape(1, 128, 128, 2, 99, 1000)], ids=str
)
def test_buckets_are_those_that_ddp_makes(shape):
    order = scale.backward_order(shape)
    tensors = [torch.empty(numbers, device="meta") for _, numbers, _ in order]
    groups, _ = dist._compute_bucket_assignment_by_size(tensors, [scale.FIRST_BUCKET, scale.BUCKET])
    theirs = [sum(4 * order[i][1] for i in group) for group in groups]
    assert [size for size, _ in scale.buckets(shape)] == theirs
    assert sum(theirs) == 4 * memory.numbers(shape) and len(theirs) > 2


def test_readiness_rises_to_the_end_of_the_backward_and_follows_the_flops():
    shares = [share for _, share in scale.buckets(PRESETS["gpt2-124m"])]
    assert shares == sorted(shares) and 0 < shares[0] < 0.1 and shares[-1] == 1.0
    shape = PRESETS["gpt2-124m"]
    assert scale.backward_order(shape)[-1][2] == shape.L * (48 * shape.C**2 + 8 * shape.C * shape.T)


def ring_all_reduce(members: list[int], size: float, sent: dict[int, float]) -> None:
    """Play a ring: in each of 2 (n-1) turns, every member passes one n-th of `size` bytes to its neighbour."""
    for _ in range(2 * (len(members) - 1)):
        for member in members:
            sent[member] += size / len(members)


@pytest.mark.parametrize("n", [1, 2, 8, 16, 64])
def test_bytes_sent_are_those_of_rings_played_out(n):
    g = min(n, scale.NODE)
    nvlink, network = dict.fromkeys(range(n), 0.0), dict.fromkeys(range(n), 0.0)
    for first in range(0, n, g):
        ring_all_reduce(list(range(first, first + g)), 1.0, nvlink)
    for place in range(g):  # each place of a node reduces its own share with the same place of the others
        ring_all_reduce(list(range(place, n, g)), 1.0 / g, network)
    assert scale.sent(1.0, n) == pytest.approx((nvlink[0], network[0]))


def played_in_ticks(ready, seconds, end, tick):
    """The same simulation without arithmetic on times: a link that works off a queue, tick by tick."""
    waiting, left, now = [], list(zip(ready, seconds, strict=True)), 0.0
    while left or waiting:
        while left and left[0][0] <= now:
            waiting.append(left.pop(0)[1])
        if waiting:
            waiting[0] -= tick
            if waiting[0] <= 0:
                carried = waiting.pop(0)
                if waiting:
                    waiting[0] += carried  # what is left of the tick
        now += tick
    return max(0.0, now - end)


@pytest.mark.parametrize("bandwidth", [2e9, 2e10, 1e11])
def test_the_simulation_is_a_queue_before_a_link(bandwidth):
    parts, backward = scale.buckets(PRESETS["gpt2-124m"]), 0.03
    ready, seconds = [share * backward for _, share in parts], [size / bandwidth for size, _ in parts]
    found = scale.exposed(ready, seconds, backward)
    assert found == pytest.approx(played_in_ticks(ready, seconds, backward, 1e-5), abs=3e-4)
    unrolled = max(at + sum(seconds[i:]) for i, at in enumerate(ready)) - backward  # Lindley's recursion, written out
    assert found == pytest.approx(unrolled)


@pytest.mark.parametrize("preset, cluster, n", EVERY, ids=str)
def test_two_terms_come_within_two_percent_of_a_step_of_the_simulation_and_never_above(preset, cluster, n):
    found = scale.step(PRESETS[preset], n, cluster, mfu=0.4)
    assert found["estimate"] <= found["exposed"] * (1 + 1e-9)
    assert found["exposed"] - found["estimate"] <= 0.02 * found["total"]


@pytest.mark.parametrize("preset", scale.MODELS)
@pytest.mark.parametrize("cluster", scale.CLUSTERS, ids=str)
def test_efficiency_falls_with_gpus_and_every_change_helps(preset, cluster):
    shape = PRESETS[preset]
    found = [scale.step(shape, n, cluster, 0.4) for n in (1, 8, 64, 512)]
    rates = [step["efficiency"] for step in found]
    assert rates[0] == pytest.approx(1.0) and rates == sorted(rates, reverse=True)
    for n, step in zip((1, 8, 64, 512), found, strict=True):
        assert step["tokens"] * n == scale.BATCH_TOKENS
        assert step["total"] == pytest.approx(step["compute"] + step["adamw"] + step["exposed"])
        assert step["efficiency"] == pytest.approx(step["tokens_per_s"] / found[0]["tokens_per_s"] / n)
    for change in scale.CHANGES[1:]:
        assert scale.step(shape, 512, cluster, 0.4, change)["efficiency"] > rates[-1]
    below = scale.first_below(shape, cluster, 0.4, 0.75)
    assert scale.step(shape, below, cluster, 0.4)["efficiency"] < 0.75
    assert scale.step(shape, below // 2, cluster, 0.4)["efficiency"] >= 0.75


def test_only_the_last_micro_step_s_backward_hides_communication():
    shape, cluster = PRESETS["gpt2-1558m"], scale.CLUSTERS[0]
    step = scale.step(shape, 8, cluster, 0.4)
    assert step["micro_steps"] == 8
    of_blocks = 4 * 12 * shape.C**2 * shape.L + 8 * shape.C * shape.T * shape.L
    whole_backward = 8 * step["backward"]
    assert whole_backward / step["compute"] == pytest.approx(of_blocks / roofline.flops_per_token(shape))
    assert 0.6 < whole_backward / step["compute"] < 2 / 3  # the head's share belongs to the forward


@pytest.mark.parametrize("n", [8, 64])
def test_fsdp_gathers_twice_and_scatters_once_a_micro_step_and_shows_what_opens_and_ends_the_step(n):
    shape, cluster = PRESETS["gpt2-124m"], scale.CLUSTERS[0]
    sizes = memory.parameter_shapes(shape)
    ends = 2 * sum(math.prod(size) for name, size in sizes.items() if not name.startswith("h."))
    block = (2 * memory.numbers(shape) - ends) / shape.L
    ends, block = (scale.all_reduce_seconds(size, n, cluster) for size in (ends, block))
    for micro_steps in (1, 4):
        in_all, shown = scale.fsdp_seconds(shape, n, cluster, 1e9, micro_steps)
        assert in_all == pytest.approx(ends + shape.L * block * 3 * micro_steps / 2)
        assert shown == pytest.approx(ends)
        assert scale.fsdp_seconds(shape, n, cluster, 0.0, micro_steps)[1] == pytest.approx(in_all)


def test_faster_links_hide_more():
    slow = scale.CLUSTERS[2]
    fast = dataclasses.replace(slow, network=slow.network * 10)
    shape = PRESETS["gpt2-1558m"]
    assert scale.step(shape, 64, fast, 0.4)["hidden"] > scale.step(shape, 64, slow, 0.4)["hidden"]
    assert math.isclose(scale.step(shape, 64, fast, 0.4)["compute"], scale.step(shape, 64, slow, 0.4)["compute"])
