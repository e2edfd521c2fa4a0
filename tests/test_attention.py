"""attention.py: accuracy over awkward lengths and head sizes, causality, extremes, errors, operator registration."""

import itertools

import pytest
import torch
from accuracy import DEVICE, before_a_wall, check_all, far_rows, new_memory_is_nan, plain_memory, results

from kernels import attention
from kernels.attention import causal_attention, causal_attention_reference, causal_attention_torch
from kernels.common import emulate_gpu
from kernels.report.machine_code import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2", "ignore:All-NaN slice")  # both meant
OPTIONS = {"dropout_p": 0.0}
bfloat16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter's tl.dot is wrong in bfloat16
VERSIONS = (causal_attention, causal_attention_torch, causal_attention_reference)


def inputs(B, T, n_head, D, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3 * n_head * D, generator=generator) * scale
    dy = torch.randn(B, T, n_head * D, generator=generator)
    bias = torch.zeros(3 * n_head * D, device=DEVICE, requires_grad=True)
    return {"qkv": qkv.to(DEVICE, dtype).requires_grad_(), "bias": bias}, (dy.to(DEVICE, dtype),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bfloat16])
@pytest.mark.parametrize(
    ("B", "T", "n_head", "D"),
    [(1, 1, 1, 16), (3, 7, 2, 16), (1, 64, 1, 64), (1, 127, 2, 64), (2, 128, 1, 64), (1, 200, 1, 64)]
    + [(1, 256, 1, 32), (1, 65, 1, 80), (1, 128, 1, 96), (1, 129, 1, 128), (2, 33, 1, 17)],
)
def test_it_is_as_right_as_pytorch_and_fills_every_element(B, T, n_head, D, dtype):
    tensors, upstream = inputs(B, T, n_head, D, dtype)
    with new_memory_is_nan():
        check_all(*VERSIONS, tensors, upstream, n_head=n_head, **OPTIONS)


def tiles(T, D, dtype, gpu):
    """What one call launches: of each kernel the blocks and warps, as a row of the table has them, and its key."""
    launches = {kernel: attention.launch_parameters(kernel, T, D, dtype, gpu) for kernel in attention.LAUNCH}
    sizes = ("BLOCK_Q", "BLOCK_K", "num_warps")
    return frozenset((kernel, dtype.itemsize, *(launch[s] for s in sizes)) for kernel, launch in launches.items())


CALLS = {  # what is launched -> the first call that launches it
    tiles(T, D, dtype, gpu): (T, D, dtype, gpu)
    for gpu in reversed(ARCHITECTURES)
    for T, D in [(256, 64), (150, 64), (128, 128), (100, 128), (64, 64)]
    for dtype in [torch.float32 if T == 64 else torch.float16]
}


@pytest.mark.parametrize(("T", "D", "dtype", "gpu"), CALLS.values())
def test_the_tiles_of_every_gpu_are_as_right_as_pytorch(T, D, dtype, gpu):
    tensors, upstream = inputs(1, T, 1, D, dtype)
    with emulate_gpu(gpu), new_memory_is_nan():
        check_all(*VERSIONS, tensors, upstream, n_head=1, **OPTIONS)


def test_no_row_of_the_launch_table_goes_untested():
    rows = {
        (kernel, heads.bits // 8, *tile[:3])  # not the stages, which the interpreter ignores
        for kernel, sizes in attention.LAUNCH.items()
        for heads, gpus in sizes.items()
        for launch in gpus.values()
        for tile in launch
    }
    assert rows == frozenset.union(*CALLS)


def test_any_number_of_sequences_and_heads_is_launched_in_parts_that_a_grid_can_hold(monkeypatch):
    tensors, upstream = inputs(5, 20, 3, 16, torch.float32)
    at_once = results(causal_attention, tensors, upstream, n_head=3, **OPTIONS)
    monkeypatch.setattr(attention, "MAX_HEADS", 7)  # two sequences per launch, and one in the last
    in_parts = results(causal_attention, tensors, upstream, n_head=3, **OPTIONS)
    assert all(torch.equal(at_once[name], in_parts[name]) for name in at_once)


def test_the_length_of_gpt2():
    tensors, upstream = inputs(1, 1024, 1, 64, torch.float16)
    with new_memory_is_nan():
        check_all(*VERSIONS, tensors, upstream, n_head=1, **OPTIONS)


@pytest.mark.parametrize("T", [128, 150])
def test_a_later_token_does_not_touch_an_earlier_row(T):
    """Not by a bit: neither forward nor, through the gradient of an earlier row, backward."""
    tensors, (dy,) = inputs(1, T, 1, 32, torch.float16)
    here = 70
    dy[:, here:] = 0
    before = results(causal_attention, tensors, (dy,), n_head=1, **OPTIONS)
    with torch.no_grad():
        tensors["qkv"][:, here:] = 50.0
    after = results(causal_attention, tensors, (dy,), n_head=1, **OPTIONS)
    assert torch.equal(before["output 0"][:, :here], after["output 0"][:, :here])
    assert torch.equal(before["dqkv"][:, :here], after["dqkv"][:, :here])
    assert (after["dqkv"][:, here:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_nan_in_one_head_stays_in_it(dtype):
    """20 channels are 32 in registers: what is read there must not be the next head's."""
    tensors, (dy,) = inputs(1, 150, 3, 20, dtype)
    healthy = results(causal_attention, tensors, (dy,), n_head=3, **OPTIONS)
    with torch.no_grad():
        tensors["qkv"].view(1, 150, 3, 3, 20)[:, :, :, 1] = torch.nan
    sick = results(causal_attention, tensors, (dy,), n_head=3, **OPTIONS)
    for name, shape in (("output 0", (1, 150, 3, 20)), ("dqkv", (450, 3, 20))):
        assert torch.equal(healthy[name].view(shape)[..., ::2, :], sick[name].view(shape)[..., ::2, :])
        assert sick[name].view(shape)[..., 1, :].isnan().all()


@pytest.mark.parametrize("extreme", ["all equal", "one key takes all", "zeros", "falling"])
def test_extreme_scores(extreme):
    tensors, upstream = inputs(1, 70, 1, 16, torch.float32)
    with torch.no_grad():
        q, k, _ = tensors["qkv"].view(70, 3, 16).unbind(1)
        if extreme == "all equal":
            q.fill_(30.0), k.fill_(30.0)
        elif extreme == "one key takes all":
            q.fill_(50.0), k[::7].fill_(50.0)  # scores of 10,000 among small ones
        elif extreme == "zeros":
            q.zero_()
        else:
            q.fill_(10.0), k.copy_(-torch.arange(70.0)[:, None].expand(70, 16))  # each block below the ones before
    check_all(*VERSIONS, tensors, upstream, n_head=1, **OPTIONS)


def test_the_saved_lse_is_that_of_the_scores():
    tensors, _ = inputs(2, 40, 2, 16, torch.float32)
    _, lse = attention._causal_attention(tensors["qkv"], None, 2)
    q, k, _ = tensors["qkv"].detach().double().view(2, 40, 3, 2, 16).permute(2, 0, 3, 1, 4)
    s = (q @ k.mT / 4).masked_fill(torch.ones(40, 40, dtype=torch.bool, device=DEVICE).triu(1), -torch.inf)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_reference_is_pytorch_in_float64_and_differentiable():
    qkv = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(causal_attention_reference(qkv, 2, 0.0), causal_attention_torch(qkv, 2, 0.0))
    assert torch.autograd.gradcheck(lambda qkv: causal_attention_reference(qkv, 2, 0.0), qkv)


def test_inputs_need_not_be_contiguous():
    _, (dy,) = inputs(2, 20, 1, 16, torch.float32)
    qkv = torch.randn(20, 2, 96, device=DEVICE).transpose(0, 1)[:, :, ::2].requires_grad_()
    for upstream in (dy.transpose(0, 1).contiguous().transpose(0, 1), dy.new_ones(()).expand(2, 20, 16)):
        check_all(*VERSIONS, {"qkv": qkv}, (upstream,), n_head=1, **OPTIONS)


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_no_tokens_give_no_tokens(B, T):
    tensors, upstream = inputs(B, T, 1, 16, torch.float32)
    found = results(causal_attention, tensors, upstream, n_head=1, **OPTIONS)
    assert found["output 0"].shape == (B, T, 16) and found["dqkv"].shape == (B, T, 48)


@plain_memory
@pytest.mark.parametrize(("T", "D"), [(7, 16), (70, 20), (128, 32)])
def test_nothing_is_read_past_the_end_of_a_tensor(T, D):
    tensors, (dy,) = inputs(2, T, 1, D, torch.float16)
    tensors["qkv"] = before_a_wall(tensors["qkv"])
    check_all(*VERSIONS, tensors, (before_a_wall(dy),), n_head=1, **OPTIONS)


@plain_memory
def test_offsets_pass_two_to_the_31():
    """The first block of the second of two sequences of 2^26 tokens. Were the offset an int32, this would crash."""
    T, block, D = 2**26, 16, 16
    qkv, dqkv = (far_rows(2, T * 3 * D, block * 3 * D) for _ in range(2))
    y, dy = (far_rows(2, T * D, block * D) for _ in range(2))
    lse, delta = (far_rows(2, T, block, torch.float32) for _ in range(2))
    tensors, (gradient,) = inputs(1, block, 1, D, torch.float16)
    qkv[1].copy_(tensors["qkv"].detach().flatten())
    dy[1].copy_(gradient.flatten())
    exact = results(causal_attention, tensors, (gradient,), n_head=1, **OPTIONS)
    launch = {"H": 1, "D": D, "BLOCK_Q": block, "BLOCK_K": block, "BLOCK_D": D, "EVEN": True}
    attention._forward_kernel[(1, 2)](qkv[0], y[0], lse[0], D**-0.5, T, **launch)
    torch.testing.assert_close(y[1], exact["output 0"].flatten())
    arguments = (qkv[0], y[0], dy[0], lse[0], delta[0], dqkv[0], None, D**-0.5, T)
    attention._backward_dq_kernel[(1, 2)](*arguments, **launch)
    torch.testing.assert_close(dqkv[1].view(block, 3, D)[:, 0], exact["dqkv"].view(block, 3, D)[:, 0])


@pytest.mark.parametrize("kernel", attention.LAUNCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_launch_table_covers_every_head_and_its_blocks_fit_into_each_other(kernel, dtype):
    for D, T, gpu in itertools.product(range(16, 129), (1, 96, 127, 128, 1000, 1024), ARCHITECTURES):
        launch = attention.launch_parameters(kernel, T, D, dtype, gpu)
        outer, inner = launch["BLOCK_Q"], launch["BLOCK_K"]
        if kernel == "backward_dkdv":
            outer, inner = inner, outer
        assert outer % inner == 0 and launch["BLOCK_D"] >= D
        assert launch["EVEN"] == (T % outer == 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dropout_p": 0.1}, "no dropout, and dropout is 0.1: leave .* --kernels layernorm,gelu,cross_entropy"),
        ({"n_head": 5}, r"qkv must be \(B, T, 3C\) with C a multiple of n_head 5, got \(1, 4, 96\)"),
        ({"bias": torch.zeros(32)}, r"bias must be \(96,\), got \(32,\)"),
        ({"qkv": torch.zeros(4, 96)}, r"qkv must be \(B, T, 3C\)"),
        ({"n_head": 4}, "takes heads of 16 to 128 channels, and a head has 8: leave attention to PyTorch"),
        ({"qkv": torch.zeros(1, 1, 3 * 160), "n_head": 1}, "and a head has 160"),
        ({"qkv": torch.zeros(1, 4, 96, dtype=torch.float64)}, "qkv is torch.float64: the kernels take float32"),
    ],
)
def test_a_wrong_argument_is_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        causal_attention(**{"qkv": torch.zeros(1, 4, 96), "n_head": 2, "dropout_p": 0.0} | change)


def test_the_operators_are_registered_soundly():
    tensors, (dy,) = inputs(2, 5, 2, 16, torch.float32)
    lse = torch.ones(2, 2, 5, device=DEVICE)
    for bias in (tensors["bias"], None):
        torch.library.opcheck(attention._causal_attention, (tensors["qkv"], bias, 2))
        arguments = (dy, tensors["qkv"].detach(), dy.clone(), lse, 2, bias is not None)
        torch.library.opcheck(attention._backward, arguments)


@pytest.mark.gpu
def test_under_autocast_it_runs_in_bfloat16():
    tensors, upstream = inputs(2, 40, 2, 16, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(causal_attention, tensors, upstream, n_head=2, **OPTIONS)
    assert found["output 0"].dtype == torch.bfloat16 and found["dqkv"].dtype == torch.float32
