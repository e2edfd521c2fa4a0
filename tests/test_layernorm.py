"""layernorm.py: accuracy over awkward shapes and dtypes, extremes, errors, operator registration."""

import contextlib

import pytest
import torch
from accuracy import (
    DEVICE,
    approximations_of_a_gpu,
    before_a_wall,
    check_all,
    far_rows,
    new_memory_is_nan,
    plain_memory,
    results,
)

from kernels import layernorm
from kernels.layernorm import add_layer_norm, add_layer_norm_torch, layer_norm, layer_norm_reference, layer_norm_torch

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (2, 7), (5, 100), (33, 65), (3, 768), (2, 1000), (2, 1600), (1, 8192), (2, 3, 64)]


def add_layer_norm_reference(x, residual, weight, bias, eps):
    return layer_norm_reference(residual + x, weight, bias, eps), residual + x


def inputs(shape, dtype, weight_dtype=torch.float32, residual_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, dtype, scale=1.0, shift=0.0):
        numbers = torch.randn(size, generator=generator) * scale + shift
        return numbers.to(DEVICE, dtype).requires_grad_()

    tensors = {"x": normal(*shape, dtype=dtype, scale=2.0, shift=0.5)}
    if residual_dtype:
        tensors["residual"] = normal(*shape, dtype=residual_dtype, scale=3.0)
    tensors["weight"] = normal(shape[-1], dtype=weight_dtype, shift=1.0)
    tensors["bias"] = normal(shape[-1], dtype=weight_dtype)
    return tensors, normal(*shape, dtype=dtype).detach(), normal(*shape, dtype=residual_dtype or dtype).detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_is_as_right_as_pytorch_and_fills_every_element(shape, dtype):
    tensors, dy, _ = inputs(shape, dtype, weight_dtype=dtype)
    with new_memory_is_nan():
        check_all(layer_norm, layer_norm_torch, layer_norm_reference, tensors, (dy,), eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 100), (3, 768), (2, 1000)])
@pytest.mark.parametrize("stream", ["float32", "same"])
def test_add_layer_norm_is_as_right_as_pytorch_and_fills_every_element(shape, dtype, stream):
    residual_dtype = torch.float32 if stream == "float32" else dtype
    weight_dtype = torch.float32 if stream == "float32" else dtype
    tensors, dy, dsummed = inputs(shape, dtype, weight_dtype, residual_dtype)
    with new_memory_is_nan():
        check_all(add_layer_norm, add_layer_norm_torch, add_layer_norm_reference, tensors, (dy, dsummed), eps=EPS)


def test_more_rows_than_the_programs_take_at_once(monkeypatch):
    monkeypatch.setattr(layernorm, "LAUNCH", {"sm_80": (1024, 3)})  # 3 programs for 100 rows: 34, 33 and 33 each
    tensors, dy, _ = inputs((100, 65), torch.float32)
    check_all(layer_norm, layer_norm_torch, layer_norm_reference, tensors, (dy,), eps=EPS)


@pytest.mark.parametrize(
    ("C", "gpu", "forward_warps", "backward_warps", "programs"),
    [
        (768, "sm_80", 1, 1, 864),
        (1280, "sm_80", 1, 2, 432),
        (1600, "sm_90", 2, 2, 528),
        (1600, "sm_120", 2, 4, 340),
        (1600, "gfx942", 2, 2, 432),
        (1999, "sm_80", 8, 8, 108),
    ],
)
def test_warps_suit_the_row_and_the_gpu(C, gpu, forward_warps, backward_warps, programs):
    assert layernorm.launch_parameters(C) == {"BLOCK_C": 1024 if C == 768 else 2048, "num_warps": forward_warps}
    found, launch = layernorm.backward_launch_parameters(65_536, C, gpu)
    assert (found, launch["num_warps"]) == (programs, backward_warps)
    assert layernorm.backward_launch_parameters(17, C, gpu)[0] == 2  # of at least 16 rows each


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_may_go_unused(output):
    """Behind the last block nobody uses the sum; the sum alone does not depend on weight and bias."""
    tensors, dy, dsummed = inputs((4, 48), torch.float32, residual_dtype=torch.float32)
    for name in ("weight", "bias"):
        tensors[name].requires_grad_(output == 0)

    def only(function):
        return lambda **arguments: function(**arguments)[output]

    versions = [only(f) for f in (add_layer_norm, add_layer_norm_torch, add_layer_norm_reference)]
    check_all(*versions, tensors, ((dy, dsummed)[output],), eps=EPS)


@pytest.mark.parametrize(
    "row",
    [
        torch.full((100,), 3.0),  # no variance at all
        torch.cat([torch.zeros(99), torch.tensor([3e4])]),  # one number dwarfs the rest
        1e3 + torch.randn(100, generator=torch.Generator().manual_seed(1)) / 8,  # large mean, small variance
        torch.full((100,), 1e-20),
    ],
    ids=["constant", "one huge", "large mean", "tiny"],
)
@pytest.mark.parametrize("arithmetic", [contextlib.nullcontext, approximations_of_a_gpu])
def test_extreme_rows(row, arithmetic):
    tensors, dy, _ = inputs((3, 100), torch.float32)
    tensors["x"] = row.repeat(3, 1).to(DEVICE).requires_grad_()
    with arithmetic():
        check_all(layer_norm, layer_norm_torch, layer_norm_reference, tensors, (dy,), eps=EPS)


def test_reference_is_pytorch_in_float64_and_differentiable():
    x, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 7), (7,), (7,)))
    torch.testing.assert_close(layer_norm_reference(x, weight, bias, EPS), layer_norm_torch(x, weight, bias, EPS))
    assert torch.autograd.gradcheck(lambda *args: layer_norm_reference(*args, EPS), (x, weight, bias))


def test_inputs_need_not_be_contiguous():
    tensors, dy, dsummed = inputs((48, 40), torch.float32, residual_dtype=torch.float32)
    tensors["x"] = tensors["x"].detach().t().requires_grad_()
    tensors["residual"] = tensors["residual"].detach().reshape(40, 48)[:, :].requires_grad_()
    tensors["weight"], tensors["bias"] = (torch.randn(96, device=DEVICE)[::2].requires_grad_() for _ in range(2))
    upstream = (dy.t(), dsummed.new_ones(1, 1).expand(40, 48))
    check_all(add_layer_norm, add_layer_norm_torch, add_layer_norm_reference, tensors, upstream, eps=EPS)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows_give_no_rows_and_zero_gradients(shape):
    tensors, dy, dsummed = inputs(shape, torch.float32, residual_dtype=torch.float32)
    with new_memory_is_nan():
        found = results(add_layer_norm, tensors, (dy, dsummed), eps=EPS)
    assert found["output 0"].shape == found["dx"].shape == shape
    assert (found["dweight"] == 0).all() and (found["dbias"] == 0).all()


def test_under_autocast_y_has_the_dtype_of_the_next_product_and_the_stream_stays_float32():
    tensors, _, _ = inputs((4, 32), torch.bfloat16, residual_dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, summed = add_layer_norm(**tensors, eps=EPS)
        assert (y.dtype, summed.dtype) == (torch.bfloat16, torch.float32)
        assert layer_norm(summed, tensors["weight"], tensors["bias"], EPS).dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum() + summed.sum(), list(tensors.values()))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    y, _ = add_layer_norm(**tensors, eps=EPS)
    assert y.dtype == torch.float32


@plain_memory
def test_nothing_is_read_past_the_end_of_a_tensor():
    tensors, dy, dsummed = inputs((3, 100), torch.float32, residual_dtype=torch.float32)
    tensors = {name: before_a_wall(tensor) for name, tensor in tensors.items()}
    upstream = (before_a_wall(dy), before_a_wall(dsummed))
    check_all(add_layer_norm, add_layer_norm_torch, add_layer_norm_reference, tensors, upstream, eps=EPS)


@plain_memory
def test_offsets_pass_two_to_the_31():
    """Three rows 2^30 columns long, of which the kernels look at 16. Were the offset an int32, this would crash."""
    C, cols = 2**30 + 16, 16
    x, y, numbers = far_rows(3, C, cols), far_rows(3, C, cols), torch.arange(16.0)
    x[2].copy_(numbers)
    weight, bias, mean, rstd = torch.ones(cols), torch.zeros(cols), torch.zeros(3), torch.zeros(3)
    layernorm._forward_kernel[(3,)](x[0], None, weight, bias, None, y[0], mean, rstd, 1.0, C=C, BLOCK_C=cols)
    torch.testing.assert_close(y[2].float(), numbers, atol=1e-2, rtol=0)

    y[2].zero_()
    parts = far_rows(3, C, cols, torch.float32)[0]  # for dweight and dbias both: neither is looked at
    arguments = (x[0], None, x[0], weight, mean, torch.ones(3), y[0], None, parts, parts, 3)
    layernorm._backward_kernel[(3,)](*arguments, C=C, BLOCK_C=cols)
    torch.testing.assert_close(y[2].float(), numbers, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 9)}, r"weight and bias must be \(9,\), got \(8,\) and \(8,\)"),
        ({"residual": torch.zeros(3, 8)}, r"x and residual must have one shape, got \(2, 8\) and \(3, 8\)"),
        ({"weight": torch.zeros(8, dtype=torch.float64)}, "weight is torch.float64: the kernels take float32"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "x is torch.int64"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta, x on cpu: move them together"),
        ({"x": torch.zeros(2, 8193)}, "takes rows of 1 to 8192 elements, and a row has 8193"),
    ],
)
def test_a_wrong_argument_is_named(change, sentence):
    arguments = {"x": torch.zeros(2, 8), "residual": torch.zeros(2, 8), "weight": torch.ones(8), "bias": torch.ones(8)}
    with pytest.raises(ValueError, match=sentence):
        add_layer_norm(**arguments | change, eps=EPS)


def test_the_operators_are_registered_soundly():
    tensors, dy, dsummed = inputs((3, 40), torch.bfloat16, residual_dtype=torch.float32)
    x, residual, weight, bias = tensors.values()
    torch.library.opcheck(layernorm._layer_norm, (x, None, weight, bias, EPS, torch.float32))
    torch.library.opcheck(layernorm._layer_norm, (x, residual, weight, bias, EPS, torch.bfloat16))
    stats = torch.ones(3, device=DEVICE)
    for second, dtype in ((None, torch.float32), (dsummed, torch.bfloat16)):
        arguments = (dy, second, residual.detach(), weight.detach(), stats, stats, dtype)
        torch.library.opcheck(layernorm._backward, arguments)
