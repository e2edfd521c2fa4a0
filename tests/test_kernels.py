"""kernels/__init__.py: the switchboard, and what the kernel files promise together."""

import os
import subprocess
import sys
import types
from itertools import chain, combinations

import pytest
import torch
from accuracy import DEVICE
from torch.autograd import forward_ad

from kernels import FAMILIES, common, families, select
from kernels.common import architecture, emulate_gpu, for_architecture
from kernels.report.shapes import Shape, arguments

OPERATIONS = [operation for operations in FAMILIES.values() for operation in operations]
SMALL = Shape(B=2, T=5, C=32, H=2, L=1, V=65)


def test_every_subset_of_families_is_triton_there_and_pytorch_elsewhere():
    subsets = chain.from_iterable(combinations(FAMILIES, size) for size in range(len(FAMILIES) + 1))
    for subset in subsets:
        ops = select(",".join(subset) or "none", DEVICE)
        for family, functions in FAMILIES.items():
            for name in functions:
                function = getattr(ops, name)
                assert function.__name__ == (name if family in subset else f"{name}_torch")
                assert function.__module__ == f"kernels.{family}"


def test_names_are_all_none_or_a_list_in_any_order():
    assert families("all") == tuple(FAMILIES)
    assert families("none") == ()
    assert families(" gelu, layernorm ") == ("layernorm", "gelu")
    for wrong in ("", "gelu,relu", "All", "none,gelu"):
        with pytest.raises(ValueError, match="use all, none, or a comma-separated list of layernorm, gelu, attention"):
            families(wrong)


@pytest.mark.parametrize(
    ("shape", "family", "reason"),
    [
        ({"n_embd": 768, "n_head": 4}, "attention", "takes heads of 16 to 128 channels, and a head has 192"),
        ({"n_embd": 32, "n_head": 4}, "attention", "and a head has 8"),
        ({"dropout": 0.2, "n_embd": 64, "n_head": 2}, "attention", "has no dropout, and dropout is 0.2"),
        ({"n_embd": 8200, "n_head": 82}, "layernorm", "takes rows of 1 to 8192 elements, and a row has 8200"),
    ],
)
def test_auto_leaves_what_a_kernel_cannot_do_to_pytorch_and_says_so_once_while_a_name_is_refused(shape, family, reason):
    said = []
    ops = select("auto", "cuda", **shape, say=said.append)
    for name in FAMILIES:
        for operation in FAMILIES[name]:
            assert getattr(ops, operation).__name__ == (f"{operation}_torch" if name == family else operation)
    (sentence,) = said
    assert sentence.startswith(f"--kernels auto leaves {family} to PyTorch: ") and reason in sentence
    others = ",".join(name for name in FAMILIES if name != family)
    for named in ("all", family):
        with pytest.raises(ValueError, match=f"{reason}: leave {family} to PyTorch with --kernels {others}"):
            select(named, "cuda", **shape)
    assert select(others, "cuda", **shape) == ops and select("auto", "cpu", **shape, say=said.append) == select("none")
    assert len(said) == 1


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    environment = {"PATH": "", "PYTHONPATH": os.environ["PYTHONPATH"], **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_without_a_gpu_or_the_interpreter_imports_do_nothing_and_select_and_every_kernel_name_the_way_out():
    code = """
import os
before = dict(os.environ)
from kernels import attention, cross_entropy, gelu, layernorm, select
import torch
assert dict(os.environ) == before and not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
x, ones, targets = torch.ones(4, 32), torch.ones(32), torch.arange(4)
for call in (
    lambda: select("gelu", "cpu"),
    lambda: layernorm.layer_norm(x, ones, ones, 1e-5),
    lambda: layernorm.add_layer_norm(x, x, ones, ones, 1e-5),
    lambda: gelu.linear_gelu(x, x, torch.ones(4)),
    lambda: attention.causal_attention(torch.ones(1, 4, 96), 2, 0.0),
    lambda: cross_entropy.cross_entropy(x, targets, 32),
    lambda: cross_entropy.linear_cross_entropy(x, x, targets, 4),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    done = run(code)
    need = "they need a GPU and this run is on cpu"
    selected, *called = done.stdout.splitlines()
    cure = "use --kernels none to train, or set TRITON_INTERPRET=1 to study the kernels on a CPU"
    assert selected == f"--kernels gelu asks for Triton kernels, but {need}: {cure}"
    assert called == [f"Triton kernels cannot run on this tensor: {need}; set TRITON_INTERPRET=1 to use a CPU"] * 6
    done = run(code, TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_without_the_package_triton_pytorch_does_the_work():
    """As on macOS: the kernel files must still import, and their PyTorch versions run."""
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails as if it were not installed
import torch, kernels
ops = kernels.select("none", "cpu")
x, w, b = torch.randn(2, 3, 32), torch.ones(32), torch.zeros(32)
y, s = ops.add_layer_norm(x, x, w, b, 1e-5)
assert ops.linear_gelu(ops.layer_norm(y, w, b, 1e-5), torch.ones(128, 32), torch.zeros(128)).shape == (2, 3, 128)
assert ops.causal_attention(torch.randn(2, 3, 96), 2, 0.0).shape == (2, 3, 32)
loss = ops.linear_cross_entropy(torch.randn(4, 32), torch.randn(9, 32), torch.arange(4), 7)
assert loss.isfinite() and ops.cross_entropy(torch.randn(4, 9), torch.arange(4), 7).isfinite()
assert kernels.unavailable(torch.device("cuda")) == "the package triton is not installed"
try:
    kernels.select("all", "cuda")
except ValueError as error:
    print(error)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "the package triton is not installed: use --kernels none to train" in done.stdout


def test_texts_of_every_length_share_a_few_compiled_kernels():
    """An evaluation or a sample calls the kernels at any number of tokens: a new one per length would take seconds."""
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature
from kernels import attention, gelu, layernorm

def compiled(kernel, launches):
    bind, x = create_function_from_signature(kernel.signature, kernel.params, backend), torch.empty(16)
    calls = ({name: launch.pop(name, x) for name in kernel.arg_names} | launch for launch in launches)
    return len({str(bind(**call)[1:]) for call in calls})  # specialization and options, not the arguments

backend = CUDABackend(GPUTarget("cuda", 80, 32))
lengths = range(1, 1025)
for name in attention.LAUNCH:
    parameters = (attention.launch_parameters(name, T, 64, torch.bfloat16, "sm_80") | {"T": T} for T in lengths)
    launches = [launch | {"H": 12, "D": 64, "scale": 0.125} for launch in parameters]
    print(compiled(getattr(attention, f"_{name}_kernel"), launches))
for kernel, constants in (
    (gelu._forward_kernel, gelu.LAUNCH["forward"] | {"W": 3072}),
    (gelu._backward_kernel, gelu.LAUNCH["backward"] | {"W": 3072}),
    (layernorm._backward_kernel, layernorm.launch_parameters(768) | {"C": 768}),
):
    print(compiled(kernel, [constants | {"N": N} for N in lengths]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    # attention: blocks that divide T, smaller ones that do, and masks; the others: one for all
    assert done.stdout.split() == ["3"] * 3 + ["1"] * 3


def outputs_and_gradients(function, given, differentiable, dtype):
    """Every output, and the gradient of every tensor, as in training under autocast; float32 without it."""
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        outputs = function(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [output for output, wanted in zip(outputs, differentiable, strict=True) if wanted]
    leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
    return [*outputs, *torch.autograd.grad(used, leaves, [output.detach().cos() for output in used])]


def all_equal(a, b):
    return all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_same_input_gives_the_same_bits(operation):
    given = arguments(operation, Shape(B=1, T=70, C=64, H=2, L=1, V=300), torch.float16, DEVICE)
    function = getattr(select("all", DEVICE), operation)
    assert all_equal(*(outputs_and_gradients(function, *given, torch.float16) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_compiles_as_one_graph_with_the_same_bits(operation, dtype):
    given, differentiable = arguments(operation, SMALL, dtype, DEVICE)
    function = getattr(select("all", DEVICE), operation)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = (outputs_and_gradients(f, given, differentiable, dtype) for f in (function, compiled))
    assert all_equal(eager, traced)
    with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        eager, traced = function(*given), compiled(*given)
    assert all_equal(*(found if isinstance(found, tuple) else (found,) for found in (eager, traced)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_second_derivative_is_refused(operation):
    given, _ = arguments(operation, SMALL, torch.float32, DEVICE)
    outputs = getattr(select("all", DEVICE), operation)(*given)
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    (gradient,) = torch.autograd.grad(output.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gpt2::.* has no second derivative: use --kernels none|differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_derivative_in_forward_mode_is_refused_rather_than_0(operation, monkeypatch):
    monkeypatch.setenv("PYTORCH_JIT", "0")  # or forward mode compiles decompositions first, for seconds
    function, (given, _) = getattr(select("all", DEVICE), operation), arguments(operation, SMALL, torch.float32, DEVICE)
    for place, tensor in enumerate(given):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor = tensor.detach()
            of_one = lambda x, place=place: function(*given[:place], x, *given[place + 1 :])  # noqa: E731
            with pytest.raises(RuntimeError, match="no forward-mode derivative: use --kernels none"):
                torch.func.jvp(of_one, (tensor,), (tensor,))
    outputs = function(*given)
    output = (outputs[0] if isinstance(outputs, tuple) else outputs).sum()
    with forward_ad.dual_level():  # of the gradient, whose tangent comes from what follows the operation
        dual = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
        if operation == "linear_cross_entropy":  # its backward is PyTorch's
            (gradient,) = torch.autograd.grad(output, given[0], dual)
            assert torch.equal(*forward_ad.unpack_dual(gradient))
        else:
            with pytest.raises(RuntimeError, match="no forward-mode derivative: use --kernels none"):
                torch.autograd.grad(output, given[0], dual)


def test_launch_parameters_are_those_of_a_gpu_or_of_the_newest_before_it():
    table = {"sm_80": 1, "sm_86": 2, "sm_90": 3, "sm_120": 4}
    names = ("sm_75", "sm_80", "sm_87", "sm_89", "sm_90", "sm_103", "sm_110", "sm_121", "gfx942", "gfx90a")
    assert [for_architecture(table, name) for name in names] == [1, 1, 2, 2, 3, 3, 3, 4, 1, 1]
    assert for_architecture(table | {"gfx942": 5}, "gfx942") == 5


@pytest.mark.skipif(DEVICE == "cuda", reason="there a GPU answers for itself")
def test_the_interpreter_takes_the_launch_parameters_of_the_gpu_it_is_told():
    x = torch.zeros(1)
    assert architecture(x) == "sm_80"
    with emulate_gpu("sm_90"):
        assert architecture(x) == "sm_90"
        with pytest.raises(ZeroDivisionError), emulate_gpu("gfx942"):
            assert architecture(x) == "gfx942"
            raise ZeroDivisionError
        assert architecture(x) == "sm_90"
    assert architecture(x) == "sm_80"


def test_a_gpu_answers_for_itself(monkeypatch):
    """Two GPUs that are not there: all that PyTorch says of them."""
    properties = [types.SimpleNamespace(major=12, minor=0, gcnArchName="gfx942:sramecc+:xnack-")] * 2
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    gpu = types.SimpleNamespace(device=torch.device("cuda:0"))
    common._architecture_of_gpu.cache_clear()
    with emulate_gpu("sm_90"):
        assert architecture(gpu) == "sm_120"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert architecture(types.SimpleNamespace(device=torch.device("cuda:1"))) == "gfx942"
    common._architecture_of_gpu.cache_clear()
