"""gelu.py: accuracy over awkward shapes and dtypes, extremes, errors, operator registration."""

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

from kernels import gelu
from kernels.gelu import linear_gelu, linear_gelu_reference, linear_gelu_torch

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # exp(-2u) = inf, rightly: y is 0
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()

    C = shape[-1]
    tensors = {"x": normal(*shape), "weight": normal(width, C, scale=2 / C**0.5), "bias": normal(width)}
    return tensors, normal(*shape[:-1], width).detach()


def bias_gelu(z, bias):
    return gelu._bias_gelu(z, bias)


def bias_gelu_torch(z, bias):
    return torch.nn.functional.gelu(z + bias, approximate="tanh")


def bias_gelu_reference(z, bias):
    return linear_gelu_reference(z, torch.eye(z.shape[-1], dtype=z.dtype, device=z.device), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "width"),
    [((1, 1), 1), ((7, 16), 65), ((2, 9, 100), 400), ((33, 8), 513), ((3, 768), 3072), ((2, 4), 6400)],
)
def test_it_is_as_right_as_pytorch_and_fills_every_element(shape, width, dtype):
    tensors, dy = inputs(shape, width, dtype)
    with new_memory_is_nan():
        check_all(linear_gelu, linear_gelu_torch, linear_gelu_reference, tensors, (dy,))


def test_more_rows_than_the_programs_take_at_once(monkeypatch):
    monkeypatch.setattr(gelu, "ROW_PROGRAMS", {"sm_80": 3})  # for 101 rows: 34 each, the last tile half full
    tensors, dy = inputs((101, 8), 40, torch.float32)
    check_all(linear_gelu, linear_gelu_torch, linear_gelu_reference, tensors, (dy,))


@pytest.mark.parametrize("arithmetic", [contextlib.nullcontext, approximations_of_a_gpu])
def test_the_whole_range_of_the_function(arithmetic):
    """From where y is 0 to where y is z, through both tails, beyond the reach of exp."""
    z = torch.cat([torch.linspace(-12, 12, 401), torch.tensor([-1e4, -300.0, -60.0, 60.0, 300.0, 1e4])])
    tensors = {"z": z.repeat(2, 1).to(DEVICE).requires_grad_(), "bias": torch.zeros_like(z).to(DEVICE).requires_grad_()}
    upstream = (torch.ones_like(tensors["z"]),)
    with arithmetic():
        check_all(bias_gelu, bias_gelu_torch, bias_gelu_reference, tensors, upstream)


def test_the_negative_tail_keeps_its_digits():
    """Number by number, where 1 + tanh(u) has lost nearly all of them."""
    z = torch.linspace(-8, -1, 64).repeat(1, 1).to(DEVICE)
    exact = z.double() * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (z.double() + 0.044715 * z.double() ** 3))
    torch.testing.assert_close(bias_gelu(z, torch.zeros(64, device=DEVICE)).double(), exact, rtol=2e-5, atol=0)


def test_reference_is_pytorch_in_float64_and_differentiable():
    sizes = ((3, 5), (7, 5), (7,))
    arguments = tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    torch.testing.assert_close(linear_gelu_reference(*arguments), linear_gelu_torch(*arguments))
    assert torch.autograd.gradcheck(linear_gelu_reference, arguments)


def test_inputs_need_not_be_contiguous():
    tensors, dy = inputs((40, 24), 48, torch.float32)
    tensors["x"] = tensors["x"].detach()[:, ::2].requires_grad_()
    tensors["weight"] = torch.randn(12, 48, device=DEVICE).t().requires_grad_()
    tensors["bias"] = torch.randn(96, device=DEVICE)[::2].requires_grad_()
    for upstream in (dy.reshape(48, 40).t(), dy.new_ones(1, 1).expand(40, 48)):
        check_all(linear_gelu, linear_gelu_torch, linear_gelu_reference, tensors, (upstream,))


def test_no_rows_give_no_rows_and_zero_gradients():
    tensors, dy = inputs((2, 0, 16), 64, torch.float32)
    with new_memory_is_nan():
        found = results(linear_gelu, tensors, (dy,))
    assert found["output 0"].shape == (2, 0, 64)
    assert (found["dweight"] == 0).all() and (found["dbias"] == 0).all()


def test_under_autocast_it_follows_the_product_and_gradients_follow_the_parameters():
    tensors, dy = inputs((5, 16), 64, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(linear_gelu, tensors, (dy,))
    assert found["output 0"].dtype == torch.bfloat16
    assert all(found[f"d{name}"].dtype == torch.float32 for name in tensors)


@plain_memory
def test_nothing_is_read_past_the_end_of_a_tensor():
    tensors = {name: before_a_wall(t) for name, t in {"z": torch.randn(5, 100), "bias": torch.randn(100)}.items()}
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    upstream = (before_a_wall(torch.randn(5, 100)),)
    check_all(bias_gelu, bias_gelu_torch, bias_gelu_reference, tensors, upstream)


@plain_memory
def test_offsets_pass_two_to_the_31():
    """Rows 2^29 columns long, of which one program looks at 16. Were the offset an int32, this would crash."""
    W, cols = 2**29 + 16, 16
    z, y, dz = (far_rows(5, W, cols) for _ in range(3))
    z[4].copy_(torch.arange(cols))
    bias = torch.zeros(cols)
    gelu._forward_kernel[(5, 1)](z[0], bias, y[0], 5, W=W, ROWS=1, COLS=cols)
    torch.testing.assert_close(y[4].float(), torch.nn.functional.gelu(z[4].float()), atol=1e-3, rtol=0)

    parts = far_rows(5, W, cols, torch.float32)
    gelu._backward_kernel[(5, 1)](z[0], z[0], bias, dz[0], parts[0], 5, W=W, ROWS=1, COLS=cols)
    torch.testing.assert_close(dz[4].float(), parts[4], atol=1e-2, rtol=0)
    assert dz[4][8] == 8.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 9)}, r"weight must be \(W, C\).* got weight \(32, 8\), bias \(32,\) and x \(2, 9\)"),
        ({"bias": torch.zeros(8)}, r"bias \(8,\)"),
        ({"weight": torch.zeros(32)}, r"weight \(32,\)"),
        ({"weight": torch.zeros(32, 8, dtype=torch.float64)}, "weight is torch.float64: the kernels take float32"),
        ({"bias": torch.zeros(32, device="meta")}, "bias is on meta, x on cpu: move them together"),
    ],
)
def test_a_wrong_argument_is_named(change, sentence):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.ones(32, 8), "bias": torch.ones(32)}
    with pytest.raises(ValueError, match=sentence):
        linear_gelu(**arguments | change)


def test_the_operators_are_registered_soundly():
    z, bias = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((3, 40), (40,)))
    torch.library.opcheck(gelu._bias_gelu, (z, bias))
    torch.library.opcheck(gelu._backward, (z.detach(), z.detach(), bias.detach()))
