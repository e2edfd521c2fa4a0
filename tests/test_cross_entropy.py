"""cross_entropy.py: accuracy over awkward vocabularies and dtypes, extremes, memory, errors, operator registration."""

import math

import pytest
import torch
from accuracy import DEVICE, before_a_wall, check_all, far_rows, new_memory_is_nan, plain_memory, results

from kernels import cross_entropy as ce
from kernels.common import emulate_gpu
from kernels.cross_entropy import (
    IGNORE,
    cross_entropy,
    cross_entropy_reference,
    cross_entropy_torch,
    linear_cross_entropy,
    linear_cross_entropy_torch,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log|log2|subtract|add)")  # nan, inf: meant
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UPSTREAM = (torch.tensor(-1.7, device=DEVICE),)  # of the loss: neither 1 nor positive


def linear_cross_entropy_reference(x, weight, targets, vocab_size):
    return cross_entropy_reference(x @ weight.T, targets, vocab_size)


def make_targets(N, V, seed=0):
    """Random ones, with the first and the last column, and where there is room two rows left out."""
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))
    targets[0] = V - 1
    targets[N // 2] = 0 if N > 1 else targets[0]
    if N > 4:
        targets[1], targets[-1] = IGNORE, IGNORE
    return targets.to(DEVICE)


def make_logits(N, width, dtype, scale=3.0, seed=0):
    logits = torch.randn(N, width, generator=torch.Generator().manual_seed(seed)) * scale
    return logits.to(DEVICE, dtype).requires_grad_()


def check_cross_entropy(logits, targets, V):
    versions = (cross_entropy, cross_entropy_torch, cross_entropy_reference)
    check_all(*versions, {"logits": logits}, UPSTREAM, targets=targets, vocab_size=V)


def make_linear(N, C, V, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, C, generator=generator), 2 * torch.randn(width, C, generator=generator) / C**0.5
    return {name: t.to(DEVICE, dtype).requires_grad_() for name, t in (("x", x), ("weight", weight))}


def check_linear(tensors, targets, V):
    versions = (linear_cross_entropy, linear_cross_entropy_torch, linear_cross_entropy_reference)
    check_all(*versions, tensors, UPSTREAM, targets=targets, vocab_size=V)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "V", "width"),
    [(1, 1, 1), (65, 2, 2), (5, 65, 65), (7, 65, 128), (3, 8192, 8192), (6, 8192, 20000)]
    + [(2, 50257, 50304), (2, 50257, 50257)],
)
def test_cross_entropy_is_as_right_as_pytorch_and_fills_every_element(N, V, width, dtype):
    with new_memory_is_nan():
        check_cross_entropy(make_logits(N, width, dtype), make_targets(N, V), V)


@pytest.mark.parametrize("block", sorted(set(ce.BLOCK.values())))
@pytest.mark.parametrize(("V", "width"), [(4096, 4096), (4097, 8200), (9000, 9088)])
def test_the_block_of_every_gpu_is_as_right_as_pytorch(V, width, block):
    gpu = next(gpu for gpu, columns in ce.BLOCK.items() if columns == block)
    assert ce.launch_parameters(9088, gpu) == {"BLOCK": block, "num_warps": block // 256}
    with emulate_gpu(gpu), new_memory_is_nan():
        check_cross_entropy(make_logits(3, width, torch.float32), make_targets(3, V), V)
        check_linear(make_linear(3, 8, V, width, torch.float32), make_targets(3, V), V)


@pytest.mark.parametrize("width", [1, 8, 104, 300, 9088])
def test_no_two_threads_share_a_column(width):
    """Else one may overwrite a logit in place before the other, which only reads, has read it."""
    launch = ce.launch_parameters(width, "sm_80")
    assert launch["BLOCK"] == 32 * ce.VECTOR.value * launch["num_warps"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "C", "V", "width"), [(1, 8, 1, 8), (9, 100, 65, 128), (40, 16, 300, 300), (6, 8, 9000, 9088)]
)
def test_linear_cross_entropy_is_as_right_as_pytorch_and_fills_every_element(N, C, V, width, dtype, monkeypatch):
    monkeypatch.setattr(ce, "CHUNK_BYTES", 64)  # 16 or 32 tokens: up to three chunks, the last one short
    with new_memory_is_nan():
        check_linear(make_linear(N, C, V, width, dtype), make_targets(N, V), V)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (torch.tensor([[1e4, -1e4, 0.0, 1e4]]), "far apart"),
        (1e4 + torch.tensor([[0.5, -1.0, 0.25, 0.0]]), "far from 0"),
        (torch.tensor([[0.0, -math.inf, 1.0, -math.inf]]), "forbidden columns"),
        (torch.full((1, 4), 7.0), "all equal"),
        (torch.tensor([[60.0, 0.0, 0.0, 0.0]]), "almost sure, and right"),
        (torch.tensor([[0.0, 60.0, 0.0, 0.0]]), "almost sure, and wrong"),
    ],
)
def test_extreme_logits(rows, why):
    check_cross_entropy(rows.repeat(3, 40).to(DEVICE).requires_grad_(), torch.tensor([0, 2, 156], device=DEVICE), 160)


def test_padded_columns_do_not_matter_and_get_no_gradient():
    logits, targets = make_logits(5, 128, torch.float32), make_targets(5, 65)
    with torch.no_grad():
        logits[:, 65:] = 1e4
    found = results(cross_entropy, {"logits": logits}, UPSTREAM, targets=targets, vocab_size=65)
    real = {"logits": logits.detach()[:, :65].requires_grad_()}
    bare = results(cross_entropy, real, UPSTREAM, targets=targets, vocab_size=65)
    assert torch.equal(found["output 0"], bare["output 0"])
    assert (found["dlogits"][:, 65:] == 0).all()
    tensors = make_linear(5, 16, 65, 128, torch.bfloat16)
    found = results(linear_cross_entropy, tensors, UPSTREAM, targets=targets, vocab_size=65)
    assert (found["dweight"][65:] == 0).all() and found["dweight"][:65].any()


def test_rows_left_out_get_no_gradient_and_an_empty_batch_is_0_rather_than_nan():
    tensors, targets = make_linear(6, 16, 65, 128, torch.float32), make_targets(6, 65)
    found = results(linear_cross_entropy, tensors, UPSTREAM, targets=targets, vocab_size=65)
    assert (found["dx"][targets == IGNORE] == 0).all() and found["dx"].any()
    for nothing in (torch.full_like(targets, IGNORE), targets[:0]):
        N = len(nothing)
        tensors["x"] = tensors["x"].detach()[:N].requires_grad_()
        logits = {"logits": make_logits(N, 128, torch.float32)}
        cases = [(function, tensors) for function in (linear_cross_entropy, linear_cross_entropy_torch)]
        cases += [(function, logits) for function in (cross_entropy, cross_entropy_torch)]
        for function, inputs in cases:
            with new_memory_is_nan():
                found = results(function, inputs, UPSTREAM, targets=nothing, vocab_size=65)
            assert all((number == 0).all() for number in found.values()), function


def test_the_logits_of_the_caller_stay_as_they_are_and_the_graph_may_be_walked_twice():
    logits, targets = make_logits(5, 128, torch.float32), make_targets(5, 65)
    before = logits.detach().clone()
    loss = cross_entropy(logits, targets, 65)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(before, logits) and torch.equal(first, second)
    tensors = make_linear(5, 16, 65, 128, torch.float32)
    loss = linear_cross_entropy(**tensors, targets=targets, vocab_size=65)
    first, second = (torch.autograd.grad(loss, tensors["weight"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("target", [65, 127, 128, -1, -101, 2**40])
def test_a_target_out_of_range_is_nan_and_nothing_is_read_or_written_there(target):
    logits, targets = make_logits(4, 128, torch.float32), make_targets(4, 65)
    targets[2] = target
    found = results(cross_entropy, {"logits": logits}, UPSTREAM, targets=targets, vocab_size=65)
    assert found["output 0"].isnan() and found["dlogits"][2, :65].isnan().all()
    assert found["dlogits"][[0, 1, 3]].isfinite().all()
    tensors = make_linear(4, 16, 65, 128, torch.float32)
    assert linear_cross_entropy(**tensors, targets=targets, vocab_size=65).isnan()


def test_the_upstream_gradient_scales_float16_before_it_is_rounded():
    """A loss scaled by 2^15, as for float16 training: gradients that would be 0 unscaled."""
    logits, targets = make_logits(8, 2000, torch.float16, scale=6.0), make_targets(8, 2000)
    upstream = (torch.tensor(2.0**15, device=DEVICE),)
    versions = (cross_entropy, cross_entropy_torch, cross_entropy_reference)
    check_all(*versions, {"logits": logits}, upstream, targets=targets, vocab_size=2000)


def test_under_autocast_the_product_is_bfloat16_and_the_gradient_of_the_weight_float32():
    tensors, targets = make_linear(40, 16, 65, 128, torch.float32), make_targets(40, 65)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = results(linear_cross_entropy, tensors, UPSTREAM, targets=targets, vocab_size=65)
        theirs = results(linear_cross_entropy_torch, tensors, UPSTREAM, targets=targets, vocab_size=65)
    assert ours["output 0"].dtype == ours["dx"].dtype == ours["dweight"].dtype == torch.float32
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=1e-3)
    tensors["x"] = tensors["x"].detach().bfloat16().requires_grad_()  # as the last layer norm hands it on
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = results(linear_cross_entropy, tensors, UPSTREAM, targets=targets, vocab_size=65)
    assert (ours["dx"].dtype, ours["dweight"].dtype) == (torch.bfloat16, torch.float32)


def test_the_gradient_of_the_weight_is_summed_over_chunks_in_float32(monkeypatch):
    """In bfloat16, each of 32 additions would round to 8 bits."""
    tensors, targets = make_linear(128, 16, 65, 128, torch.bfloat16), make_targets(128, 65)
    tensors["weight"] = tensors["weight"].detach().float().requires_grad_()
    monkeypatch.setattr(ce, "CHUNK_BYTES", 8)
    chunks = results(linear_cross_entropy, tensors, UPSTREAM, targets=targets, vocab_size=65)["dweight"]
    monkeypatch.setattr(ce, "CHUNK_BYTES", 2**14)
    whole = results(linear_cross_entropy, tensors, UPSTREAM, targets=targets, vocab_size=65)["dweight"]
    assert (chunks - whole).norm() < 1e-6 * whole.norm()


def test_without_a_gradient_to_come_only_the_loss_is_made():
    tensors, targets = make_linear(40, 16, 65, 128, torch.float32), make_targets(40, 65)
    with_gradient = linear_cross_entropy(**tensors, targets=targets, vocab_size=65)
    with torch.no_grad():
        loss = linear_cross_entropy(**tensors, targets=targets, vocab_size=65)
        bare = linear_cross_entropy(**{n: t.detach() for n, t in tensors.items()}, targets=targets, vocab_size=65)
    assert torch.equal(loss, with_gradient) and torch.equal(loss, bare) and not loss.requires_grad
    arguments = (tensors["x"], tensors["weight"], targets, 65, False)
    _, _, dx, dweight = ce._linear_cross_entropy(*arguments)
    assert dx.numel() == dweight.numel() == 0


def peak_bytes(function):
    """The most memory that function() holds at a time, beyond what was there, as the profiler saw it come and go."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.skipif(DEVICE == "cuda", reason="the profile of a CPU is what peak_bytes reads")
def test_it_needs_under_a_quarter_of_the_memory_of_logits_and_cross_entropy(monkeypatch):
    """
    At N = 8,192, V = 50,257 padded to 50,304, C = 768, bfloat16 under autocast: ours holds one chunk of logits,
    dweight, the weight in bfloat16, x and dx; PyTorch, in its backward, the float32 log-softmax and two gradients.
    """
    N, C, V = 8192, 768, 50304
    ours = 2 * min(N, ce.CHUNK_BYTES // 2) * V + 4 * V * C + 2 * V * C + 2 * 2 * N * C
    assert ours < 0.25 * (3 * 4 * N * V)

    # the same proportions at a 32nd of each length, measured: in float32, half of the tokens are a chunk
    N, C, V = 256, 24, 1572
    tensors, targets = make_linear(N, C, V, V, torch.float32), make_targets(N, V)
    monkeypatch.setattr(ce, "CHUNK_BYTES", 4 * N // 2)

    def peak(function):
        return peak_bytes(lambda: results(function, tensors, UPSTREAM, targets=targets, vocab_size=V))

    assert peak(linear_cross_entropy) < 0.25 * peak(linear_cross_entropy_torch)


def test_inputs_need_not_be_contiguous():
    targets = make_targets(10, 65)[::2]
    rows_apart = make_logits(5, 256, torch.float32).detach()[:, 100:200].requires_grad_()
    columns_apart = make_logits(80, 5, torch.float32).detach().t().requires_grad_()
    for logits in (rows_apart, columns_apart):
        check_cross_entropy(logits, targets, 65)
    tensors = make_linear(16, 5, 65, 5, torch.float32)
    tensors["x"] = tensors["x"].detach().t().requires_grad_()  # (5, 16)
    tensors["weight"] = torch.randn(16, 80, device=DEVICE).t().requires_grad_()
    check_linear(tensors, targets, 65)


@plain_memory
@pytest.mark.parametrize("V", [65, 100, 8300])
def test_nothing_is_read_past_the_end_of_a_tensor(V):
    width = max(100, V)
    logits, targets = make_logits(2, width, torch.float32), make_targets(2, V)
    check_cross_entropy(before_a_wall(logits), before_a_wall(targets), V)


@plain_memory
def test_offsets_pass_two_to_the_31():
    """Three rows 2^30 apart. Were the offset an int32, this would crash."""
    stride, width = 2**30 + 16, 16
    rows, targets = far_rows(3, stride, width), torch.tensor([1, 2, 3])
    rows[2][3] = 9.0
    outputs = torch.zeros(3, 3)
    ce._forward_kernel[(3,)](rows[0], targets, *outputs, stride, V=width, WIDTH=width, BLOCK=width)
    assert outputs[0, 2].item() == pytest.approx(math.log1p(15 * math.exp(-9)), abs=1e-6)
    assert outputs[0, 1].item() == pytest.approx(math.log(16), abs=1e-6)
    dlogits = torch.zeros(3, width)
    arguments = (rows[0], targets, *outputs[1:], torch.ones(()), dlogits, stride)
    ce._backward_kernel[(3,)](*arguments, V=width, WIDTH=width, BLOCK=width)
    expected = torch.stack([row.float().softmax(0) for row in rows]) - torch.eye(width)[targets]
    torch.testing.assert_close(dlogits, expected)


def test_reference_is_pytorch_in_float64_and_differentiable():
    logits, targets = torch.randn(6, 9, dtype=torch.float64, requires_grad=True), make_targets(6, 7)
    exact = torch.nn.functional.cross_entropy(logits[:, :7], targets.cpu())
    torch.testing.assert_close(cross_entropy_reference(logits, targets.cpu(), 7), exact)
    assert torch.autograd.gradcheck(lambda logits: cross_entropy_reference(logits, targets.cpu(), 7), logits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(3, 9)}, r"x must be \(N, C\) and weight \(W, C\), got \(3, 9\) and \(16, 8\)"),
        ({"x": torch.zeros(1, 3, 8)}, r"x must be \(N, C\)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"with one target per row, got \(3, 8\) and targets \(4,\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets must be int64 on cpu, got torch.int32 on cpu"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "got torch.int64 on meta"),
        ({"vocab_size": 17}, "vocab_size is 17: use 1 to 16, the number of columns"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"weight": torch.zeros(16, 8, dtype=torch.float64)}, "weight is torch.float64: the kernels take float32"),
    ],
)
def test_a_wrong_argument_is_named(change, sentence):
    right = {"x": torch.zeros(3, 8), "weight": torch.ones(16, 8)}
    right |= {"targets": torch.zeros(3, dtype=torch.int64), "vocab_size": 16}
    with pytest.raises(ValueError, match=sentence):
        linear_cross_entropy(**right | change)
    with pytest.raises(ValueError, match="logits must be two-dimensional with one target per row"):
        cross_entropy(torch.zeros(1, 3, 8), right["targets"], 8)


def test_the_operators_are_registered_soundly():
    logits, targets = make_logits(3, 24, torch.float32), make_targets(3, 20)
    torch.library.opcheck(ce._cross_entropy, (logits, targets, 20))
    row = torch.ones(3, device=DEVICE)
    torch.library.opcheck(ce._backward, (row[0].clone(), logits.detach(), targets, row, row, 20))
    tensors = make_linear(3, 8, 20, 24, torch.float32)
    torch.library.opcheck(ce._linear_cross_entropy, (tensors["x"], tensors["weight"], targets, 20, True))
    detached = [tensor.detach() for tensor in tensors.values()]
    torch.library.opcheck(ce._linear_cross_entropy, (*detached, targets, 20, False))
