"""training/memory.py: the plan of a GPU's memory against what PyTorch really keeps, on a CPU."""

import gc
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import model
import train_gpt2
from kernels import select
from kernels.gpus import GPUS
from kernels.report import roofline
from kernels.report.shapes import Shape
from training import memory, plan
from training.distributed import Distributed
from training.optimizer import Muon, make_optimizers, parameter_groups

SMALL, WIDE = Shape(2, 12, 32, 2, 2, 200), Shape(1, 20, 48, 3, 1, 700)
BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
# On a CPU PyTorch's fused attention takes float16 but not bfloat16, which it writes out: float16 stands for both
CASES = [("all", torch.bfloat16), ("all", torch.float32), ("none", torch.float16), ("none", torch.float32)]


def make(shape: Shape, kernels: str = "none") -> model.GPT:
    config = model.GPTConfig(shape.L, shape.H, shape.C, shape.T, shape.V)
    return model.GPT(config, select(kernels, "cpu"))


def loss_of(gpt: model.GPT, shape: Shape, dtype: torch.dtype, tokens: list[torch.Tensor]) -> torch.Tensor:
    with torch.autocast("cpu", dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32):
        return gpt(*tokens)


def draw_tokens(shape: Shape) -> list[torch.Tensor]:
    return [torch.randint(0, shape.V, (shape.B, shape.T)) for _ in range(2)]


@pytest.mark.parametrize("shape", [SMALL, WIDE, Shape(1, 8, 32, 2, 0, 128)], ids=["small", "wide", "no blocks"])
def test_parameters_and_flops_are_those_of_the_model(shape):
    gpt = make(shape)
    found = {name.removeprefix("transformer."): tuple(p.shape) for name, p in gpt.named_parameters()}
    assert list(memory.parameter_shapes(shape).items()) == list(found.items())
    assert memory.numbers(shape) == sum(p.numel() for p in gpt.parameters())
    assert roofline.parameters(shape) == gpt.parameter_count()
    assert roofline.flops_per_token(shape) == gpt.flops_per_token()


@pytest.mark.parametrize("kernels, dtype", CASES)
@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.filterwarnings("ignore:overflow encountered")  # bfloat16 in the interpreter: values wrong, sizes right
def test_activations_are_what_autograd_saves_to_three_percent(shape, kernels, dtype):
    gpt, tokens, kept = make(shape, kernels), draw_tokens(shape), {}
    weights = {p.untyped_storage().data_ptr() for p in gpt.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(gpt, shape, dtype, tokens)
    kept |= {tensor.data_ptr(): tensor for tensor in tokens}
    measured = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    number_bytes, triton = BYTES[dtype], kernels == "all"
    planned = shape.L * memory.block_saved(shape, number_bytes) + memory.ends_saved(shape)
    planned += memory.cast_bytes(shape, number_bytes, triton) + memory.head_saved(shape, number_bytes, triton)
    assert planned == pytest.approx(measured, rel=0.03)


def peak_bytes(function) -> int:
    """Of what `function` allocates, the most that lived at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    "kernels, dtype, shape",
    [
        ("none", torch.float32, Shape(4, 256, 64, 2, 1, 20)),  # the peak is in the last block's backward
        ("none", torch.float16, Shape(4, 256, 64, 2, 1, 20)),
        ("none", torch.float32, Shape(4, 128, 64, 4, 3, 1000)),  # in the head's
        ("none", torch.float16, Shape(4, 128, 64, 4, 3, 1000)),
        ("all", torch.float32, Shape(1, 32, 32, 2, 1, 700)),  # in the head's forward
    ],
)
def test_the_peak_is_what_the_allocator_sees_to_five_percent(kernels, dtype, shape):
    gpt, tokens = make(shape, kernels), draw_tokens(shape)

    def micro_step():
        loss = loss_of(gpt, shape, dtype, tokens)
        gc.collect()  # Triton's interpreter leaves tensors in reference cycles
        loss.backward()

    for p in gpt.parameters():  # as in all micro-steps but the first
        p.grad = torch.zeros_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = peak_bytes(micro_step)
    rows = memory.per_gpu(shape, BYTES[dtype], kernels == "all")
    before = sum(rows[name] for name in ("weights", "gradients", "optimizer state"))
    assert sum(rows.values()) - before == pytest.approx(measured + 16 * shape.N, rel=0.05)  # and the tokens


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_what_the_optimizers_hold_after_a_step(optimizer):
    shape = Shape(2, 48, 64, 2, 2, 200)
    gpt = make(shape)
    groups = parameter_groups(gpt.parameters(), 0.1)
    hidden = [p for p in gpt.transformer.h.parameters() if p.dim() == 2] if optimizer == "muon" else []
    others = [p for group in groups for p in group["params"] if not any(p is q for q in hidden)]
    optimizers = [torch.optim.AdamW(others, lr=1e-3, fused=True)]
    optimizers += [Muon(hidden, lr=1e-3, weight_decay=0.1)] if hidden else []
    loss_of(gpt, shape, torch.float32, draw_tokens(shape)).backward()
    for each in optimizers:
        each.step()
    states = [value for each in optimizers for state in each.state.values() for value in state.values()]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in states)
    assert memory.optimizer_bytes(shape, optimizer) == measured

    file = io.BytesIO()
    torch.save({"model": gpt.state_dict(), "optimizers": [each.state_dict() for each in optimizers]}, file)
    job = plan.Job(2, 2, 64, 48, 200, 96, 1, optimizer=optimizer)
    assert job.checkpoint_bytes() == pytest.approx(file.tell(), rel=0.06)  # zip headers weigh in at this size


@pytest.fixture
def eight_ranks():
    """Process 0 of a group of eight that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def test_zero1_deals_the_state_as_torch_does(eight_ranks):
    shape = Shape(1, 48, 64, 2, 3, 700)
    gpt = make(shape)
    sharded = ZeroRedundancyOptimizer(
        parameter_groups(gpt.parameters(), 0.1), optimizer_class=torch.optim.AdamW, lr=1e-3
    )
    theirs = [
        sorted(p.numel() for group in groups for p in group["params"]) for groups in sharded._partition_parameters()
    ]
    shapes = memory.parameter_shapes(shape)
    ours = [sorted(torch.Size(shapes[name]).numel() for name in names) for names in memory.deal(shapes, "adamw", 8)]
    assert ours == theirs
    fullest = max(sum(8 * numbers + 4 for numbers in rank) for rank in theirs)
    assert memory.optimizer_bytes(shape, "adamw", "zero1", 8) == fullest

    config = train_gpt2.Config(optimizer="muon")
    muon, adamw = make_optimizers(gpt, config, Distributed(world_size=8, mode="zero1"), torch.float32)
    theirs = [
        sorted(
            p.numel() for each in (muon, adamw) for group in each._partition_parameters()[rank] for p in group["params"]
        )
        for rank in range(8)
    ]
    assert [
        sorted(torch.Size(shapes[name]).numel() for name in names) for names in memory.deal(shapes, "muon", 8)
    ] == theirs


def test_fsdp_cuts_weights_as_torch_does(eight_ranks):
    from torch.distributed.fsdp import fully_shard

    gpt = make(SMALL)
    for module in [*gpt.transformer.h, gpt]:
        fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (8,)))
    mine = sum(p.to_local().numel() for p in gpt.parameters())
    rows = memory.per_gpu(SMALL, parallel="fsdp", world_size=8)
    assert rows["weights"] == rows["gradients"] == 4 * mine
    assert rows["optimizer state"] == 8 * mine + 4 * len(list(gpt.parameters()))


def test_ddp_holds_gradients_twice_while_micro_steps_add_up(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        gpt = make(SMALL)
        ddp = DistributedDataParallel(gpt, gradient_as_bucket_view=True)

        def stored():
            return {p.grad.untyped_storage().data_ptr() for p in gpt.parameters()}

        separate = []
        for _ in range(2):  # the second time, the buckets are in the order of the gradients
            for enabled in (False, True):
                ddp.require_backward_grad_sync = enabled
                ddp(*draw_tokens(SMALL)).backward()
                separate.append(len(stored()) == len(list(gpt.parameters())))
            gpt.zero_grad(set_to_none=True)
    finally:
        dist.destroy_process_group()
    assert separate == [True, False, True, False]  # on their own, then views into buckets
    second = "second copy of the gradients"
    assert second not in memory.per_gpu(SMALL, world_size=2)
    rows = memory.per_gpu(SMALL, world_size=2, micro_steps=2)
    assert rows[second] == rows["gradients"] == 4 * memory.numbers(SMALL)


def test_sharing_lowers_memory_in_the_order_ddp_zero1_fsdp_and_the_table_knows_every_gpu():
    shape = Shape(1, 1024, 1600, 25, 48, 50257)
    totals = [sum(memory.per_gpu(shape, parallel=mode, world_size=64).values()) for mode in memory.MODES]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3
    alone = [sum(memory.per_gpu(shape, parallel=mode, world_size=1).values()) for mode in memory.MODES]
    assert len(set(alone)) == 1
    assert memory.GIGABYTES.keys() == GPUS.keys()


def test_dropout_keeps_a_byte_a_number_for_three_masks_around_and_in_a_block():
    without, dropped = (memory.per_gpu(SMALL, dropout=dropout) for dropout in (False, True))
    more = sum(dropped.values()) - sum(without.values())
    assert more == SMALL.N * SMALL.C * (1 + 2 * SMALL.L)
